"""Several structures from one pass are those of a pass each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.curvature import estimate, estimate_several
from bayesdl.errors import ArgumentError, UnsupportedError
from tests.curvature.test_estimate import close, problem
from tests.untouched import untouched

RECIPES = ("diag", "kron", "full", {"*": "diag"})


@pytest.mark.parametrize("kind", ["ggn", "mc", "empirical"])
@pytest.mark.parametrize("likelihood", ["categorical", "poisson"])
def test_equal_to_one_by_one(likelihood: str, kind: str) -> None:
    net, x, y, family = problem(likelihood)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    with untouched(net):
        found = estimate_several(net, loader, family, RECIPES, kind=kind, progress=False)
    for recipe, curvature in zip(RECIPES, found, strict=True):
        alone = estimate(net, loader, family, structure=recipe, kind=kind, progress=False)
        assert curvature.recipe == alone.recipe
        close(curvature.to_dense(), alone.to_dense())


@pytest.mark.parametrize("order", [("diag", "kron"), ("kron", "diag")])
def test_a_last_layer_whose_outputs_one_structure_separates(order: tuple[str, str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, y = torch.randn(12, 3).double(), torch.arange(12) % 5
    found = estimate_several(net, [(x, y)], "categorical", order, select="last_layer", progress=False)
    for recipe, curvature in zip(order, found, strict=True):
        alone = estimate(net, [(x, y)], "categorical", structure=recipe, select="last_layer", progress=False)
        close(curvature.to_dense(), alone.to_dense())


def test_the_network_runs_once_for_all() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += len(x)
            return super().forward(x)

    torch.manual_seed(0)
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    net = Counting(3, 2)

    def rows(*recipes: str) -> int:
        before = Counting.calls
        estimate_several(net, [(x, y)], "categorical", recipes, progress=False)
        return Counting.calls - before

    assert rows("diag", "kron", "full") == rows("kron")


@pytest.mark.parametrize(
    ("structures", "options", "error", "message"),
    [
        ((), {}, ArgumentError, "expected several"),
        (("diag", "ekfac"), {}, UnsupportedError, "'ekfac' takes several passes"),
        (("diag",), {"kind": "hessian"}, UnsupportedError, "no sum of outer products"),
    ],
)
def test_refusals(structures: Any, options: Any, error: type[Exception], message: str) -> None:
    net, x, y, family = problem("categorical")
    with pytest.raises(error, match=message):
        estimate_several(net, [(x, y)], family, structures, progress=False, **options)


def test_an_open_noise_is_refused() -> None:
    net, x, y = nn.Linear(3, 2), torch.zeros(4, 3), torch.zeros(4, 2)
    with pytest.raises(UnsupportedError, match="open noise"):
        estimate_several(net, [(x, y)], bdl.Gaussian(), ("diag", "kron"), progress=False)
