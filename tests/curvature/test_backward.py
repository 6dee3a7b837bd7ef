"""Batched backward passes: a loop over cotangents and one batched pass are the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesdl.curvature import backward as module
from bayesdl.curvature.backward import backward


def test_convolutions_are_looped_over_and_agree_with_the_batched_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 3).double(), nn.Linear(48, 4).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    hidden = first(x)
    output = second(hidden.relu().flatten(1))
    vectors = torch.randn(4, 5, 4, dtype=torch.float64)
    found = {}
    for worth in (0, 1 << 60):
        monkeypatch.setattr(module, "WORTH_LOOPING", worth)
        found[worth] = backward(output, [hidden, output], vectors, keep=True)
    looped, batched = found[0], found[1 << 60]
    for a, b in zip(looped, batched, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b)
    # the loop leaves the cotangents of an example side by side
    assert looped[0] is not None and looped[0].transpose(0, 1).is_contiguous()
    assert batched[0] is not None and not batched[0].transpose(0, 1).is_contiguous()
    torch.testing.assert_close(looped[1], vectors)
