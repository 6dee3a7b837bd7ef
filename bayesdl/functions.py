"""Networks that are plain functions of their parameters, as modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, final

from torch import Tensor, nn

from bayesdl.errors import ArgumentError

Tree = Mapping[str, Any]  # tensors, or trees of tensors, by name


def as_module(function: Callable[..., Any], parameters: Tree) -> FunctionModule:
    """A function of parameters and inputs as a `torch.nn.Module`, which everything in this library takes.

        def network(p, x):
            return torch.tanh(x @ p["inner"] + p["shift"]) @ p["head"]

        bayes = bdl.wrap(bdl.as_module(network, parameters), "laplace", loader, likelihood="categorical")

    Its parameters are called what they are called in `parameters`, for `select=` and in files; those of nested
    mappings, and of names with dots in them, by their path: "encoder.weight". `torch.func.functional_call` fits in as
    it is: `as_module(lambda p, x: functional_call(net, p, (x,)), dict(net.named_parameters()))`.

    Curvature of such parameters is exact, by per-example gradients: structure "full", "diag" and "lowrank" cost what
    they cost elsewhere times the size of those gradients, and "kron" has no two factors to find in them (it keeps each
    parameter's exact matrix up to 1,024 entries, its diagonal above). Layers of `torch.nn` are cheaper where you have
    the choice.

    Args:
        function: `function(parameters, *inputs) -> outputs (B, C)`; deterministic, and each example's output a function
            of that example alone. A `functools.partial` is welcome. Modules that it calls must be in eval mode.
        parameters: tensors by name, nested as the function wants them; the memory is shared, not copied. Integer
            tensors become buffers. A `nn.Parameter` keeps its `requires_grad`; other floating tensors require it.

    Raises:
        ArgumentError: no callable, no tensors, a name that cannot be one, or a module in train mode behind it.
    """
    if isinstance(function, nn.Module) or not callable(function):
        raise ArgumentError(f"a function of (parameters, inputs) is expected, got {type(function).__name__}")
    if not isinstance(parameters, Mapping) or not parameters:
        raise ArgumentError(f"parameters={parameters!r}; pass a dictionary of tensors by name")
    for module in _modules_behind(function):
        if any(part.training for part in module.modules()):
            raise ArgumentError(
                f"the function calls a {type(module).__name__} in train mode, whose outputs are random or depend on "
                "the batch; call its .eval() first"
            )
    return FunctionModule(function, parameters)


@final
class FunctionModule(nn.Module):
    """What `as_module` returns."""

    def __init__(self, function: Callable[..., Any], parameters: Tree) -> None:
        super().__init__()
        self._function = function
        self._names: dict[str, Any] = {}  # `forward` exists from here on, so that no parameter can take its name
        self._names = _registered(self, parameters, (), {})

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        # the signature of a partial is what is left to pass, by which batches are bound to arguments
        return functools.partial(self._function, self._tree(self._names))

    def _tree(self, names: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._tree(name) if isinstance(name, dict) else _held(self, name) for key, name in names.items()}

    def extra_repr(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)


def _registered(root: nn.Module, tree: Tree, path: tuple[str, ...], memo: dict[int, Tensor]) -> dict[str, Any]:
    """Hang a tree's tensors under `root`; the same tree of full names."""
    names: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise ArgumentError(f"the parameter name {key!r} is none; names are text, without empty parts")
        parts = (*path, *key.split("."))
        if isinstance(value, Mapping):
            names[key] = _registered(root, value, parts, memo)
            continue
        name = ".".join(parts)
        if not isinstance(value, Tensor):
            raise ArgumentError(f"parameter {name!r} is a {type(value).__name__}; a tensor is expected")
        try:
            _hang(root, parts, memo.setdefault(id(value), _leaf(value)))
        except (KeyError, AttributeError, TypeError) as error:
            raise ArgumentError(
                f"{name!r} cannot name a parameter, because another parameter or torch.nn.Module itself has that name; "
                "choose another"
            ) from error
        names[key] = name
    return names


def _leaf(value: Tensor) -> Tensor:
    if isinstance(value, nn.Parameter):
        return value
    if value.is_floating_point() or value.is_complex():
        return nn.Parameter(value.detach())
    return value


def _hang(root: nn.Module, parts: tuple[str, ...], value: Tensor) -> None:
    owner = root
    for part in parts[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(parts[-1], value)
    else:
        owner.register_buffer(parts[-1], value)


def _held(root: nn.Module, name: str) -> Tensor | None:
    path, _, key = name.rpartition(".")
    owner = root.get_submodule(path)
    return owner._parameters[key] if key in owner._parameters else owner._buffers[key]


def _modules_behind(function: Any) -> list[nn.Module]:
    """Modules that a function can be seen to hold: in a closure, bound to a partial, or as its own object."""
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        inner = (function.func, *function.args, *function.keywords.values())
        return [module for value in inner for module in _modules_behind(value)]
    if isinstance(function, MethodType):
        return [*_modules_behind(function.__self__), *_modules_behind(function.__func__)]
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        return [value for value in cells if isinstance(value, nn.Module)]
    return []


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
