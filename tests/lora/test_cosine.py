"""Moments of cosine scores against Monte Carlo and limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError

P, B, C = 32, 2, 3


def embeddings(noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of unit entries, and variances around noise^2, float64."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(B, P, generator=g), torch.randn(C, P, generator=g)
    y = y + 0.7 * x[:1]
    vx, vy = (noise**2 * (0.5 + torch.rand(n, P, generator=g)) for n in (B, C))
    return x.double(), vx.double(), y.double(), vy.double()


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_standard_deviations_are_those_of_monte_carlo(noise: float) -> None:
    # 50,000 draws: the standard error of a standard deviation is 0.32 %; the linearisation itself is within 3 %
    x, vx, y, vy = embeddings(noise)
    g = torch.Generator().manual_seed(1)
    draws_x = x + vx.sqrt() * torch.randn(50000, B, P, generator=g).double()
    draws_y = y + vy.sqrt() * torch.randn(50000, C, P, generator=g).double()
    cosines = torch.cosine_similarity(draws_x.unsqueeze(2), draws_y.unsqueeze(1), dim=-1)
    mean, variance = bdl.lora.cosine_moments(x, vx, y, vy, scale=4.0, bias=-1.0)
    assert float((variance.sqrt() / (4.0 * cosines.std(0)) - 1).abs().max()) < 0.03
    assert float((mean - (4.0 * cosines.mean(0) - 1.0)).abs().max()) < 4.0 * 0.01
    _, joint = bdl.lora.cosine_moments(x, vx, y, vy, scale=4.0, bias=-1.0, joint=True)
    torch.testing.assert_close(joint.diagonal(dim1=-2, dim2=-1), variance)
    for row in range(B):
        wanted = 16.0 * torch.cov(cosines[:, row].T)
        assert float((joint[row] - wanted).norm() / wanted.norm()) < 0.06


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
def test_standard_deviations_of_correlated_embeddings(ratio: float) -> None:
    # embeddings of 512 numbers whose cosine is 0.8, with very unequal variances; 20,000 draws: 0.5 % standard error
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, generator=g)
    y = 0.8 * x + 0.6 * torch.randn(1, 512, generator=g)
    spread = [ratio * torch.randn(1, 512, generator=g).abs() for _ in range(2)]
    mean, variance = bdl.lora.cosine_moments(x, spread[0].square(), y, spread[1].square())
    draws = [m + s * torch.randn(20000, 512, generator=g) for m, s in zip((x, y), spread, strict=True)]
    cosines = torch.cosine_similarity(*draws, dim=-1)
    assert float(variance.sqrt() / cosines.std()) == pytest.approx(1.0, abs=0.02)
    assert float(mean) == pytest.approx(float(cosines.mean()), abs=1e-3)


def test_full_covariances_are_diagonal_ones_where_they_are_diagonal() -> None:
    x, vx, y, vy = embeddings(0.2)
    wanted = bdl.lora.cosine_moments(x, vx, y, vy, joint=True)
    for a, b in ((vx.diag_embed(), vy), (vx, vy.diag_embed()), (vx.diag_embed(), vy.diag_embed())):
        for one, other in zip(bdl.lora.cosine_moments(x, a, y, b, joint=True), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_limits() -> None:
    x, vx, y, vy = embeddings(0.2)
    mean, variance = bdl.lora.cosine_moments(x, 0 * vx, y, 0 * vy)
    torch.testing.assert_close(mean, torch.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1))
    assert float(variance.abs().max()) == 0.0
    # noise along an embedding is what normalisation removes: 5 % of its length leaves next to nothing
    radial = 0.05**2 * x.unsqueeze(2) * x.unsqueeze(1)
    _, along = bdl.lora.cosine_moments(x, radial, y, 0 * vy)
    equal = radial.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).expand(B, P) / P
    _, around = bdl.lora.cosine_moments(x, equal, y, 0 * vy)
    assert float((along.sqrt() / around.sqrt()).max()) < 0.05


def test_errors() -> None:
    x, vx, y, vy = embeddings(0.2)
    with pytest.raises(ShapeError, match="differ in their last axis"):
        bdl.lora.cosine_moments(x, vx, y[:, 1:], vy[:, 1:])
    with pytest.raises(ShapeError, match="var_x"):
        bdl.lora.cosine_moments(x, vx[0], y, vy)
    with pytest.raises(ArgumentError, match="negative variance"):
        bdl.lora.cosine_moments(x, -vx, y, vy)
    with pytest.raises(ArgumentError, match="length zero"):
        bdl.lora.cosine_moments(0 * x, 0 * vx, y, vy)
    with pytest.raises(NonFiniteError, match="mean_y"):
        bdl.lora.cosine_moments(x, vx, y / 0, vy)
