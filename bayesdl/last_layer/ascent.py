"""Variational classification on cached features: coordinate ascent on the bound, no step size and no samples.

Each round takes the best tilt of the softmax bound, then the covariances that are stationary for it (exact), then a
damped Newton step of the means, then the prior precision (Knowles and Minka 2011; MacKay 1992). Cost N d^2 K a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.last_layer.bounds import Normaliser
from bayesdl.last_layer.parameterisation import Covariance

MOST_ROUNDS, TOLERANCE, HALVINGS = 100, 1e-6, 20
LEAST_STEP = 1.0 / 16.0
CHUNK = 64 << 20  # bytes of weighted features at once


@final
@dataclass(frozen=True, eq=False)
class Ascent:
    """Where coordinate ascent ended.

    Attributes:
        mean: mu, `(K, d')`.
        prior_precision: lambda, `(d',)`.
        bounds: value of the evidence lower bound after every round; never falls while the prior is fixed.
        converged: whether the last round changed the bound by less than the tolerance.
    """

    mean: Tensor
    prior_precision: Tensor
    bounds: tuple[float, ...]
    converged: bool


@torch.no_grad()
def ascend(
    phi: Tensor,
    y: Tensor,
    mean: Tensor,
    covariance: Covariance,
    *,
    prior_precision: float | None = None,
    penalised: Tensor | None = None,
    bound: str = "km",
    binary: bool = False,
    keep_mean: bool = False,
    rounds: int = MOST_ROUNDS,
) -> Ascent:
    """Fit q(W) = prod_k N(mu_k, S_k) to a softmax likelihood; `covariance` is filled in place.

    Args:
        phi: features with their constant, `(N, d')`.
        y: one-hot or soft labels `(N, K)`; labels in [0, 1] with `binary`.
        mean: where to start, `(K, d')`; those of the trained network.
        covariance: "full", "diag", "shared" or "precision" (their stationary points are closed forms).
        prior_precision: lambda; None estimates it.
        penalised: `(d',)` bool, the weights that the estimate of lambda counts (not the intercept).
        bound: "km" or "jensen".
        binary: K two-class problems instead of one of K classes.
        keep_mean: leave the means as they are: the network's own predictions with uncertainty around them.
        rounds: the most.

    Raises:
        ArgumentError: a bound or a covariance that has no closed stationary point here.
    """
    if bound not in ("km", "jensen"):
        raise ArgumentError(
            f'bound="{bound}" has no logit noise to scale with on frozen features; use "km" or "jensen"'
        )
    if covariance.name == "lowrank":
        raise ArgumentError('covariance="lowrank" has no closed stationary point; use "full", "shared" or "diag"')
    normaliser = Normaliser(bound, binary)
    width = phi.shape[1]
    counted = torch.ones(width, dtype=torch.bool, device=phi.device) if penalised is None else penalised
    precision = torch.full((width,), float(prior_precision or width), dtype=phi.dtype, device=phi.device)
    covariance.set_precision(curvature(phi, mean, binary=binary) + torch.diag(precision).double())
    variance = covariance.quad(phi)
    trace: list[float] = []
    weight, step = torch.zeros_like(variance), 1.0
    for number in range(rounds):
        if not keep_mean:
            mean = _step(phi, y, mean, variance, covariance, precision, normaliser)
        _, wanted = normaliser.gradients(phi @ mean.mT, variance)
        # a natural-gradient step in the precision; whole ones may swing between two states
        weight = wanted if number == 0 else weight + step * (wanted - weight)
        covariance.set_precision(_gram(phi, weight) + torch.diag(precision).double())
        variance = covariance.quad(phi)
        if prior_precision is None:
            spread = mean.square() + covariance.diagonal()
            precision = torch.full_like(precision, float(counted.sum() * len(mean) / spread[:, counted].sum()))
        trace.append(float(_bound(phi, y, mean, variance, covariance, precision, normaliser)))
        if len(trace) > 1 and abs(trace[-1] - trace[-2]) <= TOLERANCE * abs(trace[-1]):
            return Ascent(mean, precision, tuple(trace), True)
        if len(trace) > 1 and trace[-1] < trace[-2]:
            step = max(0.5 * step, LEAST_STEP)
    return Ascent(mean, precision, tuple(trace), False)


def curvature(phi: Tensor, mean: Tensor, *, binary: bool = False) -> Tensor:
    """sum_n p_nk (1 - p_nk) phi_n phi_n^T at the means alone, `(K, d', d')` float64."""
    logits = phi @ mean.mT
    share, _ = Normaliser("km", binary).gradients(logits, torch.zeros_like(logits))
    return _gram(phi, share * (1.0 - share))


def _gram(phi: Tensor, weight: Tensor) -> Tensor:
    """sum_n w_nk phi_n phi_n^T, `(K, d', d')` in float64, a few classes at a time."""
    step = max(1, CHUNK // max(1, phi.element_size() * phi.numel()))
    parts = [
        torch.einsum("nki,nj->kij", phi.unsqueeze(1) * weight[:, k : k + step].unsqueeze(2), phi)
        for k in range(0, weight.shape[1], step)
    ]
    return torch.cat(parts).double()


def _bound(
    phi: Tensor,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    covariance: Covariance,
    precision: Tensor,
    normaliser: Normaliser,
) -> Tensor:
    logits = phi @ mean.mT
    fit = (y * logits).sum(-1) - normaliser.mass(y) * normaliser.upper(logits, variance)
    spread = (precision * (mean.square() + covariance.diagonal())).sum(-1)
    divergence = 0.5 * (spread - precision.log().sum() - covariance.logdet() - len(precision))
    return fit.double().sum() - divergence.double().sum()


def _step(
    phi: Tensor,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    covariance: Covariance,
    precision: Tensor,
    normaliser: Normaliser,
) -> Tensor:
    """One preconditioned step of the means, halved until the bound rises; the covariance stays."""
    share, _ = normaliser.gradients(phi @ mean.mT, variance)
    slope = (y - normaliser.mass(y).unsqueeze(-1) * share).mT @ phi - precision * mean
    direction = torch.einsum("kij,kj->ki", covariance.dense().to(slope), slope)

    def value(candidate: Tensor) -> Tensor:
        logits = phi @ candidate.mT
        fit = (y * logits).sum(-1) - normaliser.mass(y) * normaliser.upper(logits, variance)
        return fit.double().sum() - 0.5 * (precision * candidate.square()).double().sum()

    before, size = value(mean), 1.0
    for _ in range(HALVINGS):
        candidate = mean + size * direction
        if bool(value(candidate) >= before):
            return candidate
        size /= 2.0
    return mean
