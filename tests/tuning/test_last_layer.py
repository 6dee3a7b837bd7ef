"""Tuning a last layer's regression: from its statistics, exact leave-one-out, held-out data; equal to a fresh fit."""

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.last_layer import Statistics


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def data(n=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    y = torch.stack([x.sin().sum(1), x[:, 0] * x[:, 1]], 1)
    return x, y + torch.tensor([0.1, 0.5]) * torch.randn(n, 2, generator=generator)


TRAIN = [data()]
HELD_OUT = [data(60, 1)]


def fit(likelihood="gaussian", prior=None, validation=None, tuning="evidence", **options):
    return bdl.wrap(
        net(),
        bdl.VBLL(tuning=tuning, **options),
        TRAIN,
        likelihood=likelihood,
        prior=prior,
        validation=validation,
        progress=False,
    )


def hyperparameters(bayes):
    regression = bayes.posterior.belief.regression
    return torch.stack([regression.ratio, regression.noise_variance])


@pytest.mark.parametrize("rule", ["evidence", "loo"])
def test_tuning_is_a_fresh_fit_by_the_rule(rule, tmp_path):
    other = fit(tuning="loo" if rule == "evidence" else "evidence")
    wanted = fit(tuning=rule)
    tuned = other.tune(rule)
    assert torch.allclose(hyperparameters(tuned), hyperparameters(wanted), rtol=1e-6)
    assert torch.allclose(tuned.likelihood.noise, wanted.likelihood.noise)
    assert not torch.allclose(hyperparameters(other), hyperparameters(wanted), rtol=1e-3)
    if rule == "evidence":
        assert tuned.log_evidence() > other.log_evidence()
        return
    other.save(tmp_path / "b.safetensors")
    loaded = bdl.load(tmp_path / "b.safetensors", net())
    with pytest.raises(ArgumentError, match="does not remember it"):
        loaded.tune("loo")
    assert torch.allclose(hyperparameters(loaded.tune("loo", TRAIN)), hyperparameters(wanted), rtol=1e-6)


def test_held_out_choice_is_the_best_of_its_neighbourhood():
    bayes = fit()
    tuned = bayes.tune("heldout", HELD_OUT)
    x, y = HELD_OUT[0]

    def nll(model):
        return -float(model(x).log_prob(y).mean())

    assert nll(tuned) < nll(bayes)
    own = tuned.posterior.belief.regression
    for ratio in (0.5, 2.0):
        for noise in (0.9, 1.1):
            moved = own.with_hyperparameters(own.ratio * ratio, own.noise_variance * noise)
            belief = type(tuned.posterior.belief)(moved)
            other = tuned.replaced(
                posterior=type(tuned.posterior)(tuned.posterior.layer, belief),
                likelihood=bdl.Gaussian(moved.noise_variance.sqrt()),
            )
            assert nll(tuned) <= nll(other)
    assert torch.equal(hyperparameters(fit(validation=HELD_OUT)), hyperparameters(tuned))
    with pytest.raises(ArgumentError, match="was not trained on"):
        bayes.tune("heldout")


@pytest.mark.parametrize("rule", ["evidence", "loo", "heldout"])
def test_what_is_kept_stays_and_the_other_is_optimal(rule):
    bayes = fit()
    before = bayes.posterior.belief.regression
    given = HELD_OUT if rule == "heldout" else None
    noise_only = bayes.tune(rule, given, prior="keep").posterior.belief.regression
    assert torch.allclose(noise_only.prior_precision, before.prior_precision)
    prior_only = bayes.tune(rule, given, noise=False).posterior.belief.regression
    assert torch.equal(prior_only.noise_variance, before.noise_variance)
    assert torch.equal(bayes.tune(rule, given, prior="keep", noise=False)(TRAIN[0][0]).mean, bayes(TRAIN[0][0]).mean)
    if rule == "heldout":
        assert not torch.allclose(noise_only.noise_variance, before.noise_variance)
        assert not torch.allclose(prior_only.ratio, before.ratio)
    with pytest.raises(ArgumentError, match="prior='layer'"):
        bayes.tune(rule, given, prior="layer")


def test_validation_leaves_what_was_given():
    prior = bdl.GaussianPrior(precision=3.0)
    bayes = fit(prior=prior, validation=HELD_OUT)
    assert torch.allclose(bayes.posterior.belief.regression.prior_precision, torch.tensor(3.0).double())
    assert not torch.allclose(bayes.likelihood.noise, fit(prior=prior).likelihood.noise)
    fixed = fit(likelihood=bdl.Gaussian(0.3), validation=HELD_OUT)
    assert fixed.likelihood == bdl.Gaussian(0.3)
    assert not torch.allclose(hyperparameters(fixed), hyperparameters(fit(likelihood=bdl.Gaussian(0.3))))


def test_shared_prior():
    regression = fit().tune("evidence", prior="shared").posterior.belief.regression
    assert torch.allclose(regression.prior_precision[0], regression.prior_precision[1])
    assert not torch.allclose(regression.noise_variance[0], regression.noise_variance[1])


def test_unknown_noise_keeps_its_prior():
    bayes = fit(noise="gamma", noise_prior=(2.0, 0.3))
    tuned = bayes.tune("evidence", prior="shared")
    own = tuned.posterior.belief.regression
    shape, rate = tuned.likelihood.parameters(own.ratio)
    assert torch.allclose(shape, torch.tensor(2.0 + 0.5 * own.degrees).double())
    assert torch.allclose(rate, 0.3 + 0.5 * own.misfit(own.ratio))
    assert torch.allclose(own.noise_variance, rate / (shape - 1))
    assert not torch.allclose(own.ratio, bayes.posterior.belief.regression.ratio)


@pytest.mark.parametrize("rule", ["loo", "training", "heldout"])
def test_unknown_noise_is_centred_at_the_one_of_the_rule(rule):
    given = HELD_OUT if rule == "heldout" else None
    known, unknown = (fit(noise=noise).tune(rule, given) for noise in ("point", "gamma"))
    shape, rate = unknown.likelihood.parameters(known.likelihood.noise)
    assert torch.allclose(rate / shape, known.likelihood.noise.square(), rtol=1e-6)
    assert torch.allclose(unknown(TRAIN[0][0]).mean, known(TRAIN[0][0]).mean, rtol=1e-5)


@pytest.mark.parametrize("noise", ["point", "gamma"])
def test_the_rule_of_training_data_is_that_of_the_fit(noise):
    wanted, tuned = fit(tuning="training", noise=noise), fit(noise=noise).tune("training")
    assert torch.allclose(hyperparameters(tuned), hyperparameters(wanted), rtol=1e-6)
    assert torch.allclose(wanted(TRAIN[0][0]).variance, tuned(TRAIN[0][0]).variance, rtol=1e-5)


def test_the_evidence_needs_no_data_and_no_features(tmp_path):
    bayes = fit(tuning="loo")
    bayes.save(tmp_path / "b.safetensors")
    loaded = bdl.load(tmp_path / "b.safetensors", net())
    assert torch.equal(hyperparameters(loaded.tune("evidence")), hyperparameters(bayes.tune("evidence")))
    assert isinstance(loaded.posterior.belief.regression.statistics, Statistics)


def test_classification_takes_a_temperature_on_held_out_data():
    labels = [(x, (y[:, 0] > 0).long()) for x, y in TRAIN]
    other = [(x, (y[:, 0] > 0).long()) for x, y in HELD_OUT]
    bayes = bdl.wrap(net(), "vbll", labels, likelihood="categorical", progress=False)
    tuned = bayes.tune("heldout", other)
    assert tuned(other[0][0]).log_prob(other[0][1]).mean() >= bayes(other[0][0]).log_prob(other[0][1]).mean()
    with pytest.raises(UnsupportedError, match="has no evidence"):
        bayes.tune("evidence")
