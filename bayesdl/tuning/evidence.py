"""Tuning by the marginal likelihood: prior precision (scalar or per layer) and noise scales together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evidence import log_evidence, squared_offsets
from bayesdl.likelihoods import Gaussian
from bayesdl.network import Network
from bayesdl.posteriors.gaussian import GaussianPosterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

LOG_BOUND = 18.0  # precisions and noise variances stay within exp(+-18)
ALGORITHMS = ("gradient", "fixed_point")


def tune_evidence(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    prior: str = "scalar",
    noise: bool = True,
    algorithm: str = "gradient",
    steps: int = 100,
) -> BayesianModel:
    """Maximise the Laplace evidence.

    Args:
        model: with a Gaussian posterior.
        data: not needed; accepted so that all rules are called alike.
        prior: "scalar", "layer" (one precision per block), or "keep".
        noise: tune the noise too, where the fit left it open.
        algorithm: "gradient" (L-BFGS on logarithms after a few fixed-point steps) or "fixed_point" (MacKay 1992).
        steps: upper limit of iterations.

    Raises:
        UnsupportedError: the posterior is not Gaussian.
    """
    del data
    posterior = model.posterior
    if not isinstance(posterior, GaussianPosterior):
        raise UnsupportedError(
            f'method {model.method_name!r} has no evidence; use tune("heldout", val_loader), or method "laplace"'
        )
    if prior not in ("scalar", "layer", "keep"):
        raise ArgumentError(f"prior={prior!r}; choose 'scalar', 'layer' or 'keep'")
    if algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm={algorithm!r}; choose one of {ALGORITHMS}")
    tuned, findings = maximise(posterior, model.network, prior, noise, algorithm, steps)
    likelihood = model.likelihood
    if isinstance(likelihood, Gaussian) and tuned.noise is not None:
        likelihood = likelihood.with_noise(tuned.noise)
    return model.replaced(posterior=tuned, likelihood=likelihood, findings=findings)


def maximise(
    posterior: GaussianPosterior, network: Network, prior: str, noise: bool, algorithm: str, steps: int
) -> tuple[GaussianPosterior, tuple[Finding, ...]]:
    """The posterior at the evidence's maximum, and what to say about it."""
    with torch.inference_mode(False), torch.enable_grad():
        log_precision = _start(posterior, prior)
        log_noise = None
        if noise and posterior.noise is not None:
            # several scales need the curvature of each output alone; otherwise their ratio stays as it is
            log_noise = (
                posterior.noise.double().log()
                if posterior.parts
                else posterior.noise.new_zeros((), dtype=torch.float64)
            )
        rounds = steps if algorithm == "fixed_point" else 10
        log_precision, log_noise = _fixed_point(posterior, network, prior, log_precision, log_noise, rounds)
        if algorithm == "gradient":
            log_precision, log_noise = _gradient(posterior, network, prior, log_precision, log_noise, steps)
    precision = posterior.precision if prior == "keep" else log_precision.exp()
    tuned = posterior.with_prior(precision, None if log_noise is None else _level(posterior, log_noise))
    return tuned, _report(tuned, prior, log_precision, log_noise)


def _start(posterior: GaussianPosterior, prior: str) -> Tensor:
    if prior == "layer":
        mean = posterior.precision.double().log().mean()
        return mean.expand(len(posterior.layout.blocks)).clone()
    return posterior.precision.double().log().mean()


def _level(posterior: GaussianPosterior, log_noise: Tensor) -> Tensor:
    """Noise scales `(C,)` from their logarithms, or from the logarithm of a common factor."""
    if posterior.noise is None:
        raise UnsupportedError("this fit holds no open noise: pass bdl.Gaussian() without noise= to leave it open")
    return log_noise.exp() if posterior.parts else posterior.noise.double() * log_noise.exp()


def _objective(
    posterior: GaussianPosterior, network: Network, prior: str, log_precision: Tensor, log_noise: Tensor | None
) -> Tensor:
    precision = posterior.precision if prior == "keep" else log_precision.exp()
    level = None if log_noise is None else _level(posterior, log_noise)
    return log_evidence(posterior, network, precision, level)


