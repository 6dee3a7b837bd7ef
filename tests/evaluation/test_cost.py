"""Timing and memory of predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import cost


def single(predict: Callable[[Sequence[Any]], int], batches: Sequence[Any], **options: Any) -> cost.Cost:
    return cost.measure({"it": predict}, batches, **options)["it"]


def _sleep(seconds: float, examples: int) -> int:
    time.sleep(seconds)
    return examples


def test_time_per_example_is_the_run_divided_by_the_examples() -> None:
    measured = single(lambda batches: _sleep(0.02, 4), [0, 1], repeats=3)
    assert measured.repeats == 3
    # sleep never returns early, and a machine that adds 100 ms to a 20 ms sleep three times in a row is broken
    assert 5.0 <= measured.milliseconds < 30.0


def test_a_slow_run_is_not_repeated() -> None:
    calls: list[object] = []

    def predict(batches: object) -> int:
        calls.append(batches)
        return _sleep(0.02, 1)

    measured = single(predict, [0, 1], seconds=0.001)
    assert len(calls) == 2  # one warm-up, one run that is both watched and timed
    assert measured.milliseconds >= 20.0


def test_warm_up_sees_one_batch_and_the_timed_runs_see_all() -> None:
    seen: list[int] = []

    def predict(batches: object) -> int:
        seen.append(len(batches))  # type: ignore[arg-type]
        return 1

    single(predict, [0, 1, 2], repeats=2)
    assert seen == [1, 3, 3, 3]


@pytest.mark.skipif(cost.resident_bytes() is None, reason="no /proc/self/statm")
def test_peak_memory_on_the_cpu_sees_a_temporary_tensor() -> None:
    def predict(batches: object) -> int:
        temporary = torch.ones(16 * 2**20)  # 64 MiB of float32, written to, so resident
        time.sleep(0.02)
        return len(temporary)

    measured = single(predict, [0], repeats=1)
    assert measured.note == ""
    assert 60.0 < measured.peak_mib < 100.0


def test_missing_statm_gives_nan_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_STATM", "/nonexistent/statm")
    measured = single(lambda batches: 1, [0], repeats=1)
    assert math.isnan(measured.peak_mib)
    assert "/nonexistent/statm" in measured.note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda_is_the_allocators_own_counter() -> None:
    held = torch.ones(8 * 2**20, device="cuda")
    measured = single(lambda batches: len(held + 1), [0], devices={"it": torch.device("cuda")}, repeats=1)
    assert measured.peak_mib == pytest.approx(32.0, abs=2.0)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="at least one batch"):
        single(lambda batches: 1, [])
    with pytest.raises(ArgumentError, match="at least one batch and one repeat"):
        single(lambda batches: 1, [0], repeats=0)
    with pytest.raises(ArgumentError, match="at least one example"):
        single(lambda batches: 0, [0])


def test_timed_runs_alternate_between_the_methods() -> None:
    order: list[str] = []

    def predictor(name: str) -> Callable[[Sequence[Any]], int]:
        def predict(batches: Sequence[Any]) -> int:
            order.append(name)
            return 1

        return predict

    cost.measure({"a": predictor("a"), "b": predictor("b")}, [0], repeats=3)
    assert "".join(order) == "aabb" + "ababab"  # warm-up and memory run of each, then three rounds
