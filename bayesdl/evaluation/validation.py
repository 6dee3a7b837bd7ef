"""Every input check of the evaluation functions, in one place; explicit errors, so that they survive ``python -O``.

All functions take tensors, numpy arrays or nested lists and return tensors without copying where possible. float16 and
bfloat16 are promoted to float32, so a result equals that of the promoted input.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError

HALF = (torch.float16, torch.bfloat16)


class UndefinedError(ArgumentError):
    """A metric has no value on this input; `reason` is what a table prints in ``n/a (reason)``."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def tensor(value: Any, name: str) -> Tensor:
    """`value` as a tensor, half precision promoted to float32."""
    value = _raw(value, name)
    return value.float() if value.dtype in HALF else value


def wide(value: Tensor) -> Tensor:
    """float64 copy for sums, on the CPU where the device has no float64."""
    if value.device.type == "mps":
        value = value.cpu()
    return value.to(torch.float64)


def finite(value: Tensor, name: str) -> None:
    """Raise when `value` holds NaN or infinity, with the count and the first index."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise_at(~torch.isfinite(value), value, name, "are NaN or infinite")


def not_empty(value: Tensor, name: str) -> None:
    """Raise when there is not a single element."""
    if value.numel() == 0:
        raise UndefinedError(
            f"{name} is empty (shape {tuple(value.shape)}): at least one example is needed", "0 samples"
        )


def vector(value: Any, name: str, *, length: int | None = None) -> Tensor:
    """A finite, non-empty tensor of shape (N,), of any real values: scores, distances, energies."""
    value = tensor(value, name)
    rank(value, name, (1,))
    if length is not None and value.shape[0] != length:
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, expected ({length},)")
    not_empty(value, name)
    finite(value, name)
    return value


def rank(value: Tensor, name: str, ranks: tuple[int, ...]) -> None:
    """Raise when the number of axes is not one of `ranks`."""
    if value.dim() not in ranks:
        wanted = " or ".join(f"{r}-D" for r in ranks)
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, expected {wanted}; nothing is broadcast or flattened")


def probabilities(value: Any, name: str = "probs") -> Tensor:
    """Probabilities (N,), (N, C) or (S, N, C): finite, in [0, 1], rows of C summing to 1."""
    raw = _raw(value, name)
    tolerance = row_tolerance(raw.dtype)
    raw = tensor(raw, name)
    if not raw.is_floating_point():
        raw = raw.to(torch.float32)
    rank(raw, name, (1, 2, 3))
    not_empty(raw, name)
    finite(raw, name)
    outside = (raw < 0) | (raw > 1)
    if bool(outside.any()):
        raise_at(outside, raw, name, "lie outside [0, 1]; did you pass logits? use logits=")
    if raw.dim() > 1:
        if raw.shape[-1] == 1:
            raise ShapeError(
                f"{name} has shape {tuple(raw.shape)}: one column is no distribution; pass (N,) or two columns"
            )
        off = (wide(raw).sum(-1) - 1).abs() > tolerance
        if bool(off.any()):
            raise_at(
                off,
                raw.sum(-1),
                f"row sums of {name}",
                f"differ from 1 by over {tolerance:g}; did you pass logits? use logits=",
            )
    return raw


def row_tolerance(dtype: torch.dtype) -> float:
    """By how much a row of probabilities may miss 1; bfloat16 keeps 8 bits, so its rows miss by more than half's."""
    return {torch.float64: 1e-8, torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-4)


def logits(value: Any, name: str = "logits") -> Tensor:
    """Raw outputs (N, C) or (S, N, C), finite, C >= 2."""
    value = tensor(value, name)
    rank(value, name, (2, 3))
    if value.shape[-1] == 1:
        raise ShapeError(
            f"{name} has shape {tuple(value.shape)}: one column decides nothing; pass two columns (0, f) for binary"
        )
    not_empty(value, name)
    finite(value, name)
    return value if value.is_floating_point() else value.to(torch.float32)


def log_probabilities(value: Any, name: str = "log_probs", *, normalised: bool = True) -> Tensor:
    """Log-probabilities (S, N, C); -inf is legal, NaN and values above 0 are not; rows sum to 1 if `normalised`."""
    value = tensor(value, name)
    rank(value, name, (3,))
    not_empty(value, name)
    bad = ~(value <= row_tolerance(value.dtype))
    if bool(bad.any()):
        raise_at(bad, value, name, "are NaN or above 0; did you pass logits? use logits=")
    if normalised:
        tolerance = row_tolerance(value.dtype)
        off = ~((wide(value).exp().sum(-1) - 1).abs() <= tolerance)
        if bool(off.any()):
            raise_at(
                off,
                value.exp().sum(-1),
                f"row sums of exp({name})",
                f"differ from 1 by over {tolerance:g}; did you pass logits? use logits=",
            )
    return value


