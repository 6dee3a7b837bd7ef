"""One number on cached latents: a temperature for logits, a noise scale for regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl import mixtures
from bayesdl.diagnose import Finding
from bayesdl.latent import Latent
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.posteriors.base import standard_normal
from bayesdl.posteriors.scaled import scale_latent

BOUND = math.log(100.0)


def predictive_nll(likelihood: Likelihood, latent: Latent, targets: Tensor) -> Tensor:
    """Mean negative log predictive density, float64; differentiable in what the latent depends on."""
    noise = standard_normal((64, latent.mean.shape[-1]), latent.mean, None)
    distribution = likelihood.marginal(latent, noise)
    return -mixtures.per_example(distribution, distribution.log_prob(targets)).double().mean()


def fit_temperature(likelihood: Likelihood, latent: Latent, targets: Tensor) -> tuple[Tensor, tuple[Finding, ...]]:
    """T that minimises the NLL of f / T, in float64 over log T by a bracketed scalar search.

    The NLL of a single network is convex in 1/T (Guo et al. 2017); mixtures are searched on the same bracket.
    """
    exact = latent.map(lambda t: t.double() if t.dtype.is_floating_point else t)
    goal = targets.double() if targets.dtype.is_floating_point else targets

    def loss(log_t: Tensor) -> Tensor:
        return predictive_nll(likelihood, scale_latent(exact, log_t.exp()), goal)

    log_t = _minimise(loss, latent.mean.device)
    findings = [Finding("info", f"temperature {math.exp(log_t):.4f} chosen on held-out data")]
    if abs(log_t) > BOUND - 1e-3:
        findings.append(
            Finding(
                "warning",
                f"the temperature {math.exp(log_t):.3g} lies at its search bound",
                "check the held-out labels",
            )
        )
    return torch.tensor(math.exp(log_t), dtype=torch.float64, device=latent.mean.device), tuple(findings)


def fit_noise(latent: Latent, targets: Tensor) -> Tensor:
    """Noise scales `(C,)`, each minimising the NLL of its own output with the latent as it is."""
    target = targets.double()
    count = target.shape[-1]
    residual = (target - latent.mean.double()).square().mean(0).sqrt().clamp(min=1e-12)
    # the latent's own variance can only lower the noise: search around the residual's scale, output by output
    chosen = []
    for c in range(count):
        one = _output(latent, c)

        def loss(log_factor: Tensor, one: Latent = one, c: int = c) -> Tensor:
            likelihood = _Noisy(residual[c] * log_factor.exp())
            return likelihood.nll(one, target[:, c : c + 1])

        chosen.append(residual[c] * math.exp(_minimise(loss, latent.mean.device)))
    return torch.stack(chosen)


class _Noisy:
    """Gaussian NLL whose noise stays in the graph."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def nll(self, latent: Latent, target: Tensor) -> Tensor:
        weights, means, variances = Gaussian(1.0).components(latent, latent.mean.new_zeros(1, 1))
        spread = variances - 1.0 + self.noise.square()
        log_p = -0.5 * ((target - means).square() / spread + spread.log() + math.log(2 * math.pi))
        return -torch.logsumexp(log_p.squeeze(-1) + weights.log().unsqueeze(-1), 0).mean()


def _output(latent: Latent, index: int) -> Latent:
    from bayesdl.latent import GaussianLatent, SampleLatent

    if isinstance(latent, SampleLatent):
        return SampleLatent(latent.samples[..., index : index + 1].double(), latent.weights.double())
    return GaussianLatent(latent.mean[:, index : index + 1].double(), latent.variance[:, index : index + 1].double())


def _minimise(loss: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """Coarse grid over [-BOUND, BOUND], then golden-section search around its best point."""
    with torch.no_grad():
        grid = torch.linspace(-BOUND, BOUND, 33, dtype=torch.float64, device=device)
        values = torch.stack([loss(point) for point in grid])
        best = int(values.argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
        ratio = (math.sqrt(5.0) - 1.0) / 2.0
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        f_left, f_right = (float(loss(grid.new_tensor(p))) for p in (left, right))
        while high - low > 1e-7:
            if f_left < f_right:
                high, right, f_right = right, left, f_left
                left = high - ratio * (high - low)
                f_left = float(loss(grid.new_tensor(left)))
            else:
                low, left, f_left = left, right, f_right
                right = low + ratio * (high - low)
                f_right = float(loss(grid.new_tensor(right)))
    return 0.5 * (low + high)
