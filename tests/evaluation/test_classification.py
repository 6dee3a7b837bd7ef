"""Classification metrics: worked examples, other libraries, invariances, and inputs on which others fail."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import Tensor

from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.validation import UndefinedError

A_PROBS = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [1, 0, 0]]
A_TARGETS = [0, 1, 1, 2, 0]
B_PROBS, B_TARGETS = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
BINNED = [cls.ece, cls.mce, cls.ece_l2, cls.ece_unweighted, cls.ece_mass, cls.classwise_ece]
DTYPES = [torch.float32, torch.float64]
repeatable = settings(derandomize=True, deadline=None, max_examples=40)


def draw(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random probabilities and labels that are right about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, classes, dtype=torch.float64, generator=generator)).softmax(1)
    drawn = torch.multinomial(probs, 1, generator=generator)[:, 0]
    other = torch.randint(classes, (n,), generator=generator)
    return probs, torch.where(torch.rand(n, generator=generator) < 0.8, drawn, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (lambda p: cls.ece(A_TARGETS, probs=p, bins=5), 0.22),
        (lambda p: cls.mce(A_TARGETS, probs=p, bins=5), 0.6),
        (lambda p: cls.ece_l2(A_TARGETS, probs=p, bins=5), 0.291548),
        (lambda p: cls.ece_unweighted(A_TARGETS, probs=p, bins=5), 0.283333),
        (lambda p: cls.classwise_ece(A_TARGETS, probs=p, bins=5), 0.133333),
        (lambda p: cls.ece(A_TARGETS, probs=p, bins=5, kind="classwise"), 0.133333),
        (lambda p: cls.ece_mass(A_TARGETS, probs=p, bins=5), 0.34),
        (lambda p: cls.nll(A_TARGETS, probs=p), 0.540016),
        (lambda p: cls.brier(A_TARGETS, probs=p), 0.32),
        (lambda p: cls.accuracy(A_TARGETS, probs=p), 0.8),
    ],
)
def test_values_on_bin_edges_are_the_same_in_both_precisions(
    metric: Callable[[Tensor], float], value: float, dtype: torch.dtype
) -> None:
    assert metric(torch.tensor(A_PROBS, dtype=dtype)) == pytest.approx(value, abs=1e-6)


def test_a_confidence_of_one_shares_the_last_bin() -> None:
    probs = [[0.9, 0.1], [1.0, 0.0], [0.9, 0.1]]
    assert cls.ece([0, 1, 0], probs=probs, bins=5) == pytest.approx(0.266667, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_forecasts_as_one_column_and_as_two(dtype: torch.dtype) -> None:
    column = torch.tensor(B_PROBS, dtype=dtype)
    pair = torch.stack([1 - column, column], 1)
    assert cls.brier(B_TARGETS, probs=column) == pytest.approx(0.158125)
    assert cls.brier(B_TARGETS, probs=pair) == pytest.approx(0.31625)
    for probs in (column, pair):
        assert cls.ece(B_TARGETS, probs=probs, bins=5, kind="positive") == pytest.approx(0.3375)
        assert cls.ece(B_TARGETS, probs=probs, bins=5) == pytest.approx(0.1375)
        assert cls.nll(B_TARGETS, probs=probs) == pytest.approx(-np.log([0.9, 0.6, 0.35, 0.8]).mean(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_impossible_event_costs_infinity_in_every_precision(dtype: torch.dtype) -> None:
    probs = torch.eye(3, dtype=dtype)
    assert cls.nll([0, 1, 0], probs=probs) == math.inf
    assert cls.nll_zero_count([0, 1, 0], probs=probs) == 1
    assert cls.nll([0, 1, 0], probs=probs, floor=1e-6) == pytest.approx(-math.log(1e-6) / 3)
    assert cls.nll([0, 1, 0], probs=probs, weights=[1.0, 1.0, 0.0]) == 0.0


@pytest.mark.parametrize("n", [100_000, 1_000_000, 5_000_000])
def test_no_drift_with_the_number_of_examples(n: int) -> None:
    confidence = torch.full((n,), 0.953)
    hits = torch.zeros(n, dtype=torch.int64)
    hits[: n * 953 // 1000] = 1
    assert cls.ece(hits, probs=confidence, kind="positive") < 1e-7


@pytest.mark.slow
def test_twenty_million_forecasts_do_not_saturate_a_sum() -> None:
    n = 20_000_000
    hits = torch.zeros(n, dtype=torch.int64)
    hits[: n * 9 // 10] = 1
    assert cls.ece(hits, probs=torch.full((n,), 0.953), kind="positive") == pytest.approx(0.053, abs=1e-6)


@pytest.mark.parametrize("metric", [*BINNED, cls.nll, cls.brier, cls.accuracy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_and_nothing_else(metric: Callable[..., float], dtype: torch.dtype) -> None:
    logits = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = torch.randint(6, (500,), generator=torch.Generator().manual_seed(2))
    value = metric(targets, logits=logits)
    assert value == metric(targets, logits=logits.float())
    assert 0 < value < math.inf


@pytest.mark.parametrize("metric", BINNED)
def test_a_slice_with_two_of_three_classes_is_fine(metric: Callable[..., float]) -> None:
    probs, _ = draw(50, 3, 0)
    assert 0 <= metric(torch.arange(50) % 2, probs=probs) <= 1


@pytest.mark.parametrize("metric", BINNED)
def test_certain_forecasts_and_ties_have_a_bin(metric: Callable[..., float]) -> None:
    probs, targets = draw(200, 4, 3)
    probs[:60] = torch.eye(4, dtype=torch.float64)[targets[:60]]
    assert 0 < metric(targets, probs=probs, bins=np.int64(15)) < 1


@pytest.mark.parametrize("metric", BINNED)
def test_tied_scores_do_not_depend_on_their_order(metric: Callable[..., float]) -> None:
    probs, targets = draw(300, 3, 4)
    probs = torch.round(probs * 4) / 4 + 1e-3
    probs = probs / probs.sum(1, keepdim=True)
    order = targets.argsort()
    assert metric(targets[order], probs=probs[order]) == pytest.approx(metric(targets, probs=probs), abs=1e-14)


def test_logits_in_the_unit_interval_are_still_logits() -> None:
    logits = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(20, dtype=torch.int64)
    assert cls.nll(targets, logits=logits) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.double(), targets)), rel=1e-12
    )
    with pytest.raises(ValueError, match="use logits="):
        cls.nll(targets, probs=logits)


def test_members_are_averaged_as_probabilities() -> None:
    logits = torch.randn(5, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40) % 3
    mean = logits.softmax(-1).mean(0)
    for metric in (cls.nll, cls.brier, cls.accuracy, cls.ece):
        assert metric(targets, logits=logits) == pytest.approx(metric(targets, probs=mean), rel=1e-12)
        assert metric(targets, probs=logits.softmax(-1)) == pytest.approx(metric(targets, probs=mean), rel=1e-12)


def test_the_lowest_index_wins_a_tie() -> None:
    assert cls.accuracy([0, 0, 0], probs=[[0.5, 0.5], [0.5, 0.5], [0.4, 0.6]]) == pytest.approx(2 / 3)
    assert cls.accuracy([0], probs=[0.5]) == 1.0


def test_against_scikit_learn() -> None:
    probs, targets = draw(400, 4, 5)
    assert cls.nll(targets, probs=probs) == pytest.approx(log_loss(targets, probs, labels=range(4)), rel=1e-12)
    p, y = probs[:, 0], (targets == 0).long()
    assert cls.brier(y, probs=p) == pytest.approx(brier_score_loss(y, p), rel=1e-12)
    wrong = (probs.argmax(1) != targets).numpy()
    expected = roc_auc_score(wrong, 1 - probs.amax(1).numpy())
    assert cls.error_auroc(targets, probs=probs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.peer
def test_against_netcal() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("netcal.metrics")
        probs, targets = draw(2000, 5, 6)
        away = ((probs.amax(1) * 15 - (probs.amax(1) * 15).round()).abs() > 1.5e-4).numpy()
        p, y = probs.numpy()[away], targets.numpy()[away]
        assert cls.ece(y, probs=p) == pytest.approx(float(peer.ECE(15).measure(p, y)), abs=1e-9)
        assert cls.mce(y, probs=p) == pytest.approx(float(peer.MCE(15).measure(p, y)), abs=1e-9)
        assert cls.ece_unweighted(y, probs=p) == pytest.approx(float(peer.ACE(15).measure(p, y)), abs=1e-9)


@repeatable
@given(st.integers(1, 200), st.integers(2, 5), st.integers(1, 20), st.integers(0, 10_000))
def test_bounds_and_order_of_the_calibration_errors(n: int, classes: int, bins: int, seed: int) -> None:
    probs, targets = draw(n, classes, seed)
    values = {metric.__name__: metric(targets, probs=probs, bins=bins) for metric in BINNED}
    assert all(0 <= value <= 1 for value in values.values())
    assert values["ece"] <= values["ece_l2"] + 1e-12 <= values["mce"] + 2e-12
    assert cls.ece(targets, probs=probs, bins=2 * bins) >= values["ece"] - 1e-12


@repeatable
@given(st.integers(2, 120), st.integers(2, 4), st.integers(0, 10_000))
def test_permutation_and_integer_weights(n: int, classes: int, seed: int) -> None:
    probs, targets = draw(n, classes, seed)
    probs = torch.where(torch.arange(n)[:, None] % 3 == 0, probs[:1], probs)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 4, (3, n), generator=generator)
    weights[:, 0] = 1
    order = torch.randperm(n, generator=generator)
    for metric in (*BINNED, cls.nll, cls.brier, cls.accuracy, cls.nll_zero_count):
        value = metric(targets, probs=probs)
        assert metric(targets[order], probs=probs[order]) == pytest.approx(value, abs=1e-12)
        together = metric(targets, probs=probs, weights=weights)
        assert isinstance(together, Tensor) and together.dtype == torch.float64 and together.shape == (3,)
        for row, found in zip(weights, together, strict=True):
            copies = torch.repeat_interleave(torch.arange(n), row)
            assert metric(targets[copies], probs=probs[copies]) == pytest.approx(float(found), abs=1e-12)
            assert metric(targets, probs=probs, weights=row) == pytest.approx(float(found), abs=1e-12)


def test_single_and_double_precision_agree() -> None:
    logits = torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(1000) % 5
    for metric in (cls.nll, cls.brier, cls.ece, cls.classwise_ece, cls.error_auroc):
        assert metric(targets, logits=logits.float()) == pytest.approx(metric(targets, logits=logits), abs=1e-5)


@pytest.mark.parametrize("metric", [cls.nll, cls.brier])
def test_the_true_law_has_the_lowest_expected_score(metric: Callable[..., float]) -> None:
    truth, targets = torch.tensor([0.6, 0.3, 0.1]), torch.arange(3)
    best = metric(targets, probs=truth.expand(3, 3), weights=truth)
    for other in ([0.7, 0.2, 0.1], [0.55, 0.35, 0.1], [0.6, 0.25, 0.15]):
        assert metric(targets, probs=torch.tensor(other).expand(3, 3), weights=truth) > best


def test_per_example_losses_average_to_the_metric() -> None:
    probs, targets = draw(30, 3, 1)
    for metric in (cls.nll, cls.brier, cls.accuracy):
        losses = metric(targets, probs=probs, per_example=True)
        assert losses.shape == (30,)
        assert float(losses.mean()) == pytest.approx(metric(targets, probs=probs), rel=1e-14)


def test_error_auroc_is_undefined_without_an_error_and_takes_any_score() -> None:
    with pytest.raises(UndefinedError, match="both classes") as caught:
        cls.error_auroc([0, 1], probs=[[0.9, 0.1], [0.2, 0.8]])
    assert caught.value.reason == "one class"
    probs = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]
    assert cls.error_auroc([0, 1, 0], probs=probs, score=[5.0, 40.0, 6.0]) == 1.0


class TestReliability:
    def test_counts_means_and_rates_by_hand(self) -> None:
        found = cls.reliability(A_TARGETS, probs=A_PROBS, bins=5, generator=torch.Generator().manual_seed(0))
        assert found.edges.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
        assert found.count.tolist() == [0, 0, 1, 2, 2]
        assert found.confidence[2:].tolist() == pytest.approx([0.4, 0.65, 0.9])
        assert found.accuracy[2:].tolist() == pytest.approx([1.0, 0.5, 1.0])
        assert found.low[:2].isnan().all() and found.accuracy[:2].isnan().all()

    def test_the_band_is_the_binomial_range(self) -> None:
        # One bin of n equal forecasts: redrawn accuracy is Binomial(n, p) / n, its 2.5 % and 97.5 % points +-1.96 sd.
        n, p = 2000, 0.7
        found = cls.reliability(
            torch.zeros(n, dtype=torch.int64), probs=torch.full((n,), p), bins=1, kind="positive", draws=4000
        )
        spread = 1.96 * math.sqrt(p * (1 - p) / n)
        assert float(found.low[0]) == pytest.approx(p - spread, abs=0.1 * spread)
        assert float(found.high[0]) == pytest.approx(p + spread, abs=0.1 * spread)
        assert float(found.accuracy[0]) == 0

    def test_same_seed_same_band_and_equal_mass_bins_are_even(self) -> None:
        probs, targets = draw(600, 4, 2)
        first, second = (
            cls.reliability(targets, probs=probs, bins=6, mass=True, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert torch.equal(first.low, second.low) and torch.equal(first.high, second.high)
        assert first.count.tolist() == [100] * 6
        assert bool((first.edges.diff() > 0).all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probs": [[0.5, 0.5]], "logits": [[0.0, 0.0]]}, TypeError, "exactly one of probs= and logits="),
        ({}, TypeError, "got none"),
        ({"probs": [[0.5, 0.6]]}, ValueError, "use logits="),
        ({"probs": [[1.5, -0.5]]}, ValueError, r"outside \[0, 1\]"),
        ({"probs": [[math.nan, 0.5]]}, ValueError, r"index \(0, 0\)"),
        ({"logits": [[math.inf, 0.5]]}, ValueError, "infinite"),
        ({"probs": [[1.0]]}, ValueError, "one column"),
        ({"probs": [[0.5, 0.5], [0.5, 0.5]]}, ValueError, "nothing is broadcast"),
        ({"probs": np.zeros((0, 3))}, ValueError, "at least one example"),
        ({"probs": [["a", "b"]]}, ValueError, "nested lists of numbers"),
    ],
)
def test_bad_forecasts(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls.ece([0], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([-1], r"the first is -1 at index 0"),
        ([3], r"\[0, 2\]"),
        ([1.0], "float"),
        ([[1]], r"\(1, 1\)"),
        ([True], "boolean"),
    ],
)
def test_bad_labels(targets: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.nll(targets, probs=[[0.2, 0.3, 0.5]])


@pytest.mark.parametrize("bins", [0, -1, 1.5, True, "15"])
def test_bad_bins(bins: object) -> None:
    with pytest.raises(ValueError, match="bins="):
        cls.ece([0], probs=[[0.5, 0.5]], bins=bins)  # type: ignore[arg-type]


def test_labels_one_and_two_are_not_guessed_to_be_binary() -> None:
    with pytest.raises(ValueError, match="the first is 2"):
        cls.ece([1, 2], probs=[0.3, 0.6], kind="positive")
    with pytest.raises(ValueError, match="two classes"):
        cls.ece([1, 2], probs=[[0.3, 0.6, 0.1]] * 2, kind="positive")
    with pytest.raises(ValueError, match="kind="):
        cls.ece([1, 2], probs=[[0.3, 0.6, 0.1]] * 2, kind="guess")  # type: ignore[arg-type]
