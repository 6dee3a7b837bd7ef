"""Reading loaders: counts, names of batches, partial passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bayesdl.data import batches, declared_size, in_batch
from bayesdl.errors import ArgumentError, BayesDLError, NonFiniteError, ShapeError
from bayesdl.network import Network

NETWORK = Network(nn.Linear(2, 2))
DATA = TensorDataset(torch.ones(10, 2), torch.zeros(10, dtype=torch.long))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2), 1)] * 5)


def read(data: Any, **options: Any) -> list[tuple[int, Any, Any]]:
    return list(batches(NETWORK, data, progress=False, **options))


def test_batches_are_numbered_from_zero() -> None:
    found = read(DataLoader(DATA, batch_size=4))
    assert [number for number, _, _ in found] == [0, 1, 2]
    assert [len(x) for _, x, _ in found] == [4, 4, 2]


def test_partial_passes() -> None:
    assert len(read(DataLoader(DATA, batch_size=4, drop_last=True))) == 2
    with pytest.raises(ArgumentError, match="yielded 8 examples and its data set holds 10.*drop_last=False"):
        read(DataLoader(DATA, batch_size=4, drop_last=True), allow_partial=False)
    assert len(read(DataLoader(DATA, batch_size=4), allow_partial=False)) == 3
    subset = DataLoader(DATA, batch_size=4, sampler=torch.utils.data.SubsetRandomSampler(range(6)))
    assert len(read(subset, allow_partial=False)) == 2  # the sampler is what was asked for


def test_sizes_where_the_loader_knows_them() -> None:
    assert declared_size(DataLoader(DATA)) == 10
    assert declared_size(DataLoader(Stream())) is None
    assert declared_size([(1, 2)]) is None
    assert len(read(DataLoader(Stream(), batch_size=2), allow_partial=False)) == 3


def test_inputs_that_are_not_finite_name_batch_and_index() -> None:
    x = torch.ones(3, 2)
    x[2, 1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"^batch 1: the inputs hold NaN or infinity, the first at index \(2, 1\)$"
    ):
        read([(torch.ones(3, 2), 0), (x, 0)])
    with pytest.raises(NonFiniteError, match="batch 0"):
        read([({"a": [torch.ones(3), x]}, torch.zeros(3))])


def test_targets_that_are_missing() -> None:
    with pytest.raises(ArgumentError, match="^batch 0: it holds no target"):
        read([torch.ones(2, 2)])
    assert read([torch.ones(2, 2)], need_targets=False)[0][2] is None


@pytest.mark.parametrize("data", [[], iter([])])
def test_no_batch(data: Any) -> None:
    with pytest.raises(ArgumentError, match="yields no batch"):
        read(data)


@pytest.mark.parametrize(
    ("data", "message"), [(torch.ones(3, 2), "a tensor was given"), (DATA, r"data set \(TensorDataset\)")]
)
def test_what_holds_no_batches(data: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read(data)


def test_inputs_whose_batch_axes_disagree() -> None:
    with pytest.raises(ShapeError, match=r"^batch 0: .*leading dimensions \[2, 3\]"):
        read([((torch.ones(2, 2), torch.ones(3, 2)), torch.zeros(2))])


def test_errors_keep_their_class_and_gain_the_batch() -> None:
    for kind in BayesDLError.__subclasses__():
        with pytest.raises(kind, match="batch 7: what"), in_batch(7):
            raise kind("what")
    with pytest.raises(KeyError, match="^'other'$"), in_batch(7):
        raise KeyError("other")


def test_progress_goes_to_the_error_stream_and_only_where_asked(capsys: Any) -> None:
    data: list[tuple[Tensor, Tensor]] = [(torch.ones(1, 2), torch.zeros(1))]
    read(data)
    assert capsys.readouterr() == ("", "")
    list(batches(NETWORK, data, progress=True, describe="reading"))
    out, err = capsys.readouterr()
    assert out == "" and "reading" in err
