"""Stochastic estimates of a symmetric matrix from products with it: trace and diagonal, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.curvature.krylov import Product
from bayesdl.errors import ArgumentError, UnknownNameError

TRACES = ("hutch++", "xtrace", "hutchinson")
DIAGONALS = ("hutch++", "hutchinson")


@dataclass(frozen=True)
class Estimate:
    """An estimate and how far it may be off.

    Attributes:
        value: the estimate.
        standard_error: of the same shape; zero where the value is exact.
    """

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Probes:
    """A matrix by its products, and the random directions it is asked about.

    Attributes:
        product: `(P, r) -> (P, r)`.
        size: P.
        like: gives dtype and device.
        generator: of all directions, one after another.
    """

    product: Product
    size: int
    like: Tensor
    generator: torch.Generator

    def signs(self, count: int) -> Tensor:
        """Columns of independent signs `(P, count)`."""
        drawn = torch.randint(0, 2, (self.size, count), generator=self.generator, device=self.generator.device)
        return (2.0 * drawn - 1.0).to(self.like)

    def normals(self, count: int) -> Tensor:
        """Columns of independent standard normals `(P, count)`."""
        source = self.generator
        return torch.randn(self.size, count, generator=source, device=source.device, dtype=torch.float64).to(self.like)

    def exact_diagonal(self) -> Tensor:
        """The diagonal by P unit vectors."""
        unit = torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)
        return self.product(unit).diagonal().clone()


def trace(probes: Probes, count: int, method: str = "hutch++") -> Estimate:
    """tr(A) from `count` products; exact, with error zero, where `count` reaches P.

    "hutchinson": the mean of z^T A z over sign vectors z (Hutchinson 1990).
    "hutch++": the trace on the span of a third of the products, Hutchinson on the rest of the space with another third
    (Meyer, Musco, Musco and Woodruff 2021); variance falls with the square of `count`, and is zero for ranks below
    count / 3.
    "xtrace": every one of count / 2 directions serves as a probe of what the others leave (Epperly, Tropp and Webber
    2024, with their normalisation); exact for ranks below count / 2.

    Raises:
        UnknownNameError: no such method.
        ArgumentError: too few products to state an error.
    """
    if method not in TRACES:
        raise UnknownNameError(f"method {method!r} is not known; choose one of {TRACES}")
    _enough(count, {"hutchinson": 2, "xtrace": 4, "hutch++": 6}[method], method)
    if count >= probes.size:
        return _exact(probes.exact_diagonal().sum())
    if method == "hutchinson":
        signs = probes.signs(count)
        return _mean((signs * probes.product(signs)).sum(0))
    if method == "xtrace":
        return _xtrace(probes, count // 2)
    known = _deflated(probes, count)
    held = (known.basis * known.image).sum()
    found = _mean((known.rest * known.applied).sum(0))
    return Estimate(held + found.value, found.standard_error)


def diagonal(probes: Probes, count: int, method: str = "hutch++") -> Estimate:
    """diag(A) from `count` products, `(P,)` with an error per entry; exact where `count` reaches P.

    "hutchinson": the mean of z * (A z) over sign vectors z (Bekas, Kokiopoulou and Saad 2007).
    "hutch++": exact on the span of a third of the products, that mean on the rest with another third (Baston and
    Nakatsukasa 2022).

    Raises:
        UnknownNameError: no such method.
        ArgumentError: too few products to state an error.
    """
    if method not in DIAGONALS:
        raise UnknownNameError(f"method {method!r} is not known; choose one of {DIAGONALS}")
    _enough(count, {"hutchinson": 2, "hutch++": 6}[method], method)
    if count >= probes.size:
        return _exact(probes.exact_diagonal())
    if method == "hutchinson":
        signs = probes.signs(count)
        return _mean(signs * probes.product(signs))
    known = _deflated(probes, count)
    basis, image = known.basis, known.image
    # A = QQ'A + (I - QQ')A QQ' + (I - QQ')A(I - QQ')
    held = (basis * (2.0 * image - basis @ (basis.T @ image))).sum(1)
    found = _mean(known.signs * (known.applied - basis @ (basis.T @ known.applied)))
    return Estimate(held + found.value, found.standard_error)


@dataclass(frozen=True)
class _Deflated:
    """Q on the leading span, A Q; sign vectors z, w = (I - QQ')z and A w."""

    basis: Tensor
    image: Tensor
    signs: Tensor
    rest: Tensor
    applied: Tensor


def _deflated(probes: Probes, count: int) -> _Deflated:
    third = count // 3
    basis = torch.linalg.qr(probes.product(probes.signs(third)))[0]
    signs = probes.signs(count - 2 * third)
    rest = signs - basis @ (basis.T @ signs)
    images = probes.product(torch.cat([basis, rest], 1))
    return _Deflated(basis, images[:, :third], signs, rest, images[:, third:])


def _xtrace(probes: Probes, width: int) -> Estimate:
    start = probes.normals(width)
    start = start * (math.sqrt(probes.size) / start.norm(dim=0))
    image = probes.product(start)
    basis, upper = torch.linalg.qr(image)
    core = basis.T @ probes.product(basis)
    core = 0.5 * (core + core.T)
    pivots = torch.linalg.svdvals(upper.double())
    if float(pivots[-1]) <= probes.size * torch.finfo(start.dtype).eps * float(pivots[0]):
        # the rank is below the width: the span holds all of A, whichever probe is left out
        return _exact(core.trace())
    # Q without the i-th probe is Q (I - s s') with s the normalised i-th column of R^-T
    unit = torch.eye(width, dtype=upper.dtype, device=upper.device)
    normals = torch.linalg.solve_triangular(upper.T, unit, upper=False)
    normals = normals / normals.norm(dim=0)
    inside = basis.T @ start
    inside = inside - normals * (normals * inside).sum(0)  # (I - s s') Q' w
    held = core.trace() - (normals * (core @ normals)).sum(0)
    outside = (start * image).sum(0) - 2.0 * (inside * upper).sum(0) + (inside * (core @ inside)).sum(0)
    length = probes.size - inside.square().sum(0)  # ||(I - QQ') w||^2
    found = held + outside * (probes.size - width + 1) / length
    return _mean(found)


def _mean(values: Tensor) -> Estimate:
    """Mean over the last axis."""
    return Estimate(values.mean(-1), values.std(-1) / math.sqrt(values.shape[-1]))


def _exact(value: Tensor) -> Estimate:
    return Estimate(value, torch.zeros_like(value))


def _enough(count: int, least: int, method: str) -> None:
    if count < least:
        raise ArgumentError(f"num_probes={count}; {method!r} needs at least {least} to state its error")
