"""On-policy representation distillation for torchtune: recipes, losses, taps and rollouts."""

__version__ = "0.1.0"
