"""Does a sampler draw from the right posterior? Expected coverage at random reference points.

TARP: Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), "Sampling-based accuracy testing of posterior estimators".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, check_finite

REFERENCES = ("conditional", "other", "box")
LEVELS = 101


@final
@dataclass(frozen=True)
class Coverage:
    """Expected coverage of credible regions.

    Attributes:
        level: a `(L,)`, from 0 to 1.
        coverage: ECP(a) `(L,)`: share of the truths inside the regions of credibility a; equals a for the posterior.
        low, high: `(L,)`, bootstrap band over the truths.
        max_gap: largest |ECP(a) - a|.
        area: integral of ECP(a) - a over (1/2, 1) less that over (0, 1/2); negative for samples too close
            together.
        p_value: of a Kolmogorov-Smirnov test that the truth's rank is uniform, as it is under the posterior.
    """

    level: Tensor
    coverage: Tensor
    low: Tensor
    high: Tensor
    max_gap: float
    area: float
    p_value: float


def posterior_coverage(
    samples: Tensor,
    theta: Tensor,
    x: Tensor | None = None,
    references: str = "conditional",
    *,
    noise: float = 0.1,
    bootstrap: int = 200,
    confidence: float = 0.95,
    rescale: bool = True,
    generator: torch.Generator | None = None,
) -> Coverage:
    """Coverage over N pairs of a truth theta_n and S samples of its posterior given x_n.

    `f_n` is the share of samples nearer to a reference point r_n than theta_n is, and ECP(a) the mean of 1[f_n < a].

    Args:
        samples: `(S, N, d)`.
        theta: `(N, d)`, drawn from the prior; x_n from the likelihood given theta_n.
        x: `(N, ...)`, for conditional references.
        references: law of r_n. "conditional": a random linear map of the standardised x_n, in standard deviations of
            the truths around their mean, plus noise; a tenth of the pairs, not tested, says in which direction each
            coordinate of the map points, so that it follows the truths. "other": another truth; "box": uniform over the
            box of the truths. The last two cannot tell the posterior from the prior.
        noise: standard deviation of that noise, in those of the truths.
        bootstrap: replicates of the band, all from the one generator.
        confidence: of the band.
        rescale: divide each coordinate by the range of the truths.
        generator: of references, ties and replicates; None is a fixed seed.

    Raises:
        ShapeError: shapes that do not fit, or fewer than two truths.
        ArgumentError: conditional references without x, or other values out of range.
        NonFiniteError: NaN or infinity.
    """
    _check(samples, theta, x, references, bootstrap, confidence)
    source = generator or torch.Generator(samples.device).manual_seed(0)
    truth, drawn = theta.double(), samples.double()
    if rescale:
        low, span = truth.amin(0), truth.amax(0) - truth.amin(0)
        span = torch.where(span > 0, span, 1.0)
        truth, drawn = (truth - low) / span, (drawn - low) / span
    if references == "conditional" and x is not None:
        reference, tested = _conditional(truth, x, noise, source)
        reference, truth, drawn = reference[tested], truth[tested], drawn[:, tested]
    else:
        reference = _independent(references, truth, source)
    own = (truth - reference).norm(dim=-1)
    distance = torch.stack([(sample - reference).norm(dim=-1) for sample in drawn])
    closer, ties = (distance < own).sum(0).double(), (distance == own).sum(0).double()
    share = closer / len(drawn)
    level = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=share.device)
    coverage = _below(share, level)
    replicates = [_below(share[_indices(len(share), share, source)], level) for _ in range(bootstrap)]
    tail = (1 - confidence) / 2
    band = torch.stack(replicates).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device=share.device), 0)
    gap = coverage - level
    half = LEVELS // 2
    rank = (closer + _uniform(share, source) * (ties + 1)) / (len(drawn) + 1)
    return Coverage(
        level,
        coverage,
        band[0],
        band[1],
        float(gap.abs().max()),
        float(torch.trapezoid(gap[half:], level[half:]) - torch.trapezoid(gap[: half + 1], level[: half + 1])),
        _uniformity(rank),
    )


def _check(
    samples: Tensor, theta: Tensor, x: Tensor | None, references: str, bootstrap: int, confidence: float
) -> None:
    if theta.dim() != 2 or samples.dim() != 3 or samples.shape[1:] != theta.shape or len(theta) < 2 or not len(samples):
        raise ShapeError(
            f"samples {tuple(samples.shape)}, theta {tuple(theta.shape)}; expected (S, N, d) and (N, d) with at least "
            "two truths"
        )
    if references not in REFERENCES:
        raise ArgumentError(f"references={references!r}; expected one of {REFERENCES}")
    if references == "conditional":
        if x is None:
            raise ArgumentError(
                'references="conditional" needs x: references that do not depend on it cannot tell a posterior from '
                'the prior. Pass x=, or references="other"'
            )
        if len(x) != len(theta):
            raise ShapeError(f"{len(x)} inputs x for {len(theta)} truths")
        check_finite(x, "x")
    if bootstrap < 1 or not 0 < confidence < 1:
        raise ArgumentError(f"bootstrap={bootstrap}, confidence={confidence}; expected at least 1, and between 0 and 1")
    check_finite(samples, "samples")
    check_finite(theta, "theta")


def _independent(kind: str, truth: Tensor, source: torch.Generator) -> Tensor:
    """Reference points that do not look at x."""
    count = len(truth)
    if kind == "box":
        low, high = truth.amin(0), truth.amax(0)
        return low + (high - low) * _uniform(truth, source)
    shift = 1 + _indices(count, truth, source) % (count - 1)
    return truth[(torch.arange(count, device=truth.device) + shift) % count]


def _conditional(truth: Tensor, x: Tensor, noise: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reference points of all pairs, and the indices of the pairs that did not decide the signs of the map."""
    count, width = truth.shape
    inputs = x.double().reshape(count, -1).to(truth.device)
    spread = inputs.std(0)
    inputs = (inputs - inputs.mean(0)) / torch.where(spread > 0, spread, 1.0)
    moved = inputs @ _normal((inputs.shape[1], width), truth, source) / inputs.shape[1] ** 0.5
    order = torch.randperm(count, generator=source, device=source.device).to(truth.device)
    pilot = order[: count // 10]
    # attraction in one coordinate and repulsion in another would cancel in the distances, and hide a wrong posterior
    slope = ((truth - truth.mean(0)) * moved)[pilot].sum(0)
    moved = torch.where(slope < 0, -moved, moved) + noise * _normal((count, width), truth, source)
    return truth.mean(0) + truth.std(0) * moved, order[count // 10 :]


def _indices(count: int, like: Tensor, source: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=source, device=source.device).to(like.device)


def _normal(shape: tuple[int, ...], like: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, device=source.device, dtype=torch.float64).to(like.device)


def _uniform(like: Tensor, source: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=source, device=source.device, dtype=torch.float64).to(like.device)


def _below(share: Tensor, level: Tensor) -> Tensor:
    """Mean of 1[f < a] for each a."""
    ordered = share.sort().values
    return torch.searchsorted(ordered, level).double() / len(share)


def _uniformity(rank: Tensor) -> float:
    from scipy.stats import kstest

    return float(kstest(np.asarray(rank.cpu()), "uniform").pvalue)
