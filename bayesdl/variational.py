"""Regularisation learned while training: a variational bound in which the data weigh as much as the weights are many.

With q = N(mu, sigma^2 I) and priors N(w0_g, tau_g I) of groups g of weights, the loss of a minibatch is

    mean NLL(mu + sigma eps) + sum_g KL_g / (kappa N),
    KL_g = 1/2 ((D_g sigma^2 + |mu_g - w0_g|^2) / tau_g - D_g + D_g log(tau_g / sigma^2)),

and tau_g = sigma^2 + |mu_g - w0_g|^2 / D_g is its stationary point. kappa = 1 is the evidence lower bound, which with
many more weights D than data N prefers the prior to the data; kappa = D / N emphasises the data ("Learning
Hyperparameters via a Data-Emphasized Variational Objective", Harvey, Petrov and Hughes 2025). One training run then
takes the place of a grid of weight decays with a validation split. It is meant for fine-tuning: from random weights,
far from the centre of their prior, the bound may still choose to know nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, batch_size, resolve_adapter
from bayesdl.clone import independent_copy, unwrap
from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, NonFiniteError, SelectionError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.likelihoods import resolve as resolve_likelihood
from bayesdl.network import Network, first_inputs
from bayesdl.priors import GaussianPrior

CENTRES = ("zero", "pretrained")
ALIASES = {"head": "last_layer", "backbone": "rest"}
START = 1e-4  # of sigma


@final
class DataEmphasizedELBO(nn.Module):
    """The objective for a training loop of one's own; its parameters are mu, log sigma and a noise that is open.

        objective = bdl.variational.DataEmphasizedELBO(net, "categorical", num_data=50_000, example=x,
                                                       prior={"backbone": "pretrained", "head": "zero"})
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)        # no weight decay: it is learned
        for x, y in loader:
            optimizer.zero_grad()
            objective.loss(x, y, generator=g).backward()
            optimizer.step()
            objective.update_prior()
        trained, prior = objective.trained(), objective.prior()              # for Laplace, samplers, ...

    q is the posterior under the likelihood to the power kappa: a means to learn the prior, no calibrated posterior. The
    network runs in eval mode (dropout off, statistics of batch norm as they are); all its parameters are trained.

    Args:
        model: where to start; never written to.
        likelihood: name or object.
        num_data: N.
        prior: centre of each group of weights, "zero" or "pretrained" (the values given), by selector: names, patterns,
            "last_layer" or "head", and "rest" or "backbone" for all others. None: {"rest": "zero"}.
        emphasis: kappa; None: D / N, and 1 where there are more data than weights.
        diagonal: one sigma for each weight instead of one for all.
        start: sigma at the start.
        example: one batch of inputs, where a selector needs it ("last_layer").
        batch: batch adapter.

    Attributes:
        variances: tau of each group, by its name in `prior`.
        likelihood_power: kappa.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        num_data: int,
        prior: Mapping[str, str] | None = None,
        emphasis: float | None = None,
        diagonal: bool = False,
        start: float = START,
        example: Any = None,
        batch: str | BatchAdapter | None = None,
    ) -> None:
        super().__init__()
        if num_data < 1 or not start > 0 or (emphasis is not None and not emphasis > 0):
            raise ArgumentError(
                f"num_data={num_data}, start={start}, emphasis={emphasis}; expected at least 1, and positive numbers"
            )
        # kept out of the module's own tree: its tensors are no parameters of the objective
        self._network = (Network(independent_copy(unwrap(model)), batch=batch, example=example),)
        own = {name: value.detach().clone() for name, value in self._network[0].parameters.items()}
        given = {"rest": "zero"} if prior is None else dict(prior)
        self.groups = _groups(self._network[0], given, example)
        self.num_data = num_data
        self._names = tuple(own)
        self.means = nn.ParameterList(nn.Parameter(value) for value in own.values())
        shared = next(iter(own.values())).new_zeros(())
        logs = [torch.full_like(value, math.log(start)) for value in (own.values() if diagonal else [shared])]
        self.log_stds = nn.ParameterList(nn.Parameter(value) for value in logs)
        self._diagonal = diagonal
        centre = {name: given[group] for group, names in self.groups.items() for name in names}
        for index, (name, value) in enumerate(own.items()):
            fixed = value if centre[name] == "pretrained" else torch.zeros_like(value)
            self.register_buffer(f"centre_{index}", fixed.clone())
        self.size = sum(value.numel() for value in own.values())
        self.likelihood_power = max(1.0, self.size / num_data) if emphasis is None else float(emphasis)
        self._family = resolve_likelihood(likelihood)
        is_open = isinstance(self._family, Gaussian) and self._family.noise is None
        self.log_noise = nn.Parameter(shared.clone()) if is_open else None
        self.variances: dict[str, Tensor] = {}
        self.update_prior()

    @property
    def likelihood(self) -> Likelihood:
        """With the present noise, where that is learned."""
        if self.log_noise is None or not isinstance(self._family, Gaussian):
            return self._family
        return self._family.with_noise(self.log_noise.detach().exp())

    def loss(self, inputs: Any, target: Any, generator: torch.Generator | None = None) -> Tensor:
        """The bound's negative per data point, from one draw of the weights; differentiable.

        Raises:
            LabelError, ShapeError, NonFiniteError: bad targets.
        """
        network = self._network[0]
        drawn = {}
        for (name, mean), std in zip(self._by_name().items(), self._stds(), strict=True):
            noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
            drawn[name] = mean + std * noise.to(mean)
        outputs = network.forward(network.module(), network.prepare(inputs), drawn)
        f = self._family.check_outputs(outputs)
        y = self._family.check_targets(f, torch.as_tensor(target))
        return self._nll(f, y) + torch.stack(list(self.kl().values())).sum() / (self.likelihood_power * self.num_data)

    def kl(self) -> dict[str, Tensor]:
        """KL(q || prior) of each group at the present tau, differentiable in mu and sigma (and in tau)."""
        means, stds, centres = self._by_name(), dict(zip(self._names, self._stds(), strict=True)), self._centres()
        found = {}
        for group, names in self.groups.items():
            tau = self.variances[group]
            terms = []
            for name in names:
                variance = stds[name].square().expand_as(means[name])
                scaled = (variance + (means[name] - centres[name]).square()) / tau
                terms.append(0.5 * (scaled - 1.0 + torch.log(tau / variance)).sum())
            found[group] = torch.stack(terms).sum()
        return found

    @torch.no_grad()
    def update_prior(self) -> None:
        """tau_g = mean of sigma^2 + (mu - w0)^2 over the group: the minimum of the loss in tau."""
        means, stds, centres = self._by_name(), dict(zip(self._names, self._stds(), strict=True)), self._centres()
        for group, names in self.groups.items():
            total = torch.stack(
                [(stds[n].square().expand_as(means[n]) + (means[n] - centres[n]).square()).sum() for n in names]
            )
            self.variances[group] = total.sum() / sum(means[n].numel() for n in names)

    @property
    def weight_decay(self) -> dict[str, float]:
        """1 / (kappa N tau_g): what a plain training on the mean loss would take, towards the group's centre."""
        scale = self.likelihood_power * self.num_data
        return {group: 1.0 / (scale * float(tau)) for group, tau in self.variances.items()}

    def prior(self) -> GaussianPrior:
        """N(w0, tau), for every method that takes a prior; around zero alone where no group is pretrained."""
        precision = {n: 1.0 / float(self.variances[group]) for group, names in self.groups.items() for n in names}
        centres = torch.cat([value.reshape(-1) for value in self._centres().values()]).double()
        ordered = {name: precision[name] for name in self._names}
        return GaussianPrior(ordered, centres if bool(centres.any()) else 0.0)

    def trained(self) -> nn.Module:
        """A copy of the network with the means as its weights."""
        network = self._network[0]
        model = independent_copy(network.template)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, mean in self._by_name().items():
                own[name].copy_(mean)
        return model

    def _nll(self, f: Tensor, y: Tensor) -> Tensor:
        if self.log_noise is None:
            return -self._family.log_prob(f, y).mean()
        squares = (y - f).square() * torch.exp(-2.0 * self.log_noise)
        return (0.5 * squares + self.log_noise + 0.5 * math.log(2.0 * math.pi)).sum(1).mean()

    def _by_name(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self.means, strict=True))

    def _stds(self) -> list[Tensor]:
        logs = list(self.log_stds)
        return [value.exp() for value in (logs if self._diagonal else logs * len(self._names))]

    def _centres(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"centre_{index}") for index, name in enumerate(self._names)}


