"""Infinite width, classes, empirical sets of functions, autoencoders: what a prior over functions is asked for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import NonFiniteError, ShapeError
from bayesdl.functional import GP, KERNELS, DistributionalSliced, Fixed, Functions, Kernel
from bayesdl.functional.families import GaussianFamily
from bayesdl.functional.functions import Pushforward
from bayesdl.functional.reconstruction import Data, Reconstructions
from bayesdl.network import Network

X = torch.linspace(-2, 2, 15).unsqueeze(1)
STDS = (1.3, 0.6, 1.5, 0.4)  # of the first weight, its bias, the second weight, its bias


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wide(width, activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, width), activation, nn.Linear(width, 1))


def moment(activation):
    """E[a(u) a(v)] for centred Gaussians (u, v): the arc-cosine kernel of a ReLU, the arc-sine one of an erf."""
    first, first_bias = STDS[:2]

    def kernel(x, y):
        z, w = (torch.cat([first * t, first_bias * torch.ones_like(t[..., :1])], -1) for t in (x, y))
        if isinstance(activation, nn.ReLU):
            return 0.5 * KERNELS["arccosine"](z, w)  # Cho and Saul 2009
        inner = 2.0 * z @ w.mT
        norms = (1 + 2 * z.square().sum(-1)).sqrt().unsqueeze(-1) * (1 + 2 * w.square().sum(-1)).sqrt().unsqueeze(-2)
        return 2 / math.pi * torch.asin(inner / norms)  # Williams 1997

    return lambda x, y: STDS[2] ** 2 * kernel(x, y) + STDS[3] ** 2


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


@pytest.mark.parametrize("activation", [nn.ReLU(), Erf()], ids=["relu", "erf"])
def test_wide_networks_are_the_gaussian_process_of_their_limit(activation):
    push = Pushforward(Network(wide(1000, activation)))
    law = GaussianFamily(push.slots)
    with torch.no_grad():
        law.raw.copy_(torch.tensor(STDS).double().expm1().log())
        values = push(law.draw(3000, generator(1)), X, generator())[..., 0].double()
    expected = moment(activation)(X.double(), X.double())
    found = values.mT @ values / 3000
    diagonal = expected.diagonal()
    error = ((diagonal[:, None] * diagonal + expected.square()) / 3000).sqrt()
    # 120 entries at five standard errors; the width adds moments of order 1 / 1000 to the law, not to its covariance
    assert bool(((found - expected).abs() < 5 * error).all())
    kurtosis = (values / values.std(0)).pow(4).mean() - 3.0
    assert abs(float(kurtosis)) < 0.35  # standard error 0.09 where points are as good as one


def test_matching_to_its_own_limit_recovers_the_deviations():
    activation = nn.ReLU()
    target = GP(Kernel("limit", moment(activation)))
    options = {"distance": "moments", "steps": 150, "num_functions": 256, "lr": 0.05, "progress": False}
    prior = bdl.functional.match(wide(300, activation), target, X, measurement=Fixed(X), **options)
    fit, found = prior.report.fit, [v["std"] for v in prior.report.parameters.values()]
    assert fit.covariance_error < 2.5 * fit.floor < 0.5 * prior.report.before.covariance_error
    # only products are determined by functions of a ReLU: its scale moves between the layers
    assert found[0] * found[2] == pytest.approx(STDS[0] * STDS[2], rel=0.1)
    assert found[1] * found[2] == pytest.approx(STDS[1] * STDS[2], rel=0.35)


def test_latents_of_classes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(40, 2, generator=generator())
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    target = GP(lengthscale=1.5, variance=4.0, outputs=3)
    options = {"distance": "energy", "steps": 80, "num_functions": 64, "progress": False}
    prior = bdl.functional.match(net, target, x, **options)
    assert prior.report.fit.std[0] == pytest.approx(2.0, rel=0.3)
    assert prior.report.fit.covariance_error < 0.6 * prior.report.before.covariance_error
    bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", prior=prior, progress=False)
    assert bool((bayes(x).epistemic >= 0).all())


def test_an_empirical_set_of_functions():
    """Curves that were observed: here all of one shape, a third as large as the network's own at the start."""
    net = wide(30, nn.Tanh())
    observed = GP(lengthscale=2.0, variance=0.1).sample(X, 400, generator(3))
    options = {"distance": "energy", "steps": 120, "num_functions": 128, "progress": False}
    prior = bdl.functional.match(net, Functions(observed), X, measurement=Fixed(X), **options)
    assert prior.report.fit.std[0] == pytest.approx(math.sqrt(0.1), rel=0.2)
    assert prior.report.fit.covariance_error < 0.35 < 2.0 < prior.report.before.covariance_error


