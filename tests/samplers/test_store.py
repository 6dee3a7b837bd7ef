"""The folder of a chain: what is in it, what readers see, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError
from bayesdl.samplers import SGHMC, SGLD, SampleStore
from tests.samplers.runs import contents, events, network, run

pytestmark = pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")


def sampled(net: nn.Module, folder: Path | None, steps: int = 4, wide: bool = False, **options: Any) -> bdl.Chain:
    kind = SGHMC if wide else SGLD
    sampler = kind([(n, p) for n, p in net.named_parameters() if p.requires_grad], 0.02, 24,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
    chain = bdl.Chain(net, sampler=sampler, store=folder, **options)
    go(net, sampler, chain, steps)
    return chain


def go(net: nn.Module, sampler: Any, chain: bdl.Chain, steps: int) -> None:
    for k in range(steps):
        sampler.zero_grad()
        net(torch.full((4, 3), 0.1 * k)).square().mean().backward()
        sampler.step()
        chain.step(loss=0.5)


def same(a: bdl.posteriors.SamplePosterior, b: bdl.posteriors.SamplePosterior) -> bool:
    left, right = a.tensors(), b.tensors()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_files_and_lines(tmp_path: Path) -> None:
    chain = sampled(network(), tmp_path / "c", chain_id=3)
    expected = {"base.safetensors", "index.jsonl", "lock", "resume.safetensors"}
    assert {path.name for path in (tmp_path / "c").iterdir()} == expected | {
        f"sample-{i:06d}.safetensors" for i in range(4)
    }
    lines = [json.loads(line) for line in (tmp_path / "c" / "index.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        assert (line["id"], line["step"], line["chain"], line["loss"]) == (number, number, 3, 0.5)
        assert line["file"] == f"sample-{number:06d}.safetensors" and len(line["digest"]) == 64
        assert (line["lr"], line["h"], line["temperature"], line["psi"]) == (0.02, 0.02 / 24, 1.0, 1.0)
        assert line["log_prior"] < 0 and line["drops"] == []
    chain.close()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16-delta"}, {"dtype": "float64"}, {"max_samples": 2}])
def test_a_store_holds_what_memory_would(options: dict[str, Any], tmp_path: Path) -> None:
    net = network()
    chain = sampled(net, tmp_path / "c", **options)
    memory = sampled(network(), None, **options)
    assert same(chain.posterior(), memory.posterior())
    assert same(SampleStore(tmp_path / "c").posterior(net), memory.posterior())
    assert SampleStore(tmp_path / "c").chain == 0
    chain.close()


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16-delta", 2), ("float64", 8)])
def test_bytes_per_parameter(dtype: str, width: int, tmp_path: Path) -> None:
    net = nn.Linear(300, 100)
    sampled_net = nn.Sequential(nn.Linear(3, 300), net)
    chain = sampled(sampled_net, tmp_path / "c", steps=2, dtype=dtype)
    count = sum(p.numel() for p in sampled_net.parameters())
    size = (tmp_path / "c" / "sample-000001.safetensors").stat().st_size
    assert 0 <= size - width * count < 1500  # names and checksum
    chain.close()


def test_a_last_layer_s_chain_stores_the_last_layer_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2000), nn.ReLU(), nn.Linear(2000, 2))
    net[0].requires_grad_(False)
    chain = sampled(net, tmp_path / "c")
    chain.close()
    own = 4 * sum(p.numel() for p in net[2].parameters())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir()}
    assert all(size < own + 1500 for name, size in sizes.items() if name.startswith("sample"))
    assert sum(sizes.values()) < 5 * own + 24_000, sizes  # with the index and the states of two generators
    posterior = SampleStore(tmp_path / "c").posterior(net)
    assert set(posterior.snapshots) == {"2.weight", "2.bias"}
    again = bdl.Chain(net, store=tmp_path / "c")
    with pytest.raises(FileFormatError, match=r"sampler='sgld', and this chain has sampler=None"):
        again.resume()
    with torch.no_grad():
        net[0].weight[5, 1] += 1e-3
    with pytest.raises(FileFormatError, match="another network: it has other values of the parameters"):
        SampleStore(tmp_path / "c").posterior(net)


@pytest.mark.parametrize("keep", ["last", "reservoir"])
def test_the_folder_is_bounded(keep: str, tmp_path: Path) -> None:
    chain = sampled(network(), tmp_path / "c", steps=12, max_samples=3, keep=keep)
    files = {path.name for path in (tmp_path / "c").glob("sample-*")}
    assert files == {record.file for record in chain.kept} and len(files) == 3
    assert len(SampleStore(tmp_path / "c").records()) == 12
    assert [record.id for record in SampleStore(tmp_path / "c").kept()] == [record.id for record in chain.kept]
    chain.close()


def test_readers_while_it_is_written(tmp_path: Path) -> None:
    net = network()
    sampler = SGLD(net.named_parameters(), 0.02, 24, generator=torch.Generator().manual_seed(0))
    chain = bdl.Chain(net, sampler=sampler, store=tmp_path / "c", max_samples=3)
    go(net, sampler, chain, 4)
    seen: list[list[int]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        store, plain = SampleStore(tmp_path / "c"), network()
        try:
            while not done.is_set():
                posterior = store.posterior(plain)
                assert len(posterior) == 3
                seen.append([record.id for record in store.kept()])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    go(net, sampler, chain, 60)
    done.set()
    reader.join()
    assert not failures, failures
    assert len({tuple(ids) for ids in seen}) > 3
    chain.close()


def test_a_line_that_was_torn_is_not_read(tmp_path: Path) -> None:
    sampled(network(), tmp_path / "c").close()
    index = tmp_path / "c" / "index.jsonl"
    content = index.read_bytes()
    index.write_bytes(content[:-20])
    assert len(SampleStore(tmp_path / "c").kept()) == 3
    index.write_bytes(content.replace(b'"step": 1', b'"steq": 1'))
    with pytest.raises(FileFormatError, match="line 2 is damaged"):
        SampleStore(tmp_path / "c").kept()


def test_samples_are_checked_against_the_index(tmp_path: Path) -> None:
    net = network()
    chain = sampled(net, tmp_path / "c")
    chain.close()
    files = sorted((tmp_path / "c").glob("sample-*"))
    shutil.copy(files[0], files[2])
    for read in (chain.posterior, lambda: SampleStore(tmp_path / "c").posterior(net)):
        with pytest.raises(FileFormatError, match="is not the sample that the index speaks of"):
            read()
    raw = bytearray(files[1].read_bytes())
    raw[-3] ^= 1
    files[1].write_bytes(raw)
    with pytest.raises(FileFormatError, match="do not match their checksum"):
        chain.posterior()
    files[3].unlink()
    again = bdl.Chain(net, sampler=chain.sampler, store=tmp_path / "c")
    with pytest.raises(FileFormatError, match=r"sample-000003.safetensors is missing"):
        again.resume()


def test_chains_of_other_networks_and_settings_are_refused(tmp_path: Path) -> None:
    sampled(network(), tmp_path / "c", burn_in=1).close()

    def chain(net: nn.Module, **options: Any) -> bdl.Chain:
        return bdl.Chain(net, sampler=SGLD(net.named_parameters(), 0.02, 24), store=tmp_path / "c", **options)

    before = contents(tmp_path / "c")
    wider = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    with pytest.raises(FileFormatError, match="another network: it has other sampled parameters"):
        chain(wider, burn_in=1).resume()
    for options in ({"thin": 2}, {"dtype": "float64"}, {"max_samples": 9}, {"chain_id": 1}):
        with pytest.raises(FileFormatError, match=f"{next(iter(options)).removesuffix('_id')}="):
            chain(network(), **{"burn_in": 1, **options}).resume()
    assert contents(tmp_path / "c") == before
    (tmp_path / "c" / "resume.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"holds samples and no resume.safetensors"):
        chain(network(), burn_in=1).resume()
    with pytest.raises(FileFormatError, match="does not exist"):
        SampleStore(tmp_path)


def test_one_process_writes(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    sampled(network(), folder).close()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder / "lock")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        net = network()
        chain = bdl.Chain(net, sampler=SGLD(net.named_parameters(), 0.02, 24), store=folder)
        with pytest.raises(ArgumentError, match="another process is writing the chain"):
            chain.resume()
        other.communicate(b"\n")
    assert chain.resume()


def test_a_plan_that_the_disk_cannot_hold_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 50))
    count = sum(p.numel() for p in net.parameters())

    def left(samples: float) -> Callable[[Any], Any]:
        return lambda path: SimpleNamespace(free=int(4 * count * samples))

    with monkeypatch.context() as patched:
        patched.setattr("bayesdl.samplers.storing.shutil.disk_usage", left(10))
        with pytest.raises(ArgumentError, match=r"the chain with max_samples=20 takes 5\.\d MiB: lower max_samples"):
            sampled(net, tmp_path / "a", max_samples=20)
        sampled(net, tmp_path / "b", max_samples=4).close()
    assert not list((tmp_path / "a").glob("*.safetensors"))
    chain = sampled(net, tmp_path / "c", steps=2)
    with monkeypatch.context() as patched:
        patched.setattr("bayesdl.samplers.storing.shutil.disk_usage", left(0.5))
        with pytest.raises(ArgumentError, match=r"the next sample takes 0\.2 MiB"):
            go(net, chain.sampler, chain, 1)
    go(net, chain.sampler, chain, 2)
    assert len(SampleStore(tmp_path / "c").posterior(net)) == 4
    chain.close()


def test_a_disk_that_fills_up_at_any_write_leaves_a_store_that_goes_on(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole, _ = run(tmp_path / "whole", "sgld", thin=7)
    whole.close()
    expected = contents(tmp_path / "whole")
    with events(None) as count:
        run(tmp_path / "count", "sgld", thin=7)[0].close()
    refused = 0
    for number in range(12, count[0] + 1, 7):  # the first events are those of the folder itself
        folder = tmp_path / str(number)
        try:
            with events(number, full):
                run(folder, "sgld", thin=7)[0].close()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
        # in the same process: the writer's lock has gone with its chain
        run(folder, "sgld", thin=7)[0].close()
        assert contents(folder) == expected, number
    assert refused > 3


def test_a_chain_goes_on_after_a_write_that_failed(tmp_path: Path) -> None:
    net = network()
    chain = sampled(net, tmp_path / "c", steps=2)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in (1, 2, 4, 6, 8, 9, 11):
        before = len(chain.records)
        with events(number, full), pytest.raises(OSError, match="No space left"):
            go(net, chain.sampler, chain, 1)
        assert len(SampleStore(tmp_path / "c").records()) == len(chain.records) in (before, before + 1)
        go(net, chain.sampler, chain, 1)
        assert same(SampleStore(tmp_path / "c").posterior(net), chain.posterior())
        assert not list((tmp_path / "c").glob(".*"))
    chain.close()


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    net = network().eval()
    chain = bdl.Chain(net, store=tmp_path / "c")
    chain.step()
    before = contents(tmp_path / "c")
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"parameter '0.weight'"):
        chain.step()
    assert contents(tmp_path / "c") == before
    chain.close()


def test_folders_are_let_go_of_with_their_chain(tmp_path: Path) -> None:
    net = network().eval()
    for _ in range(2):  # no close(): the lock goes with the object, without a warning
        chain = bdl.Chain(net, store=tmp_path / "c")
        chain.resume()
        chain.step()
        del chain
    assert len(SampleStore(tmp_path / "c").records()) == 2
