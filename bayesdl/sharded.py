"""Models whose parameters are spread over processes: FSDP2 freed of its hooks, or gathered; the rest refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone
from bayesdl.errors import UnsupportedError
from bayesdl.streaming import GATHER, cut_axes, group_of, is_sharded, whole

# where torch keeps what it puts on modules, as prefixes of the hooks' __module__
FSDP, TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
MARKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def gathered(module: nn.Module) -> nn.Module:
    """The module itself, or, where torch's `fully_shard` (FSDP2) was applied, a plain copy with whole parameters.

    For what needs whole weights: `bdl.wrap(bdl.gathered(net), "sghmc", ...)`. The copy takes the memory of the full
    model on every process, and its gathering is a collective: all processes of the model's mesh must make the same
    call, as they must for its forward pass. The user's module stays sharded, and the copy does not notice its training.

    Raises:
        UnsupportedError: FSDP1, DeepSpeed's ZeRO stage 3, or tensor parallelism.
    """
    return _plain(module, _whole_parameter) if made_by_fsdp(module) else module


def stripped(module: nn.Module) -> nn.Module:
    """The module itself, or, where `fully_shard` was applied, a clone without its hooks that holds the same shards.

    Vectors (biases, gains of norms) are whole in the clone: a thousandth of the model, and half of its collectives.
    So is what `fully_shard` holds whole at this moment: its outermost group behind a forward pass without a backward.

    Raises:
        UnsupportedError: as `gathered`; or parameters that are cut twice, or over different groups of processes.
    """
    if not made_by_fsdp(module):
        return module
    cut = [p for p in module.parameters() if is_sharded(p)]
    if any(len(cut_axes(p)) != 1 for p in cut) or len({group_of(p).group_name for p in cut}) > 1:
        raise UnsupportedError(
            f"the model's parameters are sharded over different groups of processes, or along several axes; {GATHER}"
        )
    return _plain(module, _shard_or_vector)


def made_by_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module or to one within. Raises as `gathered` does."""
    parts = dict(module.named_modules())
    for name, part in parts.items():
        _refuse(name or type(part).__name__, part)
    if any(_fsdp_class(part) for part in parts.values()):
        return True
    if any(is_sharded(p) for p in module.parameters()):
        raise UnsupportedError(
            "the model's parameters are DTensors of no FSDP module (tensor parallelism?), whose layers compute parts "
            "of each output: gather them (parameter.full_tensor()) into a plain copy of the model and wrap that"
        )
    return False


def _plain(module: nn.Module, parameter: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.no_grad():
        plain = structural_clone(module, parameter, _whole)
    for part in plain.modules():
        original = _fsdp_class(part)
        if original is not None:
            part.__class__ = original
        _without_hooks(part)
    return plain


def _refuse(name: str, part: nn.Module) -> None:
    if any(base.__name__ == "FullyShardedDataParallel" for base in type(part).__mro__):
        raise UnsupportedError(
            f"module {name!r} is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters: use "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead, or load the full state dict into a plain model"
        )
    for parameter in part._parameters.values():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedError(
                f"module {name!r} holds parameters that DeepSpeed's ZeRO stage 3 spreads over the processes: gather "
                "them into a plain copy of the model and wrap that"
            )
    for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
        if _origin(hook).startswith(TENSOR_PARALLEL):
            raise UnsupportedError(
                f"module {name!r} is tensor parallel (parallelize_module): its layers compute parts of each output. "
                "Gather the parameters (parameter.full_tensor()) into a plain copy of the model and wrap that"
            )


def _fsdp_class(part: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before `fully_shard`; None where it was not applied."""
    kind = type(part)
    made = any(base.__name__ == "FSDPModule" and base.__module__.startswith(FSDP) for base in kind.__mro__)
    return kind.__bases__[-1] if made else None


def _whole(tensor: Tensor) -> Tensor:
    # what fully_shard has gathered for its own use it will free again
    return whole(tensor) if is_sharded(tensor) else tensor.detach().clone()


def _whole_parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(_whole(tensor).detach(), requires_grad=tensor.requires_grad)


def _shard_or_vector(tensor: Tensor) -> Tensor:
    if is_sharded(tensor) and tensor.dim() > 1:
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return _whole_parameter(tensor)


def _without_hooks(part: nn.Module) -> None:
    state = part.__dict__
    for hooks in HOOKS:
        for key in [key for key, hook in state[hooks].items() if _origin(hook).startswith(FSDP)]:
            del state[hooks][key]
            for marks in MARKS:
                state[marks].pop(key, None)


def _origin(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""
