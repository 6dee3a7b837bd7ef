"""Matched priors of every family in every method that takes a prior, and by name refused elsewhere."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.functional import FAMILIES, GP, KERNELS, constant
from tests import oracles

X = torch.linspace(-2, 2, 20).unsqueeze(1).double()
DATA = [(X[:10], X[:10].sin()), (X[10:], X[10:].sin())]
SMALL = {"num_samples": 4, "thin": 3}
NUTS = {"num_samples": 4, "warmup": 6, "chains": 1, "max_tree_depth": 2}
# method, and what its prior is over
TAKES_ALL = {
    "sghmc, adapted": (
        bdl.SGMCMC("sghmc", burn_in=30, chains=2, start="prior", options={"adapt": True, "burn_in": 20}, **SMALL),
        "all",
    ),
    "sghmc, batched": (bdl.SGMCMC("sghmc", burn_in=6, chains=2, parallel="batched", **SMALL), "all"),
    "sgld": (bdl.SGMCMC("sgld", burn_in=6, **SMALL), "all"),
    "nuts": (bdl.NUTS(**NUTS), "all"),
    "nuts, last layer": (bdl.NUTS(select="last_layer", **NUTS), "last_layer"),
    "smc": (bdl.SMC(particles=8, moves=2), "last_layer"),
}
TAKES_GAUSSIAN = {
    "laplace": (bdl.Laplace(), "all"),
    "laplace, full": (bdl.Laplace(structure="full"), "all"),
    "laplace, last layer": (bdl.Laplace(select="last_layer"), "last_layer"),
    "gp": (bdl.SubsetGP(), "all"),
    "vbll": (bdl.VBLL(), "last_layer"),
    "vbll, trained": (bdl.VBLL(mode="full", epochs=2), "last_layer"),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@cache
def matched(family, select="all"):
    options = {"distance": "energy", "steps": 5, "num_functions": 32, "progress": False}
    return bdl.functional.match(network(), GP(), X, family=family, select=select, **options)


def wrapped(method, prior, noise=0.1, data=DATA, net=None, **options):
    likelihood = bdl.Gaussian(noise)
    return bdl.wrap(
        net or network(),
        method,
        data,
        likelihood=likelihood,
        prior=prior,
        generator=generator(),
        progress=False,
        **options,
    )


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", [*TAKES_ALL, *TAKES_GAUSSIAN])
def test_every_method_takes_it_or_says_what_it_takes(name, family):
    method, select = {**TAKES_ALL, **TAKES_GAUSSIAN}[name]
    if not isinstance(matched(family, select), bdl.GaussianPrior) and name in TAKES_GAUSSIAN:
        with pytest.raises(ArgumentError, match='family="gaussian"'):
            wrapped(method, matched(family, select))
        return
    bayes = wrapped(method, matched(family, select))
    assert bool(torch.isfinite(bayes(X).log_prob(X.sin())).all())
    if not name.startswith("vbll, trained"):  # whose training starts anew
        wide = bdl.GaussianPrior(1e-4)
        found, other = bayes(X), wrapped(method, wide)(X)
        assert not (torch.equal(found.mean, other.mean) and torch.equal(found.variance, other.variance))


def test_laplace_under_precisions_by_name_is_the_dense_one():
    net, prior = network(), matched("gaussian")
    names = list(dict(net.named_parameters()))
    jac = oracles.jacobian(net, X, names)
    shift = torch.cat([torch.full((p.numel(),), prior.precision[n]) for n, p in net.named_parameters()]).double()
    dense = oracles.ggn(jac, torch.full((len(X), 1, 1), 100.0).double()) + torch.diag(shift)
    expected = oracles.linearized_covariance(jac, dense)
    bayes = wrapped(bdl.Laplace(structure="full"), prior)
    torch.testing.assert_close(bayes(X).latent.covariance, expected)
    kron = wrapped(bdl.Laplace(), prior)  # blocks of weights and biases are made separate by themselves
    same = wrapped(bdl.Laplace(bias="separate"), prior)
    assert torch.equal(kron(X).latent.variance, same(X).latent.variance)
    assert "blocks of their own" in str(kron.diagnose()) and "blocks of their own" not in str(same.diagnose())


def test_named_means_are_the_flat_ones_in_every_method():
    net, prior = network(), matched("located")
    shapes = dict(net.named_parameters())
    assert set(prior.mean) == set(shapes) and not bool(prior.mean["2.weight"].any())
    flat = bdl.GaussianPrior(prior.vector(shapes), torch.cat([prior.mean[n].flatten() for n in shapes]))
    methods = (bdl.Laplace(structure="full"), bdl.Laplace(structure="diag"), bdl.NUTS(**NUTS), TAKES_ALL["smc"][0])
    for method in (*methods, bdl.SGMCMC("sgld", burn_in=6, **SMALL), TAKES_ALL["sghmc, adapted"][0]):
        small = method.name == "smc"
        own = bdl.GaussianPrior(flat.precision[-9:]) if small else flat
        one, other = wrapped(method, prior), wrapped(method, own)
        torch.testing.assert_close(one(X).mean, other(X).mean)
        torch.testing.assert_close(one(X).variance, other(X).variance)
        if isinstance(method, bdl.Laplace):
            torch.testing.assert_close(one.log_evidence(), other.log_evidence())
            without = wrapped(method, bdl.GaussianPrior(flat.precision)).log_evidence()
            assert abs(float(one.log_evidence() - without)) > 0.1
    with pytest.raises(ArgumentError, match="of mean zero"):
        wrapped(bdl.VBLL(), bdl.GaussianPrior(1.0, {"2.weight": torch.ones(1, 8), "2.bias": torch.ones(1)}))


def test_last_layers_take_the_precision_of_their_weight():
    for prior in (matched("gaussian", "last_layer"), matched("gaussian")):
        number = bdl.GaussianPrior(prior.precision["2.weight"])
        found, expected = wrapped(bdl.VBLL(), prior), wrapped(bdl.VBLL(), number)
        assert torch.equal(found(X).variance, expected(X).variance)
    with pytest.raises(ArgumentError, match="none for '2.weight'"):
        wrapped(bdl.VBLL(), bdl.GaussianPrior({"0.weight": 1.0}))


def test_samplers_take_precisions_by_name_as_they_take_a_vector():
    prior, net = matched("gaussian"), network()
    vector = torch.cat([torch.full((p.numel(),), prior.precision[n]) for n, p in net.named_parameters()]).double()
    for method in (bdl.SGMCMC("sgld", burn_in=6, **SMALL), bdl.NUTS(**NUTS)):
        one, other = wrapped(method, prior), wrapped(method, bdl.GaussianPrior(vector))
        torch.testing.assert_close(one(X).mean, other(X).mean)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", ["nuts", "sghmc, adapted"])
def test_without_information_the_samples_are_the_priors(name, family):
    """A noise of 10^4: what is left is the prior. Mean squares of both parameters, and their product's."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1).double()
    options = {"distance": "energy", "steps": 40, "num_functions": 64, "progress": False}
    prior = bdl.functional.match(
        net, GP(KERNELS["linear"] + constant(0.7), lengthscale=1.5), X, family=family, **options
    )
    if name == "nuts":
        method = bdl.NUTS(num_samples=250, warmup=100, chains=1, start="prior", max_tree_depth=4)
    else:
        adapted = {"adapt": True, "burn_in": 100}
        method = bdl.SGMCMC(
            "sghmc", lr=0.2, burn_in=200, thin=10, num_samples=100, chains=8, start="prior", options=adapted
        )
    bayes = wrapped(method, prior, noise=1e4, net=net)
    shapes, source = dict(net.named_parameters()), generator(7)
    drawn = [prior.sample(shapes, source) for _ in range(4000)]
    found = torch.cat([bayes.posterior.snapshots[n].flatten(1) for n in shapes], 1)
    wanted = torch.stack([torch.cat([one[n].flatten() for n in shapes]) for one in drawn])
    for values in (torch.abs, lambda t: (t.abs() < t.new_tensor(0.5)).double()):
        first, second = values(found), values(wanted)
        # 250 or 800 samples, at least every fifth of which counts as one of its own; eight comparisons at five errors
        error = (first.var(0) / (len(found) / 5) + second.var(0) / 4000).sqrt()
        assert bool(((first.mean(0) - second.mean(0)).abs() < 5 * error).all())
