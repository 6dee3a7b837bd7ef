"""The full potential of a task over one flat vector, for samplers that see all data at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import index_batch
from bayesdl.data import batches, in_batch
from bayesdl.errors import NonFiniteError, ShapeError
from bayesdl.last_layer.cache import each_batch
from bayesdl.likelihoods import Likelihood
from bayesdl.network import Network
from bayesdl.priors import CauchyPrior, GaussianPrior, LaplacePrior, Prior, StudentTPrior

Held = tuple[Any, Tensor]  # inputs (or features), checked targets
_ELEMENTWISE = (GaussianPrior, StudentTPrior, LaplacePrior, CauchyPrior)


@final
@dataclass(frozen=True, eq=False)
class Potential:
    """`U(theta) = -sum_n log p(y_n | theta) - log p(theta)` of flat weights `(P,)` in the order of `names`.

    Attributes:
        network: whose selected parameters are theta; in float64 where results are compared to 1e-10.
        likelihood, prior: of the potential.
        held: batches of `(prepared inputs, checked targets)`; of features where `layer` is named.
        layer: linear layer whose weights are theta, applied to cached features; None runs the whole network.
    """

    network: Network
    likelihood: Likelihood
    prior: Prior
    held: tuple[Held, ...]
    layer: str | None = None

    def __call__(self, theta: Tensor) -> Tensor:
        """U, a scalar; infinite where it cannot be computed, so that a proposal there is refused."""
        values = self.unflatten(theta)
        total = -self.prior.log_prob(values).to(theta.dtype)
        for inputs, target in self.held:
            outputs = self._outputs(inputs, values)
            if not bool(torch.isfinite(outputs).all()):
                return _forbidden(theta)
            total = total - self.likelihood.log_prob(outputs, target).sum()
        return total if bool(torch.isfinite(total)) else _forbidden(theta)

    def log_likelihoods(self, thetas: Tensor, batch: Held) -> Tensor:
        """`sum log p` of one batch for each of `(J, P)` weights: `(J,)`, -inf where it cannot be computed."""
        inputs, target = batch
        values = self.unflatten(thetas)
        if self.layer is None:
            each = [self._outputs(inputs, {k: v[j] for k, v in values.items()}) for j in range(len(thetas))]
            outputs = torch.stack(each)
        else:
            outputs = torch.einsum("bd,jkd->jbk", inputs.flatten(0, -2), values[f"{self.layer}.weight"])
            if f"{self.layer}.bias" in values:
                outputs = outputs + values[f"{self.layer}.bias"].unsqueeze(1)
            outputs = outputs.unflatten(1, inputs.shape[:-1])
        safe = torch.nan_to_num(outputs, nan=0.0, posinf=0.0, neginf=0.0)
        many = target.expand(len(thetas), *target.shape).flatten(0, 1)
        found = self.likelihood.log_prob(safe.flatten(0, 1), many).unflatten(0, outputs.shape[:2]).flatten(1).sum(1)
        fine = torch.isfinite(outputs).flatten(1).all(1)
        return torch.where(fine, found, -torch.inf)

    def log_priors(self, thetas: Tensor) -> Tensor:
        """log p(theta) for each of `(J, P)` weights."""
        values = self.unflatten(thetas)
        if isinstance(self.prior, _ELEMENTWISE):
            return torch.vmap(self.prior.log_prob)(values)
        return torch.stack([self.prior.log_prob({k: v[j] for k, v in values.items()}) for j in range(len(thetas))])

    @property
    def start(self) -> Tensor:
        """The network's own weights, flat."""
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters.values()])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """`(..., P)` -> tensors `(..., *shape)` by name."""
        pieces = theta.split([shape.numel() for shape in self._shapes], -1)
        pairs = zip(self.network.names, self._shapes, pieces, strict=True)
        return {name: piece.reshape(*theta.shape[:-1], *shape) for name, shape, piece in pairs}

    @cached_property
    def _shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.network.parameters.values()]

    def outputs(self, thetas: Tensor, count: int) -> Tensor:
        """Outputs of up to `count` examples of the first batch for weights `(..., P)`: `(..., count, C)`."""
        inputs = index_batch(self.held[0][0], slice(0, count))
        with torch.no_grad():
            rows = [self._outputs(inputs, self.unflatten(theta)) for theta in thetas.flatten(0, -2)]
        return torch.stack(rows).unflatten(0, thetas.shape[:-1])

    def seconds(self) -> float:
        """Time of one gradient, for an estimate of what a run takes."""
        began = time.perf_counter()
        leaf = self.start.requires_grad_()
        torch.autograd.grad(self(leaf), leaf)
        return time.perf_counter() - began

    def _outputs(self, inputs: Any, values: Mapping[str, Tensor]) -> Tensor:
        if self.layer is None:
            return self.network.forward(self.network.module(), inputs, values)
        bias = values.get(f"{self.layer}.bias")
        return nn.functional.linear(inputs, values[f"{self.layer}.weight"], bias)


