"""Tuning by the marginal likelihood: prior precision and noise scales together.

The temperature of the posterior is no part of it. At temperature T the evidence is

    log p(D; T) = (log p(D | theta) - scatter / 2) / T - 1/2 (log|H + D| - log|D|),        D = diag(prior precision),

because 1/T leaves both determinants in the same power. The first bracket is negative for every discrete likelihood,
so that the evidence grows with T without end: p(y | f)^(1/T) is no distribution over y, and nothing charges for that.
Made one, a Gaussian's power is a Gaussian again, with sqrt(T) times the noise: there the temperature of the likelihood
is the common factor of the noise, which has a maximum. A categorical power is a softmax of f / T, other outputs with
other curvature; that temperature is chosen on held-out data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evidence import LOG_BOUND
from bayesdl.likelihoods import Gaussian
from bayesdl.network import Network
from bayesdl.posteriors.gaussian import GaussianPosterior
from bayesdl.tuning.surface import Surface, check_choice

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

SOLVERS = ("gradient", "fixed-point")


def tune_evidence(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    prior: str = "scalar",
    noise: bool | str = True,
    temperature: bool = False,
    solver: str = "gradient",
    steps: int = 100,
    algorithm: str | None = None,
    progress: bool = False,
) -> BayesianModel:
    """Maximise the Laplace evidence.

    Args:
        model: with a Gaussian posterior.
        data: not needed; accepted so that all rules are called alike.
        prior: "scalar", "layer" (one precision per block), "parameter" (structures `diag`, `full`, `lowrank`), or
            "keep".
        noise: whether to tune the noise too, where the fit left it open: True (one scale per output where the fit
            holds their curvatures, else a common factor), "scalar", "output" or False.
        temperature: tune the temperature of a Gaussian likelihood, which is the common factor of its open noise; the
            posterior's own temperature becomes 1. See the module's text for why there is none for other likelihoods.
        solver: "gradient" (L-BFGS on logarithms after a few fixed-point steps) or "fixed-point" (MacKay 1992).
        steps: upper limit of iterations.
        algorithm: an older name of `solver`.
        progress: as for other rules; nothing here takes long.

    Raises:
        UnsupportedError: the posterior is not Gaussian, the structure does not take this prior, or the likelihood has
            no temperature that the evidence could choose.
    """
    del data, progress
    posterior = model.posterior
    if not isinstance(posterior, GaussianPosterior):
        raise UnsupportedError(
            f'method {model.method_name!r} has no evidence; use tune("heldout", val_loader), or method "laplace"'
        )
    check_choice(prior, noise)
    solver = solver if algorithm is None else algorithm.replace("_", "-")
    if solver not in SOLVERS:
        raise ArgumentError(f"solver={solver!r}; choose one of {SOLVERS}")
    found: tuple[Finding, ...] = ()
    if temperature:
        posterior, found = _at_temperature_one(posterior, noise)
    tuned, findings = maximise(posterior, model.network, prior, noise, solver, steps)
    likelihood = model.likelihood
    if isinstance(likelihood, Gaussian) and tuned.noise is not None:
        likelihood = likelihood.with_noise(tuned.noise)
    return model.replaced(posterior=tuned, likelihood=likelihood, findings=found + findings)


def maximise(
    posterior: GaussianPosterior, network: Network, prior: str, noise: bool | str, solver: str, steps: int
) -> tuple[GaussianPosterior, tuple[Finding, ...]]:
    """The posterior at the evidence's maximum, and what to say about it."""
    with torch.inference_mode(False), torch.enable_grad():
        surface = Surface.of(posterior, network, prior, noise)
        log_precision, log_noise = surface.start()
        rounds = steps if solver == "fixed-point" else 12
        log_precision, log_noise = _fixed_point(surface, log_precision, log_noise, rounds)
        if solver == "gradient":
            log_precision, log_noise = _gradient(surface, log_precision, log_noise, steps)
        tuned = posterior.with_prior(surface.precision(log_precision), surface.level(log_noise))
    return tuned, _report(tuned, prior, log_precision, log_noise)


def _at_temperature_one(
    posterior: GaussianPosterior, noise: bool | str
) -> tuple[GaussianPosterior, tuple[Finding, ...]]:
    if posterior.noise is None or noise is False:
        raise UnsupportedError(
            "the evidence has no maximum in the temperature: p(y | f)^(1/T) is no distribution over y, and nothing "
            "charges for a large T. A Gaussian likelihood with open noise (bdl.Gaussian(), noise=True) has one, its "
            'noise; for others choose T on held-out data: tune("heldout", val_loader) or method "temperature"'
        )
    text = "temperature 1: that of a Gaussian likelihood is the common factor of its noise, which the evidence chose"
    return replace(posterior, temperature=1.0), (Finding("info", text, topic="temperature"),)


