"""BoTorch: any Bayesian regression as the surrogate of Bayesian optimisation."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, require
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.likelihoods import Gaussian, Heteroscedastic, NormalGamma
from bayesdl.model import BayesianModel

__all__ = ["Surrogate"]

_model = require("botorch.models.model", extra="botorch")
_posteriors = require("botorch.posteriors", extra="botorch")
_ensemble = require("botorch.posteriors.ensemble", extra="botorch")
_gpytorch = require("gpytorch.distributions", extra="botorch")
_operators = require("linear_operator", extra="botorch")

# Points whose covariance is computed at once where only blocks of q by q are wanted of it: a few larger products are
# faster than many small ones, until what is thrown away outweighs that.
TOGETHER = 32
# functions drawn from each part of a mixture of last layers
DRAWS = 8


@final
class Surrogate(_model.Model):  # type: ignore[name-defined]
    """A regression by any method as a BoTorch `Model`.

        surrogate = Surrogate(bdl.wrap(net, "laplace", loader, likelihood="gaussian"))
        optimize_acqf(LogExpectedImprovement(surrogate, best_f=y.max()), bounds, q=1, num_restarts=5, raw_samples=64)

    Posteriors with a closed form (linearised Laplace and its kin, last layers) give a `GPyTorchPosterior`, joint over
    the q points of a batch and never across batches. Samples (ensembles, chains, SWAG, dropout) give an
    `EnsemblePosterior`: each Monte Carlo draw is one function, the same at all points, batches and calls. Everything is
    differentiable in X.

    What comes back is f, in the units of the targets that the network learned; a surrogate is never updated: after a
    refit, make another. Which method serves best differs from problem to problem (Li, Rudner and Wilson 2024); a
    Gaussian process is hard to beat in a few smooth dimensions.

    Args:
        bayes: a Gaussian, heteroscedastic or Student-t regression; copied in float64, and left as it is.
        num_outputs: of each target, D.
        num_samples: draws of methods that draw; by default the method's own number.
        generator: of those draws, which are made once; None is a fixed seed.

    Raises:
        UnsupportedError: a likelihood without a real-valued f.
        MissingDependencyError: BoTorch is not installed.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        *,
        num_outputs: int = 1,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bayes.likelihood, (Gaussian, Heteroscedastic, NormalGamma)):
            raise UnsupportedError(
                f"a surrogate needs a regression, and the likelihood is {bayes.likelihood.name}; likelihood="
                '"gaussian" is one'
            )
        if num_outputs < 1:
            raise ArgumentError(f"num_outputs={num_outputs}; expected at least 1")
        self.bayes = copy.deepcopy(bayes).double()
        self._targets = num_outputs
        self._num_samples = num_samples
        # a seed, not a generator: every call starts from the same draws
        self._seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))

    @property
    def num_outputs(self) -> int:
        """D."""
        return self._targets

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: there is one model."""
        return torch.Size()

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Belief over f at `X` `(*b, q, d)`, joint over q.

        Args:
            X: of any floating dtype; computed in float64.
            output_indices: outputs to keep.
            observation_noise: True adds the likelihood's; a tensor `(*b or 1, q or 1, D)` holds variances to add.
            posterior_transform: applied at the end.

        Raises:
            ShapeError: `X` without a q-axis, or a network of another number of outputs.
            UnsupportedError: noise on a posterior of samples, which BoTorch has no place for.
        """
        self.eval()
        points = self.transform_inputs(X).double()
        if points.dim() < 2:
            raise ShapeError(f"X has shape {tuple(X.shape)}; expected (*b, q, d)")
        kept = list(range(self._targets)) if output_indices is None else [int(i) for i in output_indices]
        if not kept or not all(-self._targets <= i < self._targets for i in kept):
            raise ArgumentError(f"output_indices={output_indices} of {self._targets} outputs")
        latent = self._latent(points)
        noisy = isinstance(observation_noise, Tensor) or bool(observation_noise)
        if isinstance(latent, GaussianLatent):
            noise = self._noise(points, observation_noise)[..., kept] if noisy else None
            found = self._joint(points, latent, kept, noise)
        elif noisy:
            raise UnsupportedError(
                f"the posterior of method {self.bayes.method_name!r} is samples, whose draws hold no observation "
                "noise; leave observation_noise=False, or use a method with a closed form, such as laplace"
            )
        else:
            values, weights = self._samples(points, latent)
            found = _ensemble.EnsemblePosterior(values=values[..., kept], weights=weights)
        return found if posterior_transform is None else posterior_transform(posterior=found, X=X)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Surrogate:
        """A surrogate that has seen `X` `(n, d)` and `Y` `(n, D)` too; exact for last-layer regressions.

        Raises:
            UnsupportedError: batches of observations, given noise, or a method without an exact update: refit and make
                another surrogate.
        """
        if X.dim() != 2 or Y.dim() != 2 or kwargs.get("noise") is not None:
            raise UnsupportedError(
                f"X has shape {tuple(X.shape)} and Y {tuple(Y.shape)}; conditioning takes (n, d) and (n, D), whose "
                "noise is the likelihood's"
            )
        batch = (self.transform_inputs(X).double(), Y.double())
        source = torch.Generator().manual_seed(self._seed)
        grown = self.bayes.update([batch])
        return Surrogate(grown, num_outputs=self._targets, num_samples=self._num_samples, generator=source)

    def _latent(self, points: Tensor) -> Latent:
        """Belief at every point where q = 1 or draws are all there is; at one point where a joint is to follow."""
        flat = points.flatten(0, -2)
        if points.shape[-2] == 1:
            return self._call(flat).latent
        found = self._call(flat[:1]).latent
        return self._call(flat).latent if isinstance(found, SampleLatent) else found

    def _samples(self, points: Tensor, latent: SampleLatent) -> tuple[Tensor, Tensor]:
        """Draws `(*b, S, q, D)` and their weights `(S,)`."""
        samples, weights = latent.samples, latent.weights
        if latent.spreads is not None:  # a mixture of last layers: functions drawn from it
            count = self._num_samples or DRAWS * len(weights)
            functions = self.bayes.draw(count, generator=torch.Generator().manual_seed(self._seed))
            samples = torch.stack([function(points.flatten(0, -2)) for function in functions])
            weights = samples.new_full((count,), 1.0 / count)
        samples = self._of_targets(samples).unflatten(1, points.shape[:-1])
        return samples.movedim(0, -3), weights.to(samples)

    def _joint(self, points: Tensor, latent: GaussianLatent, kept: list[int], noise: Tensor | None) -> Any:
        batches, q = points.shape[:-2], points.shape[-2]
        if q == 1:
            own = torch.diag_embed(latent.variance) if latent.covariance is None else latent.covariance
            mean, covariance = self._of_targets(latent.mean)[:, kept], own[:, kept][..., kept]
        else:
            flat = points.reshape(-1, q, points.shape[-1])
            parts = [self._blocks(part, kept) for part in flat.split(max(1, TOGETHER // q))]
            mean, covariance = (torch.cat(part) for part in zip(*parts, strict=True))
        mean = mean.reshape(*batches, q, len(kept))
        covariance = covariance.reshape(*batches, q * len(kept), q * len(kept))
        if noise is not None:
            covariance = covariance + torch.diag_embed(noise.flatten(-2))
        # an operator's root has the jitter that a point given twice needs; that of a plain tensor has none
        lazy = _operators.to_linear_operator(covariance)
        if len(kept) == 1:
            return _posteriors.GPyTorchPosterior(_gpytorch.MultivariateNormal(mean.squeeze(-1), lazy))
        return _posteriors.GPyTorchPosterior(_gpytorch.MultitaskMultivariateNormal(mean, lazy))

    def _blocks(self, points: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
        """Means `(b, q, k)` and covariances `(b, q k, q k)`, outputs faster than points."""
        b, q, _ = points.shape
        joint = self.bayes.joint(points.flatten(0, 1))
        mean = self._of_targets(joint.mean)[:, kept].unflatten(0, (b, q))
        whole = joint.covariance[:, kept][..., kept].unflatten(2, (b, q)).unflatten(0, (b, q))  # (b, q, k, b, q, k)
        blocks = whole.diagonal(dim1=0, dim2=3).movedim(-1, 0)
        return mean, blocks.reshape(b, q * len(kept), q * len(kept))

    def _noise(self, points: Tensor, given: bool | Tensor) -> Tensor:
        shape = (*points.shape[:-1], self._targets)
        if isinstance(given, Tensor):
            return given.to(points).expand(shape)
        return self._call(points.flatten(0, -2)).aleatoric.reshape(shape)

    def _call(self, points: Tensor) -> Any:
        return self.bayes(points, num_samples=self._num_samples, generator=torch.Generator().manual_seed(self._seed))

    def _of_targets(self, outputs: Tensor) -> Tensor:
        """The means among outputs `(..., C)`."""
        found = self.bayes.likelihood.num_targets(outputs.shape[-1])
        if found != self._targets:
            raise ShapeError(f"the network has {found} outputs and num_outputs={self._targets} was given")
        return outputs[..., :found]
