"""What all figures share: dressed Axes, percentage ticks, labels at line ends, thinned curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bayesdl.evaluation import style
from bayesdl.evaluation.selective import risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

FONT = 8
POINTS = 300  # a curve over 50 000 examples needs no more points than a screen has


def dressed(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The Axes given, or those of a new figure; dressed in the report's style."""
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=size, layout="constrained").subplots()
        ax.figure.patch.set_alpha(0)
        ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(style.MUTED)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)
    ax.tick_params(colors=style.MUTED, labelcolor=style.INK, labelsize=FONT - 0.5, width=0.6, length=2.5)
    ax.grid(color=style.GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=FONT, color=style.INK)
    return ax


def percent(axes: Axes, which: str) -> None:
    """Print the ticks of the named axes as percentages, with as many decimals as they need."""
    from matplotlib.ticker import FuncFormatter

    for letter in which:
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%"))


def legend(axes: Axes, place: Literal["best", "upper left", "lower right"] = "best", *, below: int = 0) -> None:
    """A small legend without a frame; at the right below `below` lines of text at the top, where there are some."""
    look: dict[str, Any] = {"fontsize": FONT - 0.5, "frameon": False, "labelcolor": style.INK, "handlelength": 1.8}
    if below:
        # Lines of text are set 10 points apart.
        top = 1 - 10 * (below + 0.6) / (72 * axes.get_window_extent().height / axes.figure.dpi)
        axes.legend(loc="upper right", bbox_to_anchor=(1, top), borderaxespad=0.2, **look)
    else:
        axes.legend(loc=place, borderaxespad=0.2, **look)


def axis_label(label: str, unit: str) -> str:
    """Label with unit; percentages show theirs at the ticks."""
    return f"{label} ({unit})" if unit and unit != "fraction" else label


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the right ends of lines, pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    finite = sorted((e for e in ends if math.isfinite(e[1])), key=lambda e: e[1])
    gap = 0.075 * (high - low)
    places = [value for _, value, _ in finite]
    for _ in range(100):  # relaxation: neighbours that are too close move apart by equal parts
        moved = False
        for i in range(1, len(places)):
            lack = gap - (places[i] - places[i - 1])
            if lack > 1e-9 * gap:
                places[i - 1] -= lack / 2
                places[i] += lack / 2
                moved = True
        if not moved:
            break
    if places:  # all of them inside the plot again
        shift = max(low - places[0], 0.0) or min(high - places[-1], 0.0)
        places = [place + shift for place in places]
    for (name, _, colour), place in zip(finite, places, strict=True):
        axes.annotate(
            plain(name), (1, (place - low) / (high - low)), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", fontsize=FONT, color=colour, va="center", annotation_clip=False,
        )  # fmt: skip


def bar_title(axes: Axes, name: str, place: float) -> None:
    """The name of a group of horizontal bars, above its first bar at height `place`."""
    axes.annotate(
        plain(name), (0, place - 0.55), xytext=(2, 0), textcoords="offset points", fontsize=FONT, color=style.INK,
        fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def cut_towers(axes: Axes, bars: Mapping[str, np.ndarray], edges: np.ndarray) -> int:
    """Where one bin towers over all others, cut it off and print its height, so that the others can be seen.

    Returns how many lines of text that took.
    """
    limit = 1.5 * max(float(np.sort(shares)[-2]) for shares in bars.values())
    if limit <= 0 or max(float(shares.max()) for shares in bars.values()) < 1.5 * limit:
        return 0
    axes.set_ylim(0, limit)
    towers = [
        (name, int(shares.argmax()), float(shares.max())) for name, shares in bars.items() if shares.max() > limit
    ]
    for line, (name, position, height) in enumerate(towers):
        left = position < len(edges) // 2
        axes.annotate(
            f"{plain(name)} {100 * height:.0f}% ↑", ((edges[position] + edges[position + 1]) / 2, limit),
            xytext=(6 if left else -6, -7 - 10 * line), textcoords="offset points", fontsize=FONT - 0.5,
            color=style.MUTED, ha="left" if left else "right",
        )  # fmt: skip
    return len(towers)


def plain(name: str) -> str:
    """A name as it is: Matplotlib would set what stands between dollar signs as a formula."""
    return name.replace("$", r"\$")


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of values per bin; values beyond the ends count in the outermost bins, so the shares sum to one."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / len(values)


def risk_curve(confidence: Tensor, loss: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk, thinned; without the first two per cent, where a handful of examples makes the risk jump."""
    curve = risk_coverage(confidence, loss)
    coverage, risk = array(curve.coverage), array(curve.risk)
    calm = coverage >= min(0.02, coverage[-1])
    coverage, risk = coverage[calm], risk[calm]
    points = thin(len(coverage))
    return coverage[points], risk[points]


def thin(n: int) -> np.ndarray:
    """At most `POINTS` of n positions, evenly spread, both ends kept."""
    return np.unique(np.linspace(0, n - 1, POINTS).round().astype(int))


def array(values: Tensor | None) -> np.ndarray:
    """float64 copy for Matplotlib; empty for None."""
    return np.empty(0) if values is None else values.detach().double().cpu().numpy()
