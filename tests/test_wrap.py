"""What `wrap` itself decides: which data choose what the user left open."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.posteriors import GaussianPosterior, SamplePosterior


def data(rows: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    return [(x, x.sum(1, keepdim=True) + 0.5 * torch.randn(rows, 1, generator=generator))]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)).eval()


TRAIN, HELD_OUT = data(40, 1), data(30, 2)


def test_validation_is_the_held_out_rule_in_one_call(net: nn.Module) -> None:
    one = bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", validation=HELD_OUT, progress=False)
    two = bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", progress=False).tune("heldout", HELD_OUT)
    assert isinstance(one.posterior, GaussianPosterior) and isinstance(two.posterior, GaussianPosterior)
    assert torch.equal(one.posterior.precision, two.posterior.precision)
    assert torch.equal(torch.as_tensor(one.likelihood.noise), torch.as_tensor(two.likelihood.noise))
    assert any("held-out" in finding.text for finding in one.diagnose().findings)


def test_a_given_prior_is_kept(net: nn.Module) -> None:
    prior = bdl.GaussianPrior(precision=3.0)
    bayes = bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", validation=HELD_OUT, prior=prior, progress=False)
    assert isinstance(bayes.posterior, GaussianPosterior)
    assert float(bayes.posterior.precision) == 3.0


def test_a_given_noise_is_kept(net: nn.Module) -> None:
    for method in ("map", "laplace", "dropout"):
        bayes = bdl.wrap(net, method, TRAIN, likelihood=bdl.Gaussian(0.7), validation=HELD_OUT, progress=False)
        assert bayes.likelihood.noise == 0.7


def test_the_noise_of_the_plain_network_is_its_held_out_residual(net: nn.Module) -> None:
    bayes = bdl.wrap(net, "map", TRAIN, likelihood="gaussian", validation=HELD_OUT, progress=False)
    with torch.no_grad():
        residual = (net(HELD_OUT[0][0]) - HELD_OUT[0][1]).square().mean().sqrt()
    assert float(torch.as_tensor(bayes.likelihood.noise)) == pytest.approx(float(residual), rel=1e-4)
    alone = bdl.wrap(net, "map", likelihood="gaussian", validation=HELD_OUT, progress=False)
    assert float(torch.as_tensor(alone.likelihood.noise)) == pytest.approx(float(residual), rel=1e-4)


def test_samples_keep_their_weights_and_get_a_held_out_noise(net: nn.Module) -> None:
    method = bdl.SWAG(epochs=1, lr=1e-3, num_samples=3)
    plain, tuned = (
        bdl.wrap(
            net,
            method,
            TRAIN,
            likelihood="gaussian",
            validation=held_out,
            generator=torch.Generator().manual_seed(0),
            progress=False,
        )
        for held_out in (None, HELD_OUT)
    )
    assert isinstance(plain.posterior, SamplePosterior) and isinstance(tuned.posterior, SamplePosterior)
    for name, value in plain.posterior.snapshots.items():
        assert torch.equal(value, tuned.posterior.snapshots[name])
    assert float(torch.as_tensor(plain.likelihood.noise)) != float(torch.as_tensor(tuned.likelihood.noise))


def test_methods_that_need_training_data_do_not_take_validation_for_it(net: nn.Module) -> None:
    for method in ("laplace", "swag"):
        with pytest.raises(ArgumentError, match="training loader"):
            bdl.wrap(net, method, likelihood="gaussian", validation=HELD_OUT, progress=False)


def test_validation_that_can_be_read_once_is_refused(net: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="validation is a .* read once"):
        bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", validation=iter(HELD_OUT), progress=False)


def test_a_copy_of_the_model_shares_the_loader(net: nn.Module) -> None:
    bayes = bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", progress=False)
    assert bayes.fit_data is TRAIN
    assert copy.deepcopy(bayes).fit_data is TRAIN


def test_a_later_choice_supersedes_the_finding_of_an_earlier_one(net: nn.Module) -> None:
    bayes = bdl.wrap(net, "laplace", TRAIN, likelihood="gaussian", progress=False)
    for model in (bayes, bayes.tune("evidence"), bayes.tune("evidence").tune("heldout", HELD_OUT)):
        found = model.diagnose().findings
        assert sum("prior precision" in f.text and f.severity == "info" for f in found) == 1
        assert sum("noise" in f.text and f.severity == "info" for f in found) == 1
    assert "evidence" in str(bayes.tune("evidence").diagnose())


@pytest.mark.parametrize(("likelihood", "outputs"), [("categorical", 3), ("gaussian", 1)])
def test_the_parameters_of_a_last_layer_are_those_of_the_layer(likelihood: str, outputs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = (x[:, 0] > 0).long() if likelihood == "categorical" else x[:, :1].sin()
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
    methods: list[Any] = [bdl.VBLL(), bdl.VBLL(mode="full"), bdl.Laplace(select="last_layer"), bdl.Laplace()]
    methods += [bdl.StudentT()] if likelihood == "gaussian" else []
    found = [
        dict(bdl.wrap(net, method, [(x, y)], likelihood=likelihood, progress=False).cost)["parameters"]
        for method in methods
    ]
    head, everything = outputs * (8 + 1), outputs * (8 + 1) + 8 * (4 + 1)
    assert found == [head, head, head, everything, head][: len(methods)]
