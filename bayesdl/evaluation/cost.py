"""What one prediction costs: milliseconds per example, and the memory it needs on top of what was held before.

Memory is a difference on purpose: in a comparison all methods live in one process, so the absolute figure of each would
contain the parameters of all the others.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from bayesdl.errors import ArgumentError
from bayesdl.evaluation.failures import FAILURES

_MIB = 2.0**20
_STATM = "/proc/self/statm"


@dataclass(frozen=True)
class Cost:
    """Measured cost of a prediction.

    Attributes:
        milliseconds: wall-clock milliseconds per example, the median over `repeats` runs.
        peak_mib: highest memory during one run minus the memory held before it, MiB; NaN where it cannot be read.
        device: the device as text.
        repeats: how many timed runs the median is over.
        note: why `peak_mib` is NaN, else empty.
    """

    milliseconds: float
    peak_mib: float
    device: str
    repeats: int
    note: str = ""


def resident_bytes() -> int | None:
    """Resident set size of this process in bytes, or None where the system has no /proc/self/statm."""
    try:
        with open(_STATM, encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Give freed heap pages back to the system, so that they do not hide the next run's need."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not the GNU C library: the reading is then a lower bound
        return
    trim(0)


@dataclass
class PeakMemory:
    """Context manager that measures the peak of memory above the level at entry.

    On CUDA this is the allocator's own peak counter, which misses nothing. On a CPU a thread samples the resident set
    every `interval` seconds: a peak shorter than that can be missed.
    """

    device: torch.device
    interval: float = 0.001
    bytes: float = math.nan
    note: str = ""
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _before: int = field(default=0, repr=False)
    _highest: int = field(default=0, repr=False)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            _return_free_memory()
            before = resident_bytes()
            if before is None:
                self.note = f"{_STATM} is not readable on this system"
                return self
            self._before = self._highest = before
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        else:
            self.note = f"peak memory is not measured on {self.device.type}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = float(torch.cuda.max_memory_allocated(self.device) - self._before)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = float(self._highest - self._before)

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self._highest = max(self._highest, resident_bytes() or 0)
        self._highest = max(self._highest, resident_bytes() or 0)


def _run(predict: Callable[[Sequence[Any]], int], batches: Sequence[Any], device: torch.device) -> tuple[float, int]:
    """Seconds of one call, and how many examples it predicted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    examples = predict(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, examples


def measure(
    predicts: Mapping[str, Callable[[Sequence[Any]], int]],
    batches: Sequence[Any],
    *,
    devices: Mapping[str, torch.device] | None = None,
    seconds: float = 1.0,
    repeats: int = 5,
    on_error: Callable[[str, BaseException], None] | None = None,
) -> dict[str, Cost]:
    """Time every `predict(batches)` after a warm-up, synchronised, and watch its memory in a run of its own.

    The timed runs alternate between the methods, so that a busy spell of the machine does not fall on one of them.

    Args:
        predicts: by method; called with `batches`, returns how many examples it predicted.
        batches: batches that are already in memory, so that reading data is not charged to the methods.
        devices: where each method runs; the CPU where left out.
        seconds: time budget of each method's timed runs; one slow run is enough when it alone exceeds the budget.
        repeats: at most this many timed runs.
        on_error: called with the name and the error of a method that fails, which has no cost then; None raises it.

    Raises:
        ArgumentError: no batches, `repeats` below 1, or not one example predicted.
    """
    if not batches or repeats < 1:
        raise ArgumentError(f"measure needs at least one batch and one repeat, got {len(batches)} and {repeats}")
    where = {name: (devices or {}).get(name, torch.device("cpu")) for name in predicts}
    peaks: dict[str, PeakMemory] = {}
    first: dict[str, float] = {}
    examples: dict[str, int] = {}
    failed: set[str] = set()

    def attempt(work: Callable[[str], None], name: str) -> None:
        try:
            work(name)
        except FAILURES as error:
            if on_error is None:
                raise
            failed.add(name)
            on_error(name, error)

    def begin(name: str) -> None:
        predicts[name](batches[:1])
        with PeakMemory(where[name]) as peaks[name]:
            first[name], examples[name] = _run(predicts[name], batches, where[name])
        if examples[name] < 1:
            raise ArgumentError("measure needs at least one example, but the batches hold none")

    def again(name: str) -> None:
        times[name].append(_run(predicts[name], batches, where[name])[0])

    times: dict[str, list[float]] = {name: [] for name in predicts}
    for name in predicts:
        attempt(begin, name)
    for done in range(repeats):
        for name in predicts:
            if name not in failed and (done + 1) * first[name] <= seconds:
                attempt(again, name)
    return {
        name: Cost(
            milliseconds=1e3 * statistics.median(times[name] or [first[name]]) / examples[name],
            peak_mib=peaks[name].bytes / _MIB,
            device=str(where[name]),
            repeats=max(len(times[name]), 1),
            note=peaks[name].note,
        )
        for name in predicts
        if name not in failed
    }
