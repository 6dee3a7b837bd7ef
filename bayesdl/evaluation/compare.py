"""`compare` and `evaluate`: predictions in, a `Report` or a dict of floats out."""

from __future__ import annotations

import math
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.evaluation.cells import place
from bayesdl.evaluation.collect import COST, TEST, Collected, collect, one
from bayesdl.evaluation.dropping import dropped_of
from bayesdl.evaluation.metrics import FURTHER, HEADLINE, check_names, evaluate_metrics
from bayesdl.evaluation.mixing import fingerprint
from bayesdl.evaluation.ood import DEFAULT_SCORE, SCORES, ood_metrics
from bayesdl.evaluation.pairing import clustered, drop_over_seeds, dropped_notes, subgroups_of
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report
from bayesdl.evaluation.seeds import join_seeds, of_seed, split_seeds
from bayesdl.evaluation.significance import SIGNIFICANCE, enough_resamples
from bayesdl.evaluation.table import OVERALL, Resampler, Table
from bayesdl.evaluation.twins import with_twins

_ROUNDING = 1e-12
_SHIFT_METRICS = {
    "classification": ("nll", "accuracy", "ece"),
    "multilabel": ("nll", "accuracy"),
    "regression": ("nll", "rmse", "picp_90"),
    "count": ("nll", "rmse"),
}


def compare(
    methods: Mapping[str, Any],
    data: Any = None,
    *,
    ood: Mapping[str, Any] | None = None,
    shift: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
    cost: bool = True,
    score: str | None = None,
    scores: Mapping[str, Any] | None = None,
    ood_groups: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    calibration: Any = None,
    twins: bool | None = None,
    group: Any = None,
    cluster: Any = None,
    progress: bool = True,
    on_error: str = "raise",
    nan: str = "raise",
) -> Report:
    """Compare methods on the same examples: proper scores, calibration, OOD detection, shift, cost, with error bars.

    Args:
        methods: name -> `BayesianModel`, `Predictions`, or path to saved predictions; or name -> a list of these, one a
            training seed, equally long for all: cells are then means with standard errors over seeds, tests paired t.
            Predictions by method on other sets are then lists as well; a loader serves all seeds.
        data: loader of the test data, read once per model in the same order; None if all methods are predictions.
        ood: name -> loader of out-of-distribution data (labels are ignored), or name -> {method: Predictions}.
        shift: name -> loaders by growing severity, as {severity: loader} or a list; in place of a loader, predictions
            by method. Columns `shift/<name>/<severity>/<metric>`, their means `shift/<name>/<metric>`, and over several
            shifts `shift/all/...`.
        metrics: keys of `METRICS`; None takes the task's `HEADLINE`.
        bootstrap: resamples of the test points, shared by all methods and columns; 0 for no intervals and no tests.
        level: of the intervals.
        generator: for the resamples; None means one seeded with 0, so that the same input gives the same report.
        cost: measure time and memory of every model.
        score: headline OOD score, a key of `SCORES`; None means entropy, for regression the variance of f.
        scores: name -> fitted `FeatureDensity`, or name -> {method: one}: further columns `ood/<set>/<name>/...`.
        ood_groups: name -> names of OOD sets, as {"near": [...], "far": [...]}: further columns `ood/<name>/<metric>`,
            plain means over those sets.
        reference: a method; the notes then list every other one's paired difference to it in the headline columns.
        calibration: held-out loader, or {method: Predictions}, to which the twins' temperatures are fitted.
        twins: add a row `<name> + T` for each classification method but temperature scaling: its probabilities at a
            fitted temperature. None: where `calibration` is given. True without it: cross-fitted on the test set.
        group: (N,) names or numbers of subgroups of the test examples (hospital, language, year): further columns
            `group/<name>/<metric>` with the size of each; the metrics of shifts, or those in `metrics`. The
            calibration error of a small subgroup is mostly chance, so read it beside its expected value.
        cluster: (N,) ids of what the test examples come from (image, document, subject): whole clusters are resampled,
            as examples of one cluster vary together. None: the `group` of the predictions, where they hold one.
        progress: show a progress bar.
        on_error: "raise" ends the comparison with the error of the first method that fails to predict. "row" keeps its
            row without values, with the reason in `rep.failures` and every table, and compares the others; a method
            that fails on an OOD or shifted set alone, or while its cost is measured, has a note. What is wrong with
            the comparison itself (other test targets, no method left) is raised in any case.
        nan: "raise" refuses inputs, targets and forecasts that are NaN or infinite. "drop" leaves an example on which
            any method (or seed) is not finite out for all of them, so that pairs stay pairs; a note and the columns
            `dropped`, `ood/<set>/dropped`, ... say on how many each method itself failed.

    Returns:
        A `Report`. A value that is undefined for a method is NaN there, with its reason in `rep.cell(row, key).note`.

    Raises:
        ArgumentError, ShapeError, LabelError: nothing to compare, or methods that were not run on the same examples.
        UnknownNameError: a metric or score that does not exist.
    """
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 0:
        raise ArgumentError(f"bootstrap: expected a number of resamples, 0 for none, got {bootstrap!r}")
    if not 0.0 < level < 1.0:
        raise ArgumentError(f"level={level!r} was given; expected a number between 0 and 1")
    if metrics is not None:  # before hours of prediction, not after
        check_names(metrics)
    if on_error not in ("raise", "row"):
        raise ArgumentError(f'on_error={on_error!r} was given; expected "raise" or "row"')
    if score is not None and score not in SCORES:
        raise UnknownNameError(f"score={score!r} is unknown; available: {', '.join(SCORES)}")
    if reference is not None and reference not in methods:
        raise UnknownNameError(f"reference={reference!r} is no method; there are {', '.join(map(str, methods))}")
    groups = _ood_groups(ood_groups or {}, ood or {})
    if len(shift or {}) > 1 and OVERALL in {f"shift/{name}" for name in shift or {}}:
        raise ArgumentError(
            f"shift: {OVERALL.removeprefix('shift/')!r} names the mean over all shifts; rename that one"
        )
    wanted = _Wanted(
        metrics, bootstrap, level, generator, score, groups, calibration is not None, twins, group, cluster, progress
    )
    gather = partial(collect, cost=cost, progress=progress, scores=scores, keep_going=on_error == "row", nan=nan)
    if isinstance(methods, Mapping) and any(isinstance(value, (list, tuple)) for value in methods.values()):
        seeds = split_seeds(methods)
        collected = []
        for index, members in enumerate(seeds):
            given = {
                name: of_seed(source, index, len(seeds), name)
                for name, source in {"ood": ood, "shift": shift, "calibration": calibration}.items()
            }
            collected.append(gather(members, data, given["ood"], given["shift"], calibration=given["calibration"]))
        reports = [_report(found, replace(wanted, bootstrap=0)) for found in drop_over_seeds(collected)]
        return _with_reference(join_seeds(reports, level), reference)
    found = gather(methods, data, ood, shift, calibration=calibration)
    return _with_reference(_report(found, wanted), reference)


