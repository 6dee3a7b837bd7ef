"""Several processes on one machine: run a function of a test module on each, with gloo between them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = """
import datetime, importlib, os, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, size, store, module, function = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
dist.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
)
getattr(importlib.import_module(module), function)(rank, size)
dist.barrier()
dist.destroy_process_group()
"""


def run(function: object, size: int, timeout: float = 120.0) -> None:
    """Call a top-level `function(rank, size)` on `size` processes of one group; any failure is an AssertionError."""
    module, name = function.__module__, function.__name__  # type: ignore[attr-defined]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = [
            subprocess.Popen(
                [sys.executable, "-c", MAIN, str(rank), str(size), store, module, name],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    codes = [process.returncode for process in started]
    assert not any(codes), "\n".join(
        f"--- process {i}: {code}\n{out}" for i, (code, out) in enumerate(zip(codes, outputs, strict=True))
    )


def torchrun(function: object, *arguments: str, size: int = 2, timeout: float = 240.0) -> None:
    """Call a top-level `function(*arguments)` on processes that torchrun starts; the function makes their group."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"),
            *("--module", "tests.processes", function.__module__, function.__name__, *arguments),  # type: ignore[attr-defined]
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])
