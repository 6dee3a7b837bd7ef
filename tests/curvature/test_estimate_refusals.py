"""What `estimate` refuses, and that it says what, where and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import (
    ArgumentError,
    LabelError,
    NonFiniteError,
    ShapeError,
    UnknownNameError,
    UnreachedParameterError,
    UnsupportedError,
)
from tests.cases import real, targets
from tests.curvature.test_estimate import close, dense, problem


@pytest.fixture(params=sorted(STRUCTURES))
def structure(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach())


@pytest.mark.parametrize(("make", "name"), [(TwoHeads, "unused.weight"), (Detached, "first.weight")])
def test_an_unreached_parameter_is_an_error_by_name(make: type[nn.Module], name: str, structure: str) -> None:
    x, y = real(4)(torch.Generator()), targets("categorical")
    with pytest.raises(UnreachedParameterError, match=name):
        estimate(make().double(), [(x, y)], "categorical", structure=structure, progress=False)


def test_leaving_an_unreached_parameter_out_is_accepted() -> None:
    x, y = real(4)(torch.Generator()), targets("categorical")
    found = estimate(TwoHeads().double(), [(x, y)], "categorical", select="used", progress=False)
    assert found.layout.names == ("used.weight", "used.bias")


def test_a_partial_pass_is_an_error_unless_allowed() -> None:
    net, x, y, _ = problem("categorical")
    loader = DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True)
    with pytest.raises(ArgumentError, match="6 examples.*8.*drop_last"):
        estimate(net, loader, "categorical", progress=False)
    found = dense(net, loader, structure="full", allow_partial=True)
    close(found, dense(net, [(x[:6], y[:6])], structure="full"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [0, 1])
def test_bad_inputs_name_the_batch_and_the_place(bad: float, number: int) -> None:
    net, x, y, _ = problem("categorical")
    broken = x.clone()
    broken[2, 1] = bad
    data = [(x, y), (x, y)]
    data[number] = (broken, y)
    with pytest.raises(NonFiniteError, match=rf"batch {number}: the inputs.*\(2, 1\)"):
        estimate(net, data, "categorical", progress=False)


def test_weights_that_overflow_name_the_batch() -> None:
    net, x, y, _ = problem("categorical")
    with torch.no_grad():
        net[2].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="batch 0: the network's outputs"):
        estimate(net, [(x, y)], "categorical", progress=False)


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "text"),
    [
        ("categorical", torch.full((8,), 4), LabelError, r"batch 0: target 4 at index 0.*0\.\.3"),
        ("categorical", torch.zeros(8), LabelError, "float32"),
        ("categorical", torch.zeros(7, dtype=torch.long), ShapeError, r"\(7,\).*\(8,"),
        ("gaussian", torch.zeros(8, 3), ShapeError, r"\(8, 3\).*\(8, 4\)"),
        ("gaussian", torch.full((8, 4), float("nan")), NonFiniteError, r"\(0, 0\)"),
        ("bernoulli", torch.full((8, 4), 2.0), LabelError, "0 or 1"),
        ("poisson", torch.full((8, 4), -1.0), LabelError, "counts"),
        ("heteroscedastic", torch.zeros(8, 4), ShapeError, r"\(8, 2\)"),
    ],
)
def test_wrong_targets_name_the_batch(likelihood: str, y: Tensor, error: type[Exception], text: str) -> None:
    net, x, _, family = problem(likelihood)
    with pytest.raises(error, match=text) as caught:
        estimate(net, [(x, y)], family, progress=False)
    assert str(caught.value).startswith("batch 0")


def test_one_logit_is_not_a_class() -> None:
    net = nn.Linear(4, 1).double()
    with pytest.raises(ShapeError, match="bernoulli"):
        estimate(net, [(real(4)(torch.Generator()), targets("categorical"))], "categorical", progress=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"structure": "dense"}, UnknownNameError),
        ({"kind": "gauss"}, UnknownNameError),
        ({"kind": "hessian"}, UnsupportedError),
        ({"kind": "mc", "samples": 0}, ArgumentError),
        ({"bias": "none"}, ArgumentError),
    ],
)
def test_unknown_options_are_named(options: dict[str, Any], error: type[Exception]) -> None:
    net, x, y, _ = problem("categorical")
    with pytest.raises(error, match=str(next(iter(options.values()))) if "samples" not in options else "samples=0"):
        estimate(net, [(x, y)], "categorical", progress=False, **options)


@pytest.mark.parametrize("data", [[], [(torch.zeros(2, 4),)]])
def test_no_data_or_no_target(data: list[Any]) -> None:
    net, *_ = problem("categorical")
    with pytest.raises(ArgumentError, match="no batch|no target"):
        estimate(net, data, "categorical", progress=False)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head(h - h.mean(0))


def test_a_network_that_mixes_examples_is_refused() -> None:
    x, y = real(4)(torch.Generator().manual_seed(0)), targets("categorical")
    with pytest.raises(UnsupportedError, match="other examples"):
        estimate(Centred().double(), [(x, y)], "categorical", progress=False)
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(UnsupportedError, match="other examples"):
        estimate(norm, [(x, y)], "categorical", progress=False)


class Noisy(nn.Module):
    """Dropout that stays on in eval mode."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.head, self.form = nn.Linear(4, 4), nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.form == "dropout":
            h = nn.functional.dropout(h, 0.5)
        if self.form == "noise":
            h = h + 0.01 * torch.randn_like(h)
        return self.head(h)


