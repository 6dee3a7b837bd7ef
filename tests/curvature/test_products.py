"""Products of factors with many directions against the Jacobian's own rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, RowFactor
from bayesdl.curvature.layout import Block
from bayesdl.curvature.products import times, transposed_times

G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def linear(positions: int, groups: int = 2) -> LinearFactor:
    """3 inputs, 4 outputs, 5 examples, 2 cotangents."""
    return LinearFactor(normal(groups, 5, positions, 3), normal(groups, 2, 5, positions, 4))


def turned(positions: int) -> LinearFactor:
    bases = [torch.linalg.qr(normal(2, n, n))[0] for n in (3, 4)]
    plain = linear(positions)
    return LinearFactor(plain.a, plain.g, *bases)


FACTORS: dict[str, Factor] = {
    "plain": linear(1),
    "positions": linear(7),
    "few_positions": linear(2),
    "turned": turned(7),
    "turned_few": turned(2),
    "rows": RowFactor(
        torch.tensor([[0, 2, 2], [1, 1, -1], [0, 0, 0], [2, 1, 0], [-1, -1, 2]]), normal(1, 2, 5, 3, 4), 3
    ),
}


# more directions make forming rows the cheaper way where there are positions; fewer do not
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("name", FACTORS)
def test_products_are_those_of_the_rows(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = FACTORS[name]
    if isinstance(factor, RowFactor):  # padding takes no part
        factor = RowFactor(factor.index, factor.g * (factor.index >= 0).unsqueeze(-1), factor.size)
    shape = (1, 4, 3) if isinstance(factor, RowFactor) else (2, 4, 3)
    block = Block("b", "linear", ("b",), ((24,),), (), *shape)
    rows = factor.jacobian()  # (B, K, P)
    directions, vectors = normal(count, *shape), normal(count, 5, 2)
    forward = torch.einsum("bkp,qp->qbk", rows, directions.flatten(1))
    backward = torch.einsum("bkp,qbk->qp", rows, vectors).reshape(count, *shape)
    for limit in (1 << 20, 1):  # all examples together, and one by one
        monkeypatch.setattr("bayesdl.curvature.products.LIMIT", limit)
        torch.testing.assert_close(times(factor, directions), forward, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(transposed_times(factor, vectors, block), backward, rtol=1e-10, atol=1e-12)
