"""Out-of-distribution detection: scores (higher is more OOD), and how well one separates two sets (OOD is positive)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from tqdm import tqdm

from bayesdl.errors import UnknownNameError
from bayesdl.evaluation import weighting
from bayesdl.evaluation.decomposition import votes_of
from bayesdl.evaluation.ranking import Counts, separated
from bayesdl.evaluation.validation import UndefinedError, vector, wide

if TYPE_CHECKING:
    from bayesdl.evaluation.predictions import Predictions

CLASSES = ("classification", "multilabel")
MOMENTS = ("regression", "count")


@final
@dataclass(frozen=True)
class Score:
    """An OOD score: ``read(predictions) -> (N,)``, the tasks it is defined for, its definition in one sentence.

    `needs` says what is missing where `read` gives None.
    """

    name: str
    tasks: tuple[str, ...]
    read: Callable[[Predictions], Tensor | None]
    definition: str
    needs: str = "raw outputs"


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("max_prob", ("classification",), lambda p: -p.confidence, "Minus the largest mean probability."),
        Score("entropy", CLASSES, lambda p: p.total, "Entropy of the mean probabilities, in nats (total uncertainty)."),
        Score("aleatoric", CLASSES, lambda p: p.aleatoric, "Mean entropy of the members, in nats."),
        Score("epistemic", CLASSES, lambda p: p.epistemic, "Mutual information of label and members, in nats."),
        Score(
            "max_logit",
            ("classification",),
            lambda p: p.max_logit,
            "Minus the largest raw output, averaged over members.",
        ),
        Score(
            "energy",
            ("classification",),
            lambda p: p.energy,
            "Minus logsumexp of the raw outputs, averaged over members.",
        ),
        Score(
            "variation_ratio",
            ("classification",),
            lambda p: _variation_ratio(p),
            "1 - the share of members that predict the most common class.",
            "members",
        ),
        Score(
            "variance",
            MOMENTS,
            lambda p: _latent_variance(p),
            "Mean over outputs of the variance of f, noise excluded.",
            "epistemic part",
        ),
    )
}
DEFAULT_SCORE = {"classification": "entropy", "multilabel": "entropy", "regression": "variance", "count": "variance"}


@final
@dataclass(frozen=True)
class OODMetric:
    """How well a score separates: ``read(counts) -> (R,)``; `flip` makes the in-distribution set the positive one."""

    name: str
    label: str
    direction: str
    unit: str
    definition: str
    read: Callable[[Counts], Tensor]
    flip: bool = False


OOD_METRICS: dict[str, OODMetric] = {
    metric.name: metric
    for metric in (
        OODMetric(
            "auroc", "AUROC", "max", "fraction",
            "Probability that an OOD example outscores an ID one, ties 1/2.", Counts.auroc
        ),
        OODMetric(
            "fpr95", "FPR95", "min", "fraction",
            "Share of ID flagged at the strictest threshold that flags at least 95 % of OOD.", lambda c: c.fpr(0.95),
        ),
        OODMetric(
            "ap_out", "AP out", "max", "fraction", "Step-sum average precision, OOD positive.", Counts.average_precision
        ),
        OODMetric(
            "ap_in", "AP in", "max", "fraction", "Step-sum average precision, ID positive, by minus the score.",
            Counts.average_precision, flip=True,
        ),
    )
}  # fmt: skip


@final
@dataclass(frozen=True)
class InputScore:
    """Any detector as a score of `compare(..., scores={"odin": InputScore(detector)})`.

    Args:
        function: ``function(x) -> (B,)`` for a batch of inputs as the loader gives them, higher is more OOD; a detector
            of pytorch-ood, or a function of one's own.
        inputs: picks the inputs out of a batch; None takes the first of a tuple or list, else the batch itself.
    """

    function: Callable[[Any], Any]
    inputs: Callable[[Any], Any] | None = None

    def scores(self, data: Iterable[Any], *, progress: bool = False) -> Tensor:
        """(N,) float64 for all batches of a loader; nothing is squashed or rescaled."""
        found = []
        for batch in tqdm(data, desc="scores", disable=not progress, leave=False):
            first = batch[0] if isinstance(batch, (tuple, list)) else batch
            values = self.function(first if self.inputs is None else self.inputs(batch))
            found.append(wide(vector(values, "scores of the detector")).cpu())
        if not found:
            raise UndefinedError("the loader gave no batch", "0 samples")
        return torch.cat(found)


def ood_score(predictions: Predictions, score: str | None = None) -> Tensor:
    """OOD score (N,) float64 of every example, higher is more OOD; default `DEFAULT_SCORE` of the task.

    Raises:
        UnknownNameError: no such score. UndefinedError: it is not defined for the task, or its input was not kept.
    """
    name = DEFAULT_SCORE[predictions.task] if score is None else score
    if name not in SCORES:
        raise UnknownNameError(f"score={name!r} is unknown; available: {', '.join(SCORES)}")
    entry = SCORES[name]
    if predictions.task not in entry.tasks:
        raise UndefinedError(
            f"score {name!r} is defined for {', '.join(entry.tasks)}, not for {predictions.task}",
            f"no {name} for {predictions.task}",
        )
    values = entry.read(predictions)
    if values is None:
        raise UndefinedError(
            f"score {name!r} needs {entry.needs}, which these predictions do not hold", f"no {entry.needs}"
        )
    return wide(values)


def ood_metrics(
    id_predictions: Predictions,
    ood_predictions: Predictions,
    score: str | None = None,
    *,
    id_weights: Any = None,
    ood_weights: Any = None,
) -> dict[str, float | Tensor]:
    """AUROC, FPR95, AP out and AP in of one score between an in-distribution and an OOD set.

    Args:
        score: a key of `SCORES`; None takes the default of the task.
        id_weights, ood_weights: (N,), or (R, N) resamples of either set, which makes every value a tensor (R,).

    Returns:
        Keys of `OOD_METRICS`.
    """
    return score_metrics(
        ood_score(id_predictions, score),
        ood_score(ood_predictions, score),
        id_weights=id_weights,
        ood_weights=ood_weights,
    )


def score_metrics(
    id_scores: Any, ood_scores: Any, *, id_weights: Any = None, ood_weights: Any = None
) -> dict[str, float | Tensor]:
    """As `ood_metrics` for two sets of scores (N,), (M,) from anywhere, which enter untransformed."""
    table, weights = separated(id_scores, ood_scores, id_weights, ood_weights)
    mirror = None
    result: dict[str, float | Tensor] = {}
    for name, metric in OOD_METRICS.items():
        if metric.flip and mirror is None:
            mirror = _mirrored(table)
        values = metric.read(mirror if metric.flip and mirror is not None else table)
        result[name] = weighting.defined(values, weights, f"{name}: all weight lies on one set", "one class")
    return result


def p_value(scores: Any, reference: Any) -> Tensor:
    """Conformal p-values (1 + #{s_i >= s}) / (n + 1) of scores (B,) against held-out in-distribution ones (n,).

    Flagging p <= alpha flags a share of at most alpha of exchangeable in-distribution inputs, whatever the score.
    """
    values, held = wide(vector(scores, "scores")), wide(vector(reference, "reference")).sort().values
    held = held.to(values.device)
    below = torch.searchsorted(held, values)
    return (1 + len(held) - below).double() / (len(held) + 1)


def auroc(id_scores: Any, ood_scores: Any, *, id_weights: Any = None, ood_weights: Any = None) -> float | Tensor:
    """Probability that an OOD score exceeds an ID score, ties 1/2; scores (N,), (M,) on any scale."""
    return score_metrics(id_scores, ood_scores, id_weights=id_weights, ood_weights=ood_weights)["auroc"]


def ap_out(id_scores: Any, ood_scores: Any, *, id_weights: Any = None, ood_weights: Any = None) -> float | Tensor:
    """Step-sum average precision with OOD positive."""
    return score_metrics(id_scores, ood_scores, id_weights=id_weights, ood_weights=ood_weights)["ap_out"]


def ap_in(id_scores: Any, ood_scores: Any, *, id_weights: Any = None, ood_weights: Any = None) -> float | Tensor:
    """Step-sum average precision with ID positive, ranked by minus the score."""
    return score_metrics(id_scores, ood_scores, id_weights=id_weights, ood_weights=ood_weights)["ap_in"]


def fpr95(id_scores: Any, ood_scores: Any, *, id_weights: Any = None, ood_weights: Any = None) -> float | Tensor:
    """Share of ID flagged at the strictest threshold that flags at least 95 % of OOD, no interpolation."""
    return score_metrics(id_scores, ood_scores, id_weights=id_weights, ood_weights=ood_weights)["fpr95"]


def aupr_out_trapezoid(id_scores: Any, ood_scores: Any) -> float:
    """Area under the precision-recall curve by trapezia, OOD positive: for parity with tables of OpenOOD alone.

    It joins operating points by lines that no threshold reaches; `ap_out` does not.
    """
    return _trapezoid(separated(id_scores, ood_scores)[0])


def aupr_in_trapezoid(id_scores: Any, ood_scores: Any) -> float:
    """As `aupr_out_trapezoid` with ID positive, ranked by minus the score."""
    return _trapezoid(_mirrored(separated(id_scores, ood_scores)[0]))


def _trapezoid(table: Counts) -> float:
    hits, alarms = table.positive[0], table.negative[0]
    recall, precision = hits / hits[-1], hits / (hits + alarms)
    # As in scikit-learn, the curve starts at recall 0 with precision 1.
    recall, precision = (
        torch.cat([start.new_tensor([value]), start]) for start, value in ((recall, 0.0), (precision, 1.0))
    )
    return float(torch.trapezoid(precision, recall))


def _mirrored(table: Counts) -> Counts:
    # Ranking by minus the score: what lies at or below each distinct score, from the lowest score up.
    def below(cumulative: Tensor) -> Tensor:
        steps = cumulative.diff(dim=1, prepend=cumulative.new_zeros(len(cumulative), 1))
        return steps.flip(1).cumsum(1)

    return Counts(below(table.negative), below(table.positive))


def _variation_ratio(predictions: Predictions) -> Tensor | None:
    if predictions.log_probs is None or predictions.num_members < 2:
        return None
    return 1 - votes_of(predictions.log_probs).amax(-1) / predictions.num_members


def _latent_variance(predictions: Predictions) -> Tensor | None:
    return None if predictions.epistemic is None else predictions.epistemic.mean(-1)
