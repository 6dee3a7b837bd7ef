"""Method: how a posterior comes about. A method is one file, one frozen dataclass and one registry entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network
from bayesdl.posteriors import Posterior
from bayesdl.priors import GaussianPrior, Prior
from bayesdl.select import Selector

if TYPE_CHECKING:
    from bayesdl.distributed import Processes


@dataclass(frozen=True)
class Task:
    """What `wrap` hands to a method.

    Attributes:
        network: private view of the (first) network, with its selection.
        models: the user's own networks, more than one for an ensemble; methods copy before they train.
        likelihood: p(y | f).
        prior: None where the user gave none.
        data: loader, or None.
        generator: randomness, or None.
        progress: whether to show bars.
        distributed: the processes that hold a share of the data each; see `bayesdl.distributed`.
        held_out: whether held-out data will choose what was left open, after the fit.
    """

    network: Network
    models: tuple[nn.Module, ...]
    likelihood: Likelihood
    prior: Prior | None
    data: Iterable[Any] | None
    generator: torch.Generator | None
    progress: bool
    distributed: Processes = None
    held_out: bool = False

    def need_data(self, method: str, what: str = "the training loader") -> Iterable[Any]:
        """The data, or an error that says what to pass."""
        if self.data is None:
            raise ArgumentError(f'method "{method}" needs data: bdl.wrap(model, "{method}", loader, ...) with {what}')
        return self.data

    def gaussian_prior(self, layer: str | None = None) -> GaussianPrior | None:
        """The prior as a Gaussian, or None; named precisions and means become flat.

        Args:
            layer: of a method that is about this layer alone; named precisions then become that of its weight.

        Raises:
            ArgumentError: another kind of prior, or no precision for a parameter.
        """
        if self.prior is None:
            return None
        if isinstance(self.prior, GaussianPrior):
            prior = self.prior
            if isinstance(prior.mean, Mapping):
                own = self.network.parameters
                if layer is not None:
                    own = {name: value for name, value in own.items() if name.rpartition(".")[0] == layer}
                prior = replace(prior, mean=prior.centre(own))
            if isinstance(prior.precision, Mapping) and layer is not None:
                name = f"{layer}.weight" if layer else "weight"
                if name not in prior.precision:
                    raise ArgumentError(
                        f"the prior names a precision for {sorted(prior.precision)} and none for {name!r}, the "
                        "weight of the last layer"
                    )
                return replace(prior, precision=prior.precision[name])
            if isinstance(prior.precision, Mapping):
                return replace(prior, precision=prior.vector(self.network.parameters))
            return prior
        raise ArgumentError(
            f"prior is {type(self.prior).__name__}; this method needs a bdl.GaussianPrior (its posterior is Gaussian), "
            'such as bdl.functional.match(..., family="gaussian") finds; samplers and NUTS take any prior'
        )


@dataclass(frozen=True)
class Fitted:
    """What a method leaves.

    Attributes:
        posterior: the belief.
        likelihood: with whatever the method chose (noise).
        findings: what was chosen or noticed.
        network: where it differs from the task's.
        cost: extra entries for the cost record.
    """

    posterior: Posterior
    likelihood: Likelihood
    findings: tuple[Finding, ...] = ()
    network: Network | None = None
    cost: tuple[tuple[str, float], ...] = ()


class Method(ABC):
    """Base of the frozen dataclasses that `wrap` accepts; their constructors only store."""

    name: ClassVar[str]
    trains: ClassVar[bool] = False  # whether the data must be what the network was trained on
    elementwise: ClassVar[bool] = False  # whether it takes a selection of single elements of parameters
    distributed: ClassVar[bool] = False  # whether several processes can fit it together
    shares: ClassVar[bool] = False  # whether each of them then takes a share of the data, not all of them
    streams: ClassVar[bool] = False  # whether the weights of a model that FSDP2 has sharded may stay sharded
    select: Selector | None = None

    @property
    def label(self) -> str:
        """Name under which it was asked for, in records and messages; several may belong to one class."""
        return self.name

    @abstractmethod
    def fit(self, task: Task) -> Fitted:
        """Fit on a task; the user's models are never written to."""


def with_residual_noise(task: Task, posterior: Posterior) -> tuple[Likelihood, tuple[Finding, ...]]:
    """A Gaussian likelihood without noise gets the root mean squared residual of each output on the task's data.

    Residuals on training data understate the noise of an overfitted network; the finding says so.
    """
    likelihood = task.likelihood
    if not isinstance(likelihood, Gaussian) or likelihood.noise is not None:
        return likelihood, ()
    if task.data is None:
        raise ArgumentError(
            "the gaussian likelihood has no noise and there is no data to choose it from: pass "
            "bdl.Gaussian(noise=...), or a loader (held-out data is best)"
        )
    noise = residual_noise(task, posterior, likelihood)
    text = ", ".join(f"{float(v):.4g}" for v in noise)
    found = Finding(
        "info",
        f"noise {text} is the residual on the data given",
        'tune("heldout", val_loader) if those were training data',
        "noise",
    )
    return likelihood.with_noise(noise), (found,)


def residual_noise(task: Task, posterior: Posterior, likelihood: Gaussian) -> Tensor:
    """Root mean squared residual per output `(C,)`, float64."""
    total: Tensor | None = None
    count = 0
    state = posterior.prepare(task.network, None, task.generator)
    with torch.no_grad():
        passes = batches(task.network, task.data or (), progress=task.progress, describe="residuals")
        for number, inputs, target in passes:
            with in_batch(number):
                mean = posterior.push(task.network, inputs, state).mean
                outputs = likelihood.check_outputs(mean)
                residual = (likelihood.check_targets(outputs, target) - outputs).double().square().sum(0)
            total = residual if total is None else total + residual
            count += len(mean)
    if total is None:
        raise ArgumentError("the data loader yields no batch")
    return (total / count).sqrt().clamp(min=1e-12)