@dataclass(frozen=True)
class _Wanted:
    """What `compare` was asked to make of predictions."""

    metrics: Sequence[str] | None
    bootstrap: int
    level: float
    generator: torch.Generator | None
    score: str | None
    ood_groups: Mapping[str, Sequence[str]]
    calibrated: bool
    twins: bool | None
    group: Any
    cluster: Any
    progress: bool


def _report(found: Collected, wanted: _Wanted) -> Report:
    """The report on one collection of predictions."""
    subgroups = {} if wanted.group is None else subgroups_of(found, wanted.group)
    if wanted.cluster is not None:
        found = clustered(found, wanted.cluster)
    if wanted.calibrated if wanted.twins is None else wanted.twins:
        if found.task == "classification":
            found = with_twins(found, found.calibration)
        elif wanted.twins:
            raise ArgumentError(f"twins: a temperature is a matter of classes; the task is {found.task}")
    names = tuple(HEADLINE[found.task] if wanted.metrics is None else wanted.metrics)
    generator = torch.Generator().manual_seed(0) if wanted.generator is None else wanted.generator
    seed = generator.initial_seed()
    chosen = DEFAULT_SCORE[found.task] if wanted.score is None else wanted.score
    table = Table(found, Resampler(wanted.bootstrap, wanted.level, generator), subgroups)
    shifts = [(name, severity) for name, severities in found.shifts.items() for severity in severities]
    sets = [name for name in _sets(found) if name.startswith("ood/")]
    total = 1 + len(shifts) + len(sets) + len(subgroups)
    with tqdm(total=total, desc="evaluate", disable=not wanted.progress, leave=False) as steps:
        table.add_metrics(TEST, names, headline=True)
        if wanted.metrics is None:
            table.add_metrics(TEST, FURTHER.get(found.task, ()), headline=False)
        steps.update()
        for name in sets:
            table.add_ood(name, chosen)
            steps.update()
        for name, together in wanted.ood_groups.items():
            table.add_ood_means(name, together)
        watched = [metric for metric in _SHIFT_METRICS[found.task] if metric in names]
        for name, severity in shifts:
            table.add_metrics(f"shift/{name}/{severity}", watched, headline=False)
            steps.update()
        for name, severities in found.shifts.items():
            table.add_shift_means(name, severities, watched)
        if len(found.shifts) > 1:
            table.add_overall_means(found.shifts, watched)
        for name in subgroups:
            table.add_metrics(name, watched if wanted.metrics is None else names, headline=True)
            steps.update()
    table.add_dropped()
    table.add_costs()
    return table.report(_details(found, table, wanted.bootstrap, wanted.level, seed, chosen, watched))


