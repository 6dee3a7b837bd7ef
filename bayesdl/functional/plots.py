"""Pictures of what a prior over weights says about functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import drawing, style
from bayesdl.functional.gp import Target
from bayesdl.functional.report import MatchReport
from bayesdl.network import Network
from bayesdl.priors import Prior
from bayesdl.select import Selector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (4.4, 3.0)


def draws(
    source: Prior | Target,
    inputs: Tensor,
    model: nn.Module | None = None,
    *,
    count: int = 8,
    output: int = 0,
    select: Selector = "all",
    generator: torch.Generator | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Some functions of one input: of a network under a prior (matched or not), or of a target.

    Args:
        source: a prior over the weights of `model`, or a target such as `GP(...)`.
        inputs: `(M, 1)`, in the order to be drawn.
        model: the network, for a prior; never written to.
        count: functions.
        output: which output.
        select: which weights have the prior.
        generator: of the draws.
        ax: where to draw; None makes a figure.

    Raises:
        ArgumentError: inputs of more than one dimension, or a prior without a model.
    """
    if inputs.dim() != 2 or inputs.shape[1] != 1:
        raise ArgumentError(f"inputs of shape {tuple(inputs.shape)}; functions of one input, (M, 1), can be drawn")
    chosen = generator or torch.Generator().manual_seed(0)
    if isinstance(source, Prior):
        if model is None:
            raise ArgumentError("a prior over weights has functions for a network alone: pass model=")
        network = Network(model, select=select, example=inputs[:1])
        with torch.no_grad():
            values = torch.stack(
                [network(inputs, source.sample(network.parameters, chosen))[:, output] for _ in range(count)]
            )
    else:
        values = source.sample(inputs, count, chosen)[..., output]
    axes = drawing.dressed(ax, _SIZE)
    axes.plot(drawing.array(inputs[:, 0]), drawing.array(values.T), color=style.colour(0), linewidth=1.2, alpha=0.7)
    axes.set_xlabel("x")
    axes.set_ylabel("f(x)")
    return axes


def correlation(report: MatchReport, *, ax: Axes | None = None) -> Axes:
    """How alike function values are at two points, by the distance of the points: matched, before, and the target's.

    Args:
        report: `prior.report` of a matched prior, or what `evaluate` returns.
        ax: where to draw; None makes a figure.

    Raises:
        ArgumentError: an autoencoder's report: its features have no places.
    """
    if not report.fit.correlation:
        raise ArgumentError("the report has no correlations by distance: features of an autoencoder have no places")
    axes = drawing.dressed(ax, _SIZE)
    distance, own, target = zip(*report.fit.correlation, strict=True)
    axes.plot(distance, target, color=style.INK, linewidth=1.2, linestyle="--", label="target")
    axes.plot(distance, own, color=style.colour(0), linewidth=1.4, label="matched" if report.before else "prior")
    if report.before is not None:
        distance, start, _ = zip(*report.before.correlation, strict=True)
        axes.plot(distance, start, color=style.MUTED, linewidth=1.2, label="before")
    axes.set_xlabel("distance")
    axes.set_ylabel("correlation")
    drawing.legend(axes)
    return axes
