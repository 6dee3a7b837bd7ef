"""What a surrogate would believe after observations that it draws itself, for BoTorch's knowledge gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import UnsupportedError, require

__all__ = ["Fantasies", "normal"]

_model = require("botorch.models.model", extra="botorch")
_posteriors = require("botorch.posteriors", extra="botorch")
_gpytorch = require("gpytorch.distributions", extra="botorch")
_operators = require("linear_operator", extra="botorch")


def normal(mean: Tensor, covariance: Tensor, noise: Tensor | None = None) -> Any:
    """BoTorch's posterior of means `(*b, q, k)`, covariances `(*b, q k, q k)` and noise variances `(*b, q, k)`."""
    if noise is not None:
        covariance = covariance + torch.diag_embed(noise.flatten(-2))
    # an operator's root has the jitter that a point given twice needs; that of a plain tensor has none
    lazy = _operators.to_linear_operator(covariance)
    if mean.shape[-1] == 1:
        return _posteriors.GPyTorchPosterior(_gpytorch.MultivariateNormal(mean.squeeze(-1), lazy))
    return _posteriors.GPyTorchPosterior(_gpytorch.MultitaskMultivariateNormal(mean, lazy))


@final
class Fantasies(_model.Model):  # type: ignore[name-defined]
    """A Gaussian belief given targets at n points, for a batch of targets at once; by `Surrogate.fantasize`.

    The belief over f at the n points and at X is jointly Gaussian, and so is f(X) given noisy targets, by the
    conditional of a normal (Rasmussen and Williams 2006, eq. 2.23, 2.24): what refitting the last layer on them would
    give. Differentiable in X and in the points.

    Args:
        moments: joint mean `(*b, m, D)` and covariance `(*b, m D, m D)` at points `(*b, m, d)`.
        points: `(*b, n, d)`, after the input transform.
        targets: `(F, *b, n, D)`, after the outcome transform.
        variances: of their noise, `(*b, n, D)`.
        noise: variance of later observations, `(D,)`.
        input_transform: of X.
        outcome_transform: back through which the posterior is taken.
    """

    def __init__(
        self,
        moments: Callable[[Tensor], tuple[Tensor, Tensor]],
        points: Tensor,
        targets: Tensor,
        variances: Tensor,
        noise: Tensor,
        *,
        input_transform: nn.Module | None = None,
        outcome_transform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._moments, self._points, self._targets = moments, points, targets
        self._variances, self._noise = variances, noise
        self._input: Any = input_transform
        self._outcome: Any = outcome_transform
        self.training = False

    @property
    def num_outputs(self) -> int:
        """D."""
        return self._targets.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """`(F, *b)`."""
        return self._targets.shape[:-2]

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Belief over f at `X` `(*c, q, d)`, joint over q, of batch shape `(F, *b)` broadcast with `c`.

        Raises:
            UnsupportedError: some of the outputs alone.
        """
        if output_indices is not None:
            raise UnsupportedError(f"output_indices={output_indices} of fantasies; leave it out: all outputs are given")
        inputs = X.double() if self._input is None else self._input(X.double())
        batches = torch.broadcast_shapes(inputs.shape[:-2], self.batch_shape)
        known, asked = (part.expand(*batches, *part.shape[-2:]) for part in (self._points, inputs))
        mean, covariance = self._moments(torch.cat([known, asked], -2))
        count = known.shape[-2]
        size = count * self.num_outputs
        cross = covariance[..., size:, :size]
        seen = covariance[..., :size, :size] + torch.diag_embed(self._variances.flatten(-2))
        residual = (self._targets - mean[..., :count, :]).flatten(-2).unsqueeze(-1)
        solved = torch.cholesky_solve(torch.cat([residual, cross.mT], -1), torch.linalg.cholesky(seen))
        after = mean[..., count:, :] + (cross @ solved[..., :1]).reshape(mean[..., count:, :].shape)
        left = covariance[..., size:, size:] - cross @ solved[..., 1:]
        found = normal(after, (left + left.mT) / 2, self._noise.expand_as(after) if observation_noise else None)
        if self._outcome is not None:
            found = self._outcome.untransform_posterior(found, X=inputs)
        return found if posterior_transform is None else posterior_transform(posterior=found, X=X)
