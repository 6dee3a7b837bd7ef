"""Head: a variational Bayesian linear layer with a loss (Harrison, Willes and Snoek 2024), what all kinds share.

q(W) = prod_k N(w_k | mu_k, S_k), prior N(0, diag(lambda)^-1); features get a constant 1 where there is a bias. The loss
is -(1/B) sum_b ELL_b + kl_weight (sum_k KL_k - log p(noise)): summed over outputs, averaged over the batch only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.last_layer.output import HeadOutput
from bayesdl.last_layer.parameterisation import DEFAULT_MEMORY, make
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Likelihood
from bayesdl.posteriors.last_layer import GaussianWeights, LastLayerPosterior


class Head(nn.Module, ABC):
    """Replaces the last layer of a network; returns a `HeadOutput`. What heads of any kind share: the loss.

    Args:
        in_features: d.
        out_features: K.
        num_data: N, supervised elements in the training set; the KL is weighted by 1 / N.
        kl_weight: default 1 / num_data; larger values widen the uncertainty.
        tensor_output: return the mean as a plain tensor and keep the `HeadOutput` as `.output`, for networks that
            compute with the logits.

    Raises:
        ArgumentError: num_data below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        kl_weight: float | None = None,
        tensor_output: bool = False,
    ) -> None:
        super().__init__()
        if num_data < 1:
            raise ArgumentError(f"num_data={num_data}; expected the number of supervised training examples, at least 1")
        self.in_features, self.out_features, self.num_data = in_features, out_features, num_data
        self.kl_weight = 1.0 / num_data if kl_weight is None else float(kl_weight)
        self.tensor_output = tensor_output
        self.output: HeadOutput | None = None

    @abstractmethod
    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the outputs for `(..., d)`: two `(..., K)`. Pure tensor code."""

    @abstractmethod
    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        """Belief over the noise-free outputs from `moments`, both `(B, K)`."""

    @abstractmethod
    def likelihood(self) -> Likelihood:
        """p(y | f) at the noise learned so far, for `bdl.BayesianModel(net, head.posterior(), head.likelihood())`."""

    @abstractmethod
    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        """Lower bound of E_q[log p(y | f)] for checked targets, `(B,)`; leading axes flattened."""

    @abstractmethod
    def divergence(self) -> Tensor:
        """What the loss charges for q: a KL divergence less log p(noise), a scalar."""

    @abstractmethod
    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Checked targets `(B, ...)` and which of them count `(B,)`, for outputs `(B, K)`."""

    @abstractmethod
    def start_from(self, layer: nn.Linear) -> Self:
        """Start where a trained layer is, as far as this head can; in place, returns itself."""

    @abstractmethod
    def posterior(self, layer: str | None = None) -> LastLayerPosterior:
        """q as a posterior for `bdl.BayesianModel`; `layer` names the head where a network holds several."""

    def takes(self, layer: nn.Linear) -> bool:
        """Whether this head fits in the place of `layer`."""
        return (layer.out_features, layer.in_features) == (self.out_features, self.in_features)

    def score(self, kind: str, features: Tensor) -> Tensor | None:
        """An out-of-distribution score of the features `(B, d)` that the outputs do not hold, `(B,)`; None: no such."""
        del kind, features
        return None

    def forward(self, features: Tensor) -> HeadOutput | Tensor:
        """`HeadOutput` for features `(..., d)`; its mean alone with `tensor_output`."""
        mean, variance = self.moments(features)
        output = HeadOutput(self, mean, variance, features)
        if self.tensor_output:
            self.output = output
            return mean
        return output

    def loss(self, output: HeadOutput, y: Tensor, *, mask: Tensor | None, weight: Tensor | None) -> Tensor:
        """See `HeadOutput.loss`."""
        with torch.autocast(output.mean.device.type, enabled=False):
            checked, kept = self.targets(y, output.mean.flatten(0, -2))
            shares = kept.to(output.mean.dtype)
            for name, given in (("mask", mask), ("weight", weight)):
                if given is not None:
                    if given.shape != output.mean.shape[:-1]:
                        raise ShapeError(
                            f"{name} has shape {tuple(given.shape)}; expected {tuple(output.mean.shape[:-1])}"
                        )
                    shares = shares * given.reshape(-1).to(shares)
            total = shares.sum()
            each = self.terms(output, checked)
            # a masked element may hold anything, also infinity
            value = torch.where(shares > 0, each * shares, torch.zeros_like(each)).sum()
            loss = self.kl_weight * self.divergence() - value / total.clamp(min=torch.finfo(shares.dtype).tiny)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"the loss of the Bayesian head is {float(loss.detach())}; look for NaN or infinity in the "
                    "features and targets, or lower the learning rate"
                )
            return loss

    def check_features(self, features: Tensor) -> None:
        """Raise `ShapeError` for features of another width."""
        if features.shape[-1] != self.in_features:
            raise ShapeError(
                f"features of shape {tuple(features.shape)} were given to a head with in_features={self.in_features}"
            )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_data={self.num_data}"


