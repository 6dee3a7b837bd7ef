"""Reading loaders: counts, names of batches, partial passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import bayesdl as bdl
from bayesdl.data import (
    batches,
    check_rereadable,
    declared_size,
    in_batch,
    keeps_order,
    peek,
    warn_if_unsteady,
)
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


class Augmented(Dataset):
    """Flips every second time, on average."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.tensor([float(index), 1.0])
        return (x.flip(0) if torch.rand(()) < 0.5 else x), index % 2


def test_random_augmentation_is_noticed_where_the_loader_shuffles() -> None:
    """Three examples are read three times: one flip in two escapes with probability 1/64; the seed is fixed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match=r"the loader is random: its example \d differed.*augmentation off"):
            warn_if_unsteady(loader)
        assert torch.equal(torch.get_rng_state(), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steady in (
            DataLoader(DATA, batch_size=4, shuffle=True),
            DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1),  # not to be read before its workers
            DataLoader(Augmented(), batch_size=4),  # compared while it is read
            DataLoader(Stream()),
            [(torch.ones(1, 2), 0)],
        ):
            warn_if_unsteady(steady)


def test_random_augmentation_is_noticed_where_the_order_is_kept() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loader = DataLoader(Augmented(), batch_size=5)
        first = next(iter(loader))[0]
        with pytest.warns(UserWarning, match="its first batch differed between two passes"):
            read(loader, example=first)
    steady = DataLoader(DATA, batch_size=4)
    assert len(read(steady, example=next(iter(steady))[0])) == 3
    shuffled = DataLoader(DATA, batch_size=4, shuffle=True)
    assert len(read(shuffled, example=torch.full((4, 2), 7.0))) == 3


def test_drawing_with_replacement_is_noticed() -> None:
    for sampler in (RandomSampler(DATA, replacement=True), WeightedRandomSampler([1.0] * 10, 10)):
        with pytest.warns(UserWarning, match="with replacement.*every example once"):
            warn_if_unsteady(DataLoader(DATA, batch_size=4, sampler=sampler))


def test_which_loaders_keep_their_order() -> None:
    assert keeps_order(DataLoader(DATA, batch_size=2)) and keeps_order(DataLoader(DATA, batch_size=None))
    assert keeps_order(DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0)))  # until somebody sets the epoch
    assert not keeps_order(DataLoader(DATA, shuffle=True))
    assert not keeps_order(DataLoader(DATA, batch_sampler=[[0, 1], [2]]))
    assert not keeps_order([(1, 2)])


class Endless:
    """Promises three batches and never stops."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(2, 2), torch.zeros(2)


def test_loaders_without_end_stop_at_what_they_promise() -> None:
    with pytest.raises(ArgumentError, match=r"more batches than its length promises \(3\): has it no end"):
        read(Endless())


def test_peeking_loses_nothing() -> None:
    pairs = [(torch.full((1, 2), float(i)), torch.zeros(1)) for i in range(3)]
    for source in (pairs, iter(pairs), (pair for pair in pairs)):
        whole, first = peek(source)
        assert first is pairs[0]
        assert [int(x[0, 0]) for _, x, _ in read(whole)] == [0, 1, 2]
    with pytest.raises(ArgumentError, match="yields no batch"):
        peek(iter([]))
    with pytest.raises(ArgumentError, match="single examples"):
        peek(DATA)


def test_what_can_be_read_once() -> None:
    check_rereadable("data", None)
    check_rereadable("data", [1])
    with pytest.raises(ArgumentError, match="^data is a generator that can be read once"):
        check_rereadable("data", (pair for pair in ()))


def test_a_fit_on_a_random_loader_warns() -> None:
    for loader in (DataLoader(Augmented(), batch_size=10), DataLoader(Augmented(), batch_size=10, shuffle=True)):
        with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning, match="the loader is random"):
            torch.manual_seed(1)
            bdl.curvature.estimate(nn.Linear(2, 2), loader, "categorical", progress=False)
