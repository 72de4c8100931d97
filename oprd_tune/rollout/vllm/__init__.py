"""Sampling with vLLM, in the trainer's processes or on servers. Nothing else imports vLLM."""
