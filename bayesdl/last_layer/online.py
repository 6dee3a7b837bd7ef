"""Regression that learns as data arrive: exact updates of a wrapped model, and rank-one recursion with forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, check_finite
from bayesdl.last_layer.cache import observations
from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.search import maximise
from bayesdl.last_layer.statistics import Statistics
from bayesdl.likelihoods import Gaussian, Likelihood, NormalGamma
from bayesdl.posteriors.last_layer import ConjugateWeights, LastLayerPosterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

REBUILD = 1000  # points after which rounding is removed by a fresh factorisation


def update(model: BayesianModel, data: Iterable[Any], *, retune: bool = False, progress: bool = False) -> BayesianModel:
    """A model that has seen `data` too; exact, at the same prior and noise ratio, whatever the order of the data.

    Args:
        model: a regression by `bdl.wrap(net, "vbll", loader, likelihood="gaussian")`.
        data: loader of `(inputs, target)` batches; one batch is `[(x, y)]`.
        retune: choose prior and noise again by the evidence of all data.

    Raises:
        UnsupportedError: the model is not such a regression.

    When posteriors of successive TASKS serve as priors of the next, the earlier ones are forgotten even by exact
    inference where the linear model is wrong for them; one posterior over all data is what this gives.
    """
    posterior = model.posterior
    if not isinstance(posterior, LastLayerPosterior) or not isinstance(posterior.belief, ConjugateWeights):
        raise UnsupportedError(
            f"method {model.method_name!r} has no exact update; a frozen regression has one: "
            'bdl.wrap(net, "vbll", loader, likelihood="gaussian"). For classes that arrive over time use '
            "bdl.last_layer.Prototype"
        )
    regression = posterior.belief.regression
    total: Statistics | None = None
    layer = posterior.layer_of(model.network)
    given = model.likelihood if not isinstance(model.likelihood, NormalGamma) else Gaussian(1.0)
    for phi, y in observations(model.network, layer, given, regression.num_outputs, data, progress=progress):
        part = Statistics.of(phi, y)
        total = part if total is None else total + part
    if total is None:
        raise ArgumentError("the data loader yields no batch")
    grown = regression.updated(total)
    if retune:
        grown, _ = maximise(grown)
    likelihood, grown = _likelihood(model.likelihood, regression, grown, total.count)
    found = Finding("info", f"updated with {total.count} examples, {grown.statistics.count} in all", topic="update")
    changed = LastLayerPosterior(posterior.layer, ConjugateWeights(grown), posterior.trunk)
    return model.replaced(posterior=changed, likelihood=likelihood, findings=(found,))


def _likelihood(
    before: Likelihood, old: ConjugateRegression, new: ConjugateRegression, added: int
) -> tuple[Likelihood, ConjugateRegression]:
    if not isinstance(before, NormalGamma):
        same = torch.equal(old.noise_variance, new.noise_variance)
        return (before if same else Gaussian(noise=new.noise_variance.sqrt())), new
    # an unknown noise learns from the new residuals too
    shape, rate = before.parameters(old.noise_variance)
    shape = shape + 0.5 * added
    rate = rate + 0.5 * (new.misfit(new.ratio) - old.misfit(old.ratio))
    return NormalGamma(shape, rate), new.with_hyperparameters(new.ratio, rate / (shape - 1.0))


@final
@dataclass(frozen=True, eq=False)
class RecursiveRegression:
    """Bayesian linear regression, one point at a time, O(d^2) each (recursive least squares; Haykin 2002).

    Attributes:
        inverse: G = (Phi^T Phi + rho)^-1 with the constant appended, `(M, d', d')`; M = 1 where all outputs share rho.
        weights: `(K, d')`.
        noise_variance: s^2, `(K,)`.
        forgetting: weight that every earlier point keeps at each new one; 1 never forgets.
        bias: whether features get a constant 1.
        count: points seen since the factorisation.
    """

    inverse: Tensor
    weights: Tensor
    noise_variance: Tensor
    forgetting: float = 1.0
    bias: bool = True
    count: int = 0

    @classmethod
    def start(
        cls,
        features: int,
        outputs: int,
        *,
        prior_precision: float,
        noise: float,
        bias: bool = True,
        forgetting: float = 1.0,
    ) -> Self:
        """Before any data: every weight, the intercept too, ~ N(0, 1 / prior_precision).

        Raises:
            ArgumentError: a precision, noise or forgetting factor out of range.
        """
        if not (prior_precision > 0 and noise > 0 and 0 < forgetting <= 1):
            raise ArgumentError(
                f"prior_precision={prior_precision}, noise={noise}, forgetting={forgetting}; expected positive numbers "
                "and a forgetting factor in (0, 1]"
            )
        width = features + bias
        inverse = torch.eye(width, dtype=torch.float64) / (prior_precision * noise**2)
        variance = torch.full((outputs,), noise**2, dtype=torch.float64)
        return cls(inverse.unsqueeze(0), torch.zeros(outputs, width).double(), variance, forgetting, bias)

    @classmethod
    def of(cls, regression: ConjugateRegression, *, forgetting: float = 1.0) -> Self:
        """Go on from an exact fit, at its prior and noise."""
        common = bool(torch.allclose(regression.ratio, regression.ratio[:1].expand_as(regression.ratio), rtol=1e-12))
        ratio = regression.ratio[:1] if common else regression.ratio
        vectors = regression.vectors
        inner = (vectors / (regression.values + ratio.unsqueeze(1)).unsqueeze(1)) @ vectors.mT
        weight, bias = regression.weights()
        if regression.intercept == "none":
            return cls(inner, weight, regression.noise_variance, forgetting, False)
        if regression.intercept == "flat":
            mean = regression.statistics.feature_mean
            side = -(inner @ mean).unsqueeze(-1)
            corner = 1.0 / regression.statistics.count - (side.mT @ mean.unsqueeze(-1))
            inner = torch.cat([torch.cat([inner, side], 2), torch.cat([side.mT, corner], 2)], 1)
        whole = torch.cat([weight, bias.unsqueeze(1)], 1)
        return cls(inner, whole, regression.noise_variance, forgetting, True)

    def latent(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free outputs at `(B, d)`: two `(B, K)`."""
        phi = self._wide(features)
        spread = torch.einsum("bi,mij,bj->bm", phi, self.inverse, phi)
        return phi @ self.weights.mT, spread * self.noise_variance

    def observe(self, features: Tensor, targets: Tensor) -> tuple[RecursiveRegression, Tensor]:
        """Learn from points in order.

        Args:
            features: `(B, d)`.
            targets: `(B, K)`, or `(B,)` where K = 1.

        Returns:
            the regression after them, and the log density of each before it was seen, `(B,)`. Without forgetting
            their sum is the log evidence.

        Raises:
            ShapeError, NonFiniteError: bad data.
        """
        phi, y = self._wide(features), targets.double()
        y = y.unsqueeze(1) if y.dim() == 1 else y
        if y.shape != (len(phi), len(self.weights)):
            raise ShapeError(f"targets have shape {tuple(targets.shape)}; expected {(len(phi), len(self.weights))}")
        check_finite(y, "targets")
        inverse, weights, count = self.inverse, self.weights, self.count
        densities = []
        for row, target in zip(phi, y, strict=True):
            inverse = inverse / self.forgetting
            direction = inverse @ row  # (M, d')
            spread = 1.0 + direction @ row  # (M,), or one for all outputs
            residual = target - weights @ row
            variance = self.noise_variance * spread
            densities.append(-0.5 * (torch.log(2 * math.pi * variance) + residual.square() / variance).sum())
            gain = direction / spread.unsqueeze(1)
            weights = weights + gain * residual.unsqueeze(1)
            inverse = inverse - gain.unsqueeze(2) * direction.unsqueeze(1)
            count += 1
            if count >= REBUILD:
                inverse, count = _symmetric(inverse), 0
        after = replace(self, inverse=inverse, weights=weights, count=count)
        return after, torch.stack(densities) if densities else y.new_zeros(0)

    def _wide(self, features: Tensor) -> Tensor:
        phi = features.double()
        check_finite(phi, "features")
        width = self.weights.shape[1] - self.bias
        if phi.dim() != 2 or phi.shape[1] != width:
            raise ShapeError(f"features have shape {tuple(features.shape)}; expected (B, {width})")
        return torch.cat([phi, phi.new_ones(len(phi), 1)], 1) if self.bias else phi


def _symmetric(matrix: Tensor) -> Tensor:
    # rounding makes the recursion drift from symmetry, which then grows
    return 0.5 * (matrix + matrix.mT)
