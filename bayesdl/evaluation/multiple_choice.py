"""Multiple-choice questions answered by a language model: scores of the options become probabilities over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation import validation
from bayesdl.evaluation.metrics import evaluate_metrics
from bayesdl.evaluation.predictions import Predictions

CHOICE_METRICS = ("nll", "brier", "accuracy", "ece")


@final
@dataclass(frozen=True)
class MultipleChoice:
    """Metrics pooled over all questions, and for each group (subject); `normalise` says how scores were compared."""

    pooled: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    normalise: str
    predictions: Predictions


def option_log_probs(
    scores: Any, *, lengths: Any = None, normalise: Literal["none", "length"] = "none", given: Any = None
) -> Tensor:
    """Log-probabilities (N, K) or (S, N, K) over the options given: scores renormalised over them.

    Args:
        scores: log-likelihood of each option's text under the model, nats; (N, K), or (S, N, K) for S members.
        lengths: (N, K) tokens of each option. normalise: "length" divides a score by the option's tokens first.
        given: (N, K) bool, the options that a question has; others get probability 0.

    Raises:
        ArgumentError: lengths missing or below 1, or a question without options.
    """
    values = validation.tensor(scores, "scores")
    validation.rank(values, "scores", (2, 3))
    shape = tuple(values.shape[-2:])
    mask = torch.ones(shape, dtype=torch.bool) if given is None else validation.tensor(given, "given").bool()
    if tuple(mask.shape) != shape:
        raise ShapeError(f"given has shape {tuple(mask.shape)}, expected {shape}")
    mask = mask.to(values.device)
    if not bool(mask.any(-1).all()):
        raise ArgumentError(f"question {int((~mask.any(-1)).nonzero()[0])} has no option")
    values = validation.wide(values)
    validation.finite(values.masked_fill(~mask, 0.0), "scores")
    if normalise == "length":
        if lengths is None:
            raise ArgumentError('normalise="length" needs lengths=, the tokens of each option')
        tokens = validation.tensor(lengths, "lengths")
        if tuple(tokens.shape) != shape:
            raise ShapeError(f"lengths has shape {tuple(tokens.shape)}, expected {shape}")
        tokens = validation.wide(tokens).to(values.device)
        if bool((tokens[mask] < 1).any()):
            raise ArgumentError("lengths: every option given has at least one token")
        values = values / tokens.clamp_min(1.0)
    elif normalise != "none":
        raise ArgumentError(f"normalise={normalise!r}: expected 'none' or 'length'")
    return values.masked_fill(~mask, -torch.inf).log_softmax(-1)


def multiple_choice(
    targets: Any,
    scores: Any,
    *,
    lengths: Any = None,
    normalise: Literal["none", "length"] = "none",
    given: Any = None,
    group: Any = None,
    metrics: tuple[str, ...] = CHOICE_METRICS,
) -> MultipleChoice:
    """Score answers (N,) against option scores as in `option_log_probs`; members are averaged as probabilities.

    `group`: (N,) subject names or numbers. The calibration error of a small group is mostly noise; its count is given.
    """
    log_probs = option_log_probs(scores, lengths=lengths, normalise=normalise, given=given)
    made = Predictions(
        task="classification", log_probs=log_probs[None] if log_probs.dim() == 2 else log_probs, targets=targets
    )
    names = [] if group is None else [str(g) for g in (group.tolist() if isinstance(group, Tensor) else group)]
    if names and len(names) != len(made):
        raise ShapeError(f"group has {len(names)} entries, there are {len(made)} questions")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    groups = {n: evaluate_metrics(made.subset(torch.tensor(index)), metrics) for n, index in places.items()}
    counts = {n: len(index) for n, index in places.items()}
    return MultipleChoice(evaluate_metrics(made, metrics), groups, counts, normalise, made)