def test_another_networks_functions():
    """Any object that draws functions is a target: the prior of a wide network, given to a narrow one."""
    teacher = wide(200, nn.Tanh())
    weights = bdl.GaussianPrior({"0.weight": 0.5, "0.bias": 2.0, "2.weight": 400.0, "2.bias": 10.0})
    shapes = dict(teacher.named_parameters())

    class Teacher:
        outputs = 1

        def sample(self, inputs, n, source):
            draws = [weights.sample(shapes, source) for _ in range(n)]
            with torch.no_grad():
                return torch.stack([torch.func.functional_call(teacher, d, (inputs,)) for d in draws]).double()

    options = {"distance": "energy", "steps": 60, "num_functions": 64, "progress": False}
    prior = bdl.functional.match(wide(20, nn.Tanh()), Teacher(), X, **options)
    assert prior.report.fit.covariance_error < 0.4 < 0.5 * prior.report.before.covariance_error


def digits():
    from sklearn.datasets import load_digits

    x = torch.as_tensor(load_digits().data).float() / 16
    return x - x.mean(0)


def autoencoder():
    torch.manual_seed(0)
    sizes = (64, 24, 6, 24, 64)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def test_reconstructions_are_draws_of_the_datas_own_space():
    net, x = autoencoder(), digits()[:7]
    push = Pushforward(Network(net))
    weights = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in net.named_parameters()}
    values = Reconstructions(push)(weights, x, generator())
    assert values.shape == (14, 64, 1)
    doubled = {name: value[1] for name, value in weights.items()}
    expected = torch.cat([net(x), torch.func.functional_call(net, doubled, (x,))])
    torch.testing.assert_close(values[..., 0], expected)
    rows = Data(x).sample(x, 2, generator())
    assert rows.shape == (14, 64, 1) and bool((rows[:, None, :, 0] == x.double()).all(2).any(1).all())


@pytest.mark.parametrize("name", ["dsw", "sw"])
def test_the_prior_of_an_autoencoder_comes_from_its_data(name):
    """The target are the data themselves; before, reconstructions of centred digits vary three times as much."""
    distance = DistributionalSliced(directions=32, inner_steps=5) if name == "dsw" else name
    options = {"distance": distance, "steps": 60, "num_functions": 16, "progress": False}
    prior = bdl.functional.match(autoencoder(), digits(), digits(), **options)
    fit, before = prior.report.fit, prior.report.before
    assert abs(math.log(fit.std[0] / fit.target_std[0])) < 0.25 < 0.8 < math.log(before.std[0] / before.target_std[0])
    trace = prior.report.trace
    assert sum(trace[-10:]) < 0.5 * sum(trace[:3]) * 10 / 3
    again = bdl.functional.match(autoencoder(), digits(), digits(), **{**options, "steps": 2})
    assert again == bdl.functional.match(autoencoder(), digits(), digits(), **{**options, "steps": 2})


def test_data_that_are_no_target():
    net, x = autoencoder(), digits()
    with pytest.raises(ShapeError, match="expected \\(N, features\\)"):
        bdl.functional.match(net, x[:, 0], x, progress=False)
    with pytest.raises(NonFiniteError, match="given as the target"):
        bdl.functional.match(net, x * math.nan, x, progress=False)
    with pytest.raises(ShapeError, match="the target's"):
        bdl.functional.match(net, x[:, :5], x, progress=False)
