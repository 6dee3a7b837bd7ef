"""How several chains run is chosen without moving any of them, and never by the clock unless that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError, UnreachedParameterError, UnsupportedError
from bayesdl.methods import parallel, remembered, sgmcmc
from bayesdl.methods.chains import Job, Live
from bayesdl.methods.footprint import footprint
from bayesdl.tensorfile import write_described
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


CLOCK = "auto looked at the clock"


def test_auto_on_a_cpu_counts_chains_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds decide, and never the clock; what was taken is what `parallel=` of that name takes."""
    monkeypatch.setattr(parallel, "seconds_a_step", lambda jobs: pytest.fail(CLOCK))
    size = footprint_of(net())
    for small, most, chains, expected in (
        (size, 4 * size, 4, "4 chains share one pass a step: weights and activations of each take no more than"),
        (size - 1, 4 * size, 4, "chains run one after another: weights and activations of each take"),
        (size, 4 * size - 1, 4, "chains run one after another: weights and activations of all take"),
        (size, 4 * size, 3, "chains run one after another: fewer than 4"),
    ):
        monkeypatch.setattr(parallel, "SMALL", small)
        monkeypatch.setattr(parallel, "MOST", most)
        found = sampled(net(), "sgld", "auto", chains=chains, num_samples=2, thin=1)
        way = "batched" if "share one pass" in expected else "sequential"
        assert said(found).startswith(expected), said(found)
        assert ('parallel="sequential" has the same bits' in said(found)) == (way == "batched")
        assert same(found, sampled(net(), "sgld", way, chains=chains, num_samples=2, thin=1))


def footprint_of(network: nn.Module, data: Any = None) -> int:
    """What `footprint` says of one chain of a network."""
    held: list[Job] = []

    def held_up(jobs: Sequence[Job], group: None) -> tuple[bool, tuple[()]]:
        held.append(jobs[0])
        return False, ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgmcmc, "share_passes", held_up)
        method = bdl.SGMCMC("sgld", chains=2, num_samples=2, thin=1, burn_in=0, lr=0.01)
        bdl.wrap(network, method, data or loader(), likelihood="categorical", progress=False)
    return footprint(held[0])


def test_the_footprint_is_weights_and_what_the_backward_pass_needs() -> None:
    """10 examples of 4 numbers through 6 to 3, in float64: inputs and tanh are kept, and what the loss needs."""
    weights, kept = (4 * 6 + 6 + 6 * 3 + 3) * 8, (10 * 4 + 10 * 6 + 10 * 3) * 8
    loss = 10 * 3 * 8 + 2 * 10 * 8  # softmax again, labels, masks
    assert weights + kept <= footprint_of(net()) <= weights + kept + loss
    deep = footprint_of(
        nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(9)], nn.Linear(4, 3)).double()
    )
    assert deep - (9 * 20 + 15) * 8 >= 10 * 10 * 4 * 8


class Padded(nn.Module):
    """Any number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.mean(1))
        return out


@pytest.mark.parametrize("lengths", [(3, 3), (2, 3)])
def test_batches_of_unequal_shapes_are_passed_apart(lengths: tuple[int, int]) -> None:
    """Batches padded to their own longest, in another order for each chain: the same chains either way."""
    g = torch.Generator().manual_seed(0)
    examples = [(torch.randn(lengths[i % 2], 4, generator=g, dtype=torch.float64), i % 3) for i in range(12)]

    def padded(found: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = nn.utils.rnn.pad_sequence([x for x, _ in found], batch_first=True)
        return x, torch.tensor([y for _, y in found])

    data = DataLoader(examples, batch_size=2, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
    found = []
    for way in ("auto", "sequential"):
        method = bdl.SGMCMC("sghmc", chains=4, num_samples=3, thin=2, burn_in=3, lr=0.02, parallel=way)
        g = torch.Generator().manual_seed(1)
        found.append(bdl.wrap(Padded(), method, data, likelihood="categorical", generator=g, progress=False))
    assert "4 chains share one pass" in said(found[0])
    for name, value in found[1].posterior.snapshots.items():
        assert torch.allclose(found[0].posterior.snapshots[name], value, rtol=1e-8, atol=1e-10), name


class Idle(nn.Module):
    """A weight that no output depends on, of which vmap would have a gradient of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.idle = net(), nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("way", ["auto", "batched", "sequential"])
