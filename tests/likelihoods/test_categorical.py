"""Class probabilities from Gaussian latents, against quadrature, Dirichlet moments and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, ShapeError
from bayesdl.latent import GaussianLatent, SampleLatent, point_latent
from bayesdl.likelihoods import Categorical
from bayesdl.posteriors.base import standard_normal


def two_classes(mean: Tensor, variance: Tensor) -> GaussianLatent:
    """Logits (f, 0) with f ~ N(mean, variance)."""
    means = torch.stack([mean, torch.zeros_like(mean)], -1)
    variances = torch.stack([variance, torch.zeros_like(variance)], -1)
    return GaussianLatent(means, variances, torch.diag_embed(variances))


def sigmoid_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """E[sigmoid(f)] by Gauss-Hermite quadrature with 200 points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    f = mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * torch.as_tensor(nodes)
    return (torch.sigmoid(f) * torch.as_tensor(weights / weights.sum())).sum(-1)


GRID = torch.cartesian_prod(torch.linspace(-4, 4, 9).double(), torch.tensor([0.01, 0.5, 2.0, 10.0]).double())


def test_probit_against_quadrature_within_its_known_error() -> None:
    # MacKay (1992): E[sigmoid(f)] ~ sigmoid(f / sqrt(1 + pi v / 8)), worst error 0.019 over all means and variances
    mean, variance = GRID.T
    latent = two_classes(mean, variance)
    found = Categorical().marginal(latent, torch.zeros(1, 2).double()).probs[:, 0]
    error = (found - sigmoid_mean(mean, variance)).abs()
    assert float(error.max()) < 0.02
    assert float(error[variance < 0.02].max()) < 1e-4
    assert float(error.max()) > 1e-3  # it is an approximation; an exact one would be another link


def test_mean_field_link_of_two_classes_is_that_of_their_difference() -> None:
    # with two classes the formula is sigmoid(d / sqrt(1 + pi/8 var d)), whatever is common: 0.019 from the integral
    mean, variance = GRID.T
    common = 25.0
    covariance = torch.full((len(mean), 2, 2), common).double()
    covariance[:, 0, 0] += variance
    latent = GaussianLatent(torch.stack([mean, 0 * mean], -1), covariance.diagonal(dim1=1, dim2=2), covariance)
    found = Categorical(link="mean_field").marginal(latent, torch.zeros(1, 2).double()).probs[:, 0]
    torch.testing.assert_close(found, torch.sigmoid(mean / torch.sqrt(1 + torch.pi / 8 * variance)))
    assert float((found - sigmoid_mean(mean, variance)).abs().max()) < 0.02
    # each logit on its own takes the common part for doubt about the class
    probit = Categorical().marginal(latent, torch.zeros(1, 2).double()).probs[:, 0]
    assert float((probit - sigmoid_mean(mean, variance)).abs().max()) > 0.1


def test_mean_field_link_of_many_classes_against_draws() -> None:
    g = torch.Generator().manual_seed(0)
    mean = 2.0 * torch.randn(40, 5, generator=g).double()
    root = torch.randn(40, 5, 5, generator=g).double()
    covariance = root @ root.mT
    latent = GaussianLatent(mean, covariance.diagonal(dim1=1, dim2=2), covariance)
    # 20,000 draws: standard error below 0.0036; the approximation's own error is what is bounded
    truth = Categorical(link="mc").marginal(latent, standard_normal((20_000, 5), mean, None)).probs
    errors = {
        link: float((Categorical(link=link).marginal(latent, torch.zeros(1, 5).double()).probs - truth).abs().mean())
        for link in ("mean_field", "probit")
    }
    assert errors["mean_field"] < 0.04 and errors["mean_field"] < 0.8 * errors["probit"]


