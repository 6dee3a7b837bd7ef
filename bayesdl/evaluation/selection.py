"""Which of many checkpoints to combine, and with what weights, from their log-likelihoods on validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import losses, validation
from bayesdl.evaluation.mixing import check_candidates, fingerprint, mix
from bayesdl.evaluation.predictions import Predictions

Rule = Literal["greedy", "optimal", "top"]
# Weights below this are dropped from the optimum: they change the mixture by less than its own tolerance.
NEGLIGIBLE = 1e-6
# With so many examples for each free weight, choosing flatters by less than 0.005 nats an example.
FEW = 100
# Impossible examples cost this many nats each in the greedy search, so that it goes where fewest are left.
IMPOSSIBLE = 1e6


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Weights (K,) of the candidates, float64, summing to 1, the NLL of their mixture, and that after every step.

    `data` is the fingerprint of the validation targets, where predictions were given.
    """

    weights: Tensor
    nll: float
    path: tuple[float, ...]
    data: str = ""

    @property
    def members(self) -> tuple[int, ...]:
        """The candidates chosen."""
        return tuple(int(k) for k in self.weights.nonzero()[:, 0])

    def mixture(self, candidates: Sequence[Predictions]) -> Predictions:
        """The chosen mixture of the same candidates' predictions on other data; see `bayesdl.evaluation.mix`.

        It remembers what it was selected on: `compare` on those data warns.
        """
        about = {"method": "ensemble selection", "selected_on": self.data} if self.data else {}
        return mix(candidates, self.weights, meta={"about": about} if about else {})


def select_members(
    log_likelihoods: Any,
    *,
    rule: Rule = "greedy",
    max_members: int = 10,
    max_picks: int = 200,
    tolerance: float = 1e-9,
) -> Selection:
    """Choose members of an ensemble by the NLL of their mixture (Caruana et al. 2004; Egele et al. 2022).

    Weights chosen on some data flatter the mixture there: score it on others, `selection.mixture(test_predictions)`.
    A warning tells where "greedy" or "optimal" found no more than chance does on few examples (fewer than 100 for each
    member but one): the mixture's gain over the best candidate is below its standard error over examples, or below
    half a nat for each free weight.

    Args:
        log_likelihoods: (K, N), log p_k(y_n) of candidate k on validation example n, -inf is legal; or a list of
            labelled `Predictions`, one of each candidate on the same validation examples.
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
    given = log_likelihoods
    if isinstance(given, Sequence) and given and all(isinstance(one, Predictions) for one in given):
        check_candidates(given)
        table, data = torch.stack([-losses.nll(one) for one in given]), fingerprint(given[0])
    else:
        table, data = validation.wide(validation.tensor(given, "log_likelihoods")), ""
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
        return replace(_selected(table, counts, ()), data=data)
    if rule not in ("greedy", "optimal"):
        raise ArgumentError(f"rule={rule!r}: expected 'greedy', 'optimal' or 'top'")
    found = _optimal(table, 10 * picks, tolerance) if rule == "optimal" else _greedy(table, limit, picks, tolerance)
    _warn_of_chance(table, found)
    return replace(found, data=data)


def _warn_of_chance(table: Tensor, found: Selection) -> None:
    """A warning where the mixture's gain over the best candidate is what picking among so many gains by itself.

    A maximum-likelihood fit of k weights gains k / 2 nats in all on data that are no different (Wilks 1938).
    """
    best = table[int((-table.clamp_min(-IMPOSSIBLE)).mean(1).argmin())]
    if len(found.members) < 2 or bool(best.isinf().any()):
        return
    gains = (table + found.weights.log()[:, None]).logsumexp(0) - best
    n, gain, free = len(gains), float(gains.mean()), len(found.members) - 1
    error = float(gains.std()) / math.sqrt(n) if n > 1 else math.inf
    if n < FEW * free and gain < max(error, free / (2 * n)):
        warnings.warn(
            f"on {n} examples the mixture of {free + 1} members gains {gain:.2g} +- {error:.2g} nats over the best "
            "candidate alone, which chance explains; give more validation data, or use equal weights",
            stacklevel=3,
        )


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
