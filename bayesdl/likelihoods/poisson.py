"""Poisson likelihood on log-rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import Poisson as TorchPoisson

from bayesdl.errors import LabelError
from bayesdl.likelihoods.base import Likelihood, first_bad


@final
@dataclass(frozen=True)
class Poisson(Likelihood):
    """Counts y ~ Poisson(exp(f)); f and targets `(B, C)`, or targets `(B,)` where C = 1.

    The predictive of a Gaussian latent is the mixture over draws with common base noise.
    """

    name: ClassVar[str] = "poisson"
    task: ClassVar[str] = "count"

    def distribution(self, f: Tensor) -> Distribution:
        # an infinite rate would make log p NaN, where it is only as low as a number can be
        return TorchPoisson(f.exp().clamp(max=torch.finfo(f.dtype).max))

    def check_targets(self, f: Tensor, y: Tensor) -> Tensor:
        target = super().check_targets(f, y)
        bad = (target < 0) | (target != target.round())
        if bool(bad.any()):
            place = first_bad(bad)
            raise LabelError(f"target {float(target[place])} at index {place}; poisson targets are counts 0, 1, 2, ...")
        return target

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        # on the log-rate itself: its exponential underflows long before the log-probability does
        return (y * f - f.exp() - torch.lgamma(y + 1.0)).sum(-1)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y

    def hessian_root(self, f: Tensor) -> Tensor:
        return torch.diag_embed((0.5 * f.detach()).exp()).permute(2, 0, 1)
