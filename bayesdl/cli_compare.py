"""`bayesdl compare`: the options of `bayesdl.compare` on a command line, for networks and for files of predictions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesdl.cli_options import add_common, add_nan, bootstrap, device, names, progress
from bayesdl.errors import ArgumentError, FileFormatError, UnknownNameError

if TYPE_CHECKING:
    from bayesdl.evaluation.report import Report

_TAIL = "-_. 0123456789"  # what tells the files of one row's seeds apart


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """The command and its options."""
    compare: argparse.ArgumentParser = commands.add_parser(
        "compare", help="compare methods on your own network, or predictions that lie in files"
    )
    compare.add_argument(
        "files",
        nargs="*",
        metavar="PREDICTIONS",
        help="files of predictions, one a row; several with commas between them are one row's training seeds",
    )
    compare.add_argument("--names", metavar="A,B", help="names of the rows; the files' names otherwise")
    compare.add_argument("--model", metavar="MODULE:FACTORY", help="callable that returns the network")
    compare.add_argument(
        "--weights", nargs="+", default=[], metavar="FILE", help=".safetensors or torch file; several: an ensemble"
    )
    compare.add_argument(
        "--data",
        metavar="MODULE:LOADERS",
        help="callable that returns the loaders train, test and, to tune temperature and Laplace's prior, val",
    )
    compare.add_argument("--methods", default="map,laplace", metavar="A,B", help="default: %(default)s")
    compare.add_argument("--likelihood", default="categorical", help="default: %(default)s")
    for option, what, form in (
        ("--ood", "set that is out of distribution", "NAME"),
        ("--shift", "shifted copy of the test data", "NAME/SEVERITY"),
    ):
        compare.add_argument(
            option,
            nargs="+",
            action="extend",
            default=[],
            metavar=f"{form}=WHAT",
            help=f"{what}: {form}=MODULE:LOADER, or ROW:{form}=FILE where predictions are compared",
        )
    compare.add_argument(
        "--calibration",
        nargs="+",
        action="extend",
        default=[],
        metavar="WHAT",
        help="held-out data, to which the temperatures of the rows' twins are fitted: MODULE:LOADER, or ROW=FILE",
    )
    compare.add_argument(
        "--twins",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="temperature-scaled twins of all rows; cross-fitted where there is no --calibration, with which they are "
        "there anyway",
    )
    compare.add_argument("--metrics", metavar="A,B", help="columns; the task's usual ones otherwise")
    compare.add_argument(
        "--ood-group",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=A,B",
        help="means over several OOD sets, such as near=cifar100,tin",
    )
    for option, what in (
        ("--group", "subgroup, scored in columns of its own"),
        ("--cluster", "cluster, resampled whole"),
    ):
        compare.add_argument(
            option, type=Path, metavar="FILE", help=f"text, one line a test example: the name of its {what}"
        )
    add_nan(compare)
    compare.add_argument("--score", metavar="NAME", help="OOD score of the main columns; entropy or variance otherwise")
    compare.add_argument("--level", type=float, default=0.95, help="of the intervals, default: %(default)s")
    compare.add_argument("--reference", metavar="ROW", help="print every row's difference to this one")
    compare.add_argument(
        "--on-error",
        choices=("raise", "row"),
        default="raise",
        help="row: a method that fails to be fitted, read or run is a row that says why; default: %(default)s",
    )
    compare.add_argument("--cost", action=argparse.BooleanOptionalAction, default=True, help="measure time and memory")
    add_common(compare, out="bayesdl-report", resamples=1000)
    return compare


def compare_methods(arguments: argparse.Namespace) -> Report:
    """Fit the methods to the network that was named, and compare them."""
    import torch

    from bayesdl import cli_model
    from bayesdl.evaluation.compare import compare
    from bayesdl.evaluation.failures import FAILURES
    from bayesdl.wrap import wrap

    if not arguments.weights or not arguments.data:
        raise ArgumentError("--model needs --weights FILE and --data MODULE:LOADERS")
    settings, where = _settings(arguments), device(arguments.device)
    chosen = names(arguments.methods, "--methods")
    networks = cli_model.load_networks(arguments.model, arguments.weights, where)
    data = cli_model.load_data(arguments.data)
    ood, shift = cli_model.load_ood(arguments.ood), _by_severity(cli_model.load_shift(arguments.shift))
    if len(arguments.calibration) > 1:
        raise ArgumentError(f"--calibration {' '.join(arguments.calibration)}: expected one MODULE:LOADER")
    held = cli_model.load_loader(arguments.calibration[0], "--calibration") if arguments.calibration else None
    rows: dict[str, Any] = {}
    for name in chosen:
        network, seen = cli_model.network_for(name, networks), cli_model.data_for(name, data)
        try:
            rows[name] = wrap(
                network,
                name,
                seen,
                likelihood=arguments.likelihood,
                validation=data.val,
                generator=torch.Generator().manual_seed(arguments.seed),
                progress=settings["progress"],
            )
        except FAILURES as error:
            if arguments.on_error == "raise" or isinstance(error, UnknownNameError):
                raise
            rows[name] = cli_model.NotFitted(name, error)
    return compare(rows, data.test, ood=ood or None, shift=shift or None, calibration=held, **settings)


def compare_files(arguments: argparse.Namespace) -> Report:
    """Compare predictions in files, or lists of them, one a training seed."""
    from bayesdl import cli_model
    from bayesdl.evaluation.compare import compare

    lists = [_seeds(entry) for entry in arguments.files]
    rows = names(arguments.names, "--names") if arguments.names else [_row_name(files) for files in lists]
    if len(set(rows)) != len(lists) or len(rows) != len(lists):
        raise ArgumentError(
            f"{len(lists)} files and the row names {', '.join(rows)}: expected one different name for each; use --names"
        )
    sets: dict[str, dict[str, dict[str, Any]]] = {"ood": {}, "shift": {}}
    for option, found in sets.items():
        entries: Sequence[str] = getattr(arguments, option)
        for key, files in cli_model.named_entries(entries, f"--{option}", "FILE").items():
            row, _, name = key.partition(":")
            form = "ROW:NAME=FILE" if option == "ood" else "ROW:NAME/SEVERITY=FILE"
            if row not in rows or not name:
                raise ArgumentError(f"--{option} {key}={files}: expected {form} with one of the rows {', '.join(rows)}")
            found.setdefault(name, {})[row] = _member(files)
    held = cli_model.named_entries(arguments.calibration, "--calibration", "FILE")
    if unknown := [row for row in held if row not in rows]:
        raise ArgumentError(f"--calibration {unknown[0]}=: expected one of the rows {', '.join(rows)}")
    return compare(
        {row: files[0] if len(files) == 1 else files for row, files in zip(rows, lists, strict=True)},
        None,
        ood=sets["ood"] or None,
        shift=_by_severity(sets["shift"]) or None,
        calibration={row: _member(files) for row, files in held.items()} or None,
        **_settings(arguments),
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both ways hand to `bayesdl.compare`."""
    import torch

    from bayesdl.cli_model import named_entries

    grouped = named_entries(arguments.ood_group, "--ood-group", "SET,SET")
    return {
        "ood_groups": {name: names(sets, f"--ood-group {name}=") for name, sets in grouped.items()},
        "metrics": names(arguments.metrics, "--metrics") if arguments.metrics else None,
        "bootstrap": bootstrap(arguments.bootstrap),
        "level": arguments.level,
        "generator": torch.Generator().manual_seed(arguments.seed),
        "cost": arguments.cost,
        "score": arguments.score,
        "twins": arguments.twins,
        "progress": progress(arguments),
        "on_error": arguments.on_error,
        "nan": arguments.nan,
        "group": None if arguments.group is None else _lines(arguments.group),
        "cluster": None if arguments.cluster is None else _numbered(_lines(arguments.cluster)),
    }


def _by_severity(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"blur/1": ...} as {"blur": {"1": ...}}."""
    shifts: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        name, separator, severity = key.rpartition("/")
        if not (name and separator and severity):
            raise ArgumentError(f"--shift {key}: expected NAME/SEVERITY, such as blur/1")
        shifts.setdefault(name, {})[severity] = value
    return shifts


def _lines(path: Path) -> list[str]:
    """The lines of a text file."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected text in UTF-8, one name a line") from error


def _numbered(found: Sequence[str]) -> list[int]:
    """The same number for the same name."""
    number = {name: place for place, name in enumerate(dict.fromkeys(found))}
    return [number[name] for name in found]


def _seeds(entry: str) -> list[str]:
    """The files of one row; a comma may belong to the name of a file that is there."""
    files = [entry] if Path(entry).exists() else entry.split(",")
    if not all(files):
        raise ArgumentError(f"{entry}: expected names of files with commas between them")
    return files


def _member(entry: str) -> str | list[str]:
    files = _seeds(entry)
    return files[0] if len(files) == 1 else files


def _row_name(files: Sequence[str]) -> str:
    stem = Path(files[0]).stem
    return stem if len(files) == 1 else stem.rstrip(_TAIL) or stem
