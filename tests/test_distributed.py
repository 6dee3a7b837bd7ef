"""Several processes get what one process gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from bayesdl.distributed import Share, resolve_group
from bayesdl.errors import ArgumentError
from tests import together
from tests.processes import ROOT, run


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_are_as_one(size: int) -> None:
    run(together.everything, size)


def test_nothing_is_asked_of_other_processes_unless_they_are_there() -> None:
    for nobody in (None, False):
        assert resolve_group(nobody) is None
    for somebody in (True, "world", 3):
        with pytest.raises(ArgumentError, match="not initialised.*torchrun"):
            resolve_group(somebody)  # type: ignore[arg-type]
    x, y = together.examples("categorical")
    net, batches = together.network(), together.in_batches(x, y)
    with pytest.raises(ArgumentError, match="not initialised"):
        bdl.wrap(net, "laplace", batches, likelihood="categorical", distributed=True, progress=False)
    with pytest.raises(ArgumentError, match="not initialised"):
        bdl.wrap(net, "map", likelihood="categorical").tune("heldout", batches, distributed=True)
    share = together.padded(x, y, 1, 3)
    with pytest.raises(ArgumentError, match="one of 3 shares.*DistributedSampler.*distributed=True"):
        bdl.wrap(net, "laplace", share, likelihood="categorical", progress=False)
    alone = bdl.wrap(net, "laplace", share, likelihood="categorical", distributed=False, progress=False)
    assert alone.posterior.num_data == 5  # of 13, padded to 15


def test_padding_is_cut_off_wherever_it_lies() -> None:
    source = [(i, torch.full((4, 1), float(i)), torch.arange(4 * i, 4 * i + 4)) for i in range(3)]
    for own in range(13):
        kept = list(Share(own).cut(iter(source)))
        assert torch.cat([y for _, _, y in kept] or [torch.zeros(0)]).tolist() == list(range(own))
        assert all(len(x) == len(y) > 0 for _, x, y in kept)
    assert list(Share().cut(iter(source))) == source


def test_two_processes_in_short() -> None:
    run(together.a_little, 2)


BEFORE = """
import torch, bayesdl as bdl
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
train = TensorDataset(torch.randn(41, 3), torch.randint(0, 2, (41,)))
"""
AFTER = """
assert bayes.posterior.num_data == 41
torch.distributed.barrier()
loaded = bdl.load("bayes.safetensors", net)
assert torch.equal(loaded(train.tensors[0]).mean, bayes(train.tensors[0]).mean)
torch.distributed.destroy_process_group()
"""


@pytest.mark.dist
def test_the_readme_under_torchrun(tmp_path: Path) -> None:
    snippets = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    script = next(snippet for snippet in snippets if "torchrun" in snippet)
    (tmp_path / "fit.py").write_text(BEFORE + script + AFTER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "fit.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
