"""Fits by hand and across interruptions: the same bits as in one go, at any batch, in any pass."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bayesdl as bdl
from bayesdl.curvature import Accumulator
from bayesdl.curvature.structure import Structure
from bayesdl.errors import (
    ArgumentError,
    FileFormatError,
    LabelError,
    NonFiniteError,
    NotFittedError,
    UnsupportedError,
)
from tests.untouched import untouched

ROOT = Path(__file__).parent.parent.parent
STRUCTURES: tuple[Any, ...] = ("full", "diag", "kron", "ekfac", "lowrank", {"0": "lowrank", "*": "ekfac"})


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(likelihood: str = "categorical", count: int = 17) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, dtype=torch.float64, generator=g)
    y = torch.randint(2, (count,), generator=g) if likelihood == "categorical" else torch.randn(count, 2, generator=g)
    return list(zip(x.split(4), y.split(4), strict=True))


def by_hand(acc: Accumulator, batches: list[Any]) -> Structure:
    """The rest of the fit, whatever was read before."""
    while True:
        for number, batch in enumerate(batches):
            if number >= acc.batches:
                acc.update(batch)
        if not acc.next_pass():
            return acc.result()


def same_bits(one: Structure, other: Structure) -> None:
    mine, theirs = one.tensors(), other.tensors()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("kind", ["ggn", "mc"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_by_hand_and_interrupted_everywhere(structure: Any, kind: str, tmp_path: Path) -> None:
    net, batches = network(), data()
    options: dict[str, Any] = {"structure": structure, "kind": kind, "samples": 2}
    whole = bdl.curvature.estimate(net, batches, "categorical", progress=False, **options)
    with untouched(net):
        same_bits(by_hand(Accumulator(net, "categorical", **options), batches), whole)
    path, steps = tmp_path / "fit.safetensors", 0
    while True:  # a new process, so to speak, for every single batch
        acc = Accumulator(net, "categorical", **options)
        assert acc.resume(path) is (steps > 0)
        if acc.batches == len(batches) and not acc.next_pass():
            break
        acc.update(batches[acc.batches])
        acc.save(path)
        steps += 1
    assert steps == len(batches) * {"ekfac": 2, "lowrank": 3}.get(
        structure if isinstance(structure, str) else "lowrank", 1
    )
    same_bits(acc.result(), whole)


def test_open_noise_keeps_the_parts_of_all_outputs(tmp_path: Path) -> None:
    net, batches = network(), data("gaussian")
    path = tmp_path / "fit.safetensors"
    for structure in ("kron", "ekfac"):
        straight = Accumulator(net, "gaussian", structure=structure)
        by_hand(straight, batches)
        acc = Accumulator(net, "gaussian", structure=structure)
        acc.update(batches[0])
        acc.save(path)
        acc = Accumulator(net, "gaussian", structure=structure)
        acc.resume(path)
        by_hand(acc, batches)
        a, b = acc.fit(), straight.fit()
        assert (a.num_data, a.log_likelihood) == (b.num_data, b.log_likelihood) == (17, b.log_likelihood)
        assert a.squared_error is not None and b.squared_error is not None
        assert torch.equal(a.squared_error, b.squared_error)
        assert len(a.parts) == len(b.parts) == 2
        for mine, theirs in zip(a.parts, b.parts, strict=True):
            same_bits(mine, theirs)


def test_a_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    net, batches = network(), data()

    def fresh() -> Accumulator:
        return Accumulator(net, "categorical", kind="mc", generator=torch.Generator().manual_seed(5), structure="ekfac")

    whole = by_hand(fresh(), batches)
    acc = fresh()
    for batch in batches:
        acc.update(batch)
    assert acc.next_pass()
    acc.update(batches[0])
    acc.save(tmp_path / "f")
    other = fresh()
    other.resume(tmp_path / "f")
    same_bits(by_hand(other, batches), whole)


def test_wrap_and_estimate_resume(tmp_path: Path) -> None:
    net, batches = network(), data()
    path = tmp_path / "fit.safetensors"

    class Dying(list[Any]):
        """Fails at the third batch of the second pass."""

        reads = 0

        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(list.__iter__(self)):
                Dying.reads += number == 0
                if Dying.reads == 4 and number == 3:  # two looks at the first batch come before
                    raise ConnectionError("gone")
                yield batch

    whole = bdl.wrap(net, bdl.Laplace(structure="ekfac"), batches, likelihood="categorical", progress=False)
    method = bdl.Laplace(structure="ekfac", resume=path, every=2)
    dying = Dying(batches)
    died = 0
    for _ in range(5):
        try:
            found = bdl.wrap(net, method, dying, likelihood="categorical", progress=False)
        except ConnectionError:
            died += 1
        else:
            break
    assert died == 1 and path.is_file()
    assert torch.equal(found.log_evidence(), whole.log_evidence())
    x = batches[0][0]
    assert torch.equal(found(x).mean, whole(x).mean)
    # a finished file answers without a single batch of its own
    again = bdl.curvature.estimate(net, batches, "categorical", structure="ekfac", resume=path, progress=False)
    same_bits(again, bdl.curvature.estimate(net, batches, "categorical", structure="ekfac", progress=False))


def test_loaders_that_may_shuffle_cannot_resume(tmp_path: Path) -> None:
    x, y = (torch.cat(column) for column in zip(*data(), strict=True))
    options: dict[str, Any] = {"resume": tmp_path / "f", "progress": False}
    with pytest.raises(ArgumentError, match="RandomSampler.*shuffle=False"):
        bdl.curvature.estimate(network(), DataLoader(TensorDataset(x, y), shuffle=True), "categorical", **options)
    options["every"] = 2
    bdl.curvature.estimate(network(), DataLoader(TensorDataset(x, y), batch_size=4), "categorical", **options)
    with pytest.raises(FileFormatError, match="another first batch"):
        bdl.curvature.estimate(network(), DataLoader(TensorDataset(x + 1, y), batch_size=4), "categorical", **options)
    with pytest.raises(ArgumentError, match="every=0"):
        bdl.curvature.estimate(network(), data(), "categorical", **{**options, "every": 0})


DIES = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from bayesdl.curvature import Accumulator
from tests.curvature.test_accumulator import network, stream
acc = Accumulator(network(), "categorical", structure="kron")
acc.resume(sys.argv[1])
for number, batch in enumerate(stream()):
    if number < acc.batches:
        continue
    acc.update(batch)
    acc.save(sys.argv[1])
    print(acc.batches, flush=True)
"""