def test_weights_without_gradient_are_named_however_chains_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search for the largest curvature, which names them too, is not possible."""
    monkeypatch.setattr(sgmcmc, "largest_curvature", lambda *arguments: 1.0)
    with pytest.raises(UnreachedParameterError, match="'idle'"):
        sampled(Idle(), "sgld", way, chains=4)
    options = {"chains": 4, "num_samples": 2, "thin": 1, "options": {"allow_unused": True}}
    one, other = (sampled(Idle(), "sgld", each, **options).posterior.snapshots["idle"] for each in (way, "sequential"))
    assert torch.allclose(one, other, rtol=1e-8) and bool(one.any())


class Stop(Exception):
    """The process is killed."""


@pytest.mark.parametrize(
    ("sampler", "stop"),
    [("sgld", 0), ("sghmc", 9), ("sghmc", 50), ("sgnht", 22), ("psgld", 9), ("sa-sgld", 22), ("entropy-mcmc", 25)]
    + [("cyclical", 41)],
)
def test_a_stored_run_goes_on_as_it_began(
    sampler: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the steps of two chains, and resumed by a version with other bounds: bit for bit."""
    options: dict[str, Any] = {"chains": 4, "num_samples": 4, "thin": 3, "burn_in": 4}
    whole = sampled(net(), sampler, "auto", **options)
    assert "4 chains share one pass" in said(whole)
    calls, original = [0], Live.after

    def killed(live: Live) -> None:
        calls[0] += 1
        if calls[0] == stop + 1:
            raise Stop
        original(live)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_by_trial", lambda jobs, device, timed: (True, ()))  # its steps are not counted
        patch.setattr(Live, "after", killed)
        with pytest.raises(Stop):
            sampled(net(), sampler, "auto", store=tmp_path, **options)
    monkeypatch.setattr(parallel, "SMALL", 0)
    resumed = sampled(net(), sampler, "auto", store=tmp_path, **options)
    assert "4 chains share one pass a step, as in the run that this one goes on from" in said(resumed)
    assert same(resumed, whole) and torch.equal(resumed.posterior.weights, whole.posterior.weights)
    again = sampled(net(), sampler, "fastest", store=tmp_path, **options)  # nothing is left to do
    assert same(again, whole)


def test_stores_of_chains_apart_stay_apart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"chains": 4, "num_samples": 2, "thin": 1, "store": tmp_path}
    first = sampled(net(), "sgld", "sequential", **options)
    assert "one after another, as in the run" in said(sampled(net(), "sgld", "auto", **options))
    (tmp_path / remembered.FILE).unlink()  # as written before choices were kept
    again = sampled(net(), "sgld", "auto", **options)
    assert "one after another, as in the run" in said(again) and same(again, first)
    other = sampled(net(), "sgld", "batched", **options)
    assert "run one after another, and from here they share one pass a step" in said(other)
    assert remembered.recall(tmp_path) is True


def test_a_damaged_choice_is_named(tmp_path: Path) -> None:
    (tmp_path / remembered.FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(FileFormatError, match=remembered.FILE):
        sampled(net(), "sgld", "auto", chains=4, store=tmp_path)
    write_described(tmp_path / remembered.FILE, {"kind": "sample"}, {"x": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="kind 'sample'; expected 'passes'"):
        remembered.recall(tmp_path)


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
    assert "3 chains share one pass a step: weights" in said(sampled(net(), "sgld", "fastest", num_samples=2, thin=1))


def test_workers_leave_nothing_to_measure() -> None:
    with pytest.raises(ArgumentError, match='parallel="fastest" is for one process, and workers=2'):
        sampled(net(), "sgld", "fastest", workers=2)
    assert not said(sampled(net(), "sgld", "fastest", chains=1))
