"""Layer factors: each question against the rows written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayesdl.curvature.factor import LinearFactor, RowFactor, add_marginals, add_quads, dense_factor

SHAPES = [(1, 1), (1, 4), (3, 1), (3, 2)]  # groups, positions
BATCH, COTANGENTS, INPUTS, OUTPUTS = 5, 3, 4, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(groups: int, positions: int) -> tuple[LinearFactor, Tensor]:
    """A factor and its rows `(B, K, G, out, in)` by loops."""
    a, g = normal(groups, BATCH, positions, INPUTS), normal(groups, COTANGENTS, BATCH, positions, OUTPUTS, seed=1)
    rows = torch.zeros(BATCH, COTANGENTS, groups, OUTPUTS, INPUTS, dtype=torch.float64)
    for b in range(BATCH):
        for k in range(COTANGENTS):
            for i in range(groups):
                for t in range(positions):
                    rows[b, k, i] += torch.outer(g[i, k, b, t], a[i, b, t])
    return LinearFactor(a, g), rows


def embedding(padded: bool = True) -> tuple[RowFactor, Tensor]:
    """An embedding of seven rows with repeated look-ups, and its rows `(B, K, 1, D, V)` by loops."""
    index = torch.tensor([[0, 1, 1], [2, 2, 2], [6, 0, 6], [3, 4, 5], [0, 0, 1]])
    g = normal(1, COTANGENTS, BATCH, 3, OUTPUTS)
    if padded:
        index = torch.where(index == 0, -1, index)
        g = g.masked_fill((index == -1)[None, None, :, :, None], 0.0)
    rows = torch.zeros(BATCH, COTANGENTS, 1, OUTPUTS, 7, dtype=torch.float64)
    for b in range(BATCH):
        for k in range(COTANGENTS):
            for t in range(3):
                if index[b, t] >= 0:
                    rows[b, k, 0, :, index[b, t]] += g[0, k, b, t]
    return RowFactor(index, g, 7), rows


FACTORS = [*[f"linear-{g}-{t}" for g, t in SHAPES], "embedding", "embedding-padded"]


@pytest.fixture(params=FACTORS)
def pair(request: pytest.FixtureRequest) -> tuple[LinearFactor | RowFactor, Tensor]:
    name = str(request.param)
    if name.startswith("linear"):
        _, groups, positions = name.split("-")
        return linear(int(groups), int(positions))
    return embedding(name.endswith("padded"))


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_every_question(
    pair: tuple[LinearFactor | RowFactor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayesdl.curvature.factor.CHUNK", chunk)
    factor, rows = pair
    torch.testing.assert_close(factor.square(), rows.square().sum((0, 1)))
    torch.testing.assert_close(factor.jacobian(), rows.flatten(2))
    weight = 0.1 + normal(*rows.shape[2:], seed=5).abs()
    quad = torch.einsum("bkgoi,goi,blgoi->bkl", rows, weight, rows)
    torch.testing.assert_close(factor.quad(weight), quad)
    torch.testing.assert_close(factor.marginal(weight), quad.diagonal(dim1=1, dim2=2))
    direction = normal(*rows.shape[2:], seed=6)
    torch.testing.assert_close(factor.dot(direction), torch.einsum("bkgoi,goi->bk", rows, direction))


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_many_weights_at_once(
    pair: tuple[LinearFactor | RowFactor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayesdl.curvature.factor.CHUNK", chunk)
    factor, rows = pair
    values, shifts = normal(*rows.shape[2:], seed=5).abs(), torch.tensor([0.1, 1.0, 30.0, 2.0], dtype=torch.float64)
    weights = 1.0 / (values + shifts[:, None, None, None])
    truth = torch.einsum("bkgoi,rgoi,blgoi->rbkl", rows, weights, rows)
    torch.testing.assert_close(factor.quads(values, shifts), truth)
    torch.testing.assert_close(add_quads([factor, factor], [values, values], shifts), 2.0 * truth)
    variances = truth.diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(factor.marginals(values, shifts), variances)
    torch.testing.assert_close(add_marginals([factor, factor], [values, values], shifts), 2.0 * variances)


def patches(groups: int, positions: int) -> tuple[LinearFactor, Tensor]:
    """The same factor in the memory layout of a convolution's patches and gradients: positions last."""
    factor, rows = linear(groups, positions)
    a = factor.a.mT.contiguous().mT
    g = factor.g.permute(0, 2, 1, 4, 3).contiguous().permute(0, 2, 1, 4, 3)
    return LinearFactor(a, g), rows


