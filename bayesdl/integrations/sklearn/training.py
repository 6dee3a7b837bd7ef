"""Networks for tables of numbers: built, and trained with their prior precisions on the training data alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.likelihoods import Likelihood
from bayesdl.marginal import EvidenceTrainer

Chunks = list[tuple[Tensor, Tensor]]

# rows that go through the network together outside of training
ROWS = 1024
# The evidence is tuned this often, from this share of the steps on, starting from a weak prior: with a strong one, or
# sooner, it finds that small data sets need no network at all and never comes back.
TUNINGS, BURN_IN, PRECISION = 10, 0.2, 1e-2


@final
class Standardize(nn.Module):
    """(x - mean) / scale, column by column; constant columns keep their scale."""

    mean: Tensor
    scale: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("scale", spread(x))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def spread(x: Tensor) -> Tensor:
    """Standard deviation of each column; 1 where a column is constant but for rounding."""
    scale, size = x.std(0, correction=0), x.abs().amax(0)
    return torch.where(scale > 10 * torch.finfo(x.dtype).eps * size, scale, torch.ones_like(scale))


def perceptron(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with SiLU between them, whose smoothness suits tables."""
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))


@final
@dataclass(frozen=True)
class Recipe:
    """Adam, its rate falling to zero as a cosine."""

    steps: int
    lr: float
    batch_size: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not self.lr > 0:
            raise ArgumentError(
                f"steps={self.steps}, batch_size={self.batch_size}, lr={self.lr}; expected steps >= 0, batch_size >= 1 "
                "and a positive lr"
            )


def chunks(x: Tensor, y: Tensor) -> Chunks:
    """A loader over all rows in their order."""
    return list(zip(x.split(ROWS), y.split(ROWS), strict=True))


def train(network: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, recipe: Recipe) -> Likelihood:
    """Train a network of the library's own copy, in place, on the evidence (see `EvidenceTrainer`); leaves eval mode.

    Returns:
        The likelihood with the noise that was learned along.

    Raises:
        NonFiniteError: the outputs are NaN or infinite.
    """
    trainer = EvidenceTrainer(network, chunks(x, y), likelihood, precision=PRECISION)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    first, every = int(BURN_IN * recipe.steps), max(1, recipe.steps // TUNINGS)
    network.train()
    for step, rows in enumerate(_batches(len(x), recipe), 1):
        optimizer.zero_grad()
        try:
            trainer.loss(network(x[rows]), y[rows]).backward()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step} of {recipe.steps}: {error}; try a smaller lr") from error
        optimizer.step()
        schedule.step()
        if step >= first and (step - first) % every == 0:
            trainer.fit()
    network.eval()
    return trainer.likelihood


def _batches(count: int, recipe: Recipe) -> Iterator[Tensor]:
    """Rows of each step, one epoch after another; torch's own generator is the caller's affair."""
    done = 0
    while done < recipe.steps:
        for rows in torch.randperm(count).split(recipe.batch_size):
            if done == recipe.steps:
                return
            done += 1
            yield rows
