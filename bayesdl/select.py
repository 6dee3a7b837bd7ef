"""Which parameters are Bayesian: a selection resolved to parameter names, and to single elements of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, SelectionError

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

Selector = Union[str, Iterable[str], "re.Pattern[str]", Callable[[str, Tensor], bool], "Subnetwork"]

KEYWORDS = ("all", "last_layer", "requires_grad", "lora", "lora+head", "lora:last-k")
# short for a keyword, unless a layer of the network has that name
ALIASES = {"last": "last_layer"}
# peft's names of the low-rank factors, those of embeddings too
LORA = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
LAST_BLOCKS = re.compile(r"lora:last-(\d+)")


def describe(select: Selector) -> str:
    """A short text of the selection, for records and files."""
    if isinstance(select, Subnetwork):
        return select.text
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
        select: "all"; "last_layer" (or "last"); "requires_grad"; "lora" (the low-rank factors that peft adds),
            "lora:last-k" (those in the last k blocks), "lora+head" (and peft's `modules_to_save`); the name of a module
            or a parameter; a regular expression (compiled, or text that is no name: `re.search` on parameter names); a
            list of names or module names; or a predicate `(name, parameter) -> bool`.
        module: the network.
        requires_grad: what the user's own parameters say (the library's clone says False everywhere).
        last_layer: finds the name of the layer whose output is the network's output.

    Raises:
        SelectionError: nothing selected, or a name that does not exist.
    """
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if not parameters:
        raise SelectionError("the network has no parameters")
    every: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    low_rank = isinstance(select, str) and (select in ("lora", "lora+head") or LAST_BLOCKS.fullmatch(select))
    names = (
        _low_rank(str(select), module, parameters)
        if low_rank
        else _chosen(select, parameters, every, requires_grad, last_layer)
    )
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
    every: dict[str, Tensor],
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
    if isinstance(select, str):
        found = _named(select, every)
        if wants_last_layer(select) and not found:
            return _named(last_layer(), every)
        return found or _by_pattern(select, parameters)
    if isinstance(select, Subnetwork):
        raise SelectionError("a subnetwork within a subnetwork: pass names, or a pattern, as within=")
    names: set[str] = set()
    for item in select:
        found = _named(item, every)
        if not found:
            raise SelectionError(
                f"select names {item!r}, which is no parameter or module; there are {_some(list(parameters))}"
            )
        names |= found
    return names


def wants_last_layer(select: Selector | None) -> bool:
    """Whether a selection may have to run the network to be resolved."""
    inside = select.within if isinstance(select, Subnetwork) else select
    return isinstance(inside, str) and ALIASES.get(inside, inside) == "last_layer"


def _low_rank(select: str, module: nn.Module, parameters: dict[str, Tensor]) -> set[str]:
    factors = {name for name in parameters if LORA.search(name)}
    if select == "lora+head":
        return factors | {name for name in parameters if ".modules_to_save." in name}
    last = LAST_BLOCKS.fullmatch(select)
    if last is None or not factors:
        return factors
    from bayesdl.lora.adapters import block_list, block_of

    path = block_list(module, factors)
    first = len(module.get_submodule(path)) - int(last[1])  # type: ignore[arg-type]
    if int(last[1]) < 1 or first < 0:
        raise SelectionError(f"select={select!r}, and {path!r} has {first + int(last[1])} blocks")
    return {name for name in factors if (place := block_of(name, path)) is not None and place >= first}


def _named(name: str, every: dict[str, Tensor]) -> set[str]:
    """Parameters by any of their names; a tied one has several, of which `named_parameters` yields the first."""
    held = {id(v) for other, v in every.items() if not name or other == name or other.startswith(name + ".")}
    return {other for other, value in every.items() if id(value) in held}


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


