"""Several predictions as one: the mixture of methods with given weights, and batches in a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, ShapeError, UnsupportedError
from bayesdl.evaluation import fields, validation
from bayesdl.evaluation.predictions import Predictions


def fingerprint(predictions: Predictions) -> str:
    """A short hash of the targets, by which two sets can be seen to be the same data."""
    targets = predictions.labelled().cpu().contiguous()
    return hashlib.sha256(targets.numpy().tobytes()).hexdigest()[:12]


def check_candidates(candidates: Sequence[Predictions]) -> None:
    """Raise unless all are about the same examples.

    Raises:
        ArgumentError: other tasks, or none at all. ShapeError: other numbers of examples or outputs. LabelError: other
            targets.
    """
    if not candidates:
        raise ArgumentError("no candidates were given; expected predictions of at least one")
    first = candidates[0]
    for place, one in enumerate(candidates):
        if one.task != first.task:
            raise ArgumentError(f"candidate {place} is about {one.task}, candidate 0 about {first.task}")
        if (len(one), one.num_outputs) != (len(first), first.num_outputs):
            raise ShapeError(
                f"candidate {place} holds {len(one)} examples of {one.num_outputs} outputs, candidate 0 "
                f"{len(first)} of {first.num_outputs}; give predictions for the same examples"
            )
        if one.targets is not None and first.targets is not None and not torch.equal(one.targets, first.targets):
            raise LabelError(f"candidate {place} has other targets than candidate 0; give them in the same order")


def mix(candidates: Sequence[Predictions], weights: Any, *, meta: dict[str, Any] | None = None) -> Predictions:
    """The mixture sum_k w_k p_k of the candidates' predictive distributions, members and all.

    What differs between candidates is epistemic: aleatoric is the weighted mean of theirs, and the total is that of the
    mixture. Candidates of weight 0 are left out.

    Args:
        weights: (K,), non-negative; they are scaled to sum 1.

    Raises:
        ArgumentError, ShapeError, LabelError: see `check_candidates`, or weights of another number. UnsupportedError:
        draws of y, which have no members.
    """
    check_candidates(candidates)
    share = validation.example_weights(weights, len(candidates))
    if share is None or share.dim() != 1:
        raise ArgumentError(f"weights: expected one for each of {len(candidates)} candidates")
    chosen = [(one, float(w)) for one, w in zip(candidates, share / share.sum(), strict=True) if w > 0]
    first = chosen[0][0]
    if any(one.samples is not None or (one.log_probs is None and one.variances is None) for one, _ in chosen):
        raise UnsupportedError("draws of y, or counts without components, have no members that a mixture could hold")
    classes = first.task in fields.CLASS_TASKS
    parts: dict[str, Any] = {"member_weights": torch.cat([w * _own_weights(one) for one, w in chosen])}
    for name in ("log_probs",) if classes else ("means", "variances"):
        parts[name] = torch.cat([validation.wide(getattr(one, name)) for one, _ in chosen])
    for name in ("max_logit", "energy"):
        parts[name] = _mean(chosen, name)
    if all(one.log_prob is not None for one, _ in chosen):
        logs = torch.stack([validation.wide(one.log_prob) for one, _ in chosen])  # type: ignore[arg-type]
        parts["log_prob"] = (logs + logs.new_tensor([w for _, w in chosen]).log()[:, None]).logsumexp(0)
    parts |= {"targets": first.targets, "group": first.group, "name": first.name, "meta": meta or {}}
    made = Predictions(task=first.task, **parts)
    aleatoric = _mean(chosen, "aleatoric")
    if aleatoric is None:
        return made
    # A candidate in closed form has an epistemic part that its one member does not show.
    total = validation.wide(made.total) if classes else made.variance  # type: ignore[arg-type]
    return Predictions(task=first.task, **parts, total=total, aleatoric=aleatoric, epistemic=total - aleatoric)


def _own_weights(one: Predictions) -> Tensor:
    if one.member_weights is not None:
        return one.member_weights
    return torch.full((one.num_members,), 1 / one.num_members, dtype=torch.float64)


def _mean(chosen: Sequence[tuple[Predictions, float]], name: str) -> Tensor | None:
    """Weighted mean of a field, None where a candidate lacks it."""
    values = [getattr(one, name) for one, _ in chosen]
    if any(value is None for value in values):
        return None
    total = torch.zeros_like(validation.wide(values[0]))
    for value, (_, w) in zip(values, chosen, strict=True):
        total = total + w * validation.wide(value)
    return total


def cat_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several batches as one; fields that a batch lacks are left out.

    Raises:
        ArgumentError: no batches, or batches of different tasks or members.
    """
    if not parts:
        raise ArgumentError("no predictions to concatenate")
    first = parts[0]
    for part in parts:
        same = (part.task, part.num_members, part.num_outputs) == (first.task, first.num_members, first.num_outputs)
        if part.samples is not None and first.samples is not None:
            same = same and len(part.samples) == len(first.samples)
        weights = [first.member_weights, part.member_weights]
        if not same or ((weights[0] is None) != (weights[1] is None)):
            raise ArgumentError("predictions of different tasks, members or outputs cannot be concatenated")
    held = [part._tensors() for part in parts]
    joined: dict[str, Any] = {}
    for name, axis in fields.EXAMPLE_AXIS.items():
        if all(name in fields_ for fields_ in held):
            joined[name] = held[0][name] if axis is None else torch.cat([fields_[name] for fields_ in held], axis)
    return Predictions(task=first.task, name=first.name, meta=first.meta, **joined)
