"""Base noise: its law against the closed form, and what it may depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesdl.lora.adapters import AdaptedLayer
from bayesdl.lora.draws import Draws, base_noise, roots

LAYER = AdaptedLayer("block.q", "default", inputs=3, outputs=6, rank=4, scaling=2.0)


class One(nn.Module):
    """One adapted layer, by the names that peft uses."""

    def __init__(self, up: Tensor) -> None:
        super().__init__()
        part = nn.Module()
        part.lora_A = nn.ModuleDict({"default": nn.Linear(3, up.shape[1], bias=False)})
        part.lora_B = nn.ModuleDict({"default": nn.Linear(up.shape[1], up.shape[0], bias=False)})
        part.lora_B["default"].weight.data = up
        self.block = nn.Module()
        self.block.q = part


def ups(rank: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, rank, generator=g) @ torch.randn(rank, 4, generator=g)


@pytest.mark.parametrize("rank", [4, 2])
def test_covariance_of_the_columns_is_isotropic_in_the_column_space(rank: int) -> None:
    # Cov(column of Delta W) = s^2 sigma^2 U U'; 20,000 draws of 3 columns: Monte-Carlo error 1.2 % of the norm, and a
    # failure at 5 % is four standard errors away
    up, sigma = ups(rank), 0.3
    draws = Draws(One(up), [LAYER])
    noise = draws.noise(LAYER, 0, 0, 20000, up)
    delta = LAYER.scaling * sigma * (up @ noise)  # (n, out, in)
    columns = delta.permute(1, 0, 2).reshape(6, -1).double()
    basis = torch.linalg.svd(up.double(), full_matrices=False)[0][:, :rank]
    wanted = (LAYER.scaling * sigma) ** 2 * basis @ basis.T
    found = columns @ columns.T / columns.shape[1]
    assert (found - wanted).norm() / wanted.norm() < 0.05
    outside = columns - basis @ (basis.T @ columns)
    assert outside.abs().max() < 1e-5 * columns.abs().max()


def test_the_rotated_form_has_the_same_law() -> None:
    # std sigma / d_i on row i of V'A: Delta W = s U diag(d) E, E_ij ~ N(0, (sigma / d_i)^2), is s sigma U Z
    up = ups().double()
    left, spectrum, right = torch.linalg.svd(up, full_matrices=False)
    spread = up @ right.T @ torch.diag(1.0 / spectrum)
    mine = roots(up)
    torch.testing.assert_close(mine.outer @ mine.outer.T, spread @ spread.T)
    torch.testing.assert_close(mine.outer @ mine.outer.T, left @ left.T)
    torch.testing.assert_close(mine.spectrum, spectrum)
    torch.testing.assert_close(mine.inner @ mine.inner, torch.linalg.inv(up.T @ up))


def test_signs_of_the_decomposition_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, svd = roots(ups()), torch.linalg.svd

    def flipped(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = svd(matrix, full_matrices=full_matrices)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=left.dtype)
        return left * signs, values, signs.unsqueeze(1) * right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    other = roots(ups())
    torch.testing.assert_close(plain.inner, other.inner, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.outer, other.outer, rtol=1e-12, atol=1e-12)


def test_a_draw_depends_on_its_own_name_alone() -> None:
    up = ups()
    one, two = Draws(One(up), [LAYER]), Draws(One(up), [LAYER])
    torch.testing.assert_close(one.noise(LAYER, 5, 0, 7, up)[3:5], two.noise(LAYER, 5, 3, 5, up), rtol=0, atol=0)
    assert torch.equal(one.noise(LAYER, 5, 0, 2, up), two.noise(LAYER, 5, 0, 2, up))
    other_layer = AdaptedLayer("block.v", "default", 3, 6, 4, 2.0)
    other_adapter = AdaptedLayer("block.q", "second", 3, 6, 4, 2.0)
    base = base_noise(5, LAYER, 0)
    for changed in (
        base_noise(6, LAYER, 0),
        base_noise(5, LAYER, 1),
        base_noise(5, other_layer, 0),
        base_noise(5, other_adapter, 0),
        base_noise(5 + 2**32, LAYER, 0),  # all bits of a seed count
    ):
        assert (changed - base).abs().min() > 0
    state = torch.get_rng_state()
    base_noise(0, LAYER, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_replaces_what_is_kept() -> None:
    up = ups()
    draws = Draws(One(up), [LAYER])
    first = draws.noise(LAYER, 1, 0, 3, up).clone()
    assert not torch.equal(first, draws.noise(LAYER, 2, 0, 3, up))
    assert torch.equal(first, draws.noise(LAYER, 1, 0, 3, up))
