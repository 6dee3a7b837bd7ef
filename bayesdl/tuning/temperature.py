"""One number on cached latents: a temperature for logits, a noise scale for regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.posteriors.base import standard_normal
from bayesdl.posteriors.scaled import scale_latent
from bayesdl.tuning.scores import Score, negative_log

BOUND = math.log(100.0)
# of the latent, for likelihoods without a closed form
DRAWS = 64
GRID = 33
GRID_STEP = 2.0 * BOUND / (GRID - 1)


def predictive_nll(likelihood: Likelihood, latent: Latent, targets: Tensor, score: Score = negative_log) -> Tensor:
    """Mean negative log predictive density, float64; differentiable in what the latent depends on."""
    return predictive_losses(likelihood, latent, targets, score).mean()


def predictive_losses(likelihood: Likelihood, latent: Latent, targets: Tensor, score: Score = negative_log) -> Tensor:
    """Negative log predictive density of every example `(B,)`, float64; or another score of the predictive."""
    noise = standard_normal((DRAWS, latent.mean.shape[-1]), latent.mean, None)
    distribution = likelihood.marginal(latent, noise)
    return score(distribution, targets).double()


def fit_temperature(
    likelihood: Likelihood, latent: Latent, targets: Tensor, score: Score = negative_log
) -> tuple[Tensor, tuple[Finding, ...]]:
    """T that minimises the NLL (or another score) of f / T, in float64 over log T by a bracketed scalar search.

    The NLL of a single network is convex in 1/T (Guo et al. 2017); mixtures are searched on the same bracket.
    """
    exact = latent.map(lambda t: t.double() if t.dtype.is_floating_point else t)
    goal = targets.double() if targets.dtype.is_floating_point else targets

    def loss(log_t: Tensor) -> Tensor:
        return predictive_nll(likelihood, scale_latent(exact, log_t.exp()), goal, score)

    log_t = minimise(loss, latent.mean.device)
    if log_t < GRID_STEP - BOUND:
        return torch.ones((), dtype=torch.float64, device=latent.mean.device), (_undetermined(log_t),)
    findings = [Finding("info", f"temperature {math.exp(log_t):.4f} chosen on held-out data", topic="temperature")]
    if log_t > BOUND - GRID_STEP:  # an NLL that is flat there has its least value anywhere in the last cell
        findings.append(
            Finding(
                "warning",
                f"the temperature {math.exp(log_t):.3g} lies at its search bound",
                "check the held-out labels",
                "temperature",
            )
        )
    return torch.tensor(math.exp(log_t), dtype=torch.float64, device=latent.mean.device), tuple(findings)


def _undetermined(log_t: float) -> Finding:
    """Data without an error have no best temperature: the sharper, the better, which no data to come will bear out."""
    return Finding(
        "warning",
        f"the loss on the held-out data keeps falling down to the search bound of the temperature "
        f"({math.exp(log_t):.3g}): they hold no error and cannot tell it, so that it stays 1",
        "are they held out, or the training set? give more of them",
        "temperature",
    )


def fit_noise(latent: Latent, targets: Tensor) -> Tensor:
    """Noise scales `(C,)` at the minimum of the NLL, with the latent as it is.

    Each output alone first, by a bracketed search; then all together, because the outputs of a mixture share its
    components.
    """
    exact = latent.map(Tensor.double)
    target = targets.double()
    residual = (target - exact.mean).square().mean(0).sqrt().clamp(min=1e-12)
    # the latent's own variance can only lower the noise: search around the residual's scale, output by output
    chosen = []
    for c in range(target.shape[-1]):
        one = _output(exact, c)

        def loss(log_factor: Tensor, one: Latent = one, c: int = c) -> Tensor:
            return predictive_nll(Gaussian(residual[c] * log_factor.exp()), one, target[:, c : c + 1])

        chosen.append(residual[c] * math.exp(minimise(loss, exact.mean.device)))
    alone = torch.stack(chosen)
    return alone if len(alone) == 1 else _jointly(exact, target, alone)


def _jointly(latent: Latent, target: Tensor, start: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        latent, target = latent.map(torch.clone), target.clone()
        leaf = start.log().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([leaf], max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = predictive_nll(Gaussian(leaf.exp()), latent, target)
            loss.backward()
            return loss

        optimizer.step(closure)
    found = leaf.detach().exp()
    before, after = (float(predictive_nll(Gaussian(noise), latent, target)) for noise in (start, found))
    return found if after <= before else start  # a failed line search, NaN included


def _output(latent: Latent, index: int) -> Latent:
    if isinstance(latent, SampleLatent):
        return latent.on_samples(lambda tensor: tensor[..., index : index + 1])
    return GaussianLatent(latent.mean[:, index : index + 1], latent.variance[:, index : index + 1])


def minimise(loss: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """Coarse grid over [-BOUND, BOUND], then golden-section search around its best point."""
    with torch.no_grad():
        grid = torch.linspace(-BOUND, BOUND, GRID, dtype=torch.float64, device=device)
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
        middle = 0.5 * (low + high)
        # several minima may share the bracket: never leave the grid's best point for a worse one
        return middle if float(loss(grid.new_tensor(middle))) <= float(values[best]) else float(grid[best])
