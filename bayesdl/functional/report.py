"""What a prior over weights says about functions, beside the target: the report of `match` and of `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.functional.gp import GP, Target

FUNCTIONS = 2000
STD_OFF = 0.2
NARROWEST, WIDEST = 1e-3, 100.0  # of standard deviations, times the root of the fan-in
BINS = 15  # of distance
SHOWN = 4  # of them in words
LISTED = 16  # entries of a tensor


@final
@dataclass(frozen=True)
class Fit:
    """Moments of the functions of one law on one set of points.

    Attributes:
        std: mean, smallest and largest marginal standard deviation over points and outputs.
        target_std: the same of the target.
        mean: largest absolute mean over points, in target standard deviations.
        covariance_error: |C - K|_F / |K|_F.
        floor: what as many draws of the target itself would show.
        kurtosis: mean excess kurtosis of the marginals, and the target's.
        correlation: of the values at two points, by their distance: (distance, correlation, the target's) in
            `BINS` equal bins of distance, mean over pairs and outputs; bins without a pair are left out. Empty for
            autoencoders, whose features have no places.
    """

    std: tuple[float, float, float]
    target_std: tuple[float, float, float]
    mean: float
    covariance_error: float
    floor: float
    kurtosis: tuple[float, float]
    correlation: tuple[tuple[float, float, float], ...] = ()


@final
@dataclass(frozen=True)
class MatchReport:
    """What matching achieved.

    Attributes:
        fit: of the matched prior, on fresh points.
        before: of the family at its start.
        distance: name of the distance.
        trace: its value at every step.
        parameters: of the family, by parameter name.
        seconds: spent in matching.
        notes: what to know.
        setting: family, target, measurement and numbers of draws, in words.
        resolution: what the distance says of two sets of the target's own draws, as many as in a step: a trace that has
            come down to it can come no further. None for distances with a critic.
    """

    fit: Fit
    before: Fit | None = None
    distance: str = ""
    trace: tuple[float, ...] = ()
    parameters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    setting: Mapping[str, str] = field(default_factory=dict)
    resolution: float | None = None

    def __str__(self) -> str:
        lines = [_line("matched" if self.before else "prior", self.fit)]
        if self.before is not None:
            lines.insert(0, _line("before", self.before))
        lines.append(f"Monte Carlo floor of the covariance error {self.fit.floor:.2f}")
        if self.fit.correlation:
            shown = self.fit.correlation[:: max(1, len(self.fit.correlation) // SHOWN)][:SHOWN]
            lines.append(
                "correlation at distance " + ", ".join(f"{d:.2g}: {a:.2f} (target {b:.2f})" for d, a, b in shown)
            )
        for name, values in self.parameters.items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def compare(h: Tensor, g: Tensor, target: Target, inputs: Tensor, placed: bool = True) -> Fit:
    """Moments of functions `h` `(n, M, C)` beside draws `g` of the target at the same points.

    Args:
        placed: whether the M values are at the inputs.
    """
    h, g = h.double(), g.double()
    covariance = _covariance(h)
    if isinstance(target, GP) and target.fixed:
        wanted = target.moments(inputs)[1].expand_as(covariance)
        floors = (wanted.diagonal(dim1=1, dim2=2).sum(1).square() + wanted.square().sum((1, 2))) / len(h)
    else:
        wanted = _covariance(g)
        halves = _covariance(g[: len(g) // 2]) - _covariance(g[len(g) // 2 :])
        floors = halves.square().sum((1, 2)) / 4.0
    size = wanted.square().sum().sqrt()
    spread, own = h.std(0), wanted.diagonal(dim1=1, dim2=2).sqrt()
    return Fit(
        _range(spread),
        _range(own),
        float((h.mean(0) / own.mT.clamp(min=1e-12)).abs().max()),
        float((covariance - wanted).square().sum().sqrt() / size),
        float(floors.sum().sqrt() / size),
        (_kurtosis(h), _kurtosis(g)),
        by_distance(inputs, covariance, wanted) if placed else (),
    )


def by_distance(
    inputs: Tensor, own: Tensor, wanted: Tensor, bins: int = BINS
) -> tuple[tuple[float, float, float], ...]:
    """Mean correlations of two covariances `(C, M, M)` of values at `inputs` `(M, ...)`, by Euclidean distance."""
    flat = inputs.detach().double().cpu().flatten(1)
    first, second = torch.triu_indices(len(flat), len(flat), 1)
    apart = (flat[first] - flat[second]).norm(dim=1)
    place = (apart / apart.max().clamp(min=torch.finfo(apart.dtype).tiny) * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(place, values.cpu(), minlength=bins) / count

    columns = (mean(apart), *(mean(_correlation(c)[:, first, second].mean(0)) for c in (own, wanted)))
    rows = torch.stack(columns, 1)[count > 0].tolist()
    return tuple((row[0], row[1], row[2]) for row in rows)


def _correlation(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()
    return covariance * scale.unsqueeze(1) * scale.unsqueeze(2)


def notes(fit: Fit, before: Fit | None, parameters: Mapping[str, Mapping[str, float]] | None = None) -> tuple[str, ...]:
    """What is wrong with a match, in words."""
    found = []
    if before is not None and fit.covariance_error >= before.covariance_error:
        found.append("the covariance is no closer to the target's than before matching: try another family or distance")
    if abs(math.log(fit.std[0] / fit.target_std[0])) > math.log(1.0 + STD_OFF):
        found.append(
            f"the marginal standard deviation is {fit.std[0]:.3g} where the target's is {fit.target_std[0]:.3g}: more "
            "steps, or a target that this network can express"
        )
    for name, values in (parameters or {}).items():
        spread = values.get("std", values.get("scale"))
        if spread is not None and not NARROWEST < spread < WIDEST:
            found.append(
                f"the standard deviation of {name} ran to {spread:.2g}: the family cannot express the target; try "
                "another one, or another lengthscale"
            )
        if values.get("shape", math.inf) <= 1.0:
            found.append(f"the variance of {name} has shape {values['shape']:.2g}: the prior variance is infinite")
    return tuple(found)


def _covariance(values: Tensor) -> Tensor:
    by_output = values.permute(2, 0, 1)
    centred = by_output - by_output.mean(1, keepdim=True)
    return centred.mT @ centred / values.shape[0]


def _kurtosis(values: Tensor) -> float:
    scaled = (values - values.mean(0)) / values.std(0).clamp(min=1e-12)
    return float(scaled.pow(4).mean(0).mean() - 3.0)


def _range(values: Tensor) -> tuple[float, float, float]:
    return float(values.mean()), float(values.min()), float(values.max())


def _line(label: str, fit: Fit) -> str:
    low, high = fit.std[1:]
    return (
        f"{label}: std {fit.std[0]:.3g} ({low:.3g} to {high:.3g}; target {fit.target_std[0]:.3g}), covariance error "
        f"{fit.covariance_error:.2f}, excess kurtosis {fit.kurtosis[0]:.2f} (target {fit.kurtosis[1]:.2f})"
    )


def describe(thing: object) -> str:
    """A target or a measurement set in words: its class and settings, large tensors by their shape."""
    if not is_dataclass(thing):
        return type(thing).__name__

    def word(value: object) -> str:
        if isinstance(value, Tensor):
            return str(value.tolist()) if value.numel() <= LISTED else f"shape {tuple(value.shape)}"
        return str(getattr(value, "name", getattr(value, "__name__", repr(value))))

    settings = ", ".join(f"{entry.name}={word(getattr(thing, entry.name))}" for entry in fields(thing))
    return f"{type(thing).__name__}({settings})"


def fresh(generator: torch.Generator) -> torch.Generator:
    """A stream of its own for the report, so that asking for it changes no draw of the match."""
    return torch.Generator().manual_seed(int(generator.initial_seed()) ^ 0x5EED)
