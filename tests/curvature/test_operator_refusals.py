"""What curvature operators refuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bayesdl.curvature import estimate, operator
from bayesdl.errors import (
    ArgumentError,
    LabelError,
    NonFiniteError,
    NumericalError,
    ShapeError,
    StaleModelError,
    UnknownNameError,
    UnsupportedError,
)
from tests.cases import BY_NAME, mlp, real, targets
from tests.curvature.test_operators import close, made, random, truth


class Changing:
    """A loader whose inputs differ from pass to pass."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.passes = x, y, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield self.x + 0.1 * self.passes, self.y


def test_passes_over_other_data_are_refused() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    found = operator(net, Changing(x, y), "categorical")
    with pytest.raises(ArgumentError, match="two passes of the loader differ.*augmentation"):
        found.matvec(random(found.shape[0]))


def test_a_shuffling_loader_is_refused_for_drawn_targets_alone() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = operator(net, loader, "categorical")
    v = random(found.shape[0])
    close(found @ v, truth("mlp", found.layout.names) @ v)
    drawn = operator(net, loader, "categorical", kind="mc")
    with pytest.raises(ArgumentError, match="differ in their order.*shuffle=False"):
        drawn.matvec(v)


def test_an_iterator_is_refused() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    with pytest.raises(ArgumentError, match="read once"):
        operator(net, iter([(x, y)]), "categorical")


def test_the_share_of_one_process_is_refused() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    data = TensorDataset(x, y)
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(UnsupportedError, match="share of its data.*distributed=True"):
        operator(net, loader, "categorical")


def test_bad_arguments_are_refused() -> None:
    found = made()
    size = found.shape[0]
    with pytest.raises(UnknownNameError, match="'exact' is not known.*hessian"):
        made(kind="exact")
    with pytest.raises(ShapeError, match=rf"\(3,\).*expected \({size},\)"):
        found.matvec(torch.ones(3))
    with pytest.raises(ShapeError, match=rf"expected \({size}, r\)"):
        found.matmat(torch.ones(3, 2))
    with pytest.raises(ShapeError, match="right-hand sides"):
        found.solve(torch.ones(3))
    with pytest.raises(NonFiniteError, match="directions"):
        found.matvec(torch.full((size,), torch.nan))
    with pytest.raises(ArgumentError, match="scale=0.0"):
        found.solve(torch.ones(size), 0.0)
    with pytest.raises(ArgumentError, match="prior precision must be positive"):
        found.solve(torch.ones(size), 1.0, -1.0)
    with pytest.raises(UnknownNameError, match="preconditioner 'ilu'"):
        found.solve(torch.ones(size), preconditioner="ilu")
    other = estimate(
        mlp().double(),
        [(real(4)(torch.Generator()), targets("categorical"))],
        "categorical",
        select="0",
        progress=False,
    )
    with pytest.raises(ArgumentError, match="expected those of this operator"):
        found.solve(torch.ones(size), preconditioner=other)


def test_bad_data_name_the_batch() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    broken = x.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"batch 1: the inputs.*\(2, 1\)"):
        operator(net, [(x, y), (broken, y)], "categorical")
    with pytest.raises(LabelError, match="batch 0"):
        operator(net, [(x, y + 5)], "categorical")
    loader = DataLoader(TensorDataset(x, y), 3, drop_last=True)
    with pytest.raises(ArgumentError, match="drop_last"):
        operator(net, loader, "categorical")
    assert operator(net, loader, "categorical", allow_partial=True).num_data == 6


def test_an_indefinite_hessian_is_refused_where_it_matters() -> None:
    found = made("mlp", "hessian")
    least = float(torch.linalg.eigvalsh(found.to_dense())[0])
    assert least < -0.1  # the weights are random
    b = random(found.shape[0])
    with pytest.raises(NumericalError, match=r"not positive definite.*kind=\"ggn\""):
        found.solve(b, 1.0, -0.5 * least)
    with pytest.raises(NumericalError, match="not positive definite"):
        found.logdet(1.0, -0.5 * least, num_probes=found.shape[0])
    found.solve(b, 1.0, -1.5 * least)


def test_training_on_is_noticed() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    for dtype in (None, torch.float32):  # the network's own memory, and a copy of it
        found = operator(net, [(x, y)], "categorical", dtype=dtype)
        with torch.no_grad():
            net[0].weight.add_(1.0)
        with pytest.raises(StaleModelError):
            found.matvec(random(found.shape[0]))
