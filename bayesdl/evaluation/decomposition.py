"""Total = aleatoric + epistemic, from the same members, and how much the members disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import NumericalError
from bayesdl.evaluation import validation

# A mutual information may come out this far below zero by rounding; further down it is an error of the input.
ROUNDING = 1e-6


@final
@dataclass(frozen=True)
class Split:
    """Uncertainty in nats (N,) for classes, variances (N, D) for moments; total = aleatoric + epistemic."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def split(
    *,
    probs: Any = None,
    logits: Any = None,
    mean: Any = None,
    variance: Any = None,
    member_weights: Any = None,
) -> Split:
    """Decompose members: classes from `probs` or `logits` (S, N, C), moments from `mean` and `variance` (S, N, D).

    Classes: total = H(mean_s p_s), aleatoric = mean_s H(p_s), epistemic = mutual information (Depeweg et al. 2018).
    Moments: aleatoric = sum_s w_s v_s, epistemic = sum_s w_s (mu_s - mean)^2 (law of total variance), per output.

    Raises:
        TypeError: none or several of `probs`, `logits`, `mean` were given.
        ShapeError, NonFiniteError, ArgumentError: bad input.
    """
    which = validation.exactly_one(probs=probs, logits=logits, mean=mean)
    if which == "mean":
        means, variances = validation.moments(mean, variance)
        return split_moments(means, variances, validation.member_weights(member_weights, len(means)))
    log_probs = _log_members(probs, logits)
    return split_categorical(log_probs, validation.member_weights(member_weights, len(log_probs)))


def split_categorical(log_probs: Tensor, member_weights: Tensor | None = None) -> Split:
    """Split of validated log-probabilities (S, N, C), in nats, float64."""
    log_probs = validation.wide(log_probs)
    weights = _weights(log_probs, member_weights)
    mixture = (log_probs + weights.log()).logsumexp(0)
    return _information(_entropy(mixture), (weights[..., 0] * _entropy(log_probs)).sum(0))


def split_bernoulli(log_probs: Tensor, member_weights: Tensor | None = None) -> Split:
    """Split of independent labels from log P(label is 1) (S, N, C): summed over labels, in nats, float64."""
    log_probs = validation.wide(log_probs)
    pairs = torch.stack([log_probs, log_complement(log_probs)], -1)
    weights = _weights(pairs, member_weights)
    mixture = (pairs + weights.log()).logsumexp(0)
    return _information(_entropy(mixture).sum(-1), (weights[..., 0] * _entropy(pairs)).sum(0).sum(-1))


def split_moments(means: Tensor, variances: Tensor, member_weights: Tensor | None = None) -> Split:
    """Split of Gaussian components (S, N, D) into variances (N, D), float64."""
    means, variances = validation.wide(means), validation.wide(variances)
    weights = _weights(means, member_weights)
    centre = (weights * means).sum(0)
    aleatoric, epistemic = (weights * variances).sum(0), (weights * (means - centre).square()).sum(0)
    return Split(aleatoric + epistemic, aleatoric, epistemic)


def disagreement(*, probs: Any = None, logits: Any = None, per_example: bool = False) -> float | Tensor:
    """Fraction of unordered member pairs with different predicted class; members (S, N, C), S >= 2.

    Raises:
        UndefinedError: there is one member only.
    """
    votes, members = _votes(probs, logits)
    if members < 2:
        raise validation.UndefinedError("disagreement compares members; one member was given", "one member")
    agreeing = (votes * (votes - 1)).sum(-1) / (members * (members - 1))
    return 1 - agreeing if per_example else float((1 - agreeing).mean())


def variation_ratio(*, probs: Any = None, logits: Any = None, per_example: bool = False) -> float | Tensor:
    """1 - (largest vote count) / S, members (S, N, C)."""
    votes, members = _votes(probs, logits)
    ratio = 1 - votes.amax(-1) / members
    return ratio if per_example else float(ratio.mean())


def votes_of(log_probs: Tensor) -> Tensor:
    """(N, C) float64, how many of the members (S, N, C) predict each class."""
    predicted = log_probs.argmax(-1)
    return torch.zeros(log_probs.shape[1:], dtype=torch.float64, device=log_probs.device).scatter_add_(
        1, predicted.T, torch.ones(predicted.T.shape, dtype=torch.float64, device=log_probs.device)
    )


def log_complement(log_probs: Tensor) -> Tensor:
    """log(1 - p) from log p <= 0, accurate at both ends."""
    log_probs = log_probs.clamp_max(0.0)
    # expm1 keeps 1 - p accurate near p = 1, log1p near p = 0; both are -inf-safe.
    return torch.where(log_probs > -0.693, (-torch.expm1(log_probs)).log(), torch.log1p(-log_probs.exp()))


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * log_probs).sum(-1)


def _weights(members: Tensor, member_weights: Tensor | None) -> Tensor:
    count = len(members)
    weights = members.new_full((count,), 1 / count) if member_weights is None else member_weights.to(members)
    return weights.reshape(-1, *[1] * (members.dim() - 1))


def _information(total: Tensor, aleatoric: Tensor) -> Split:
    epistemic = total - aleatoric
    if bool((epistemic < -ROUNDING * total.clamp_min(1.0)).any()):
        at = int(epistemic.argmin())
        raise NumericalError(
            f"epistemic uncertainty is {float(epistemic[at]):g} at example {at}: the members are no distributions"
        )
    epistemic = epistemic.clamp_min(0.0)
    # The sum stays exact where rounding had made the difference negative.
    return Split(aleatoric + epistemic, aleatoric, epistemic)


def _log_members(probs: Any, logits: Any) -> Tensor:
    if validation.exactly_one(probs=probs, logits=logits) == "logits":
        members = validation.logits(logits)
        validation.rank(members, "logits", (3,))
        return validation.wide(members).log_softmax(-1)
    members = validation.probabilities(probs)
    validation.rank(members, "probs", (3,))
    return validation.wide(members).log()


def _votes(probs: Any, logits: Any) -> tuple[Tensor, int]:
    members = _log_members(probs, logits)
    return votes_of(members), len(members)
