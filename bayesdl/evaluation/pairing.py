"""All methods are scored on the same examples in the same order; what one of them lacks is left out for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError
from bayesdl.evaluation import validation
from bayesdl.evaluation.cells import place
from bayesdl.evaluation.dropping import DROPPED, dropped_of
from bayesdl.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from bayesdl.evaluation.collect import Collected


def drop_together(tables: Sequence[Mapping[str, dict[str, Predictions]]], nan: str) -> dict[str, list[int]]:
    """Leave out of every row, in place, what is missing from any: an example that one method lacks pairs with nothing.

    Args:
        tables: predictions by row and data set, one table a training seed.
        nan: "raise" or "drop", as `compare` was told.

    Returns:
        The examples left out, by data set, in the numbering of the data as given; no set of which none was.

    Raises:
        NonFiniteError: predictions lack examples, and nobody asked to drop them elsewhere; or nothing is left.
        ShapeError: rows with different numbers of examples before any was left out.
    """
    missing: dict[str, set[int]] = {}
    for table in tables:
        for row, sets in table.items():
            for name, found in sets.items():
                own = dropped_of(found)
                if nan == "raise" and name in missing and missing[name] != set(own):
                    raise NonFiniteError(
                        f"{name}: the predictions of {row!r} lack {len(own)} examples that were not finite, and not "
                        f'those that another method lacks; nan="drop" leaves them out for every method'
                    )
                missing.setdefault(name, set()).update(own)
    if nan == "raise":
        return {}
    for table in tables:
        for row, sets in table.items():
            for name in [name for name in sets if missing[name]]:
                sets[name] = _without(sets[name], missing[name], f"{name}: {row!r}")
    return {name: sorted(out) for name, out in missing.items() if out}


def drop_over_seeds(seeds: Sequence[Collected]) -> list[Collected]:
    """The same without the examples that any seed lacks, which all seeds of `nan="drop"` do without."""
    before = [
        {name: dropped_of(found) for sets in seed.predictions.values() for name, found in sets.items()}
        for seed in seeds
    ]
    out = drop_together([seed.predictions for seed in seeds], "drop")
    return [_with_scores(seed, had, out) for seed, had in zip(seeds, before, strict=True)] if out else list(seeds)


def _with_scores(found: Collected, had: Mapping[str, Sequence[int]], out: Mapping[str, Sequence[int]]) -> Collected:
    """Scores of feature densities, cut as the predictions were."""

    def cut(scores: Tensor, name: str) -> Tensor:
        own = had.get(name, ())
        numbers = kept_of(own, len(scores) + len(own))
        gone = torch.tensor(list(out.get(name, ())), dtype=torch.int64)
        return scores[~torch.isin(numbers, gone)]

    made = {
        score: {row: {name: cut(s, name) for name, s in sets.items()} for row, sets in rows.items()}
        for score, rows in found.scores.items()
    }
    return replace(found, scores=made)


def clustered(found: Collected, cluster: Any) -> Collected:
    """The same with cluster ids for the test examples of every row. Raises `ShapeError` for another length."""
    ids = validation.tensor(cluster, "cluster")
    if ids.dim() == 1:
        ids = ids[_kept_ids(found, len(ids), "cluster").to(ids.device)]
    rows = {
        row: {**sets, "test": replace(sets["test"], group=ids)} if sets else sets
        for row, sets in found.predictions.items()
    }
    return replace(found, predictions=rows)


def subgroups_of(found: Collected, group: Any) -> dict[str, Tensor]:
    """Positions of each subgroup among the test examples that are left, by `group/<name>`, in order of appearance.

    Raises:
        ShapeError: not one name an example. ArgumentError: a name that is empty or holds a slash.
    """
    names = [str(name) for name in (group.tolist() if hasattr(group, "tolist") else group)]
    places: dict[str, list[int]] = {}
    for position, number in enumerate(_kept_ids(found, len(names), "group").tolist()):
        places.setdefault(names[number], []).append(position)
    if bad := [name for name in places if not name or "/" in name]:
        raise ArgumentError(f"group: {bad[0]!r} cannot name a subgroup: the slash separates the parts of column names")
    return {f"group/{name}": torch.tensor(positions) for name, positions in places.items()}


def _kept_ids(found: Collected, given: int, what: str) -> Tensor:
    """Which of the ids, one for each example of the data as they were given, belong to examples that are left."""
    test = found.predictions[found.ran[0]]["test"]
    out = dropped_of(test)
    if given != len(test) + len(out):
        raise ShapeError(f"{what} has {given} entries, the test data have {len(test) + len(out)} examples")
    return kept_of(out, given)


def dropped_notes(found: Collected) -> list[str]:
    """A sentence for each data set of which examples were left out: how many, and on how many which method failed."""
    notes = []
    for name in dict.fromkeys(name for sets in found.predictions.values() for name in sets):
        left = next(sets[name] for sets in found.predictions.values() if name in sets)
        if out := dropped_of(left):
            counts = {row: sets.get(name, 0) for row, sets in found.unusable.items()}
            told = ", ".join(f"{row} on {count}" for row, count in counts.items() if count)
            notes.append(
                f"{place(name) or 'Test data'}: {len(out)} of {len(left) + len(out)} examples were left out for every "
                f"method, because not all are finite there{f' ({told})' if told else ''}."
            )
    return notes


def kept_of(out: Sequence[int], total: int) -> Tensor:
    """Numbers of the examples that are left of `total`."""
    mask = torch.ones(total, dtype=torch.bool)
    mask[torch.tensor(list(out), dtype=torch.int64)] = False
    return mask.nonzero()[:, 0]


def _without(found: Predictions, out: set[int], where: str) -> Predictions:
    own = dropped_of(found)
    total = len(found) + len(own)
    if max(out) >= total:
        raise ShapeError(
            f"{where} has {total} examples, another method at least {max(out) + 1}; compare the same examples"
        )
    numbers = kept_of(own, total)
    keep = torch.tensor([number not in out for number in numbers.tolist()])
    if not bool(keep.any()):
        raise NonFiniteError(
            f"{where}: some method is not finite on every one of the {total} examples; nothing is left"
        )
    return replace(found.subset(keep), meta={**found.meta, DROPPED: sorted(out)})


def check_same_targets(predictions: Mapping[str, Mapping[str, Predictions]]) -> None:
    """Paired resampling compares example with example, so all rows must hold the same examples in the same order."""
    first: dict[str, str] = {}
    for row, sets in predictions.items():
        for name, found in sets.items():
            first_row = first.setdefault(name, row)
            other = predictions[first_row][name]
            if other is found:
                continue
            if found.task != other.task:
                raise ArgumentError(f"{name}: {row!r} is about {found.task}, {first_row!r} about {other.task}")
            if len(found) != len(other):
                raise ShapeError(
                    f"{name}: {row!r} has {len(found)} examples, {first_row!r} has {len(other)}; "
                    "compare the same examples"
                )
            if found.targets is None or other.targets is None:
                continue
            if found.targets.shape != other.targets.shape:
                raise ShapeError(
                    f"{name}: targets of {row!r} have shape {tuple(found.targets.shape)}, "
                    f"of {first_row!r} {tuple(other.targets.shape)}"
                )
            unequal = (found.targets.double() != other.targets.double()).reshape(len(found), -1).any(1)
            if bool(unequal.any()):
                index = int(unequal.nonzero()[0])
                raise LabelError(
                    f"{name}: targets of {row!r} and {first_row!r} differ, first at example {index}; "
                    "if the loader shuffles, build it with shuffle=False"
                )
