"""Chains in a user's own loop: which theta is kept, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.samplers import SGHMC, SGLD, Batches, StochasticForwardWarning, pooled
from tests.processes import run as run_processes
from tests.samplers.loops import N, assert_equal, backward, batch, network, run_sgld, sgld, source_of, state
from tests.untouched import untouched


@pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")
def test_samples_are_the_points_that_steps_leave_with_the_buffers_of_their_own_pass() -> None:
    net = network(norm=True)
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=4, thin=3, sampler=sampler)
    left = []
    for k in range(20):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        assert chain.step() is (k in (6, 9, 12, 15, 18))
    posterior = chain.posterior()
    assert_equal(posterior, [left[k] for k in (6, 9, 12, 15, 18)])
    assert set(posterior.snapshots) == {name for name in net.state_dict() if not name.endswith("tracked")}
    assert torch.allclose(posterior.weights, torch.full((5,), 0.2))
    assert posterior.chains is not None and posterior.chains.tolist() == [0] * 5
    assert [record.step for record in chain.records] == [6, 9, 12, 15, 18]
    assert {record.h for record in chain.records} == {0.05 / N} and {r.temperature for r in chain.records} == {1.0}


def test_without_a_sampler_a_sample_is_the_network_as_it_is() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    chain = bdl.Chain(net, burn_in=2, thin=2)
    seen = []
    for k in range(8):
        loss = backward(net, k)
        optimizer.step()
        chain.step(loss=loss)
        seen.append((state(net), float(loss.detach())))
    assert_equal(chain.posterior(), [seen[k][0] for k in (3, 5, 7)])
    assert [record.loss for record in chain.records] == [seen[k][1] for k in (3, 5, 7)]
    assert chain.records[0].lr is None and chain.records[0].log_prior is None


def test_interleaved_chains_do_not_influence_each_other() -> None:
    def alone(seed: int) -> bdl.posteriors.SamplePosterior:
        net = network(seed)
        sampler = SGHMC(net.named_parameters(), 0.05, N, generator=source_of(seed))
        chain = bdl.Chain(net, 2, 2, sampler=sampler, chain_id=seed)
        for k in range(10):
            backward(net, k)
            sampler.step()
            chain.step()
        return chain.posterior()

    nets = [network(seed) for seed in (0, 1)]
    samplers = [SGHMC(net.named_parameters(), 0.05, N, generator=source_of(i)) for i, net in enumerate(nets)]
    chains = [
        bdl.Chain(net, 2, 2, sampler=s, chain_id=i) for i, (net, s) in enumerate(zip(nets, samplers, strict=True))
    ]
    for k in range(10):
        for net, sampler, chain in zip(nets, samplers, chains, strict=True):
            backward(net, k)
            sampler.step()
            chain.step()
    expected = [alone(0), alone(1)]
    for chain, one in zip(chains, expected, strict=True):
        assert all(torch.equal(value, one.snapshots[name]) for name, value in chain.posterior().snapshots.items())
    both = pooled(chains)
    assert both.chains is not None and both.chains.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(both.snapshots["0.weight"], torch.cat([one.snapshots["0.weight"] for one in expected]))


def test_predictions_save_and_load_with_chain_ids(tmp_path: Path) -> None:
    net = network()
    chain, left = run_sgld(net, 6, chain_id=5, thin=2)
    bayes = bdl.BayesianModel(net, chain.posterior(), "categorical")
    x = batch(11)[0]
    probs = torch.stack([functional_call(net, left[k], (x,)).softmax(-1) for k in (1, 3, 5)])
    assert torch.allclose(bayes(x).mean, probs.mean(0), atol=1e-6)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert torch.equal(again(x).mean, bayes(x).mean)
    assert isinstance(again.posterior, bdl.posteriors.SamplePosterior)
    assert again.posterior.chains is not None and again.posterior.chains.tolist() == [5, 5, 5]
    assert again.to(torch.float64).posterior.chains.dtype is torch.int64  # type: ignore[union-attr]


def test_the_network_and_the_global_random_state_are_left_alone() -> None:
    net = network(norm=True).eval()
    sampler = sgld(net)
    backward(net, 0)
    with untouched(net):
        chain = bdl.Chain(net, max_samples=2, keep="reservoir", probe=batch(0)[0])
        for _ in range(6):
            chain.step()
        chain.posterior()
        attached = bdl.Chain(net, sampler=sampler)
        attached.close()
    sampler.step()
    assert not attached.step() and not attached.records


def test_nothing_and_one_sample_are_errors_that_say_what_to_change() -> None:
    net = network()
    chain = bdl.Chain(net, burn_in=2)
    for number in (0, 0, 0, 1):
        with pytest.raises(NotFittedError, match=rf"{number} sample\(s\).*lower burn_in or thin"):
            chain.posterior()
        chain.step()
    assert len(chain.posterior()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burn_in": -1}, "burn_in=-1"),
        ({"thin": 0}, "thin=0"),
        ({"thin": 1.5}, "thin=1.5"),
        ({"chain_id": True}, "chain_id=True"),
        ({"keep": "first"}, "keep='first'"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"buffers": "drop"}, "buffers='drop'"),
        ({"buffers": "refresh"}, "belong together"),
        ({"data": []}, "belong together"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"collect": "time"}, "pass sampler="),
        ({"collect": "epochs"}, "collect='epochs'"),
        ({"schedule": 3}, "schedule is int; expected an object with state_dict"),
        ({"also": {"x": 3}}, "also x is int"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bdl.Chain(network(), **options)


def test_networks_and_samplers_that_do_not_belong_together() -> None:
    with pytest.raises(ArgumentError, match="4 of the sampler's 4 parameters are none of this network's"):
        bdl.Chain(network(), sampler=sgld(network()))
    with pytest.raises(ArgumentError, match="running statistics"):
        bdl.Chain(network(norm=True), buffers="shared")
    with pytest.raises(ArgumentError, match="nothing to sample"):
        bdl.Chain(network().requires_grad_(False))
    with pytest.raises(ArgumentError, match=r"a torch.nn.Module is expected, got int"):
        bdl.Chain(3)  # type: ignore[arg-type]


def test_losses_that_are_no_sums_over_the_data_are_noticed_once() -> None:
    for layer, text in (
        (nn.BatchNorm1d(6), "batch norm '1' is in train mode"),
        (nn.Dropout(), "dropout '1' is active"),
    ):
        net = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3))
        sampler = sgld(net)
        bdl.Chain(net, sampler=sampler)
        backward(net, 0)
        with pytest.warns(StochasticForwardWarning, match=text):
            sampler.step()
        sampler.step()


def test_repr_says_what_is_sampled() -> None:
    net = network()
    text = repr(bdl.Chain(net, 3, 2, sampler=sgld(net, prior_precision=25.0, temperature=0.5)))
    for part in ("0 samples", "burn_in=3", "thin=2", "T_eff=0.5", "prior sd 0.2", f"h={0.05 / N:.6g}"):
        assert part in text
    assert math.isfinite(len(text))


def test_another_number_of_data_than_the_loader_holds_is_said() -> None:
    net, data = network(), TensorDataset(torch.randn(N, 4), torch.zeros(N, dtype=torch.long))
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=source_of(0))
    for count, held in ((N, loader), (N, Batches(loader)), (4 * N, loader), (4 * N, Batches(loader)), (4 * N, None)):
        chain = bdl.Chain(net, sampler=sgld(net, num_data=count), loader=held)
        said = [f.text for f in chain.summary().findings if "num_data" in f.text]
        if count == N or held is None:
            assert not said
        else:
            assert said == [f"the sampler takes num_data={4 * N} and the loader's data set holds {N} examples: the "
                            "likelihood of each counts 4 times, the prior once"]  # fmt: skip


def _one_chain(rank: int, size: int) -> None:
    """Ranks that see a half of each batch make the chain of one process that sees all of it, up to rounding."""
    net, twin = network(), network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    options: dict[str, Any] = {"momentum": 0.7, "temperature": 0.5}
    ours, alone = (SGHMC(n.named_parameters(), 0.05, N, generator=source_of(0), **options) for n in (net, twin))
    chain = bdl.Chain(wrapped, sampler=ours)
    for k in range(6):
        x, y = batch(k)
        wrapped.zero_grad()
        nn.functional.cross_entropy(wrapped(x[rank::size]), y[rank::size]).backward()
        ours.step()
        chain.step()
        backward(twin, k)
        alone.step()
    for name, value in state(twin).items():
        assert torch.allclose(state(net)[name], value, atol=1e-6), name
    assert not torch.allclose(state(net)["0.weight"], state(network())["0.weight"], atol=1e-2)


@pytest.mark.dist
def test_a_data_parallel_chain_is_that_of_one_process() -> None:
    run_processes(_one_chain, 2)


def _data_parallel(rank: int, size: int) -> None:
    import tempfile

    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    net = network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    sampler = SGLD(net.named_parameters(), 0.05, N, generator=source_of(0))
    chain = bdl.Chain(wrapped, thin=2, sampler=sampler, store=folder[0])
    memory = bdl.Chain(net, thin=2, sampler=sampler)
    for k in range(6):
        wrapped.zero_grad()
        x, y = batch(k)
        share = slice(rank * 4, rank * 4 + 4)
        nn.functional.cross_entropy(wrapped(x[share]), y[share]).backward()
        sampler.step()
        assert chain.step() == memory.step()
    torch.distributed.barrier()
    mine, theirs = memory.posterior().snapshots, chain.posterior().snapshots
    assert set(mine) == {name for name, _ in net.named_parameters()}
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])  # rank 0's file, this rank's memory


@pytest.mark.dist
def test_one_rank_of_a_data_parallel_chain_writes() -> None:
    run_processes(_data_parallel, 2)
