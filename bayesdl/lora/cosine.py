"""Uncertainty of cosine scores between two uncertain embeddings, in closed form.

The model is that of Baumann et al. 2024, "Post-hoc probabilistic vision-language models": embeddings are Gaussian, and
a score is t cos(x, y). Here the cosine is linearised along the sphere (its gradient is orthogonal to both embeddings),
so that noise along an embedding, which normalisation removes, adds nothing. Of second order two terms are kept, which
count where noise of many directions adds up: the product of both noises, and noise across an embedding lengthening it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, check_finite


def cosine_moments(
    mean_x: Tensor,
    var_x: Tensor,
    mean_y: Tensor,
    var_y: Tensor,
    *,
    scale: float = 1.0,
    bias: float = 0.0,
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores `scale * cos(x, y) + bias` of B inputs with C classes.

    With E = |mean|^2 + tr(Cov) and c = mean_x . mean_y / sqrt(E_x E_y):
    g_x = (mean_y / sqrt(E_y) - c mean_x / sqrt(E_x)) / sqrt(E_x), g_y likewise, and
    Var = g_x' Cov_x g_x + g_y' Cov_y g_y + tr(Cov_x Cov_y) / (E_x E_y)
    + c^2 / 2 (tr(C_x^2) / E_x^2 + tr(C_y^2) / E_y^2), C = (I - u u') Cov (I - u u') with u the mean's direction.

    Args:
        mean_x: `(B, p)`.
        var_x: diagonal variances `(B, p)`, or covariances `(B, p, p)`.
        mean_y: `(C, p)`.
        var_y: `(C, p)` or `(C, p, p)`.
        scale: t, which multiplies the cosine.
        bias: added to it (SigLIP).
        joint: return the covariance between the classes of one input, which share its noise; noises of different
            classes are independent.

    Returns:
        Means `(B, C)`, and variances `(B, C)` or covariances `(B, C, C)`. They are moments of a
        `bayesdl.latent.GaussianLatent`, for the categorical likelihood.

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: a negative variance, or an embedding of length zero.
        NonFiniteError: NaN or infinity.
    """
    _check(mean_x, var_x, "x")
    _check(mean_y, var_y, "y")
    if mean_x.shape[1] != mean_y.shape[1]:
        raise ShapeError(f"embeddings {tuple(mean_x.shape)} and {tuple(mean_y.shape)} differ in their last axis")
    length_x, length_y = _length(mean_x, var_x), _length(mean_y, var_y)  # (B, 1) and (C, 1)
    unit_x, unit_y = mean_x / length_x, mean_y / length_y
    cosine = unit_x @ unit_y.mT
    # gradients for every pair, (B, C, p)
    towards_y = (unit_y.unsqueeze(0) - cosine.unsqueeze(-1) * unit_x.unsqueeze(1)) / length_x.unsqueeze(1)
    towards_x = (unit_x.unsqueeze(1) - cosine.unsqueeze(-1) * unit_y.unsqueeze(0)) / length_y.unsqueeze(0)
    spread_x = towards_y * var_x.unsqueeze(1) if var_x.dim() == 2 else towards_y @ var_x
    own = towards_x * var_y if var_y.dim() == 2 else torch.einsum("bcp,cpq->bcq", towards_x, var_y)
    alone = (own * towards_x).sum(-1) + _product(var_x, var_y) / (length_x.square() @ length_y.square().mT)
    alone = alone + 0.5 * cosine.square() * (_across(mean_y, var_y) / length_y**4).mT
    stretch = 0.5 * _across(mean_x, var_x) / length_x**4  # common to all classes
    mean = scale * cosine + bias
    if not joint:
        return mean, scale**2 * ((spread_x * towards_y).sum(-1) + alone + stretch * cosine.square())
    common = stretch.unsqueeze(2) * cosine.unsqueeze(2) * cosine.unsqueeze(1)
    return mean, scale**2 * (spread_x @ towards_y.mT + torch.diag_embed(alone) + common)