@pytest.mark.parametrize("form", ["dropout", "noise"])
def test_randomness_that_stays_on_in_eval_mode_is_refused(form: str) -> None:
    x, y = real(4)(torch.Generator().manual_seed(0)), targets("categorical")
    with pytest.raises(UnsupportedError, match="two forward passes on the same inputs.*eval mode"):
        estimate(Noisy(form).double(), [(x, y)], "categorical", progress=False)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    before = net[1].running_mean.clone()
    first, again = (estimate(net, [(x, y)], "categorical", progress=False).to_dense() for _ in range(2))
    assert torch.equal(first, again) and net.training and torch.equal(net[1].running_mean, before)
    assert torch.equal(first, estimate(net.eval(), [(x, y)], "categorical", progress=False).to_dense())


def test_a_network_that_refuses_single_examples_is_refused_where_it_has_no_closed_form() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.head = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 2:
                raise ValueError("I want company")
            return self.head(x @ self.gain)

    x, y = real(4)(torch.Generator().manual_seed(0)), targets("categorical")
    with pytest.raises(UnsupportedError, match="'gain' need the network to run on one example alone.*I want company"):
        estimate(Several().double(), [(x, y)], "categorical", progress=False)


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": -1}, {"dtype": torch.float16}, {"dtype": torch.int64}])
def test_numbers_that_mean_nothing(options: dict[str, Any]) -> None:
    net, x, y, family = problem("categorical")
    with pytest.raises(ArgumentError, match=f"^(batch 0: )?{next(iter(options))}="):
        estimate(net, [(x, y)], family, progress=False, **options)


def test_an_empty_batch_is_named() -> None:
    net, x, y, family = problem("categorical")
    for loader, number in (([(x[:0], y[:0]), (x, y)], 0), ([(x, y), (x[:0], y[:0])], 1)):
        with pytest.raises(ShapeError, match=f"batch {number}: the batch is empty"):
            estimate(net, loader, family, progress=False)


def test_rows_of_outputs_that_are_no_examples() -> None:
    x, y = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.long)
    net = nn.Sequential(nn.Linear(5, 2), nn.Flatten(0, 1))
    with pytest.raises(ShapeError, match="6 rows of outputs for 2 examples"):
        estimate(net, [(x, y)], "categorical", progress=False)


def test_inputs_of_another_rank_at_prediction() -> None:
    x, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
    bayes = bdl.wrap(nn.Linear(5, 2), "laplace", [(x, y)], likelihood="categorical", progress=False)
    with pytest.raises(ShapeError, match="2 rows of outputs for 5 examples"):
        bayes(x[0])
    with pytest.raises(ShapeError, match=r"\(1, 4, 2\)"):
        bayes(x.unsqueeze(0))
