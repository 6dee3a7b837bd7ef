"""Evidential heads: outputs are the parameters of a conjugate distribution (Sensoy et al. 2018, Amini et al. 2020).

Evidential losses alone do not identify epistemic uncertainty: the loss sees one target per input, so that many amounts
of evidence fit the data alike, and what is learned far from the data is set by the regularisation, not by data
(Bengs et al. 2022, Meinert et al. 2023).
"""

from __future__ import annotations

import math
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, StudentT

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer.densities import IGNORED, PseudoCounts
from bayesdl.last_layer.head import Head
from bayesdl.last_layer.labels import class_labels
from bayesdl.last_layer.output import HeadOutput
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods import Categorical, Likelihood
from bayesdl.likelihoods.categorical import entropy
from bayesdl.posteriors.last_layer import LastLayerPosterior
from bayesdl.predictive import Split

LIKELIHOODS = ("categorical", "gaussian")
LOSSES = ("cross-entropy", "bayes-risk")
FLOOR = 1e-6  # softplus underflows to zero, where a scale would be infinite


def concentrations(f: Tensor) -> Tensor:
    """alpha = 1 + softplus(f), the shape of `f`."""
    return 1.0 + nn.functional.softplus(f)


def divergence_from_uniform(alpha: Tensor) -> Tensor:
    """KL(Dirichlet(alpha) || Dirichlet(1)) in nats, `(...,)` for `(..., K)`."""
    strength = alpha.sum(-1, keepdim=True)
    normaliser = torch.lgamma(strength[..., 0]) - torch.lgamma(alpha).sum(-1) - math.lgamma(alpha.shape[-1])
    return normaliser + ((alpha - 1.0) * (torch.digamma(alpha) - torch.digamma(strength))).sum(-1)


