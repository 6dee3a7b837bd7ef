"""Figures of chains. Each draws on the Axes given, or on a new figure of its own, and returns the Axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import drawing, style
from bayesdl.samplers.diagnostics.convergence import Convergence
from bayesdl.samplers.diagnostics.weights import step_trace
from bayesdl.samplers.records import SampleRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (4.4, 3.0)


def trace(draws: Tensor, *, label: str = "value", ax: Axes | None = None) -> Axes:
    """One quantity along each chain; draws `(M, n)`."""
    if draws.dim() != 2:
        raise ArgumentError(f"draws of shape {tuple(draws.shape)}; expected (chains, draws) of one quantity")
    axes = drawing.dressed(ax, _SIZE)
    for number, chain in enumerate(draws):
        axes.plot(drawing.array(chain), color=style.colour(number), linewidth=1.0, label=f"chain {number}")
    axes.set_xlabel("sample")
    axes.set_ylabel(label)
    if len(draws) > 1:
        drawing.legend(axes)
    return axes


def rhat_histogram(result: Convergence, *, ax: Axes | None = None) -> Axes:
    """How many quantities have which R-hat; dashed lines at 1.05 and 1.1."""
    axes = drawing.dressed(ax, _SIZE)
    axes.hist(drawing.array(result.rhat), bins=30, color=style.colour(0))
    for threshold in (1.05, 1.1):
        axes.axvline(threshold, color=style.MUTED, linewidth=0.8, linestyle="--")
    axes.set_xlabel("split R-hat")
    axes.set_ylabel("quantities")
    return axes


def steps(records: Sequence[SampleRecord], *, quantity: str = "h", ax: Axes | None = None) -> Axes:
    """Step size h, or the adaptive factor psi, of each sample, chain by chain, on a logarithmic axis.

    Args:
        records: of the samples.
        quantity: "h" or "psi"; the monitor zeta of SA-SGLD is `bdl.samplers.sa_sgld.monitor_of(psi, ...)`.
        ax: axes to draw on; None makes some.
    """
    axes = drawing.dressed(ax, _SIZE)
    labels = {"h": "step size h", "psi": "factor of the step, psi"}
    if quantity not in labels:
        raise ArgumentError(f"quantity={quantity!r}; expected one of {tuple(labels)}")
    chains = sorted({record.chain for record in records})
    if not chains:
        raise ArgumentError("no records: there is nothing to draw")
    for number, chain in enumerate(chains):
        own = step_trace([record for record in records if record.chain == chain])
        axes.semilogy(
            drawing.array(own.step),
            drawing.array(own.h if quantity == "h" else own.psi),
            color=style.colour(number),
            linewidth=1.0,
            marker=".",
            label=f"chain {chain}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel(labels[quantity])
    if len(chains) > 1:
        drawing.legend(axes)
    return axes


def nll_by_samples(log_likelihood: Tensor, *, ax: Axes | None = None) -> Axes:
    """Negative log-likelihood of the average of the first 1, 2, ... samples; log p(y | x, theta_s) `(S, P)`."""
    running = torch.logcumsumexp(log_likelihood.double(), 0)
    count = torch.arange(1, len(log_likelihood) + 1, dtype=torch.float64, device=running.device)
    axes = drawing.dressed(ax, _SIZE)
    axes.plot(drawing.array(count), drawing.array(count.log() - running.mean(1)), color=style.colour(0), linewidth=1.4)
    axes.set_xlabel("samples")
    axes.set_ylabel("NLL (nats)")
    return axes
