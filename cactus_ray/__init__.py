"""Compression-aware certified training, searched with Ray Tune and Optuna, verified before it is deployed."""

__version__ = "0.1.0"
