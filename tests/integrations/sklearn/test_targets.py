from __future__ import annotations

import pytest
import torch

import bayesdl as bdl
from bayesdl.integrations.sklearn.targets import Units
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.likelihoods import Gaussian, Heteroscedastic, Likelihood, NormalGamma, Poisson

Y = 30 + 10 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
G = torch.Generator().manual_seed(1)


def latent(kind: str, outputs: int) -> Latent:
    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=G, dtype=torch.float64)

    if kind == "samples":
        return SampleLatent(draw(4, 50, outputs), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    root = draw(50, outputs, outputs)
    covariance = root @ root.mT
    return GaussianLatent(draw(50, outputs), covariance.diagonal(dim1=1, dim2=2), covariance)


@pytest.mark.parametrize("kind", ["samples", "gaussian"])
@pytest.mark.parametrize("family", [Gaussian(noise=[0.3, 0.6]), Heteroscedastic(), NormalGamma(shape=3.0, rate=0.5)])
def test_densities_change_as_densities_do(family: Likelihood, kind: str) -> None:
    """log p(y) = log p(z) - log |dy / dz|, and moments are those of mean + scale z."""
    units = Units.of(Y, family, True)
    found = family.predictive(
        latent(kind, 4 if isinstance(family, Heteroscedastic) else 2), torch.zeros(1, 4, dtype=torch.float64)
    )
    scaled = units.predictive(found)
    torch.testing.assert_close(units.scale, Y.std(0, correction=0))
    jacobian = units.scale.log().sum()
    torch.testing.assert_close(scaled.log_prob(Y), found.log_prob(units.standard(Y)) - jacobian)
    torch.testing.assert_close(scaled.mean, units.mean + units.scale * found.mean)
    torch.testing.assert_close(scaled.aleatoric, units.scale.square() * found.aleatoric)
    torch.testing.assert_close(scaled.epistemic, units.scale.square() * found.epistemic)


def test_a_noise_that_was_given_is_in_the_units_of_y() -> None:
    units = Units.of(Y, Gaussian(), True)
    inside = units.likelihood_in(Gaussian(noise=2.0))
    assert isinstance(inside, bdl.Gaussian)
    torch.testing.assert_close(inside.scale(Y), 2.0 / Y.std(0, correction=0))


def test_counts_stay_counts() -> None:
    units = Units.of(Y, Poisson(), True)
    torch.testing.assert_close(units.standard(Y), Y)
