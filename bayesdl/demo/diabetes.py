"""scikit-learn's diabetes table: 442 patients, 10 features, one real target. No file is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from bayesdl.demo.examples import Examples

NUM_TRAIN = 240
NUM_VALIDATION = 80
SPLIT_SEED = 0


@final
@dataclass(frozen=True, eq=False)
class Diabetes:
    """Features (N, 10) and targets (N, 1), both standardised with the training rows' moments.

    `target_std` is the standard deviation of the target in its own unit.
    """

    train: Examples
    validation: Examples
    test: Examples
    target_std: float


def load() -> Diabetes:
    """Random splits, the same in every run."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs = torch.as_tensor(bunch.data, dtype=torch.float64)
    targets = torch.as_tensor(bunch.target, dtype=torch.float64)[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    inputs, targets = inputs[order], targets[order]
    x_mean, x_std = inputs[:NUM_TRAIN].mean(0), inputs[:NUM_TRAIN].std(0)
    y_mean, y_std = targets[:NUM_TRAIN].mean(0), targets[:NUM_TRAIN].std(0)
    features, values = ((inputs - x_mean) / x_std).float(), ((targets - y_mean) / y_std).float()
    cut = NUM_TRAIN + NUM_VALIDATION
    return Diabetes(
        train=Examples(features[:NUM_TRAIN], values[:NUM_TRAIN]),
        validation=Examples(features[NUM_TRAIN:cut], values[NUM_TRAIN:cut]),
        test=Examples(features[cut:], values[cut:]),
        target_std=float(y_std),
    )
