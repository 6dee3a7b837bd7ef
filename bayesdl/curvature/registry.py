"""Structures by name, and what each pass over the data fills."""

from __future__ import annotations

import torch

from bayesdl.curvature.diag import Diag
from bayesdl.curvature.ekfac import EKFAC
from bayesdl.curvature.full import Full
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.structure import Structure, Uniform
from bayesdl.errors import UnknownNameError

STRUCTURES: dict[str, type[Uniform]] = {"full": Full, "diag": Diag, "kron": Kron, "ekfac": EKFAC}


def check_recipe(recipe: str) -> None:
    """Raise `UnknownNameError` unless every structure named is known."""
    if recipe not in STRUCTURES:
        raise UnknownNameError(f"structure {recipe!r} is not known; choose one of {sorted(STRUCTURES)}")


def empty(recipe: str, layout: Layout, dtype: torch.dtype, device: torch.device) -> Structure:
    """The finished structure with zero curvature."""
    return STRUCTURES[recipe].empty(layout, dtype, device)


def first(recipe: str, layout: Layout, dtype: torch.dtype, device: torch.device) -> Structure:
    """What the first pass over the data fills."""
    return STRUCTURES[recipe].first(layout, dtype, device)


def following(recipe: str, fitted: Structure) -> Structure | None:
    """What another pass over the same data fills; None once the fit is complete."""
    return STRUCTURES[recipe].following(fitted)