def exactly_one(**given: Any) -> str:
    """Name of the one argument that is not None.

    Raises:
        TypeError: none or several were given.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        choices = " and ".join(f"{name}=" for name in given)
        found = " and ".join(f"{name}=" for name in names) or "none"
        raise TypeError(f"give exactly one of {choices}; got {found}")
    return names[0]


def labels(value: Any, num_examples: int, num_classes: int, *, name: str = "targets", cast: bool = False) -> Tensor:
    """Class indices (N,) int64 in [0, C); bool only for C = 2; floating values only with `cast` and when integral."""
    value = tensor(value, name)
    if value.dim() != 1 or value.shape[0] != num_examples:
        raise ShapeError(
            f"{name} has shape {tuple(value.shape)}, the forecasts need ({num_examples},); nothing is broadcast"
        )
    if value.dtype == torch.bool:
        if num_classes != 2:
            raise LabelError(f"{name} is boolean, which is accepted for two classes; the forecasts have {num_classes}")
        return value.to(torch.int64)
    if value.is_floating_point():
        finite(value, name)
        if not cast or not bool((value == value.round()).all()):
            raise LabelError(
                f"{name} has dtype {value.dtype}; class indices are integers (cast=True accepts integral floats)"
            )
    value = value.to(torch.int64)
    outside = (value < 0) | (value >= num_classes)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise LabelError(
            f"{name}: {int(outside.sum())} labels lie outside [0, {num_classes - 1}], the first is {int(value[at])} "
            f"at index {at}; rows to be left out need ignore_index="
        )
    return value


def keep_rows(value: Any, ignore_index: int | None, name: str = "targets") -> Tensor | None:
    """Boolean mask of the rows whose label is not `ignore_index`, or None when nothing is ignored."""
    if ignore_index is None:
        return None
    value = tensor(value, name)
    rank(value, name, (1,))
    keep = value != ignore_index
    if not bool(keep.any()):
        raise UndefinedError(f"{name}: all {value.shape[0]} rows carry ignore_index={ignore_index}", "0 samples")
    return keep


def binary_targets(value: Any, shape: tuple[int, ...], name: str = "targets") -> Tensor:
    """Labels 0 and 1 of any dtype as int64 of exactly `shape`."""
    value = tensor(value, name)
    if tuple(value.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, expected {shape}; nothing is broadcast")
    not_empty(value, name)
    if value.dtype == torch.bool:
        return value.to(torch.int64)
    finite(value, name)
    bad = (value != 0) & (value != 1)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise LabelError(
            f"{name}: {int(bad.sum())} values are neither 0 nor 1, the first is {float(value[at]):g} at index {at}"
        )
    return value.to(torch.int64)


def moments(mean: Any, variance: Any) -> tuple[Tensor, Tensor]:
    """Gaussian moments of equal shape (N,), (N, D) or (S, N, D) as (S, N, D), variance finite and positive."""
    mean, variance = tensor(mean, "mean"), tensor(variance, "variance")
    rank(mean, "mean", (1, 2, 3))
    if mean.shape != variance.shape:
        raise ShapeError(f"mean has shape {tuple(mean.shape)}, variance {tuple(variance.shape)}; both must be equal")
    not_empty(mean, "mean")
    finite(mean, "mean")
    finite(variance, "variance")
    bad = variance <= 0
    if bool(bad.any()):
        raise_at(bad, variance, "variance", "are not positive; a density needs noise (variance, not log-variance)")
    mean, variance = (v if v.is_floating_point() else v.to(torch.float32) for v in (mean, variance))
    if mean.dim() == 1:
        mean, variance = mean[:, None], variance[:, None]
    return (mean[None], variance[None]) if mean.dim() == 2 else (mean, variance)


def real_targets(value: Any, shape: tuple[int, ...], name: str = "targets") -> Tensor:
    """Finite targets of exactly `shape`."""
    value = tensor(value, name)
    if tuple(value.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, the forecasts need {shape}; nothing is broadcast")
    not_empty(value, name)
    finite(value, name)
    return value


def example_weights(value: Any, num_examples: int) -> Tensor | None:
    """Weights (N,) or (R, N) as float64, non-negative, finite, no row all zero; None stays None."""
    if value is None:
        return None
    value = tensor(value, "weights")
    if value.dim() not in (1, 2) or value.shape[-1] != num_examples or value.shape[0] == 0:
        raise ShapeError(f"weights has shape {tuple(value.shape)}, expected ({num_examples},) or (R, {num_examples})")
    value = wide(value)
    # One reduction decides the common case: a NaN makes it NaN and fails the comparison.
    if not bool(value.amin() >= 0):
        raise_at(~(value >= 0), value, "weights", "are negative or NaN")
    totals = value.sum(-1)
    finite(totals, "sum of weights")
    if not bool((totals > 0).all()):
        raise ArgumentError("weights: all weights are zero" + (" in at least one row" if value.dim() == 2 else ""))
    return value


def member_weights(value: Any, num_members: int) -> Tensor | None:
    """Weights (S,) of members, scaled to sum to 1; None when absent or all equal."""
    if value is None:
        return None
    value = tensor(value, "member_weights")
    if tuple(value.shape) != (num_members,):
        raise ShapeError(f"member_weights has shape {tuple(value.shape)}, expected ({num_members},)")
    value = wide(value)
    finite(value, "member_weights")
    if bool((value < 0).any()) or float(value.sum()) <= 0:
        raise ArgumentError("member_weights must be non-negative and not all zero")
    return None if bool((value == value[0]).all()) else value / value.sum()


Backend = Literal["torch", "netcal"]


def other_backend(backend: str, weights: Any) -> bool:
    """Whether netcal computes a calibration error.

    Raises:
        UnknownNameError: no such backend. UnsupportedError: weights, which netcal does not take.
    """
    if backend not in ("torch", "netcal"):
        raise UnknownNameError(f"backend={backend!r} is unknown; available: torch, netcal")
    if backend == "netcal" and weights is not None:
        raise UnsupportedError('backend="netcal" takes no weights; backend="torch" does')
    return backend == "netcal"


def bin_count(value: Any) -> int:
    """Number of bins, an integer >= 1 (numpy integers too)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ArgumentError(f"bins={value!r}: expected an integer of at least 1")
    return int(value)