def test_monte_carlo_link_converges_to_quadrature() -> None:
    mean, variance = GRID.T
    exact = sigmoid_mean(mean, variance)
    errors = []
    for count in (100, 10_000):
        noise = standard_normal((count, 2), mean, None)
        found = Categorical(link="mc").marginal(two_classes(mean, variance), noise).probs[:, 0]
        errors.append(float((found - exact).abs().max()))
    # standard deviation of sigmoid(f) is below 1/2: 5 standard errors, false alarm 6e-7 a point, 36 points
    assert errors[0] < 5 * 0.5 / 10 and errors[1] < 5 * 0.5 / 100


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "mc"])
def test_certain_latents_give_the_softmax(link: str) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 0.0]]).double()
    likelihood = Categorical(link=link)
    point = likelihood.predictive(point_latent(logits), torch.zeros(4, 3).double())
    assert torch.allclose(point.probs, torch.softmax(logits, -1), atol=1e-15)


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
@pytest.mark.parametrize("with_covariance", [True, False])
def test_infinite_uncertainty_gives_even_odds(link: str, with_covariance: bool) -> None:
    variance = torch.full((1, 3), 1e8).double()
    covariance = torch.diag_embed(variance) if with_covariance else None
    latent = GaussianLatent(torch.tensor([[3.0, -1.0, 0.0]]).double(), variance, covariance)
    noise = standard_normal((20_000, 3), latent.mean, None)
    probs = Categorical(link=link).marginal(latent, noise).probs
    # mc: one class in three wins each draw; 5 standard errors of 20000 draws are 0.017
    assert torch.allclose(probs, torch.full((1, 3), 1 / 3).double(), atol=0.017 if link == "mc" else 1e-3)


def dirichlet_latent(alpha: Tensor) -> GaussianLatent:
    """Laplace approximation of a Dirichlet in softmax coordinates (MacKay 1998; Hobbhahn et al. 2022, eq. 3)."""
    classes = alpha.shape[-1]
    mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    inverse = 1.0 / alpha
    centred = torch.eye(classes).double() - 1.0 / classes
    covariance = centred @ torch.diag_embed(inverse) @ centred
    return GaussianLatent(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance)


@pytest.mark.parametrize("normalize", [True, False])
def test_bridge_recovers_the_dirichlet(normalize: bool) -> None:
    alpha = torch.tensor([[3.0, 5.0, 9.0], [20.0, 2.5, 4.0], [1000.0, 3000.0, 500.0]]).double()
    latent = dirichlet_latent(alpha)
    pred = Categorical(link="bridge", normalize=normalize).predictive(latent, torch.zeros(1, 3).double())
    strength = alpha.sum(-1, keepdim=True)
    share = alpha / strength
    assert torch.allclose(pred.probs, share, rtol=1e-9)
    total = -(share * share.log()).sum(-1)
    expected = -(share * (torch.digamma(alpha + 1) - torch.digamma(strength + 1))).sum(-1)
    assert torch.allclose(pred.aleatoric, expected, rtol=1e-9)
    assert torch.allclose(pred.total, total, rtol=1e-9)


def test_bridge_split_against_dirichlet_draws() -> None:
    # 200000 draws; entropies of 3 classes vary by less than log 3, so 5 standard errors are below 0.013
    alpha = torch.tensor([[3.0, 5.0, 9.0]]).double()
    pred = Categorical(link="bridge").predictive(dirichlet_latent(alpha), torch.zeros(1, 3).double())
    draws = np.random.default_rng(0).dirichlet(alpha[0].numpy(), 200_000)
    assert abs(float(pred.aleatoric) + (draws * np.log(draws)).sum(1).mean()) < 0.013


def test_bridge_without_covariances_takes_the_outputs_as_independent() -> None:
    latent = GaussianLatent(torch.tensor([[1.0, 0.0, -1.0]]).double(), torch.tensor([[0.5, 0.1, 0.3]]).double())
    joint = GaussianLatent(latent.mean, latent.variance, torch.diag_embed(latent.variance))
    found, expected = (Categorical("bridge").marginal(given, latent.mean).probs for given in (latent, joint))
    assert torch.allclose(found, expected)


