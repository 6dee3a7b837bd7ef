"""What is recorded beside the parameters of a sample."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from bayesdl.samplers import SGLD
from tests.samplers.loops import N, backward, batch, network, run_sgld, sgld, source_of


def test_log_prior_and_loss_are_those_of_the_sample() -> None:
    net = network()
    sampler = SGLD(
        [{"params": net[0].parameters(), "prior_precision": 3.0}, {"params": net[2].parameters()}],
        0.05,
        N,
        generator=source_of(0),
    )
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(3):
        backward(net, k)
        expected = -sum(
            lam / 2 * float(p.detach().double().square().sum())
            for lam, part in ((3.0, net[0]), (1.0, net[2]))
            for p in part.parameters()
        )
        sampler.step()
        chain.step()
        assert chain.records[-1].log_prior == pytest.approx(expected, rel=1e-6)
    heavy = bdl.StudentTPrior(df=4.0)
    sampler = sgld(net, prior=heavy)
    chain = bdl.Chain(net, sampler=sampler)
    backward(net, 0)
    density = float(heavy.log_prob({name: p.detach() for name, p in net.named_parameters()}))
    sampler.step()
    chain.step()
    assert chain.records[-1].log_prior == pytest.approx(density, rel=1e-6)
    unknown = bdl.HorseshoePrior()  # its scales are drawn: no density in closed form
    sampler = sgld(net, prior=unknown)
    chain = bdl.Chain(net, sampler=sampler)
    backward(net, 0)
    sampler.step()
    chain.step()
    assert chain.records[-1].log_prior is None


def test_probes_are_outputs_at_the_samples() -> None:
    x = batch(3)[0]
    net = network(norm=True).eval()
    chain, left = run_sgld(net, 4, probe=x)
    expected = torch.stack([functional_call(net, one, (x,)) for one in left])
    assert torch.allclose(chain.probes(), expected, atol=1e-6) and chain.probes().shape == (4, 8, 3)
    assert not any(name.startswith(".") for name in chain.posterior().snapshots)
    with pytest.raises(UnsupportedError, match="probe=inputs"):
        bdl.Chain(net).probes()


@pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")
def test_refreshed_statistics_are_those_of_one_pass_at_the_sample() -> None:
    net = network(norm=True)
    data = [batch(k) for k in range(20, 25)]
    chain, left = run_sgld(net, 4, buffers="refresh", data=data, burn_in=2)
    posterior = chain.posterior()
    for row, one in enumerate(left[2:]):
        hidden = [x @ one["0.weight"].T + one["0.bias"] for x, _ in data]
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        variance = torch.stack([h.var(0) for h in hidden]).mean(0)
        assert torch.allclose(posterior.snapshots["1.running_mean"][row], mean, atol=1e-5)
        assert torch.allclose(posterior.snapshots["1.running_var"][row], variance, atol=1e-5)
        assert torch.equal(posterior.snapshots["0.weight"][row], one["0.weight"])
