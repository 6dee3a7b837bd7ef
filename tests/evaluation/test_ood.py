"""OOD scores read from predictions, and how two sets are separated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import average_precision_score, roc_auc_score

from bayesdl.errors import UnknownNameError
from bayesdl.evaluation import ood
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.validation import UndefinedError

F_INSIDE, F_OUTSIDE = [-0.9, -0.8, -0.7, -0.4], [-0.6, -0.5, -0.3, -0.2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_example(dtype: torch.dtype) -> None:
    inside, outside = torch.tensor(F_INSIDE, dtype=dtype), torch.tensor(F_OUTSIDE, dtype=dtype)
    found = ood.score_metrics(inside, outside)
    assert found == pytest.approx({"auroc": 0.875, "fpr95": 0.25, "ap_out": 0.8875, "ap_in": 0.916667}, abs=1e-6)
    assert ood.auroc(inside, outside) == 0.875
    assert ood.fpr95(inside, outside) == 0.25
    assert ood.ap_out(inside, outside) == pytest.approx(0.8875)
    assert ood.ap_in(inside, outside) == pytest.approx(0.916667, abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10_000))
def test_against_scikit_learn_with_ties_and_weights(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside = (3 * torch.randn(n, generator=generator)).round()
    outside = (3 * torch.randn(m, generator=generator) + 2).round()
    scores, labels = torch.cat([inside, outside]).numpy(), [0] * n + [1] * m
    found = ood.score_metrics(inside, outside)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["ap_out"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found["ap_in"] == pytest.approx(average_precision_score([1 - y for y in labels], -scores), abs=1e-12)
    left, right = torch.randint(0, 3, (2, n), generator=generator), torch.randint(0, 3, (2, m), generator=generator)
    left[:, 0] = right[:, 0] = 1
    together = ood.score_metrics(inside, outside, id_weights=left, ood_weights=right)
    for i in range(2):
        copied = ood.score_metrics(inside.repeat_interleave(left[i]), outside.repeat_interleave(right[i]))
        assert {name: float(value[i]) for name, value in together.items()} == pytest.approx(copied, abs=1e-12)
        one = ood.score_metrics(inside, outside, id_weights=left[i], ood_weights=right)
        assert float(one["auroc"][i]) == pytest.approx(copied["auroc"], abs=1e-12)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]]], dtype=torch.float64)
    found = Predictions.from_logits(logits)
    e = math.exp(2) / (math.exp(2) + 2)
    assert ood.ood_score(found, "max_prob").tolist() == pytest.approx([-(e + (1 - e) / 2) / 2, -1 / 3])
    assert ood.ood_score(found, "max_logit").tolist() == pytest.approx([-2.0, -0.5])
    energy = -math.log(math.exp(2) + 2), -(math.log(3) + 1 + math.log(3)) / 2
    assert ood.ood_score(found, "energy").tolist() == pytest.approx(energy)
    aleatoric = -(e * math.log(e) + (1 - e) * math.log((1 - e) / 2))
    assert ood.ood_score(found, "aleatoric").tolist() == pytest.approx([aleatoric, math.log(3)])
    assert ood.ood_score(found).tolist() == ood.ood_score(found, "entropy").tolist()
    assert float(ood.ood_score(found, "epistemic")[0]) > 0.1
    assert float(ood.ood_score(found, "epistemic")[1]) == pytest.approx(0, abs=1e-12)


def test_variance_leaves_the_noise_out() -> None:
    mean = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]])
    found = Predictions.from_gaussian(mean, torch.full_like(mean, 9.0))
    assert ood.ood_score(found).tolist() == [(1.0 + 4.0) / 2]


def test_predictions_of_two_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = Predictions.from_logits(5 * torch.randn(300, 4, generator=generator))
    outside = Predictions.from_logits(torch.randn(200, 4, generator=generator))
    for score in ("entropy", "max_prob", "energy", "max_logit"):
        found = ood.ood_metrics(inside, outside, score)
        assert set(found) == set(ood.OOD_METRICS)
        back = ood.ood_metrics(outside, inside, score)
        assert found["auroc"] == pytest.approx(1 - back["auroc"])
        assert found["auroc"] > 0.8


def test_what_is_undefined_says_why() -> None:
    from_probs = Predictions.from_probs([[0.5, 0.5]])
    with pytest.raises(UndefinedError) as caught:
        ood.ood_score(from_probs, "energy")
    assert caught.value.reason == "no raw outputs"
    with pytest.raises(UndefinedError, match="not for classification"):
        ood.ood_score(from_probs, "variance")
    with pytest.raises(UnknownNameError, match="available: max_prob"):
        ood.ood_score(from_probs, "nothing")
    with pytest.raises(ValueError, match="same number"):
        ood.score_metrics([0.0, 1.0], [2.0], id_weights=torch.ones(2, 2), ood_weights=torch.ones(3, 1))
    with pytest.raises(UndefinedError):
        ood.score_metrics([], [1.0])


def test_trapezia_of_the_fixed_example_and_of_scikit_learn() -> None:
    # Example F in confidences; the scores are their negatives.
    inside, outside = (-torch.tensor(c, dtype=torch.float64) for c in ([0.9, 0.8, 0.7, 0.4], [0.6, 0.5, 0.3, 0.2]))
    assert ood.aupr_out_trapezoid(inside, outside) == pytest.approx(0.870833, abs=1e-6)
    assert ood.aupr_in_trapezoid(inside, outside) == pytest.approx(0.908333, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 60, generator=generator).round(decimals=1)
    labels = [0] * 60 + [1] * 60
    scores = torch.cat([first, second]).numpy()
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    assert ood.aupr_out_trapezoid(first, second) == pytest.approx(sklearn_metrics.auc(recall, precision))


def test_any_detector_is_a_score_of_inputs() -> None:
    loader = [(torch.full((3, 2), float(i)), torch.zeros(3)) for i in range(2)]
    assert ood.InputScore(lambda x: x.sum(1)).scores(loader).tolist() == [0.0] * 3 + [2.0] * 3
    named = [{"pixels": torch.ones(2, 1)}]
    assert ood.InputScore(lambda x: 5 * x[:, 0], lambda b: b["pixels"]).scores(named).tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="NaN or infinite"):
        ood.InputScore(lambda x: x[:, 0] / 0).scores(loader)
    with pytest.raises(UndefinedError, match="no batch"):
        ood.InputScore(lambda x: x).scores([])
