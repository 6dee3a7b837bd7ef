"""SWAG (Maddox et al. 2019): a Gaussian fitted to the weights that SGD visits around the trained network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl.batch import count_batches
from bayesdl.clone import independent_copy
from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.finetune import sgd_epoch, train_only, with_fresh_statistics
from bayesdl.methods.noise import with_left_out_noise
from bayesdl.posteriors import SamplePosterior
from bayesdl.posteriors.base import standard_normal


@final
@dataclass(frozen=True)
class SWAG(Method):
    """Moments of SGD iterates, then weights drawn from N(mean, 1/2 diag + low rank).

    Args:
        epochs: passes of SGD over the training loader, on a copy.
        lr: constant learning rate; large enough to leave the optimum's neighbourhood, see `diagnose()`.
        momentum, weight_decay: of that SGD.
        rank: number of deviations kept for the low-rank part.
        collects: snapshots per epoch.
        num_samples: networks drawn; batch-norm statistics are refreshed for each.
        diagonal: leave the low-rank part out.
    """

    epochs: int = 10
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    rank: int = 20
    collects: int = 2
    num_samples: int = 20
    diagonal: bool = False

    name: ClassVar[str] = "swag"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        if self.epochs < 1 or self.num_samples < 1 or self.collects < 1 or self.rank < 2 or not self.lr > 0:
            raise ArgumentError(
                f"{self}: epochs, num_samples and collects are at least 1, rank at least 2, lr positive"
            )
        data = task.need_data(self.name)
        moments = self._train(task, data)
        source = task.generator or torch.Generator().manual_seed(0)
        states = [
            with_fresh_statistics(task, data, self._sample(moments, self._noise(moments, source)))
            for _ in range(self.num_samples)
        ]
        posterior = SamplePosterior.from_states(states)
        likelihood, findings = with_left_out_noise(task, posterior)
        return Fitted(posterior, likelihood, findings, cost=(("epochs", float(self.epochs)),))

    def _train(self, task: Task, data: Iterable[Any]) -> Moments:
        """SGD on a copy in its own memory; moments of the selected parameters."""
        module = independent_copy(task.models[0])
        weights = train_only(module, task.network.names)
        optimizer = torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        moments = Moments(task.network.names, self.rank)
        for epoch in range(self.epochs):
            step = 0
            for step in sgd_epoch(task, module, data, optimizer, f"swag epoch {epoch + 1}/{self.epochs}"):
                if self._due(step, count_batches(data)):
                    moments.collect([w.detach() for w in weights])
            if not self._due(step, count_batches(data)):
                moments.collect([w.detach() for w in weights])
        return moments

    def _due(self, step: int, length: int | None) -> bool:
        """Whether a snapshot follows this step: `collects` times an epoch, the last after its last step."""
        return length is not None and (step * self.collects) // length > ((step - 1) * self.collects) // length

    def _noise(self, moments: Moments, source: torch.Generator) -> tuple[Tensor, Tensor]:
        width = moments.mean.numel()
        row = standard_normal((width + self.rank,), moments.mean, source)
        return row[:width], row[width : width + len(moments.deviations)]

    def _sample(self, moments: Moments, noise: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """mean + sqrt(diag / 2) z1 + D z2 / sqrt(2 (K - 1)); the diagonal alone with weight one."""
        flat, low = noise
        spread = moments.variance.sqrt() * flat
        deviations = moments.deviations
        if self.diagonal or len(deviations) < 2:
            return moments.unflatten(moments.mean + spread)
        columns = torch.stack(list(deviations))
        wide = (low @ columns) / (2.0 * (len(columns) - 1)) ** 0.5
        return moments.unflatten(moments.mean + spread / 2.0**0.5 + wide)


class Moments:
    """Running mean and second moment of flat weights in float64, and the last deviations from the mean."""

    def __init__(self, names: tuple[str, ...], rank: int) -> None:
        self.names = names
        self.count = 0
        self.deviations: deque[Tensor] = deque(maxlen=rank)
        self._shapes: list[torch.Size] = []
        self._dtypes: list[torch.dtype] = []
        self._mean = torch.zeros(())
        self._scatter = torch.zeros(())

    def collect(self, weights: list[Tensor]) -> None:
        """Add one snapshot (Welford's update, so that near-equal weights do not cancel)."""
        self._shapes, self._dtypes = [w.shape for w in weights], [w.dtype for w in weights]
        flat = torch.cat([w.reshape(-1) for w in weights]).double()
        if not bool(torch.isfinite(flat).all()):
            raise NonFiniteError("SWAG's SGD diverged to NaN or infinity: lower lr")
        self.count += 1
        before = flat - self._mean
        self._mean = self._mean + before / self.count
        self._scatter = self._scatter + before * (flat - self._mean)
        self.deviations.append(flat - self._mean)

    @property
    def mean(self) -> Tensor:
        """Flat mean, float64."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Flat variance, float64."""
        return self._scatter / max(1, self.count)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat weights -> tensors by name in the network's dtypes."""
        pieces = flat.split([shape.numel() for shape in self._shapes])
        return {
            name: piece.reshape(shape).to(dtype)
            for name, piece, shape, dtype in zip(self.names, pieces, self._shapes, self._dtypes, strict=True)
        }