@final
@dataclass(frozen=True)
class Embeddings:
    """Gaussian embeddings W a of one random projection W, whose covariances share their eigenvectors.

    Attributes:
        mean: `(n, p)`.
        basis: eigenvectors `(p, p)` of every covariance.
        variance: eigenvalues `(n, p)` of each embedding's covariance.
        shared: the same of the covariances between every two embeddings, `(p, n, n)`; None: they are not wanted.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    shared: Tensor | None = None


def score_moments(x: Embeddings, y: Embeddings, scale: float, bias: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """`cosine_moments` where all classes come from one random projection, in a few matrix products.

    Noises of different classes are then correlated, and so are the terms of second order: with K_jk the covariance of
    y_j and y_k and L_jk that across their means, Cov_jk = g_xj' Cov_x g_xk + g_yj' K_jk g_yk
    + tr(Cov_x K_jk) / (E_x sqrt(E_j E_k)) + c_j c_k / 2 (tr(C_x^2) / E_x^2 + tr(L_jk L_jk') / (E_j E_k)).

    Returns:
        Means and variances `(B, C)`, and covariances `(B, C, C)` where `y.shared` is given.
    """
    length_x, length_y = _length(x.mean, x.variance), _length(y.mean, y.variance)
    unit_x, unit_y = x.mean / length_x, y.mean / length_y
    cosine = unit_x @ unit_y.mT
    mean = scale * cosine + bias
    mine, theirs = unit_x @ x.basis, unit_y @ x.basis  # in the eigenvectors of x
    along = (x.variance * mine) @ theirs.mT
    inside = (x.variance * mine.square()).sum(1, keepdim=True)
    lengths = length_x.square()
    turned, own = unit_x @ y.basis, unit_y @ y.basis  # in those of y
    noise = x.variance @ (x.basis.mT @ y.basis).square() / lengths  # of x, as far as the eigenvectors of y see it
    stretch = 0.5 * _across(x.mean @ x.basis, x.variance) / lengths.square()
    if y.shared is None:
        first = x.variance @ theirs.square().mT - 2 * cosine * along + cosine.square() * inside
        second = turned.square() @ y.variance.mT - 2 * cosine * (turned @ (y.variance * own).mT)
        second = second + cosine.square() * (y.variance * own.square()).sum(1)
        spread = first / lengths + (second + noise @ y.variance.mT) / length_y.square().mT
        other = 0.5 * _across(y.mean @ y.basis, y.variance) / length_y**4
        spread = spread + cosine.square() * (stretch + other.mT)
        return mean, scale**2 * spread.clamp(min=0), None
    count = len(y.mean)
    products = cosine.unsqueeze(2) * cosine.unsqueeze(1)
    joint = (x.variance.unsqueeze(1) * theirs) @ theirs.mT
    joint = joint - _both(cosine.unsqueeze(1) * along.unsqueeze(2)) + products * inside.unsqueeze(2)
    flat = y.shared.flatten(1)
    once = (turned @ (y.shared * own.mT.unsqueeze(1)).flatten(1)).unflatten(1, (count, count))  # R_km in the sum
    twice = torch.einsum("mjk,jm,km->jk", y.shared, own, own)
    inner = ((turned.square() + noise) @ flat).unflatten(1, (count, count))
    inner = inner - _both(cosine.unsqueeze(1) * once) + products * twice
    others = length_y @ length_y.mT
    squares = y.shared.square().sum(0) - _both(torch.einsum("mjk,jm->jk", y.shared.square(), _units(own).square()))
    angles = torch.einsum("mjk,jm,km->jk", y.shared, _units(own), _units(own))
    second = stretch.unsqueeze(2) + 0.5 * (squares + angles.square()).clamp(min=0) / others.square()
    covariance = scale**2 * (joint / lengths.unsqueeze(2) + inner / others + products * second)
    return mean, covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0), 0.5 * (covariance + covariance.mT)


def _both(matrices: Tensor) -> Tensor:
    return matrices + matrices.mT


def _length(mean: Tensor, variance: Tensor) -> Tensor:
    """Root of the expected squared length, `(n, 1)`."""
    trace = variance.sum(-1) if variance.dim() == 2 else variance.diagonal(dim1=-2, dim2=-1).sum(-1)
    found = (mean.square().sum(-1) + trace).sqrt()
    if not bool((found > 0).all()):
        raise ArgumentError("an embedding has length zero; its cosine is not defined")
    return found.unsqueeze(-1)


def _units(mean: Tensor) -> Tensor:
    return torch.nn.functional.normalize(mean, dim=-1)


def _across(mean: Tensor, variance: Tensor) -> Tensor:
    """tr(C^2) `(n, 1)` of the covariances across the means: tr(Cov^2) - 2 u' Cov^2 u + (u' Cov u)^2."""
    unit = _units(mean)
    turned = variance * unit if variance.dim() == 2 else (variance @ unit.unsqueeze(2)).squeeze(2)
    total = variance.square().flatten(1).sum(1) - 2 * turned.square().sum(1) + (turned * unit).sum(1).square()
    return total.clamp(min=0).unsqueeze(1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """tr(Cov_x Cov_y) of every pair, `(B, C)`."""
    if one.dim() == 3 and other.dim() == 3:
        return one.flatten(1) @ other.mT.flatten(1).mT
    flat = [v if v.dim() == 2 else v.diagonal(dim1=-2, dim2=-1) for v in (one, other)]
    return flat[0] @ flat[1].mT


def _check(mean: Tensor, variance: Tensor, name: str) -> None:
    if mean.dim() != 2 or variance.shape not in (mean.shape, (*mean.shape, mean.shape[-1])):
        raise ShapeError(
            f"mean_{name} {tuple(mean.shape)} and var_{name} {tuple(variance.shape)}: expected (n, p) with (n, p) or "
            "(n, p, p)"
        )
    check_finite(mean, f"mean_{name}")
    check_finite(variance, f"var_{name}")
    diagonal = variance if variance.dim() == 2 else variance.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal < 0).any()):
        raise ArgumentError(f"var_{name} holds a negative variance")