def _fixed_point(
    posterior: GaussianPosterior,
    network: Network,
    prior: str,
    log_precision: Tensor,
    log_noise: Tensor | None,
    rounds: int,
) -> tuple[Tensor, Tensor | None]:
    """MacKay's updates: precision = T gamma / |theta - mean|^2, noise^2 = error / (N C - T gamma)."""
    sizes = torch.tensor([float(b.numel) for b in posterior.layout.blocks], dtype=torch.float64)
    offsets = torch.stack([s.sum() for s in squared_offsets(posterior, network)])
    sizes = sizes.to(offsets)
    if prior != "layer":
        sizes, offsets = sizes.sum(), offsets.sum()
    for _ in range(rounds):
        shift, slope_noise = _slopes(posterior, prior, log_precision, log_noise)
        before = log_precision, log_noise
        if prior != "keep":
            gamma = (sizes - shift).clamp(min=1e-12)  # d log|P| / d log(shift) = size - gamma
            target = posterior.temperature * gamma / offsets.clamp(min=1e-12)
            log_precision = target.log().clamp(-LOG_BOUND, LOG_BOUND)
        if log_noise is not None and slope_noise is not None:
            log_noise = _noise_update(posterior, slope_noise, log_noise)
        if _distance(log_precision, before[0]) < 1e-8 and _distance(log_noise, before[1]) < 1e-8:
            break
    return log_precision, log_noise


def _distance(after: Tensor | None, before: Tensor | None) -> float:
    return 0.0 if after is None or before is None else float((after - before).abs().max())


def _noise_update(posterior: GaussianPosterior, slope: Tensor, log_noise: Tensor) -> Tensor:
    error = posterior.squared_error
    if error is None or posterior.noise is None:
        return log_noise
    gamma = -posterior.temperature * slope / 2.0  # d log|P| / d log(noise) = -2 gamma
    if posterior.parts:
        left = (posterior.num_data - gamma).clamp(min=1e-3 * posterior.num_data)
        return 0.5 * (error.double() / left).clamp(min=1e-30).log()
    weighted = (error.double() / posterior.noise.double().expand_as(error).square()).sum()
    count = posterior.num_data * len(error)
    return 0.5 * (weighted / (count - gamma).clamp(min=1e-3 * count)).clamp(min=1e-30).log()


def _slopes(
    posterior: GaussianPosterior, prior: str, log_precision: Tensor, log_noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Derivatives of log|P| in the log-precisions and log-noises."""
    leaf = log_precision.detach().requires_grad_()
    noisy = None if log_noise is None else log_noise.detach().requires_grad_()
    level = posterior.noise if noisy is None else _level(posterior, noisy)
    precision = posterior.precision if prior == "keep" else leaf.exp()
    logdet = posterior.structure_at(level).logdet(posterior.scale_at(level), precision / posterior.temperature)
    wanted = [v for v in (None if prior == "keep" else leaf, noisy) if v is not None]
    found = list(torch.autograd.grad(logdet, wanted)) if wanted else []
    first = torch.zeros_like(log_precision) if prior == "keep" else found.pop(0)
    return first, found[0] if found else None


def _gradient(
    posterior: GaussianPosterior,
    network: Network,
    prior: str,
    log_precision: Tensor,
    log_noise: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor | None]:
    leaves = [] if prior == "keep" else [log_precision.detach().clone().requires_grad_()]
    if log_noise is not None:
        leaves.append(log_noise.detach().clone().requires_grad_())
    if not leaves:
        return log_precision, log_noise

    def unpack() -> tuple[Tensor, Tensor | None]:
        shift = log_precision if prior == "keep" else leaves[0].clamp(-LOG_BOUND, LOG_BOUND)
        return shift, None if log_noise is None else leaves[-1].clamp(-LOG_BOUND, LOG_BOUND)

    optimizer = torch.optim.LBFGS(leaves, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -_objective(posterior, network, prior, *unpack())
        loss.backward()
        return loss

    before = float(_objective(posterior, network, prior, *unpack()).detach())
    optimizer.step(closure)
    after = float(_objective(posterior, network, prior, *unpack()).detach())
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
        if bool((log_precision.abs() >= LOG_BOUND - 1e-3).any()):
            findings.append(
                Finding(
                    "warning",
                    "the prior precision ran to its bound: the evidence has no interior maximum on this network",
                    'use tune("heldout", val_loader), or pass prior=bdl.GaussianPrior(precision=...)',
                    topic="prior",
                )
            )
    if log_noise is not None and posterior.noise is not None:
        values = ", ".join(f"{float(v):.4g}" for v in posterior.noise.reshape(-1)[:8])
        findings.append(Finding("info", f"noise (standard deviation) {values} chosen by evidence", topic="noise"))
    return tuple(findings)
