"""Calibration in the metrics of a Hugging Face trainer."""

from __future__ import annotations

from typing import Any

import torch

from bayesdl.errors import ShapeError
from bayesdl.evaluation import Predictions, evaluate_metrics

IGNORED = -100  # what transformers writes where a position has no label


def calibration_metrics(eval_prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=calibration_metrics)`: NLL, Brier score, accuracy, ECE and selective prediction.

    The same numbers as `bdl.evaluate`; the trainer puts `eval_` before their names.

    Args:
        eval_prediction: `predictions` are logits `(N, C)` or, for tokens, `(N, T, C)`, or a tuple that begins so;
            `label_ids` `(N,)` or `(N, T)`, where -100 is left out.

    Raises:
        ShapeError: labels that do not fit the logits.
        LabelError, NonFiniteError: labels that are no classes, logits that are no numbers.
    """
    given = eval_prediction.predictions
    logits = torch.as_tensor(given[0] if isinstance(given, (tuple, list)) else given)
    labels = torch.as_tensor(eval_prediction.label_ids)
    if logits.dim() < 2 or labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"logits of shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, C) and (N,), or "
            "(N, T, C) and (N, T)"
        )
    kept = labels.flatten() != IGNORED
    return evaluate_metrics(Predictions.from_logits(logits.flatten(0, -2)[kept], labels.flatten()[kept]))
