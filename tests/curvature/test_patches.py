"""Patches of convolutions against `F.unfold`, which knows those of two dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayesdl.curvature.patches import patches

SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_two_dimensions(setting: dict[str, Any], ones: bool) -> None:
    layer = nn.Conv2d(4, 6, **setting)
    x = torch.randn(3, 4, 7, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    expected = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    expected = expected.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2)
    if ones:
        expected = torch.cat([expected, torch.ones(*expected.shape[:3], 1)], -1)
    assert torch.equal(patches(layer, x, layer.groups, ones), expected)


def test_a_padding_that_was_rewritten() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    layer.padding, layer.dilation = (2, 2), (2, 2)  # as dilated backbones of segmentation networks do
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(patches(layer, x, 1, False)[0].mT, F.unfold(x, 3, 2, 2, 1))


def test_a_pointwise_convolution_copies_nothing() -> None:
    x = torch.randn(2, 4, 5, 5)
    found = patches(nn.Conv2d(4, 3, 1), x, 1, False)
    assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
