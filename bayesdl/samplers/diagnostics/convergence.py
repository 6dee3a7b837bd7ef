"""Rank-normalised split R-hat, effective sample sizes and standard errors (Vehtari et al. 2021), in function space.

All take draws `(M, n, ...)`: M chains of n draws of whatever the chains are to agree on, log-likelihoods or predicted
probabilities at probe inputs. Never weights: a network's symmetries make chains that agree look different there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, check_finite
from bayesdl.likelihoods import Likelihood

FEWEST = 4
TAILS = (0.05, 0.95)


def rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat `(...)`, float64: the larger of the values' and of their distances to the median.

    1 is agreement; 1 too where a quantity never changes in any chain.

    Raises:
        ShapeError: fewer than four draws of a chain.
        NonFiniteError: NaN or infinity.
    """
    halves = _split(_checked(draws))
    return torch.maximum(_plain_rhat(_normal_scores(halves)), _plain_rhat(_normal_scores(_folded(halves))))


def ess(draws: Tensor, kind: str = "bulk") -> Tensor:
    """Effective number of independent draws `(...)`, float64, of all chains together.

    Args:
        draws: `(M, n, ...)`.
        kind: "bulk" (of ranks: where the mass lies), "tail" (the smaller of those for the 5 % and 95 % quantiles), or
            "mean" (of the values: the standard error of the mean is sd / sqrt(ess)).

    Raises:
        ArgumentError: another kind.
        ShapeError, NonFiniteError: as `rhat`.
    """
    values = _checked(draws)
    if kind == "bulk":
        return _geyer(_normal_scores(_split(values)))
    if kind == "mean":
        return _geyer(_split(values))
    if kind != "tail":
        raise ArgumentError(f'kind={kind!r}; expected "bulk", "tail" or "mean"')
    pooled = values.reshape(-1, *values.shape[2:])
    below = [_geyer(_split((values <= pooled.quantile(q, 0)).double())) for q in TAILS]
    return torch.minimum(*below)


