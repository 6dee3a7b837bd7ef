"""Sums in pieces: the same bits for any number of processes, which divide the work."""

from __future__ import annotations

import pytest
import torch

from bayesdl.distributed import Group
from bayesdl.methods.pieces import PIECES, Pieces
from tests.methods import chains_together
from tests.processes import run


@pytest.mark.parametrize("count", [1, 5, 8, 9, 21])
@pytest.mark.parametrize("size", [1, 3, 8, 11])
def test_every_batch_has_one_piece_and_every_piece_one_process(count: int, size: int) -> None:
    held = list(range(count))
    parts = Pieces(None, count).cut(held)
    assert [batch for part in parts for batch in part] == held
    assert len(parts) == min(count, PIECES) and all(parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    owned = [Pieces(Group(None, rank, size, torch.device("cpu")), count).own for rank in range(size)]
    assert sorted(piece for own in owned for piece in own) == list(range(len(parts)))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_the_total_is_the_sum_in_order() -> None:
    parts = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    found = Pieces(None, 8).total(lambda i: parts[i], parts[0])
    expected = torch.zeros(1000)
    for part in parts:
        expected = expected + part
    assert torch.equal(found, expected)
    assert not torch.equal(found, parts.flip(0).cumsum(0)[-1])  # which order does decide


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_the_search_for_the_step_is_divided(size: int) -> None:
    run(chains_together.the_search_for_the_step_is_divided, size)