class Subnetwork(ABC):
    """A selection of single elements of parameters, chosen among those that `within` selects.

    Curvature, posterior and prior then have one coordinate an element; everything else keeps its trained value.
    """

    within: Selector = "all"

    @abstractmethod
    def masks(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """True at the selected elements, by name, for those of the given parameters that hold any.

        Raises:
            SelectionError: nothing is selected, or more than there is.
        """

    @property
    @abstractmethod
    def text(self) -> str:
        """A short description."""


@final
@dataclass(frozen=True)
class _Scored(Subnetwork):
    """The `amount` elements of the highest score."""

    amount: int | float
    score: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    name: str
    within: Selector = "all"

    def masks(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = self.score(parameters)
        flat = torch.cat([scores[name].detach().reshape(-1).double().cpu() for name in parameters])
        count = _count(self.amount, len(flat))
        marks = torch.zeros(len(flat), dtype=torch.bool)
        marks[flat.argsort(descending=True, stable=True)[:count]] = True
        pieces = marks.split([value.numel() for value in parameters.values()])
        named = {n: piece.view(v.shape) for (n, v), piece in zip(parameters.items(), pieces, strict=True)}
        return {name: piece for name, piece in named.items() if bool(piece.any())}

    @property
    def text(self) -> str:
        return f"{self.name}({self.amount})"


@final
@dataclass(frozen=True)
class _Masked(Subnetwork):
    """The elements that the user marked."""

    given: Mapping[str, Tensor]

    def masks(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in self.given.items():
            if name not in parameters:
                raise SelectionError(
                    f"the mask names {name!r}, which is no parameter; there are {_some(list(parameters))}"
                )
            if value.dtype != torch.bool or value.shape != parameters[name].shape:
                raise SelectionError(
                    f"the mask of {name!r} is {value.dtype} of shape {tuple(value.shape)}; expected torch.bool of "
                    f"shape {tuple(parameters[name].shape)}"
                )
        found = {name: self.given[name].cpu() for name in parameters if name in self.given and self.given[name].any()}
        if not found:
            raise SelectionError("the mask selects no element")
        return found

    @property
    def text(self) -> str:
        return f"mask({sum(int(value.sum()) for value in self.given.values())})"


def largest_magnitude(amount: int | float, within: Selector = "all") -> Subnetwork:
    """The elements of the largest absolute value.

    Args:
        amount: how many, or a fraction of all as a float in (0, 1].
        within: the parameters to choose among.
    """
    return _Scored(amount, lambda parameters: {n: p.detach().abs() for n, p in parameters.items()}, "magnitude", within)


def largest_variance(amount: int | float, model: BayesianModel, within: Selector = "all") -> Subnetwork:
    """The elements of the largest marginal posterior variance under a fitted diagonal Laplace approximation.

    Daxberger et al. 2021, "Bayesian deep learning via subnetwork inference": of all subnetworks of one size, the one
    nearest to the whole posterior in Wasserstein distance if that is diagonal.

    Args:
        amount: how many, or a fraction of all as a float in (0, 1].
        model: `bdl.wrap(net, bdl.Laplace(structure="diag"), ...)`; its selection holds all that `within` does.
        within: the parameters to choose among.

    Raises:
        ArgumentError: another model.
    """
    from bayesdl.curvature.diag import Diag
    from bayesdl.posteriors import GaussianPosterior

    posterior = model.posterior
    if not isinstance(posterior, GaussianPosterior) or not isinstance(posterior.structure, Diag):
        raise ArgumentError(
            'largest_variance needs a Laplace approximation with structure="diag"; fit one: bdl.wrap(net, '
            'bdl.Laplace(structure="diag"), loader, likelihood=...)'
        )
    ones = posterior.precision.new_ones(posterior.layout.numel)
    variances = posterior.layout.to_dict(posterior.structure.solve(ones, posterior.scale, posterior.shift))

    def score(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name in parameters:
            if name not in variances:
                raise SelectionError(
                    f"the diagonal Laplace approximation does not hold {name!r}; fit it over all of them"
                )
        return variances

    return _Scored(amount, score, "variance", within)


def random(amount: int | float, generator: torch.Generator | None = None, within: Selector = "all") -> Subnetwork:
    """Elements drawn without replacement, each as likely as any other; for comparison.

    Args:
        amount: how many, or a fraction of all as a float in (0, 1].
        generator: source of the choice, made now; default a fixed seed.
        within: the parameters to choose among.
    """
    source = generator or torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))

    def score(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        fixed = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(value.shape, generator=fixed, dtype=torch.float64) for name, value in parameters.items()
        }

    return _Scored(amount, score, "random", within)


def mask(marks: Mapping[str, Tensor]) -> Subnetwork:
    """The elements that are true in tensors by parameter name; parameters that are not named stay out."""
    return _Masked(dict(marks))


def _count(amount: int | float, size: int) -> int:
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    valid = 1 <= amount <= size if whole else isinstance(amount, float) and 0.0 < amount <= 1.0
    if not valid:
        raise SelectionError(
            f"a subnetwork of {amount!r} elements was asked for; expected a whole number from 1 to {size}, or a "
            "fraction as a float in (0, 1]"
        )
    return int(amount) if whole else max(1, round(amount * size))
