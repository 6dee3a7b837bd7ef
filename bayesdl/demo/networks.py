"""The demo's networks: ordinary ones, with nothing in them that knows of `bayesdl`."""

from __future__ import annotations

from torch import nn


def digits_network(num_classes: int) -> nn.Sequential:
    """Convolutional classifier of (B, 1, 8, 8) images; (B, num_classes) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, num_classes),
    )


def diabetes_network(num_features: int) -> nn.Sequential:
    """Multi-layer perceptron for one real target; (B, num_features) to (B, 1)."""
    return nn.Sequential(
        nn.Linear(num_features, 32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
