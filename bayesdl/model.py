"""BayesianModel: a network, a posterior and a likelihood; everything that users ask of a wrapped network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from bayesdl.agreement import first_decides
from bayesdl.batch import BatchAdapter
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Diagnosis, Finding, diagnose
from bayesdl.distributed import resolve_group
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evidence import log_evidence
from bayesdl.joint import Joint
from bayesdl.latent import Latent
from bayesdl.likelihoods import Likelihood
from bayesdl.likelihoods import resolve as resolve_likelihood
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior, LastLayerPosterior, Posterior, SpannedPosterior
from bayesdl.posteriors.base import Function, standard_normal
from bayesdl.predictive import Predictive, cat_targets
from bayesdl.priors.posterior import PosteriorPrior

if TYPE_CHECKING:
    from bayesdl.distributed import Processes

DEFAULT_DRAWS = 64
BATCH = 256
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Record:
    """How a model came about; carried through tuning and files.

    Attributes:
        method: registered name.
        cost: fit seconds, selected parameters and whatever else the method measured.
        findings: what was chosen and noticed.
    """

    method: str = "custom"
    cost: tuple[tuple[str, float], ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class _Source:
    """The user's loader, which a deep copy of the model shares instead of copying a data set."""

    loader: Iterable[Any] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return self


