"""Bilinear forms and bags of embeddings of the private clone against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone
from bayesdl.composite import ExplicitBag, ExplicitBilinear
from bayesdl.explicit import explicit

B, T, V = 4, 5, 7


def clone_of(module: nn.Module) -> nn.Module:
    return explicit(structural_clone(module, lambda p: p, lambda b: b))


def bags() -> Tensor:
    index = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    index[0], index[1, :3], index[2, :4] = 2, 2, 2  # a bag of nothing but padding, one of some, one with a single row
    return index


@pytest.mark.parametrize("padding", [None, 2, -5])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size_give_the_original_outputs(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.EmbeddingBag(V, 3, mode=mode, padding_idx=padding).double()
    layer.weight.data.normal_()
    ours, index = clone_of(layer), bags()
    assert type(ours) is ExplicitBag
    torch.testing.assert_close(ours(index), layer(index), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(index), layer(index), rtol=0.0, atol=0.0)
    flat, offsets = index.flatten(), torch.tensor([0, 3, 3, 11])
    torch.testing.assert_close(ours(flat, offsets), layer(flat, offsets), rtol=0.0, atol=0.0)
    (mine,) = torch.autograd.grad(ours(index).square().sum(), layer.weight)
    (theirs,) = torch.autograd.grad(layer(index).square().sum(), layer.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_weighed_bags_give_the_original_outputs_and_refusals() -> None:
    layer = nn.EmbeddingBag(V, 3, mode="sum", padding_idx=2).double()
    weights = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, index = clone_of(layer), bags()
    found, truth = (m(index, per_sample_weights=weights) for m in (ours, layer))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    mean = nn.EmbeddingBag(V, 3, mode="mean").double()
    wrong: list[tuple[nn.Module, dict[str, Any]]] = [
        (mean, {"per_sample_weights": weights}),
        (layer, {"per_sample_weights": weights[:, :1]}),
        (layer, {"offsets": torch.tensor([0, 1])}),
    ]
    for original, call in wrong:
        for module in (original, clone_of(original)):
            with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
                module(index, **call)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear_forms_give_the_original_outputs(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(3, 2, 4, bias=bias).double()
    ours = clone_of(layer)
    assert type(ours) is ExplicitBilinear
    for lead in ((B,), (B, T), ()):
        a, b = torch.randn(*lead, 3, dtype=torch.float64), torch.randn(*lead, 2, dtype=torch.float64)
        torch.testing.assert_close(ours(a, b), layer(a, b), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(ours(a, b), layer(a, b), rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError):
        ours(torch.zeros(B, 3).double(), torch.zeros(B, 3).double())