class LinearHead(Head):
    """A head whose outputs are linear maps of the features.

    Args:
        in_features: d.
        out_features: K.
        num_data: N, see `Head`.
        covariance: "full", "diag", "lowrank", "shared" or "precision".
        bias: whether there is an intercept.
        rank: of a low-rank covariance.
        prior_precision: lambda of every weight; default the number of features, a prior variance of 1 / d.
        bias_precision: that of the intercept; default the same.
        init_scale: standard deviation of the weights at the start, in prior standard deviations.
        memory: bytes of the largest product.
        rows: linear maps where they are not one per output.
        options: see `Head`.

    Raises:
        ArgumentError: a precision that is not positive, or a covariance that is too large.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        covariance: str = "full",
        bias: bool = True,
        rank: int = 8,
        prior_precision: float | None = None,
        bias_precision: float | None = None,
        init_scale: float = 0.1,
        memory: int = DEFAULT_MEMORY,
        rows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, num_data=num_data, **options)
        width = in_features + bias
        precision = float(width) if prior_precision is None else float(prior_precision)
        intercept = precision if bias_precision is None else float(bias_precision)
        if not precision > 0 or not intercept > 0:
            raise ArgumentError(
                f"prior_precision={precision} and bias_precision={intercept}; a trained head needs proper priors, "
                "positive precisions (only the exact regression of bdl.VBLL takes a flat intercept)"
            )
        self.bias = bool(bias)
        self.rows = out_features if rows is None else rows
        self.mean = nn.Parameter(torch.zeros(self.rows, width))
        self.covariance = make(
            covariance, width, self.rows, scale=init_scale / precision**0.5, rank=rank, memory=memory
        )
        scale = torch.full((width,), precision)
        if bias:
            scale[-1] = intercept
        self.prior_precision: Tensor
        self.register_buffer("prior_precision", scale)

    @abstractmethod
    def expected_log_likelihood(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """`terms` from moments `(B, K)`."""

    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        return self.expected_log_likelihood(output.mean.flatten(0, -2), output.variance.flatten(0, -2), y)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """phi^T mu_k and phi^T S_k phi for `(..., d)`: two `(..., K)`. Pure tensor code."""
        self.check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            phi = self._with_constant(features).flatten(0, -2)
            shape = (*features.shape[:-1], self.rows)
            return (phi @ self.mean.mT).reshape(shape), self.covariance.quad(phi).reshape(shape)

    def start_from(self, layer: nn.Linear) -> Self:
        """Take weight and bias of a trained layer as the means; in place, returns itself.

        Raises:
            ShapeError: the shapes differ.
            ArgumentError: the layer has a bias and the head has none.
        """
        if not self.takes(layer):
            raise ShapeError(
                f"the old layer maps {layer.in_features} features to {layer.out_features} outputs and this head "
                f"{self.in_features} to {self.out_features}"
            )
        if layer.bias is not None and not self.bias and bool(layer.bias.any()):
            raise ArgumentError("the old layer has a bias and this head has none: pass bias=True")
        taken = slice(0, layer.out_features)
        with torch.no_grad():
            self.mean[taken, : self.in_features] = layer.weight
            if self.bias:
                self.mean[taken, -1] = 0.0 if layer.bias is None else layer.bias
        return self

    def posterior(self, layer: str | None = None) -> LastLayerPosterior:
        """q(W) as a posterior for `bdl.BayesianModel`; `layer` names the head where a network holds several."""
        belief = GaussianWeights.of(self.mean, self.covariance, self.output_scale(), self.bias)
        return LastLayerPosterior(layer, belief)

    def output_scale(self) -> Tensor:
        """`(2, K)`: factors of mean and variance that turn `moments` into `latent`."""
        one = torch.ones_like(self.mean[:, 0]).unsqueeze(0)
        found = self.latent(one, one)
        return torch.cat([found.mean, found.variance]).detach()

    def gaussian_divergence(self, weight: Tensor | float = 1.0) -> Tensor:
        """KL_k between q(w_k) and its prior, `(K,)`; `weight` multiplies the squared mean (1 / s_k^2 for scaled S)."""
        prior = self.prior_precision
        distance = (prior * self.mean.square()).sum(-1) * weight
        spread = (prior * self.covariance.diagonal()).sum(-1)
        width = self.mean.shape[-1]
        return 0.5 * (distance + spread - prior.log().sum(-1) - self.covariance.logdet() - width)

    def _with_constant(self, features: Tensor) -> Tensor:
        phi = features.to(self.mean.dtype)
        return torch.cat([phi, phi.new_ones(*phi.shape[:-1], 1)], -1) if self.bias else phi

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, covariance={self.covariance.name!r}, bias={self.bias}"
