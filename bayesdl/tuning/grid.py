"""A grid of prior precisions for a linearised Laplace posterior: one pass of the network, whatever is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.batch import index_batch
from bayesdl.curvature.chunking import chunks
from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.products import selected
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, NonFiniteError, UnsupportedError, check_finite
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayesdl.linalg import eigh
from bayesdl.posteriors import GaussianPosterior
from bayesdl.posteriors.gaussian import JOINT_OUTPUTS
from bayesdl.tuning.interpolation import Shifts, shifts_of
from bayesdl.tuning.scores import Score, negative_log
from bayesdl.tuning.temperature import DRAWS, predictive_losses

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

Passes = Iterable[tuple[Tensor, Tensor, Sequence[Factor]]]
# scalars of the covariances, or draws, that a grid of priors holds at once
HELD = 1 << 25


def grid_of(grid: Sequence[float] | None) -> Tensor:
    """Candidates, float64; by default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.

    Raises:
        ArgumentError: empty, or a value that is not positive.
    """
    if grid is None:
        return torch.logspace(-4, 6, 41, dtype=torch.float64)
    candidates = torch.as_tensor(grid, dtype=torch.float64)
    if candidates.dim() != 1 or not len(candidates) or not bool((candidates > 0).all()):
        raise ArgumentError(f"grid={grid!r}; expected positive prior precisions")
    return candidates


def passes(
    model: BayesianModel,
    posterior: GaussianPosterior,
    data: Iterable[Any],
    describe: str,
    progress: bool,
    limit: int | None = None,
    candidates: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """Outputs, targets, and the part of the outputs' covariance that no prior changes, chunk by chunk.

    Args:
        model: gives network and likelihood.
        posterior: its posterior.
        data: loader with targets.
        describe: title of the progress bar.
        progress: whether to show it.
        limit: stop after so many examples.
        candidates: how many covariances of each example will be held at once.
    """
    yield from pieces(
        model, posterior, batches(model.network, data, progress=progress, describe=describe), limit, candidates
    )


def pieces(
    model: BayesianModel,
    posterior: GaussianPosterior,
    source: Iterable[tuple[int, Any, Any]],
    limit: int | None = None,
    candidates: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """`passes` over numbered inputs and targets."""
    outputs, unit, seen = posterior.layout.outputs, False, 0
    held = max(1, HELD // (candidates * max(outputs, min(outputs, JOINT_OUTPUTS) ** 2)))

    def step() -> int:
        # a last layer whose outputs are treated one by one holds no cotangents; known after the first piece
        return min(held, posterior.chunk_size(model.network, 1 if unit else None))

    for number, inputs, target in source:
        for rows, labels in chunks(inputs, target, step):
            with in_batch(number):
                if limit is not None and len(labels) > limit - seen:
                    rows, labels = index_batch(rows, slice(0, limit - seen)), labels[: limit - seen]
                parts = observed(model, posterior, rows, torch.as_tensor(labels))
                for mean, checked, factors in parts:
                    unit = all(isinstance(factor, LinearFactor) and factor.unit for factor in factors)
                    yield mean, checked, posterior.structure.prepared(factors)
                    seen += len(mean)
            if limit is not None and seen >= limit:
                return


def observed(
    model: BayesianModel, posterior: GaussianPosterior, rows: Any, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """Outputs `(n, C)`, checked targets and Jacobian factors of the observations of some examples that count.

    Positions are observations of their own; those whose target is ignored are left out.
    """
    likelihood, target = model.likelihood, None
    for part in posterior.jacobians(model.network, rows).parts(rows):
        mean, factors = part.mean, part.factors
        likelihood.check_outputs(mean)
        if part.index is None:
            goal = likelihood.check_targets(mean, labels)
        else:
            if target is None:  # checked against the shape of the whole batch
                target = likelihood.check_targets(mean[0].expand(*part.shape, -1), labels).flatten()
            goal = target[part.index]
        mask = likelihood.counted(goal)
        if mask is not None and not bool(mask.all()):
            mean, goal, factors = mean[mask], goal[mask], [selected(factor, mask) for factor in factors]
        if len(mean):
            yield mean, goal, factors


def by_marginals(likelihood: Likelihood, outputs: int) -> bool:
    """Whether a predictive density depends on the outputs' variances alone, or only they are computed."""
    mean_field = isinstance(likelihood, Categorical | Bernoulli) and likelihood.link == "probit"
    return mean_field or outputs > JOINT_OUTPUTS


