"""Curvature of contrastive losses against automatic differentiation, float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bayesdl.lora.contrastive as contrastive
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.lora.contrastive import contrastive_ggn

N, P, SCALE, BIAS = 7, 5, 3.0, -1.5


def pairs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, P, generator=g).double(), torch.randn(N, P, generator=g).double()


def outputs(x: Tensor, y: Tensor, loss: str) -> Tensor:
    bias = BIAS if loss == "siglip" else 0.0
    return SCALE * (x / x.norm()) @ (y / y.norm(dim=1, keepdim=True)).T + bias


def total(scores: Tensor, own: int, loss: str) -> Tensor:
    if loss == "infonce":
        return -scores.log_softmax(0)[own]
    signs = 2 * torch.nn.functional.one_hot(torch.tensor(own), N) - 1
    return -torch.nn.functional.logsigmoid(signs * scores).sum()


@pytest.mark.parametrize("loss", contrastive.LOSSES)
@pytest.mark.parametrize("chunk", [1, 3 * N, 1 << 20])
def test_it_is_the_gauss_newton_matrix(loss: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    x, y = pairs()
    wanted, value = torch.zeros(P, P).double(), torch.zeros(()).double()
    for n in range(N):
        jac = torch.autograd.functional.jacobian(lambda z: outputs(z, y, loss), x[n])
        inner = torch.autograd.functional.hessian(lambda f, n=n: total(f, n, loss), outputs(x[n], y, loss))
        wanted += jac.T @ inner @ jac
        value += total(outputs(x[n], y, loss), n, loss)
    found, lost = contrastive_ggn(x, y, loss, SCALE, BIAS if loss == "siglip" else 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lost, value)
    torch.testing.assert_close(found, found.T)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12


def test_errors() -> None:
    x, y = pairs()
    with pytest.raises(ArgumentError, match="loss='triplet'"):
        contrastive_ggn(x, y, "triplet", 1.0)
    with pytest.raises(ShapeError, match="expected pairs"):
        contrastive_ggn(x[1:], y, "infonce", 1.0)
    with pytest.raises(ArgumentError, match="length zero"):
        contrastive_ggn(0 * x, y, "infonce", 1.0)
