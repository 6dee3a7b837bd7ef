"""One pass over the data into a structure, and what the evidence needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.batch import batch_size, flatten_tensors
from bayesdl.curvature.chunking import chunk_size, chunks, goes_in_turn
from bayesdl.curvature.contributions import Seeds
from bayesdl.curvature.structure import Structure
from bayesdl.data import in_batch
from bayesdl.distributed import Group
from bayesdl.errors import ArgumentError, LabelError, NumericalError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network

__all__ = ["Fit", "Tally", "check_curvature", "check_same_data"]


@dataclass(frozen=True, eq=False)
class Fit:
    """Curvature at the network's weights, with what the evidence needs beside it.

    Attributes:
        curvature: at the likelihood's noise, or at unit noise where that is still open (Gaussian).
        parts: for a Gaussian likelihood with open noise and several outputs, the curvature of each output alone.
        num_data: N, the observations that count: examples, or positions less those whose target is ignored.
        log_likelihood: sum of log p(y | f); at unit noise where the noise is open.
        squared_error: `(C,)` sum of squared residuals, Gaussian only.
    """

    curvature: Structure
    parts: tuple[Structure, ...]
    num_data: int
    log_likelihood: float
    squared_error: Tensor | None


@final
class Tally:
    """Running sums of one pass over the data.

    Args:
        network: whose curvature it is.
        curvature: empty, or what an interrupted pass left; updated in place.
        likelihood: p(y | f).
        kind: see `cotangent_rule`.
        samples: draws of y per example for kind "mc".
        generator: for kind "mc".
        dtype: of the factors.
        memory: bytes that one chunk of examples may take.
        classes: for kind "ggn", see `bayesdl.curvature.estimate`.
        others: filled beside `curvature` from the same factors; not with a noise that is open for several outputs.
    """

    def __init__(
        self,
        network: Network,
        curvature: Structure,
        likelihood: Likelihood,
        kind: str,
        samples: int,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        memory: int | None,
        classes: int | None = None,
        others: Sequence[Structure] = (),
    ) -> None:
        self.others = others
        self.network, self.curvature, self.kind, self.dtype = network, curvature, kind, dtype
        self._open_noise = isinstance(likelihood, Gaussian) and likelihood.noise is None
        if isinstance(likelihood, Gaussian) and likelihood.noise is None:
            likelihood = likelihood.with_noise(1.0)
        self.likelihood = likelihood
        # an open noise weights the curvature of each output later
        in_turn = goes_in_turn(curvature.layout, (curvature, *others), network.device) and not self._open_noise
        self._seeds = Seeds(likelihood, kind, samples, generator, self._open_noise, classes, in_turn)
        width, layout = self._seeds.width(curvature, samples), curvature.layout
        self.memory = memory
        self.step = min(
            chunk_size(layout, kept, dtype, width=width, memory=memory, device=network.device, in_turn=in_turn)
            for kept in (curvature, *others)
        )
        self.parts: tuple[Structure, ...] = ()
        self.count = self.examples = 0
        # sum of log p(y | f), and of its absolute values, which is the scale of the sum's rounding errors
        self.scores = torch.zeros(2, dtype=torch.float64, device=network.device)
        self.squared: Tensor | None = None

    def add(self, number: int, inputs: Any, target: Any) -> None:
        """One batch; `number` is what errors call it."""
        with in_batch(number):
            for rows, labels in chunks(inputs, target, self.step):
                self._add(rows, labels)

    def _add(self, rows: Any, labels: Any) -> None:
        some = self._seeds.contribution(self.network, self.curvature, rows, labels, self.dtype, self.memory)
        f, y = some.f, some.y
        self.count += some.number
        self.examples += batch_size(rows) if flatten_tensors(rows)[0] else len(f)
        each = self.likelihood.log_prob(f, y).double()
        self.scores += torch.stack([each.sum(), each.abs().sum()])
        if isinstance(self.likelihood, Gaussian):
            residual = (y - f).double().square().sum(0)
            self.squared = residual if self.squared is None else self.squared + residual
        if self._open_noise and self.kind == "ggn" and f.shape[1] > 1:
            self.parts = self.parts or self._empty_parts(f.shape[1])
            for factors in some.parts:
                for c, part in enumerate(self.parts):
                    part.update([replace(factor, g=factor.g[:, c : c + 1]) for factor in factors])
        else:
            for factors in some.parts:
                for kept in (self.curvature, *self.others):
                    kept.update(factors)
        for kept in self.parts or (self.curvature, *self.others):
            kept.check_finite()

    def combine(self, group: Group) -> None:
        """Add up the tallies of all processes; each of them then holds the whole."""
        # a process without a batch has yet to learn what there is to add up
        width = 0 if self.squared is None else len(self.squared)
        outputs, width = group.largest([len(self.parts), width])
        self.parts = self.parts or self._empty_parts(outputs)
        if width and self.squared is None:
            self.squared = self.scores.new_zeros(width)
        counts = torch.tensor([self.count, self.examples], dtype=torch.int64, device=group.device)
        sums = [value for kept in self.parts or (self.curvature,) for value in kept.sums().values()]
        group.add([counts, self.scores, *([] if self.squared is None else [self.squared]), *sums])
        self.count, self.examples = (int(value) for value in counts)

    def result(self) -> tuple[Fit, float]:
        """The fit, and sum_n |log p(y_n | f_n)|. Raises `LabelError` where no target counts."""
        if self.examples and not self.count:
            raise LabelError(f"all targets of {self.examples} examples are ignored; at least one has to count")
        total = self.curvature
        if self.parts:
            total = self.parts[0]
            for part in self.parts[1:]:
                total = total + part
        log_likelihood, absolute = (float(value) for value in self.scores)
        return Fit(total, self.parts, self.count, log_likelihood, self.squared), absolute

    def _empty_parts(self, outputs: int) -> tuple[Structure, ...]:
        return tuple(self.curvature.fresh() for _ in range(outputs))


def check_curvature(curvature: Structure) -> None:
    """Raise `NumericalError` where the curvature is exactly zero."""
    if curvature.is_zero():
        raise NumericalError(
            "the curvature is exactly zero: the likelihood is flat at these outputs (saturated logits?), "
            "or the selected parameters have no influence on this data"
        )


def check_same_data(before: Fit, after: Fit, absolute: float, dtype: torch.dtype) -> None:
    """Raise unless two passes agree in count and, up to rounding, in loss."""
    slack = min(1e3 * torch.finfo(dtype).eps, 0.05) * (absolute + after.num_data)
    if before.num_data != after.num_data or not abs(before.log_likelihood - after.log_likelihood) <= slack:
        raise ArgumentError(
            "this structure takes several passes over the same data, and two passes of the loader differ: "
            f"{before.num_data} examples with log-likelihood {before.log_likelihood:.6g}, then {after.num_data} with "
            f'{after.log_likelihood:.6g}. Switch random augmentation off, or use structure="kron", which takes one pass'
        )
