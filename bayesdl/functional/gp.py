"""Targets: what functions are expected. Gaussian processes, or anything that samples functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from bayesdl import linalg
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.functional.kernels import Covariance, Kernel, resolve

NUGGET = 1e-8
CHUNK = 256 << 20  # bytes of kernel matrices at once


@runtime_checkable
class Target(Protocol):
    """Functions to match: any object with this method will do (a simulator, another network's prior)."""

    outputs: int

    def sample(self, inputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """`n` functions at `inputs` `(M, ...)`: `(n, M, C)`."""


@final
@dataclass(frozen=True)
class LogNormal:
    """exp(N(mean, variance)): a hyper-prior.

    Args:
        mean: of the logarithm.
        variance: of the logarithm.
    """

    mean: float
    variance: float

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ArgumentError(f"variance={self.variance}; expected a positive number")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws of that shape, float64."""
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.exp(self.mean + math.sqrt(self.variance) * noise)


@final
@dataclass(frozen=True)
class GP:
    """Zero-mean Gaussian process, noise-free; C independent outputs share the kernel.

    Args:
        kernel: "rbf", "matern12", "matern32", "matern52", "linear", "arccosine", a `Kernel` (they add and multiply), or
            a function `(x, x') -> covariance`.
        lengthscale: a positive number, one per input dimension `(D,)`, or a `LogNormal`.
        variance: a positive number or a `LogNormal`.
        outputs: C.
        ard: with a `LogNormal` lengthscale, draw one per input dimension.

    With hyper-priors every function draws hyper-parameters of its own.
    """

    kernel: str | Kernel | Covariance = "rbf"
    lengthscale: float | Tensor | LogNormal = 1.0
    variance: float | LogNormal = 1.0
    outputs: int = 1
    ard: bool = False

    def __post_init__(self) -> None:
        resolve(self.kernel)
        for name, value in (("lengthscale", self.lengthscale), ("variance", self.variance)):
            if not isinstance(value, LogNormal) and not bool((torch.as_tensor(value) > 0).all()):
                raise ArgumentError(f"{name}={value!r}; expected positive numbers or bdl.functional.LogNormal(...)")
        if self.outputs < 1:
            raise ArgumentError(f"outputs={self.outputs}; expected at least 1")

    @classmethod
    def default(cls, dimensions: int, outputs: int = 1) -> GP:
        """For standardised inputs (Tran et al. 2022): lengthscales LogNormal(log sqrt(2 D), 1), one per dimension,
        variance LogNormal(0.1, 1)."""
        return cls("rbf", LogNormal(0.5 * math.log(2.0 * dimensions), 1.0), LogNormal(0.1, 1.0), outputs, ard=True)

    @property
    def fixed(self) -> bool:
        """Whether there is one kernel matrix for all functions."""
        return not isinstance(self.lengthscale, LogNormal) and not isinstance(self.variance, LogNormal)

    def moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(M,)` and covariance `(M, M)` of each output, float64.

        Raises:
            ArgumentError: the hyper-parameters are random, so that the values are no Gaussian.
        """
        if isinstance(self.lengthscale, LogNormal) or isinstance(self.variance, LogNormal):
            raise ArgumentError(
                "a GP with hyper-priors has no closed moments; use distance='w1', 'energy', 'mmd', 'sw' or 'dsw', or "
                "fix lengthscale and variance"
            )
        flat = _flat(inputs)
        scale = torch.as_tensor(self.lengthscale, dtype=torch.float64)
        scaled = flat / scale
        return flat.new_zeros(len(flat)), float(self.variance) * resolve(self.kernel)(scaled, scaled)

    def sample(self, inputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """`n` functions at `inputs` `(M, ...)`: `(n, M, C)` float64; one batched Cholesky."""
        flat = _flat(inputs)
        size = len(flat)
        if self.fixed:
            factor = kernel_root(self.moments(inputs)[1])
            noise = torch.randn(n, size, self.outputs, generator=generator, dtype=torch.float64)
            return factor @ noise
        step = max(1, CHUNK // (8 * size * max(size, flat.shape[1] * size)))
        return torch.cat([self._sample(flat, min(step, n - i), generator) for i in range(0, n, step)])

    def _sample(self, flat: Tensor, n: int, generator: torch.Generator) -> Tensor:
        width = flat.shape[1]
        if isinstance(self.lengthscale, LogNormal):
            scale = self.lengthscale.draw((n, 1, width if self.ard else 1), generator)
        else:
            scale = torch.as_tensor(self.lengthscale, dtype=torch.float64).expand(n, 1, width)
        variance = (
            self.variance.draw((n, 1, 1), generator)
            if isinstance(self.variance, LogNormal)
            else flat.new_full((n, 1, 1), float(self.variance))
        )
        scaled = flat / scale
        factor = kernel_root(variance * resolve(self.kernel)(scaled, scaled))
        return factor @ torch.randn(n, len(flat), self.outputs, generator=generator, dtype=torch.float64)


@final
@dataclass(frozen=True)
class Functions:
    """An empirical set of functions: values `(N, M, C)` at fixed points `(M, ...)`, drawn with replacement.

    Matching to it needs `measurement=` to be those points: `bdl.functional.Grid` or the inputs themselves.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 3:
            raise ShapeError(f"values have shape {tuple(self.values.shape)}; expected (functions, points, outputs)")

    @property
    def outputs(self) -> int:
        """C."""
        return int(self.values.shape[2])

    def sample(self, inputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """`n` of the functions; `inputs` must be the M points they are known at."""
        if len(inputs) != self.values.shape[1]:
            raise ShapeError(
                f"the functions are known at {self.values.shape[1]} points and {len(inputs)} were asked for; pass "
                "measurement=Fixed(points)"
            )
        return self.values[torch.randint(len(self.values), (n,), generator=generator)].double()


def kernel_root(covariance: Tensor) -> Tensor:
    """Cholesky factor of kernel matrices `(..., M, M)`, float64.

    A nugget of 1e-8 of the variance stands for the rounding of smooth kernels, whose matrices are singular in any
    precision, and of points that coincide.
    """
    wide = covariance.double()
    nugget = NUGGET * wide.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(wide.shape[:-1])
    return linalg.cholesky(wide + torch.diag_embed(nugget), "kernel matrix")


def function_root(target: GP, inputs: Tensor, jitter: float) -> Tensor:
    """Cholesky factor of K + jitter mean(diag K) I at `inputs` `(M, ...)`: `(M, M)` float64.

    Raises:
        ArgumentError: the target has hyper-priors, or jitter is negative.
    """
    if not jitter >= 0:
        raise ArgumentError(f"jitter={jitter}; expected a number of at least 0")
    covariance = target.moments(inputs)[1]
    return kernel_root(covariance + jitter * covariance.diagonal().mean() * torch.eye(len(covariance)).double())


def energy(target: GP, inputs: Tensor, values: Tensor, jitter: float = 1e-6) -> Tensor:
    """1/2 sum_c f_c^T K^-1 f_c, a scalar in float64, differentiable in the values: minus log of the process's density.

    The penalty to train with before `bdl.FSPLaplace`, at points drawn anew for every step: the mean loss of N examples
    goes with `energy / N`.

    Args:
        target: with fixed hyper-parameters.
        inputs: `(M, ...)`, distinct.
        values: outputs there, `(M, C)`.
        jitter: added to the diagonal of K, relative to its mean.

    Raises:
        ShapeError: values of another number of points or outputs.
    """
    if values.shape != (len(inputs), target.outputs):
        raise ShapeError(
            f"values have shape {tuple(values.shape)}; expected {(len(inputs), target.outputs)} (points, outputs)"
        )
    root = function_root(target, inputs, jitter).to(values.device)
    return 0.5 * torch.linalg.solve_triangular(root, values.double(), upper=False).square().sum()


def _flat(inputs: Tensor) -> Tensor:
    return inputs.detach().double().cpu().flatten(1)
