"""Smaller students from trained models: fewer blocks, narrower states, fewer heads, narrower feed-forward layers."""
