"""What a step is given: parameters with their gradients by group, whole and finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError, UnreachedParameterError, UnsupportedError
from bayesdl.samplers.forces import Block, global_norm


def gather(groups: Sequence[dict[str, Any]], iteration: int, allow_unused: bool) -> list[Block]:
    """Parameters and gradients by group.

    Raises:
        ArgumentError: there is no parameter.
        UnreachedParameterError: a parameter has no gradient, and `allow_unused` is not set.
        UnsupportedError: a gradient is sparse.
    """
    blocks: list[Block] = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        grads = []
        for name, parameter in zip(names, group["params"], strict=True):
            grad = parameter.grad
            if grad is None:
                if not allow_unused:
                    raise _unreached(name, parameter, iteration)
                grad = torch.zeros_like(parameter)
            elif grad.is_sparse:
                raise UnsupportedError(f"parameter {name!r} has a sparse gradient; samplers need dense ones "
                                       "(sparse=False): prior and noise move every weight")  # fmt: skip
            grads.append(grad)
        if grads:
            blocks.append(Block(len(blocks), group, names, list(group["params"]), grads, group["lr"]))
    if not blocks:
        raise ArgumentError("the sampler has no parameters")
    return blocks


def finite_norm(blocks: Sequence[Block], iteration: int) -> float:
    """The norm of all gradients; raises `NonFiniteError` for NaN or infinity, which only then are searched for."""
    norm = global_norm([grad for block in blocks for grad in block.grads])
    if math.isfinite(norm):
        return norm
    for block in blocks:
        for name, grad in zip(block.names, block.grads, strict=True):
            if not bool(torch.isfinite(grad).all()):
                bad = int((~torch.isfinite(grad)).sum())
                raise NonFiniteError(
                    f"step {iteration}: {bad} of {grad.numel()} gradients of parameter {name!r} are NaN or "
                    "infinite; nothing was updated (look at the loss, the data and the learning rate)"
                )
    raise NonFiniteError(f"step {iteration}: the norm of the gradient overflows; nothing was updated")


def adopt(block: Block, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put float32 copies in place of half-precision parameters, with float32 gradients."""
    for index, parameter in enumerate(block.params):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            state = states[parameter]
            if "master" not in state:
                state["master"] = parameter.detach().float()
            block.params[index] = state["master"]
            block.grads[index] = block.grads[index].float()


def _unreached(name: str, parameter: Tensor, iteration: int) -> UnreachedParameterError:
    why = "" if parameter.requires_grad else " and requires_grad=False"
    return UnreachedParameterError(
        f"parameter {name!r} of shape {tuple(parameter.shape)} has no gradient{why} at step {iteration}: call "
        "backward() first, leave it out of the sampler, or pass allow_unused=True to run it on its prior alone"
    )
