"""Temperature-scaled twins: without them a ranking by NLL or ECE mostly ranks temperatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evaluation.collect import CALIBRATION, TEST, Collected
from bayesdl.evaluation.mixing import cat_predictions
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.recalibration import FittedRecalibrator, Recalibrator

SUFFIX = " + T"
FOLDS = 5


def with_twins(found: Collected, calibration: Mapping[str, Predictions]) -> Collected:
    """Every row but those of temperature scaling, followed by its twin.

    The temperature is fitted to the row's predictions in `calibration`; where it has none, it is cross-fitted: each of
    five folds of the test set (whole groups) is scaled by a temperature fitted to the others.

    Raises:
        ArgumentError: a row already has a twin's name.
    """
    predictions: dict[str, dict[str, Predictions]] = {}
    about: dict[str, dict[str, Any]] = {}
    notes = list(found.notes)
    for row, sets in found.predictions.items():
        predictions[row], about[row] = sets, found.about[row]
        if about[row].get("method") == "temperature" or not sets or CALIBRATION in found.failures.get(row, {}):
            continue
        twin = row + SUFFIX
        if twin in found.predictions:
            raise ArgumentError(f"{twin!r} names a row and the temperature-scaled twin of {row!r}; rename it")
        try:
            made, note = _twin(sets, calibration.get(row))
        except UnsupportedError as error:
            notes.append(f"{row} has no temperature-scaled twin: {error}.")
            continue
        predictions[twin] = made
        about[twin] = {**found.about[row], "twin_of": row}
        notes.append(f"{twin}: {note}")
    return replace(found, predictions=predictions, about=about, notes=tuple(notes))


def _twin(sets: Mapping[str, Predictions], held: Predictions | None) -> tuple[dict[str, Predictions], str]:
    if held is not None:
        fitted = _fit(held)
        note = f"temperature {fitted.temperature:.4g}, fitted to {len(held)} calibration examples."
        return {name: fitted.apply(part) for name, part in sets.items()}, note
    test = sets[TEST]
    fitted = _fit(test)
    folds = _folds(test)
    scaled, order, found = [], [], []
    for fold in range(FOLDS):
        inside = folds == fold
        if not bool(inside.any()) or bool(inside.all()):
            raise UnsupportedError(f"{len(test)} test examples make no {FOLDS} folds")
        part = _fit(test.subset(~inside))
        scaled.append(part.apply(test.subset(inside)))
        order.append(inside.nonzero()[:, 0])
        found.append(part.temperature)
    made = {name: fitted.apply(part) for name, part in sets.items() if name != TEST}
    made[TEST] = replace(cat_predictions(scaled).subset(torch.cat(order).argsort()), meta=test.meta)
    note = (
        f"temperatures {min(found):.4g} to {max(found):.4g}, cross-fitted in {FOLDS} folds of the test set because no "
        f"calibration data were given; {fitted.temperature:.4g}, of all folds, on other sets."
    )
    return {name: made[name] for name in sets}, note


def _fit(predictions: Predictions) -> FittedRecalibrator:
    logits = predictions.log_mean_probs
    if bool(logits.isinf().any()):
        raise UnsupportedError("probabilities of 0 have no logits")
    return Recalibrator().fit(logits, predictions.labelled())


def _folds(test: Predictions) -> Tensor:
    """(N,) fold of each example; a group is never split."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(len(test)) if test.group is None else test.group.cpu().unique(return_inverse=True)[1]
    count = int(ids.max()) + 1
    by_unit = torch.randperm(count, generator=generator) % FOLDS
    return by_unit[ids].to(test.device)
