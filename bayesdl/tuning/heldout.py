"""Tuning on held-out data by the predictive negative log-likelihood. The network runs once, whatever is tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.curvature.estimate import chunk_size, chunks
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods import Gaussian
from bayesdl.posteriors import GaussianPosterior, ScaledPosterior
from bayesdl.tuning.temperature import fit_noise, fit_temperature, predictive_nll

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


def tune_heldout(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    grid: Sequence[float] | None = None,
    progress: bool = False,
) -> BayesianModel:
    """Minimise NLL on held-out data.

    A linearised Laplace posterior: the scalar prior precision over `grid` (and for a Gaussian likelihood the noise,
    in closed form). Any other posterior: a temperature on the outputs, or the noise of a Gaussian likelihood.

    Args:
        model: any method.
        data: loader of held-out batches with targets.
        grid: prior precisions to try; default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.

    Raises:
        ArgumentError: no data.
        UnsupportedError: a likelihood whose outputs have no temperature.
    """
    if data is None:
        raise ArgumentError('tune("heldout", val_loader) needs a loader of data the network was not trained on')
    posterior = model.posterior
    if isinstance(posterior, GaussianPosterior) and posterior.predictive == "linearized":
        return _tune_prior(model, posterior, data, grid, progress)
    latent, targets = _latents(model, data, progress)
    if isinstance(model.likelihood, Gaussian):
        noise = fit_noise(latent, targets)
        found = Finding("info", f"noise {[round(float(v), 4) for v in noise]} chosen on held-out data")
        return model.replaced(likelihood=model.likelihood.with_noise(noise), findings=(found,))
    if model.likelihood.task not in ("classification", "multilabel"):
        raise UnsupportedError(
            f"a {model.likelihood.name} likelihood has no output temperature; tune the method instead"
        )
    temperature, findings = fit_temperature(model.likelihood, latent, targets)
    base = posterior
    if isinstance(posterior, ScaledPosterior):
        base, temperature = posterior.base, temperature * posterior.temperature.to(temperature)
    return model.replaced(posterior=ScaledPosterior(base, temperature), findings=findings)


def _latents(model: BayesianModel, data: Iterable[Any], progress: bool) -> tuple[Latent, Tensor]:
    """Beliefs over outputs and checked targets of a whole loader."""
    prediction, targets = model.predict_with_targets(data, progress=progress)
    if targets is None:
        raise ArgumentError("the held-out loader yields no targets; expected (inputs, target)")
    latent = prediction.latent
    return latent, model.likelihood.check_targets(latent.mean, targets)


def _tune_prior(
    model: BayesianModel,
    posterior: GaussianPosterior,
    data: Iterable[Any],
    grid: Sequence[float] | None,
    progress: bool,
) -> BayesianModel:
    candidates = torch.logspace(-4, 6, 41, dtype=torch.float64) if grid is None else torch.as_tensor(grid).double()
    if candidates.dim() != 1 or not len(candidates) or not bool((candidates > 0).all()):
        raise ArgumentError(f"grid={grid!r}; expected positive prior precisions")
    open_noise = isinstance(model.likelihood, Gaussian) and posterior.noise is not None
    # with open noise s^2 the covariance is s^2 (H + s^2 shift)^-1: candidates are values of s^2 shift
    scale = torch.ones_like(posterior.scale) / posterior.temperature if open_noise else posterior.scale
    if open_noise and posterior.parts:
        scale = posterior.scale
    means, targets = [], []
    covariances: list[list[Tensor]] = [[] for _ in candidates]
    for number, inputs, target in batches(model.network, data, progress=progress, describe="held-out"):
        step = chunk_size(posterior.layout, posterior.curvature.name, torch.float32)
        for rows, labels in chunks(inputs, target, step):
            with in_batch(number):
                mean, factors = posterior.linearize(model.network, rows)
                model.likelihood.check_outputs(mean)
                targets.append(model.likelihood.check_targets(mean, torch.as_tensor(labels)))
            means.append(mean)
            turned = posterior.structure.prepared(factors)
            for store, value in zip(covariances, candidates, strict=True):
                store.append(posterior.structure.quad_prepared(turned, scale, value))
    mean, target = torch.cat(means), torch.cat(targets)
    scores, noises = [], []
    for store in covariances:
        covariance = torch.cat(store)
        latent = GaussianLatent(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance)
        if open_noise:
            factor = _common_factor(posterior, latent, target)
            noises.append(factor)
            score = _scaled_nll(model, posterior, latent, target, factor)
        else:
            score = predictive_nll(model.likelihood, latent, target)
        scores.append(score)
    best = int(torch.stack(scores).argmin())
    return _with_choice(model, posterior, candidates, best, noises)


def _common_factor(posterior: GaussianPosterior, latent: GaussianLatent, target: Tensor) -> Tensor:
    """Closed form: s^2 = mean of r^2 / (q + 1), with q the covariance at unit noise, relative noise scales kept."""
    relative = _relative(posterior, latent)
    return ((target - latent.mean).double().square() / (latent.variance.double() + relative.square())).mean().sqrt()


def _relative(posterior: GaussianPosterior, latent: GaussianLatent) -> Tensor:
    if posterior.noise is None or not posterior.parts:
        return torch.ones(latent.mean.shape[-1], dtype=torch.float64, device=latent.mean.device)
    return posterior.noise.double()


def _scaled_nll(
    model: BayesianModel, posterior: GaussianPosterior, latent: GaussianLatent, target: Tensor, factor: Tensor
) -> Tensor:
    square = factor.square().to(latent.mean)
    covariance = None if latent.covariance is None else latent.covariance * square
    scaled = GaussianLatent(latent.mean, latent.variance * square, covariance)
    if not isinstance(model.likelihood, Gaussian):
        raise UnsupportedError("a common noise factor belongs to a gaussian likelihood")
    return predictive_nll(model.likelihood.with_noise(_relative(posterior, latent) * factor), scaled, target)


def _with_choice(
    model: BayesianModel, posterior: GaussianPosterior, candidates: Tensor, best: int, noises: list[Tensor]
) -> BayesianModel:
    precision = candidates[best].to(posterior.precision.device)
    likelihood, noise = model.likelihood, None
    if noises and isinstance(likelihood, Gaussian):
        factor = noises[best]
        noise = factor * (posterior.noise.double() if posterior.parts and posterior.noise is not None else 1.0)
        noise = noise.reshape(-1)
        precision = precision / factor.square()
        likelihood = likelihood.with_noise(noise)
    findings = [Finding("info", f"prior precision {float(precision):.4g} (scalar) chosen on held-out data")]
    if best in (0, len(candidates) - 1):
        findings.append(
            Finding("warning", "the prior precision lies at the end of the grid", "pass a wider grid= to tune()")
        )
    return model.replaced(
        posterior=posterior.with_prior(precision, noise), likelihood=likelihood, findings=tuple(findings)
    )
