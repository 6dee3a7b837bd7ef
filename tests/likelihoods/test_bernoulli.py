"""Binary and multi-label probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl.errors import ArgumentError, LabelError, ShapeError
from bayesdl.latent import GaussianLatent, SampleLatent, point_latent
from bayesdl.likelihoods import Bernoulli
from bayesdl.posteriors.base import standard_normal
from tests.likelihoods.test_categorical import GRID, sigmoid_mean


def test_probit_against_quadrature_within_its_known_error() -> None:
    mean, variance = GRID.T
    latent = GaussianLatent(mean.unsqueeze(1), variance.unsqueeze(1))
    error = Bernoulli().marginal(latent, torch.zeros(1, 1)).probs[:, 0] - sigmoid_mean(mean, variance)
    assert 1e-3 < float(error.abs().max()) < 0.02


def test_monte_carlo_link_against_quadrature() -> None:
    mean, variance = GRID.T
    latent = GaussianLatent(mean.unsqueeze(1), variance.unsqueeze(1))
    noise = standard_normal((10_000, 1), mean, None)
    found = Bernoulli(link="mc").marginal(latent, noise).probs[:, 0]
    assert float((found - sigmoid_mean(mean, variance)).abs().max()) < 5 * 0.5 / 100  # 5 standard errors


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_tiny_probabilities_keep_their_logarithm(link: str) -> None:
    logits = torch.tensor([[-30 * math.log(10.0)], [-200.0]])
    ones = torch.ones(2)
    for latent in (
        point_latent(logits),
        SampleLatent(logits.expand(4, 2, 1), torch.full((4,), 0.25)),
        GaussianLatent(logits, torch.zeros(2, 1)),
    ):
        found = Bernoulli(link=link).predictive(latent, torch.zeros(4, 1)).log_prob(ones)
        assert torch.allclose(found, logits[:, 0], rtol=1e-6)


def test_labels_of_two_opposed_members() -> None:
    logits = torch.tensor([[[60.0, 0.0]], [[-60.0, 0.0]]]).double()
    pred = Bernoulli().predictive(SampleLatent(logits, torch.tensor([0.5, 0.5]).double()), torch.zeros(1, 2))
    assert float(pred.epistemic) == pytest.approx(math.log(2.0))  # the first label
    assert float(pred.aleatoric) == pytest.approx(math.log(2.0))  # the second
    assert torch.allclose(pred.probs, torch.full((1, 2), 0.5).double())
    assert float(pred.entropy) == pytest.approx(2 * math.log(2.0))


def test_targets() -> None:
    f = torch.zeros(2, 2)
    assert Bernoulli().check_targets(f, torch.tensor([[True, False], [False, True]])).dtype is torch.float32
    with pytest.raises(LabelError, match=r"target 0.5 at index \(1, 0\); bernoulli labels are 0 or 1"):
        Bernoulli().check_targets(f, torch.tensor([[0.0, 1.0], [0.5, 1.0]]))
    with pytest.raises(ShapeError, match=r"\(2,\) and the outputs \(2, 2\)"):
        Bernoulli().check_targets(f, torch.tensor([0, 1]))


def test_unknown_link() -> None:
    with pytest.raises(ArgumentError, match="choose 'probit' or 'mc'"):
        Bernoulli(link="bridge")
