"""Draws the picture of the README from the demo's own comparison: `python docs/readme_figure.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bayesdl.demo.run import Settings, compare_digits


def main() -> None:
    """Run the demo's comparison and lay three of its plots side by side."""
    report = compare_digits(Settings(progress=False))
    figure = Figure(figsize=(14.0, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    report.plot.shift("nll", name="rotation", ax=left)
    left.set_title("Rotated digits: loss by severity", fontsize=11)
    report.plot.ood_histogram("laplace, last layer", ax=middle)
    middle.set_title("Laplace: entropy, familiar and unfamiliar", fontsize=11)
    report.plot.risk_coverage(ax=right)
    right.set_title("Answer only when sure: error by coverage", fontsize=11)
    figure.savefig(Path(__file__).parent / "images" / "demo.png", dpi=110)


if __name__ == "__main__":
    main()