def fraction(value: Any, name: str, *, closed: bool = False) -> float:
    """A number in (0, 1), or in [0, 1] if `closed`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ArgumentError(f"{name}={value!r}: expected a number between 0 and 1")
    number = float(value)
    if not (0 <= number <= 1) or (not closed and number in (0.0, 1.0)):
        raise ArgumentError(
            f"{name}={value!r}: expected a number {'from 0 to 1' if closed else 'strictly between 0 and 1'}"
        )
    return number


def two_classes(positive: int, negative: int, metric: str) -> None:
    """Raise when one of the two groups that a ranking metric separates is empty."""
    if positive == 0 or negative == 0:
        raise UndefinedError(
            f"{metric} needs both classes: {positive} positive and {negative} negative examples", "one class"
        )


def _raw(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        # Through numpy, because torch would round a list of Python floats to its default dtype.
        try:
            if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
                raise ArgumentError(f"{name}: {int(value.mask.sum())} values are masked; leave those examples out")
            array = np.asarray(value)
        except ValueError as error:
            raise ArgumentError(f"{name}: nested lists of unequal length are no array ({error})") from error
        if array.dtype == object or array.dtype.kind not in "biuf":
            raise ArgumentError(
                f"{name}: expected a tensor, an array or nested lists of numbers, got {type(value).__name__} of dtype "
                f"{array.dtype}"
            )
        if (array.dtype.kind == "f" and array.dtype.itemsize > 8) or array.dtype.byteorder == ">":
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        value = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    if value.is_complex():
        raise ArgumentError(f"{name}: complex numbers have no meaning here, got dtype {value.dtype}")
    if value.layout != torch.strided or value.is_meta:
        raise ArgumentError(f"{name}: expected a dense tensor that holds values, got {value.layout} on {value.device}")
    if value.is_floating_point() and value.dtype.itemsize == 1:  # float8 has no arithmetic
        value = value.float()
    return value.detach()


def raise_at(bad: Tensor, value: Tensor, name: str, what: str) -> None:
    """Raise for the values marked in `bad`: how many, and the first with its index."""
    at = tuple(int(i) for i in bad.nonzero()[0])
    message = (
        f"{name}: {int(bad.sum())} of {bad.numel()} values {what}; the first is {float(value[at]):g} at index {at}"
    )
    if not bool(torch.isfinite(value).all()) and not math.isfinite(float(value[at])):
        raise NonFiniteError(message)
    raise ArgumentError(message)
