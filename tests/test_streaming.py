"""Models whose weights stay sharded over processes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", minversion="2.6", reason="fully_shard became public in torch 2.6")
from tests import streamed_models
from tests.processes import run


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_networks_are_as_whole_ones(size: int) -> None:
    run(streamed_models.everything, size, timeout=400.0)


def test_two_processes_in_short() -> None:
    run(streamed_models.a_little, 2)
