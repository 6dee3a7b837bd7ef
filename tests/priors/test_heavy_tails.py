"""Laplace, Student-t, Cauchy: against torch's densities, gradients by differences, draws against their law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.distributions import Cauchy, Laplace, StudentT

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.priors import CauchyPrior, LaplacePrior, Prior, StudentTPrior

THETA = {"w": torch.linspace(-3, 2, 6, dtype=torch.float64).reshape(2, 3), "b": torch.tensor([0.5, -2.0]).double()}
CASES: list[tuple[Any, Any]] = [
    (LaplacePrior, lambda b: Laplace(torch.zeros(()).double(), b)),
    (StudentTPrior, lambda b: StudentT(torch.tensor(3.0).double(), 0.0, b)),
    (CauchyPrior, lambda b: Cauchy(torch.zeros(()).double(), b)),
]


@pytest.mark.parametrize(("kind", "law"), CASES)
@pytest.mark.parametrize("fan_in", [False, True])
def test_density_gradient_and_draws(kind: Any, law: Any, fan_in: bool, generator: torch.Generator) -> None:
    prior = kind(0.7, fan_in=fan_in)
    scales = {"w": 0.7 / 3**0.5 if fan_in else 0.7, "b": 0.7}
    expected = sum(law(torch.tensor(s, dtype=torch.float64)).log_prob(THETA[name]).sum() for name, s in scales.items())
    assert torch.allclose(prior.log_prob(THETA), torch.as_tensor(expected), rtol=1e-12)
    for found, exact in zip(prior.grad(THETA).values(), Prior.grad(prior, THETA).values(), strict=True):
        assert torch.allclose(found, exact, rtol=1e-10)
    big = {name: torch.empty(20_000, 3 if name == "w" else 1) for name in scales}
    draws = prior.sample(big, generator)
    for name, value in draws.items():
        scale = 0.7 / 3**0.5 if fan_in and name == "w" else 0.7
        exact = {"laplace": ("laplace", ()), "student-t": ("t", (3.0,)), "cauchy": ("cauchy", ())}[prior.name]
        # one of twelve Kolmogorov-Smirnov tests of right draws fails with probability 1e-5
        assert kstest((value.double() / scale).reshape(-1).numpy(), exact[0], args=exact[1]).pvalue > 1e-6
        assert value.dtype is torch.float32


def test_laplace_at_zero() -> None:
    assert LaplacePrior().grad({"w": torch.zeros(2)})["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [LaplacePrior, StudentTPrior, CauchyPrior])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "a", None])
def test_scales_must_be_positive(kind: Any, scale: Any) -> None:
    with pytest.raises(ArgumentError, match="scale="):
        kind(scale)


def test_degrees_of_freedom_must_be_positive() -> None:
    with pytest.raises(ArgumentError, match="df="):
        StudentTPrior(df=0.0)


def test_a_density_alone_gives_gradients_and_no_draws() -> None:
    class Own(Prior):
        name = "own"

        def log_prob(self, parameters: Any) -> Tensor:
            return -(parameters["w"] ** 4).sum()

    found = Own().grad(THETA)
    assert torch.allclose(found["w"], -4 * THETA["w"] ** 3) and not found["b"].any()
    with pytest.raises(UnsupportedError, match="define `sample`"):
        Own().sample(THETA)
