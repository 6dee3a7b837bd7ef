"""Stochastic Lanczos quadrature: log-determinants of scale * H + diag(shift) from products with H."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.curvature.krylov import lanczos
from bayesdl.curvature.layout import cast
from bayesdl.curvature.structure import Shift, check_positive
from bayesdl.curvature.traces import Estimate, Probes
from bayesdl.errors import ArgumentError

# bytes that the Lanczos vectors of the probes treated together may take
MEMORY = 1 << 30
# weights below this are rounding: what lies there is in no probe
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """H's spectrum as quadrature rules, one a probe: tr f(H) is about the mean over probes of sum_k w_k f(node_k).

    A Krylov space does not change when a multiple of the identity is added, so one set serves every scalar scale and
    shift, differentiably and without another pass over the data.

    Attributes:
        nodes: `(r, k)` float64.
        weights: `(r, k)` float64; each row sums to P.
        exact: whether these are all P eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    exact: bool = False

    def logdet(self, scale: Shift = 1.0, shift: Shift = 1.0) -> Estimate:
        """log |scale * H + shift * I| and the standard error over the probes.

        Raises:
            NumericalError: not positive definite.
        """
        values = cast(scale, self.nodes) * self.nodes + cast(shift, self.nodes)
        held = self.weights > NEGLIGIBLE * self.weights.sum(1, keepdim=True)
        check_positive(values[held])
        each = (self.weights * torch.where(held, values, 1.0).log()).sum(1)
        return _over_probes(each, self.exact)

    def trace(self) -> Estimate:
        """tr(H)."""
        return _over_probes((self.weights * self.nodes).sum(1), self.exact)


def exact_spectrum(matrix: Tensor, definite: bool) -> Spectrum:
    """All eigenvalues of a `(P, P)` matrix; those of a positive semi-definite one are clamped at zero."""
    values = torch.linalg.eigvalsh(matrix.double()).unsqueeze(0)
    return Spectrum(values.clamp(min=0) if definite else values, torch.ones_like(values), True)


def lanczos_spectrum(probes: Probes, count: int, steps: int, definite: bool) -> Spectrum:
    """`count` sign vectors, `steps` Lanczos steps from each."""
    _check(count, steps)
    nodes, weights = [], []
    for start in _groups(probes, count, steps):
        values, vectors = lanczos(probes.product, start, steps).eigen()
        nodes.append(values.clamp(min=0) if definite else values)
        weights.append(probes.size * vectors[:, 0].square())
    return Spectrum(torch.cat(nodes), torch.cat(weights))


def whitened_logdet(probes: Probes, scale: Tensor, shift: Tensor, count: int, steps: int, definite: bool) -> Estimate:
    """log |scale * H + diag(shift)| = sum log shift + log |I + scale D^-1/2 H D^-1/2| for a shift `(P,)` in float64.

    The gradient is that of the log-determinant, tr(P^-1 dP), estimated with the same probes and Krylov spaces.

    Raises:
        NumericalError: not positive definite.
    """
    fixed, heat = shift.detach(), scale.detach()
    if count >= probes.size:
        unit = torch.eye(probes.size, dtype=probes.like.dtype, device=probes.like.device)
        precision = scale * probes.product(unit).to(shift) + torch.diag(shift)
        check_positive(torch.linalg.eigvalsh(precision.detach()))
        value = torch.linalg.slogdet(precision)[1]
        return Estimate(value, torch.zeros_like(value))
    _check(count, steps)
    root = fixed.rsqrt().unsqueeze(1).to(probes.like)

    def whitened(v: Tensor) -> Tensor:
        return root * probes.product(root * v)

    each, slopes, total = [], [], torch.zeros_like(fixed)
    for start in _groups(probes, count, steps):
        found = lanczos(whitened, start, steps)
        nodes, vectors = found.eigen()
        nodes, first = nodes.clamp(min=0) if definite else nodes, vectors[:, 0]
        values = 1.0 + heat * nodes
        held = first.square() > NEGLIGIBLE
        check_positive(values[held])
        logs = torch.where(held, values, 1.0).log()
        each.append(probes.size * (first.square() * logs).sum(1))
        slopes.append(probes.size * (first.square() * nodes / torch.where(held, values, 1.0)).sum(1))
        # (I + scale M)^-1 z in the Krylov basis
        inner = math.sqrt(probes.size) * (vectors @ (first / torch.where(held, values, 1.0)).unsqueeze(-1)).squeeze(-1)
        solved = torch.einsum("kpr,rk->pr", found.basis.double(), inner)
        total += (start.double() * solved).sum(1)
    plain = _over_probes(torch.cat(each), False)
    inverse = total / count / fixed  # diagonal of P^-1
    slope = torch.cat(slopes).mean()
    surrogate = ((shift - fixed) * inverse).sum() + (scale - heat) * slope
    return Estimate(fixed.log().sum() + plain.value + surrogate, plain.standard_error)


def _over_probes(each: Tensor, exact: bool) -> Estimate:
    if exact:
        return Estimate(each.sum(), torch.zeros_like(each.sum()))
    return Estimate(each.mean(), each.detach().std() / math.sqrt(len(each)))


def _groups(probes: Probes, count: int, steps: int) -> list[Tensor]:
    """Sign vectors `(P, some)`, as many together as their Lanczos vectors allow."""
    size = probes.like.element_size() * probes.size * min(steps, probes.size)
    return list(probes.signs(count).split(max(1, MEMORY // size), 1))


def _check(count: int, steps: int) -> None:
    if count < 2 or steps < 1:
        raise ArgumentError(f"num_probes={count}, steps={steps}; expected at least two probes and one step")
