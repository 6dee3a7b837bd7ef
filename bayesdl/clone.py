"""Structural clones: a second module tree over the same parameter memory, so that the user's own is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

_PRIVATE = ("_parameters", "_buffers", "_modules")


def unwrap(module: nn.Module) -> nn.Module:
    """Peel `torch.compile`, DataParallel and DistributedDataParallel wrappers off the top of a model."""
    while True:
        inner = module.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def structural_clone(
    module: nn.Module,
    parameter: Callable[[Tensor], Tensor],
    buffer: Callable[[Tensor], Tensor],
) -> nn.Module:
    """A module tree of the same classes with its own dictionaries, in eval mode.

    Args:
        module: the tree to clone; neither it nor anything below it is written to.
        parameter: called once on each distinct parameter; the result takes its place (ties are kept).
        buffer: the same for buffers.

    Sub-modules wrapped by `torch.compile` are replaced by the module inside, because hooks never fire in a
    compiled call. Bound methods and containers in instance attributes are rebuilt around the clone.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def convert(tensor: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = function(tensor)
        return tensors[id(tensor)]

    def shell(old: nn.Module) -> nn.Module:
        old = unwrap(old)
        if id(old) in modules:
            return modules[id(old)]
        new = old.__class__.__new__(old.__class__)
        modules[id(old)] = new
        state = new.__dict__
        state.update(old.__dict__)
        state["_parameters"] = {k: convert(v, parameter) for k, v in old._parameters.items()}
        state["_buffers"] = {k: convert(v, buffer) for k, v in old._buffers.items()}
        state["_modules"] = {k: None if v is None else shell(v) for k, v in old._modules.items()}
        state["training"] = False
        return new

    def rebuilt(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return modules.get(id(unwrap(value)), value)
        if isinstance(value, Tensor):
            return tensors.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in modules:
            return MethodType(value.__func__, modules[id(value.__self__)])
        if type(value) in (list, tuple, set):
            return type(value)(rebuilt(item) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, rebuilt(item)) for key, item in value.items())
        if type(value).__name__ == "RemovableHandle":
            return value
        return value

    root = shell(module)
    for new in modules.values():
        for key, value in list(new.__dict__.items()):
            if key not in _PRIVATE and key != "training":
                new.__dict__[key] = rebuilt(value)
        _out_of_place(new)
    return root


def _out_of_place(module: nn.Module) -> None:
    # an in-place activation would overwrite the activations that curvature needs; same values either way
    if isinstance(getattr(module, "inplace", None), bool):
        module.__dict__["inplace"] = False


def independent_copy(module: nn.Module) -> nn.Module:
    """A deep copy in memory of its own, for methods that train; wrappers are peeled off."""
    return copy.deepcopy(unwrap(module))