def full_potential(
    network: Network,
    likelihood: Likelihood,
    prior: Prior,
    data: Iterable[Any],
    *,
    progress: bool = False,
    join: bool = True,
) -> Potential:
    """Read all data once and hold them where the network is.

    Where the selection is the weight (and bias) of the linear layer that makes the outputs, its features are held
    instead of the inputs: a gradient then costs two products with them. Biases alone run the whole network.

    Args:
        network, likelihood, prior, data: of the potential.
        progress: show a bar.
        join: one batch of all features.

    Raises:
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
    """
    layer = _whole_layer(network)
    if layer is not None:
        try:
            held = _features(network, layer, likelihood, data, progress)
            if join:  # one product over all data
                held = ((torch.cat([a for a, _ in held]), torch.cat([b for _, b in held])),)
        except ShapeError:  # it is not the last one: the whole network has to run
            layer = None
    if layer is None:
        held = _batches(network, likelihood, data, progress)
    found = Potential(network, likelihood, prior, tuple(held), layer)
    if not bool(torch.isfinite(found(found.start))):
        raise NonFiniteError("the potential is NaN or infinite at the network's own weights")
    return found


def _forbidden(theta: Tensor) -> Tensor:
    return torch.nan_to_num(theta, nan=0.0, posinf=0.0, neginf=0.0).sum() * 0 + torch.inf


def _features(
    network: Network, layer: str, likelihood: Likelihood, data: Iterable[Any], progress: bool
) -> tuple[Held, ...]:
    own, held = network.module().get_submodule(layer), []
    for number, phi, target in each_batch(network, layer, data, progress=progress):
        with in_batch(number), torch.no_grad():
            outputs = likelihood.check_outputs(own(phi))
            held.append((phi, likelihood.check_targets(outputs, target)))
    return tuple(held)


def _batches(network: Network, likelihood: Likelihood, data: Iterable[Any], progress: bool) -> tuple[Held, ...]:
    held = []
    for number, inputs, target in batches(network, data, progress=progress, describe="data"):
        with in_batch(number), torch.no_grad():
            call = network.prepare(inputs)
            outputs = likelihood.check_outputs(network.forward(network.module(), call))
            held.append((call, likelihood.check_targets(outputs, target)))
    return tuple(held)


def _whole_layer(network: Network) -> str | None:
    """Name of the linear layer that the selection is exactly; None for any other selection."""
    owners = {name.rpartition(".")[0] for name in network.names}
    if len(owners) != 1:
        return None
    owner = owners.pop()
    module = dict(network.template.named_modules()).get(owner)
    prefix = f"{owner}." if owner else ""
    if type(module) is not nn.Linear or set(network.names) != {f"{prefix}{n}" for n, _ in module.named_parameters()}:
        return None
    return owner or None
