"""How much samples differ in what they predict, within and between cycles or chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, check_finite


@final
@dataclass(frozen=True)
class Diversity:
    """Averages over pairs of different samples; NaN where there is no such pair.

    Attributes:
        disagreement_within, disagreement_between: share of inputs at which two samples name different classes.
        kl_within, kl_between: Kullback-Leibler divergence between their predictions, in nats.
    """

    disagreement_within: float
    disagreement_between: float
    kl_within: float
    kl_between: float


def diversity(probs: Tensor, groups: Tensor) -> Diversity:
    """Diversity of class probabilities `(S, P, C)` whose samples belong to `groups` `(S,)`: cycles, chains or both.

    Raises:
        ShapeError: shapes that do not fit.
        NonFiniteError: NaN or infinity.
    """
    if probs.dim() != 3 or groups.shape != probs.shape[:1]:
        raise ShapeError(f"probabilities {tuple(probs.shape)}, groups {tuple(groups.shape)}; expected (S, P, C), (S,)")
    check_finite(probs, "probabilities")
    values = probs.double()
    # a probability of 0 in float32 is one below its smallest number
    logs = values.clamp(min=torch.finfo(torch.float32).tiny).log()
    flat, flat_logs = values.flatten(1), logs.flatten(1)
    kl = ((flat * flat_logs).sum(1)[:, None] - flat @ flat_logs.T) / probs.shape[1]
    labels = values.argmax(-1)
    differ = torch.stack([(labels != row).double().mean(1) for row in labels])
    same = groups[:, None] == groups[None, :]
    itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    within, between = same & ~itself, ~same
    return Diversity(
        float(differ[within].mean()), float(differ[between].mean()), float(kl[within].mean()), float(kl[between].mean())
    )
