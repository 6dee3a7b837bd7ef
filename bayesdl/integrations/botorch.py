"""BoTorch: any Bayesian regression as the surrogate of Bayesian optimisation."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, require
from bayesdl.integrations.botorch_fantasies import Fantasies, normal
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.likelihoods import Gaussian, Heteroscedastic, NormalGamma
from bayesdl.model import BayesianModel
from bayesdl.posteriors.last_layer import ConjugateWeights, LastLayerPosterior

__all__ = ["Surrogate"]

_model = require("botorch.models.model", extra="botorch")
_ensemble = require("botorch.posteriors.ensemble", extra="botorch")

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

    What comes back is f, in the units of the targets that the network learned, or in those before `outcome_transform`;
    a surrogate is never updated: after a refit, make another. Which method serves best differs from problem to problem
    (Li, Rudner and Wilson 2024); a Gaussian process is hard to beat in a few smooth dimensions.

    Args:
        bayes: a Gaussian, heteroscedastic or Student-t regression; copied in float64, and left as it is.
        num_outputs: of each target, D.
        num_samples: draws of methods that draw; by default the method's own number.
        generator: of those draws, which are made once; None is a fixed seed.
        input_transform: of BoTorch, such as `Normalize`, as the network's inputs went through it; X is given before it.
        outcome_transform: of BoTorch, such as `Standardize` or `Log`, as the targets went through it in training; the
            posterior is taken back through it, and `Y` of conditioning goes forth. A surrogate holds no training data:
            both are copied as they were fitted, and learn nothing here.

    Raises:
        UnsupportedError: a likelihood without a real-valued f.
        ArgumentError: an `input_transform` that is to learn from data and has seen none.
        MissingDependencyError: BoTorch is not installed.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        *,
        num_outputs: int = 1,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        input_transform: nn.Module | None = None,
        outcome_transform: nn.Module | None = None,
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
        if input_transform is not None:
            _check_learned(input_transform)
            self.input_transform = copy.deepcopy(input_transform).double().eval()
        if outcome_transform is not None:
            self.outcome_transform = copy.deepcopy(outcome_transform).double().eval()
        self.training = False

    def train(self, mode: bool = True) -> Surrogate:
        """Nothing: a surrogate does not learn, and holds no inputs that BoTorch would transform for training."""
        return self

    def eval(self) -> Surrogate:
        """Nothing: it always is."""
        return self

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
            observation_noise: True adds the likelihood's; a tensor `(*b or 1, q or 1, D)` holds variances to add, in
                the units that the network learned.
            posterior_transform: applied at the end.

        Raises:
            ShapeError: `X` without a q-axis, or a network of another number of outputs.
            UnsupportedError: noise on a posterior of samples, which BoTorch has no place for.
        """
        if X.dim() < 2:
            raise ShapeError(f"X has shape {tuple(X.shape)}; expected (*b, q, d)")
        points = self.transform_inputs(X.double())
        kept = list(range(self._targets)) if output_indices is None else [int(i) for i in output_indices]
        if not kept or not all(-self._targets <= i < self._targets for i in kept):
            raise ArgumentError(f"output_indices={output_indices} of {self._targets} outputs")
        kept = [i % self._targets for i in kept]
        latent = self._latent(points)
        noisy = isinstance(observation_noise, Tensor) or bool(observation_noise)
        if isinstance(latent, GaussianLatent):
            noise = self._noise(points, observation_noise)[..., kept] if noisy else None
            found = normal(*self._joint(points, latent, kept), noise)
            if self._outcome is not None:
                own = self._outcome if kept == list(range(self._targets)) else self._outcome.subset_output(kept)
                found = own.untransform_posterior(found, X=points)
        elif noisy:
            raise UnsupportedError(
                f"the posterior of method {self.bayes.method_name!r} is samples, whose draws hold no observation "
                "noise; leave observation_noise=False, or use a method with a closed form, such as laplace"
            )
        else:
            values, weights = self._samples(points, latent)
            if self._outcome is not None:  # draw by draw, which is right for mixtures under any transform
                values, _ = self._outcome.untransform(values, X=points)
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
        points, targets = self.transform_inputs(X.double()), Y.double()
        if self._outcome is not None:
            targets, _ = self._outcome(targets, X=points)
        grown = Surrogate(
            self.bayes.update([(points, targets)]),
            num_outputs=self._targets,
            num_samples=self._num_samples,
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=self._outcome,
        )
        grown._seed = self._seed
        return grown

    def fantasize(self, X: Tensor, sampler: Any, observation_noise: Tensor | None = None, **kwargs: Any) -> Fantasies:
        """Beliefs after observing at `X` `(*b, n, d)` what `sampler` draws; exact, for last layers of known noise.

        Args:
            X: where to observe.
            sampler: of BoTorch, such as `SobolQMCNormalSampler(torch.Size([F]))`.
            observation_noise: variances `(*b or 1, n or 1, D)`, in the units that the network learned; by default the
                likelihood's.
            kwargs: BoTorch's own, for Gaussian processes; without effect.

        Raises:
            UnsupportedError: a method without an exact update, or a noise that learns from observations too.
        """
        posterior = self.bayes.posterior
        exact = isinstance(posterior, LastLayerPosterior) and isinstance(posterior.belief, ConjugateWeights)
        if not exact or not isinstance(self.bayes.likelihood, Gaussian):
            raise UnsupportedError(
                f"fantasies need an exact update, which method {self.bayes.method_name!r} with likelihood "
                f"{self.bayes.likelihood.name} has not; a frozen regression of known noise has one: "
                'bdl.wrap(net, "vbll", loader, likelihood=bdl.Gaussian(noise=0.1))'
            )
        drawn = sampler(self.posterior(X, observation_noise=True if observation_noise is None else observation_noise))
        points = self.transform_inputs(X.double())
        targets = drawn if self._outcome is None else self._outcome(drawn, X=points)[0]
        own = self._noise(points, True)
        given = own if observation_noise is None else self._noise(points, observation_noise)
        return Fantasies(
            self._everywhere,
            points,
            targets,
            given,
            own.flatten(0, -2)[0],
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=self._outcome,
        )

    def _everywhere(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Joint moments of all outputs at `(*b, q, d)`."""
        latent = self._latent(points)
        if not isinstance(latent, GaussianLatent):
            raise UnsupportedError(f"method {self.bayes.method_name!r} has no Gaussian belief over f")
        return self._joint(points, latent, list(range(self._targets)))

    @property
    def _outcome(self) -> Any:
        return getattr(self, "outcome_transform", None)

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

    def _joint(self, points: Tensor, latent: GaussianLatent, kept: list[int]) -> tuple[Tensor, Tensor]:
        """Means `(*b, q, k)` and covariances `(*b, q k, q k)`; `latent` is that of the points where q = 1."""
        batches, q = points.shape[:-2], points.shape[-2]
        if q == 1:
            own = torch.diag_embed(latent.variance) if latent.covariance is None else latent.covariance
            mean, covariance = self._of_targets(latent.mean)[:, kept], own[:, kept][..., kept]
        else:
            flat = points.reshape(-1, q, points.shape[-1])
            parts = [self._blocks(part, kept) for part in flat.split(max(1, TOGETHER // q))]
            mean, covariance = (torch.cat(part) for part in zip(*parts, strict=True))
        size = q * len(kept)
        return mean.reshape(*batches, q, len(kept)), covariance.reshape(*batches, size, size)

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


def _check_learned(transform: nn.Module) -> None:
    """Refuse bounds that are to be learned and were not: they would leave every X as it is."""
    part: Any
    for part in transform.modules():
        if not getattr(part, "learn_coefficients", False):
            continue
        if bool((part.coefficient == 1).all()) and bool((part.offset == 0).all()):
            raise ArgumentError(
                f"input_transform holds a {type(part).__name__} that changes nothing, as one that has seen no data; "
                "give the one that the training inputs went through, or one with bounds"
            )
