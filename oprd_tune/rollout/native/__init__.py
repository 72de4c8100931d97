"""Sampling with the trainer's own model."""