def test_normalising_the_bridge_shrinks_wide_latents_alone() -> None:
    mean = torch.tensor([[1.0, 0.0, -1.0]]).double()
    noise = torch.zeros(1, 3).double()
    for variance, same in ((0.1, True), (50.0, False)):
        latent = GaussianLatent(mean, torch.full_like(mean, variance))
        plain, normal = (Categorical("bridge", flag).marginal(latent, noise).probs for flag in (False, True))
        assert torch.allclose(plain, normal) is same


def test_bridge_ignores_a_common_shift_of_the_logits() -> None:
    alpha = torch.tensor([[3.0, 5.0, 9.0]]).double()
    latent = dirichlet_latent(alpha)
    # f + c with c ~ N(7, 2) correlated with f: cov(f_i, c) = u_i
    u = torch.tensor([[0.05, -0.02, 0.01]]).double()
    covariance = latent.covariance + 2.0 + u.unsqueeze(1) + u.unsqueeze(2)
    shifted = GaussianLatent(latent.mean + 7.0, covariance.diagonal(dim1=-2, dim2=-1), covariance)
    noise = torch.zeros(1, 3).double()
    found = Categorical("bridge").marginal(shifted, noise).probs
    assert torch.allclose(found, Categorical("bridge").marginal(latent, noise).probs)


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_tiny_probabilities_keep_their_logarithm(link: str) -> None:
    # in single precision, where exp(-200) is zero
    logits = torch.tensor([[0.0, -30 * math.log(10.0)], [0.0, -200.0]])
    target = torch.tensor([1, 1])
    point = Categorical(link=link).predictive(point_latent(logits), torch.zeros(1, 2))
    assert torch.allclose(point.log_prob(target), logits[:, 1], rtol=1e-6)
    members = SampleLatent(logits.expand(5, 2, 2), torch.full((5,), 0.2))
    mixed = Categorical(link=link).predictive(members, torch.zeros(1, 2))
    assert torch.allclose(mixed.log_prob(target), logits[:, 1], rtol=1e-6)
    gaussian = GaussianLatent(logits, torch.zeros(2, 2), torch.zeros(2, 2, 2))
    sure = Categorical(link=link).predictive(gaussian, torch.zeros(3, 2))
    assert torch.allclose(sure.log_prob(target), logits[:, 1], rtol=1e-6)


def test_mutual_information_of_two_certain_and_opposed_members() -> None:
    logits = torch.tensor([[[60.0, 0.0]], [[0.0, 60.0]]]).double()
    pred = Categorical().predictive(SampleLatent(logits, torch.tensor([0.5, 0.5]).double()), torch.zeros(1, 2))
    assert float(pred.total) == pytest.approx(math.log(2.0), abs=1e-12)
    assert float(pred.epistemic) == pytest.approx(math.log(2.0), abs=1e-12)
    assert float(pred.entropy) == pytest.approx(math.log(2.0), abs=1e-12)


def test_probabilities_of_unequal_members_are_averaged_by_weight() -> None:
    probs = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]).double()
    latent = SampleLatent(probs.log(), torch.tensor([0.25, 0.75]).double())
    pred = Categorical().predictive(latent, torch.zeros(1, 2))
    assert torch.allclose(pred.probs, torch.tensor([[0.375, 0.625]]).double())
    assert torch.allclose(pred.variance, torch.tensor([[0.375 * 0.625] * 2]).double())


def test_draws_of_a_gaussian_latent_have_its_moments() -> None:
    root = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.mT
    mean = torch.arange(12.0).double().reshape(3, 4)
    latent = GaussianLatent(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance)
    noise = standard_normal((100_000, 4), mean, None)
    _, draws = latent.draws(noise)
    # exact given the noise: sample moments of affine maps are affine maps of sample moments
    centred = noise - noise.mean(0)
    seen = centred.T @ centred / len(noise)
    values, vectors = torch.linalg.eigh(covariance)
    half = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    offsets = draws - draws.mean(0)
    assert torch.allclose(torch.einsum("sbi,sbj->bij", offsets, offsets) / len(noise), half @ seen @ half)
    # and 100000 draws are enough for 3%: the standard error of a variance is 0.45%
    assert torch.allclose(draws.var(0), latent.variance, rtol=0.03)
    _, marginal = GaussianLatent(mean, latent.variance).draws(noise)
    assert torch.allclose(marginal.var(0), latent.variance, rtol=0.03)


