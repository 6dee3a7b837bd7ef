"""Recalibration: recovered maps, stationarity, oracles where they are right, and what must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.errors import LabelError, UnsupportedError
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.recalibration import Recalibrator, recalibrate_regression
from tests.evaluation.made_up import classes, numbers

OWN = ("temperature", "vector", "matrix", "dirichlet", "isotonic", "histogram")


def sharpened(n: int = 10_000, c: int = 10, *, seed: int = 0, factor: float = 2.5) -> tuple[Tensor, Tensor]:
    """Logits of right forecasts times `factor`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, dtype=torch.float64, generator=generator)
    return factor * logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyro, in netcal's own temperature
def test_temperature_is_found_and_equals_netcal() -> None:
    from netcal.scaling import TemperatureScaling

    logits, y = sharpened()
    fitted = Recalibrator().fit(logits, y)
    assert fitted.temperature == pytest.approx(2.5, abs=0.1)
    rival = TemperatureScaling()
    rival.fit(logits.softmax(-1).numpy(), y.numpy())
    # netcal keeps the inverse.
    assert 1 / float(np.ravel(rival.temperature)[0]) == pytest.approx(fitted.temperature, rel=2e-3)
    t = torch.tensor(fitted.temperature, dtype=torch.float64, requires_grad=True)
    loss = -(logits / t).log_softmax(-1).gather(1, y[:, None]).mean()
    assert abs(float(torch.autograd.grad(loss, t)[0])) < 1e-9


@pytest.mark.parametrize("method", OWN)
def test_every_map_lowers_calibration_error(method: str) -> None:
    logits, y = sharpened()
    fresh, labels = sharpened(seed=1)
    fitted = Recalibrator(method).fit(logits, y)  # type: ignore[arg-type]
    made = fitted.transform(fresh)
    assert torch.allclose(made.exp().sum(1), torch.ones(len(made), dtype=torch.float64))
    before, after = cls.ece(labels, logits=fresh), cls.ece(labels, probs=made.exp())
    assert before > 0.25 and after < 0.05, after
    if method == "temperature":
        assert cls.accuracy(labels, probs=made.exp()) == cls.accuracy(labels, logits=fresh)


def test_weights_are_copies() -> None:
    logits, y = sharpened(300, 3)
    weights = torch.arange(300) % 3
    copies = weights.long()
    for method in OWN:
        one = Recalibrator(method).fit(logits, y, weights=weights).transform(logits)  # type: ignore[arg-type]
        two = Recalibrator(method).fit(  # type: ignore[arg-type]
            logits.repeat_interleave(copies, 0), y.repeat_interleave(copies)
        )
        assert torch.allclose(one.exp(), two.transform(logits).exp(), atol=1e-6), method


def test_affine_maps_are_stationary_and_recover_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, dtype=torch.float64, generator=generator)
    scale, bias = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, -0.6, 0.3])
    y = torch.multinomial((logits * scale + bias).softmax(-1), 1, generator=generator)[:, 0]
    found = Recalibrator("vector").fit(logits, y).state
    # 20,000 labels: standard errors are below 0.03, so 5 of them.
    assert found["scale"].tolist() == pytest.approx(scale.tolist(), abs=0.15)
    offset = found["bias"] - found["bias"].mean()
    assert offset.tolist() == pytest.approx(bias.tolist(), abs=0.15)
    state = Recalibrator("matrix", penalty=0.1).fit(logits, y).state
    w, b = (state[k].clone().requires_grad_() for k in ("weight", "bias"))
    loss = -(logits @ w.T + b).log_softmax(-1).gather(1, y[:, None]).mean()
    loss = loss + 0.1 * ((w * (1 - torch.eye(3))).square().sum() + b.square().sum())
    assert all(float(g.abs().max()) < 1e-6 for g in torch.autograd.grad(loss, (w, b)))


def test_isotonic_equals_scikit_learn() -> None:
    from sklearn.isotonic import IsotonicRegression

    logits, y = sharpened(500, 2)
    p = logits.softmax(-1)
    rows = []
    for c in range(2):
        rows.append(IsotonicRegression(out_of_bounds="clip").fit(p[:, c], (y == c).double()).predict(p[:, c]))
    expected = torch.from_numpy(np.stack(rows, 1))
    expected = expected / expected.sum(1, keepdim=True)
    found = Recalibrator("isotonic").fit(logits, y).transform(logits).exp()
    assert torch.allclose(found, expected, atol=1e-9)


