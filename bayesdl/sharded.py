"""Models whose parameters are spread over processes: FSDP2 gathered into a plain private copy, the rest refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone
from bayesdl.errors import UnsupportedError

# where torch keeps what it puts on modules, as prefixes of the hooks' __module__
FSDP, TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
MARKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def gathered(module: nn.Module) -> nn.Module:
    """The module itself, or, where torch's `fully_shard` (FSDP2) was applied, a plain copy with whole parameters.

    The copy takes the memory of the full model on every process, and its gathering is a collective: all processes of
    the model's mesh must make the same call, as they must for its forward pass. The user's module stays sharded.

    Raises:
        UnsupportedError: FSDP1, DeepSpeed's ZeRO stage 3, or tensor parallelism.
    """
    parts = dict(module.named_modules())
    for name, part in parts.items():
        _refuse(name or type(part).__name__, part)
    sharded = any(_is_sharded(p) for p in module.parameters())
    if not sharded and not any(_fsdp_class(part) for part in parts.values()):
        return module
    if not any(_fsdp_class(part) for part in parts.values()):
        raise UnsupportedError(
            "the model's parameters are DTensors of no FSDP module (tensor parallelism?), whose layers compute parts "
            "of each output: gather them (parameter.full_tensor()) into a plain copy of the model and wrap that"
        )
    with torch.no_grad():
        plain = structural_clone(module, _whole_parameter, _whole)
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


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Tensor) -> Tensor:
    # what fully_shard has gathered for its own use it will free again
    return tensor.full_tensor() if _is_sharded(tensor) else tensor.detach().clone()  # type: ignore[attr-defined]


def _whole_parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(_whole(tensor).detach(), requires_grad=tensor.requires_grad)


def _without_hooks(part: nn.Module) -> None:
    state = part.__dict__
    for hooks in HOOKS:
        for key in [key for key, hook in state[hooks].items() if _origin(hook).startswith(FSDP)]:
            del state[hooks][key]
            for marks in MARKS:
                state[marks].pop(key, None)


def _origin(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""
