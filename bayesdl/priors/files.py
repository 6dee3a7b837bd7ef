"""Priors in files of their own: safetensors plus JSON, written atomically. Never pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import BayesDLError, FileFormatError, UnsupportedError
from bayesdl.priors.base import Prior
from bayesdl.priors.coupling import AffineCoupling, CouplingPrior, LayerFlow
from bayesdl.priors.gaussian import GaussianPrior
from bayesdl.priors.heavy_tails import CauchyPrior, LaplacePrior, StudentTPrior
from bayesdl.priors.horseshoe import HorseshoePrior
from bayesdl.priors.mixtures import HierarchicalPrior
from bayesdl.priors.spline import SplinePrior
from bayesdl.tensorfile import DAMAGE, read_described, write_described

EMPTY = "empty"  # stands where there is no tensor: the format wants one
PRIORS: dict[str, type[Prior]] = {
    kind.name: kind
    for kind in (
        *(GaussianPrior, HierarchicalPrior, SplinePrior, CouplingPrior),
        *(HorseshoePrior, StudentTPrior, LaplacePrior, CauchyPrior),
    )
}
PARTS: dict[str, type[LayerFlow] | type[AffineCoupling]] = {"layer": LayerFlow, "coupling": AffineCoupling}
REPORT = "report"


def save_prior(prior: Prior, path: str | Path) -> None:
    """Hyper-parameters, and the report of a match where there is one; no network is needed to read them.

    Raises:
        UnsupportedError: a prior of the user's own, or the posterior of an earlier fit.
    """
    from bayesdl.functional.record import to_json
    from bayesdl.functional.report import MatchReport

    if PRIORS.get(prior.name) is not type(prior):
        raise UnsupportedError(
            f"{type(prior).__name__} has no file format; there are {sorted(PRIORS)}. The posterior of an earlier fit "
            "is saved with its model: bayes.save(path), then bdl.load(path, net).as_prior()"
        )
    report = getattr(prior, REPORT, None)
    tensors: dict[str, Tensor] = {}
    entries = {f.name: _encoded(getattr(prior, f.name), tensors) for f in fields(prior) if f.name != REPORT}  # type: ignore[arg-type]
    header = {
        "prior": prior.name,
        "fields": entries,
        "report": to_json(report) if isinstance(report, MatchReport) else None,
    }
    write_described(Path(path), header, tensors or {EMPTY: torch.zeros(1)})


def load_prior(path: str | Path) -> Prior:
    """Read what `Prior.save` wrote.

    Raises:
        FileFormatError: not such a file, another format version, or a damaged one.
    """
    from bayesdl.functional.record import from_json

    header, tensors = read_described(Path(path))
    try:
        kind = PRIORS[header["prior"]]
        names = {f.name for f in fields(kind)} - {REPORT}  # type: ignore[arg-type]
        if set(header["fields"]) != names:
            raise KeyError(f"fields {sorted(header['fields'])}")
        used: set[str] = set()
        values = {name: _decoded(entry, tensors, used) for name, entry in header["fields"].items()}
        if header["report"] is not None:
            values[REPORT] = from_json(header["report"])
        if used != set(tensors) - {EMPTY}:
            raise KeyError(f"tensors {sorted(set(tensors) ^ used)}")
        prior = kind(**values)
        _check(prior)
    except (BayesDLError, RecursionError, *DAMAGE) as error:
        raise FileFormatError(f"{path} holds no prior, or it is damaged: {error!r}") from error
    return prior


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"named": {str(name): _encoded(entry, tensors) for name, entry in value.items()}}
    for part, kind in PARTS.items():
        if isinstance(value, kind):
            return {part: {f.name: _encoded(getattr(value, f.name), tensors) for f in fields(kind)}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"list": [_encoded(entry, tensors) for entry in value]}


def _decoded(entry: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if not isinstance(entry, dict):
        if entry is None or isinstance(entry, bool | str):
            return entry
        if isinstance(entry, int | float):
            float(entry)  # raises where it is beyond the floats
            return entry
        raise TypeError(f"{entry!r} is no entry of a prior")
    ((kind, inside),) = entry.items()
    if kind == "tensor":
        used.add(inside)
        return tensors[inside]
    if kind == "named":
        return {name: _decoded(value, tensors, used) for name, value in inside.items()}
    if kind == "list" and isinstance(inside, list):
        return tuple(_decoded(value, tensors, used) for value in inside)
    return PARTS[kind](**{name: _decoded(value, tensors, used) for name, value in inside.items()})


def _check(prior: Prior) -> None:
    """Raise where the constructor takes what no sound file holds."""
    if isinstance(prior, SplinePrior):
        _positive(prior.scales.values())
        if set(prior.scales) != set(prior.splines):
            raise KeyError("scales and splines have other names")
        for raw in prior.splines.values():
            if not raw or len(raw) % 3 or not all(type(v) is float and math.isfinite(v) for v in raw):
                raise ValueError("a spline takes 3 finite numbers a bin")
    if isinstance(prior, CouplingPrior):
        for layer in prior.layers:
            _check_layer(layer)
    for name in ("fan_in", "learn_scale"):
        if not isinstance(getattr(prior, name, True), bool):
            raise TypeError(f"{name} is neither true nor false")


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, LayerFlow) or not all(isinstance(m, AffineCoupling) for m in layer.maps):
        raise TypeError("a coupling prior has another entry than flows")
    _positive(layer.scales)
    if len(layer.names) != len(layer.scales) or not all(isinstance(name, str) for name in layer.names):
        raise ValueError("names and scales of a layer differ")
    for coupling in layer.maps:
        pieces = (coupling.inward, coupling.shift, coupling.stretch, coupling.offset)
        if coupling.moves not in (0, 1) or not all(bool(torch.isfinite(piece).all()) for piece in pieces):
            raise ValueError("a coupling holds other numbers than finite ones")


def _positive(values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{value!r} is no positive finite number")
