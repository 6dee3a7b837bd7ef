"""The figures of a report. Each draws on the Axes given, or on a new figure of its own, and returns the Axes.

Only Matplotlib's object-oriented interface is used: no pyplot state, no window, no backend to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesdl.errors import UnknownNameError, UnsupportedError
from bayesdl.evaluation import drawing, style
from bayesdl.evaluation.classification import reliability_of
from bayesdl.evaluation.ood import ood_score
from bayesdl.evaluation.ranking import separated
from bayesdl.evaluation.regression import pit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bayesdl.evaluation.predictions import Predictions
    from bayesdl.evaluation.report import Report

_SMALL = (2.6, 2.55)
_MIDDLE = (3.6, 2.7)
_WIDE = (4.4, 3.0)
_NORMAL_975 = 1.959963984540054


class Plots:
    """Figures of one report, reached as `rep.plot`."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def reliability(
        self, row: str | None = None, *, bins: int = 15, mass: bool = False, ax: Axes | None = None
    ) -> Axes:
        """Accuracy against confidence of one method (default: the best by NLL), per equal-width bin of confidence.

        Grey bars: where 95 % of the accuracies would fall if the forecasts were perfectly calibrated. Bottom: how many
        examples each bin holds, to its own scale. With `mass` the bins hold equally many examples and stand side by
        side, so that a crowd near 100 % is seen: the axis is the share of less confident examples, its labels are mean
        confidences, and the dashed line is where the accuracies would be.

        Raises:
            UnsupportedError: not a classification report, or read from JSON.
        """
        name, predictions = self._one(row, ("classification",), "reliability")
        generator = torch.Generator(predictions.confidence.device).manual_seed(0)  # the same report, the same picture
        table = reliability_of(predictions.confidence, predictions.correct, bins=bins, mass=mass, generator=generator)
        axes = drawing.dressed(ax, _SMALL)
        count, low, high = drawing.array(table.count), drawing.array(table.low), drawing.array(table.high)
        used = count > 0
        centres = (np.arange(bins) + 0.5) / bins
        if not mass:
            axes.bar(centres, 0.22 * count / count.max(), width=0.9 / bins, color=style.GRID, zorder=1)
        low, high = low[used], high[used]
        axes.bar(
            centres[used],
            high - low,
            bottom=low,
            width=0.9 / bins,
            color=style.MUTED,
            alpha=0.28,
            linewidth=0,
            zorder=2,
        )
        look = self._look(name)
        # A bin with a handful of examples says little: it gets a small mark, and no line leads to it.
        confidence, accuracy, share = (
            drawing.array(table.confidence),
            drawing.array(table.accuracy),
            count / count.sum(),
        )
        solid = share >= 0.005
        where = centres if mass else confidence
        right = (centres[used], confidence[used]) if mass else ([0, 1], [0, 1])
        axes.plot(*right, color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=3)
        axes.plot(where[solid], accuracy[solid], color=look[0], linewidth=1.3, zorder=4)
        sizes = np.clip(400 * share[used], 3.0, 16.0)
        axes.scatter(where[used], accuracy[used], s=sizes, color=look[0], marker=look[1], zorder=5)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        drawing.percent(axes, "y" if mass else "xy")
        if mass:
            shown = used.nonzero()[0][:: max(1, int(used.sum()) // 5)]
            axes.set_xticks(centres[shown], [f"{100 * confidence[k]:.3g}%" for k in shown])
        return axes

    def risk_coverage(self, *, ax: Axes | None = None) -> Axes:
        """Error rate among the most confident examples against the share of examples kept; lower is better.

        The dotted line is what the most accurate method would reach with a perfect order of the same errors.

        Raises:
            UnsupportedError: not a classification report, or read from JSON.
        """
        axes = drawing.dressed(ax, _WIDE)
        ends: list[tuple[str, float, str]] = []
        quiet: list[float] = []
        ideal: tuple[float, np.ndarray, np.ndarray] | None = None
        for name in self._report.ran:
            _, predictions = self._one(name, ("classification",), "risk-coverage")
            wrong = (~predictions.correct).double()
            kept, risk = drawing.risk_curve(predictions.confidence, wrong)
            look = self._look(name)
            axes.plot(kept, risk, color=look[0], linestyle=look[2], linewidth=1.5)
            ends.append((name, float(risk[-1]), look[0]))
            quiet.append(float(kept[np.argmax(risk > 0.02 * risk[-1])]) if risk[-1] > 0 else 0.0)
            # A perfect order of the same errors depends on the error rate alone: draw that of the most accurate method.
            if ideal is None or risk[-1] < ideal[0]:
                rising = np.sort(drawing.array(wrong)).cumsum() / np.arange(1, len(wrong) + 1)
                ideal = float(risk[-1]), np.arange(1, len(wrong) + 1) / len(wrong), rising
        if ideal is not None:
            points = drawing.thin(len(ideal[1]))
            axes.plot(ideal[1][points], ideal[2][points], color=style.MUTED, linewidth=1, linestyle=(0, (1, 2)))
        # Where no method makes a mistake worth seeing there is nothing to show.
        start = math.floor(10 * min(quiet)) / 10
        axes.set(xlabel="share of examples kept, most confident first", ylabel="error rate among them")
        axes.set_xlim(start if start > 0.2 else 0, 1)
        axes.set_ylim(bottom=0)
        drawing.percent(axes, "xy")
        drawing.label_ends(axes, ends)
        return axes

    def ood_histogram(
        self, row: str | None = None, *, score: str | None = None, legend: bool = True, ax: Axes | None = None
    ) -> Axes:
        """Histogram of an uncertainty score on the test data (filled) and on every out-of-distribution set (lines).

        A bin that towers over all others is cut off, with its height printed. The lines' colours stand for data sets.

        Raises:
            UnsupportedError: the report has no out-of-distribution set, or was read from JSON.
        """
        name, predictions = self._one(row, (), "OOD histogram")
        sets = {key[4:]: value for key, value in self._report.predictions[name].items() if key.startswith("ood/")}
        if not sets:
            raise UnsupportedError("the report has no out-of-distribution set; give compare(..., ood={name: loader})")
        wanted = score or str(self._report.details["score"])
        inside = drawing.array(ood_score(predictions, wanted))
        outside = {key: drawing.array(ood_score(value, wanted)) for key, value in sets.items()}
        pooled = np.concatenate([inside, *outside.values()])
        low, high = np.quantile(pooled, [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1.0, 25)
        axes = drawing.dressed(ax, _SMALL)
        bars = {"test": drawing.shares(inside, edges)}
        bars |= {key: drawing.shares(values, edges) for key, values in outside.items()}
        axes.stairs(bars["test"], edges, fill=True, color=style.MUTED, alpha=0.35, label="test")
        for index, key in enumerate(outside):
            look: dict[str, Any] = {"color": style.set_colour(index), "linestyle": style.DASHES[index % 8]}
            axes.stairs(bars[key], edges, label=drawing.plain(key), linewidth=1.4, baseline=None, **look)
        axes.set(xlabel=f"{wanted.replace('_', ' ')} (higher: more unusual)", ylabel="share of examples")
        axes.set(xlim=edges[[0, -1]], ylim=(0, None))
        drawing.percent(axes, "y")
        lines = drawing.cut_towers(axes, bars, edges)
        if legend:
            drawing.legend(axes, below=lines)
        return axes

    def roc(self, dataset: str | None = None, *, score: str | None = None, ax: Axes | None = None) -> Axes:
        """ROC curves of every method for an out-of-distribution set (default: the first); the legend holds the areas.

        Up: share of the unfamiliar examples flagged. Right: share of the test examples flagged with them.

        Raises:
            UnsupportedError: the report has no out-of-distribution set, or was read from JSON.
            UnknownNameError: no such set.
        """
        self._one(self._report.ran[0], (), "ROC curve")
        names = [key[4:] for key in self._report.details["sizes"] if key.startswith("ood/")]
        if not names:
            raise UnsupportedError("the report has no out-of-distribution set; give compare(..., ood={name: loader})")
        chosen = names[0] if dataset is None else dataset.removeprefix("ood/")
        if chosen not in names:
            raise UnknownNameError(f"no out-of-distribution set {dataset!r}; the report has {', '.join(names)}")
        wanted = score or str(self._report.details["score"])
        axes = drawing.dressed(ax, _WIDE)
        axes.plot([0, 1], [0, 1], color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for name in self._report.ran:
            sets = self._report.predictions[name]
            if f"ood/{chosen}" not in sets:
                continue
            table, _ = separated(ood_score(sets["test"], wanted), ood_score(sets[f"ood/{chosen}"], wanted))
            right, up = (
                np.concatenate([[0.0], drawing.array(c[0] / c[0, -1])]) for c in (table.negative, table.positive)
            )
            points, look = drawing.thin(len(right)), self._look(name)
            label = f"{drawing.plain(name)} {100 * float(table.auroc()):.1f}%"
            axes.plot(right[points], up[points], color=look[0], linestyle=look[2], linewidth=1.5, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="test examples flagged", ylabel=f"{drawing.plain(chosen)} flagged")
        drawing.percent(axes, "xy")
        drawing.legend(axes, "lower right")
        return axes

    def shift(self, metric: str = "nll", *, name: str | None = None, ax: Axes | None = None) -> Axes:
        """One metric against growing severity of a shift (default: the first), every method with its interval.

        Raises:
            UnsupportedError: the report has no shift. UnknownNameError: no such shift or metric.
        """
        shifts: dict[str, list[str]] = dict(self._report.details.get("shift", {}))
        if not shifts:
            raise UnsupportedError("the report has no shift; give compare(..., shift={name: {severity: loader}})")
        chosen = next(iter(shifts)) if name is None else name
        if chosen not in shifts:
            raise UnknownNameError(f"no shift {chosen!r}; the report has {', '.join(shifts)}")
        keys = [metric, *(f"shift/{chosen}/{severity}/{metric}" for severity in shifts[chosen])]
        column = self._report.column(metric)
        axes = drawing.dressed(ax, _MIDDLE)
        ends: list[tuple[str, float, str]] = []
        steps = np.arange(len(keys))
        for index, row in enumerate(self._report.ran):
            cells = [self._report.cell(row, key) for key in keys]
            values = np.array([math.nan if c.value is None else c.value for c in cells])
            look = self._look(row)
            moved = steps + 0.05 * (index - (len(self._report.ran) - 1) / 2)  # so that the bars stand side by side
            axes.plot(moved, values, color=look[0], linestyle=look[2], marker=look[1], markersize=3.6, linewidth=1.3)
            spans = np.array([self._report.interval(row, key) for key in keys])  # NaN where there is none: no bar
            axes.vlines(moved, spans[:, 0], spans[:, 1], color=look[0], linewidth=1, alpha=0.7)
            ends.append((row, float(values[-1]), look[0]))
        axes.set_xticks(steps, ["test", *map(drawing.plain, shifts[chosen])])
        axes.set(
            xlabel=f"{drawing.plain(chosen)}, growing severity", ylabel=drawing.axis_label(column.label, column.unit)
        )
        if column.unit == "fraction":
            drawing.percent(axes, "y")
        drawing.label_ends(axes, ends)
        return axes

    def intervals(self, *, ax: Axes | None = None) -> Axes:
        """Observed coverage of central prediction intervals against their nominal level; the diagonal is perfect.

        Grey band: where 95 % of the observations would fall, level by level, if the forecasts were right.

        Raises:
            UnsupportedError: not a regression report, or read from JSON.
        """
        levels = np.linspace(0.02, 0.98, 49)
        axes = drawing.dressed(ax, _WIDE)
        for position, name in enumerate(self._report.ran):
            central = np.abs(2 * self._pit(name) - 1)
            if position == 0:
                spread = _NORMAL_975 * np.sqrt(levels * (1 - levels) / len(central))
                axes.fill_between(levels, levels - spread, levels + spread, color=style.MUTED, alpha=0.25, linewidth=0)
                axes.plot([0, 1], [0, 1], color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            look = self._look(name)
            observed = (central[None, :] <= levels[:, None]).mean(1)
            axes.plot(levels, observed, color=look[0], linestyle=look[2], linewidth=1.5, label=drawing.plain(name))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level of the interval", ylabel="targets inside")
        drawing.percent(axes, "xy")
        drawing.legend(axes, "upper left")
        return axes

    def pit(self, row: str | None = None, *, bins: int = 20, ax: Axes | None = None) -> Axes:
        """Histogram of F(y), the probability integral transform: flat if the forecasts are right.

        A U means intervals too narrow, a hump too wide, a slope bias. Grey band: 95 % of bars under right forecasts.

        Raises:
            UnsupportedError: not a regression report, or read from JSON.
        """
        name, _ = self._one(row, ("regression",), "PIT histogram")
        values = self._pit(name)
        edges = np.linspace(0, 1, bins + 1)
        density = drawing.shares(values, edges) * bins
        axes = drawing.dressed(ax, _SMALL)
        spread = _NORMAL_975 * math.sqrt((bins - 1) / len(values))
        colour = self._look(name)[0]
        axes.axhspan(max(1 - spread, 0), 1 + spread, color=style.MUTED, alpha=0.28, linewidth=0)
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(density, edges, color=colour, linewidth=1.3)
        axes.axhline(1, color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), xlabel="F(y)", ylabel="density")
        return axes

    def decomposition(self, dataset: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Mean aleatoric and epistemic uncertainty of every method, on the test data and on every OOD set.

        Args:
            dataset: `test` or `ood/<set>`; None for all.

        Raises:
            UnsupportedError: the report was read from JSON. UnknownNameError: no such data set.
        """
        self._one(self._report.ran[0], (), "decomposition")
        means = {
            (key, row): (_mean(found[key].aleatoric), _mean(found[key].epistemic))
            for key in self._report.details["sizes"]
            for row, found in self._report.predictions.items()
            if key in found and not key.startswith("shift/") and found[key].epistemic is not None
        }
        if not means:
            raise UnsupportedError("forecasts that are draws of y do not tell aleatoric from epistemic uncertainty")
        bars = [(key, row) for key, row in means if dataset in (None, key)]
        if not bars:
            raise UnknownNameError(
                f"no data set {dataset!r}; the report has {', '.join({key: None for key, _ in means})}"
            )
        axes = drawing.dressed(ax, (4.4, 0.75 + 0.25 * len(bars)))
        places: list[float] = []
        for index, (key, row) in enumerate(bars):
            opens = index == 0 or key != bars[index - 1][0]
            places.append((places[-1] if places else -1.0) + (1.8 if opens and dataset is None else 1.0))
            if opens and dataset is None:
                drawing.bar_title(axes, key.removeprefix("ood/"), places[-1])
            aleatoric, epistemic = means[key, row]
            names = ("aleatoric", "epistemic") if index == 0 else (None, None)
            axes.barh(places[-1], aleatoric, color=style.SERIES[5], height=0.72, label=names[0])
            axes.barh(places[-1], epistemic, left=aleatoric, color=style.SERIES[1], height=0.72, label=names[1])
        axes.set_yticks(places, [drawing.plain(row) for _, row in bars])
        axes.set_ylim(places[-1] + 0.6, places[0] - (1.4 if dataset is None else 0.6))
        # one scale for all sets, so that separate drawings can be compared
        axes.set_xlim(0, 1.03 * max(map(sum, means.values())) or 1.0)
        square = self._report.task in ("regression", "count")
        axes.set_xlabel("mean variance (target units²)" if square else "mean uncertainty (nats)")
        axes.grid(axis="y", visible=False)
        if dataset is None:
            axes.legend(fontsize=drawing.FONT - 1, frameon=False, loc="lower right", ncols=2, bbox_to_anchor=(1, 1))
        return axes

    def _look(self, row: str) -> tuple[str, str, object]:
        """Colour, marker and dash of a method: the same in every figure."""
        index = self._report.rows.index(row)
        return style.colour(index), style.MARKERS[index % 8], style.DASHES[index % 8]

    def _one(self, row: str | None, tasks: Sequence[str], what: str) -> tuple[str, Predictions]:
        """The row asked for (default: the best by NLL) and its test predictions."""
        report = self._report
        if tasks and report.task not in tasks:
            raise UnsupportedError(f"a {what} is defined for {' and '.join(tasks)}; this report is about {report.task}")
        if not report.predictions:
            raise UnsupportedError("this report was read from JSON and holds no raw predictions to draw")
        name = row if row is not None else (report.best("nll") if "nll" in report.columns else None) or report.ran[0]
        if name in report.failures:
            raise UnsupportedError(f"{name!r} has nothing to draw, since it failed: {report.failures[name]}")
        if name not in report.predictions:
            raise UnknownNameError(f"the report has no row {name!r}; its rows are {', '.join(report.rows)}")
        return name, report.predictions[name]["test"]

    def _pit(self, row: str) -> np.ndarray:
        _, predictions = self._one(row, ("regression",), "PIT")
        parts = {
            "mean": predictions.means,
            "variance": predictions.variances,
            "member_weights": predictions.member_weights,
        }
        return drawing.array(pit(predictions.targets, **parts)).ravel()


def _mean(values: torch.Tensor | None) -> float:
    """Mean over examples and outputs; 0 where a method has no such part."""
    return 0.0 if values is None else float(values.double().mean())
