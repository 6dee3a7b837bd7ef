"""Left-out residuals of a regression network without a refit: leave-one-out of its linear model in function space.

Around the trained weights theta* the network is f(x; theta) = f(x; theta*) + J (theta - theta*). Under a prior
N(m, I / d) the functions are a Gaussian process of mean f + J (m - theta*) and kernel J J^T / d, whose leave-one-out
residuals have a closed form (Rasmussen & Williams 2006, section 5.4.2): with B = (c J J^T + I)^-1 relative to the
noise variance s^2, c = 1 / (d s^2), and t = y - mean,

    residual of n without n   e_n = B_nn^-1 (B t)_n,   its covariance   s^2 B_nn^-1.

The weights need not be the mode under that prior: the mode moves with it, which leave-one-out around fixed weights
leaves out. c and s are those at which the left-out data are likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.linalg import eigh

RATIOS = 49  # values of c, evenly spaced in logarithm over twelve decades


@dataclass(frozen=True)
class Space:
    """A linear model in function space, in the eigenbasis of its kernel.

    Attributes:
        values: eigenvalues of J J^T `(N C,)`.
        basis: eigenvectors, rows by example and output, `(N, C, N C)`.
        target: targets minus the prior mean in that basis, `(N C,)`.
    """

    values: Tensor
    basis: Tensor
    target: Tensor

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left-out residuals `(N, C)`, B_nn `(N, C, C)`, and the likeliest noise scale s at ratio c."""
        shrink = 1.0 / (1.0 + ratio * self.values)
        weighted = self.basis * shrink
        precision = weighted @ self.basis.mT
        pull = weighted @ self.target
        residual = torch.linalg.solve(precision, pull.unsqueeze(-1)).squeeze(-1)
        return residual, precision, (residual * pull).mean().clamp(min=1e-24).sqrt()


def space(kernel: Tensor, target: Tensor) -> Space:
    """The model of a kernel `(N C, N C)` and targets minus prior mean `(N, C)`, both relative to the noise."""
    values, basis = eigh(kernel, "kernel of the linear model")
    return Space(values.clamp(min=0.0), basis.view(*target.shape, -1), basis.mT @ target.flatten())


def nll(precision: Tensor, noise: Tensor) -> Tensor:
    """Mean left-out NLL per example at the likeliest noise, without constants."""
    return noise.log() * precision.shape[-1] - 0.5 * torch.linalg.slogdet(precision)[1].mean()


def left_out(kernel: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    """Left-out residuals `(N, C)` at the likeliest ratio.

    Args:
        kernel: J J^T `(N C, N C)`.
        residual: y - f `(N, C)`.
        slope: J (theta* - m) `(N, C)`.

    On the whole a point left out is predicted worse than one left in. Where the linear model says otherwise, because it
    would fit the data better than the network ever did, every point keeps at least the residual that it has.
    """
    model = space(kernel, residual + slope)
    centre = model.values.mean().clamp(min=1e-300)
    candidates = torch.logspace(-6, 6, RATIOS, dtype=torch.float64, device=kernel.device) / centre
    tried = [model.at(ratio) for ratio in candidates]
    scores = torch.stack([nll(precision, noise) for _, precision, noise in tried])
    found = tried[int(scores.argmin())][0]
    if float(found.square().mean()) >= float(residual.square().mean()):
        return found
    return torch.where(found.abs() >= residual.abs(), found, residual)