def _fixed_point(
    surface: Surface, log_precision: Tensor, log_noise: Tensor | None, rounds: int
) -> tuple[Tensor, Tensor | None]:
    """MacKay's updates, half-way: precision = T gamma / |theta - mean|^2, noise^2 = error / (N C - T gamma).

    gamma falls as the precision rises, so that whole steps overshoot; two precisions that share one direction of the
    data even change places for ever. Half of the step in logarithms leaves a contraction.
    """
    heat = surface.posterior.temperature
    for _ in range(rounds):
        before = log_precision, log_noise
        slope, slope_noise = _slopes(surface, log_precision, log_noise)
        if slope is not None:
            gamma = (surface.sizes - slope).clamp(min=1e-12)  # d log|P| / d log(shift) = size - gamma
            target = heat * gamma / surface.squares.clamp(min=1e-30)
            log_precision = 0.5 * (log_precision + target.log().clamp(-LOG_BOUND, LOG_BOUND))
        if log_noise is not None and slope_noise is not None:
            log_noise = 0.5 * (log_noise + _noise_update(surface, slope_noise, log_noise))
        if _distance(log_precision, before[0]) < 1e-8 and _distance(log_noise, before[1]) < 1e-8:
            break
    return log_precision, log_noise


def _distance(after: Tensor | None, before: Tensor | None) -> float:
    return 0.0 if after is None or before is None else float((after - before).abs().max())


def _noise_update(surface: Surface, slope: Tensor, log_noise: Tensor) -> Tensor:
    error = surface.posterior.squared_error
    if error is None or surface.relative is None:
        return log_noise
    gamma = -surface.posterior.temperature * slope / 2.0  # d log|P| / d log(noise) = -2 gamma
    weighted, count = error.double() / surface.relative.expand_as(error).square(), surface.posterior.num_data
    if not surface.by_output:
        weighted, count = weighted.sum(), count * len(error)
    return 0.5 * (weighted / (count - gamma).clamp(min=1e-3 * count)).clamp(min=1e-30).log()


def _slopes(surface: Surface, log_precision: Tensor, log_noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Derivatives of log|P| in the log-precisions and log-noises that are tuned."""
    leaf = None if surface.fixed is not None else log_precision.detach().requires_grad_()
    noisy = None if log_noise is None else log_noise.detach().requires_grad_()
    wanted = [value for value in (leaf, noisy) if value is not None]
    if not wanted:
        return None, None
    found = list(torch.autograd.grad(surface.logdet(log_precision if leaf is None else leaf, noisy), wanted))
    return None if leaf is None else found.pop(0), found[0] if found else None


def _gradient(
    surface: Surface, log_precision: Tensor, log_noise: Tensor | None, steps: int
) -> tuple[Tensor, Tensor | None]:
    tuned = surface.fixed is None
    leaves = [log_precision.detach().clone().requires_grad_()] if tuned else []
    if log_noise is not None:
        leaves.append(log_noise.detach().clone().requires_grad_())
    if not leaves:
        return log_precision, log_noise

    def unpack() -> tuple[Tensor, Tensor | None]:
        shift = leaves[0].clamp(-LOG_BOUND, LOG_BOUND) if tuned else log_precision
        return shift, None if log_noise is None else leaves[-1].clamp(-LOG_BOUND, LOG_BOUND)

    optimizer = torch.optim.LBFGS(leaves, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -surface.value(*unpack())
        loss.backward()
        return loss

    with torch.no_grad():
        before = float(surface.value(*unpack()))
    optimizer.step(closure)
    with torch.no_grad():
        after = float(surface.value(*unpack()))
    if not after >= before:  # a failed line search, NaN included: keep the fixed point
        return log_precision, log_noise
    shift, level = unpack()
    return shift.detach(), None if level is None else level.detach()


def _report(
    posterior: GaussianPosterior, prior: str, log_precision: Tensor, log_noise: Tensor | None
) -> tuple[Finding, ...]:
    findings = []
    if prior != "keep":
        values = ", ".join(f"{float(v):.4g}" for v in posterior.precision.reshape(-1)[:8])
        more = ", ..." if posterior.precision.numel() > 8 else ""
        findings.append(Finding("info", f"prior precision {values}{more} ({prior}) chosen by evidence", topic="prior"))
        bound = log_precision.abs() >= LOG_BOUND - 0.05
        if bool(bound.any()):
            which = ""
            if prior == "layer":
                named = [b.name for b, hit in zip(posterior.layout.blocks, bound.tolist(), strict=True) if hit]
                which = f" of {', '.join(map(repr, named[:4]))}{', ...' if len(named) > 4 else ''}"
            elif len(bound) > 1:
                which = f" of {int(bound.sum())} of {len(bound)} parameters"
            findings.append(
                Finding(
                    "warning",
                    f"the prior precision{which} ran to its bound: the evidence has no interior maximum there",
                    'use tune("heldout", val_loader), or pass prior=bdl.GaussianPrior(precision=...)',
                    topic="prior",
                )
            )
    if log_noise is not None and posterior.noise is not None:
        values = ", ".join(f"{float(v):.4g}" for v in posterior.noise.reshape(-1)[:8])
        findings.append(Finding("info", f"noise (standard deviation) {values} chosen by evidence", topic="noise"))
    return tuple(findings)
