"""Training steps for methods that move the weights: always on a copy in its own memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesdl.clone import independent_copy
from bayesdl.data import batches, in_batch
from bayesdl.errors import NonFiniteError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.methods.base import Task
from bayesdl.network import Network


def train_only(module: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Put `module` in train mode with gradients for the named parameters alone; those, in order."""
    module.train()
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return [parameters[name] for name in names]


def sgd_epoch(
    task: Task, module: nn.Module, data: Iterable[Any], optimizer: torch.optim.Optimizer, describe: str
) -> Iterator[int]:
    """One pass of optimiser steps on the mean negative log-likelihood; yields 1, 2, ... after each step.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the batch is named and no step was taken on it.
    """
    likelihood = _trainable(task.likelihood)
    for number, inputs, target in batches(task.network, data, progress=task.progress, describe=describe):
        with torch.enable_grad(), in_batch(number):
            optimizer.zero_grad(set_to_none=True)
            raw = task.network.forward(module, task.network.prepare(inputs))
            if number and not bool(torch.isfinite(raw).all()):
                raise NonFiniteError("the outputs became NaN or infinite in training: lower the learning rate")
            outputs = likelihood.check_outputs(raw)
            checked = likelihood.check_targets(outputs, target)
            loss = -likelihood.log_prob(outputs, checked).sum() / max(1, likelihood.num_counted(checked))
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError("the training loss is NaN or infinite: lower the learning rate")
            loss.backward()
            optimizer.step()
        yield number + 1


def with_fresh_statistics(task: Task, data: Iterable[Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` plus batch-norm statistics recomputed for them in one pass over the data.

    Statistics of other weights would make a sampled network worse than it is (Maddox et al. 2019).
    """
    return {**weights, **recomputed_statistics(task.network, task.models[0], data, weights)}


def recomputed_statistics(
    network: Network, model: nn.Module, data: Iterable[Any], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Buffers of all batch norms, by name, at the given weights: averages over one pass, on a copy of `model`."""
    module = independent_copy(model).eval()
    norms = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not norms:
        return {}
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if name in own:
                own[name].copy_(value)
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average over the pass
            norm.train()
        for number, inputs, _ in batches(network, data, progress=False, describe="statistics"):
            with in_batch(number):
                network.forward(module, network.prepare(inputs))
    return {
        f"{name}.{key}" if name else key: value.detach().clone()
        for name, norm in norms.items()
        for key, value in norm.named_buffers()
    }


def _trainable(likelihood: Likelihood) -> Likelihood:
    # an open noise only scales the loss; one is what training with the squared error uses
    if isinstance(likelihood, Gaussian) and likelihood.noise is None:
        return likelihood.with_noise(1.0)
    return likelihood
