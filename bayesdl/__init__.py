"""bayesdl: turns trained PyTorch networks into Bayesian ones."""

__version__ = "0.1.0"
