from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.likelihoods import Categorical, Gaussian
from bayesdl.samplers.diagnostics import by_chain, convergence, ess, mcse, quantities, rhat


def autoregressive(chains: int, n: int, phi: float, seed: int = 0, width: int = 1) -> Tensor:
    """Stationary chains of x' = phi x + noise, unit variance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, n, width, generator=generator, dtype=torch.float64)
    x = noise.clone()
    for t in range(1, n):
        x[:, t] = phi * x[:, t - 1] + math.sqrt(1 - phi * phi) * noise[:, t]
    return x


@pytest.fixture(scope="module")
def arviz() -> Any:
    return pytest.importorskip("arviz", reason="the oracle of R-hat and ESS")


@pytest.mark.parametrize(
    ("chains", "n", "phi"), [(4, 100, 0.5), (2, 8, 0.0), (3, 500, -0.5), (4, 37, 0.97), (2, 4, 0.0), (2, 7, -0.9)]
)
def test_equals_arviz(arviz: Any, chains: int, n: int, phi: float) -> None:
    x = autoregressive(chains, n, phi, width=2)
    for column in range(2):
        own, array = x[..., column], x[..., column].numpy()
        assert float(rhat(own)) == pytest.approx(float(arviz.rhat(array)), rel=1e-9)
        for kind, options in (("bulk", {}), ("tail", {"prob": (0.05, 0.95)}), ("mean", {})):
            expected = float(arviz.ess(array, method=kind, **options))
            assert float(ess(own, kind)) == pytest.approx(expected, rel=1e-9)
        assert float(mcse(own)) == pytest.approx(float(arviz.mcse(array)), rel=1e-9)
        assert float(rhat(x)[column]) == pytest.approx(float(rhat(own)), rel=1e-12)  # all columns at once


def test_ties_equal_arviz(arviz: Any) -> None:
    x = autoregressive(3, 60, 0.3)[..., 0].round()
    assert float(rhat(x)) == pytest.approx(float(arviz.rhat(x.numpy())), rel=1e-9)
    assert float(ess(x)) == pytest.approx(float(arviz.ess(x.numpy(), method="bulk")), rel=1e-9)


def test_size_of_an_autoregressive_chain() -> None:
    """(1 - phi) / (1 + phi) per draw; over 200 columns its mean is known to 1 %, the method's own bias is below 5 %."""
    found = ess(autoregressive(4, 1000, 0.6, width=200), "mean")
    assert float(found.mean()) == pytest.approx(4000 * 0.4 / 1.6, rel=0.06)


def test_standard_error_of_the_mean_covers() -> None:
    """95 % intervals of 400 independent quantities: the count is binomial, 4 sd = 4.4 %."""
    x = autoregressive(4, 400, 0.5, seed=1, width=400)
    covered = (x.mean((0, 1)).abs() < 1.96 * mcse(x)).double().mean()
    assert abs(float(covered) - 0.95) < 0.045


def test_chains_that_disagree_are_seen() -> None:
    x = autoregressive(4, 200, 0.0, width=3)
    assert float(rhat(x).max()) < 1.05
    shifted = x.clone()
    shifted[0, :, 0] += 2.0
    shifted[0, :, 1] *= 5.0  # only the folded ranks see a scale
    found = rhat(shifted)
    assert bool((found[:2] > 1.1).all()) and float(found[2]) < 1.05


def test_a_constant_quantity_is_no_alarm() -> None:
    x = torch.full((2, 10, 1), 0.25)
    assert float(rhat(x)) == 1.0 and float(ess(x)) == 20.0 and float(mcse(x)) == 0.0
    x[1] = 0.5
    assert float(rhat(x)) == math.inf


def test_convergence_flattens_and_counts() -> None:
    x = autoregressive(2, 50, 0.2, width=6)
    x[1, :, 0] += 3.0
    found = convergence(x.reshape(2, 50, 3, 2))
    assert found.rhat.shape == (6,) and (found.chains, found.draws) == (2, 50)
    assert found.share_above(1.1) == float((rhat(x) > 1.1).double().mean()) > 0
    assert found.smallest_ess == float(torch.minimum(ess(x), ess(x, "tail")).min())


def test_quantities_are_probabilities_and_log_likelihoods() -> None:
    outputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 1])
    found = quantities(outputs, Categorical(), targets)
    assert found.shape == (5, 3 * 4 + 3)
    torch.testing.assert_close(found[:, :12], outputs.softmax(-1).flatten(1))
    torch.testing.assert_close(found[:, 12:], outputs.log_softmax(-1)[:, range(3), targets])
    assert quantities(outputs, Gaussian(noise=0.5)).shape == (5, 12)


def test_by_chain_cuts_to_the_shortest() -> None:
    values = torch.arange(7.0)
    found = by_chain(values, torch.tensor([4, 1, 4, 1, 4, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 3.0, 5.0], [0.0, 2.0, 4.0]]))
    with pytest.raises(ShapeError, match="chain ids"):
        by_chain(values, torch.zeros(3))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="at least 4"):
        rhat(torch.zeros(2, 3))
    with pytest.raises(NonFiniteError, match="draws"):
        ess(torch.tensor([[1.0, 2.0, math.nan, 3.0]]))
    with pytest.raises(ArgumentError, match="kind"):
        ess(torch.zeros(2, 5), "best")
