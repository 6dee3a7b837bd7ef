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

from bayesdl.errors import UnsupportedError
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.linalg import eigh
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.grid import Passes, choose, grid_of, passes, relative_noise, training_source
from bayesdl.tuning.temperature import predictive_nll

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
    posterior, source = training_source(model, data, "loo")
    candidates = grid_of(grid)
    rows = passes(model, posterior, source, "leave-one-out", progress, limit)
    if isinstance(model.likelihood, Gaussian) and posterior.noise is not None:
        if posterior.noise_power != 2:
            raise UnsupportedError('leave-one-out of an open noise needs kind="ggn" or "mc", not "empirical"')
        scores, factors = _profiled(posterior, candidates, rows)
    else:
        scores, factors = _scores(model.likelihood, posterior, candidates, rows), None
    return choose(model, posterior, candidates, int(scores.argmin()), factors, "by leave-one-out")


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
    values, basis = eigh(v.mT @ gain, "leverages")
    turned = gain @ basis
    swollen = covariance + (turned / (1.0 - values.clamp(max=MAX_LEVERAGE)).unsqueeze(-2)) @ turned.mT
    moved = mean + (swollen @ score.unsqueeze(-1)).squeeze(-1)
    spread = temperature * swollen
    return GaussianLatent(moved, spread.diagonal(dim1=-2, dim2=-1), spread)


def _scores(likelihood: Likelihood, posterior: GaussianPosterior, candidates: Tensor, rows: Passes) -> Tensor:
    """Mean leave-one-out NLL of every candidate prior precision."""
    totals, count = candidates.new_zeros(len(candidates)), 0
    heat = posterior.temperature
    for mean, target, turned in rows:
        exact = mean.double()
        goal = target.double() if target.dtype.is_floating_point else target
        root, score = likelihood.hessian_root(exact), likelihood.score(exact, goal)
        for i, covariance in enumerate(posterior.covariances(turned, heat * posterior.scale, candidates)):
            latent = cavity(exact, covariance.double(), root, score, heat)
            totals[i] += predictive_nll(likelihood, latent, goal).cpu() * len(mean)
        count += len(mean)
    return totals / count


def _profiled(posterior: GaussianPosterior, candidates: Tensor, rows: Passes) -> tuple[Tensor, Tensor]:
    """Mean leave-one-out NLL of every candidate at its own best common factor s of the noise scales, and those factors.

    Relative to the noise the leverages S do not depend on s: residuals become z / (1 - S), variances s^2 / (1 - S)
    (at temperature one), so that s^2 = mean of z^2 / (1 - S) in the eigenbasis of S.
    """
    relative = relative_noise(posterior)
    left: list[list[Tensor]] = [[] for _ in candidates]
    squares: list[list[Tensor]] = [[] for _ in candidates]
    one = posterior.precision.new_ones(())
    for mean, target, turned in rows:
        level = relative.expand(mean.shape[-1])
        residual = (target - mean).double() / level
        for i, covariance in enumerate(posterior.covariances(turned, one, candidates)):
            values, basis = eigh(covariance.double() / level.unsqueeze(-1) / level, "leverages")
            left[i].append(1.0 - values.clamp(max=MAX_LEVERAGE))
            squares[i].append(torch.einsum("bij,bi->bj", basis, residual).square())
    scores, factors = [], []
    for rest, square in zip(map(torch.cat, left), map(torch.cat, squares), strict=True):
        # variance / s^2 = 1 + T S / (1 - S); T = 1 leaves 1 / (1 - S)
        variance = 1.0 + posterior.temperature * (1.0 - rest) / rest
        error = square / rest.square()
        factor = (error / variance).mean().sqrt().clamp(min=1e-12)
        scores.append(0.5 * (2.0 * factor.log() + variance.log() + error / variance / factor.square()).sum(-1).mean())
        factors.append(factor)
    return torch.stack(scores).cpu(), torch.stack(factors)
