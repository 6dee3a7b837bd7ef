"""How several chains run is chosen without moving any of them, and never by the clock unless that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.methods import parallel
from bayesdl.methods.chains import Job
from tests.methods.test_batched import loader, net, sampled
from tests.untouched import untouched


class DependsOnData(nn.Module):
    """A branch on a value of a tensor, which cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out if bool(out.detach().sum() < 1e6) else out * 2


def same(a: bdl.BayesianModel, b: bdl.BayesianModel) -> bool:
    return all(torch.equal(a.posterior.snapshots[name], value) for name, value in b.posterior.snapshots.items())


def said(bayes: bdl.BayesianModel) -> str:
    return "\n".join(f"{f.text} | {f.action}" for f in bayes.diagnose().findings if f.topic == parallel.TOPIC)


@pytest.mark.parametrize(("seconds", "way"), [((1.0, 2.0), "sequential"), ((2.0, 1.0), "batched")])
def test_the_faster_way_is_taken_and_moves_nothing(
    seconds: tuple[float, float], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit is that of the way chosen without a trial: the trial's chains leave no trace."""
    measured: list[tuple[float, float]] = []
    original = parallel.seconds_a_step

    def steered(jobs: Sequence[Job]) -> tuple[float, float]:
        measured.append(original(jobs))
        return seconds

    monkeypatch.setattr(parallel, "seconds_a_step", steered)
    torch.manual_seed(3)
    before, network = torch.get_rng_state(), net()
    torch.set_rng_state(before)
    with untouched(network):
        chosen = sampled(network, "sghmc", "fastest")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(chosen, sampled(net(), "sghmc", way))
    assert len(measured) == 1 and min(measured[0]) > 0
    assert "takes 1e+03 ms apart, 2e+03 ms together" in said(chosen) or "2e+03 ms apart, 1e+03" in said(chosen)
    assert f'parallel="{way}" for the same bits' in said(chosen)


def test_the_choice_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clock runs only while chains share a pass, one after another is faster, and the other way round."""
    for slow, expected in (("step_together", "one after another"), ("advance", "share one pass")):
        clock, original = [0.0], getattr(parallel, slow)

        def ticking(*arguments: Any, original: Any = original, clock: list[float] = clock) -> None:
            clock[0] += 1.0
            original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(parallel, slow, ticking)
            patch.setattr(parallel, "_now", lambda device, clock=clock: clock[0])
            assert expected in said(sampled(net(), "sgld", "fastest"))


def test_auto_on_a_cpu_says_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "seconds_a_step", lambda jobs: pytest.fail("auto looked at the clock"))
    assert not said(sampled(net(), "sgld", "auto"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_auto_on_a_gpu_is_batched_where_that_is_possible() -> None:
    data = [(x.cuda(), y.cuda()) for x, y in loader()]
    for network, expected in ((net(), "3 chains share one pass"), (DependsOnData(), "cannot be vectorised")):
        method = bdl.SGMCMC("sgld", chains=3, num_samples=2, thin=1, burn_in=0, lr=0.01)
        assert expected in said(bdl.wrap(network.cuda(), method, data, likelihood="categorical", progress=False))


def test_networks_that_cannot_be_vectorised() -> None:
    found = sampled(DependsOnData(), "sgld", "fastest")
    assert "one after another: the network cannot be vectorised" in said(found)
    assert same(found, sampled(DependsOnData(), "sgld", "sequential"))
    with pytest.raises(UnsupportedError, match='use parallel="sequential": .*data-dependent control flow'):
        sampled(DependsOnData(), "sgld", "batched")
    assert "batch norm '1'" in said(sampled(net(nn.BatchNorm1d(6)), "sgld", "fastest"))


def test_chains_that_do_not_fit_together_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(parallel, "start_together", full)
    found = sampled(net(), "sgld", "fastest")
    assert "one after another: 3 of them do not fit into the memory of cpu" in said(found)
    assert same(found, sampled(net(), "sgld", "sequential"))


def test_runs_shorter_than_the_trial() -> None:
    found = sampled(net(), "cyclical", "fastest", num_samples=2, thin=1, burn_in=0, cycles=1, explore=0.0)
    assert "ms together" in said(found) and len(found.posterior) == 6


class Attends(nn.Module):
    """An operation that torch has no vectorised form of on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x.unsqueeze(1) * torch.ones(3, 1).to(x)).mean(1))
        return out


def test_operations_without_a_vectorised_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run and make no noise where batching is asked for or timed, and "auto" on a GPU leaves them alone."""
    alone, shared = (sampled(Attends(), "sgld", way, num_samples=2, thin=1) for way in ("sequential", "batched"))
    for name, value in alone.posterior.snapshots.items():
        assert torch.allclose(shared.posterior.snapshots[name], value, rtol=1e-8, atol=1e-10), name
    assert "ms together" in said(sampled(Attends(), "sgld", "fastest", num_samples=2, thin=1))
    trial = parallel._by_trial
    monkeypatch.setattr(parallel, "_by_trial", lambda jobs, device, timed: trial(jobs, device, timed=False))
    found = sampled(Attends(), "sgld", "fastest", num_samples=2, thin=1)
    assert "run one after another: torch would run them so inside a shared pass" in said(found)
    assert "3 chains share one pass a step: on cpu" in said(sampled(net(), "sgld", "fastest", num_samples=2, thin=1))


def test_workers_leave_nothing_to_measure() -> None:
    with pytest.raises(ArgumentError, match='parallel="fastest" is for one process, and workers=2'):
        sampled(net(), "sgld", "fastest", workers=2)
    assert not said(sampled(net(), "sgld", "fastest", chains=1))
