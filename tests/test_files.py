"""Files: whatever is wrong with one, the answer is a `FileFormatError`."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Distribution, StudentT

import bayesdl as bdl
from bayesdl import tensorfile
from bayesdl.errors import FileFormatError
from tests.test_clone import X, mlp

NET = mlp()
OTHER = mlp(1)
Y = torch.tensor([0, 1, 2, 0, 1])
METHODS: dict[str, Callable[[], bdl.BayesianModel]] = {
    "ensemble": lambda: bdl.wrap([NET, OTHER], "ensemble", likelihood="categorical"),
    "laplace": lambda: bdl.wrap(NET, "laplace", [(X, Y)], likelihood="categorical", progress=False),
    "temperature": lambda: bdl.wrap(NET, bdl.Temperature(temperature=2.0), likelihood="categorical"),
    "dropout": lambda: bdl.wrap(NET, "dropout", likelihood="categorical"),
}


@pytest.fixture(params=METHODS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "b.safetensors"
    METHODS[request.param]().save(path)
    assert bdl.load(path, NET)(X).probs.shape == (5, 3)
    return path


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(FileFormatError, match=message):
        bdl.load(path, NET, **options)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[tensorfile.KEY]), {
            name: file.get_tensor(name).clone() for name in file.keys()
        }


def rewrite(path: Path, header: Any, tensors: dict[str, Tensor], sign: bool = True) -> None:
    """Write a header, with a checksum that fits: what is left to notice is the header itself."""
    if sign and isinstance(header, dict):
        header.pop(tensorfile.DIGEST, None)
        header[tensorfile.DIGEST] = tensorfile.checksum(header, tensors)
    save_file(tensors, path, {tensorfile.KEY: json.dumps(header)})


def test_every_truncation(saved: Path) -> None:
    whole = saved.read_bytes()
    for keep in {0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1}:
        saved.write_bytes(whole[:keep])
        refused(saved, "not a bayesdl file, or it is damaged|is damaged")


def test_every_flipped_byte(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    step = max(1, len(whole) // 300)
    for place in range(0, len(whole), step):
        damaged = bytearray(whole)
        damaged[place] ^= 0x15
        saved.write_bytes(damaged)
        try:
            bdl.load(saved, NET)
        except FileFormatError:
            continue
        # the only bytes that may change unnoticed are JSON's own white space and the padding behind it
        header, tensors = contents(saved)
        saved.write_bytes(whole)
        assert (header, list(tensors)) == (contents(saved)[0], list(contents(saved)[1]))
        assert all(torch.equal(tensors[k], v) for k, v in contents(saved)[1].items())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"noise",
        struct.pack("<Q", 2**62) + b"{}",  # a header longer than any file
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["empty", "noise", "huge", "bare", "binary", "nested"],
)
def test_hostile_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(data)
    refused(path, "not a bayesdl file, or it is damaged")


def test_files_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    refused(path, "not a bayesdl file")
    for text in ("[1, 2]", '"text"', "7", "null", "{", "{}", "[" * 100_000):
        save_file({"weight": torch.ones(2)}, path, {tensorfile.KEY: text})
        refused(path, "not a bayesdl file")
    refused(tmp_path / "absent.safetensors", "does not exist")
    refused(tmp_path, "does not exist")


def test_other_versions(saved: Path) -> None:
    header, tensors = contents(saved)
    for version in (0, 2, "1", None, [1]):
        rewrite(saved, {**header, "format": version}, tensors)
        refused(saved, r"format version .*; this library reads version 1")


def test_every_missing_tensor(saved: Path) -> None:
    header, tensors = contents(saved)
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        rewrite(saved, dict(header), rest, sign=False)
        refused(saved, "do not match their checksum|damaged")


def test_tensors_of_another_shape_or_value(saved: Path) -> None:
    header, tensors = contents(saved)
    name, value = next(iter(tensors.items()))
    for changed in (value + 1, value.double() if value.dtype != torch.float64 else value.float(), value.reshape(-1, 1)):
        rewrite(saved, dict(header), {**tensors, name: changed.contiguous()}, sign=False)
        refused(saved, "do not match their checksum")
    rewrite(saved, dict(header), {**tensors, "extra": torch.ones(1)}, sign=False)
    refused(saved, "do not match their checksum")


HOSTILE = [None, 3, -1, 2.5, "x", "", [], [[]], [None], ["a"], {}, {"a": 1}, [1, 2, 3], True, 10**400, float("nan")]


def test_every_entry_of_the_header_made_hostile(saved: Path) -> None:
    """With a checksum that fits, so that it is the reader of each entry that has to hold."""
    header, tensors = contents(saved)
    before = bdl.load(saved, NET)(X).probs
    for key in [k for k in header if k != tensorfile.DIGEST]:
        rewrite(saved, {k: v for k, v in header.items() if k != key}, tensors)
        if key != "torch":
            refused(saved, "is damaged|not a bayesdl file")
        for value in HOSTILE:
            rewrite(saved, {**header, key: value}, tensors)
            try:
                found = bdl.load(saved, NET)(X).probs
            except FileFormatError:
                continue
            # what is accepted is words about the model, not the model
            assert torch.equal(found, before) or key in ("likelihood_config", "config"), (key, value)


def test_every_entry_of_the_posterior_made_hostile(saved: Path) -> None:
    header, tensors = contents(saved)
    for key in header["config"]:
        for value in HOSTILE:
            rewrite(saved, {**header, "config": {**header["config"], key: value}}, tensors)
            try:
                bdl.load(saved, NET)
            except FileFormatError:
                continue


def test_every_tensor_of_the_posterior_made_hostile(saved: Path) -> None:
    header, tensors = contents(saved)
    for name, value in tensors.items():
        for wrong in (torch.zeros(0), torch.full((3, 3), torch.nan), value.reshape(-1)[:1].clone()):
            rewrite(saved, dict(header), {**tensors, name: wrong})
            try:
                bdl.load(saved, NET)
            except FileFormatError:
                continue


def test_other_networks(saved: Path) -> None:
    with pytest.raises(FileFormatError, match="saved for a network with other weights"):
        bdl.load(saved, OTHER)
    with pytest.raises(FileFormatError, match="saved for a network with other weights"):
        bdl.load(saved, torch.nn.Linear(4, 3))
    moved = mlp()
    moved[1].running_mean.add_(1.0)  # a statistic is part of the network
    with pytest.raises(FileFormatError, match="saved for a network with other weights"):
        bdl.load(saved, moved)


def test_wrapped_networks_load_what_plain_ones_saved(saved: Path) -> None:
    expected = bdl.load(saved, NET)(X).probs
    part = torch.nn.Sequential(torch.compile(NET[0], backend="eager"), *list(NET)[1:])
    for net in (torch.compile(NET, backend="eager"), torch.nn.DataParallel(NET), part):
        assert torch.equal(bdl.load(saved, net)(X).probs, expected)


def test_selections_survive(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    select = ["4", "0.bias"]
    bayes = bdl.wrap(NET, "laplace", [(X, Y)], likelihood="categorical", select=select, progress=False)
    bayes.save(path)
    again = bdl.load(path, NET)
    assert again.network.names == bayes.network.names == ("0.bias", "4.weight", "4.bias")
    assert again.network.select == "4,0.bias"


@dataclass(frozen=True)
class Robust(bdl.Likelihood):
    name: ClassVar[str] = "robust"

    def distribution(self, f: Tensor) -> Distribution:
        return StudentT(5.0, f, 1.0)


def test_likelihoods_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    bdl.wrap(NET, "dropout", likelihood=Robust()).save(path)
    refused(path, "holds the likelihood 'robust', which is not one of the library's: pass likelihood=")
    assert bdl.load(path, NET, likelihood=Robust()).likelihood == Robust()


def test_likelihoods_that_are_no_json(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd(Robust):
        def config(self) -> dict[str, object]:
            return {"set": {1, 2}}

    path = tmp_path / "b.safetensors"
    with pytest.raises(FileFormatError, match="cannot be described in JSON"):
        bdl.wrap(NET, "dropout", likelihood=Odd()).save(path)
    assert list(tmp_path.iterdir()) == []


def test_permissions_follow_the_users_own(tmp_path: Path) -> None:
    METHODS["dropout"]().save(tmp_path / "b.safetensors")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_checksum_covers_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3)}
    other = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.ones(2, 3)},
        {},
    ]
    digests = {tensorfile.checksum({"k": 1}, tensors) for tensors in [base, *other]}
    digests.add(tensorfile.checksum({"k": 2}, base))
    assert len(digests) == 7
    assert all(len(d) == len(hashlib.sha256().hexdigest()) for d in digests)


def test_a_fingerprint_of_every_dtype(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2).to(torch.bfloat16)
    net.register_buffer("flags", torch.tensor([True, False]))
    net.register_buffer("count", torch.tensor(3))
    bdl.wrap(net, bdl.Temperature(temperature=2.0), likelihood="categorical").save(tmp_path / "b")
    assert bdl.load(tmp_path / "b", net)(torch.ones(1, 2)).probs.shape == (1, 2)
