"""What is kept of a network: which tensors, under which names, in which dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bayesdl as bdl
from bayesdl.errors import NonFiniteError, StaleModelError
from bayesdl.samplers import SGLD
from tests.samplers.loops import N, backward, batch, network, run_sgld, sgld, source_of, state


def test_half_precision_parameters_are_kept_as_their_float32_copies() -> None:
    net = network().bfloat16()
    sampler = sgld(net, master=True, lr=1e-3)
    chain = bdl.Chain(net, sampler=sampler)
    x, y = batch(0)
    for _ in range(3):
        sampler.zero_grad()
        nn.functional.cross_entropy(net(x.bfloat16()).float(), y).backward()
        sampler.step()
        chain.step()
    weight = chain.posterior().snapshots["0.weight"]
    assert weight.dtype is torch.float32 and not torch.equal(weight[1], weight[2])
    assert not torch.equal(weight[2], weight[2].bfloat16().float())  # more digits than the network has
    bdl.BayesianModel(net, chain.posterior(), "categorical")(x)


def test_differences_in_bfloat16() -> None:
    net = network()
    start = state(net)
    chain, left = run_sgld(net, 12, dtype="bfloat16-delta", burn_in=4)
    for name, values in chain.posterior().snapshots.items():
        exact = torch.stack([one[name] for one in left[4:]])
        delta = exact - start[name]
        assert values.dtype is torch.float32
        # rounding to the nearest of 8 bits (an error of at most 2^-8 of the value), and that of the float32 sum
        assert bool(((values - exact).abs() <= 2.0**-8 * delta.abs() + 1e-7).all())
        assert not torch.equal(values, exact)


def test_subsets_keep_their_own_tensors_alone() -> None:
    net = network(norm=True).eval()
    net[0].requires_grad_(False)
    sampler = SGLD(net[3].named_parameters(), 0.05, N, generator=source_of(0))
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(3):
        backward(net, k)
        sampler.step()
        chain.step()
    posterior = chain.posterior()
    assert set(posterior.snapshots) == {"3.weight", "3.bias"}
    x = batch(7)[0]
    probs = torch.stack(
        [
            functional_call(net, {name: v[s] for name, v in posterior.snapshots.items()}, (x,)).softmax(-1)
            for s in range(3)
        ]
    )
    assert torch.allclose(bdl.BayesianModel(net, posterior, "categorical")(x).mean, probs.mean(0), atol=1e-6)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    backward(net, 5)
    with pytest.raises(StaleModelError, match=r"parameter '0.weight' is not sampled and was written to"):
        sampler.step()


def test_names_are_those_of_the_plain_network() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    chain = bdl.Chain(compiled, thin=1)
    for k in range(2):
        backward(net, k)
        optimizer.step()
        chain.step()
    assert set(chain.posterior().snapshots) == {name for name, _ in net.named_parameters()}


def test_tied_parameters_are_kept_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    chain = bdl.Chain(net)
    chain.step()
    chain.step()
    posterior = chain.posterior()
    assert set(posterior.snapshots) == {"0.weight", "0.bias", "2.bias"}
    x = torch.randn(5, 4, generator=source_of(0))
    expected = net(x).detach().softmax(-1)
    assert torch.allclose(bdl.BayesianModel(net, posterior, "categorical")(x).mean, expected, atol=1e-6)


def test_weights_that_are_not_finite_are_never_kept() -> None:
    net = network()
    chain = bdl.Chain(net)
    chain.step()
    with torch.no_grad():
        net[2].weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter '2.weight' holds NaN"):
        chain.step()
    assert len(chain) == 1 and len(chain.records) == 1
