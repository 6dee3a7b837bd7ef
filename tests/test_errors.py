"""Error classes derive from what a caller would catch; optional imports give the line to type."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from bayesdl import errors

TABLE: dict[str, type[Exception]] = {
    "ArgumentError": ValueError,
    "DistributedError": RuntimeError,
    "FileFormatError": ValueError,
    "LabelError": ValueError,
    "LossScaleError": ValueError,
    "MissingDependencyError": ImportError,
    "NonFiniteError": ValueError,
    "NotFittedError": RuntimeError,
    "NumericalError": RuntimeError,
    "SelectionError": ValueError,
    "ShapeError": ValueError,
    "StaleAdapterError": ValueError,
    "StaleModelError": RuntimeError,
    "StepSizeError": ValueError,
    "UnknownNameError": KeyError,
    "UnreachedParameterError": RuntimeError,
    "UnsupportedError": ValueError,
}


def test_the_table_is_complete() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert found == {*TABLE, "BayesDLError"}


@pytest.mark.parametrize("name", TABLE)
def test_each_error_is_also_a_built_in(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.BayesDLError) and issubclass(kind, TABLE[name])
    assert kind.__doc__
    assert str(kind("what was given")) == "what was given"  # not its repr, as a KeyError would print
    with pytest.raises(TABLE[name], match="^what was given$"):
        raise kind("what was given")


def test_a_package_that_is_absent() -> None:
    with pytest.raises(ImportError, match="^surely_absent is needed here and is not installed: pip install surely_abs"):
        errors.require("surely_absent")
    with pytest.raises(errors.MissingDependencyError, match=r'pip install "bayesdl\[laplace\]"'):
        errors.require("surely_absent.inner", extra="laplace")


def test_a_package_that_is_present() -> None:
    assert errors.require("json") is sys.modules["json"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import surely_absent",
            "broken is installed but needs surely_absent, which is not: pip install surely_absent",
        ),
        ("raise ImportError('half of it')", "broken is installed but cannot be imported: half of it"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "pip uninstall torchvision"),
        ("raise RuntimeError('other')", "broken is installed but cannot be imported: other"),
    ],
)
def test_a_package_that_is_broken(source: str, message: str, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "broken.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.MissingDependencyError, match=message):
        errors.require("broken")
    assert not isinstance(sys.modules.get("broken"), types.ModuleType)


def test_check_finite() -> None:
    errors.check_finite(torch.tensor([1, 2]), "counts")
    errors.check_finite(torch.ones(2, 2), "values")
    value = torch.ones(2, 3)
    value[1, 2], value[1, 1] = torch.nan, -torch.inf
    with pytest.raises(errors.NonFiniteError, match=r"^values: 2 of 6 .* first at index \(1, 1\) \(-inf\)$"):
        errors.check_finite(value, "values")
    with pytest.raises(errors.NonFiniteError, match=r"index \(\) \(nan\)"):
        errors.check_finite(torch.tensor(torch.nan), "loss")
