"""Recalibrators of netcal behind this library's interface: one class against the rest, inputs checked beforehand."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import LabelError, require

_CLASSES = {
    "platt": ("netcal.scaling", "LogisticCalibration"),
    "beta": ("netcal.scaling", "BetaCalibration"),
    "bbq": ("netcal.binning", "BBQ"),
    "enir": ("netcal.binning", "ENIR"),
}


def fit_columns(method: str, probs: Tensor, labels: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
    """One map (N,) -> (N,) for each class, fitted to its probability against the rest.

    Raises:
        LabelError: a class does not occur among the labels, so that netcal could not fit it.
        MissingDependencyError: netcal is not installed.
    """
    module, name = _CLASSES[method]
    kind = getattr(require(module), name)
    present = torch.bincount(labels, minlength=probs.shape[1]) > 0
    if not bool(present.all()):
        raise LabelError(
            f"{method!r} needs examples of every class; class {int((~present).nonzero()[0])} has none. "
            "temperature, vector, matrix and dirichlet do not"
        )
    columns = []
    for c in range(probs.shape[1]):
        calibrator = kind()
        # Integer labels, because one of its methods fails on booleans; and it prints.
        _quiet(calibrator.fit, probs[:, c].cpu().numpy(), (labels == c).long().cpu().numpy())
        columns.append(_column(calibrator))
    return tuple(columns)


def _column(calibrator: Any) -> Callable[[Tensor], Tensor]:
    def transform(p: Tensor) -> Tensor:
        moved = torch.as_tensor(_quiet(calibrator.transform, p.cpu().numpy()), dtype=p.dtype)
        return moved.reshape(p.shape).clamp(0.0, 1.0)

    return transform


def _quiet(function: Callable[..., Any], *arguments: Any) -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return function(*arguments)