def test_histogram_by_hand_and_rows_without_mass() -> None:
    p = torch.tensor([0.1, 0.2, 0.7, 0.9], dtype=torch.float64)
    logits = torch.stack([1 - p, p], 1).log()
    fitted = Recalibrator("histogram", bins=2).fit(logits, [0, 1, 1, 1])
    made = fitted.transform(logits).exp()
    assert made[:, 1].tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    # Labels 0 and 1 alone: class 2 has rate 0 everywhere; a row in which all maps give 0 stays as it was.
    three = torch.eye(3, dtype=torch.float64) * 8
    empty = Recalibrator("histogram", bins=1).fit(three[:2], [0, 1]).transform(three)
    assert torch.isfinite(empty.logsumexp(1)).all() and empty[:, 2].tolist() == [-math.inf] * 3


@pytest.mark.parametrize("method", ["platt", "beta", "bbq", "enir"])
def test_methods_of_netcal(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    logits, y = sharpened(600, 3)
    fresh, labels = sharpened(2000, 3, seed=1)
    fitted = Recalibrator(method).fit(logits, y)  # type: ignore[arg-type]
    assert cls.ece(labels, probs=fitted.transform(fresh).exp()) < 0.5 * cls.ece(labels, logits=fresh)
    assert capfd.readouterr().out == ""
    with pytest.raises(LabelError, match="class 2 has none"):
        Recalibrator(method).fit(logits, y.clamp_max(1))  # type: ignore[arg-type]


def test_members_share_one_temperature() -> None:
    found = classes(2000, sharpness=3.0)
    fitted = Recalibrator().fit(found.log_mean_probs, found.labelled())
    made = fitted.apply(found)
    power = found.probs.pow(1 / fitted.temperature)
    assert torch.allclose(made.probs, power / power.sum(1, keepdim=True), atol=1e-12)
    assert made.predicted.equal(found.predicted) and made.num_members == 1


def test_bounds_and_refusals() -> None:
    logits, y = sharpened(50, 3)
    with pytest.warns(UserWarning, match="search bound"):
        Recalibrator().fit(10 * torch.nn.functional.one_hot(y, 3).double(), y)
    with pytest.warns(UserWarning, match="search bound"):
        Recalibrator().fit(-10 * torch.nn.functional.one_hot(y, 3).double(), y)
    with pytest.raises(ValueError, match="method="):
        Recalibrator("guess").fit(logits, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected \\(N, C\\)"):
        Recalibrator().fit(logits[None], y)
    with pytest.raises(ValueError, match="fitted on 3"):
        Recalibrator("vector").fit(logits, y).transform(logits[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        Recalibrator().fit(logits * torch.nan, y)
    with pytest.raises(UnsupportedError):
        Recalibrator("vector").fit(logits, y).temperature  # noqa: B018
    with pytest.raises(UnsupportedError, match="probabilities of 0"):
        Recalibrator().fit(logits, y).apply(Predictions.from_probs([[1.0, 0.0, 0.0]]))


def test_variances_are_scaled_by_the_mean_squared_z() -> None:
    found = numbers(4000, scale=0.5)
    fitted = recalibrate_regression(found)
    assert fitted.factor is not None
    assert float(fitted.factor) == pytest.approx(float(found.labelled().square().mean()) / 0.25)
    assert fitted.apply(found).variance.sqrt().mean().item() == pytest.approx(1.0, abs=0.05)


def test_isotonic_quantiles_cover() -> None:
    # 999 calibration targets; 20,000 fresh ones: the coverage of a level has sd 0.016 at most over both.
    fitted = recalibrate_regression(numbers(999, scale=0.5), "isotonic_quantile")
    fresh = numbers(20_000, scale=0.5, seed=1)
    for q in (0.05, 0.5, 0.9):
        share = float((fresh.labelled() <= fitted.quantile(fresh, q)).double().mean())
        assert share == pytest.approx(q, abs=0.06)
    pit = fitted.pit(fresh).flatten().sort().values
    assert float((pit - torch.arange(1, 20_001) / 20_000).abs().max()) < 0.06
    with pytest.raises(UnsupportedError, match="no Gaussian mixture"):
        fitted.apply(fresh)
    with pytest.raises(UnsupportedError, match="no Gaussian components"):
        recalibrate_regression(classes(10, sharpness=1.0))
