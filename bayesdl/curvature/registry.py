"""Structures by name or by layer pattern, and what each pass over the data fills."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bayesdl.curvature.diag import Diag
from bayesdl.curvature.dual import Dual
from bayesdl.curvature.ekfac import EKFAC
from bayesdl.curvature.full import Full
from bayesdl.curvature.kron import SHARED, Kron
from bayesdl.curvature.kron_lowrank import KronLowRank
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.lowrank import LowRank
from bayesdl.curvature.mixed import Mixed
from bayesdl.curvature.structure import Structure, Uniform
from bayesdl.errors import ArgumentError, UnknownNameError

STRUCTURES: dict[str, type[Uniform]] = {
    "full": Full,
    "diag": Diag,
    "kron": Kron,
    "kron-lowrank": KronLowRank,
    "ekfac": EKFAC,
    "lowrank": LowRank,
    "dual": Dual,
}

# a name, or names by layer pattern
Recipe = str | Mapping[str, str]


def check_recipe(recipe: Recipe, rank: int | None = None) -> None:
    """Raise unless a recipe is a known name, or a dictionary from patterns to known names.

    Raises:
        UnknownNameError: no such structure.
        ArgumentError: an empty dictionary, another type, or a rank that is no positive integer or has no use.
    """
    if rank is not None:
        names = recipe.values() if isinstance(recipe, Mapping) else [recipe]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ArgumentError(f"rank={rank!r}; expected a positive integer")
        if not {"lowrank", "kron-lowrank"} & set(names):
            raise ArgumentError(
                f'rank={rank} was given with structure={recipe!r}; it belongs to structure="lowrank" or "kron-lowrank"'
            )
    if isinstance(recipe, Mapping):
        if not recipe or not all(isinstance(pattern, str) for pattern in recipe):
            raise ArgumentError(
                f'structure={recipe!r}; expected layer patterns with a structure each, e.g. {{"head": "full", "*": '
                '"kron"}'
            )
        for name in recipe.values():
            _check_name(name)
    else:
        _check_name(recipe)


def num_passes(recipe: Recipe) -> int:
    """How often the data are read."""
    names = recipe.values() if isinstance(recipe, Mapping) else [recipe]
    return max(STRUCTURES[name].num_passes for name in names)


def check_shared(recipe: Recipe, shared: str) -> None:
    """Raise unless `shared=` is known, and of use to a recipe that `check_recipe` has passed.

    Raises:
        UnknownNameError: no such way of sharing.
        ArgumentError: nothing in the recipe has Kronecker factors.
    """
    if shared not in SHARED:
        raise UnknownNameError(f"shared={shared!r} is not known; choose one of {SHARED}")
    names = list(recipe.values()) if isinstance(recipe, Mapping) else [recipe]
    if shared != SHARED[0] and not {"kron", "kron-lowrank", "ekfac"} & set(names):
        raise ArgumentError(
            f'shared={shared!r} was given with structure={recipe!r}; it belongs to structure="kron" or "ekfac"'
        )


def empty(recipe: Recipe, layout: Layout, dtype: torch.dtype, device: torch.device) -> Structure:
    """The finished structure with zero curvature."""
    if isinstance(recipe, Mapping):
        return Mixed.of(layout, recipe, lambda name, part: STRUCTURES[name].empty(part, dtype, device))
    return STRUCTURES[recipe].empty(layout, dtype, device)


def first(
    recipe: Recipe, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int | None = None
) -> Structure:
    """What the first pass over the data fills."""
    if isinstance(recipe, Mapping):
        return Mixed.of(layout, recipe, lambda name, part: STRUCTURES[name].first(part, dtype, device, rank))
    return STRUCTURES[recipe].first(layout, dtype, device, rank)


def following(recipe: Recipe, fitted: Structure) -> Structure | None:
    """What another pass over the same data fills; None once the fit is complete.

    Groups of a mixed structure that need no other pass are filled again beside those that do: all parts of a fit
    then come from one pass.
    """
    if isinstance(fitted, Mixed):
        parts = [STRUCTURES[kind].following(part) for kind, part in zip(fitted.kinds, fitted.parts, strict=True)]
        if all(part is None for part in parts):
            return None
        return fitted.with_parts([new or old.fresh() for new, old in zip(parts, fitted.parts, strict=True)])
    return STRUCTURES[str(recipe)].following(fitted)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ArgumentError(
            f"structure={name!r}; expected a name or a dictionary from layer patterns to names, of {sorted(STRUCTURES)}"
        )
    if name not in STRUCTURES:
        raise UnknownNameError(f"structure {name!r} is not known; choose one of {sorted(STRUCTURES)}")
