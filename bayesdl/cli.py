"""The `bayesdl` command: demo, compare, evaluate, report.

Results go to the standard output, everything else to the standard error stream. Exit status: 0 fine; 2 wrong input,
told in one line; 1 anything unexpected.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import bayesdl
from bayesdl.cli_compare import add_compare, compare_files, compare_methods
from bayesdl.cli_options import add_common, add_nan, bootstrap, device, names, progress
from bayesdl.errors import ArgumentError, BayesDLError, FileFormatError

if TYPE_CHECKING:
    from bayesdl.evaluation.report import Report

_PIPED_WIDTH = 160  # columns of a table when the output is no terminal, whose width rich would guess as 80
_FORMATS = (".html", ".md", ".tex", ".csv", ".json")
_SCORE_DEPTH = 3  # slashes in ood/<set>/<score>/<metric>; the usual score is ood/<set>/<metric> as well


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = _Parser(prog="bayesdl", description="Bayesian versions of trained PyTorch networks, compared and scored.")
    parser.add_argument("--version", action="version", version=f"bayesdl {bayesdl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,compare,evaluate,report}")
    _add_demo(commands)
    compare = add_compare(commands)
    compare.set_defaults(run=_compare)
    _add_evaluate(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="compare methods on embedded data, offline, in under two minutes")
    demo.add_argument("--regression", action="store_true", help="the diabetes table instead of the digits")
    demo.add_argument("--no-cache", action="store_true", help="train the networks anew and do not keep them")
    add_common(demo, out="bayesdl-report", resamples=1000)
    demo.set_defaults(run=_demo)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="score predictions that lie in a file")
    evaluate.add_argument("file", metavar="PREDICTIONS.npz")
    evaluate.add_argument("--ood", nargs="+", action="extend", default=[], metavar="NAME=FILE")
    evaluate.add_argument("--metrics", metavar="A,B", help="the task's usual ones otherwise")
    add_nan(evaluate)
    evaluate.add_argument("--json", action="store_true", help="JSON alone on the standard output")
    evaluate.add_argument("--debug", action="store_true", help="show where an error comes from")
    evaluate.set_defaults(run=_evaluate)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="print or convert a report that `compare` or `demo` wrote")
    report.add_argument("file", type=Path, metavar="REPORT.json", help="the report, or the folder that holds it")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="write it as .html, .md, .tex, .csv or .json instead of printing it"
    )
    report.add_argument("--debug", action="store_true", help="show where an error comes from")
    report.set_defaults(run=_report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    arguments.line = shlex.join(["bayesdl", *(sys.argv[1:] if argv is None else argv)])
    logging.basicConfig(format="bayesdl: %(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except (BayesDLError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of the output has gone, as in `bayesdl evaluate file | head -1`; nothing more to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if arguments.debug:
            raise
        sys.stderr.write(f"bayesdl {arguments.command}: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    from bayesdl.demo.run import DIABETES_STORY, DIGITS_STORY, Settings, compare_diabetes, compare_digits
    from bayesdl.demo.training import cache_directory

    torch.set_num_threads(1)  # the networks are too small to share, and no sum's order depends on the machine's cores
    settings = Settings(
        seed=arguments.seed,
        device=device(arguments.device),
        cache=None if arguments.no_cache else cache_directory() / "demo",
        bootstrap=bootstrap(arguments.bootstrap),
        progress=progress(arguments),
    )
    _check_out(arguments.out)
    _print(f"{DIABETES_STORY if arguments.regression else DIGITS_STORY}\n")
    report = compare_diabetes(settings) if arguments.regression else compare_digits(settings)
    _show(report, arguments.out)


def _compare(arguments: argparse.Namespace) -> None:
    if bool(arguments.files) == bool(arguments.model):
        raise ArgumentError("give either files of predictions, or --model with --weights and --data")
    _check_out(arguments.out)
    report = compare_files(arguments) if arguments.files else compare_methods(arguments)
    report = replace(report, details={**report.details, "command": arguments.line})
    _show(report, arguments.out, reference=arguments.reference)


def _evaluate(arguments: argparse.Namespace) -> None:
    from bayesdl import cli_model
    from bayesdl.evaluation.compare import evaluate

    metrics = names(arguments.metrics, "--metrics") if arguments.metrics else None
    ood = cli_model.named_entries(arguments.ood, "--ood", "FILE")
    values = evaluate(arguments.file, None, ood=ood or None, metrics=metrics, nan=arguments.nan)
    if arguments.json:
        # Strict JSON knows neither NaN nor infinity.
        plain = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        sys.stdout.write(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    else:
        _print_values(values, cli_model.reasons(arguments.file, values, arguments.nan))


def _report(arguments: argparse.Namespace) -> None:
    from bayesdl.evaluation.report import Report

    path = arguments.file / "report.json" if arguments.file.is_dir() else arguments.file
    try:
        report = Report.from_json(path.read_text(encoding="utf-8"))
    except (FileFormatError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    if arguments.out is None:
        _print(report)
    else:
        _write(report, arguments.out)


def _write(report: Report, path: Path) -> None:
    """One file in the format that its name asks for."""
    formats: dict[str, Callable[[], str | Path]] = {
        ".html": lambda: report.to_html(path),
        ".md": report.to_markdown,
        ".tex": report.to_latex,
        ".csv": report.to_csv,
        ".json": report.to_json,
    }
    if path.suffix not in formats:
        raise ArgumentError(f"--out {path}: expected a name that ends in {', '.join(_FORMATS)}")
    made = formats[path.suffix]()
    if isinstance(made, str):
        path.write_text(made, encoding="utf-8")
    sys.stdout.write(f"The report: {path}\n")


def _print_values(values: Mapping[str, float], undefined: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = {key: value for key, value in values.items() if key.count("/") < _SCORE_DEPTH}
    table = Table(caption="all other OOD scores: --json" if len(shown) < len(values) else None)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    for key, value in shown.items():
        table.add_row(Text(key), f"n/a ({undefined[key]})" if key in undefined else f"{value:.6g}")
    _print(table)


def _show(report: Report, out: Path, *, reference: str | None = None) -> None:
    """Print the tables; write the page, the numbers and the raw predictions."""
    _print(report)
    if reference is not None:
        _print_differences(report, reference)
    if out.suffix in _FORMATS and not out.is_dir():
        _write(report, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    page = report.to_html(out / "index.html")
    (out / "report.json").write_text(report.to_json(), encoding="utf-8")
    (out / "report.csv").write_text(report.to_csv(), encoding="utf-8")
    report.save_predictions(out / "predictions")
    sys.stdout.write(f"The page: {page}\nRaw predictions: {out / 'predictions'}\n")


def _print_differences(report: Report, reference: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Difference to {reference}", title_justify="left")
    for heading in ("column", "row", "difference", "interval", "p (Holm)"):
        table.add_column(heading)
    for column in report.headline():
        if column.key not in report.replicates:
            continue
        for row in report.rows:
            if row != reference:
                found = report.difference(row, reference, column.key)
                interval = f"[{found.low:.4g}, {found.high:.4g}]"
                table.add_row(
                    Text(column.key), Text(row), f"{found.value:+.4g}", Text(interval), f"{found.adjusted:.3g}"
                )
    _print(table)


def _print(renderable: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    Console(file=sys.stdout, width=width).print(renderable)


def _check_out(out: Path) -> None:
    """Fail before the work, not after it."""
    if out.suffix in _FORMATS:
        return
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out}: expected a folder, there is a file of that name")
