"""METRICS: every entry agrees with its pure function, accepts weights, and says why it has no value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.errors import UnknownNameError
from bayesdl.evaluation import calibration as cal
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation import decomposition as dec
from bayesdl.evaluation import dispersion, joint, ranking, selective
from bayesdl.evaluation import regression as reg
from bayesdl.evaluation.metrics import HEADLINE, METRICS, Metric, evaluate_metrics, metric_values, metrics_for
from bayesdl.evaluation.predictions import Predictions

TASKS = ("classification", "multilabel", "regression", "count")
KINDS = (*TASKS, "draws")


def predictions(task: str, n: int = 60) -> Predictions:
    """Three members with targets of the task."""
    generator = torch.Generator().manual_seed(1)
    f = torch.randn(3, n, 4, dtype=torch.float64, generator=generator)
    if task == "classification":
        return Predictions.from_logits(f, torch.randint(0, 4, (n,), generator=generator))
    if task == "multilabel":
        targets = torch.randint(0, 2, (n, 4), generator=generator)
        return Predictions(task="multilabel", log_probs=torch.nn.functional.logsigmoid(f), targets=targets)
    y = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    if task == "draws":
        return Predictions.from_samples(f, y)
    if task == "regression":
        return Predictions.from_gaussian(f, f.square() + 0.1, y)
    log_prob = -torch.rand(n, dtype=torch.float64, generator=generator)
    return Predictions(task="count", means=f, variances=f.square() + 0.1, targets=y.abs(), log_prob=log_prob)


def defined(found: Predictions) -> dict[str, Metric]:
    """The entries that have a value on these predictions."""
    return {
        name: metric
        for name, metric in metrics_for(found.task).items()
        if not metric_values(found, [name])[name].reason
    }


def test_entries_are_complete() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name and metric.label and metric.definition.endswith(".")
        assert "\n" not in metric.definition and set(metric.tasks) <= set(TASKS)
        assert (metric.target is not None) == (metric.direction == "target")
        assert (metric.interval == "calibration") == (metric.null is not None)
        assert not metric.proper or metric.direction == "min"
        assert metric.additive == (metric.interval == "bca")
    for task, names in HEADLINE.items():
        assert set(names) <= set(metrics_for(task))


@pytest.mark.parametrize("task", KINDS)
def test_weights_are_copies_for_every_metric(task: str) -> None:
    found = predictions(task)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randint(0, 4, (2, len(found)), generator=generator).double()
    for name, metric in defined(found).items():
        together = metric.fn(found, weights)
        assert isinstance(together, Tensor) and together.dtype == torch.float64, name
        for row, value in zip(weights, together, strict=True):
            copies = found.subset(torch.repeat_interleave(torch.arange(len(found)), row.long()))
            assert metric.fn(copies) == pytest.approx(float(value), abs=1e-11), name
            assert metric.fn(found, row) == pytest.approx(float(value), abs=1e-12), name


@pytest.mark.parametrize("task", KINDS)
def test_additive_metrics_are_means_of_their_losses(task: str) -> None:
    found = predictions(task)
    for name, metric in defined(found).items():
        assert isinstance(metric.fn(found), float), name
        if metric.losses is not None:
            losses = metric.losses(found)
            assert losses.shape == (len(found),) and losses.dtype == torch.float64, name
            mean = float(losses.mean())
            assert metric.fn(found) == pytest.approx(math.sqrt(mean) if metric.link == "sqrt" else mean), name


def test_classification_entries_are_the_pure_functions() -> None:
    found = predictions("classification")
    probs, targets, wrong = found.probs, found.labelled(), ~found.correct
    pure = {
        "nll": cls.nll(targets, probs=probs),
        "brier": cls.brier(targets, probs=probs),
        "accuracy": cls.accuracy(targets, probs=probs),
        "ece": cls.ece(targets, probs=probs),
        "mce": cls.mce(targets, probs=probs),
        "ece_l2": cls.ece_l2(targets, probs=probs),
        "ece_mass": cls.ece_mass(targets, probs=probs),
        "ece_unweighted": cls.ece_unweighted(targets, probs=probs),
        "classwise_ece": cls.classwise_ece(targets, probs=probs),
        "nll_zero_count": cls.nll_zero_count(targets, probs=probs),
        "error_auroc": cls.error_auroc(targets, probs=probs),
        "error_ap": ranking.average_precision(-found.confidence, wrong),
        "error_fpr95": ranking.fpr_at_recall(-found.confidence, wrong),
        "ace": cal.ace(targets, probs=probs),
        "tace": cal.tace(targets, probs=probs),
        "ce2_debiased": cal.ce2_debiased(targets, probs=probs),
        "smece": cal.smece(targets, probs=probs),
        "skce": cal.skce(targets, probs=probs),
        "calibration_p": cal.calibration_p(targets, probs=probs),
        "spiegelhalter_z": cal.spiegelhalter_z(targets, probs=probs),
        "joint_nll_10": joint.joint_nll(found, tau=10),
        "aurc": selective.aurc(found.confidence, wrong),
        "eaurc": selective.eaurc(found.confidence, wrong),
        "augrc": selective.augrc(found.confidence, wrong),
        "risk_at_coverage_80": selective.risk_at_coverage(found.confidence, wrong, coverage=0.8),
        "coverage_at_risk_5": selective.coverage_at_risk(found.confidence, wrong, risk=0.05),
        "disagreement": dec.disagreement(probs=found.log_probs.exp()),  # type: ignore[union-attr]
    }
    assert evaluate_metrics(found, list(metrics_for("classification"))) == pytest.approx(pure, rel=1e-12)


def test_regression_entries_are_the_pure_functions() -> None:
    found = predictions("regression")
    given = {"mean": found.means, "variance": found.variances}
    y = found.labelled()
    pure = {
        "nll": reg.nll(y, **given),
        "crps": reg.crps(y, **given),
        "rmse": reg.rmse(y, **given),
        "mae": reg.mae(y, **given),
        "sharpness": reg.sharpness(**given),
        "qce": reg.qce(y, **given),
        "miscal_area": dispersion.miscal_area(y, **given),
        "ence": dispersion.ence(y, **given),
        "uce": dispersion.uce(y, **given),
        "ause": dispersion.ause(y, **given),
        "pinball_10": reg.pinball(y, q=0.1, **given),
        "pinball_90": reg.pinball(y, q=0.9, **given),
        "joint_nll_10": joint.joint_nll(found, tau=10),
    }
    for percent in (50, 90, 95):
        pure[f"picp_{percent}"] = reg.picp(y, level=percent / 100, **given)
        pure[f"mpiw_{percent}"] = reg.mpiw(level=percent / 100, **given)
        pure[f"interval_score_{percent}"] = reg.interval_score(y, level=percent / 100, **given)
    assert set(metrics_for("regression")) - set(defined(found)) == {"energy_score"}
    assert evaluate_metrics(found, list(defined(found))) == pytest.approx(pure, rel=1e-12)
    drawn = set(metrics_for("regression")) - set(defined(predictions("draws")))
    assert drawn == {"nll", "joint_nll_10"}


def test_multilabel_by_hand() -> None:
    log_probs = torch.tensor([[[0.9, 0.2]]], dtype=torch.float64).log()
    found = evaluate_metrics(Predictions(task="multilabel", log_probs=log_probs, targets=torch.tensor([[1, 1]])))
    assert found["nll"] == pytest.approx(-math.log(0.9) - math.log(0.2))
    assert found["brier"] == pytest.approx((2 * 0.01 + 2 * 0.64) / 2)
    assert found["accuracy"] == 0.5


def test_the_predictives_own_density_wins() -> None:
    found = predictions("count")
    assert found.log_prob is not None
    assert evaluate_metrics(found, ["nll"])["nll"] == pytest.approx(-float(found.log_prob.mean()))


def test_gaps_have_reasons() -> None:
    right = Predictions.from_probs([[0.9, 0.1], [0.8, 0.2]], [0, 0])
    found = metric_values(right, ["accuracy", "error_auroc", "disagreement", "crps"])
    assert found["accuracy"].value == 1.0 and found["accuracy"].reason == ""
    reasons = {name: value.reason for name, value in found.items() if math.isnan(value.value)}
    assert reasons == {
        "error_auroc": "one class",
        "disagreement": "one member",
        "crps": "not defined for classification",
    }
    assert metric_values(right.without_targets(), ["nll"])["nll"].reason == "no targets"
    total = torch.ones(2, 1)
    bare = Predictions(
        task="count", means=total[None], targets=total, total=total, aleatoric=total, epistemic=0 * total
    )
    found = metric_values(bare, ["nll", "crps", "rmse"])
    assert (found["nll"].reason, found["crps"].reason, found["rmse"].value) == ("no log_prob", "no components", 0.0)
    with pytest.raises(UnknownNameError, match="'nonsense'"):
        evaluate_metrics(right, ["nonsense"])


def test_every_task_has_its_headline() -> None:
    for task in TASKS:
        found = evaluate_metrics(predictions(task))
        assert tuple(found) == HEADLINE[task]
        assert all(type(value) is float and math.isfinite(value) for value in found.values())