def mcse(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean over all draws `(...)`, float64."""
    values = _checked(draws)
    return values.reshape(-1, *values.shape[2:]).std(0) / ess(values, "mean").sqrt()


@final
@dataclass(frozen=True)
class Convergence:
    """How far chains agree on quantities in function space.

    Attributes:
        rhat, bulk, tail, mcse: `(Q,)`, float64, one entry a quantity.
        chains, draws: M and n.
    """

    rhat: Tensor
    bulk: Tensor
    tail: Tensor
    mcse: Tensor
    chains: int
    draws: int

    def share_above(self, threshold: float) -> float:
        """Share of the quantities whose R-hat lies above the threshold."""
        return float((self.rhat > threshold).double().mean())

    @property
    def smallest_ess(self) -> float:
        """Over all quantities, bulk and tail."""
        return float(torch.minimum(self.bulk, self.tail).min())

    @property
    def median_ess(self) -> float:
        """Median of the bulk sizes."""
        return float(self.bulk.median())


def convergence(draws: Tensor) -> Convergence:
    """All of it for draws `(M, n, ...)`; trailing axes are flattened. Raises what `rhat` raises."""
    values = _checked(draws)
    flat = values.reshape(*values.shape[:2], -1)
    return Convergence(rhat(flat), ess(flat), ess(flat, "tail"), mcse(flat), flat.shape[0], flat.shape[1])


def quantities(outputs: Tensor, likelihood: Likelihood, targets: Tensor | None = None) -> Tensor:
    """What chains should agree on at probe inputs: predicted probabilities or means, and log p(y | x, theta).

    Args:
        outputs: `(..., P, C)`, of each sample.
        targets: `(P,)` or `(P, C)`; None leaves the log-likelihood out.

    Returns:
        `(..., Q)`.
    """
    flat = outputs.reshape(-1, *outputs.shape[-2:])
    given = likelihood.distribution(flat)
    found = given.probs if hasattr(given, "probs") else given.mean
    parts = [found.reshape(len(flat), -1)]
    if targets is not None:
        scores = torch.stack([likelihood.log_prob(f, targets).reshape(len(f), -1).sum(-1) for f in flat])
        parts.append(scores)
    return torch.cat(parts, -1).reshape(*outputs.shape[:-2], -1)


def by_chain(values: Tensor, chains: Tensor) -> Tensor:
    """Samples `(S, ...)` as `(M, n, ...)` by their chain ids `(S,)`; of longer chains the first n draws.

    Raises:
        ShapeError: another number of ids than of samples.
    """
    if chains.shape != values.shape[:1]:
        raise ShapeError(f"{tuple(chains.shape)} chain ids for values of shape {tuple(values.shape)}")
    own = [values[chains == number] for number in chains.unique().tolist()]
    shortest = min(map(len, own))
    return torch.stack([part[:shortest] for part in own])


def _checked(draws: Tensor) -> Tensor:
    if draws.dim() < 2 or draws.shape[1] < FEWEST:
        raise ShapeError(
            f"draws of shape {tuple(draws.shape)}; expected (chains, draws, ...) with at least {FEWEST} draws of each: "
            "collect more samples"
        )
    check_finite(draws, "draws")
    return draws.double()


def _split(values: Tensor) -> Tensor:
    """Each chain as two of half its length; the middle draw of an odd number belongs to neither."""
    half = values.shape[1] // 2
    return torch.cat([values[:, :half], values[:, -half:]])


def _folded(values: Tensor) -> Tensor:
    pooled = values.reshape(-1, *values.shape[2:])
    return (values - pooled.quantile(0.5, 0)).abs()


def _normal_scores(values: Tensor) -> Tensor:
    """`Phi^-1((rank - 3/8) / (S + 1/4))`, ties by their average rank, over all chains together."""
    flat = values.reshape(values.shape[0] * values.shape[1], -1).T.contiguous()
    ordered = flat.sort(-1).values
    # number below, and number not above: their mean is the average rank of ties, less one half
    low, high = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    rank = 0.5 * (low + high + 1).double()
    scores = torch.special.ndtri((rank - 0.375) / (flat.shape[-1] + 0.25))
    return scores.T.reshape(values.shape)


def _plain_rhat(values: Tensor) -> Tensor:
    """`sqrt(((n - 1) / n W + B / n) / W)`."""
    n = values.shape[1]
    within, between = values.var(1).mean(0), values.mean(1).var(0)
    ratio = ((n - 1) / n * within + between) / within
    return torch.where((within == 0) & (between == 0), 1.0, ratio.sqrt())


def _geyer(values: Tensor) -> Tensor:
    """Effective sample size by Geyer's initial monotone sequence of the autocorrelations averaged over chains."""
    chains, n = values.shape[:2]
    centred = values - values.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=1)
    covariance = (torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=1)[:, :n] / n).mean(0)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (values.mean(1).var(0) if chains > 1 else 0.0)
    constant = total <= 0
    rho = 1 - (within - covariance) / torch.where(constant, 1.0, total)
    rho[0] = 1.0
    count = max((n - 1) // 2, 1)  # pairs of lags (0, 1), (2, 3), ... below n - 1
    even, odd = rho[: 2 * count : 2], rho[1 : 2 * count : 2]
    pairs = even + odd
    going = (pairs > 0).cumprod(0)
    going[-1] = 0  # where all are positive the last one is not trusted
    falling = torch.cummin(pairs, 0).values
    first = going.sum(0, keepdim=True)
    beyond = even.gather(0, first).squeeze(0).clamp(min=0)
    tau = -1 + 2 * (falling * going).sum(0) + beyond
    size = chains * n
    found = size / tau.clamp(min=1 / math.log10(size))
    return torch.where(constant, float(size), found)
