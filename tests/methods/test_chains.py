"""Chains over a process group."""

from __future__ import annotations

import pytest

from tests.methods import chains_together
from tests.processes import run


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_one_two_or_four_processes_run_the_same_chains(size: int) -> None:
    run(chains_together.chains_are_those_of_one_process, size)


@pytest.mark.dist
def test_the_first_process_decides_how_chains_run() -> None:
    run(chains_together.the_first_process_decides_how_chains_run, 2)
