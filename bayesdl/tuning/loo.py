"""Tuning by approximate leave-one-out: what each training point would have been predicted as without itself.

Removing one datum from a linearised Gaussian posterior has a closed form. With A = J P^-1 J^T at its outputs, the
root V of its Hessian (Lambda = V V^T), its score r (gradient of -log p) and S = V^T A V, the cavity is

    covariance  C = A + A V (I - S)^-1 V^T A,        mean  f + C r

(Woodbury; exact for linear-Gaussian models, one Newton step otherwise). Every candidate prior reweights the same
factors of one pass: nothing is refitted, and the network runs once.

The weights are taken to be the mode under every candidate. An overfitted network's are not: its own residuals are
tiny, and the rule then prefers ever stronger priors (benchmarks/README.md). tune("training") lets the mode move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnsupportedError, check_finite
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.linalg import eigh
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.grid import (
    Passes,
    choose,
    covariances,
    grid_of,
    least,
    passes,
    projected,
    relative_noise,
    repeated,
    training_source,
)
from bayesdl.tuning.interpolation import shifts_of
from bayesdl.tuning.temperature import predictive_losses

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

# exact leverages lie below one; those of an approximate curvature may not, and then count as almost one
MAX_LEVERAGE = 0.999
DEFAULT_LIMIT = 2000


def tune_loo(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    grid: Sequence[float] | None = None,
    limit: int | None = DEFAULT_LIMIT,
    progress: bool = False,
) -> BayesianModel:
    """Minimise the approximate leave-one-out NLL over the scalar prior precision, and an open Gaussian noise.

    Args:
        model: with a linearised Gaussian posterior.
        data: the training loader; default the one that the model was fitted on in this process.
        grid: prior precisions to try; default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.
        limit: how many training examples to use, the first of the loader; None for all.

    Raises:
        ArgumentError: no data.
        UnsupportedError: another kind of posterior, or empirical curvature with open noise.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit}; expected a positive number of training examples, or None for all")
    posterior, source = training_source(model, data, "loo")
    candidates = grid_of(grid)
    rows = passes(model, posterior, source, "leave-one-out", progress, limit, len(candidates))
    if isinstance(model.likelihood, Gaussian) and posterior.noise is not None:
        if posterior.noise_power != 2:
            raise UnsupportedError('leave-one-out of an open noise needs kind="ggn" or "mc", not "empirical"')
        scores, factors = _profiled(posterior, candidates, rows)
    else:
        scores, factors = _losses(model.likelihood, posterior, candidates, rows).mean(1), None
    return choose(model, posterior, candidates, least(scores), factors, "by leave-one-out")


def cavity(mean: Tensor, covariance: Tensor, root: Tensor, score: Tensor, temperature: float = 1.0) -> GaussianLatent:
    """Belief over the outputs of each example with that example removed.

    Args:
        mean: outputs `(B, C)`.
        covariance: A `(B, C, C)` at temperature one.
        root: V `(K, B, C)` with sum_k V_k V_k^T = Lambda.
        score: gradient of -log p `(B, C)`.
        temperature: T of the posterior, which multiplies its covariance and leaves the mean alone.
    """
    v = root.permute(1, 2, 0)  # (B, C, K)
    gain = covariance @ v
    grown = _grown(v.mT @ gain, gain)
    swollen = covariance + grown.mT @ grown
    moved = mean + (swollen @ score.unsqueeze(-1)).squeeze(-1)
    spread = temperature * swollen
    return GaussianLatent(moved, spread.diagonal(dim1=-2, dim2=-1), spread)


def _grown(leverage: Tensor, gain: Tensor) -> Tensor:
    """W `(B, K, C)` with W^T W = gain (I - S)^-1 gain^T, eigenvalues of S beyond the bound moved to it."""
    check_finite(leverage, "leverages")
    identity = torch.eye(leverage.shape[-1], dtype=leverage.dtype, device=leverage.device)
    # definite where all leverages stay below the bound, which is nearly everywhere
    beyond = torch.linalg.cholesky_ex(MAX_LEVERAGE * identity - leverage)[1] != 0
    rest = torch.where(beyond[:, None, None], identity, identity - leverage)
    found = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(rest)[0], gain.mT, upper=False)
    if bool(beyond.any()):
        values, basis = eigh(leverage[beyond], "leverages")
        turned = gain[beyond] @ basis
        found[beyond] = (turned / (1.0 - values.clamp(max=MAX_LEVERAGE)).sqrt().unsqueeze(-2)).mT
    return found


def _losses(likelihood: Likelihood, posterior: GaussianPosterior, candidates: Tensor, rows: Passes) -> Tensor:
    """Leave-one-out NLL `(R, N)` of every candidate prior precision."""
    heat, shifts, found = posterior.temperature, shifts_of(candidates), []
    for mean, target, turned in rows:
        exact = mean.double()
        goal = target.double() if target.dtype.is_floating_point else target
        root, score, parts = likelihood.hessian_root(exact), likelihood.score(exact, goal), []
        for covariance in covariances(posterior, shifts, turned, heat * posterior.scale):
            count = len(covariance)
            roots = root.unsqueeze(1).expand(-1, count, -1, -1).flatten(1, 2)
            latent = cavity(
                repeated(exact, count), covariance.double().flatten(0, 1), roots, repeated(score, count), heat
            )
            parts.append(predictive_losses(likelihood, latent, repeated(goal, count)))
        found.append(torch.cat(parts).view(len(candidates), -1).cpu())
    return torch.cat(found, 1)


def _profiled(posterior: GaussianPosterior, candidates: Tensor, rows: Passes) -> tuple[Tensor, Tensor]:
    """Mean leave-one-out NLL of every candidate at its own best common factor s of the noise scales, and those factors.

    Relative to the noise the leverages S do not depend on s: residuals become z / (1 - S), variances s^2 / (1 - S)
    (at temperature one), so that s^2 = mean of z^2 / (1 - S) in the eigenbasis of S.
    """
    relative, shifts = relative_noise(posterior), shifts_of(candidates)
    left, squares = [], []
    one = posterior.precision.new_ones(())
    for mean, target, turned in rows:
        level = relative.expand(mean.shape[-1])
        values, square = projected(posterior, shifts, turned, one, level, (target - mean).double() / level)
        left.append(1.0 - values.clamp(max=MAX_LEVERAGE))
        squares.append(square)
    rest, square = torch.cat(left, 1), torch.cat(squares, 1)  # (R, N, C)
    # variance / s^2 = 1 + T S / (1 - S); T = 1 leaves 1 / (1 - S)
    variance = 1.0 + posterior.temperature * (1.0 - rest) / rest
    error = square / rest.square()
    factors = (error / variance).mean((1, 2)).sqrt().clamp(min=1e-12)
    shares = error / variance / factors.square()[:, None, None]
    parts = 2.0 * factors.log()[:, None, None] + variance.log() + shares
    return 0.5 * parts.sum(-1).mean(1).cpu(), factors
