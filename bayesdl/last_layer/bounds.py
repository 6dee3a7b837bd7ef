"""Upper bounds on E[logsumexp(z)] for independent z_k ~ N(m_k, v_k): what makes a softmax likelihood tractable.

All are differentiable in m and v, and none draws a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import UnknownNameError

STEPS = 20  # of the damped iteration; a fixed count compiles
BOUNDS = ("jensen", "km", "km_reduced")


def jensen(mean: Tensor, variance: Tensor) -> Tensor:
    """log sum_k E exp(z_k) = LSE(m + v / 2) for `(..., K)`: `(...)`. Tight for small variances only."""
    return torch.logsumexp(mean + 0.5 * variance, -1)


def tilted(mean: Tensor, variance: Tensor, tilt: Tensor) -> Tensor:
    """1/2 sum a_k^2 v_k + LSE(m + (1 - 2 a) v / 2), valid for EVERY a `(..., K)` (Knowles and Minka 2011)."""
    return 0.5 * (tilt.square() * variance).sum(-1) + torch.logsumexp(mean + (0.5 - tilt) * variance, -1)


def best_tilt(mean: Tensor, variance: Tensor, steps: int = STEPS) -> Tensor:
    """The a that minimises `tilted`, the fixed point a = softmax(m + (1 - 2 a) v / 2), `(..., K)`; no gradient.

    The plain iteration diverges for large variances. Damped by 1 / (1 + max v / 4) it is monotone and converges: the
    preconditioned Hessian has its spectrum in [1, 1 + max v / 2].
    """
    with torch.no_grad():
        weight = 1.0 / (1.0 + variance.amax(-1, keepdim=True) / 4.0)
        tilt = torch.softmax(mean, -1)
        for _ in range(steps):
            tilt = tilt + weight * (torch.softmax(mean + (0.5 - tilt) * variance, -1) - tilt)
    return tilt


def km(mean: Tensor, variance: Tensor) -> Tensor:
    """`tilted` at its best a, which is held constant: its gradient in m and v is exact at the optimum."""
    return tilted(mean, variance, best_tilt(mean, variance))


def km_reduced(mean: Tensor, spread: Tensor, noise_variance: Tensor, alpha: Tensor) -> Tensor:
    """`tilted` at a_k = 1/2 - alpha / s_k^2, for variances s_k^2 c_k; one learned number in place of an iteration.

    Args:
        mean: `(..., K)`.
        spread: c, `(..., K)`, in units of the noise.
        noise_variance: s^2, `(K,)`.
        alpha: scalar.
    """
    inner = noise_variance / 4.0 - alpha + alpha.square() / noise_variance
    return torch.logsumexp(mean + alpha * spread, -1) + 0.5 * (spread * inner).sum(-1)


def check_bound(name: str) -> str:
    """The name, if it is one. Raises `UnknownNameError`."""
    if name not in BOUNDS:
        raise UnknownNameError(f"bound {name!r} is not known; choose one of {BOUNDS}")
    return name


@final
@dataclass(frozen=True)
class Normaliser:
    """What a bound charges for the normaliser of y given K logits: one softmax over them, or K logistic functions.

    A logistic function is a softmax over z and a second logit that is pinned at zero with variance zero.

    Attributes:
        bound: "jensen" or "km".
        binary: K two-class problems instead of one of K classes.
    """

    bound: str
    binary: bool

    def upper(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Bound on the expected log-normaliser for `(..., K)`: `(...)`, summed over two-class problems."""
        mean, variance = self._lift(mean), self._lift(variance)
        found = (km if self.bound == "km" else jensen)(mean, variance)
        return found.sum(-1) if self.binary else found

    def gradients(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """dU/dm and 2 dU/dv, `(..., K)` each."""
        mean, variance = self._lift(mean), self._lift(variance)
        if self.bound == "jensen":
            share = weight = torch.softmax(mean + 0.5 * variance, -1)
        else:
            tilt = best_tilt(mean, variance)
            share = torch.softmax(mean + (0.5 - tilt) * variance, -1)
            # a^2 + (1 - 2 a) p = (a - p)^2 + p (1 - p): positive for any a
            weight = (tilt - share).square() + share * (1.0 - share)
        return (share[..., 0], weight[..., 0]) if self.binary else (share, weight)

    def mass(self, y: Tensor) -> Tensor:
        """How often the normaliser enters for labels `(..., K)`: their sum over classes; once for two-class labels."""
        return torch.ones_like(y[..., 0]) if self.binary else y.sum(-1)

    def _lift(self, value: Tensor) -> Tensor:
        return torch.stack([value, torch.zeros_like(value)], -1) if self.binary else value
