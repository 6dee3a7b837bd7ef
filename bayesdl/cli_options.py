"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bayesdl.errors import ArgumentError


def add_common(parser: argparse.ArgumentParser, *, out: str, resamples: int) -> None:
    """Options of every command that makes a report, with their defaults for `--out` and `--bootstrap`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="OUT",
        help="folder for page, numbers and predictions, or one .html, .md, .tex, .csv or .json; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=resamples,
        metavar="R",
        help="resamples behind each interval, default: %(default)s",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def add_nan(parser: argparse.ArgumentParser) -> None:
    """What to do with examples that are not finite."""
    parser.add_argument(
        "--nan",
        choices=("raise", "drop"),
        default="raise",
        help="drop: leave out, for every method, the examples on which one is not finite; default: %(default)s",
    )


def names(text: str, option: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) != len(found):
        raise ArgumentError(f"{option} {text}: expected different names with commas between them")
    return found


def bootstrap(count: int) -> int:
    """A number of resamples."""
    if count < 0:
        raise ArgumentError(f"--bootstrap {count}: expected 0 or more")
    return count


def progress(arguments: argparse.Namespace) -> bool:
    """Bars are for eyes: a log file would keep every one of their redrawings."""
    return not arguments.quiet and sys.stderr.isatty()


def device(name: str) -> str:
    """A device that torch can use here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ArgumentError(f"--device {name}: torch cannot use it here: {str(error).splitlines()[0]}") from error
    return name
