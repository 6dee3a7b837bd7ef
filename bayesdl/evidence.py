"""The Laplace evidence: log p(D) as a differentiable function of prior precision, noise and temperature.

log p(D | theta) - 1/2 (scatter + log|P| - log|prior precision|), P = scale H + diag(prior precision)
(MacKay 1992, Immer et al. 2021). A temperature T divides log p(D | theta), H and the prior precision, the prior being
normalised afterwards. Curvature and statistics are those of one fit; nothing is refitted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.errors import UnsupportedError

if TYPE_CHECKING:
    from bayesdl.network import Network
    from bayesdl.posteriors.gaussian import GaussianPosterior

LOG_BOUND = 18.0  # precisions and noise variances are searched within exp(+-18)


def log_evidence(
    posterior: GaussianPosterior,
    network: Network,
    precision: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: Tensor | float | None = None,
) -> Tensor:
    """Evidence, a float64 scalar, differentiable in `precision`, `noise` and `temperature`.

    Args:
        posterior: a fit.
        network: holds the weights it was fitted at.
        precision: prior precision (scalar, per block, per parameter); default the posterior's own.
        noise: noise scales `(C,)` for a Gaussian likelihood with open noise; default the posterior's own.
        temperature: T, a scalar; default the posterior's own. The evidence has no maximum in it, see
            `bayesdl.tuning.evidence`.
    """
    heat = posterior.temperature if temperature is None else temperature
    shift = (posterior.precision if precision is None else precision) / heat
    if posterior.earlier is not None and float(heat) != 1.0:
        raise UnsupportedError("the evidence under the posterior of an earlier fit is known at temperature 1 only")
    level = posterior.noise if noise is None else noise
    structure = posterior.structure_at(level)
    logdet = structure.logdet(posterior.scale_at(level) * (posterior.temperature / heat), shift)
    return log_likelihood(posterior, level) / heat - 0.5 * (
        scatter(posterior, network, shift) + logdet - log_prior_precision(posterior, shift)
    )


def log_likelihood(posterior: GaussianPosterior, noise: Tensor | None) -> Tensor:
    """sum_n log p(y_n | f_n) at other noise scales, float64."""
    if noise is None or posterior.squared_error is None:
        return posterior.precision.new_tensor(posterior.log_likelihood, dtype=torch.float64)
    error = posterior.squared_error.double()
    level = noise.double().expand_as(error)
    constant = math.log(2 * math.pi)
    return -0.5 * (error / level.square() + posterior.num_data * (2 * level.log() + constant)).sum()


def scatter(posterior: GaussianPosterior, network: Network, precision: Tensor | None = None) -> Tensor:
    """(theta - mean)^T (earlier curvature + diag(precision)) (theta - mean), float64."""
    shift = posterior.precision if precision is None else precision
    squares = squared_offsets(posterior, network)
    total = torch.stack(
        [(square * s).sum() for square, s in zip(squares, posterior.layout.shifts(shift, squares[0]), strict=True)]
    ).sum()
    if posterior.earlier is None:
        return total
    flat = posterior.layout.flatten({k: v.detach() for k, v in network.parameters.items()}).double()
    offset = flat - posterior.prior_mean.to(flat)
    return total + (offset * posterior.earlier.product(offset).to(offset)).sum()


def squared_offsets(posterior: GaussianPosterior, network: Network) -> list[Tensor]:
    """(theta - prior mean)^2 per block, float64."""
    layout, values = posterior.layout, network.parameters
    mean = posterior.prior_mean.double()
    means = [mean] * len(layout.blocks) if mean.numel() == 1 else layout.split(mean)
    # block by block and in place: a last layer of many classes is large
    return [
        _own(block.pack(values).detach()).sub_(centre.reshape(()) if centre.numel() == 1 else centre).square_()
        for block, centre in zip(layout.blocks, means, strict=True)
    ]


def _own(weights: Tensor) -> Tensor:
    """A float64 copy that may be written to."""
    return weights.to(torch.float64, copy=True)


def log_prior_precision(posterior: GaussianPosterior, precision: Tensor) -> Tensor:
    """log|earlier curvature + diag(precision)| over all selected parameters, float64."""
    if posterior.earlier is not None:
        return posterior.earlier.logdet(1.0, precision)
    like = torch.zeros((), dtype=torch.float64, device=precision.device)
    shifts = posterior.layout.shifts(precision, like)
    sizes = [(b.groups, b.rows, b.columns) for b in posterior.layout.blocks]
    return torch.stack([s.log().expand(size).sum() for s, size in zip(shifts, sizes, strict=True)]).sum()


def effective_parameters(posterior: GaussianPosterior) -> float:
    """gamma = tr(scale H P^-1), the number of directions that the data determine (MacKay 1992)."""
    with torch.enable_grad():
        scale = posterior.scale.double().detach().requires_grad_()
        logdet = posterior.structure.logdet(scale, posterior.shift)
        (slope,) = torch.autograd.grad(logdet, scale)
    return float((slope * scale).detach())
