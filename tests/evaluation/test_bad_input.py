"""The table of bad inputs, row by row, for every public function it applies to: an error that says what is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.evaluation import (
    METRICS,
    Predictions,
    ScoreHistogram,
    UndefinedError,
    dispersion,
    draws,
    evaluate_metrics,
    ood,
    ranking,
    regression,
    selective,
)
from bayesdl.evaluation import calibration as cal
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.brier_terms import brier_decomposition
from bayesdl.evaluation.compare import compare, evaluate

CLASSES: list[Callable[..., Any]] = [
    cls.nll, cls.brier, cls.accuracy, cls.ece, cls.mce, cls.ece_l2, cls.ece_mass, cls.ece_unweighted, cls.classwise_ece,
    cls.reliability, cls.nll_zero_count, cls.error_auroc, cal.ace, cal.tace, cal.ce2_debiased, cal.smece, cal.skce,
    cal.calibration_p, cal.spiegelhalter_z,
]  # fmt: skip
BINNED = [f for f in [*CLASSES, dispersion.ence, dispersion.uce] if "bins" in inspect.signature(f).parameters]
MOMENTS: list[Callable[..., Any]] = [
    regression.nll, regression.crps, regression.interval_score, regression.picp, regression.rmse, regression.mae,
    regression.qce, regression.pinball, regression.pit, dispersion.miscal_area, dispersion.ence, dispersion.uce,
    dispersion.ause,
]  # fmt: skip
P = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
Y = [0, 1, 1]
NAN, INF = float("nan"), float("inf")

# row of the table -> targets, forecast, error, what the message says
ROWS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "NaN probability": (Y, {"probs": [[NAN, 0.5, 0.5], *P[1:]]}, ValueError, r"NaN or infinite.*\(0, 0\)"),
    "infinite logit": (Y, {"logits": [[INF, 0.5, 0.5], *P[1:]]}, ValueError, r"NaN or infinite.*\(0, 0\)"),
    "negative probability": (Y, {"probs": [P[0], [-0.1, 0.9, 0.2], P[2]]}, ValueError, "use logits="),
    "probability above 1": (Y, {"probs": [P[0], [1.1, 0.0, -0.1], P[2]]}, ValueError, "use logits="),
    "rows that do not sum to 1": (Y, {"probs": [P[0], [0.5, 0.5, 0.5], P[2]]}, ValueError, "use logits="),
    "logits as probabilities": (Y, {"probs": [[2.0, -1.0, 0.3], *P[1:]]}, ValueError, "use logits="),
    "both forecasts": (Y, {"probs": P, "logits": P}, TypeError, "probs.*logits"),
    "no forecast": (Y, {}, TypeError, "probs.*logits"),
    "label -1": ([0, -1, 1], {"probs": P}, ValueError, r"\[0, 2\].*-1 at index 1"),
    "label C": ([0, 1, 3], {"probs": P}, ValueError, r"\[0, 2\].*3 at index 2"),
    "fractional labels": ([0.0, 0.5, 1.0], {"probs": P}, ValueError, "integers"),
    "labels of floating dtype": ([0.0, 1.0, 1.0], {"probs": P}, ValueError, "cast=True"),
    "boolean labels of three classes": ([True, False, True], {"probs": P}, ValueError, "boolean"),
    "other length": ([0, 1], {"probs": P}, ValueError, r"\(2,\).*\(3,\)"),
    "column of labels": ([[0], [1], [1]], {"probs": P}, ValueError, "nothing is broadcast"),
    "four axes": (Y, {"probs": [[P]]}, ValueError, "expected"),
    "empty": ([], {"probs": np.zeros((0, 3))}, ValueError, "empty"),
    "text": (Y, {"probs": [["a", "b", "c"]] * 3}, ValueError, "numbers"),
    "objects": (Y, {"probs": [object()] * 3}, ValueError, "numbers"),
}


@pytest.mark.parametrize("row", ROWS)
def test_forecasts_of_classes(row: str) -> None:
    targets, forecast, error, message = ROWS[row]
    for function in CLASSES:
        with pytest.raises(error, match=message):
            function(targets, **forecast)
    if set(forecast) == {"probs"} and "objects" not in row:
        with pytest.raises(ValueError, match=message):
            brier_decomposition(targets, probs=forecast["probs"])
        with pytest.raises(ValueError, match=message):
            Predictions.from_probs(forecast["probs"], targets)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 1.0], "negative"),
        ([0.0, 0.0, 0.0], "zero"),
        ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], "zero"),
        ([1.0, 1.0], r"\(3,\)"),
        ([NAN, 1.0, 1.0], "NaN"),
        ([INF, 1.0, 1.0], "NaN or infinite"),
        ([[[1.0]]], "expected"),
    ],
)
def test_weights_of_everything(weights: list[Any], message: str) -> None:
    y, mean = [0.0, 1.0, 2.0], [0.5, 0.5, 0.5]
    calls: list[Callable[[], Any]] = []
    for function in CLASSES:
        if "weights" in inspect.signature(function).parameters:
            calls.append(lambda f=function: f(Y, probs=P, weights=weights))
    for function in MOMENTS:
        if "weights" in inspect.signature(function).parameters:
            calls.append(lambda f=function: f(y, mean=mean, variance=[1.0, 2.0, 3.0], weights=weights))
    for function in (selective.aurc, selective.eaurc, selective.augrc, ranking.auroc, ranking.average_precision):
        calls.append(lambda f=function: f([0.1, 0.5, 0.9], [0, 1, 1], weights=weights))
    calls.append(lambda: draws.crps_samples(y, [mean, y], weights=weights))
    calls.append(lambda: draws.energy_score(y, [mean, y], weights=weights))
    found = Predictions.from_probs(P, Y)
    calls += [lambda m=METRICS[name]: m.fn(found, weights) for name in ("nll", "ece", "aurc", "ace", "error_auroc")]
    assert len(calls) > 30
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bins", [0, -3, 2.5, "15", True, None])
def test_numbers_of_bins(bins: object) -> None:
    assert len(BINNED) >= 8
    for function in BINNED:
        with pytest.raises(ValueError, match="bins="):
            if function in CLASSES:
                function(Y, probs=P, bins=bins)
            else:
                function([0.0, 1.0], mean=[0.0, 0.0], variance=[1.0, 1.0], bins=bins)


def test_numpy_integers_are_numbers_of_bins() -> None:
    for function in BINNED:
        if function in CLASSES:
            function(Y, probs=P, bins=np.int32(4))


# row of the table -> targets, mean, variance, what the message says
GAUSSIAN: dict[str, tuple[Any, Any, Any, str]] = {
    "NaN mean": ([0.0, 1.0], [NAN, 0.0], [1.0, 1.0], "mean.*NaN"),
    "infinite variance": ([0.0, 1.0], [0.0, 0.0], [INF, 1.0], "variance.*NaN or infinite"),
    "NaN target": ([NAN, 1.0], [0.0, 0.0], [1.0, 1.0], "targets.*NaN"),
    "variance 0": ([0.0, 1.0], [0.0, 0.0], [1.0, 0.0], r"not positive.*\(1,\)"),
    "negative variance": ([0.0, 1.0], [0.0, 0.0], [-1.0, 1.0], r"not positive.*\(0,\)"),
    "column of targets": ([[0.0], [1.0]], [0.0, 0.0], [1.0, 1.0], "nothing is broadcast"),
    "column of means": ([0.0, 1.0], [[0.0], [0.0]], [[1.0], [1.0]], "nothing is broadcast"),
    "other length": ([0.0, 1.0, 2.0], [0.0, 0.0], [1.0, 1.0], "nothing is broadcast"),
    "mean and variance apart": ([0.0, 1.0], [0.0, 0.0], [1.0], "both must be equal"),
    "empty": ([], [], [], "empty"),
}


@pytest.mark.parametrize("row", GAUSSIAN)
def test_gaussian_forecasts(row: str) -> None:
    targets, mean, variance, message = GAUSSIAN[row]
    for function in MOMENTS:
        with pytest.raises(ValueError, match=message):
            function(targets, mean=mean, variance=variance)
    with pytest.raises(ValueError, match="."):
        Predictions.from_gaussian(mean, variance, targets)


def test_one_class_only_and_any_scale() -> None:
    scores = [30.0, 50.0, 40.0]
    for function in (ranking.auroc, ranking.average_precision, ranking.fpr_at_recall):
        for labels in ([0, 0, 0], [1, 1, 1]):
            with pytest.raises(UndefinedError, match="both classes"):
                function(scores, labels)
        # Distances and energies need no squashing: the same as on any increasing map of them.
        assert function(scores, [0, 1, 0]) == function([1e-9, 1e9, 2.0], [0, 1, 0])
    right = Predictions.from_probs(P, [0, 1, 2])
    for name in ("error_auroc", "error_ap", "error_fpr95"):
        assert np.isnan(evaluate_metrics(right, (name,))[name])
    with pytest.raises(UndefinedError):
        histogram = ScoreHistogram()
        histogram.update(scores, True)
        histogram.compute()


def test_scores_that_are_no_vectors() -> None:
    for bad, message in (([[0.1], [0.2]], "expected 1-D"), ([], "empty"), ([NAN, 1.0], "NaN"), ([1.0, INF], "NaN or")):
        for call in (
            lambda b: ood.score_metrics(b, [0.1, 0.2]),
            lambda b: ood.score_metrics([0.1, 0.2], b),
            lambda b: selective.aurc(b, [0, 1]),
            lambda b: ood.p_value(b, [0.1]),
        ):
            with pytest.raises(ValueError, match=message):
                call(bad)


def test_half_precision_is_promoted_and_arrays_are_equal_to_tensors() -> None:
    probs = torch.tensor(P)
    for function in (cls.nll, cls.brier, cls.ece, cls.mce, cal.ace, cal.smece):
        half = function(Y, probs=torch.tensor([[0.5, 0.25, 0.25]] * 3, dtype=torch.float16))
        assert half == function(Y, probs=torch.tensor([[0.5, 0.25, 0.25]] * 3))
        assert function(Y, probs=probs.numpy()) == function(torch.tensor(Y), probs=probs)
    # A slice that holds two of three classes is fine: C comes from the array.
    assert 0 <= cls.ece([0, 1], probs=P[:2]) <= 1


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (np.ma.masked_array(np.zeros((3, 3)), mask=np.eye(3, dtype=bool)), "3 values are masked"),
        (torch.zeros(3, 3).to_sparse(), "dense tensor"),
        (torch.zeros(3, 3, device="meta"), "dense tensor"),
        (np.zeros((3, 3), dtype=complex), "numbers, got ndarray of dtype complex128"),
        (np.full((3, 3), "a"), "numbers, got ndarray of dtype <U1"),
    ],
)
def test_arrays_that_hold_no_numbers_to_rely_on(logits: Any, words: str) -> None:
    """A mask that is dropped would score what somebody had struck out."""
    with pytest.raises(ArgumentError, match=words):
        Predictions.from_logits(logits, Y)
    with pytest.raises(ArgumentError, match=words):
        cls.nll(Y, logits=logits)


def test_a_mask_without_marks_and_eight_bits_are_numbers() -> None:
    values = np.array([[4.0, 2.0, 1.0], [0.5, 3.0, 0.25], [1.0, 1.5, 2.0]])  # exact in four bits of mantissa
    expected = evaluate_metrics(Predictions.from_logits(values.astype(np.float32), Y))
    for same in (np.ma.masked_array(values.astype(np.float32)), torch.tensor(values).to(torch.float8_e4m3fn)):
        assert evaluate_metrics(Predictions.from_logits(same, Y)) == expected


def test_names_of_metrics_and_rows() -> None:
    found = Predictions.from_probs(P, Y)
    for evaluating in (evaluate_metrics, lambda p, metrics: compare({"a": p}, metrics=metrics, progress=False)):
        with pytest.raises(ArgumentError, match=r"such as \['nll'\], got a string"):
            evaluating(found, "nll")
    for rows, words in (
        ({"": found}, "name of its own, got ''"),
        ({1: found, "1": found}, "got 1, '1'"),
        ({}, "an empty one"),
        ([found], "got list"),
    ):
        with pytest.raises(ArgumentError, match=words):
            compare(rows, progress=False)  # type: ignore[arg-type]
    assert repr(found) == "Predictions(classification, 3 examples, 3 outputs, labelled)"


def test_a_key_that_means_nothing_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", probs=P, targets=Y, tragets=Y)
    with pytest.raises(FileFormatError, match="unknown keys tragets"):
        Predictions.load(tmp_path / "a.npz")


@pytest.mark.parametrize("fault", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["logits", "probs", "mean", "variance", "samples", "targets"])
def test_what_is_not_finite_is_refused_unless_it_may_be_dropped(name: str, fault: float, tmp_path: Path) -> None:
    whole = {
        "logits": {"logits": np.log(P), "targets": Y},
        "probs": {"probs": P, "targets": Y},
        "samples": {"samples": [[0.0, 1.0, 2.0], [1.0, 1.5, 0.0]], "targets": [0.5, 1.0, 0.0]},
    }.get(name, {"mean": [0.0, 1.0, 2.0], "variance": [1.0, 2.0, 3.0], "targets": [0.5, 1.0, 0.0]})
    arrays = {key: np.array(value) for key, value in whole.items()}
    left = {key: value[:, :2] if key == "samples" else value[:2] for key, value in arrays.items()}
    np.savez(tmp_path / "left.npz", **left)
    arrays[name][..., -1] = fault if arrays[name].ndim == 1 else arrays[name][..., -1]
    if arrays[name].ndim > 1:
        arrays[name][-1, -1] = fault
    np.savez(tmp_path / "faulty.npz", **arrays)
    with pytest.raises(FileFormatError, match=r"NaN|infinite"):
        evaluate(tmp_path / "faulty.npz")
    found = evaluate(tmp_path / "faulty.npz", nan="drop")
    expected = {**evaluate(tmp_path / "left.npz"), "dropped": 1.0}
    np.testing.assert_equal(found, expected)
