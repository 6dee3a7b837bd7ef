"""Interrupted chains go on bit for bit, whenever and however often they are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers import SGLD, Batches, ResumeWarning
from bayesdl.samplers.packing import pack, unpack
from tests.samplers.runs import RUNS, STEPS, contents, network, run

pytestmark = pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")
ROOT = Path(__file__).parents[2]


def killed(how: str, names: str, folder: Path, number: int, **options: Any) -> None:
    """Kill chains in processes of their own; see `tests.samplers.runs`."""
    arguments = [how, names, str(folder), str(number), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.samplers.runs", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "all equal", done.stderr[-3000:]


@pytest.mark.parametrize("name", RUNS)
def test_every_sampler_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, weights = run(tmp_path / "whole", name)
    whole.close()
    for stop in (7, 13, 20):
        folder = tmp_path / str(stop)
        run(folder, name, stop=stop)[0].close()
        chain, again = run(folder, name, seed=1 if not list(folder.glob("sample-*")) else 5)
        assert torch.equal(again, weights), (name, stop)
        assert contents(folder) == contents(tmp_path / "whole")
        assert chain.records == whole.records and chain.steps == STEPS
        chain.close()


def test_killed_between_any_two_writes(tmp_path: Path) -> None:
    killed("everywhere", "sgld", tmp_path / "a", 6, burn_in=8, thin=7)
    killed("everywhere", "sgld", tmp_path / "b", 7, burn_in=8, thin=7, max_samples=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_sampler_killed_between_any_two_writes(name: str, tmp_path: Path) -> None:
    killed("everywhere", name, tmp_path, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_samples": 2, "thin": 2},
        {"max_samples": 2, "thin": 2, "keep": "reservoir"},
        {"dtype": "bfloat16-delta"},
        {"checkpoint_every": 3},
        {"thin": 1, "max_samples": 4, "collect": "time"},
    ],
)
def test_every_option_killed_between_any_two_writes(options: dict[str, Any], tmp_path: Path) -> None:
    killed("everywhere", "sa-sgld", tmp_path, 11, **options)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    killed("random", "sgld,sa-sgld,cyclical-sghmc,structured", tmp_path, 5, max_samples=3, thin=2)


def test_first_starts_and_wrong_moments(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(ArgumentError, match="pass store="):
        bdl.Chain(net).resume()
    chain = bdl.Chain(net, store=tmp_path / "c")
    assert chain.resume() is False and not (tmp_path / "c").exists()
    with pytest.raises(ArgumentError, match="comes after chain.step"):
        chain.checkpoint()
    chain.step()
    with pytest.raises(ArgumentError, match="has begun already"):
        chain.resume()
    chain.close()
    other = bdl.Chain(net, store=tmp_path / "c")
    with pytest.raises(ArgumentError, match=r"holds a chain already: call chain.resume\(\)"):
        other.step()


def test_resume_files_can_be_written_between_samples(tmp_path: Path) -> None:
    net = network().eval()
    chain = bdl.Chain(net, burn_in=100, store=tmp_path / "c")
    for _ in range(7):
        chain.step()
    chain.checkpoint()
    chain.step()
    chain.close()
    again = bdl.Chain(network(3).eval(), burn_in=100, store=tmp_path / "c")
    assert again.resume() and again.steps == 7 and not again.records
    again.close()
    every = bdl.Chain(net, burn_in=100, store=tmp_path / "d", checkpoint_every=4)
    for _ in range(7):
        every.step()
    every.close()
    again = bdl.Chain(net, burn_in=100, store=tmp_path / "d", checkpoint_every=4)
    assert again.resume() and again.steps == 4


def test_whatever_has_a_state_comes_along(tmp_path: Path) -> None:
    def start(seed: int) -> tuple[Any, ...]:
        net = network(seed).eval()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        source = torch.Generator().manual_seed(seed)
        also = {"optimizer": optimizer, "noise": source}
        return net, optimizer, rates, source, bdl.Chain(net, thin=2, store=tmp_path / "c", schedule=rates, also=also)

    def go(net: Any, optimizer: Any, rates: Any, source: Any, chain: bdl.Chain, stop: int) -> torch.Tensor:
        while chain.steps < stop:
            optimizer.zero_grad()
            net(torch.randn(4, 3, generator=source)).square().mean().backward()
            optimizer.step()
            rates.step()
            chain.step()
        return torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    first = start(0)
    middle = go(*first, stop=6)
    first[-1].close()
    second = start(1)
    assert second[-1].resume()
    assert torch.equal(go(*second, stop=6), middle)
    second[-1].close()
    whole = start(0)
    whole_weights = go(*whole[:-1], bdl.Chain(whole[0]), stop=11)
    third = start(2)
    assert third[-1].resume() and third[2].get_last_lr() == second[2].get_last_lr()
    assert torch.equal(go(*third, stop=11), whole_weights)
    third[-1].close()
    fourth = bdl.Chain(network(), thin=2, store=tmp_path / "c", also={"scaler": torch.amp.GradScaler("cpu")})
    with pytest.raises(ArgumentError, match="no state of 'also scaler'"):
        fourth.resume()


def test_loaders_without_a_state_are_spoken_of(tmp_path: Path) -> None:
    net, data = network().eval(), [torch.zeros(1)]
    chain = bdl.Chain(net, store=tmp_path / "c", loader=data)
    chain.step()
    chain.close()
    with pytest.warns(ResumeWarning, match="its order of the data was not restored"):
        bdl.Chain(net, store=tmp_path / "c", loader=data).resume()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_go_on_in_the_middle_of_an_epoch(workers: int) -> None:
    def loader(seed: int) -> Batches:
        data = torch.utils.data.TensorDataset(torch.arange(23.0))
        own: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "num_workers": workers}
        return Batches(torch.utils.data.DataLoader(data, 4, shuffle=True, **own))

    whole = loader(0)
    epochs = [[batch[0].tolist() for batch in whole] for _ in range(3)]
    assert epochs[0] != epochs[1] and len(whole) == 6 and whole.epoch == 3
    for stop in (0, 1, 5, 6) if workers == 0 else (5,):
        first, seen = loader(0), []
        list(first)
        for batch in first:
            if len(seen) == stop:
                break
            seen.append(batch[0].tolist())
            saved = first.state_dict()
        saved = saved if stop else {**first.state_dict(), "position": 0}
        second = loader(9)
        second.load_state_dict(json_round(saved))
        rest = [batch[0].tolist() for batch in second]
        assert seen + rest == epochs[1]
        assert [batch[0].tolist() for batch in second] == epochs[2] and second.epoch == 3


def json_round(tree: Any) -> Any:
    packed, tensors = pack(tree)
    return unpack(json.loads(json.dumps(packed)), tensors)


def test_loaders_that_shuffle_by_global_state_are_refused() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    with pytest.raises(ArgumentError, match="pass generator="):
        Batches(torch.utils.data.DataLoader(data, 4, shuffle=True))
    assert Batches(torch.utils.data.DataLoader(data, 4)).state_dict()["generators"] == []
    seeded = Batches(torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator()))
    with pytest.raises(ArgumentError, match="a loader with 0 generators, and this one has 1"):
        seeded.load_state_dict({"epoch": 0, "position": 0, "generators": []})


def test_states_are_packed_with_their_types() -> None:
    tree = {0: [1, 2.5, None, True, "a", (3, torch.arange(3))], "x": {"y": {}, 2.0: float("inf")}, "0": ()}
    found = json_round(tree)
    assert list(found) == [0, "x", "0"] and found["x"] == tree["x"] and found["0"] == ()
    assert found[0][:5] == tree[0][:5] and found[0][5][0] == 3  # type: ignore[index]
    assert torch.equal(found[0][5][1], torch.arange(3))
    with pytest.raises(FileFormatError, match=r"state.a.1 is function"):
        pack({"a": [1, lambda: 0]})
    with pytest.raises(FileFormatError, match=r"state has the key \(1, 2\)"):
        pack({(1, 2): 3})


def test_only_the_chain_s_own_noise_is_restored(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    sampler = SGLD(net.parameters(), 0.1, 10, generator=torch.Generator().manual_seed(0))
    chain = bdl.Chain(net, sampler=sampler, store=tmp_path / "c")
    for _ in range(2):
        net(torch.ones(1, 2)).square().mean().backward()
        sampler.step()
        chain.step()
    chain.close()
    before = torch.get_rng_state()
    assert bdl.Chain(net, sampler=sampler, store=tmp_path / "c").resume()
    assert torch.equal(torch.get_rng_state(), before)
