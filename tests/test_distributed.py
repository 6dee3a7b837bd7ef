"""Several processes get what one process gets."""

from __future__ import annotations

import pytest

from tests import together
from tests.processes import run


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_are_as_one(size: int) -> None:
    run(together.everything, size)


def test_two_processes_in_short() -> None:
    run(together.a_little, 2)
