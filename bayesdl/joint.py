"""Joint: the belief over the outputs at several inputs together, for acquisition functions and Thompson sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Gaussian
from bayesdl.linalg import cholesky, symmetric_root
from bayesdl.posteriors.base import standard_normal

if TYPE_CHECKING:
    from bayesdl.likelihoods import Likelihood


@dataclass(frozen=True, eq=False)
class Joint:
    """f(x_1), ..., f(x_B) ~ N(mean, covariance) together; differentiable in the inputs where they require it.

    The covariance is that of the functions: exact for linearised posteriors, the empirical one of the samples for
    sampled posteriors (of rank below their number).

    Attributes:
        likelihood: p(y | f).
        mean: `(B, C)`.
        covariance: `(B, C, B, C)` between the outputs, without observation noise.
    """

    likelihood: Likelihood
    mean: Tensor
    covariance: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """The covariance as `(B C, B C)`, examples slower than outputs."""
        return self.covariance.flatten(2).flatten(0, 1)

    @cached_property
    def latent(self) -> MultivariateNormal:
        """f as a torch Distribution over `(B C,)`; jitter is added, with a warning, where it is singular."""
        root = cholesky(self.matrix, "joint covariance of the outputs")
        return MultivariateNormal(self.mean.flatten(), scale_tril=root)

    @cached_property
    def distribution(self) -> MultivariateNormal:
        """y as a torch Distribution over `(B C,)`, with independent observation noise on the diagonal.

        Raises:
            UnsupportedError: y is no Gaussian.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise UnsupportedError(
                f"the joint distribution of y under a {self.likelihood.name} likelihood has no closed form; use "
                ".latent, the joint of the outputs f, or .sample"
            )
        noise = self.likelihood.scale(self.mean).square().expand_as(self.mean).flatten()
        root = cholesky(self.matrix + torch.diag(noise), "joint covariance of the targets")
        return MultivariateNormal(self.mean.flatten(), scale_tril=root)

    @property
    def marginal(self) -> GaussianLatent:
        """Each input alone: what a call of the model has as its latent, for linearised posteriors."""
        each = self.covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (B, C, C)
        return GaussianLatent(self.mean, each.diagonal(dim1=-2, dim2=-1), each)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` joint draws of the outputs f, `(n, B, C)`; singular covariances are no obstacle."""
        if n < 1:
            raise ArgumentError(f"n={n} draws were asked for; expected at least 1")
        noise = standard_normal((n, self.mean.numel()), self.mean, generator)
        return self.mean + (noise @ symmetric_root(self.matrix)).view(n, *self.mean.shape)

    def map(self, function: Callable[[Tensor], Tensor]) -> Joint:
        """Apply `function` to every tensor."""
        return Joint(self.likelihood.map(function), function(self.mean), function(self.covariance))
