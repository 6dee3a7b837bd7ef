"""Every likelihood with every method that takes it, on a small network: what users will combine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from bayesdl.methods import METHODS
from tests.conformance.methods import VARIANTS
from tests.conformance.test_likelihoods import CASES as LIKELIHOODS
from tests.conformance.test_likelihoods import OUTPUTS
from tests.untouched import untouched

G = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, generator=G)
LOGITS = ("categorical", "bernoulli")
# the evidence of the Laplace methods, which their prior is chosen by, is tested with the curvature
PRIOR = bdl.GaussianPrior(precision=2.0)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, OUTPUTS))


NETWORKS = [net(0), net(1)]


@cache
def targets(likelihood: str) -> Tensor:
    with torch.no_grad():
        f = net(0).eval()(X)
    return LIKELIHOODS[likelihood].sample(f, 1, torch.Generator().manual_seed(1))[0]


def wrap(likelihood: str, label: str) -> bdl.BayesianModel:
    data = list(zip(X.split(7), targets(likelihood).split(7), strict=True))
    models = NETWORKS if label == "ensemble" else NETWORKS[0]
    infers = label == "student-t" and likelihood == "gaussian"  # the noise
    family = bdl.Gaussian() if infers else LIKELIHOODS[likelihood]
    return bdl.wrap(models, VARIANTS[label], data, likelihood=family, prior=PRIOR, progress=False)


# a Bayesian last layer has a closed form, or a bound, for these alone
LAST_LAYERS = dict.fromkeys(("vbll", "vbll-full"), ("categorical", "bernoulli", "gaussian", "heteroscedastic"))
LAST_LAYERS["student-t"] = ("gaussian",)


def taken(likelihood: str, label: str) -> bool:
    return likelihood in (LOGITS if label == "temperature" else LAST_LAYERS.get(label, LIKELIHOODS))


PAIRS = [
    pytest.param(likelihood, label, id=f"{likelihood}-{label}")
    for likelihood in LIKELIHOODS
    for label in VARIANTS
    if taken(likelihood, label)
]


@pytest.mark.parametrize(("likelihood", "label"), PAIRS)
def test_combination(likelihood: str, label: str, tmp_path: Path) -> None:
    y = targets(likelihood)
    with untouched(*NETWORKS):
        bayes = wrap(likelihood, label)
        pred = bayes(X)
        assert pred.log_prob(y).shape == (30,) and bool(torch.isfinite(pred.log_prob(y)).all())
        for part in (pred.mean, pred.variance, pred.entropy, pred.total):
            assert len(part) == 30 and bool(torch.isfinite(part).all())
        assert torch.equal(pred.total, pred.aleatoric + pred.epistemic)
        assert bool((pred.epistemic >= 0).all())
        assert len(pred.sample(3, generator=torch.Generator().manual_seed(0))) == 3
        path = tmp_path / "b.safetensors"
        bayes.save(path)
        own = None if likelihood in bdl.likelihoods.LIKELIHOODS else LIKELIHOODS[likelihood]
        again = bdl.load(path, NETWORKS[0], likelihood=own)(X)
        assert torch.equal(again.mean, pred.mean) and torch.equal(again.log_prob(y), pred.log_prob(y))


@pytest.mark.parametrize(("likelihood", "label"), PAIRS)
def test_tuning(likelihood: str, label: str) -> None:
    bayes, data = wrap(likelihood, label), [(X, targets(likelihood))]
    linearized = label.startswith("laplace") and label != "laplace-samples"
    tunable = likelihood in (*LOGITS, "gaussian") or linearized
    if not tunable:
        with pytest.raises(UnsupportedError, match="has no output temperature; tune the method instead"):
            bayes.tune("heldout", data)
        return
    tuned = bayes.tune("heldout", data)
    before, after = (-float(b(X).log_prob(data[0][1]).mean()) for b in (bayes, tuned))
    assert after <= before + (1e-2 if linearized else 1e-5)  # a grid of priors


@pytest.mark.parametrize("likelihood", [n for n in LIKELIHOODS if n not in LOGITS])
def test_temperature_is_for_logits(likelihood: str) -> None:
    with pytest.raises(UnsupportedError, match=r"needs logits \(categorical or bernoulli\)"):
        wrap(likelihood, "temperature")


@pytest.mark.parametrize("label", LAST_LAYERS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_last_layers_say_what_they_take(likelihood: str, label: str) -> None:
    if not taken(likelihood, label):
        with pytest.raises(UnsupportedError, match=f"the {likelihood} likelihood has no .* use "):
            wrap(likelihood, label)


def test_every_method_takes_part() -> None:
    apart = {"tfb", "bayesvlm"}  # for networks of their own
    assert {method.label for method in VARIANTS.values()} == set(METHODS) - apart


@pytest.mark.parametrize("likelihood", [n for n in LIKELIHOODS if n in ("gaussian", "heteroscedastic", "poisson")])
@pytest.mark.parametrize("label", ["map", "laplace", "ensemble"])
def test_quantiles_agree_with_draws(likelihood: str, label: str) -> None:
    # 4000 draws an output: the share below the quantile at 0.3 errs by at most 5 * 0.0073 (counts: ties lie below)
    pred = wrap(likelihood, label)(X)
    draws = pred.sample(4000, generator=torch.Generator().manual_seed(0))
    level = pred.quantile(0.3)
    assert bool(((draws <= level).double().mean(0) > 0.3 - 0.037).all())
    assert bool(((draws < level).double().mean(0) < 0.3 + 0.037).all())