def gamma_parameters(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Location g, strength nu, shape a > 1 and rate b, `(..., K)` each, from outputs `(..., 4 K)`."""
    g, nu, a, b = f.chunk(4, -1)
    return (
        g,
        FLOOR + nn.functional.softplus(nu),
        1.0 + FLOOR + nn.functional.softplus(a),
        FLOOR + nn.functional.softplus(b),
    )


@final
class DirichletCategorical(Likelihood):
    """y | p ~ Categorical(p), p ~ Dirichlet(1 + softplus(f)): p(y = k) = alpha_k / alpha_0."""

    name = "dirichlet"
    task = "classification"

    @property
    def output_axis(self) -> int:
        return -1

    def distribution(self, f: Tensor) -> TorchCategorical:
        return TorchCategorical(probs=PseudoCounts(concentrations(f)).mean)

    def check_targets(self, f: Tensor, y: Tensor) -> Tensor:
        return Categorical(ignore_index=IGNORED).check_targets(f, y)

    def counted(self, y: Tensor) -> Tensor | None:
        return Categorical(ignore_index=IGNORED).counted(y)

    def hessian_root(self, f: Tensor) -> Tensor:
        """Raises `UnsupportedError`: -log(alpha_y / alpha_0) is not convex in f."""
        raise UnsupportedError("the Dirichlet likelihood has no positive curvature in its outputs; use a Categorical")

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        weights, draws = latent.draws(noise)
        return TorchCategorical(probs=torch.einsum("s,s...->...", weights, self.distribution(draws).probs))

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """Expected entropy given the probabilities, and the mutual information with them (and with f)."""
        weights, draws = latent.draws(noise)
        counts = PseudoCounts(concentrations(draws))
        aleatoric = torch.einsum("s,s...->...", weights, counts.aleatoric)
        total = entropy(torch.einsum("s,s...->...", weights, counts.mean))
        return Split(aleatoric, (total - aleatoric).clamp(min=0))


@final
class NormalInverseGamma(Likelihood):
    """y | m, s^2 ~ N(m, s^2), m ~ N(g, s^2 / nu), 1 / s^2 ~ Gamma(a, rate b): Student-t for every output.

    f holds g, nu, a and b of all outputs, `(B, 4 K)`; degrees of freedom 2 a, squared scale b (1 + nu) / (nu a).
    """

    name = "normal_inverse_gamma"
    task = "regression"

    def num_targets(self, outputs: int) -> int:
        return outputs // 4

    def distribution(self, f: Tensor) -> StudentT:
        g, nu, a, b = gamma_parameters(f)
        return StudentT(2.0 * a, g, (b * (1.0 + nu) / (nu * a)).sqrt())

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """Aleatoric E[s^2] = b / (a - 1), epistemic Var[m] = b / (nu (a - 1)), `(B, K)`."""
        weights, draws = latent.draws(noise)
        g, nu, a, b = gamma_parameters(draws)
        within = b / (a - 1.0)
        apart = (g - torch.einsum("s,s...->...", weights, g)).square() + within / nu
        return Split(torch.einsum("s,s...->...", weights, within), torch.einsum("s,s...->...", weights, apart))


@final
class Evidential(Head):
    """A linear map of the features to the parameters of a Dirichlet, or of a normal-inverse-gamma distribution.

    Evidential losses alone do not identify epistemic uncertainty: one target per input cannot tell much evidence from
    little, and far from the data the head says whatever its regularisation and its extrapolation say. Treat
    `epistemic` as a score to validate on held-out data. `Prototype` and `Generative` (`pseudo_counts`) count
    examples by the density of the features and return to the prior far away; a `Regression` head has a posterior.

    "categorical": alpha = 1 + softplus(f). The loss is the expected cross-entropy psi(alpha_0) - psi(alpha_y), or the
    Bayes risk sum_k (y_k - p_k)^2 + p_k (1 - p_k) / (alpha_0 + 1) with p = alpha / alpha_0; plus `regularisation` times
    KL(Dirichlet(y + (1 - y) alpha) || Dirichlet(1)), the evidence for wrong classes.
    "gaussian": the negative log-density of the Student-t marginal, plus `regularisation` times |y - g| (2 nu + a).

    Args:
        in_features: d.
        out_features: K classes, or numbers in y.
        likelihood: "categorical" or "gaussian".
        loss: "cross-entropy" or "bayes-risk"; "categorical".
        regularisation: the weight at the start, default 1 for classes and 0.01 for regression. To anneal it, set
            `head.regularisation` between epochs, for instance to min(1, epoch / 10).
        bias: whether there is an intercept.
        tensor_output: see `Head`.

    Raises:
        UnknownNameError: unknown likelihood or loss.
        ArgumentError: negative regularisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        likelihood: str = "categorical",
        loss: str = "cross-entropy",
        regularisation: float | None = None,
        bias: bool = True,
        tensor_output: bool = False,
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise UnknownNameError(f"likelihood {likelihood!r} is not known here; choose one of {LIKELIHOODS}")
        if loss not in LOSSES:
            raise UnknownNameError(f"loss {loss!r} is not known; choose one of {LOSSES}")
        super().__init__(in_features, out_features, num_data=1, kl_weight=0.0, tensor_output=tensor_output)
        self.classes = likelihood == "categorical"
        self.risk = loss
        self.regularisation = (1.0 if self.classes else 0.01) if regularisation is None else float(regularisation)
        if not self.regularisation >= 0:
            raise ArgumentError(f"regularisation={regularisation}; expected a number that is not negative")
        self.linear = nn.Linear(in_features, out_features * (1 if self.classes else 4), bias=bias)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The raw outputs f and zeros for `(..., d)`: two `(..., K)`, or `(..., 4 K)` for regression."""
        self.check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            f = self.linear(features.to(self.linear.weight.dtype))
            return f, torch.zeros_like(f)

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        return GaussianLatent(mean, variance)

    def likelihood(self) -> Likelihood:
        return DirichletCategorical() if self.classes else NormalInverseGamma()

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if self.classes:
            return class_labels(y, mean, IGNORED)
        shape = (len(mean), self.out_features)
        if y.numel() != shape[0] * shape[1] or (self.out_features > 1 and y.shape[-1] != self.out_features):
            raise ShapeError(f"targets have shape {tuple(y.shape)}; expected {shape} (B, K), or (B,) for K = 1")
        target = y.reshape(shape).to(mean)
        if bool(torch.isinf(target).any()):
            raise NonFiniteError("targets: infinity")
        return target, torch.ones(len(mean), dtype=torch.bool, device=mean.device)

    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        """Minus the regularised risk of each example, `(B,)`."""
        f = output.mean.flatten(0, -2)
        return self._class_terms(f, y) if self.classes else self._number_terms(f, y)

    def _class_terms(self, f: Tensor, y: Tensor) -> Tensor:
        alpha = concentrations(f)
        strength = alpha.sum(-1, keepdim=True)
        if self.risk == "cross-entropy":
            risk = (y * (torch.digamma(strength) - torch.digamma(alpha))).sum(-1)
        else:
            p = alpha / strength
            risk = ((y - p).square() + p * (1.0 - p) / (strength + 1.0)).sum(-1)
        return -risk - self.regularisation * divergence_from_uniform(y + (1.0 - y) * alpha)

    def _number_terms(self, f: Tensor, y: Tensor) -> Tensor:
        g, nu, a, b = gamma_parameters(f)
        scale = (b * (1.0 + nu) / (nu * a)).sqrt()
        # a masked target may be NaN, which a validating family refuses
        value = StudentT(2.0 * a, g, scale, validate_args=False).log_prob(y)
        return (value - self.regularisation * (y - g).abs() * (2.0 * nu + a)).sum(-1)

    def divergence(self) -> Tensor:
        return self.linear.weight.new_zeros(())

    def start_from(self, layer: nn.Linear) -> Self:
        """Take a trained layer as logits of the evidence, or as the locations g; in place, returns itself.

        Raises:
            ShapeError: the shapes differ.
            ArgumentError: the layer has a bias and the head has none.
        """
        if not self.takes(layer):
            raise ShapeError(
                f"the old layer maps {layer.in_features} features to {layer.out_features} outputs and this head "
                f"{self.in_features} to {self.out_features}"
            )
        if layer.bias is not None and self.linear.bias is None and bool(layer.bias.any()):
            raise ArgumentError("the old layer has a bias and this head has none: pass bias=True")
        with torch.no_grad():
            self.linear.weight[: self.out_features] = layer.weight
            if self.linear.bias is not None:
                self.linear.bias[: self.out_features] = 0.0 if layer.bias is None else layer.bias
        return self

    def posterior(self, layer: str | None = None) -> LastLayerPosterior:
        """Raises `UnsupportedError`: the weights of this head have no distribution."""
        raise UnsupportedError(
            "an evidential head has no posterior over its weights; use its predictive, or a Regression or "
            "Classification head"
        )

    def extra_repr(self) -> str:
        kind = "categorical" if self.classes else "gaussian"
        return f"in_features={self.in_features}, out_features={self.out_features}, likelihood={kind!r}"
