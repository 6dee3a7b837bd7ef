"""Laplace in function space: Gaussian processes with the neural tangent kernel, exact on a subset or projected.

Around the trained weights the network is linear in its parameters, f(x) + J(x) (theta - theta*). Under a Gaussian prior
with precision D that is a Gaussian process with kernel J D^-1 J'^T. All three methods leave the same kind of posterior
as `bdl.Laplace`, with curvature in dual form (`bayesdl.curvature.dual`): any Gaussian prior, tuning, evidence, draws.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl.batch import batch_size, flatten_tensors, index_batch
from bayesdl.curvature.chunking import chunk_size, chunks
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.dual import Dual
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit, Tally, check_curvature
from bayesdl.curvature.plan import plan
from bayesdl.data import batches, check_inputs, check_loader, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, ShapeError, check_finite
from bayesdl.likelihoods import Gaussian
from bayesdl.linalg import eigh
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.laplace import Laplace
from bayesdl.network import first_inputs
from bayesdl.select import Selector


@final
@dataclass(frozen=True)
class SubsetGP(Method):
    """Gaussian process on a random subset of the data (Rasmussen and Williams 2006, section 8.3.3; Immer et al. 2021).

    Exactly the full Laplace approximation of that subset, at cubic cost in points times outputs instead of parameters;
    with all points, of the whole data. What the other points know is left out, so that it is wider than the whole's.
    The evidence is that of the subset.

    Args:
        num_points: size of the subset, drawn with the generator of `wrap`; None: all points.
        select, bias, temperature, dtype, memory: as in `bdl.Laplace`.
    """

    num_points: int | None = 256
    select: Selector | None = "all"
    bias: str = "joint"
    temperature: float = 1.0
    dtype: torch.dtype | None = None
    memory: int | None = None

    name: ClassVar[str] = "gp"
    trains: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        data = task.need_data(self.name)
        laplace = Laplace(
            self.select,
            "dual",
            bias=self.bias,
            temperature=self.temperature,
            dtype=self.dtype,
            memory=self.memory,
            allow_partial=self.num_points is not None,
        )
        if self.num_points is None:
            return laplace.fit(task)
        kept, total = subset(task, data, self.num_points)
        fitted = laplace.fit(replace(task, data=kept))
        used = min(self.num_points, total)
        return replace(fitted, findings=(*fitted.findings, _says(f"{used} of {total} training points")))


class _Projected(Method):
    """The whole data's curvature, projected onto the span of the Jacobians of some points in the prior's geometry."""

    bias: str
    temperature: float
    dtype: torch.dtype | None
    memory: int | None

    trains: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    bound: ClassVar[bool] = False

    @property
    def leading(self) -> int | None:
        """Leading eigenvectors of the kernel that are kept."""
        return None

    @abstractmethod
    def rows(self, task: Task, layout: Layout, data: Iterable[Any], dtype: torch.dtype) -> tuple[Dual, str]:
        """The rows to project onto, and what to call them."""

    def fit(self, task: Task) -> Fitted:
        laplace = Laplace(self.select, "dual", bias=self.bias, temperature=self.temperature)
        laplace.check()
        data, prior = task.need_data(self.name), task.gaussian_prior()
        network = task.network
        example = first_inputs(data, network.batch)
        layout = plan(network, example, self.bias)
        dtype = self.dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
        metric = torch.as_tensor(1.0 if prior is None else prior.precision, dtype=torch.float64, device=network.device)
        rows, named = self.rows(task, layout, data, dtype)
        into = rows.projecting(metric, self.leading, self.bound)
        tally = Tally(network, into, task.likelihood, "ggn", 1, None, dtype, self.memory)
        for batch in batches(network, data, progress=task.progress, describe="curvature", allow_partial=False):
            tally.add(*batch)
        fit, _ = tally.result()
        check_curvature(fit.curvature)
        fitted = laplace.finish(_projected(fit), task, prior)
        return replace(fitted, findings=(*fitted.findings, _says(f"{named}, {rows.num_rows} rows of Jacobians")))


@final
@dataclass(frozen=True)
class ELLA(_Projected):
    """Linearised Laplace by a Nystrom approximation of the kernel (Deng, Zhou and Zhu 2022).

    Features phi(x) = J(x) D^-1 J_M^T U S^-1/2 come from the kernel U S U^T of random points; one pass over all data
    collects their curvature. Unlike the original, directions outside the span of the features keep the prior's variance
    instead of losing it; with all points the posterior is that of full Laplace.

    Args:
        num_points: points whose Jacobians (all outputs) span the features, drawn with the generator of `wrap`.
        rank: leading eigenvectors of their kernel that are kept; None: all.
        select, bias, temperature, dtype, memory: as in `bdl.Laplace`.
    """

    num_points: int = 64
    rank: int | None = None
    select: Selector | None = "all"
    bias: str = "joint"
    temperature: float = 1.0
    dtype: torch.dtype | None = None
    memory: int | None = None

    name: ClassVar[str] = "ella"

    def rows(self, task: Task, layout: Layout, data: Iterable[Any], dtype: torch.dtype) -> tuple[Dual, str]:
        for name, value in (("num_points", self.num_points), ("rank", self.rank)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name}={value}; expected at least 1")
        kept, total = subset(task, data, self.num_points)
        pieces = _pieces(task, layout, kept, dtype, self.memory, weighted=False)
        return Dual(layout, pieces), f"features of {min(self.num_points, total)} of {total} training points"

    @property
    def leading(self) -> int | None:
        return self.rank


@final
@dataclass(frozen=True)
class VaLLA(_Projected):
    """Linearised Laplace with variational inducing points, the mean fixed at the trained network (Ortega et al. 2024).

    The best Gaussian over the outputs at the inducing points has a closed form (Titsias 2009) once their places are
    given: the projection of the whole data's curvature. The places are training points, chosen one by one so that the
    variance left to explain falls fastest. `log_evidence` is the variational bound, never above that of full Laplace
    and equal to it with all points; `tune("evidence")` maximises it over the prior.

    Args:
        num_inducing: inducing points.
        pool: training points among which they are chosen, drawn with the generator of `wrap`; None: four times as many.
        select, bias, temperature, dtype, memory: as in `bdl.Laplace`.
    """

    num_inducing: int = 64
    pool: int | None = None
    select: Selector | None = "all"
    bias: str = "joint"
    temperature: float = 1.0
    dtype: torch.dtype | None = None
    memory: int | None = None

    name: ClassVar[str] = "valla"
    bound: ClassVar[bool] = True

    def rows(self, task: Task, layout: Layout, data: Iterable[Any], dtype: torch.dtype) -> tuple[Dual, str]:
        pool = 4 * self.num_inducing if self.pool is None else self.pool
        if not 1 <= self.num_inducing <= pool:
            raise ArgumentError(
                f"num_inducing={self.num_inducing} and pool={pool}; expected at least one inducing point and a pool of "
                "at least as many"
            )
        kept, total = subset(task, data, pool)
        prior = task.gaussian_prior()
        candidates = Dual(layout, _pieces(task, layout, kept, dtype, self.memory, weighted=True))
        kernel = candidates.kernel(1.0 if prior is None else torch.as_tensor(prior.precision))
        order = _greedy(kernel, kernel.shape[0] // min(pool, total), self.num_inducing)
        chosen = candidates.selected(order)
        return chosen, f"{len(order)} inducing points of {total} training points"


def subset(task: Task, data: Iterable[Any], count: int) -> tuple[list[Any], int]:
    """A random subset of the examples of a loader as batches like its own, and how many examples there are.

    One pass; every example draws a key, and those of the smallest keys are kept.

    Raises:
        ArgumentError: `count` is not positive, or there is no batch.
        NonFiniteError, ShapeError: bad data; the message names the batch.
    """
    if count < 1:
        raise ArgumentError(f"{count} points were asked for; expected at least 1")
    check_loader(data)
    source = task.generator or torch.Generator().manual_seed(0)
    held: list[tuple[Tensor, Any]] = []
    total, limit = 0, 2.0
    for number, batch in enumerate(data):
        with in_batch(number):
            size = _checked(*task.network.batch(batch))
        keys = torch.rand(size, generator=source, device=source.device, dtype=torch.float64).cpu()
        total += size
        index = (keys < limit).nonzero().squeeze(1)
        if len(index):
            held.append((keys[index], index_batch(batch, index)))
            every = torch.cat([k for k, _ in held])
            limit = float(every.kthvalue(count).values) + 1e-18 if len(every) > count else limit
    if not held:
        raise ArgumentError("the data loader yields no batch")
    every = torch.cat([k for k, _ in held])
    limit = float(every.kthvalue(min(count, len(every))).values)
    pieces = [index_batch(batch, (k <= limit).nonzero().squeeze(1)) for k, batch in held if bool((k <= limit).any())]
    return _merged(pieces), total


def _checked(inputs: Any, target: Any) -> int:
    """How many examples a batch has; errors now name the batch that a merged one could not."""
    check_inputs(inputs)
    size = batch_size(inputs)
    if isinstance(target, Tensor):
        check_finite(target, "targets")
        if target.shape[:1] != (size,):
            raise ShapeError(f"targets have shape {tuple(target.shape)} and the inputs hold {size} examples")
    return size


def _merged(pieces: list[Any]) -> list[Any]:
    """Batches as one, where their tensors fit together."""
    flat = [flatten_tensors(piece) for piece in pieces]
    shapes = {tuple((t.shape[1:], t.dtype) for t in tensors) for tensors, _ in flat}
    if len(pieces) < 2 or len(shapes) > 1:
        return pieces
    return [flat[0][1]([torch.cat(column) for column in zip(*(tensors for tensors, _ in flat), strict=True)])]


def _pieces(
    task: Task, layout: Layout, data: Iterable[Any], dtype: torch.dtype, memory: int | None, *, weighted: bool
) -> list[list[Factor]]:
    """Factors of some examples, for all outputs (J) or for the rows of their curvature (V^T J)."""
    likelihood = task.likelihood
    if isinstance(likelihood, Gaussian) and likelihood.noise is None:
        likelihood = likelihood.with_noise(1.0)
    rule = cotangent_rule(likelihood, "ggn")
    step = chunk_size(layout, "dual", dtype, memory=memory, device=task.network.device)
    found: list[list[Factor]] = []
    for _, inputs, target in batches(task.network, data, progress=False):
        for rows, labels in chunks(inputs, target, step):

            def cotangents(f: Tensor, labels: Any = labels) -> Tensor:
                outputs = likelihood.check_outputs(f)
                return rule(outputs, likelihood.check_targets(outputs, labels)) if weighted else identity_cotangents(f)

            found.append(layer_factors(task.network, layout, rows, cotangents, dtype)[1])
    return found


def _projected(fit: Fit) -> Fit:
    parts = tuple(part.projected() for part in fit.parts if isinstance(part, Dual))
    if isinstance(fit.curvature, Dual) and not parts:
        return replace(fit, curvature=fit.curvature.projected())
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return replace(fit, curvature=total, parts=parts)


def _greedy(kernel: Tensor, width: int, count: int) -> list[int]:
    """Examples one by one, each the one that most variance is left of given those before: pivoted block Cholesky.

    Args:
        kernel: `(n K, n K)`, examples slower than rows.
        width: K.
        count: how many; fewer where nothing is left to explain.
    """
    left = kernel.clone()
    chosen: list[int] = []
    floor = 1e-12 * float(kernel.diagonal().max())
    for _ in range(min(count, len(kernel) // width)):
        scores = left.diagonal().view(-1, width).sum(1).clone()
        scores[chosen] = -torch.inf
        best = int(scores.argmax())
        if chosen and float(scores[best]) <= width * floor:
            break
        chosen.append(best)
        rows = left[best * width : (best + 1) * width]
        values, vectors = eigh(rows[:, best * width : (best + 1) * width], "kernel")
        sound = values > floor
        spread = (vectors[:, sound] / values[sound].sqrt()).mT @ rows
        left = left - spread.mT @ spread
    return chosen


def _says(text: str) -> Finding:
    return Finding("info", text, topic="points")
