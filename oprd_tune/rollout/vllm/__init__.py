"""Sampling with vLLM, in the trainer's processes or on servers. No other folder imports vLLM."""
