"""Regression whose noise depends on the input: two linear maps of the features, for the mean and for log s^2."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.last_layer.head import LinearHead
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Heteroscedastic as HeteroscedasticLikelihood
from bayesdl.likelihoods import Likelihood

NODES = 8  # of the quadrature over log s^2


@final
class Heteroscedastic(LinearHead):
    """y_k ~ N(w_k^T phi, exp(v_k^T phi)) with independent Gaussian q over all w_k and v_k; the bound is closed form.

    Its outputs are the K means and then the K log-variances, as `bdl.Heteroscedastic` reads them; the predictive is a
    Gauss-Hermite mixture over log s^2, without sampling.

    Args:
        in_features: d.
        out_features: K, numbers in y. `replace` takes the place of a layer with K outputs (its weights start the
            means) or 2 K (means, then log-variances).
        num_data: N.
        init_noise: s at the start.
        bias_precision: prior precision of the intercepts; default 1, because log-variances are not near zero.
        options: see `LinearHead`; `bias=True` is needed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        init_noise: float = 1.0,
        bias_precision: float = 1.0,
        **options: Any,
    ) -> None:
        if not options.get("bias", True):
            raise ArgumentError("a heteroscedastic head needs bias=True: log s^2 has no scale without an intercept")
        if not init_noise > 0:
            raise ArgumentError(f"init_noise={init_noise}; expected a positive number")
        options |= {"num_data": num_data, "bias_precision": bias_precision, "rows": 2 * out_features}
        super().__init__(in_features, out_features, **options)
        with torch.no_grad():
            self.mean[out_features:, -1] = 2.0 * math.log(init_noise)

    def takes(self, layer: nn.Linear) -> bool:
        return layer.in_features == self.in_features and layer.out_features in (self.out_features, self.rows)

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(mean), self.out_features)
        if y.numel() != shape[0] * shape[1] or (self.out_features > 1 and y.shape[-1] != self.out_features):
            raise ShapeError(f"targets have shape {tuple(y.shape)}; expected {shape} (B, K), or (B,) for K = 1")
        target = y.reshape(shape).to(mean)
        if bool(torch.isinf(target).any()):
            raise NonFiniteError("targets: infinity")
        return target, torch.ones(len(mean), dtype=torch.bool, device=mean.device)

    def expected_log_likelihood(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        centre, log_variance = mean.chunk(2, -1)
        spread, doubt = variance.chunk(2, -1)
        precision = (0.5 * doubt - log_variance).exp()  # E[1 / s^2] of a log-normal
        each = math.log(2.0 * math.pi) + log_variance + precision * ((y - centre).square() + spread)
        return -0.5 * each.sum(-1)

    def divergence(self) -> Tensor:
        return self.gaussian_divergence().sum()

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        return GaussianLatent(mean, variance)

    def likelihood(self) -> Likelihood:
        return HeteroscedasticLikelihood(nodes=NODES)
