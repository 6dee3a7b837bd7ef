"""scikit-learn's diabetes table: 442 patients, 10 features, one real target. No file is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

NUM_TRAIN = 240
NUM_VALIDATION = 80
SPLIT_SEED = 0


@final
@dataclass(frozen=True, eq=False)
class Table:
    """Features (N, D) and targets (N, 1), both standardised with the training rows' moments."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def loader(
        self, batch_size: int = 256, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> DataLoader:
        """Batches on `device`, in order, or shuffled by `generator`."""
        data = TensorDataset(self.inputs.to(device), self.targets.to(device))
        return DataLoader(data, batch_size=batch_size, shuffle=generator is not None, generator=generator)


@final
@dataclass(frozen=True, eq=False)
class Diabetes:
    """Splits of the table, and the standard deviation of the target in its own unit."""

    train: Table
    validation: Table
    test: Table
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
        train=Table(features[:NUM_TRAIN], values[:NUM_TRAIN]),
        validation=Table(features[NUM_TRAIN:cut], values[NUM_TRAIN:cut]),
        test=Table(features[cut:], values[cut:]),
        target_std=float(y_std),
    )