class BayesianModel(nn.Module):
    """A network that answers with distributions.

    Args:
        model: the user's network, or a `Network`. It stays as it is.
        posterior: what a method or a chain left.
        likelihood: name or object.
        batch: batch adapter, where `model` is not a `Network` yet.
        record: provenance.
        fit_data: the loader the posterior was fitted on, for rules such as leave-one-out; never saved.

    `.to()` and its kin move the posterior and the private view of the network, never the user's own module.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        posterior: Posterior,
        likelihood: str | Likelihood,
        *,
        batch: str | BatchAdapter | None = None,
        record: Record | None = None,
        fit_data: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(posterior, Posterior):
            raise ArgumentError(
                f"posterior is {type(posterior).__name__}; expected a fitted posterior. Call "
                "bdl.wrap(model, method, data)"
            )
        self.likelihood = resolve_likelihood(likelihood)
        axis = self.likelihood.output_axis
        self.network = (
            model.reading(axis) if isinstance(model, Network) else Network(model, batch=batch, output_axis=axis)
        )
        self.posterior = posterior
        self.record = record or Record()
        self._source = _Source(fit_data)

    def extra_repr(self) -> str:
        return (
            f"method={self.record.method!r}, likelihood={self.likelihood.name!r}, "
            f"posterior={type(self.posterior).__name__}, selected={self.network.num_parameters}, "
            f"device={str(self.device)!r}"
        )

    def forward(
        self, x: Any, *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Predictive:
        """Predictive distribution of one batch.

        Args:
            x: whatever the network takes, a batch of B inputs. Networks with outputs at every position (tokens, pixels)
                give a predictive with the positions behind the batch axis.
            num_samples: draws for whatever has no closed form.
            generator: source of their base noise; the same state gives the same answer. Default: a fixed seed.

        Raises:
            ShapeError: the outputs do not fit the likelihood.
            NonFiniteError: NaN or infinity in the outputs.
        """
        with self.network.session():
            state = self._prepare(num_samples, generator)
            latent = self.posterior.push(self.network, x, state)
        return self.likelihood.predictive(latent, _base_noise(latent, num_samples, generator))

    def predict(
        self,
        data: Tensor | Iterable[Any],
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Predictive:
        """Predictive of all batches of a loader, concatenated; targets in the batches are ignored.

        A tensor of inputs is taken in batches of 256, without a gradient; `bayes(x)` takes it whole, with one.
        Where the batches differ in their positions (sequences padded to the longest of each), every position becomes an
        input of its own.
        """
        if isinstance(data, Tensor):
            data = data.split(BATCH)
        return self.predict_with_targets(data, num_samples=num_samples, generator=generator, progress=progress)[0]

    def predict_with_targets(
        self,
        data: Iterable[Any],
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> tuple[Predictive, Tensor | None]:
        """`predict`, and the targets of all batches; None where the batches hold none."""
        state = self._prepare(num_samples, generator)
        parts: list[Predictive] = []
        targets: list[Tensor] = []
        noise: Tensor | None = None
        with torch.no_grad(), self.network.session():
            passes = batches(self.network, data, progress=progress, describe="predict", need_targets=False)
            for number, inputs, target in passes:
                with in_batch(number):
                    latent = self.posterior.push(self.network, inputs, state)
                    if noise is None:
                        noise = _base_noise(latent, num_samples, generator)
                    parts.append(self.likelihood.predictive(latent, noise))
                if target is not None:
                    targets.append(torch.as_tensor(target).to(self.device))
        if targets and len(targets) != len(parts):
            raise ArgumentError(f"{len(targets)} of {len(parts)} batches hold a target; expected all or none")
        return Predictive.cat(parts), cat_targets(parts, targets) if targets else None

    def log_evidence(self) -> Tensor:
        """log p(data), a scalar: by Laplace's approximation; exact for a last layer's regression, a lower bound for its
        classification.

        Raises:
            UnsupportedError: the method has none.
        """
        if isinstance(self.posterior, LastLayerPosterior):
            found = self.posterior.belief.log_evidence(self.likelihood)
            if found is not None:
                return found
        if isinstance(self.posterior, SpannedPosterior):
            return self.posterior.log_evidence()
        return log_evidence(self._gaussian("log_evidence"), self.network)

    def tune(
        self,
        rule: str = "evidence",
        data: Iterable[Any] | None = None,
        *,
        distributed: Processes = None,
        **options: Any,
    ) -> BayesianModel:
        """A new model with hyper-parameters chosen by a rule; nothing is refitted and this one stays as it is.

        Args:
            rule: "evidence" (marginal likelihood; Laplace), "heldout" (NLL on `data`; any method), "training" (the
                training data alone, so that it does no harm; Laplace) or "loo" (leave-one-out around fixed weights).
            data: held-out loader, for "heldout".
            distributed: True, or a process group, of which every process must make this call: the first one tunes on
                its own data and the others take what it chose. Not needed for "evidence", which reads no data.
            options: see `bayesdl.tuning`.
        """
        from bayesdl.tuning import tune

        with torch.inference_mode(False):
            return first_decides(resolve_group(distributed), self, lambda: tune(self, rule, data, **options))

    def update(self, data: Iterable[Any], *, retune: bool = False, progress: bool = False) -> BayesianModel:
        """A new model that has seen more data; exact, for last-layer regressions. See `bayesdl.last_layer.online`.

        Raises:
            UnsupportedError: the method has no exact update.
        """
        from bayesdl.last_layer.online import update

        with torch.inference_mode(False):
            return update(self, data, retune=retune, progress=progress)

    def draw(self, n: int, *, generator: torch.Generator | None = None) -> list[Function]:
        """`n` functions from the posterior: callables `x -> outputs (B, C)` that answer the same at every call."""
        if n < 1:
            raise ArgumentError(f"{n} draws were asked for; expected at least 1")
        self.network.check_values()
        return self.posterior.draw(self.network, n, generator)

    def joint(self, x: Any, *, num_samples: int | None = None, generator: torch.Generator | None = None) -> Joint:
        """The outputs at all B inputs of a batch together: their covariance is `(B, C, B, C)`.

        Args:
            x: whatever the network takes, a batch of B inputs.
            num_samples, generator: as in a call, for posteriors of samples, whose joint is the empirical one.

        Returns:
            A `Joint`: `.distribution` over targets with noise, `.latent` over outputs, `.marginal`, `.sample`.
        """
        with self.network.session():
            state = self._prepare(num_samples, generator)
            return Joint(self.likelihood, *self.posterior.covariance(self.network, x, None, state))

    def covariance(
        self, first: Any, second: Any, *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Covariance `(B, C, B', C)` between the outputs at two batches of inputs; without observation noise."""
        with self.network.session():
            state = self._prepare(num_samples, generator)
            return self.posterior.covariance(self.network, first, second, state)[1]

    def as_prior(self) -> PosteriorPrior:
        """This model's posterior as the prior of the next fit: `bdl.wrap(net2, ..., loader2, prior=bayes.as_prior())`.

        Precisions add, so that fits on one task after another are the fit on all of them, exactly where the network is
        linear in its weights (structures `full`, `diag`, `lowrank`, `dual`; factors of `kron` add). Its `log_prob` is
        the quadratic penalty to train on with: see `bayesdl.priors.posterior`.

        Raises:
            UnsupportedError: the posterior is not Gaussian.
        """
        self.network.check_values()
        return self._gaussian("as_prior").as_prior(self.network)

    def save(self, path: str | Path, *, draws: bool = False) -> None:
        """Write everything but the base network to a safetensors file, atomically. See `bdl.load`.

        Args:
            path: the file.
            draws: for `bdl.TFB`, whose draws are made again from their seed: store them too (r numbers for each input
                of a layer and each draw).
        """
        from bayesdl.files import save
        from bayesdl.posteriors.lora import adapter_posterior

        save(self.replaced(posterior=adapter_posterior(self).with_draws()) if draws else self, path)

    def diagnose(self, data: Iterable[Any] | None = None, *, progress: bool = False) -> Diagnosis:
        """What was chosen, and what looks wrong, each with what to do about it.

        Of a Laplace posterior without data: effective parameters, a prior that dominates, lies at its bound or far from
        the weights, layers without curvature, NaN. With the training loader, for one pass over it: whether the weights
        are the mode, whether training and leave-one-out residuals disagree, how the variance spreads over the data.
        Of chains with data: whether they agree in what they predict on the first batch.

        Args:
            data: the training loader.
            progress: show a progress bar.

        Raises:
            ArgumentError: other data than those of the fit.
            UnsupportedError: data given to a method that is neither "laplace" nor chains of samples.
        """
        return diagnose(self, data, progress=progress)

    @property
    def fit_data(self) -> Iterable[Any] | None:
        """The loader the posterior was fitted on, where that happened in this process."""
        return self._source.loader

    @property
    def device(self) -> torch.device:
        """Where predictions are computed."""
        return self.network.device

    @property
    def method_name(self) -> str:
        """Registered name of the method."""
        return self.record.method

    @property
    def cost(self) -> dict[str, float]:
        """What the fit cost."""
        return dict(self.record.cost)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the curvature's blocks, in the order that a per-layer prior precision follows."""
        return tuple(block.name for block in self._gaussian("layers").layout.blocks)

    def replaced(
        self,
        *,
        posterior: Posterior | None = None,
        likelihood: Likelihood | None = None,
        findings: tuple[Finding, ...] = (),
    ) -> BayesianModel:
        """A copy with parts exchanged and findings added; they supersede earlier ones on their topics."""
        settled = {finding.topic for finding in findings if finding.topic}
        kept = tuple(finding for finding in self.record.findings if finding.topic not in settled)
        record = Record(self.record.method, self.record.cost, kept + findings)
        return BayesianModel(
            self.network,
            posterior or self.posterior,
            likelihood or self.likelihood,
            record=record,
            fit_data=self.fit_data,
        )

    def _prepare(self, num_samples: int | None, generator: torch.Generator | None) -> Any:
        if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
            raise ArgumentError(f"num_samples={num_samples}; expected a whole number, at least 1")
        self.network.check_values()
        return self.posterior.prepare(self.network, num_samples, generator)

    def _gaussian(self, what: str) -> GaussianPosterior:
        if not isinstance(self.posterior, GaussianPosterior):
            raise UnsupportedError(
                f"method {self.method_name!r} has no {what}; a Gaussian weight posterior has one: "
                'bdl.wrap(model, "laplace", data, likelihood=...)'
            )
        return self.posterior

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_single(tensor: Tensor) -> Tensor:
            # curvature in half precision has no decomposition; only the network itself goes there
            moved = fn(tensor)
            return moved.float() if moved.dtype in HALF else moved

        with torch.inference_mode(False):
            self.network = self.network.map(fn)
            self.posterior = self.posterior.map(at_least_single)
            self.likelihood = self.likelihood.map(at_least_single)
        return self


def _base_noise(latent: Latent, num_samples: int | None, generator: torch.Generator | None) -> Tensor:
    like = latent.mean.float() if latent.mean.dtype in HALF else latent.mean
    return standard_normal((num_samples or DEFAULT_DRAWS, like.shape[-1]), like, generator)
