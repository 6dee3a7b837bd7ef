"""The negative log-likelihood of a task as samplers take it: in minibatches, at weights that move."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bayesdl.batch import batch_size
from bayesdl.data import batches, declared_size, in_batch, keeps_order
from bayesdl.diagnose import Finding
from bayesdl.distributed import share_of
from bayesdl.errors import ArgumentError, LossScaleError, NonFiniteError
from bayesdl.likelihoods import Likelihood
from bayesdl.methods.base import Task
from bayesdl.methods.noise import with_left_out_noise
from bayesdl.network import Network

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Energy:
    """`-sum_n log p(y_n | theta)`, cut into minibatches without bias.

    Attributes:
        likelihood: with every noise known.
        num_data: N, observations that count; those that a loader drops (`drop_last`) are counted in.
        num_batches: K, batches of a pass.
        counted: observations in one pass over the loader.
    """

    likelihood: Likelihood
    num_data: int
    num_batches: int
    counted: int

    def loss(
        self, network: Network, module: nn.Module, inputs: Any, target: Any, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """`-K / counted * sum log p` of one batch: its mean over the batches of a pass is the mean over the data.

        Batches of unequal size (the last of a loader) weigh by what they hold, which a mean over each batch does not.

        Raises:
            NonFiniteError: the loss, or an output, is NaN or infinite.
        """
        return -self.log_prob(network, module, inputs, target, tensors) * (self.num_batches / self.counted)

    def log_prob(
        self, network: Network, module: nn.Module, inputs: Any, target: Any, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """`sum log p` of one batch."""
        outputs = self.likelihood.check_outputs(network.forward(module, network.prepare(inputs), tensors))
        value = self.likelihood.log_prob(outputs, self.likelihood.check_targets(outputs, target)).sum()
        if not bool(torch.isfinite(value)):
            raise NonFiniteError("the log-likelihood is NaN or infinite")
        return value


def survey(task: Task, data: Iterable[Any]) -> tuple[Energy, tuple[Finding, ...]]:
    """Count the data, choose an open Gaussian noise, and check that the likelihood scores every example.

    Raises:
        LossScaleError: the likelihood returns one number for a batch, so that its scale is not known.
        ArgumentError: no batch, one process's share of the data, or no target that counts.
    """
    _check_whole(task, data)
    likelihood, findings = with_left_out_noise(task)
    network = task.network
    count = seen = number = 0
    with torch.no_grad():
        for number, inputs, target in batches(network, data, progress=task.progress, describe="data"):
            with in_batch(number):
                outputs = likelihood.check_outputs(network(inputs))
                checked = likelihood.check_targets(outputs, target)
                values = likelihood.log_prob(outputs, checked)
                if values.shape[:1] != outputs.shape[:1]:
                    raise LossScaleError(
                        f"log_prob of {type(likelihood).__name__} returned shape {tuple(values.shape)} for "
                        f"{len(outputs)} examples; expected one number for each, so that N of them can be summed"
                    )
                if not bool(torch.isfinite(values).all()):
                    raise NonFiniteError("the log-likelihood is NaN or infinite")
                count += likelihood.num_counted(checked)
                seen += batch_size(inputs)
    if not count:
        raise ArgumentError("every target of the data is ignored; at least one has to count")
    declared = declared_size(data)
    total = count
    notes = []
    if declared is not None and declared > seen:
        total = round(count * declared / seen)
        text = f"the loader drops {declared - seen} of {declared} examples a pass; the posterior is that of all {total}"
        notes.append(Finding("info", text))
    if keeps_order(data) and number:
        text = "the loader yields the same batches in every pass"
        notes.append(Finding("info", text, "DataLoader(..., shuffle=True) averages the noise of gradients out"))
    return Energy(likelihood, total, number + 1, count), (*findings, *notes)


def prepare_module(module: nn.Module, names: tuple[str, ...]) -> tuple[list[tuple[str, nn.Parameter]], list[Finding]]:
    """Set a private module up for a chain: gradients for the named parameters, dropout off, batch norm as in training.

    Batch norm stays as it is in evaluation where neither its own weights nor all weights of the network move: the
    layers before it are then fixed, and so are its statistics.

    Returns:
        (name, parameter) pairs in the order of `names`, and what has to be said.
    """
    module.eval()
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    everything = set(names) >= set(parameters)
    moving = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and (everything or f"{name}.weight" in names)
    ]
    for name in moving:
        module.get_submodule(name).train()
    findings = []
    if moving:
        findings.append(
            Finding(
                "info",
                f"{len(moving)} batch-norm layers use the statistics of each batch, so that the loss is no sum over "
                "data; every sample keeps its running statistics",
            )
        )
    dropped = [name for name, layer in module.named_modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if dropped:
        _log.info("dropout is off in the chain: %s", ", ".join(dropped))
        findings.append(Finding("info", f"dropout is off in the chain ({len(dropped)} layers)"))
    return [(name, parameters[name]) for name in names], findings


def _check_whole(task: Task, data: Iterable[Any]) -> None:
    if task.distributed is False:
        return
    try:
        share_of(data, None, None)
    except ArgumentError as error:
        raise ArgumentError(
            "the loader yields one process's share of its data, and every chain needs all of them: give each process a "
            "loader without a DistributedSampler (distributed=False takes the share for the whole)"
        ) from error
