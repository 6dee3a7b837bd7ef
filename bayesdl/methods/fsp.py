"""FSP-Laplace: a Laplace approximation whose prior is a Gaussian process over functions, not a law of the weights.

Around the trained weights the network is linear, f(x) + J(x) delta, and a Gaussian process with covariance K at context
points C says exp(-1/2 f_C^T K^-1 f_C) of it: a Gaussian over the weights with precision J_C^T K^-1 J_C (Cinquin,
Pfoertner, Fortuin, Hennig and Bamler 2024). The posterior lives where that prior does, in the span of J_C^T; at the
context points its covariance without data is K, as far as the network has the weights for it. Nothing is said away from
them: they have to cover the inputs of predictions to come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl.curvature.chunking import chunk_size, chunks
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, check_finite
from bayesdl.functional.gp import GP, function_root
from bayesdl.functional.measurement import Fixed, Measurement, Places
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.linalg import eigh
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.posteriors.spanned import SpannedPosterior, between, in_float64
from bayesdl.select import Selector

LEVELS = 400  # of the noise, from which the best one is refined
SAFETY = 100.0  # signal over rounding below which a direction is dropped


@final
@dataclass(frozen=True)
class FSPLaplace(Method):
    """Laplace approximation under a prior over functions.

    Best for a network that was trained with the same prior, by `bdl.functional.energy` as its penalty.

    Args:
        target: `bdl.functional.GP(...)` with fixed hyper-parameters and one output for each of the network's.
        context: where the prior is stated: points `(M, ...)`, or places to draw them from, such as
            `bdl.functional.Measurement(inputs)`. None: 100 points, 70 of them training inputs, the others from their
            box (inputs of more than one axis: training inputs alone).
        jitter: added to the diagonal of K, relative to its mean: what functions may deviate from the process.
        widest: directions in which the weights would have a prior standard deviation above it are left out. They matter
            little at the context points and make the functions explode beyond them; math.inf keeps them all.
        select, bias, memory: as in `bdl.Laplace`. Everything is computed in float64.

    A Gaussian likelihood without noise gets the common noise that maximises the evidence.
    """

    target: GP | None = None
    context: Places | Tensor | None = None
    jitter: float = 1e-6
    widest: float = 30.0
    select: Selector | None = "all"
    bias: str = "joint"
    memory: int | None = None

    name: ClassVar[str] = "fsp-laplace"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        data, target = task.need_data(self.name), self._checked(task)
        wide = replace(task, network=in_float64(task.network))
        points = self._points(wide, data)
        layout = plan(wide.network, points, self.bias)
        if layout.positions:
            raise UnsupportedError("FSPLaplace: a prior over functions is for outputs of shape (B, C)")
        if layout.outputs != target.outputs:
            raise ShapeError(
                f"the network has {layout.outputs} outputs and the target {target.outputs}: set outputs= of the target"
            )
        values, pieces = self._jacobian(wide, layout, points)
        root = function_root(target, points, self.jitter).to(values.device)
        mixing, coordinates = _prior(root, pieces, values, self.widest)
        posterior = self._with_data(wide, layout, pieces, mixing, coordinates, data)
        says = (
            f"prior over functions at {len(points)} context points, {mixing.shape[1]} of {len(mixing)} directions kept"
        )
        found = Finding("info", says, topic="points")
        likelihood: Likelihood = task.likelihood
        if isinstance(likelihood, Gaussian) and posterior.noise is not None:
            likelihood = likelihood.with_noise(posterior.noise)
        return Fitted(posterior, likelihood, (found,))

    def _checked(self, task: Task) -> GP:
        if task.prior is not None:
            raise ArgumentError(
                f"FSPLaplace has its prior in target=, and prior={type(task.prior).__name__} was given too; leave it "
                "out, or use bdl.Laplace with it"
            )
        if not isinstance(self.target, GP) or not self.target.fixed:
            raise ArgumentError(
                f"FSPLaplace: target={self.target!r}; expected bdl.functional.GP(...) with numbers for lengthscale and "
                "variance: the covariance of its values has to be known"
            )
        if not self.widest > 0:
            raise ArgumentError(f"widest={self.widest}; expected a positive number")
        return self.target

    def _points(self, task: Task, data: Iterable[Any]) -> Tensor:
        places = Fixed(self.context) if isinstance(self.context, Tensor) else self.context
        if places is None:
            inputs = [rows for _, rows, _ in batches(task.network, data, progress=False)]
            if not all(isinstance(rows, Tensor) for rows in inputs):
                raise ArgumentError(
                    "FSPLaplace chooses context points among inputs that are tensors; pass context= for others"
                )
            every = torch.cat(inputs)
            flat = every.dim() == 2
            places = Measurement(every, 100 if flat else min(100, len(every)), 0.7 if flat else 1.0)
        return places.draw(task.generator or torch.Generator().manual_seed(0))

    def _jacobian(self, task: Task, layout: Layout, points: Tensor) -> tuple[Tensor, list[list[Factor]]]:
        """Outputs `(M, C)` and factors of the Jacobian at the context points."""
        step = chunk_size(layout, "dual", torch.float64, memory=self.memory, device=task.network.device)
        values, pieces = [], []
        for some in points.split(step):
            output, factors = layer_factors(task.network, layout, some, identity_cotangents, torch.float64)
            values.append(output)
            pieces.append(factors)
        found = torch.cat(values)
        check_finite(found, "the outputs at the context points")
        return found, pieces

    def _with_data(
        self,
        task: Task,
        layout: Layout,
        pieces: list[list[Factor]],
        mixing: Tensor,
        coordinates: Tensor,
        data: Iterable[Any],
    ) -> SpannedPosterior:
        likelihood = task.likelihood
        is_open = isinstance(likelihood, Gaussian) and likelihood.noise is None
        if isinstance(likelihood, Gaussian) and likelihood.noise is None:
            likelihood = likelihood.with_noise(1.0)
        rule = cotangent_rule(likelihood, "ggn")
        step = chunk_size(layout, "dual", torch.float64, memory=self.memory, device=task.network.device)
        curvature = mixing.new_zeros(mixing.shape[1], mixing.shape[1])
        score, count, squared = mixing.new_zeros(()), 0, mixing.new_zeros(layout.outputs)
        passes = batches(task.network, data, progress=task.progress, describe="curvature", allow_partial=False)
        for number, inputs, labels in passes:
            with in_batch(number):
                for rows, targets in chunks(inputs, labels, step):
                    seen: list[Tensor] = []

                    def cotangents(f: Tensor, targets: Any = targets, seen: list[Tensor] = seen) -> Tensor:
                        outputs = likelihood.check_outputs(f)
                        checked = likelihood.check_targets(outputs, targets)
                        seen.extend((outputs, checked))
                        return rule(outputs, checked)

                    _, factors = layer_factors(task.network, layout, rows, cotangents, torch.float64)
                    f, y = seen
                    features = (between(factors, pieces) @ mixing).flatten(0, 1)
                    curvature.addmm_(features.mT, features)
                    score = score + likelihood.log_prob(f, y).double().sum()
                    count += len(f)
                    if is_open:
                        squared = squared + (y - f).double().square().sum(0)
        check_finite(curvature, "the curvature of the data")
        gains, basis = eigh(curvature, "curvature")
        gains = gains.clamp(min=0.0)
        posterior = SpannedPosterior(
            layout,
            pieces,
            mixing @ basis,
            gains,
            gains.new_ones(()) if is_open else None,
            coordinates.square().sum(),
            count,
            float(score),
            squared if is_open else None,
            self.memory,
        )
        return _with_noise(posterior) if is_open else posterior


def _prior(root: Tensor, pieces: list[list[Factor]], values: Tensor, widest: float) -> tuple[Tensor, Tensor]:
    """M `(r, R)` with delta = J_C^T M z, z ~ N(0, I) under the prior, and minus z's prior mean `(R,)`.

    With K = L L^T and L^-1 J_C J_C^T L^-T = U S^2 U^T: M = L^-T U S^-2, and the functions at the context points are
    L U z. Directions of the weights with a prior standard deviation 1 / S above `widest`, or of which S^2 is rounding,
    are dropped.

    Args:
        root: L of one output `(M, M)`; rows of J_C are points slower than outputs.
        values: outputs at the points `(M, C)`.
    """
    size, outputs = values.shape
    kernel = torch.cat([between(piece, pieces).flatten(0, 1) for piece in pieces])
    kernel = 0.5 * (kernel + kernel.mT)

    def back(matrix: Tensor) -> Tensor:
        """L^-1 of the rows `(M C, n)`."""
        flat = torch.linalg.solve_triangular(root, matrix.reshape(size, -1), upper=False)
        return flat.reshape(size * outputs, -1)

    whitened = back(back(kernel).mT.contiguous())
    signal, basis = eigh(0.5 * (whitened + whitened.mT), "kernel of the context points")
    wide = torch.linalg.solve_triangular(root.mT, basis.reshape(size, -1), upper=True).reshape(size * outputs, -1)
    rounding = SAFETY * torch.finfo(kernel.dtype).eps * torch.linalg.matrix_norm(kernel, 2) * wide.square().sum(0)
    sound = (signal > rounding) & (signal > widest**-2)
    if not bool(sound.any()):
        raise ArgumentError(
            "the network's outputs at the context points do not depend on the selected weights in any direction that "
            "the target allows; select more weights, or raise jitter= or widest="
        )
    return wide[:, sound] / signal[sound], basis[:, sound].mT @ back(values.reshape(size * outputs, 1))[:, 0]


def _with_noise(posterior: SpannedPosterior) -> SpannedPosterior:
    """The common noise at the maximum of the evidence, on a grid and then by golden section."""
    assert posterior.squared_error is not None
    error = float(posterior.squared_error.sum()) / (posterior.num_data * len(posterior.squared_error))
    centre = 0.5 * math.log(max(error, 1e-24))

    def value(log_noise: float) -> float:
        return float(posterior.log_evidence(posterior.gains.new_tensor(math.exp(log_noise))))

    grid = torch.linspace(centre - 3.0, centre + 6.0, LEVELS).tolist()
    best = max(range(LEVELS), key=lambda i: value(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(LEVELS - 1, best + 1)]
    share = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(40):
        left, right = high - share * (high - low), low + share * (high - low)
        low, high = (left, high) if value(left) < value(right) else (low, right)
    return replace(posterior, noise=posterior.gains.new_tensor(math.exp(0.5 * (low + high))))
