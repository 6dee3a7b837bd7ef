"""Measuring helpers shared by the benchmark scripts: alternating medians, CPU seconds, peak memory, JSON."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bayesdl.evaluation.cost import PeakMemory


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    options.add_argument("--no-peer", action="store_true", help="leave the peer library out")
    return options


def arguments(description: str) -> argparse.Namespace:
    """Parse them, and set the number of threads."""
    options = parser(description).parse_args()
    torch.set_num_threads(options.threads)
    return options


def alternate(work: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each piece of work, measured in turns so that a noisy minute hits all alike.

    CPU seconds of this process on a CPU, which other processes do not lengthen; wall-clock, synchronised, on a GPU.
    """
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            start = now(device)
            function()
            seconds[name].append(now(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Callable[[], Any], device: str) -> float:
    """Peak memory of one call above what was held before."""
    with PeakMemory(torch.device(device)) as peak:
        function()
    return peak.bytes


def finish(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the figures, and write them with the setting they belong to."""
    figures["setting"] = {
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = compact(figures)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def compact(figures: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    return lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(figures, indent=2))


def now(device: str) -> float:
    """Seconds: of this process's CPU time, or of the clock once a GPU is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
