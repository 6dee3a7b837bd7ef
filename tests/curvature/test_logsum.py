"""sum log(scale v + shift) over more values than are held at once: the plain expression and its derivatives."""

from __future__ import annotations

import pytest
import torch

from bayesdl.curvature.logsum import log_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_add_up_to_the_plain_expression(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    values = torch.rand(7, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    expected = (scale * values.double() + shift).log().sum()
    truth = torch.autograd.grad(expected, (scale, shift))
    assert torch.autograd.gradcheck(lambda a, b: log_sum(values, a, b), (scale, shift))
    monkeypatch.setattr("bayesdl.curvature.logsum.PIECE", 16)
    found = log_sum(values, scale, shift)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    for mine, theirs in zip(torch.autograd.grad(found, (scale, shift)), truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0.0)
    assert torch.autograd.gradcheck(lambda a, b: log_sum(values, a, b), (scale, shift))
