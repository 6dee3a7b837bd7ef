"""Named errors: each says what was given, what was expected and what to do.

Every class also derives from the built-in exception that a caller would catch anyway.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


class BayesDLError(Exception):
    """Base of every error that the library raises on purpose."""


class ShapeError(BayesDLError, ValueError):
    """Two shapes that must agree do not."""


class LabelError(BayesDLError, ValueError):
    """A target lies outside what the likelihood can score."""


class NonFiniteError(BayesDLError, ValueError):
    """NaN or infinity in data, outputs, loss or curvature; the message names the first place."""


class ArgumentError(BayesDLError, ValueError):
    """An argument has a value that is not accepted."""


class UnknownNameError(BayesDLError, KeyError):
    """A registry has no entry of that name."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class SelectionError(BayesDLError, ValueError):
    """A selection of parameters is empty or cannot be resolved."""


class UnreachedParameterError(BayesDLError, RuntimeError):
    """A selected parameter has no influence on the network's outputs."""


class UnsupportedError(BayesDLError, ValueError):
    """A combination that the mathematics or the implementation does not allow."""


class NumericalError(BayesDLError, RuntimeError):
    """A decomposition failed although its input was finite."""


class DistributedError(BayesDLError, RuntimeError):
    """Another process of the group failed, so that this one cannot go on."""


class NotFittedError(BayesDLError, RuntimeError):
    """Something was asked of a method before it was fitted."""


class StaleModelError(BayesDLError, RuntimeError):
    """The wrapped network's parameters were written to after the fit."""


class StepSizeError(BayesDLError, ValueError):
    """A step is too large for the scheme; the message holds the largest admissible learning rate."""


class LossScaleError(BayesDLError, ValueError):
    """A loss is summed over the batch where its mean is needed."""


class FileFormatError(BayesDLError, ValueError):
    """A file is not what the library wrote, or belongs to another network."""


class StaleAdapterError(FileFormatError):
    """A file belongs to another adapter than the model holds, or to the same one before it was trained on."""


class MissingDependencyError(BayesDLError, ImportError):
    """An optional package is absent; the message holds the line to type."""


def require(module: str, *, extra: str | None = None) -> ModuleType:
    """Import an optional dependency, or raise the pip line that installs it.

    Args:
        module: importable name.
        extra: name of the bayesdl extra that brings it; None for a plain package.

    Raises:
        MissingDependencyError: the package is absent, or present but cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise MissingDependencyError(
                f"{module} is installed but needs {error.name}, which is not: pip install {error.name.split('.')[0]}"
            ) from error
        target = f'"bayesdl[{extra}]"' if extra else module.split(".")[0]
        raise MissingDependencyError(f"{module} is needed here and is not installed: pip install {target}") from error
    except (ImportError, RuntimeError) as error:
        if "torchvision::nms" in str(error):
            raise MissingDependencyError(
                f"{module} is installed but its torchvision does not match this torch: pip uninstall torchvision"
            ) from error
        raise MissingDependencyError(f"{module} is installed but cannot be imported: {error}") from error


def as_numbers(value: object, what: str) -> Tensor:
    """`value` as a float64 tensor. Raises `ArgumentError` that names `what` where it holds no numbers."""
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{what}={value!r}; expected a number, or a vector of numbers") from error


def check_finite(value: Tensor, what: str) -> None:
    """Raise `NonFiniteError` that names `what` and the first bad index, if `value` holds NaN or infinity."""
    if value.dtype.is_floating_point and not torch.isfinite(value).all():
        bad = ~torch.isfinite(value)
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{what}: {int(bad.sum())} of {value.numel()} values are NaN or infinite, the first at index {first} "
            f"({float(value.detach()[first])})"
        )