def evaluate(
    method: Any,
    data: Any = None,
    ood: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    *,
    nan: str = "raise",
) -> dict[str, float]:
    """One method's values as plain floats, with keys made for loggers; undefined values are NaN.

    Args:
        method: `BayesianModel`, `Predictions`, or path to saved predictions.
        data: loader of the test data; None for predictions.
        ood: name -> loader, `Predictions` or path.
        metrics: keys of `METRICS`; None takes the task's `HEADLINE`.
        nan: "drop" leaves out examples that are not finite and says how many: `dropped`, `ood/<set>/dropped`.

    Returns:
        `nll`, ..., `ood/<set>/<score>/<metric>` for every score the predictions hold, and `ood/<set>/<metric>` for the
        task's default score. Whatever is no letter, digit, `_`, `-` or `.` in the name of a set becomes `_`.

    Raises:
        ArgumentError: two sets of one name then.
    """
    named: dict[str, Any] = {}
    for name, source in (ood or {}).items():
        if (key := re.sub(r"[^A-Za-z0-9_.\-/]", "_", str(name))) in named:
            raise ArgumentError(f"two sets would be called {key!r} in a logger; rename {name!r}")
        named[key] = source
    sets = one(method, data, named, nan)
    test = sets.pop(TEST)
    values = evaluate_metrics(test, metrics)
    if nan == "drop":
        values["dropped"] = float(len(dropped_of(test)))
        values |= {f"{name}/dropped": float(len(dropped_of(found))) for name, found in sets.items()}
    for name, outside in sets.items():
        for score in scores_for(test):
            found = {metric: float(value) for metric, value in ood_metrics(test, outside, score).items()}
            values |= {f"{name}/{score}/{metric}": value for metric, value in found.items()}
            if score == DEFAULT_SCORE[test.task]:
                values |= {f"{name}/{metric}": value for metric, value in found.items()}
    return values


def scores_for(predictions: Predictions) -> list[str]:
    """The OOD scores that these predictions hold."""
    return [
        name
        for name, score in SCORES.items()
        if predictions.task in score.tasks and score.read(predictions) is not None
    ]


