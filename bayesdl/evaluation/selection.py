"""Which of many checkpoints to combine, and with what weights, from their log-likelihoods on validation data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import validation

Rule = Literal["greedy", "optimal", "top"]
# Weights below this are dropped from the optimum: they change the mixture by less than its own tolerance.
NEGLIGIBLE = 1e-6
# Impossible examples cost this many nats each in the greedy search, so that it goes where fewest are left.
IMPOSSIBLE = 1e6


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Weights (K,) of the candidates, float64, summing to 1, the NLL of their mixture, and that after every step."""

    weights: Tensor
    nll: float
    path: tuple[float, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """The candidates chosen."""
        return tuple(int(k) for k in self.weights.nonzero()[:, 0])


def select_members(
    log_likelihoods: Any,
    *,
    rule: Rule = "greedy",
    max_members: int = 10,
    max_picks: int = 200,
    tolerance: float = 1e-9,
) -> Selection:
    """Choose members of an ensemble by the NLL of their mixture (Caruana et al. 2004; Egele et al. 2022).

    Weights chosen on some data flatter the mixture there: score it on others.

    Args:
        log_likelihoods: (K, N), log p_k(y_n) of candidate k on validation example n; -inf is legal.
        rule: "greedy": start with the best candidate, add with replacement the one that lowers the NLL of the mixture
            most (or raises it least: two steps may gain where one does not), ties to the lowest index, and return to
            the step of least NLL; weights are multiplicities. Never worse than the best candidate alone.
            "optimal": the weights of least NLL, by EM, which is monotone on this concave problem. "top": the
            `max_members` best by their own NLL, equal weights.
        max_members: distinct candidates of "greedy" and "top". max_picks: steps of "greedy", or of EM times ten.
        tolerance: nats by which a later step of "greedy" must be better, and at which EM stops.

    Raises:
        ShapeError, NonFiniteError, ArgumentError: bad input. UndefinedError: some example is impossible under all.
    """
    table = validation.wide(validation.tensor(log_likelihoods, "log_likelihoods"))
    validation.rank(table, "log_likelihoods", (2,))
    validation.not_empty(table, "log_likelihoods")
    bad = ~(table < torch.inf)
    if bool(bad.any()):
        validation.raise_at(bad, table, "log_likelihoods", "are NaN or +inf")
    if bool(table.isinf().all(0).any()):
        raise validation.UndefinedError("an example has likelihood 0 under every candidate", "infinite NLL")
    limit, picks = validation.bin_count(max_members), validation.bin_count(max_picks)
    if rule == "top":
        best = (-table.clamp_min(-IMPOSSIBLE)).mean(1).argsort(stable=True)[:limit]
        counts = torch.zeros(len(table), dtype=torch.float64, device=table.device)
        counts[best] = 1.0
        return _selected(table, counts, ())
    if rule == "optimal":
        return _optimal(table, 10 * picks, tolerance)
    if rule != "greedy":
        raise ArgumentError(f"rule={rule!r}: expected 'greedy', 'optimal' or 'top'")
    return _greedy(table, limit, picks, tolerance)


def _greedy(table: Tensor, limit: int, picks: int, tolerance: float) -> Selection:
    counts, whole = torch.zeros(len(table), dtype=torch.float64, device=table.device), table
    table = table.clamp_min(-IMPOSSIBLE)
    first = int((-table).mean(1).argmin())
    counts[first] = 1.0
    running, path = table[first], [float(-table[first].mean())]
    best, least = counts.clone(), 0
    for picked in range(1, picks):
        losses = math.log(picked + 1.0) - torch.logaddexp(running, table).mean(1)
        if int((counts > 0).sum()) >= limit:
            losses = losses.masked_fill(counts == 0, torch.inf)
        pick = int(losses.argmin())
        counts[pick] += 1
        running = torch.logaddexp(running, table[pick])
        path.append(float(losses[pick]))
        if path[-1] < path[least] - tolerance:
            best, least = counts.clone(), picked
    return _selected(whole, best, tuple(path[: least + 1]))


def _optimal(table: Tensor, steps: int, tolerance: float) -> Selection:
    weights = table.new_full((len(table),), 1 / len(table))
    path: list[float] = []
    for _ in range(steps):
        joint = table + weights.log()[:, None]
        mixture = joint.logsumexp(0)
        path.append(float(-mixture.mean()))
        weights = (joint - mixture).exp().mean(1)
        # mean_n p_k / mixture is at most 1 for every candidate at the optimum, and exceeds the gain still to be had.
        if float((table - mixture).exp().mean(1).amax()) < 1 + tolerance:
            break
    return _selected(table, torch.where(weights < NEGLIGIBLE, 0.0, weights), tuple(path))


def _selected(table: Tensor, counts: Tensor, path: tuple[float, ...]) -> Selection:
    weights = counts / counts.sum()
    nll = float(-(table + weights.log()[:, None]).logsumexp(0).mean())
    return Selection(weights, nll, path or (nll,))
