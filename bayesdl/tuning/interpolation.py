"""Covariances at many prior precisions from few, with a proven error.

As a function of the prior precision d a posterior covariance is a sum of terms w / (x + d), one per eigenvalue
x >= 0 of the curvature. Let s_1, ..., s_n be positive numbers and

    r(w) = prod_i (w - s_i) / (w + s_i),        T(x) = (r(sqrt(-x)) + 1 / r(sqrt(-x))) / 2.

T is a rational function of x with poles at -s_i^2, and |T| <= 1 for x >= 0, where r has modulus one. Hence

    1 / (x + d) * (1 - T(x) / T(-d)) = sum_i m_i(d) / (x + s_i^2)

differs from 1 / (x + d) by at most the relative amount 1 / |T(-d)| = 2 |r| / (1 + r^2), r = r(sqrt(d)), whatever the
eigenvalues are. A covariance at d is so a fixed combination of covariances at the nodes s_i^2; every variance is right
to that relative amount, every other entry to that fraction of the two standard deviations (Cauchy-Schwarz). The nodes
that make the largest error over an interval least are those of Zolotarev's third problem, values of the elliptic
function dn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# relative error of a variance; rounding in single precision, in which curvature is kept by default, is as large
TOLERANCE = 1e-6
# the tail of the series of dn that is left out is below exp(-pi TERMS)
TERMS = 12


@dataclass(frozen=True)
class Shifts:
    """R prior precisions, and the fewer ones at which covariances are computed.

    Attributes:
        nodes: `(n,)`.
        weights: `(n, R)`; the value at a wanted precision is the sum of these times the values at the nodes. None
            where the nodes are the wanted ones.
        error: bound of the relative error of a variance.
    """

    nodes: Tensor
    weights: Tensor | None
    error: float

    @property
    def count(self) -> int:
        """R."""
        return len(self.nodes) if self.weights is None else int(self.weights.shape[1])

    def combined(self, values: Tensor, some: slice = slice(None)) -> Tensor:
        """Values `(n, ...)` at the nodes -> `(R, ...)` at the wanted precisions, or at `some` of them."""
        if self.weights is None:
            return values[some]
        mixing = self.weights[:, some].to(values)
        return (mixing.mT @ values.flatten(1)).view(-1, *values.shape[1:])


def shifts_of(wanted: Tensor, tolerance: float = TOLERANCE) -> Shifts:
    """The fewest nodes for precisions `(R,)`, float64, at which the error is bounded by `tolerance`."""
    roots = wanted.double().sqrt()
    low, high = float(roots.min()), float(roots.max())
    if low < high:
        # about pi^2 / (2 log(4 high / low)) nepers a node
        count = max(2, int(2.0 * math.log(4.0 * high / low) * math.log(2.0 / tolerance) / math.pi**2) - 1)
        while count < len(wanted):
            places = nodes(low, high, count).to(roots)
            found = _ratio(roots, places).abs()
            error = float((2.0 * found / (1.0 + found.square())).max())
            if error <= tolerance:
                return Shifts(places.square(), _weights(roots, places), error)
            count += 1
    return Shifts(wanted, None, 0.0)


def nodes(low: float, high: float, count: int) -> Tensor:
    """Zolotarev's points in `[low, high]`, ascending: high dn((2 i - 1) K / 2 n) at modulus^2 1 - (low / high)^2."""
    other = low / high
    quarter = math.pi / (2.0 * _mean(1.0, other))
    conjugate = math.pi / (2.0 * _mean(1.0, math.sqrt(1.0 - other**2)))
    u = (2.0 * torch.arange(count, dtype=torch.float64) + 1.0) * quarter / count / 2.0
    # dn is periodic and a sum of copies of sech, which converges the faster the wider the interval
    periods = 2.0 * quarter * torch.arange(-TERMS, TERMS + 1, dtype=torch.float64)
    steps = math.pi * (u.unsqueeze(-1) - periods) / (2.0 * conjugate)
    values = math.pi / (2.0 * conjugate) * torch.cosh(steps.clamp(-700.0, 700.0)).reciprocal().sum(-1)
    return (high * values).flip(0)


def _mean(a: float, b: float) -> float:
    """Arithmetic-geometric mean."""
    while abs(a - b) > 1e-15 * a:
        a, b = 0.5 * (a + b), math.sqrt(a * b)
    return a


def _ratio(roots: Tensor, places: Tensor) -> Tensor:
    """r at sqrt(d), `(R,)`."""
    return ((roots.unsqueeze(-1) - places) / (roots.unsqueeze(-1) + places)).prod(-1)


def _weights(roots: Tensor, places: Tensor) -> Tensor:
    """m_i(d) `(n, R)`, from the residues of T; the factor that vanishes at a node is divided out beforehand."""
    ratios = (roots - places.unsqueeze(-1)) / (roots + places.unsqueeze(-1))  # (n, R)
    without = torch.stack([ratios[torch.arange(len(places)) != i].prod(0) for i in range(len(places))])
    sums, differences = places.unsqueeze(-1) + places, places.unsqueeze(-1) - places
    differences.fill_diagonal_(1.0)
    residues = 2.0 * places.square() * (sums / differences).fill_diagonal_(1.0).prod(-1)
    slopes = 2.0 * without / (roots + places.unsqueeze(-1)).square() / (1.0 + ratios.prod(0).square())
    return residues.unsqueeze(-1) * slopes