def _ood_groups(given: Mapping[str, Sequence[str]], ood: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Groups of OOD sets, checked before hours of prediction."""
    sets = [str(name) for name in ood]
    for name, members in given.items():
        if isinstance(members, str) or not members or not {str(member) for member in members} <= set(sets):
            raise ArgumentError(
                f"ood_groups[{name!r}]: expected a list of OOD sets, of {', '.join(sets) or 'none'}, got {members!r}"
            )
        if not str(name) or "/" in str(name) or str(name) in sets:
            raise ArgumentError(f"ood_groups: {name!r} is the name of a set, is empty or holds a slash; rename it")
    return {str(name): tuple(f"ood/{member}" for member in members) for name, members in given.items()}


def _with_reference(report: Report, reference: str | None) -> Report:
    """The report with a note on every row's difference to `reference`."""
    if reference is None:
        return report
    notes = list(report.details.get("notes", ()))
    if reference in report.failures:
        notes.append(f"There are no differences to {reference}, since it failed.")
        return replace(report, details={**report.details, "reference": reference, "notes": notes})
    for row in report.ran:
        parts = []
        for column in report.headline():
            if row == reference or column.key not in report.replicates or column.group == "cost":
                continue
            found = report.difference(row, reference, column.key)
            value, low, high = (_cleaned(number) for number in (found.value, found.low, found.high))
            parts.append(f"{column.label} {value:+.3g} [{low:.3g}, {high:.3g}], p {found.adjusted:.2g}")
        if parts:
            notes.append(f"{row} minus {reference} (paired; p after Holm): {'; '.join(parts)}.")
    return replace(report, details={**report.details, "reference": reference, "notes": notes})


def _cleaned(number: float) -> float:
    """0 for what sums in float64 leave of a difference between equals."""
    return 0.0 if abs(number) < _ROUNDING else number


def _sets(found: Collected) -> list[str]:
    return list(dict.fromkeys(name for sets in found.predictions.values() for name in sets))


def _details(
    found: Collected, table: Table, bootstrap: int, level: float, seed: int, score: str, watched: Sequence[str]
) -> dict[str, Any]:
    """What the footer and the notes of a report say."""
    test = {row: found.predictions[row][TEST] for row in found.ran}
    first = next(iter(test.values()))
    about = {row: {k: v for k, v in facts.items() if k != "cost"} for row, facts in found.about.items()}
    notes = list(found.notes)
    if found.task == "classification":
        for row, predictions in test.items():
            gap = float(predictions.confidence.mean() - predictions.correct.double().mean())
            about[row]["confidence_gap"] = gap
            if ties := predictions.num_tied:
                notes.append(f"{row}: {ties} examples have several most probable classes; the lowest index counts.")
    data = fingerprint(first)
    if flattered := [row for row in found.ran if about[row].get("selected_on") == data]:
        notes.append(f"{', '.join(flattered)}: members were selected on these very test data, which flatters them.")
        warnings.warn(f"{notes[-1]} Select on other data", stacklevel=4)
    notes += dropped_notes(found)
    shortfalls = _shortfalls(found)
    notes += shortfalls
    if bootstrap:
        notes.append(_bootstrap_note(bootstrap, first.group is not None))
        if len(test) > 1 and not enough_resamples(bootstrap, len(test)):
            notes.append(
                f"No test was made: {bootstrap} resamples cannot separate {len(test)} methods at 5 %; give bootstrap = "
                f"{math.ceil(2 * (len(test) - 1) / SIGNIFICANCE) - 1} or more."
            )
    failed = {row: reasons[TEST] for row, reasons in found.failures.items() if TEST in reasons}
    devices = sorted({str(facts["device"]) for facts in about.values() if "device" in facts})
    return {
        "task": found.task,
        "n": len(first),
        "sizes": {name: table.size(name) for name in _sets(found)},
        "bootstrap": bootstrap,
        "level": level,
        "seed": seed,
        "score": score,
        "shift": dict(found.shifts),
        "shift_metrics": list(watched),
        "methods": about,
        "device": ", ".join(devices),
        "data": data,
        "versions": _versions(),
        "notes": notes,
        **({"shortfalls": shortfalls} if shortfalls else {}),
        **({"failures": failed} if failed else {}),
    }


def _shortfalls(found: Collected) -> list[str]:
    """A sentence for whatever failed but the test data of a method, which are `failures`."""
    told = []
    for row, reasons in found.failures.items():
        for name, reason in reasons.items():
            if name != TEST:
                where = "while its cost was measured" if name == COST else f"on {place(name) or name}"
                told.append(f"{row} failed {where}: {reason}")
    return [*told, *found.shortfalls]


def _bootstrap_note(count: int, clustered: bool) -> str:
    units = "whole clusters of examples" if clustered else "examples"
    return (
        f"Intervals: {count} bootstrap resamples of {units}, the same for every method and column; BCa for means of "
        "losses, reflected for calibration errors (whose bootstrap is biased upwards), percentiles for the rest. "
        "A reflected interval may lie below the printed error, which chance inflates. All of them cover the choice of "
        "test examples, not the randomness of training. Tests compare every method with the best of the column on the "
        "same resamples, two-sided, adjusted by Holm over the methods of the column. The best is picked from the same "
        "data, so among many equal methods one is left unmarked a little more often than in 5 % of data sets."
    )


def _versions() -> dict[str, str]:
    from bayesdl import __version__  # not at module level: the package imports this module

    return {"bayesdl": __version__, "torch": torch.__version__, "Python": platform.python_version()}
