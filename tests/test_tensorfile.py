"""Files of tensors: what safetensors itself reads from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from bayesdl.errors import FileFormatError
from bayesdl.tensorfile import read_described, write_described, write_tensors

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64),  # the last is written by safetensors
)


@pytest.mark.parametrize("plain", [True, False])
def test_every_dtype_and_shape(plain: bool, tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (0,), (2, 3), (2, 0, 3), (1, 1, 5)]
    tensors = {
        f"{dtype} {shape} \u03b8": (torch.randn(shape, generator=source) * 9).to(dtype)
        for dtype in (DTYPES[:-1] if plain else DTYPES)
        for shape in shapes
    }
    try:
        write_tensors(tmp_path / "a", tensors, {"key": '"\u00e4"'})
    except FileFormatError as error:
        assert "pip install -U safetensors" in str(error) and not plain
        pytest.skip("an older safetensors knows no complex numbers")
    for found in (load_file(tmp_path / "a"), load((tmp_path / "a").read_bytes())):
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].dtype is value.dtype and torch.equal(found[name], value), name
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"key": '"\u00e4"'}


def test_what_was_read_and_checked_no_longer_depends_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_described(path, {"x": 1}, {"t": torch.ones(1000)})
    found = read_described(path)[1]["t"]
    size = path.stat().st_size
    with open(path, "r+b") as file:  # in place, as `cp` does, not by a rename
        file.write(bytes(size))
    assert torch.equal(found, torch.ones(1000))


def test_views_and_tensors_in_one_memory(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"t": whole.T, "row": whole[1], "same": whole, "every": whole[:, ::2], "p": torch.nn.Parameter(whole)}
    digest = write_described(tmp_path / "a", {"x": 1}, dict(tensors))
    header, found = read_described(tmp_path / "a")
    assert header["x"] == 1 and len(digest) == 64
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
