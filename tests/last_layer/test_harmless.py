"""The widest prior that costs the training points next to nothing, against dense inverses."""

import math

import pytest
import torch

from bayesdl.last_layer.harmless import GRID, widest_prior
from bayesdl.last_layer.parameterisation import make
from bayesdl.likelihoods import Bernoulli, Categorical
from bayesdl.tuning.training import harm_of

N, D, K = 80, 4, 3


def costs(phi, y, mean, binary):
    """Of every candidate, by the definition."""
    logits = phi @ mean.mT
    share = torch.sigmoid(logits) if binary else logits.softmax(-1)
    found = []

    def nll(m, v):
        scaled = m / (1 + math.pi / 8 * v).sqrt()
        if binary:
            return torch.nn.functional.binary_cross_entropy_with_logits(scaled, y, reduction="none").sum(-1)
        return torch.nn.functional.cross_entropy(scaled, y, reduction="none")

    plain = nll(logits, torch.zeros_like(logits))
    for candidate in GRID:
        variance = torch.zeros_like(logits)
        for k in range(K):
            weight = share[:, k] * (1 - share[:, k])
            covariance = torch.linalg.inv((phi.mT * weight) @ phi + candidate * torch.eye(D).double())
            variance[:, k] = ((phi @ covariance) * phi).sum(-1)
        found.append(float((nll(logits, variance) - plain).mean()))
    return torch.tensor(found), harm_of(plain, N)


@pytest.mark.parametrize("binary", [False, True])
def test_is_the_first_before_one_that_costs_too_much(binary):
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(N, D, generator=generator).double()
    mean = 4 * torch.randn(K, D, generator=generator).double()  # sure of itself, and right
    logits = phi @ mean.mT
    y = (logits > 0).double() if binary else logits.argmax(-1)
    cost, allowed = costs(phi, y, mean, binary)
    bad = (cost > allowed).nonzero()
    assert 0 < len(bad) < len(GRID)
    likelihood = Bernoulli() if binary else Categorical()
    found, bound = widest_prior(phi, y, mean, make("full", D, K).double(), likelihood, binary=binary)
    assert bound == pytest.approx(allowed, rel=1e-6)
    assert found == pytest.approx(float(GRID[int(bad[0]) - 1]))


def test_a_network_that_is_wrong_everywhere_may_doubt_as_much_as_it_likes():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(N, D, generator=generator).double()
    mean = 4 * torch.randn(K, D, generator=generator).double()
    y = (phi @ mean.mT).argmin(-1)
    found, _ = widest_prior(phi, y, mean, make("full", D, K).double(), Categorical())
    assert found == pytest.approx(float(GRID[-1]))
