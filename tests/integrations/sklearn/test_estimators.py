from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_wine
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, UnsupportedError
from bayesdl.integrations.sklearn import BayesianClassifier, BayesianRegressor, training
from tests.untouched import untouched

SMALL: dict[str, Any] = {"hidden": (8,), "steps": 80, "lr": 0.05, "random_state": 0}


def table(rows: int = 60, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    return x, x[:, 0] - 2 * x[:, 1] + 0.5 + 0.3 * rng.normal(size=rows)


@pytest.fixture(autouse=True)
def _few_tunings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here does not depend on how often the evidence is tuned, which takes most of the time."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(training, "TUNINGS", 2)


# no check is expected to fail; scikit-learn itself skips one that needs an environment variable
CHECKED = [kind(hidden=(8,), steps=40, lr=0.05) for kind in (BayesianClassifier, BayesianRegressor)]


@parametrize_with_checks(CHECKED)
@pytest.mark.filterwarnings("default")  # the checks provoke warnings on purpose
def test_is_an_estimator(estimator: Any, check: partial[Any]) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([BayesianClassifier(), BayesianRegressor()])
@pytest.mark.filterwarnings("default")
def test_is_an_estimator_by_default(estimator: Any, check: partial[Any]) -> None:
    check(estimator)


def evidence_optimum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """MacKay's fixed point for Bayesian linear regression: mean, covariance, noise variance."""
    alpha = beta = 1.0
    for _ in range(500):
        covariance = np.linalg.inv(alpha * np.eye(x.shape[1]) + beta * x.T @ x)
        mean = beta * covariance @ x.T @ y
        gamma = x.shape[1] - alpha * np.trace(covariance)
        alpha, beta = gamma / (mean @ mean), (len(y) - gamma) / ((y - x @ mean) ** 2).sum()
    return mean, covariance, 1 / beta


def test_a_linear_network_is_empirical_bayes() -> None:
    x, y = table(40)
    x, y = 5.0 + 10.0 * x, 100.0 + 7.0 * y
    new = x[:5] + 3.0
    mean, std = BayesianRegressor(hidden=(), random_state=0).fit(x, y).predict(new, return_std=True)

    def design(rows: np.ndarray) -> np.ndarray:
        return np.c_[(rows - x.mean(0)) / x.std(0), np.ones(len(rows))]

    weights, covariance, noise = evidence_optimum(design(x), (y - y.mean()) / y.std())
    spread = np.sqrt(noise + np.einsum("ni,ij,nj->n", design(new), covariance, design(new)))
    np.testing.assert_allclose(mean, y.mean() + y.std() * design(new) @ weights, rtol=1e-4)
    np.testing.assert_allclose(std, y.std() * spread, rtol=1e-3)


@pytest.mark.parametrize("method", ["laplace", "map", "vbll", "ensemble", "student-t", bdl.VBLL(noise="gamma")])
def test_units_do_not_matter(method: str | bdl.methods.Method) -> None:
    x, y = table()
    plain = BayesianRegressor(method=method, members=2, **SMALL).fit(x, y)
    moved = BayesianRegressor(method=method, members=2, **SMALL).fit(1000 + 10 * x, 50 + 20 * y)
    mean, std = plain.predict(x[:5], return_std=True)
    mean2, std2 = moved.predict(1000 + 10 * x[:5], return_std=True)
    np.testing.assert_allclose(mean2, 50 + 20 * mean, rtol=1e-4)
    np.testing.assert_allclose(std2, 20 * std, rtol=1e-4)


def test_std_is_the_root_of_both_parts() -> None:
    x, y = table()
    regressor = BayesianRegressor(**SMALL).fit(x, y)
    mean, std = regressor.predict(x, return_std=True)
    found = regressor.predictive(x)
    np.testing.assert_allclose(std**2, (found.aleatoric + found.epistemic)[:, 0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        found.log_prob(torch.as_tensor(y)).numpy(), norm.logpdf(y, mean, std), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_array_equal(regressor.predict(x), mean)
    assert regressor.score(x, y) > 0.9


def test_probabilities() -> None:
    x, y = load_wine(return_X_y=True)
    names = np.array(["barbera", "barolo", "grignolino"])[y]
    classifier = BayesianClassifier(**SMALL).fit(x, names)
    probabilities = classifier.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-15)
    np.testing.assert_allclose(probabilities, classifier.bayes_(torch.as_tensor(x)).probs.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(classifier.classes_[probabilities.argmax(1)], classifier.predict(x))
    np.testing.assert_allclose(classifier.predict_log_proba(x), np.log(probabilities))
    assert classifier.score(x, names) > 0.95


def test_several_targets() -> None:
    x, y = table()
    both = BayesianRegressor(**SMALL).fit(x, np.c_[y, 100 * x[:, 2]])
    mean, std = both.predict(x, return_std=True)
    assert mean.shape == std.shape == (60, 2)
    assert both.score(x, np.c_[y, 100 * x[:, 2]]) > 0.9


def test_seeds() -> None:
    x, y = table()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fits = [BayesianRegressor(**{**SMALL, "random_state": seed}).fit(x, y).predict(x) for seed in (0, 0, 1, None)]
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(fits[0], fits[1])
    assert all(np.abs(fits[0] - other).max() > 1e-6 for other in fits[2:])


@pytest.mark.parametrize("method", ["laplace", "vbll", "ensemble"])
def test_pickles_and_copies_answer_alike(method: str) -> None:
    x, y = table()
    regressor = BayesianRegressor(method=method, members=2, **SMALL).fit(x, y)
    for other in (pickle.loads(pickle.dumps(regressor)), copy.deepcopy(regressor)):  # noqa: S301
        for ours, theirs in zip(regressor.predict(x, return_std=True), other.predict(x, return_std=True), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-12)
    assert not hasattr(clone(regressor), "bayes_")


def test_in_the_company_of_scikit_learn() -> None:
    x, y = load_wine(return_X_y=True)
    pipe = make_pipeline(PolynomialFeatures(1, include_bias=False), BayesianClassifier(**SMALL))
    search = GridSearchCV(
        pipe, {"bayesianclassifier__hidden": [(), (4,)]}, cv=2, scoring="neg_log_loss", error_score="raise"
    ).fit(x, y)
    assert search.best_score_ > -0.3
    fitted = BayesianClassifier(**SMALL).fit(x[::2], y[::2])
    again = CalibratedClassifierCV(FrozenEstimator(fitted)).fit(x[1::2], y[1::2])
    np.testing.assert_allclose(again.predict_proba(x).sum(1), 1.0)


def test_column_names() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = table()
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    regressor = BayesianRegressor(**SMALL).fit(frame, pandas.Series(y))
    assert list(regressor.feature_names_in_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        regressor.predict(frame[["b", "a", "c"]])


def test_an_ensemble_trains_its_members() -> None:
    x, y = table()
    regressor = BayesianRegressor(method="ensemble", members=3, **SMALL).fit(x, y)
    found = regressor.predictive(x)
    assert found.latent.samples.shape == (3, 60, 1)
    assert float(found.epistemic.min()) > 0
    # the noise is what the members learned, larger than the residual of what they fitted together
    assert float(found.aleatoric[0, 0]) > np.square(regressor.predict(x) - y).mean()


def test_a_network_of_the_users_own() -> None:
    x, y = table()
    net = nn.Linear(3, 1)
    with untouched(net):
        regressor = BayesianRegressor(net, steps=0, random_state=0).fit(x, y)
        trained = BayesianRegressor(net, steps=20, random_state=0).fit(x, y)
    rows = torch.as_tensor(x).float()
    with torch.no_grad():
        np.testing.assert_allclose(regressor.predict(x), net(rows)[:, 0].double().numpy(), rtol=1e-6)
        np.testing.assert_allclose(
            regressor.predictive(x).latent.variance, regressor.bayes_(rows).latent.variance, rtol=1e-6
        )
    assert not torch.equal(trained.module_.weight, net.weight)

    def factory(inputs: int, outputs: int) -> nn.Module:
        assert (inputs, outputs) == (3, 2)
        return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))

    noisy = BayesianRegressor(factory, likelihood="heteroscedastic", **SMALL).fit(x, y)
    assert noisy.score(x, y) > 0.5


def test_other_likelihoods() -> None:
    x, _ = table()
    counts = torch.poisson(torch.as_tensor(np.exp(0.5 * x[:, 0] + 1)), torch.Generator().manual_seed(0)).numpy()
    regressor = BayesianRegressor(likelihood="poisson", **SMALL).fit(x, counts)
    mean, std = regressor.predict(x, return_std=True)
    assert (mean > 0).all() and (std**2 > mean * (1 - 1e-6)).all()
    known = BayesianRegressor(likelihood=bdl.Gaussian(noise=2.0), **SMALL).fit(x, counts)
    np.testing.assert_allclose(known.predictive(x).aleatoric.numpy(), 4.0, rtol=1e-6)


def test_constant_columns_and_targets() -> None:
    x, y = table()
    x[:, 2] = 1e9
    regressor = BayesianRegressor(**SMALL).fit(x, y)
    assert np.isfinite(regressor.predict(x)).all()
    constant = BayesianRegressor(**SMALL).fit(x, np.full(60, 3.0))
    np.testing.assert_allclose(constant.predict(x), 3.0, atol=0.05)


def test_refusals() -> None:
    x, y = table()
    labels = (y > 0).astype(int)
    with pytest.raises(UnsupportedError, match="CalibratedClassifierCV"):
        BayesianClassifier(method="temperature").fit(x, labels)
    with pytest.raises(UnsupportedError, match="use BayesianClassifier"):
        BayesianRegressor(likelihood="categorical").fit(x, y)
    with pytest.raises(UnsupportedError, match="is for no classes"):
        BayesianClassifier(likelihood="gaussian").fit(x, labels)
    with pytest.raises(ArgumentError, match="holds 1 class"):
        BayesianClassifier().fit(x, np.zeros(60))
    with pytest.raises(ArgumentError, match="steps=-1"):
        BayesianRegressor(steps=-1).fit(x, y)
    with pytest.raises(ArgumentError, match="numbers of inputs and outputs"):
        BayesianRegressor(lambda inputs, outputs: None).fit(x, y)  # type: ignore[arg-type, return-value]
    with pytest.raises(NonFiniteError, match="step 2 of 80: .* smaller lr"):
        BayesianRegressor(**{**SMALL, "lr": 1e200}).fit(x, y)
