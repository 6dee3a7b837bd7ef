"""Chains that can be killed: one run of every sampler, the events at which a process may die, and what is left."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import bayesdl as bdl
from bayesdl import tensorfile
from bayesdl.samplers import SAMPLERS, Batches, Cyclical, Structured, storing

N, STEPS = 24, 26
OWN: dict[str, dict[str, Any]] = {
    "psgld": {"freeze_after": 4, "eps": 0.05, "lr": 0.002},
    "sghmc": {"adapt": True, "burn_in": 4},
    "entropy-mcmc": {"eta": 0.3},
}
RUNS = (*SAMPLERS, "cyclical-sgld", "cyclical-sa-sgld", "cyclical-sghmc", "structured", "gibbs", "momentum-sa-sgld")


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def sampler_of(name: str, net: nn.Module, seed: int) -> Any:
    """The sampler, with its schedule or wrapper around it."""
    plain = name.removeprefix("cyclical-").removeprefix("momentum-")
    plain = "sgld" if plain in ("structured", "gibbs") else plain
    own: dict[str, Any] = {"lr": 0.02, "num_data": N, "generator": torch.Generator().manual_seed(seed)}
    own |= OWN.get(plain, {})
    if name.startswith("momentum-"):
        own["momentum"] = 0.8
    if name == "gibbs":
        own |= {"prior": bdl.HierarchicalPrior(shape=3.0, rate=2.0), "gibbs_every": 3}
    sampler = SAMPLERS[plain](net.named_parameters(), **own)
    if name == "structured":
        return Structured(sampler, reservoir=3, thin=2, burn_in=3, generator=torch.Generator().manual_seed(seed))
    if name.startswith("cyclical-"):
        return Cyclical(sampler, cycle=STEPS // 2, cycles=2, explore=0.5, lr_min=0.004)
    return sampler


def run(
    folder: Path, name: str, seed: int = 1, resume: bool = True, stop: int = STEPS, **options: Any
) -> tuple[bdl.Chain, Tensor]:
    """The whole chain, or the rest of it, and the last weights. The seeds do not matter to a resumed chain."""
    net = network(seed)
    own = sampler_of(name, net, seed)
    x = torch.linspace(-1, 1, 3 * N, dtype=torch.float32).view(N, 3).sin()
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    order = torch.Generator().manual_seed(seed)
    batches = Batches(torch.utils.data.DataLoader(data, 7, shuffle=True, generator=order))
    options = {"burn_in": 4, "thin": 5, **options}
    chain = bdl.Chain(net, sampler=own, store=folder, loader=batches, **options)
    if resume:
        chain.resume()
    schedule = own if isinstance(own, Cyclical) else None
    while chain.steps < stop:
        for inputs, target in batches:
            step(net, own, schedule, inputs, target)
            chain.step(schedule is None or schedule.sampling)
            if chain.steps == stop:
                break
    return chain, torch.cat([t.detach().reshape(-1).float() for t in net.state_dict().values()])


def step(net: nn.Module, own: Any, schedule: Cyclical | None, inputs: Tensor, target: Tensor) -> None:
    if isinstance(own, Structured):
        own.step(lambda values: nn.functional.cross_entropy(functional_call(net, values, (inputs,)), target))
        return
    sampler = own if schedule is None else schedule.sampler
    sampler.zero_grad()
    nn.functional.cross_entropy(net(inputs), target).backward()
    sampler.step()
    if schedule is not None:
        schedule.step()


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a store."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "lock"
    }


class _Half:
    """A file of which one write stops in the middle."""

    def __init__(self, file: Any, event: Callable[[], bool], end: Callable[[], None]) -> None:
        self._file, self._event, self._end, self._writes = file, event, end, 0

    def write(self, payload: bytes) -> None:
        self._writes += 1
        if self._writes in (1, 2, 5) and self._event():  # of a file of tensors its length, its header, a tensor
            self._file.write(payload[: len(payload) // 2])
            self._file.flush()
            self._end()
        self._file.write(payload)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def events(deadly: int | None, end: Callable[[], None] | None = None) -> Iterator[list[int]]:
    """Count what touches the disk, before and after each; at number `deadly` all ends (SIGKILL), in writes half-way."""
    count = [0]
    ending = end or _die

    def event() -> bool:
        count[0] += 1
        return count[0] == deadly

    def around(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if event():
                ending()
            found = function(*args, **kwargs)
            if event():
                ending()
            return found

        return wrapped

    def opened(path: Any, mode: str = "r") -> Any:
        file = builtins.open(path, mode)
        return _Half(file, event, ending) if mode in ("xb", "ab") else file

    before = (os.fsync, os.replace, Path.unlink)
    os.fsync, os.replace, Path.unlink = (around(function) for function in before)  # type: ignore[misc, assignment]
    for module in (storing, tensorfile):
        module.open = opened  # type: ignore[attr-defined]
    try:
        yield count
    finally:
        os.fsync, os.replace, Path.unlink = before  # type: ignore[misc, assignment]
        for module in (storing, tensorfile):
            del module.open  # type: ignore[attr-defined]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does the work; negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kill_everywhere(name: str, folder: Path, stride: int, options: dict[str, Any]) -> None:
    """Die at every `stride`-th event, go on with other seeds, and compare every byte with the unbroken run."""
    with events(None) as count:
        run(folder / "whole", name, resume=False, **options)[0].close()
    expected = contents(folder / "whole")
    assert len(expected) > 3 and count[0] > 30, (expected, count)
    for deadly in range(1, count[0] + 1, stride):
        place = folder / str(deadly)

        def dying(deadly: int = deadly, place: Path = place) -> None:
            with events(deadly):
                run(place, name, **options)

        # a chain that wrote nothing yet begins again with the seeds of its script
        status = in_child(dying)
        assert status == -signal.SIGKILL, (deadly, status)
        fresh = not (place / "resume.safetensors").exists() or len(list(place.glob("sample-*"))) < 2
        assert in_child(lambda place=place, fresh=fresh: _finish(place, name, 1 if fresh else 9, options)) == 0, deadly
        assert contents(place) == expected, (name, deadly)


def kill_at_random(name: str, folder: Path, kills: int, options: dict[str, Any]) -> None:
    """SIGKILL from outside at random moments, several times in one chain."""
    start = time.perf_counter()
    run(folder / "whole", name, resume=False, **options)[0].close()
    length = time.perf_counter() - start
    expected = contents(folder / "whole")
    source = torch.Generator().manual_seed(0)
    for number in range(kills):
        place = folder / f"random-{number}"
        for _ in range(3):
            child = os.fork()
            if not child:
                try:
                    _finish(place, name, 1, options)
                finally:
                    os._exit(0)
            time.sleep(length * float(torch.rand((), generator=source)))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert in_child(lambda place=place: _finish(place, name, 1, options)) == 0
        assert contents(place) == expected, (name, number)


def _finish(place: Path, name: str, seed: int, options: dict[str, Any]) -> None:
    run(place, name, seed, **options)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=bdl.samplers.StochasticForwardWarning)
    torch.set_num_threads(1)
    how, names, root, stride = sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3]), int(sys.argv[4])
    settings: dict[str, Any] = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    for each in names:
        (root / each).mkdir(parents=True)
        if how == "everywhere":
            kill_everywhere(each, root / each, stride, settings)
        else:
            kill_at_random(each, root / each, stride, settings)
    sys.stdout.write("all equal")
