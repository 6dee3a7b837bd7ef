"""Structural clones: a second module tree over the same parameter memory, so that the user's own is never touched."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_PRIVATE = ("_parameters", "_buffers", "_modules")


def unwrap(module: nn.Module) -> nn.Module:
    """Peel `torch.compile`, DataParallel and DistributedDataParallel wrappers off the top of a model."""
    while not isinstance(module, torch.jit.ScriptModule):  # which keeps its sub-modules elsewhere
        inner = module.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
    return module


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter is of a class of its own over integers, as those of 4-bit and 8-bit back ends are."""
    return nn.Parameter in type(tensor).__mro__[1:] and not tensor.is_floating_point()


def structural_clone(
    module: nn.Module,
    parameter: Callable[[Tensor], Tensor],
    buffer: Callable[[Tensor], Tensor],
) -> nn.Module:
    """A module tree of the same classes with its own dictionaries, in eval mode.

    Args:
        module: the tree to clone; neither it nor anything below it is written to.
        parameter: called once on each distinct parameter; the result takes its place (ties are kept).
        buffer: the same for buffers, and for tensors that are plain attributes.

    Quantised weights are shared as they are: what undoes the quantisation hangs on the very object.

    Modules compiled by `torch.compile` or `.compile()` are replaced by the plain module, because hooks never
    fire in a compiled call. Bound methods, closures, partials and containers in instance attributes (a patched
    `forward`, hooks) are rebuilt around the clone.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    functions: dict[int, FunctionType] = {}

    def convert(tensor: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor | None:
        if tensor is None or is_quantised(tensor):
            return tensor
        if id(tensor) not in tensors:
            tensors[id(tensor)] = function(tensor)
        return tensors[id(tensor)]

    def shell(old: nn.Module) -> nn.Module:
        old = unwrap(old)
        if id(old) in modules:
            return modules[id(old)]
        new: nn.Module = object.__new__(type(old))  # a class's own __new__ may want arguments, or make another class
        modules[id(old)] = new
        state = new.__dict__
        state.update(old.__dict__)
        state.pop("_compiled_call_impl", None)  # left by `module.compile()`: it would run the user's own module
        state["_parameters"] = {k: convert(v, parameter) for k, v in old._parameters.items()}
        state["_buffers"] = {k: convert(v, buffer) for k, v in old._buffers.items()}
        state["_modules"] = {k: None if v is None else shell(v) for k, v in old._modules.items()}
        state["training"] = False
        return new

    def rebuilt(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return modules.get(id(unwrap(value)), value)
        if isinstance(value, Tensor):
            return convert(value, buffer)
        if isinstance(value, MethodType) and id(value.__self__) in modules:
            return MethodType(value.__func__, modules[id(value.__self__)])
        if isinstance(value, FunctionType) and value.__closure__:
            return reclosed(value)
        if type(value) is functools.partial:
            bound = functools.partial(rebuilt(value.func), *map(rebuilt, value.args), **rebuilt(value.keywords))
            bound.__dict__.update(value.__dict__)
            return bound
        if type(value) in (list, tuple, set):
            return type(value)(rebuilt(item) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, rebuilt(item)) for key, item in value.items())
        return value

    def reclosed(function: FunctionType) -> FunctionType:
        if id(function) in functions:
            return functions[id(function)]
        old = function.__closure__ or ()
        # only what reaches into the tree: whatever else a hook records into stays where its author looks
        new = tuple(CellType() if _reaches(cell) else cell for cell in old)
        twin = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, new)
        twin.__kwdefaults__, twin.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        functions[id(function)] = twin  # before its cells are filled: a closure may hold itself
        changed = False
        for before, after in zip(old, new, strict=True):
            if before is not after:
                value = rebuilt(before.cell_contents)
                changed = changed or not (value is twin or value == before.cell_contents)
                after.cell_contents = value
        if not changed:
            functions[id(function)] = function
        return functions[id(function)]

    root = shell(module)
    for new in modules.values():
        for key, value in list(new.__dict__.items()):
            if key not in _PRIVATE and key != "training":
                new.__dict__[key] = rebuilt(value)
        _plain_gradients(new)
    return root


def _reaches(cell: CellType) -> bool:
    try:
        value = cell.cell_contents
    except ValueError:  # a name that its function has not assigned yet
        return False
    return isinstance(value, (nn.Module, MethodType, FunctionType, functools.partial))


def _plain_gradients(module: nn.Module) -> None:
    # gradients scaled by the batch's word counts, or sparse, are devices of training and no derivatives
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.__dict__["scale_grad_by_freq"] = module.__dict__["sparse"] = False


def independent_copy(module: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """A clone in memory of its own, for methods that train; wrappers are peeled off at every level.

    Args:
        module: the tree to copy.
        names: parameters that will be written to; the others then share the memory of the original, so that a chain
            over an adapter does not hold the network below it once more. Buffers are copied in any case.
    """

    def own(tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)

    def shared(tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # which can never take part in a derivative
            return own(tensor)
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)

    made = structural_clone(unwrap(module), own if names is None else shared, lambda tensor: tensor.detach().clone())
    if names is not None:
        held = dict(made.named_parameters(remove_duplicate=False))  # names of a clone: wrappers inside are gone
        copies = {id(held[name]): own(held[name]) for name in names}
        for part in made.modules():
            for key, value in part._parameters.items():
                part._parameters[key] = copies.get(id(value), value)  # type: ignore[assignment]
    return made