# one position; fewer and more positions than it takes for turning after the sum to be cheaper, on either side
@pytest.mark.parametrize("positions", [1, 3, 5, 40])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("make", [linear, patches])
def test_a_turned_factor_answers_every_question(
    make: Callable[[int, int], tuple[LinearFactor, Tensor]], groups: int, positions: int
) -> None:
    factor, rows = make(groups, positions)
    inner = torch.linalg.qr(normal(groups, INPUTS, INPUTS, seed=7))[0]
    outer = torch.linalg.qr(normal(groups, OUTPUTS, OUTPUTS, seed=8))[0]
    turned, rows = factor.rotate(inner, outer), torch.einsum("bkgoi,gij,gop->bkgpj", rows, inner, outer)
    torch.testing.assert_close(turned.jacobian(), rows.flatten(2))
    torch.testing.assert_close(turned.square(), rows.square().sum((0, 1)))
    weight, direction = 0.1 + normal(*rows.shape[2:], seed=5).abs(), normal(*rows.shape[2:], seed=6)
    quad = torch.einsum("bkgoi,goi,blgoi->bkl", rows, weight, rows)
    torch.testing.assert_close(turned.quad(weight), quad)
    torch.testing.assert_close(turned.quad(weight.requires_grad_()), quad)
    torch.testing.assert_close(turned.marginal(weight), quad.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(turned.dot(direction), torch.einsum("bkgoi,goi->bk", rows, direction))
    ours, (truth, _) = factor.moments(), linear(groups, positions)
    torch.testing.assert_close(ours[0], torch.einsum("gbti,gbtj->gij", truth.a, truth.a))
    torch.testing.assert_close(ours[1], torch.einsum("gkbto,gkbtp->gop", truth.g, truth.g))


@pytest.mark.parametrize(("groups", "positions"), SHAPES)
def test_rotation_of_a_linear_factor_turns_its_rows(groups: int, positions: int) -> None:
    factor, rows = linear(groups, positions)
    inner, outer = normal(groups, INPUTS, INPUTS, seed=7), normal(groups, OUTPUTS, OUTPUTS, seed=8)
    turned = torch.einsum("bkgoi,gij,gop->bkgpj", rows, inner, outer)
    torch.testing.assert_close(factor.rotate(inner, outer).jacobian(), turned.flatten(2))
    half = torch.einsum("bkgoi,gop->bkgpi", rows, outer)
    torch.testing.assert_close(factor.rotate(None, outer).jacobian(), half.flatten(2))


def test_rotation_of_an_embedding_turns_its_columns() -> None:
    factor, rows = embedding()
    outer = normal(1, OUTPUTS, OUTPUTS, seed=8)
    torch.testing.assert_close(
        factor.rotate(None, outer).jacobian(), torch.einsum("bkgoi,gop->bkgpi", rows, outer).flatten(2)
    )


@pytest.mark.parametrize(("groups", "positions"), SHAPES)
def test_moments_of_a_linear_factor(groups: int, positions: int) -> None:
    factor, _ = linear(groups, positions)
    inner, outer, count = factor.moments()
    torch.testing.assert_close(inner, torch.einsum("gbti,gbtj->gij", factor.a, factor.a))
    torch.testing.assert_close(outer, torch.einsum("gkbto,gkbtp->gop", factor.g, factor.g))
    assert int(count) == BATCH * positions


def test_moments_of_an_embedding_leave_padding_out() -> None:
    factor, _ = embedding()
    counts, outer, count = factor.moments()
    assert counts.tolist() == [[0.0, 3.0, 3.0, 1.0, 1.0, 1.0, 2.0]]
    assert int(count) == 11
    torch.testing.assert_close(outer, torch.einsum("gkbto,gkbtp->gop", factor.g, factor.g))


def test_a_dense_jacobian_is_a_factor() -> None:
    rows = normal(COTANGENTS, BATCH, 6)
    torch.testing.assert_close(dense_factor(rows).jacobian(), rows.transpose(0, 1))


def test_factors_are_never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # for one position no intermediate may reach the size of the rows
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                r.numel() for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, Tensor)
            )
            return result

    factor = LinearFactor(normal(1, 16, 1, 50), normal(1, 8, 16, 1, 40))
    with Watch():
        factor.square()
        factor.quad(torch.ones(1, 40, 50, dtype=torch.float64))
        factor.marginal(torch.ones(1, 40, 50, dtype=torch.float64))
        factor.moments()
    assert max(sizes) <= 16 * 8 * 40  # B K out; the rows are B K out in = 256,000


@pytest.mark.parametrize("identity", [False, True])
def test_cotangents_shared_by_all_examples_answer_the_same(identity: bool) -> None:
    one = torch.eye(OUTPUTS).double().expand(2, -1, -1) if identity else normal(2, COTANGENTS, OUTPUTS, seed=1)
    a, g = normal(2, BATCH, 1, INPUTS), one[:, :, None, None].expand(-1, -1, BATCH, -1, -1)
    inner, outer = normal(2, INPUTS, INPUTS, seed=7), normal(2, OUTPUTS, OUTPUTS, seed=8)
    held, copied = LinearFactor(a, g).rotate(inner, outer), LinearFactor(a, g.contiguous()).rotate(inner, outer)
    assert held.shared and not copied.shared
    weight, shifts = 0.1 + normal(2, OUTPUTS, INPUTS, seed=5).abs(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(held.jacobian(), copied.jacobian())
    torch.testing.assert_close(held.square(), copied.square())
    torch.testing.assert_close(held.quad(weight), copied.quad(weight))
    torch.testing.assert_close(held.quads(weight, shifts), copied.quads(weight, shifts))
    torch.testing.assert_close(held.marginal(weight), copied.marginal(weight))
    torch.testing.assert_close(held.marginals(weight, shifts), copied.marginals(weight, shifts))
    for ours, theirs in zip(held.moments(), copied.moments(), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