def stream() -> Iterator[Any]:
    """No length, no end worth waiting for."""
    g = torch.Generator().manual_seed(3)
    for _ in range(100_000):
        x = torch.randn(5, 3, dtype=torch.float64, generator=g)
        yield x, (x.sum(1) > 0).long()


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", DIES, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(7):
        reached = int(process.stdout.readline())
    time.sleep(0.01)  # somewhere in the middle of whatever it is doing
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    assert reached == 7
    acc = Accumulator(network(), "categorical", structure="kron")
    assert acc.resume(path) and acc.batches >= reached
    for batch in islice(stream(), acc.batches, acc.batches + 3):
        acc.update(batch)
    straight = Accumulator(network(), "categorical", structure="kron")
    for batch in islice(stream(), acc.batches):
        straight.update(batch)
    same_bits(acc.result(), straight.result())
    assert acc.examples == 5 * acc.batches


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"structure": "diag"}, "structure"),
        ({"kind": "empirical"}, "kind"),
        ({"memory": 1 << 20}, "memory"),
        ({"dtype": torch.float32}, "dtype"),
        ({"select": "last_layer"}, "select"),
        ({"bias": "separate"}, "bias"),
        ({"likelihood": bdl.Bernoulli()}, "likelihood"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    acc = Accumulator(network(), "categorical")
    acc.update(data()[0])
    acc.save(tmp_path / "f")
    with pytest.raises(FileFormatError, match=f"another {what}"):
        Accumulator(network(), **{"likelihood": "categorical", **options}).resume(tmp_path / "f")


def test_other_networks_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    acc = Accumulator(network(), "categorical")
    acc.update(data()[0])
    acc.save(path)
    with pytest.raises(FileFormatError, match="another network"):
        Accumulator(network(1), "categorical").resume(path)
    with pytest.raises(ArgumentError, match="before the first"):
        acc.resume(path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match="checksum"):
        Accumulator(network(), "categorical").resume(path)
    path.write_bytes(b"text")
    with pytest.raises(FileFormatError, match="not a bayesdl file"):
        Accumulator(network(), "categorical").resume(path)
    bdl.wrap(network(), "map", likelihood="categorical").save(path)
    with pytest.raises(FileFormatError, match="no file of an unfinished fit"):
        Accumulator(network(), "categorical").resume(path)
    acc.save(path)
    with pytest.raises(FileFormatError, match="lacks"):
        bdl.load(path, network())


def test_questions_too_early() -> None:
    acc = Accumulator(network(), "categorical", structure="ekfac")
    for ask in (acc.result, acc.next_pass, lambda: acc.save("nowhere")):
        with pytest.raises(NotFittedError, match="update"):
            ask()
    acc.update(data()[0])
    with pytest.raises(NotFittedError, match="takes 2 passes.*pass 1"):
        acc.result()
    assert acc.next_pass() and acc.number == 1 and acc.batches == 0
    with pytest.raises(NotFittedError, match="update"):
        acc.next_pass()
    acc.update(data()[1])
    with pytest.raises(ArgumentError, match="two passes of the loader differ"):
        acc.next_pass()


def test_bad_batches_are_numbered() -> None:
    acc = Accumulator(network(), "categorical")
    acc.update(data()[0])
    x, y = data()[1]
    with pytest.raises(NonFiniteError, match="batch 1"):
        acc.update((x * torch.nan, y))
    with pytest.raises(LabelError, match="batch 1"):
        acc.update((x, y + 7))
    with pytest.raises(ArgumentError, match="batch 1: it holds no target"):
        acc.update(x)
    with pytest.raises(UnsupportedError):
        Accumulator(nn.Sequential(nn.Linear(3, 40000)), "categorical", structure="full").update((x.float(), y))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        for x, y in stream():
            yield from zip(x, y, strict=True)


def test_iterators_are_read_once_and_whole() -> None:
    batches = data()
    whole = bdl.curvature.estimate(network(), batches, "categorical", progress=False)
    one_pass = bdl.curvature.estimate(network(), iter(batches), "categorical", progress=False)
    same_bits(one_pass, whole)
    same_bits(bdl.curvature.estimate(network(), (b for b in batches), "categorical", progress=False), whole)
    with pytest.raises(ArgumentError, match="read once"):
        bdl.curvature.estimate(network(), iter(batches), "categorical", structure="ekfac", progress=False)
    unknown = DataLoader(Endless(), batch_size=4)
    acc = Accumulator(network(), "categorical", structure="diag")
    for batch in islice(unknown, 6):
        acc.update(batch)
    assert acc.examples == 24
    limited = bdl.curvature.estimate(network(), islice(unknown, 6), "categorical", structure="diag", progress=False)
    same_bits(acc.result(), limited)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", {"2": "full", "*": "kron"}])
def test_what_is_held_does_not_grow_with_the_stream(structure: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    g = torch.Generator().manual_seed(0)

    def held() -> int:
        """Bytes of all tensors alive."""
        gc.collect()
        # sparse tensors, which other tests may have left behind, have no storage of their own
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.layout == torch.strided]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        return sum(storages.values())

    acc = Accumulator(net, "categorical", structure=structure)

    def read(count: int) -> int:
        for _ in range(count):
            acc.update((torch.randn(50, 4, generator=g), torch.randint(0, 3, (50,), generator=g)))
        return held()

    first = read(2)
    assert read(40) - first < 50 * 4 * 4  # less than one more batch of inputs
    assert acc.examples == 42 * 50
