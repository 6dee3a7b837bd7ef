"""Models that are wrapped or sharded for training on several processes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", minversion="2.6", reason="fully_shard became public in torch 2.6")
from tests import sharded_models
from tests.processes import run


@pytest.mark.dist
def test_wrapped_and_sharded_models() -> None:
    run(sharded_models.everything, 2)
