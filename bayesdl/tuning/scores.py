"""Proper scores of a predictive distribution, as losses to minimise: what `tune("heldout", score=)` takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MultivariateNormal, Normal

from bayesdl import mixtures
from bayesdl.errors import ShapeError, UnknownNameError, UnsupportedError

# distribution of B observations, targets -> loss of each (B,)
Score = Callable[[Distribution, Tensor], Tensor]


def negative_log(distribution: Distribution, targets: Tensor) -> Tensor:
    """-log p(y) `(B,)`, in nats."""
    return -mixtures.per_example(distribution, distribution.log_prob(targets))


def brier(distribution: Distribution, targets: Tensor) -> Tensor:
    """sum_c (p_c - 1[y = c])^2 `(B,)` (Brier 1950); sum_c (p_c - y_c)^2 for Bernoulli outputs."""
    if isinstance(distribution, Categorical):
        truth = torch.nn.functional.one_hot(targets.long(), distribution.probs.shape[-1])
    elif isinstance(distribution, Bernoulli):
        truth = targets.reshape(distribution.probs.shape)
    else:
        raise UnsupportedError(
            f'score="brier" is for class probabilities, and this predictive is {_name(distribution)}'
        )
    return (distribution.probs - truth).square().sum(-1)


def crps(distribution: Distribution, targets: Tensor) -> Tensor:
    """Continuous ranked probability score `(B,)` of normal marginals, summed over outputs (Gneiting & Raftery 2007)."""
    if not isinstance(distribution, Normal | MultivariateNormal):
        raise UnsupportedError(f'score="crps" is for normal predictives, and this one is {_name(distribution)}')
    scale = distribution.variance.sqrt()
    z = (targets.reshape(distribution.mean.shape) - distribution.mean) / scale
    density, below = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(z)
    return (scale * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))).sum(-1)


SCORES: dict[str, Score] = {"nll": negative_log, "brier": brier, "crps": crps}


def resolve_score(score: str | Score) -> Score:
    """Name or callable -> function whose answer is checked to be one float64 number an observation.

    Raises:
        UnknownNameError: no such name.
    """
    if isinstance(score, str) and score not in SCORES:
        raise UnknownNameError(f"score {score!r} is not known; choose one of {sorted(SCORES)} or pass a function")
    function = SCORES[score] if isinstance(score, str) else score

    def checked(distribution: Distribution, targets: Tensor) -> Tensor:
        found = function(distribution, targets)
        if not isinstance(found, Tensor) or found.shape != targets.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"the score returned {shape}; expected one loss an observation, ({len(targets)},)")
        return found.double()

    return checked


def _name(distribution: Distribution) -> str:
    return type(distribution).__name__
