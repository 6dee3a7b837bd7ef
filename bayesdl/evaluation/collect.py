"""Gather the predictions of every method on every data set, and what they cost, before any metric is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bayesdl.errors import ArgumentError, LabelError
from bayesdl.evaluation import cost as costs
from bayesdl.evaluation.cells import place
from bayesdl.evaluation.dropping import check_choice, dropped_of, finite_predictions, without
from bayesdl.evaluation.failures import FAILURES, reason
from bayesdl.evaluation.pairing import check_same_targets, drop_together
from bayesdl.evaluation.predictions import Predictions
from bayesdl.predictive import Predictive

TEST, CALIBRATION, COST = "test", "calibration", "cost"
_COST_EXAMPLES = 512  # enough to time a method, few enough that a slow one is not run over the whole test set again
_COST_BATCHES = 16


@dataclass(frozen=True)
class Collected:
    """Predictions by row and data set (`test`, `ood/<set>`, `shift/<name>/<severity>`), and facts about each row.

    `about[row]` holds `method`, `temperature` and `cost` (a dict of floats) where they are known. `calibration` holds
    held-out predictions by row, `scores[name][row][data set]` the OOD scores (N,) of feature densities.
    `failures[row][data set]` says why a method has no predictions there; one that failed on `test` has none at all.
    `failures[row]["cost"]` says why it has predictions but could not be timed. `shortfalls` are sentences about scores
    that failed. `unusable[row][data set]`, under `nan="drop"` alone: on how many examples a method itself was not
    finite; all rows lack the same examples.
    """

    predictions: dict[str, dict[str, Predictions]]
    about: dict[str, dict[str, Any]]
    shifts: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    calibration: Mapping[str, Predictions] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    failures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shortfalls: tuple[str, ...] = ()
    unusable: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(self.predictions)

    @property
    def ran(self) -> tuple[str, ...]:
        """The rows that did not fail altogether."""
        return tuple(row for row, sets in self.predictions.items() if TEST in sets)

    @property
    def task(self) -> str:
        return self.predictions[self.ran[0]][TEST].task

    def missing(self, row: str, dataset: str) -> str:
        """Why a row has no predictions of a data set, in a word or two."""
        failed = self.failures.get(row, {})
        return "failed" if dataset in failed or TEST in failed else "not given"


def collect(
    methods: Mapping[str, Any],
    data: Any,
    ood: Mapping[str, Any] | None,
    shift: Mapping[str, Any] | None,
    *,
    cost: bool,
    progress: bool,
    calibration: Any = None,
    scores: Mapping[str, Any] | None = None,
    keep_going: bool = False,
    nan: str = "raise",
) -> Collected:
    """Run every method that is a model over all loaders; take and load what is given as predictions.

    With `keep_going` the errors of one method do not end the comparison: they become its `failures`. Where every
    method fails on the test data, the first error is raised all the same. With `nan` "drop", examples on which any
    method is not finite are left out for all of them.

    Raises:
        ArgumentError: no methods, a loader that is missing or can be read only once, or a value of an unknown kind.
        ShapeError, LabelError: methods whose test targets differ.
    """
    if not isinstance(methods, Mapping) or not methods:
        got = "an empty one" if isinstance(methods, Mapping) else type(methods).__name__
        raise ArgumentError(f"methods: expected a dict of at least one name -> method, got {got}")
    names = [str(row) for row in methods]
    if "" in names or len(set(names)) < len(names):
        raise ArgumentError(f"methods: every row needs a name of its own, got {', '.join(map(repr, methods))}")
    check_choice(nan)
    sources, shifts = _sources(data, ood, shift)
    if calibration is not None:
        sources[CALIBRATION] = calibration
    models = {str(row): method for row, method in methods.items() if not _is_given(method)}
    if models and data is None:
        raise ArgumentError(f"data: a loader is needed to run {', '.join(models)}; got None")
    for name, source in sources.items():
        if not models and name != TEST and not isinstance(source, Mapping):
            raise ArgumentError(
                f"{name}: all methods are given as predictions, so no loader can be run; give {{method: Predictions}}"
            )
    predictions: dict[str, dict[str, Predictions]] = {}
    about: dict[str, dict[str, Any]] = {}
    notes: tuple[str, ...] = ()
    failures: dict[str, dict[str, str]] = {}
    first_error: BaseException | None = None
    total = len(methods) * len(sources) + (len(models) if cost else 0)
    steps = tqdm(total=total, desc="predict", disable=not progress, leave=False)
    with steps:
        for row, method in methods.items():
            sets: dict[str, Predictions] = {}
            for name, source in sources.items():
                steps.set_postfix_str(f"{row}, {name}")
                try:
                    found = _predictions(str(row), method, name, source, nan)
                except FAILURES as error:
                    if not keep_going:
                        raise
                    first_error = first_error or error
                    failures.setdefault(str(row), {})[name] = reason(error)
                    if name == TEST:  # the first: without it nothing else can be shown
                        steps.update(len(sources))
                        break
                    found = None
                if found is not None:
                    sets[name] = found
                steps.update()
            if TEST not in sets and str(row) not in failures:
                raise ArgumentError(f"methods[{row!r}]: the test data hold no predictions of it")
            predictions[str(row)] = sets
            about[str(row)] = _about(method, sets, model=str(row) in models)
        if first_error is not None and not any(predictions.values()):
            raise first_error
        unusable = {row: {name: len(dropped_of(p)) for name, p in sets.items()} for row, sets in predictions.items()}
        out = drop_together([predictions], nan)
        check_same_targets(predictions)
        timed = {row: model for row, model in models.items() if TEST in predictions[row]}
        if cost and timed:
            steps.set_postfix_str("cost")
            usable = without(data, out[TEST]) if TEST in out else data
            notes = _add_costs(timed, usable, predictions, about, failures if keep_going else None)
            steps.update(len(models))
    held = {row: sets.pop(CALIBRATION) for row, sets in predictions.items() if CALIBRATION in sets}
    counts = unusable if nan == "drop" else {}
    whole = Collected(predictions, about, shifts, notes, held, failures=failures, unusable=counts)
    return _with_feature_scores(scores, whole, sources, keep_going=keep_going) if scores else whole


def _with_feature_scores(
    scores: Mapping[str, Any], found: Collected, sources: Mapping[str, Any], *, keep_going: bool
) -> Collected:
    """With OOD scores by name, row and data set, each density read once over every loader."""
    made: dict[str, dict[str, dict[str, Tensor]]] = {}
    shortfalls = list(found.shortfalls)
    for name, given in scores.items():
        by_row = given if isinstance(given, Mapping) else dict.fromkeys(found.rows, given)
        done: dict[int, dict[str, Tensor]] = {}
        for row, density in by_row.items():
            if row not in found.predictions:
                raise ArgumentError(f"scores[{name!r}]: {row!r} is no row; the rows are {', '.join(found.rows)}")
            if not hasattr(density, "scores"):
                raise ArgumentError(
                    f"scores[{name!r}]: expected a fitted density, FeatureDensity(...).fit(model, loader), "
                    f"got {type(density).__name__}"
                )
            if row not in found.ran:
                continue
            if id(density) not in done:
                done[id(density)] = {}
                for key, source in sources.items():
                    if (key != TEST and not key.startswith("ood/")) or not _is_loader(source, name, key):
                        continue
                    try:
                        done[id(density)][key] = _paired(density, source, found.predictions[row].get(key))
                    except FAILURES as error:
                        if not keep_going:
                            raise
                        shortfalls.append(f"The score {name} of {row} failed on {place(key) or key}: {reason(error)}")
            made.setdefault(_set_name(name), {})[row] = done[id(density)]
    return replace(found, scores=made, shortfalls=tuple(shortfalls))


def _paired(density: Any, source: Any, found: Predictions | None) -> Tensor:
    """Scores (N,) of the examples that the predictions hold."""
    if found is None or not (out := dropped_of(found)):
        made: Tensor = density.scores(source).cpu()
        return made
    batches = list(source)
    kept = without(batches, out)
    made = density.scores(kept).cpu()
    return made


def _is_loader(source: Any, score: str, key: str) -> bool:
    if source is None or isinstance(source, Mapping):
        raise ArgumentError(f"scores[{score!r}] reads inputs, so {key} must be a loader")
    return True


def one(source: Any, data: Any, ood: Mapping[str, Any] | None, nan: str = "raise") -> dict[str, Predictions]:
    """Predictions by data set of a single model, predictions or path."""
    named = {name: {"it": value} if _is_given(value) else value for name, value in (ood or {}).items()}
    return collect({"it": source}, data, named, None, cost=False, progress=False, nan=nan).predictions["it"]


def _is_given(method: Any) -> bool:
    return isinstance(method, (Predictions, str, os.PathLike))


def _sources(
    data: Any, ood: Mapping[str, Any] | None, shift: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """All data sets under the keys of a report, and the severities of every shift."""
    sources: dict[str, Any] = {TEST: data}
    for name, value in (ood or {}).items():
        sources[f"ood/{_set_name(name)}"] = value
    shifts: dict[str, list[str]] = {}
    for name, loaders in (shift or {}).items():
        if isinstance(loaders, Mapping):
            levels = {str(severity): loader for severity, loader in loaders.items()}
        elif isinstance(loaders, Sequence) and not isinstance(loaders, str):
            levels = {str(severity): loader for severity, loader in enumerate(loaders, start=1)}
        else:
            raise ArgumentError(
                f"shift[{name!r}]: expected loaders by growing severity, a list or a dict, got {loaders!r}"
            )
        if not levels:
            raise ArgumentError(f"shift[{name!r}] holds no loader")
        shifts[_set_name(name)] = [_set_name(severity) for severity in levels]
        sources.update({f"shift/{name}/{severity}": loader for severity, loader in levels.items()})
    for name, source in sources.items():
        if source is not None and not isinstance(source, Mapping) and _read_once(source):
            raise ArgumentError(f"{name}: an iterator is empty after the first method; give a DataLoader or a list")
    return sources, shifts


def _read_once(source: Any) -> bool:
    """True for a generator or iterator, which can be read only once."""
    return hasattr(source, "__next__")


def _set_name(name: object) -> str:
    text = str(name)
    if not text or "/" in text:
        raise ArgumentError(f"{text!r} cannot name a data set: the slash separates the parts of column names")
    return text


def _predictions(row: str, method: Any, name: str, source: Any, nan: str) -> Predictions | None:
    """Predictions of one method on one data set; None where they were not given."""
    if isinstance(source, Mapping):  # predictions by method
        value = source.get(row)
        return None if value is None else _load(value, f"{name}[{row!r}]", nan)
    if _is_given(method):
        return _load(method, f"methods[{row!r}]", nan, targets=True) if name == TEST else None
    if not hasattr(method, "predict_with_targets"):
        raise ArgumentError(
            f"methods[{row!r}]: expected a BayesianModel, Predictions or a path to some, got {type(method).__name__}; "
            'wrap a network first: bayesdl.wrap(net, "map", loader, likelihood=...)'
        )

    def predict(data: Iterable[Any]) -> Predictions:
        return _predicted(method, name, data)

    return finite_predictions(predict, source) if nan == "drop" else predict(source)


def _predicted(method: Any, name: str, data: Iterable[Any]) -> Predictions:
    predictive, targets = method.predict_with_targets(data)
    labelled = not name.startswith("ood/")
    if labelled and targets is None:
        raise LabelError(f"{name}: the loader gives inputs without targets, and nothing can be scored without them")
    meta = {"about": _facts(method)} if name == TEST else {}
    if targets is not None and not labelled and isinstance(predictive, Predictive):
        predictive = predictive.without_ignored(targets)  # padding belongs to no distribution
    made = Predictions.from_predictive(predictive, targets if labelled else None, name=name, meta=meta)
    return made.map(Tensor.cpu)


def _load(value: Any, where: str, nan: str, *, targets: bool = False) -> Predictions:
    found = value if isinstance(value, Predictions) else None
    if found is None and isinstance(value, (str, os.PathLike)):
        found = Predictions.load(Path(value), nan=nan)
    if found is None:
        raise ArgumentError(f"{where}: expected Predictions or a path to some, got {type(value).__name__}")
    if targets and found.targets is None:
        raise LabelError(f"{where}: these predictions hold no targets, and nothing can be scored without them")
    return found


def _facts(method: Any) -> dict[str, Any]:
    """What a model says about itself: method name, temperature, fit cost."""
    facts: dict[str, Any] = {}
    if isinstance(getattr(method, "method_name", None), str):
        facts["method"] = method.method_name
    temperature = getattr(getattr(method, "posterior", None), "temperature", None)
    if isinstance(temperature, (int, float)) or (isinstance(temperature, Tensor) and temperature.numel() == 1):
        facts["temperature"] = float(temperature)
    facts["cost"] = {str(key): float(value) for key, value in dict(getattr(method, "cost", {})).items()}
    return facts


def _about(method: Any, sets: Mapping[str, Predictions], *, model: bool) -> dict[str, Any]:
    """What is known of a row; of a method that failed, its name alone: a cost without a result would look cheap."""
    if TEST in sets:
        return _facts(method) if model else dict(sets[TEST].meta.get("about", {}))
    name = getattr(method, "method_name", None)
    return {"method": name} if isinstance(name, str) else {}


def _add_costs(
    models: Mapping[str, Any],
    data: Iterable[Any],
    predictions: dict[str, dict[str, Predictions]],
    about: dict[str, dict[str, Any]],
    failures: dict[str, dict[str, str]] | None,
) -> tuple[str, ...]:
    """Time and memory of all models on a few batches held in memory; returns how they were measured, in words.

    What fails becomes one of the `failures`; without a place for them it is raised.
    """
    batches: list[Any] = []
    seen = 0
    for batch in data:
        batches.append(batch)
        seen += _batch_size(batch)
        if seen >= _COST_EXAMPLES or len(batches) >= _COST_BATCHES:
            break

    def predictor(model: Any) -> Callable[[Sequence[Any]], int]:
        return lambda some: int(model.predict(some).mean.shape[0])

    def failed(row: str, error: BaseException) -> None:
        if failures is not None:
            failures.setdefault(row, {})[COST] = reason(error)

    devices = {row: torch.device(model.device) for row, model in models.items() if hasattr(model, "device")}
    predictors = {row: predictor(model) for row, model in models.items()}
    on_error = None if failures is None else failed
    measured = costs.measure(predictors, batches, devices=devices, on_error=on_error)
    for row, found in measured.items():
        values = {"ms_per_example": found.milliseconds, "peak_mib": found.peak_mib}
        known = {key: value for key, value in values.items() if not math.isnan(value)}
        about[row] = {**about[row], "cost": {**about[row]["cost"], **known}, "device": found.device}
        # kept with the predictions, so that a comparison of saved files knows it too
        predictions[row][TEST] = replace(
            predictions[row][TEST], meta={**predictions[row][TEST].meta, "about": about[row]}
        )
    return tuple(dict.fromkeys(_cost_note(found) for found in measured.values()))


def _batch_size(batch: Any) -> int:
    """Examples in a batch as far as they can be seen; 1 where not, which only makes the sample longer."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    parts = (
        list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, (list, tuple)) else []
    )
    return _batch_size(parts[0]) if parts else 1


def _cost_note(measured: costs.Cost) -> str:
    text = (
        "Time: wall clock per example over batches held in memory, after a warm-up, median of runs that alternate "
        "between the methods. Peak memory: highest level during a prediction above the level before it"
    )
    text += ", CUDA allocator" if measured.device.startswith("cuda") else ", resident set sampled every millisecond"
    return f"{text}. {measured.note}." if measured.note else f"{text}."
