"""Small networks with outputs at every position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 3


class Tagger(nn.Module):
    """Tokens -> logits `(B, T, C)`; every position sees its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(6, 4), nn.Conv1d(4, 5, 3, padding=1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(x).mT)).mT)


class Segmenter(nn.Module):
    """Images -> logits `(B, C, H, W)`; the last layer is a 3 x 3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class ClassesFirst(nn.Module):
    """Logits in torch's order `(B, C, T)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mT


def tagger() -> tuple[nn.Module, Tensor, Tensor]:
    """Network, inputs `(5, 4)`, targets with ignored positions, one example ignored as a whole; float64."""
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 6, (5, 4), generator=source), torch.randint(0, CLASSES, (5, 4), generator=source)
    y[0, 2:], y[3], y[4, 0] = -100, -100, -100
    return Tagger().double(), x, y


def segmenter() -> tuple[nn.Module, Tensor, Tensor]:
    """Network, inputs `(3, 2, 2, 4)`, targets `(3, 2, 4)` with ignored pixels; float64."""
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 2, 4, dtype=torch.float64, generator=source)
    y = torch.randint(0, CLASSES, (3, 2, 4), generator=source)
    y[0, 0], y[2, 1, 2] = -100, -100
    return Segmenter().double(), x, y


CASES = {"tagger": tagger, "segmenter": segmenter}
