"""Kernels of Gaussian-process targets: covariances of function values, batched over hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import UnknownNameError

Covariance = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Kernel:
    """k(x, x') up to its variance, as a function of inputs divided by lengthscales.

    Attributes:
        name: for messages and files.
        function: `(x (..., M, D), x' (..., M', D)) -> (..., M, M')`, both in units of the lengthscale.

    Kernels add and multiply.
    """

    name: str
    function: Covariance

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return self.function(first, second)

    def __add__(self, other: Kernel) -> Kernel:
        return Kernel(f"{self.name} + {other.name}", lambda a, b: self(a, b) + other(a, b))

    def __mul__(self, other: Kernel) -> Kernel:
        return Kernel(f"({self.name}) * ({other.name})", lambda a, b: self(a, b) * other(a, b))


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """|x - x'|^2, `(..., M, M')`; exactly zero at equal inputs."""
    # never `(..., M, M', D)`, and no cancellation of squares
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def _rbf(first: Tensor, second: Tensor) -> Tensor:
    return torch.exp(-0.5 * squared_distance(first, second))


def _matern12(first: Tensor, second: Tensor) -> Tensor:
    return torch.exp(-squared_distance(first, second).sqrt())


def _matern32(first: Tensor, second: Tensor) -> Tensor:
    scaled = math.sqrt(3.0) * squared_distance(first, second).sqrt()
    return (1.0 + scaled) * torch.exp(-scaled)


def _matern52(first: Tensor, second: Tensor) -> Tensor:
    scaled = math.sqrt(5.0) * squared_distance(first, second).sqrt()
    return (1.0 + scaled + scaled.square() / 3.0) * torch.exp(-scaled)


def _linear(first: Tensor, second: Tensor) -> Tensor:
    return first @ second.mT


def _arccosine(first: Tensor, second: Tensor) -> Tensor:
    """First order, that of an infinitely wide ReLU layer (Cho and Saul 2009), scaled so that k(x, x) = |x|^2."""
    inner = first @ second.mT
    norms = first.norm(dim=-1).unsqueeze(-1) * second.norm(dim=-1).unsqueeze(-2)
    cosine = (inner / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    return norms / math.pi * (torch.sin(angle) + (math.pi - angle) * cosine)


KERNELS: dict[str, Kernel] = {
    name: Kernel(name, function)
    for name, function in {
        "rbf": _rbf,
        "matern12": _matern12,
        "matern32": _matern32,
        "matern52": _matern52,
        "linear": _linear,
        "arccosine": _arccosine,
    }.items()
}


def periodic(period: float) -> Kernel:
    """exp(-2 sum_d sin^2(pi |x_d - x'_d| / p)) with the period in units of the lengthscale; period p > 0."""

    def function(first: Tensor, second: Tensor) -> Tensor:
        difference = first.unsqueeze(-2) - second.unsqueeze(-3)
        return torch.exp(-2.0 * torch.sin(math.pi * difference / period).square().sum(-1))

    return Kernel(f"periodic({period:g})", function)


def constant(value: float) -> Kernel:
    """The same covariance everywhere: an offset common to all inputs."""

    def function(first: Tensor, second: Tensor) -> Tensor:
        return first.new_full((*first.shape[:-1], second.shape[-2]), value)

    return Kernel(f"constant({value:g})", function)


def resolve(kernel: str | Kernel | Covariance) -> Kernel:
    """A name, a `Kernel`, or a function `(x, x') -> covariance`.

    Raises:
        UnknownNameError: no such name.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise UnknownNameError(
                f"kernel {kernel!r} is not known; choose one of {sorted(KERNELS)}, or pass periodic(p)"
            )
        return KERNELS[kernel]
    return Kernel(getattr(kernel, "__name__", "custom"), kernel)
