"""Counts, means and scatter of features by class, from one pass in any split; and features read off a clone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.data import batches
from bayesdl.errors import ArgumentError, ShapeError, check_finite
from bayesdl.evaluation.validation import wide
from bayesdl.network import Network


@final
@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over features `(N, d)`: `count` (K,) int64, `mean` (K, d) and the pooled `within` scatter (d, d), float64.

    Without labels there is one class. Any split and order of the data gives the one-shot result to rounding.
    """

    count: Tensor
    mean: Tensor
    within: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None, classes: int = 1) -> FeatureStatistics:
        """Of one batch; labels (N,) in [0, classes)."""
        z = wide(features)
        labels = torch.zeros(len(z), dtype=torch.int64, device=z.device) if labels is None else labels.to(z.device)
        count = torch.bincount(labels, minlength=classes)
        mean = z.new_zeros(len(count), z.shape[1]).index_add_(0, labels, z) / wide(count.clamp_min(1))[:, None]
        centred = z - mean[labels]
        return cls(count, mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Both together (Chan et al. 1983); classes that one side has not seen are added."""
        size = max(len(self.count), len(other.count))
        one, two = self._padded(size), other._padded(size)
        count = one.count + two.count
        share = wide(two.count) / count.clamp_min(1)
        gap = two.mean - one.mean
        cross = (one.count * share)[:, None] * gap
        mean = one.mean + share[:, None] * gap
        # A class that one side has not seen has weight 0 there, so its mean of zeros never counts.
        return FeatureStatistics(count, mean, one.within + two.within + gap.T @ cross)

    @property
    def total(self) -> int:
        """N."""
        return int(self.count.sum())

    @property
    def centre(self) -> Tensor:
        """(d,), mean of all features."""
        return (self.count.to(self.mean) @ self.mean) / self.total

    def scatter_about(self, origin: Tensor) -> Tensor:
        """(d, d), sum over all features of (z - origin)(z - origin)'."""
        off = self.mean - origin
        return self.within + off.T @ (self.count[:, None] * off)

    def covariance(self, *, shared: bool, shrinkage: float) -> Tensor:
        """(d, d), unbiased: within classes where `shared`, else of all features; S (1 - a) + a tr(S) / d I.

        Raises:
            ArgumentError: no more examples than dimensions, without shrinkage.
        """
        seen = int((self.count > 0).sum()) if shared else 1
        free, d = self.total - seen, self.mean.shape[1]
        if free < 1 or (free < d and shrinkage == 0):
            raise ArgumentError(
                f"{self.total} examples in {seen} classes leave a covariance of {d} features singular; give more "
                "examples, or shrinkage above 0"
            )
        scatter = (self.within if shared else self.scatter_about(self.centre)) / free
        level = shrinkage * scatter.diagonal().mean()
        return (1 - shrinkage) * scatter + level * torch.eye(d, dtype=scatter.dtype, device=scatter.device)

    def _padded(self, size: int) -> FeatureStatistics:
        extra = size - len(self.count)
        if extra == 0:
            return self
        count = torch.cat([self.count, self.count.new_zeros(extra)])
        return FeatureStatistics(
            count, torch.cat([self.mean, self.mean.new_zeros(extra, self.mean.shape[1])]), self.within
        )


@final
@dataclass(frozen=True)
class FeatureReader:
    """Features and outputs of a network: what `layer` gives, or what it is given where `inputs`.

    Axes of positions (pixels, tokens) are averaged: features are `(B, d)`.
    """

    network: Network
    layer: str
    inputs: bool

    def __call__(self, x: Any) -> tuple[Tensor, Tensor]:
        """(features (B, d), outputs (B, C)). The hook sits on the private clone, for this call alone."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            value = arguments[0] if self.inputs and arguments else output
            seen.append(value[0] if isinstance(value, tuple) else value)

        module = self.network.module()
        handle = module.get_submodule(self.layer).register_forward_hook(keep)
        try:
            with torch.no_grad():
                outputs = self.network(x)
        finally:
            handle.remove()
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() < 2:
            raise ShapeError(
                f"layer {self.layer!r} was called {len(seen)} times and must give one tensor (B, d) or (B, ..., d) once"
            )
        z = seen[0]
        if z.dim() == 3:
            z = z.mean(1)  # tokens: (B, T, d)
        elif z.dim() > 3:
            z = z.flatten(2).mean(2)  # images: (B, d, H, W)
        z = wide(z)
        check_finite(z, f"features of layer {self.layer!r}")
        return z, outputs

    def over(
        self, data: Iterable[Any], *, progress: bool, targets: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """(features, outputs, target) of every batch."""
        passes = batches(self.network, data, progress=progress, describe="features", need_targets=targets)
        for _, inputs, target in passes:
            yield (*self(inputs), target)
