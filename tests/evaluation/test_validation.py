"""The table of accepted and refused input; a refusal names what was wrong and where."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError
from bayesdl.evaluation import validation as val


@pytest.mark.parametrize("value", [[0.25, 0.75], (0.25, 0.75), np.array([0.25, 0.75]), torch.tensor([0.25, 0.75])])
def test_lists_arrays_and_tensors(value: object) -> None:
    assert val.tensor(value, "x").tolist() == [0.25, 0.75]


def test_lists_of_floats_keep_their_digits_and_arrays_their_memory() -> None:
    assert val.tensor([0.1, 1], "x").dtype == torch.float64
    assert val.tensor(np.zeros(2, dtype=np.float32), "x").dtype == torch.float32
    array = np.zeros(3)
    val.tensor(array, "x")[0] = 5.0
    assert array[0] == 5.0
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    val.tensor(read_only, "x")[0] = 5.0
    assert read_only[0] == 0.0
    assert val.tensor(np.arange(4)[::-2], "x").tolist() == [3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_promoted(dtype: torch.dtype) -> None:
    assert val.tensor(torch.zeros(2, dtype=dtype), "x").dtype == torch.float32
    assert val.tensor(np.zeros(2, dtype=np.float16), "x").dtype == torch.float32


@pytest.mark.parametrize("value", [["a"], [[1.0], [1.0, 2.0]], None, object(), [1j], torch.tensor([1j])])
def test_what_is_no_array_of_numbers(value: object) -> None:
    with pytest.raises(ArgumentError, match="x: "):
        val.tensor(value, "x")


@pytest.mark.parametrize(
    ("dtype", "fine", "off"),
    [(torch.float64, 1e-9, 1e-7), (torch.float32, 5e-5, 5e-4), (torch.float16, 5e-4, 4e-3)],
)
def test_row_sums_by_precision(dtype: torch.dtype, fine: float, off: float) -> None:
    val.probabilities(torch.tensor([[0.5, 0.5 - fine]], dtype=torch.float64).to(dtype))
    with pytest.raises(ArgumentError, match="did you pass logits"):
        val.probabilities(torch.tensor([[0.5, 0.5 - off]], dtype=torch.float64).to(dtype))


def test_non_finite_values_are_counted_and_placed() -> None:
    with pytest.raises(
        NonFiniteError, match=r"p: 2 of 4 values are NaN or infinite; the first is nan at index \(0, 1\)"
    ):
        val.finite(torch.tensor([[0.0, math.nan], [math.inf, 1.0]]), "p")


def test_log_probabilities_may_be_minus_infinity_and_nothing_worse() -> None:
    val.log_probabilities(torch.tensor([[[0.0, -math.inf]]]))
    for bad in (math.nan, math.inf, 0.5):
        with pytest.raises(ValueError, match="NaN or above 0"):
            val.log_probabilities(torch.tensor([[[0.0, bad]]]))
    with pytest.raises(ValueError, match="row sums"):
        val.log_probabilities(torch.tensor([[[-1.0, -1.0]]]))


def test_exactly_one_forecast() -> None:
    assert val.exactly_one(probs=1, logits=None) == "probs"
    for both in ({"probs": 1, "logits": 1}, {"probs": None, "logits": None}):
        with pytest.raises(TypeError, match="exactly one of probs= and logits="):
            val.exactly_one(**both)


def test_labels() -> None:
    assert val.labels([0, 2], 2, 3).dtype == torch.int64
    assert val.labels([1.0, 0.0], 2, 2, cast=True).tolist() == [1, 0]
    assert val.labels([True, False], 2, 2).tolist() == [1, 0]
    assert val.labels(np.array([1], dtype=np.uint8), 1, 2).tolist() == [1]
    with pytest.raises(LabelError, match=r"outside \[0, 2\], the first is 3 at index 1"):
        val.labels([0, 3], 2, 3)
    with pytest.raises(LabelError, match="cast=True"):
        val.labels([1.0], 1, 2)
    with pytest.raises(LabelError):
        val.labels([0.5], 1, 2, cast=True)
    with pytest.raises(ShapeError, match=r"\(1, 1\).*\(1,\)"):
        val.labels([[1]], 1, 2)


def test_ignored_rows() -> None:
    assert val.keep_rows([1, -100], None) is None
    keep = val.keep_rows([1, -100], -100)
    assert keep is not None and keep.tolist() == [True, False]
    with pytest.raises(val.UndefinedError) as caught:
        val.keep_rows([-100, -100], -100)
    assert caught.value.reason == "0 samples"


def test_weights() -> None:
    assert val.example_weights(None, 3) is None
    found = val.example_weights([1, 2, 3], 3)
    assert found is not None and found.dtype == torch.float64
    for bad, message in (
        ([1.0, -1.0], "negative"),
        ([math.nan, 1.0], "negative or NaN"),
        ([math.inf, 1.0], "infinite"),
        ([0.0, 0.0], "all weights are zero"),
        ([[1.0, 1.0], [0.0, 0.0]], "at least one row"),
        ([1.0], r"\(1,\)"),
        ([[[1.0, 1.0]]], "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            val.example_weights(bad, 2)


def test_member_weights_are_scaled_and_equal_ones_are_none() -> None:
    found = val.member_weights([1.0, 3.0], 2)
    assert found is not None and found.tolist() == [0.25, 0.75]
    assert val.member_weights([2.0, 2.0], 2) is None


def test_numbers() -> None:
    assert val.bin_count(np.int32(4)) == 4
    assert val.fraction(np.float32(0.5), "level") == 0.5
    assert val.fraction(1, "level", closed=True) == 1.0
    for bad in (0, 2.0, True, None):
        with pytest.raises(ArgumentError, match="bins="):
            val.bin_count(bad)
    for bad in (-0.1, 1.1, 0, 1, math.nan, None):
        with pytest.raises(ArgumentError, match="level="):
            val.fraction(bad, "level")


def test_checks_survive_optimised_python() -> None:
    code = (
        "from bayesdl.evaluation import ece\n"
        "try:\n    ece([5], probs=[[0.5, 0.5]])\nexcept ValueError:\n    raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-O", "-c", code], check=False).returncode == 7


def test_importing_evaluation_is_light() -> None:
    code = (
        "import sys, bayesdl.evaluation\n"
        "heavy = {'sklearn', 'scipy', 'matplotlib', 'rich', 'netcal', 'pyro', 'pandas', 'scoringrules'}\n"
        "raise SystemExit(len(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
