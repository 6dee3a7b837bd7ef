"""The fields of `Predictions`: which there are, where their examples lie, and how they must fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation import validation

# Axis of the examples in each field of `Predictions`; None where there is none.
EXAMPLE_AXIS: dict[str, int | None] = {
    "targets": 0,
    "log_probs": 1,
    "means": 1,
    "variances": 1,
    "samples": 1,
    "member_weights": None,
    "total": 0,
    "aleatoric": 0,
    "epistemic": 0,
    "log_prob": 0,
    "max_logit": 0,
    "energy": 0,
    "group": 0,
}
CLASS_TASKS = ("classification", "multilabel")
MOMENT_TASKS = ("regression", "count")


def check_predictions(task: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of `Predictions` that are not None, checked against the task and each other, on one device."""
    if task not in CLASS_TASKS + MOMENT_TASKS:
        raise ArgumentError(f"task={task!r}: expected one of {', '.join(CLASS_TASKS + MOMENT_TASKS)}")
    present = {name: value for name, value in given.items() if value is not None}
    main, other = ("log_probs", "means") if task in CLASS_TASKS else ("means", "log_probs")
    if main not in present or other in present or not _complete(task, present):
        needed = "log_probs" if task in CLASS_TASKS else "means and variances, or samples"
        raise ArgumentError(
            f"predictions of a {task} task hold {needed}; got {', '.join(sorted(present)) or 'nothing'}"
        )
    checked: dict[str, Tensor] = {}
    if task in CLASS_TASKS:
        checked["log_probs"] = validation.log_probabilities(present["log_probs"], normalised=task == "classification")
    elif "variances" in present:
        checked["means"], checked["variances"] = validation.moments(present["means"], present["variances"])
    else:
        checked["means"] = validation.tensor(present["means"], "means")
        validation.rank(checked["means"], "means", (3,))
        validation.not_empty(checked["means"], "means")
        validation.finite(checked["means"], "means")
    members, examples, outputs = checked[main].shape
    _check_targets(task, present, checked, examples, outputs)
    if (weights := validation.member_weights(present.get("member_weights"), members)) is not None:
        checked["member_weights"] = weights
    parts: list[str] = [part for part in ("total", "aleatoric", "epistemic") if part in present]
    drawn = "samples" in present
    if drawn:
        checked["samples"] = validation.tensor(present["samples"], "samples")
        validation.rank(checked["samples"], "samples", (3,))
        validation.finite(checked["samples"], "samples")
        if tuple(checked["samples"].shape[1:]) != (examples, outputs) or members != 1:
            raise ShapeError(
                f"samples has shape {tuple(checked['samples'].shape)} beside means {tuple(checked[main].shape)}; "
                "Predictions.from_samples makes both"
            )
    if drawn and parts != ["total"]:
        raise ArgumentError(f"draws of y have a total and no parts; got {', '.join(parts) or 'none'}")
    if not drawn and len(parts) not in (0, 3):
        raise ArgumentError(f"total, aleatoric and epistemic come together; got {', '.join(parts)}")
    shape = (examples,) if task in CLASS_TASKS else (examples, outputs)
    for part in parts:
        checked[part] = validation.real_targets(present[part], shape, part)
    for name in ("max_logit", "energy", "group"):
        if name in present:
            checked[name] = validation.vector(present[name], name, length=examples)
    if "log_prob" in present:
        # Minus infinity is a verdict (the target was impossible), NaN is a fault.
        checked["log_prob"] = validation.tensor(present["log_prob"], "log_prob")
        if tuple(checked["log_prob"].shape) != (examples,):
            raise ShapeError(f"log_prob has shape {tuple(checked['log_prob'].shape)}, expected ({examples},)")
        bad = ~(checked["log_prob"] < torch.inf)
        if bool(bad.any()):
            validation.raise_at(bad, checked["log_prob"], "log_prob", "are NaN or +inf")
    device = checked[main].device
    return {name: value.to(device) for name, value in checked.items()}


def _complete(task: str, present: Mapping[str, Any]) -> bool:
    # Draws of y come with their mean and nothing that a closed form would give.
    if "samples" in present:
        return task == "regression" and "variances" not in present and "member_weights" not in present
    return task != "regression" or "variances" in present


def _check_targets(
    task: str, present: Mapping[str, Any], checked: dict[str, Tensor], examples: int, outputs: int
) -> None:
    if "targets" not in present:
        return
    if task == "classification":
        checked["targets"] = validation.labels(present["targets"], examples, outputs)
    elif task == "multilabel":
        checked["targets"] = validation.binary_targets(present["targets"], (examples, outputs))
    else:
        checked["targets"] = validation.real_targets(present["targets"], (examples, outputs))
