"""Which parameters are Bayesian: a selection resolved to parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from bayesdl.errors import SelectionError

Selector = str | Iterable[str] | re.Pattern[str] | Callable[[str, Tensor], bool]

KEYWORDS = ("all", "last_layer", "requires_grad")


def describe(select: Selector) -> str:
    """A short text of the selection, for records and files."""
    if isinstance(select, str):
        return select
    if isinstance(select, re.Pattern):
        return f"regex:{select.pattern}"
    if callable(select):
        return f"callable:{getattr(select, '__name__', type(select).__name__)}"
    return ",".join(select)


def resolve(
    select: Selector,
    module: nn.Module,
    requires_grad: dict[str, bool],
    last_layer: Callable[[], str],
) -> tuple[str, ...]:
    """Names of the selected parameters, each tied parameter once, in the module's own order.

    Args:
        select: "all"; "last_layer"; "requires_grad"; the name of a module or a parameter; a regular
            expression (compiled, or text that is no name: `re.search` on parameter names); a list of names
            or module names; or a predicate `(name, parameter) -> bool`.
        module: the network.
        requires_grad: what the user's own parameters say (the library's clone says False everywhere).
        last_layer: finds the name of the layer whose output is the network's output.

    Raises:
        SelectionError: nothing selected, or a name that does not exist.
    """
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if not parameters:
        raise SelectionError("the network has no parameters")
    names = _chosen(select, parameters, requires_grad, last_layer)
    chosen = tuple(
        name
        for name in parameters
        if name in names and (parameters[name].is_floating_point() and parameters[name].numel())
    )
    if not chosen:
        raise SelectionError(
            f"select={describe(select)!r} matches no floating-point parameter; the network has "
            f"{_some(list(parameters))}"
        )
    return chosen


def _chosen(
    select: Selector,
    parameters: dict[str, Tensor],
    requires_grad: dict[str, bool],
    last_layer: Callable[[], str],
) -> set[str]:
    if callable(select) and not isinstance(select, (str, re.Pattern)):
        return {name for name, value in parameters.items() if select(name, value)}
    if isinstance(select, re.Pattern):
        return {name for name in parameters if select.search(name)}
    if select == "all":
        return set(parameters)
    if select == "requires_grad":
        return {name for name in parameters if requires_grad.get(name, False)}
    if select == "last_layer":
        return _named(last_layer(), parameters)
    if isinstance(select, str):
        found = _named(select, parameters)
        return found or _by_pattern(select, parameters)
    names: set[str] = set()
    for item in select:
        found = _named(item, parameters)
        if not found:
            raise SelectionError(
                f"select names {item!r}, which is no parameter or module; there are {_some(list(parameters))}"
            )
        names |= found
    return names


def _named(name: str, parameters: dict[str, Tensor]) -> set[str]:
    if not name:  # the network itself is the layer
        return set(parameters)
    return {other for other in parameters if other == name or other.startswith(name + ".")}


def _by_pattern(pattern: str, parameters: dict[str, Tensor]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SelectionError(
            f"select={pattern!r} is no keyword of {KEYWORDS}, no name, and no regular expression ({error})"
        ) from error
    return {name for name in parameters if compiled.search(name)}


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