def test_quantiles_are_refused() -> None:
    pred = Categorical().predictive(point_latent(torch.zeros(2, 3)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="categorical predictive has no quantiles; use .probs"):
        pred.quantile(0.5)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.tensor([0, 3]), LabelError, r"target 3 at index 1 is outside 0..2"),
        (torch.tensor([-1, 0]), LabelError, r"target -1 at index 0 is outside 0..2"),
        (torch.tensor([0.0, 1.0]), LabelError, "dtype torch.float32; the categorical likelihood expects integer"),
        (torch.tensor([True, False]), LabelError, "dtype torch.bool"),
        (torch.eye(2, 3, dtype=torch.long), ShapeError, r"\(2, 3\) and the outputs \(2, 3\); .* of shape \(2,\)"),
    ],
)
def test_targets(y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Categorical().check_targets(torch.zeros(2, 3), y)


def test_a_mark_for_pixels_that_do_not_count_is_recognised() -> None:
    y = torch.tensor([[[0, 255], [2, 1]]])
    with pytest.raises(LabelError, match=r"target 255 at index \(0, 0, 1\).*bdl.Categorical\(ignore_index=255\)"):
        Categorical().check_targets(torch.zeros(1, 2, 2, 3), y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_of_any_integer_type_and_a_column(dtype: torch.dtype) -> None:
    y = torch.tensor([[0], [2]], dtype=dtype)
    assert torch.equal(Categorical().check_targets(torch.zeros(2, 3), y), torch.tensor([0, 2]))


def test_one_logit_names_the_likelihoods_that_fit() -> None:
    with pytest.raises(ShapeError, match=r'\(2, 1\).*use likelihood="bernoulli".*"gaussian".*"poisson"'):
        Categorical().check_outputs(torch.zeros(2, 1))


def test_unknown_link() -> None:
    with pytest.raises(ArgumentError, match="link='softmax' is not known"):
        Categorical(link="softmax")


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "mc"])
def test_permuting_the_classes_permutes_the_answer(link: str) -> None:
    latent = dirichlet_latent(torch.tensor([[3.0, 5.0, 9.0], [20.0, 2.5, 4.0]]).double())
    order = torch.tensor([2, 0, 1])
    permuted = GaussianLatent(
        latent.mean[:, order], latent.variance[:, order], latent.covariance[:, order][:, :, order]
    )
    noise = standard_normal((50, 3), latent.mean, None)
    likelihood = Categorical(link=link)
    first, second = likelihood.predictive(latent, noise), likelihood.predictive(permuted, noise[:, order])
    assert torch.allclose(first.probs[:, order], second.probs)
    assert torch.allclose(first.epistemic, second.epistemic)
    y = torch.tensor([0, 1])
    assert torch.allclose(first.log_prob(order[y]), second.log_prob(y))


def test_probabilities_are_no_logits() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match="none is negative and each row sums to 1.*Remove the final softmax"):
        Categorical().check_outputs(logits.softmax(-1))
    for fine in (logits, logits.log_softmax(-1), logits.abs(), logits.softmax(-1) - 1e-3, logits[:0]):
        assert torch.equal(Categorical().check_outputs(fine), fine)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Softmax(-1))
    for method in ("map", "laplace", "sghmc"):
        with pytest.raises(ArgumentError, match="class probabilities"):
            bdl.wrap(network, method, [(logits, logits.argmax(-1))], likelihood="categorical")(logits)


def test_one_hot_targets_are_told_what_to_do() -> None:
    with pytest.raises(ShapeError, match=r"of one-hot rows: y.argmax\(-1\)"):
        Categorical().check_targets(torch.zeros(4, 3), torch.zeros(4, 3))
