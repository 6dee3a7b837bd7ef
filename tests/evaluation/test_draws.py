"""Forecasts that are draws: fair scores, PIT values, and the metrics of `Predictions.from_samples`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.evaluation import METRICS, Predictions, cat_predictions, evaluate_metrics, ood_score
from bayesdl.evaluation import draws as d
from bayesdl.evaluation import regression as reg
from bayesdl.evaluation.validation import UndefinedError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_fair_crps_is_the_formula_and_unbiased() -> None:
    samples, y = normal(5, 7, 2), torch.zeros(7, 2, dtype=torch.float64)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1)) / (2 * 5 * 4)
    expected = float((samples.abs().mean(0) - pairs).mean())
    assert d.crps_samples(y, samples) == pytest.approx(expected)
    # Two draws estimate the same number as the closed form: 40,000 examples, 5 standard errors.
    closed = reg.crps([0.5], mean=[0.0], variance=[1.0])
    losses = d.crps_samples(torch.full((40_000,), 0.5), normal(2, 40_000, seed=1), per_example=True)
    assert isinstance(losses, Tensor)
    assert abs(float(losses.mean()) - closed) < 5 * float(losses.std()) / 200
    with pytest.raises(UndefinedError, match="one was given"):
        d.crps_samples(y, samples[:1])


def test_energy_score_is_the_formula_and_for_one_output_the_crps(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, y = normal(6, 5, 3), normal(5, 3, seed=1)
    each = []
    for n in range(5):
        near = sum(float((samples[s, n] - y[n]).norm()) for s in range(6)) / 6
        pairs = sum(float((samples[s, n] - samples[t, n]).norm()) for s in range(6) for t in range(s)) / (6 * 5)
        each.append(near - pairs)
    assert d.energy_score(y, samples) == pytest.approx(sum(each) / 5)
    assert d.energy_score(y, samples, per_example=True).tolist() == pytest.approx(each)  # type: ignore[union-attr]
    assert d.energy_score(y[:, :1], samples[..., :1]) == pytest.approx(d.crps_samples(y[:, :1], samples[..., :1]))
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    assert d.energy_score(y, samples, weights=weights) == pytest.approx((each[0] + 2 * each[2]) / 3)
    monkeypatch.setattr(d, "CHUNK", 1)  # one draw against all others at a time
    assert d.energy_score(y, samples) == pytest.approx(sum(each) / 5)


def test_energy_score_equals_scoringrules() -> None:
    theirs = pytest.importorskip("scoringrules")
    samples, y = normal(8, 4, 3), normal(4, 3, seed=1)
    expected = theirs.es_ensemble(y.numpy(), samples.movedim(0, 1).numpy(), estimator="fair")
    found = d.energy_score(y, samples, per_example=True)
    assert np.asarray(found) == pytest.approx(np.asarray(expected), abs=1e-9)


def test_energy_score_prefers_the_true_dependence() -> None:
    # Marginals are right in both; 4000 examples, 20 draws: the expected gap is over ten standard errors.
    mix = torch.tensor([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]], dtype=torch.float64)
    y, right, wrong = normal(4000, 2) @ mix.T, normal(20, 4000, 2, seed=1) @ mix.T, normal(20, 4000, 2, seed=2)
    better, worse = (d.energy_score(y, x, per_example=True) for x in (right, wrong))
    gap = worse - better
    assert isinstance(gap, Tensor) and float(gap.mean()) > 3 * float(gap.std()) / math.sqrt(4000)
    assert d.crps_samples(y, right) == pytest.approx(d.crps_samples(y, wrong), rel=0.03)


def test_randomised_pit_is_uniform_with_ties() -> None:
    # Counts: ties are the rule. Kolmogorov-Smirnov below 1.95 / sqrt(n): 1 seed in 1000 fails.
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((10, 4000), 1.5)
    samples, y = torch.poisson(rate, generator), torch.poisson(rate[0], generator)
    pit = np.sort(d.pit_samples(y, samples, generator=generator)[:, 0].numpy())
    assert np.abs(pit - np.arange(1, 4001) / 4000).max() < 1.95 / math.sqrt(4000)


def test_quantiles_of_uniform_order_statistics() -> None:
    # Nine draws at 0.1 .. 0.9, each its own quantile k / 10; beyond the outermost there is nothing to tell.
    law = d.Draws(torch.arange(1, 10, dtype=torch.float64)[:, None, None].flip(0) / 10)
    assert [float(law.quantile(q)) for q in (0.1, 0.5, 0.55, 0.9, 0.99, 0.01)] == pytest.approx(
        [0.1, 0.5, 0.55, 0.9, 0.9, 0.1]
    )


def test_metrics_of_predictions_that_are_draws_approach_those_of_the_law() -> None:
    # 400 draws of a Gaussian forecast: within 3 % of its closed forms (10 times the Monte Carlo error of the means).
    mean, y = normal(500, 2), normal(500, 2, seed=1) * 1.5
    samples = mean + 1.2 * normal(400, 500, 2, seed=2)
    found = Predictions.from_samples(samples, y)
    exact = Predictions.from_gaussian(mean, torch.full_like(mean, 1.44), y)
    names = ("crps", "rmse", "mae", "sharpness", "picp_90", "mpiw_90", "interval_score_90", "pinball_10", "qce", "ence")
    ours, theirs = evaluate_metrics(found, names), evaluate_metrics(exact, names)
    assert ours == pytest.approx(theirs, rel=0.03, abs=0.01)
    values = evaluate_metrics(found, ("nll", "joint_nll_10", "energy_score"))
    assert math.isnan(values["nll"]) and math.isnan(values["joint_nll_10"])
    assert values["energy_score"] == pytest.approx(d.energy_score(y, samples))
    assert math.isnan(evaluate_metrics(exact, ("energy_score",))["energy_score"])
    assert found.aleatoric is None and found.epistemic is None
    with pytest.raises(UndefinedError, match="epistemic part"):
        ood_score(found)


def test_predictions_of_draws_subset_concatenate_and_save(tmp_path: Path) -> None:
    found = Predictions.from_samples(normal(4, 6), normal(6, seed=1))
    halves = cat_predictions([found.subset(torch.arange(2)), found.subset(torch.arange(2, 6))])
    found.save(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", samples=normal(4, 6).numpy(), targets=normal(6, seed=1).numpy())
    names = [name for name, metric in METRICS.items() if "regression" in metric.tasks]
    expected = evaluate_metrics(found, names)
    for other in (halves, *(Predictions.load(tmp_path / name) for name in ("a.npz", "b.npz"))):
        assert evaluate_metrics(other, names) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="cannot be concatenated"):
        cat_predictions([found, Predictions.from_samples(normal(5, 6), normal(6))])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected 2-D or 3-D"):
        d.crps_samples([0.0], [0.0])
    with pytest.raises(ValueError, match="nothing is broadcast"):
        d.crps_samples(torch.zeros(3, 1), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one draw"):
        Predictions.from_samples(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Predictions.from_samples(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="have a total and no parts"):
        Predictions("regression", samples=normal(2, 3, 1), means=normal(1, 3, 1))
    with pytest.raises(ValueError, match="from_samples makes both"):
        Predictions("regression", samples=normal(2, 3, 1), means=normal(1, 4, 1), total=torch.ones(4, 1))
