"""Inputs with targets, and loaders over tensors that already lie on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs (N, ...) and as many targets (N, ...)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def loader(
    *tensors: Tensor,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> DataLoader:
    """Batches of the tensors on `device`, in order, or shuffled by `generator`."""
    data = TensorDataset(*(tensor.to(device) for tensor in tensors))
    return DataLoader(data, batch_size=batch_size, shuffle=generator is not None, generator=generator)
