"""Figures: what is drawn is what was computed, on the Axes given, without pyplot."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bayesdl.errors import UnknownNameError, UnsupportedError
from bayesdl.evaluation import drawing, style
from bayesdl.evaluation.classification import reliability_of
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import classes, numbers


@functools.cache
def classification() -> Report:
    def both(n: int, seed: int = 0, scale: float = 1.0) -> dict[str, object]:
        return {"plain": classes(n, sharpness=scale, seed=seed), "cost $x$": classes(n, sharpness=2 * scale, seed=seed)}

    shift = {"blur": [both(150, scale=1.5), both(150, scale=2.0)]}
    return compare(both(150), ood={"far": both(80, 1, 0.2)}, shift=shift, bootstrap=20, progress=False)


@functools.cache
def regression() -> Report:
    methods = {"right": numbers(500, scale=1.0), "narrow": numbers(500, scale=0.3)}
    return compare(methods, bootstrap=20, progress=False)


def test_reliability_draws_the_bins_it_computed() -> None:
    rep = classification()
    predictions = rep.predictions["plain"]["test"]
    generator = torch.Generator().manual_seed(0)
    table = reliability_of(predictions.confidence, predictions.correct, bins=10, generator=generator)
    used = table.count > 0
    axes = rep.plot.reliability("plain", bins=10)
    points = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], table.confidence[used].numpy(), atol=1e-12)
    np.testing.assert_allclose(points[:, 1], table.accuracy[used].numpy(), atol=1e-12)
    bands = [bar for bar in axes.patches if bar.get_alpha() == 0.28]
    np.testing.assert_allclose([bar.get_y() for bar in bands], table.low[used].numpy(), atol=1e-12)
    assert axes.get_xlabel() == "confidence"


def test_reliability_over_quantiles_gives_every_bin_its_room() -> None:
    rep = classification()
    predictions = rep.predictions["plain"]["test"]
    generator = torch.Generator().manual_seed(0)
    table = reliability_of(predictions.confidence, predictions.correct, bins=10, mass=True, generator=generator)
    assert table.count.tolist() == [15.0] * 10  # 150 different confidences
    axes = rep.plot.reliability("plain", bins=10, mass=True)
    points = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], np.arange(0.05, 1, 0.1), atol=1e-12)
    np.testing.assert_allclose(points[:, 1], table.accuracy.numpy(), atol=1e-12)
    right = axes.lines[0]  # where the accuracies would be
    np.testing.assert_allclose(right.get_ydata(), table.confidence.numpy(), atol=1e-12)
    assert len(axes.patches) == 10  # bands, and no bars that would all be of one height
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels[0] == f"{100 * float(table.confidence[0]):.3g}%" and 5 <= len(labels) <= 10


def test_the_default_row_is_the_best_by_nll() -> None:
    rep = classification()
    best = rep.best("nll")
    assert best is not None
    axes = rep.plot.reliability()
    colour = style.colour(rep.rows.index(best))
    assert axes.lines[-1].get_color() == colour


def test_risk_coverage_ends_at_the_error_rate() -> None:
    rep = classification()
    axes = rep.plot.risk_coverage()
    ends = [line.get_ydata()[-1] for line in axes.lines[:2]]
    assert ends == pytest.approx([1 - rep[row]["accuracy"] for row in rep.rows])
    ideal = axes.lines[2].get_ydata()
    assert ideal[-1] == pytest.approx(min(ends)) and ideal[0] == 0.0
    assert len(axes.texts) == 2


def test_histograms_are_shares() -> None:
    axes = classification().plot.ood_histogram("plain")
    for stairs in axes.patches:
        assert stairs.get_data().values.sum() == pytest.approx(1.0)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["test", "far"]


def test_roc_curves_enclose_the_areas_of_the_report() -> None:
    rep = classification()
    axes = rep.plot.roc()
    for line, row in zip(axes.lines[1:], rep.rows, strict=True):
        right, up = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        assert (right[0], up[0], right[-1], up[-1]) == (0.0, 0.0, 1.0, 1.0)
        assert (np.diff(right) >= 0).all() and (np.diff(up) >= 0).all()
        # 230 examples make fewer points than a curve may have, so nothing is thinned.
        assert np.trapezoid(up, right) == pytest.approx(rep[row]["ood/far/auroc"])
        assert f"{100 * rep[row]['ood/far/auroc']:.1f}%" in str(line.get_label())
    with pytest.raises(UnknownNameError, match="no out-of-distribution set"):
        rep.plot.roc("near")
    with pytest.raises(UnsupportedError, match="no out-of-distribution set"):
        regression().plot.roc()


def test_a_legend_keeps_clear_of_what_is_printed_at_the_top() -> None:
    rep = classification()
    axes = rep.plot.ood_histogram("plain")
    figure = axes.figure
    figure.canvas.draw()
    drawing.legend(axes, below=2)
    figure.canvas.draw()
    top = axes.get_legend().get_window_extent().y1
    assert axes.get_window_extent().y1 - top >= 2 * 10 / 72 * figure.dpi


def test_shift_runs_from_the_test_data_to_the_worst() -> None:
    rep = classification()
    axes = rep.plot.shift("nll")
    expected = [rep["plain"]["nll"], rep["plain"]["shift/blur/1/nll"], rep["plain"]["shift/blur/2/nll"]]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["test", "1", "2"]
    with pytest.raises(UnknownNameError, match="no shift 'fog'"):
        rep.plot.shift("nll", name="fog")


def test_decomposition_bars_are_means() -> None:
    rep = classification()
    bars = rep.plot.decomposition().patches
    assert len(bars) == 8  # two data sets, two rows, two parts
    test = rep.predictions["plain"]["test"]
    assert bars[0].get_width() == pytest.approx(float(test.aleatoric.mean()), rel=1e-5)
    assert bars[1].get_width() == pytest.approx(float(test.epistemic.mean()), rel=1e-5)
    assert bars[1].get_x() == pytest.approx(bars[0].get_width())


def test_pit_and_intervals_show_the_narrow_forecaster() -> None:
    rep = regression()
    lines = {line.get_label(): line for line in rep.plot.intervals().lines}
    x, right = lines["right"].get_data()
    narrow = lines["narrow"].get_ydata()
    # P(|Y| <= 0.3 z) for nominal 0.5: z = 0.674, so 0.16; the sd of a share of 500 is at most 0.022
    middle = int(np.argmin(np.abs(np.asarray(x) - 0.5)))
    assert right[middle] == pytest.approx(0.5, abs=0.09) and narrow[middle] == pytest.approx(0.16, abs=0.07)
    heights = rep.plot.pit("narrow", bins=10).patches[1].get_data().values
    assert heights.mean() == pytest.approx(1.0) and heights[0] > 2 and heights[-1] > 2  # a U


def test_figures_take_the_axes_given() -> None:
    mine = Figure().subplots()
    assert classification().plot.risk_coverage(ax=mine) is mine
    assert regression().plot.pit("right", ax=Figure().subplots()).get_xlabel() == "F(y)"


def test_figures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="about regression"):
        regression().plot.reliability()
    with pytest.raises(UnsupportedError, match="about classification"):
        classification().plot.pit()
    with pytest.raises(UnsupportedError, match="no out-of-distribution set"):
        regression().plot.ood_histogram()
    with pytest.raises(UnsupportedError, match="no shift"):
        regression().plot.shift()
    with pytest.raises(UnknownNameError, match="no row 'nobody'"):
        classification().plot.reliability("nobody")


def test_labels_at_line_ends_do_not_overlap_and_stay_inside() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    drawing.label_ends(axes, [(name, 0.97, "black") for name in "abcd"])
    places = sorted(text.xy[1] for text in axes.texts)
    assert min(np.diff(places)) > 0.06 and places[-1] <= 1 + 1e-9
    drawing.label_ends(axes, [("gone", float("nan"), "black")])
    assert len(axes.texts) == 4


def test_series_differ_in_more_than_colour() -> None:
    assert len(set(style.SERIES)) == len(set(map(str, style.DASHES))) == len(set(style.MARKERS)) == 8


def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys, bayesdl.evaluation.plots as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from tests.evaluation.test_plots import regression\n"
        "regression().plot.intervals()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