def covariances(
    posterior: GaussianPosterior, shifts: Shifts, prepared: Sequence[Factor], scale: Tensor
) -> Iterator[Tensor]:
    """J P^-1 J^T `(r, B, C, C)` for R scalar shifts in their order, as many at once as memory allows."""
    yield from _pieces(shifts, posterior.structure.quads_prepared(prepared, scale, shifts.nodes), 1)


def projected(
    posterior: GaussianPosterior,
    shifts: Shifts,
    prepared: Sequence[Factor],
    scale: Tensor,
    level: Tensor,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariances of the outputs over noise scales `level` `(C,)`, and squared residuals along them.

    Both `(R, B, C)` float64, for residuals `(B, C)` relative to the noise.
    """
    values, squares = [], []
    for covariance in covariances(posterior, shifts, prepared, scale):
        spread, basis = eigh(covariance.double() / level.unsqueeze(-1) / level, "covariance of the outputs")
        values.append(spread)
        squares.append(torch.einsum("rbij,bi->rbj", basis, residual).square())
    return torch.cat(values), torch.cat(squares)


def losses(
    model: BayesianModel,
    posterior: GaussianPosterior,
    candidates: Tensor,
    rows: Passes,
    score: Score = negative_log,
) -> Tensor:
    """Negative log predictive density (or another score) of N examples under R prior precisions, `(R, N)` float64 on
    the CPU."""
    shifts, found = shifts_of(candidates / posterior.temperature), []
    for mean, target, prepared in rows:
        with torch.no_grad():
            parts = [
                predictive_losses(model.likelihood, latent, repeated(target, len(latent.mean) // len(mean)), score)
                for latent in _beliefs(model.likelihood, posterior, shifts, mean, prepared)
            ]
        found.append(torch.cat(parts).view(len(candidates), -1).cpu())
    return torch.cat(found, 1)


def repeated(tensor: Tensor, count: int) -> Tensor:
    """`count` copies one after another along the first axis."""
    return tensor.expand(count, *tensor.shape).flatten(0, 1)


def _beliefs(
    likelihood: Likelihood, posterior: GaussianPosterior, shifts: Shifts, mean: Tensor, prepared: Sequence[Factor]
) -> Iterator[GaussianLatent]:
    """Beliefs over the outputs `(r B, C)`, r shifts at a time, examples faster than shifts."""
    if by_marginals(likelihood, mean.shape[-1]):
        values = posterior.structure.marginals_prepared(prepared, posterior.scale, shifts.nodes)
        draws = 1 if isinstance(likelihood, Categorical | Bernoulli) and likelihood.link == "probit" else DRAWS
        for variance in _pieces(shifts, values, draws):
            check_finite(variance, "the posterior variances of the outputs")
            yield GaussianLatent(repeated(mean, len(variance)), variance.flatten(0, 1))
        return
    values = posterior.structure.quads_prepared(prepared, posterior.scale, shifts.nodes)
    for covariance in _pieces(shifts, values, max(1, DRAWS // mean.shape[-1])):
        flat = covariance.flatten(0, 1)
        variance = flat.diagonal(dim1=-2, dim2=-1)
        check_finite(variance, "the posterior variances of the outputs")
        yield GaussianLatent(repeated(mean, len(covariance)), variance, flat)


def _pieces(shifts: Shifts, values: Tensor, copies: int) -> Iterator[Tensor]:
    step = max(1, HELD // max(1, copies * values[0].numel()))
    for start in range(0, shifts.count, step):
        yield shifts.combined(values, slice(start, start + step))


def pick(candidates: Tensor, table: Tensor, standard_errors: float = 0.0) -> int:
    """The candidate of least mean loss, or the largest one within so many standard errors of it.

    Args:
        candidates: prior precisions `(R,)`.
        table: losses `(R, N)`.
        standard_errors: of the mean difference to the best candidate, example by example.

    Raises:
        NonFiniteError: no candidate has a finite loss.
    """
    best = least(table.mean(1))
    if not standard_errors > 0 or table.shape[1] < 2:
        return best
    gap = table - table[best]
    near = gap.mean(1) <= standard_errors * gap.std(1) / table.shape[1] ** 0.5
    return int(torch.where(near, candidates, candidates.new_full((), -torch.inf)).argmax())


def least(losses: Tensor) -> int:
    """The first of the least finite losses `(R,)`. Raises `NonFiniteError` where none is finite."""
    usable = torch.isfinite(losses)
    if not bool(usable.any()):
        raise NonFiniteError(
            "the loss is NaN or infinite at every prior precision tried; pass grid=[...] with larger precisions, or "
            "fit with dtype=torch.float64"
        )
    # argmin takes NaN for the least
    return int(torch.where(usable, losses, losses.new_full((), torch.inf)).argmin())


def training_source(
    model: BayesianModel, data: Iterable[Any] | None, rule: str
) -> tuple[GaussianPosterior, Iterable[Any]]:
    """What a rule on the training data works with: the posterior, and the loader given or the one of the fit.

    Raises:
        ArgumentError: no data is known.
        UnsupportedError: not a linearised Gaussian posterior.
    """
    posterior = model.posterior
    if not isinstance(posterior, GaussianPosterior) or posterior.predictive != "linearized":
        raise UnsupportedError(f'tune("{rule}") needs a linearised Laplace posterior; use tune("heldout", val_loader)')
    source = model.fit_data if data is None else data
    if source is None:
        raise ArgumentError(
            f'this model does not know its training data (was it loaded from a file?): tune("{rule}", loader)'
        )
    return posterior, source


def relative_noise(posterior: GaussianPosterior) -> Tensor:
    """Noise scales of the outputs up to the common factor, float64."""
    if posterior.noise is None or not posterior.parts:
        return torch.ones((), dtype=torch.float64, device=posterior.precision.device)
    return posterior.noise.double()


def choose(
    model: BayesianModel,
    posterior: GaussianPosterior,
    candidates: Tensor,
    best: int,
    factors: Tensor | None,
    how: str,
    widest: bool = False,
) -> BayesianModel:
    """The model at one of the candidates.

    Args:
        model: to be tuned.
        posterior: its posterior.
        candidates: prior precisions; with `factors` relative to the noise, s^p * prior precision.
        best: which of them.
        factors: common factor s of the noise scales at each; None where the noise is not open.
        how: end of the finding's sentence.
        widest: whether the smallest precision is what the rule wants if it can have it, and no reason to look further.
    """
    precision = candidates[best].to(posterior.precision.device)
    likelihood, noise = model.likelihood, None
    found = []
    if factors is not None and posterior.noise is not None and isinstance(likelihood, Gaussian):
        noise = factors[best] * relative_noise(posterior) * torch.ones_like(posterior.noise)
        precision = precision / factors[best] ** posterior.noise_power
        likelihood = likelihood.with_noise(noise)
        values = ", ".join(f"{float(v):.4g}" for v in noise[:8])
        found.append(Finding("info", f"noise (standard deviation) {values} chosen {how}", topic="noise"))
    found.insert(0, Finding("info", f"prior precision {float(precision):.4g} (scalar) chosen {how}", topic="prior"))
    if best == len(candidates) - 1 or (best == 0 and not widest):
        found.append(
            Finding(
                "warning", "the prior precision lies at the end of the grid", "pass a wider grid= to tune()", "prior"
            )
        )
    tuned = posterior.with_prior(precision, noise)
    return model.replaced(posterior=tuned, likelihood=likelihood, findings=tuple(found))