@dataclass(frozen=True)
class EmphasizedFit:
    """What `fit` leaves.

    Attributes:
        model: the trained network.
        prior: learned, for every method that takes one.
        likelihood: with its learned noise.
        weight_decay: by group, for plain training on the mean loss.
        likelihood_power: kappa.
        history: mean loss of each epoch.
    """

    model: nn.Module
    prior: GaussianPrior
    likelihood: Likelihood
    weight_decay: Mapping[str, float]
    likelihood_power: float
    history: tuple[float, ...]


def fit(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    prior: Mapping[str, str] | None = None,
    emphasis: float | None = None,
    epochs: int = 100,
    lr: float = 1e-3,
    batch: str | BatchAdapter | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> EmphasizedFit:
    """Train a copy of a network and its prior variances together, by Adam.

    Args:
        model: where to start; never written to.
        data: training loader.
        likelihood: name or object; an open Gaussian noise is learned too.
        prior, emphasis, batch: see `DataEmphasizedELBO`.
        epochs: passes over the data.
        lr: of Adam.
        generator: of the draws.
        progress: show bars.

    Raises:
        NonFiniteError: the loss became NaN or infinite; the batch is named.
    """
    adapter = resolve_adapter(batch)
    example = first_inputs(data, adapter)
    reader = Network(model, batch=batch, example=example)
    num_data = sum(batch_size(inputs) for _, inputs, _ in batches(reader, data, progress=False))
    objective = DataEmphasizedELBO(
        model, likelihood, num_data=num_data, prior=prior, emphasis=emphasis, example=example, batch=batch
    )
    source = generator or torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        total, seen = 0.0, 0
        for number, inputs, target in batches(reader, data, progress=progress, describe=f"epoch {epoch + 1}"):
            with in_batch(number):
                optimizer.zero_grad(set_to_none=True)
                loss = objective.loss(inputs, target, source)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError("the training loss is NaN or infinite: lower the learning rate")
                loss.backward()
                optimizer.step()
            objective.update_prior()
            count = batch_size(inputs)
            total, seen = total + count * float(loss.detach()), seen + count
        history.append(total / seen)
    return EmphasizedFit(
        objective.trained(),
        objective.prior(),
        objective.likelihood,
        objective.weight_decay,
        objective.likelihood_power,
        tuple(history),
    )


def _groups(network: Network, prior: Mapping[str, str], example: Any) -> dict[str, tuple[str, ...]]:
    """Names of the parameters of each group; every parameter in exactly one."""
    for key, centre in prior.items():
        if centre not in CENTRES:
            raise ArgumentError(f"prior={{{key!r}: {centre!r}}}; choose one of {CENTRES}")
    left = list(network.names)
    found: dict[str, tuple[str, ...]] = {}
    rest = [key for key in prior if ALIASES.get(key, key) == "rest"]
    for key in prior:
        if key in rest:
            continue
        names = network.reselect(ALIASES.get(key, key), example).names
        taken = [name for name in names if name not in left]
        if taken:
            raise SelectionError(f"prior: {taken[0]!r} of group {key!r} is in an earlier group already")
        found[key] = names
        left = [name for name in left if name not in names]
    if rest and left:
        found[rest[0]] = tuple(left)
    elif left:
        raise SelectionError(f"prior: {left[0]!r} is in no group; add one called 'rest', e.g. {{'rest': 'zero'}}")
    return found
