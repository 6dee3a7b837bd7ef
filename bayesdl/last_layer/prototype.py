"""Prototype head: Gaussian classes by conjugate updates, in any order, with classes that appear later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor

from bayesdl import linalg
from bayesdl.errors import ArgumentError, NotFittedError, UnknownNameError
from bayesdl.last_layer.class_statistics import ClassStatistics
from bayesdl.last_layer.densities import DensityHead
from bayesdl.last_layer.head import HeadOutput
from bayesdl.posteriors.discriminant import Discriminant

COVARIANCES = ("isotropic", "diag", "full")


@final
class Prototype(DensityHead):
    """Gaussian discriminant analysis with a posterior over the class means; nothing is trained.

    "isotropic": z | c ~ N(mean_c, s_c I), mean_c ~ N(m0, I / l0), so that after n_c examples mean_c has precision
    l_c = l0 + n_c / s_c and mean (l0 m0 + sum z / s_c) / l_c. "diag" and "full": one Sigma, the pooled within-class
    scatter over its degrees of freedom, and mean_c ~ N(m0, Sigma / k0). Class probabilities are Dirichlet. Learning in
    any order, or class after class, gives what all data at once give; nothing is forgotten.

    Args:
        in_features: d.
        out_features: classes known beforehand; more appear with `observe`.
        covariance: "isotropic", "diag" or "full".
        noise: variance s of "isotropic", a number or one per class `(K,)`; "pooled" takes it from the scatter.
        prior_mean: m0, a number or `(d,)`.
        prior_precision: l0 of "isotropic".
        prior_count: k0 of "diag" and "full".
        concentration: of each class in the Dirichlet over class probabilities.
        shrinkage: a in [0, 1], Sigma = (1 - a) S + a tr(S) / d I; "full".
        tensor_output: see `Head`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 0,
        *,
        covariance: str = "isotropic",
        noise: float | Tensor | str = "pooled",
        prior_mean: float | Tensor = 0.0,
        prior_precision: float = 1e-2,
        prior_count: float = 1e-2,
        concentration: float = 1.0,
        shrinkage: float = 0.0,
        tensor_output: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, num_data=1, kl_weight=0.0, tensor_output=tensor_output)
        if covariance not in COVARIANCES:
            raise UnknownNameError(f"covariance {covariance!r} is not known; choose one of {COVARIANCES}")
        if noise != "pooled" and covariance != "isotropic":
            raise ArgumentError(f'covariance="{covariance}" takes its noise from the scatter; leave noise="pooled"')
        numbers = (prior_precision, prior_count, concentration)
        if not min(numbers) > 0 or not 0 <= shrinkage <= 1:
            raise ArgumentError(
                f"prior_precision, prior_count, concentration = {numbers} and shrinkage={shrinkage}; expected positive "
                "numbers, and a shrinkage from 0 to 1"
            )
        if isinstance(noise, str) and noise != "pooled":
            raise UnknownNameError(f'noise {noise!r} is not known; give a variance, one per class, or "pooled"')
        if not isinstance(noise, str) and not bool((torch.as_tensor(noise) > 0).all()):
            raise ArgumentError(f"noise={noise}; expected positive variances")
        self.kind, self.concentration, self.shrinkage = covariance, float(concentration), float(shrinkage)
        self.prior_precision, self.prior_count = float(prior_precision), float(prior_count)
        self.noise = noise if isinstance(noise, str) else torch.as_tensor(noise, dtype=torch.float64)
        start = torch.as_tensor(prior_mean, dtype=torch.float64).expand(in_features).clone()
        empty = ClassStatistics.empty(in_features, out_features, diagonal=covariance != "full")
        self.counts: Tensor
        self.means: Tensor
        self.scatter: Tensor
        self.prior_mean: Tensor
        for name, value in (
            ("counts", empty.counts),
            ("means", empty.mean),
            ("scatter", empty.scatter),
            ("prior_mean", start),
        ):
            self.register_buffer(name, value)
        self._made: Discriminant | None = None

    @property
    def statistics(self) -> ClassStatistics:
        """What has been observed."""
        return ClassStatistics(self.counts, self.means, self.scatter)

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> Self:
        """Learn from `(..., d)` and labels `(...,)`; labels beyond the known classes add classes. In place.

        Raises:
            ShapeError, LabelError, NonFiniteError: bad data; nothing is learned then.
        """
        self.check_features(features)
        flat, goal = features.flatten(0, -2), labels.flatten()
        if goal.shape == flat.shape[:1]:
            kept = goal != -100
            flat, goal = flat[kept.to(flat.device)], goal[kept]
        new = self.statistics + ClassStatistics.of(
            flat.to(self.means.device), goal, self.out_features, diagonal=self.kind != "full"
        )
        self.counts, self.means, self.scatter = new.counts, new.mean, new.scatter
        self.out_features, self._made = len(new.counts), None
        return self

    def class_counts(self) -> Tensor:
        return self.counts

    def discriminant(self) -> Discriminant:
        """The class densities, float64.

        Raises:
            NotFittedError: no class, or no more examples than classes where the noise comes from the scatter.
        """
        if self._made is None:
            if not self.out_features:
                raise NotFittedError("the prototype head knows no class yet: call observe(features, labels)")
            self._made = self._full() if self.kind == "full" else self._axes()
        return self._made

    def _pooled(self) -> Tensor:
        degrees = self.statistics.degrees
        if degrees < 1:
            raise NotFittedError(
                f"{self.statistics.total} examples of {int((self.counts > 0).sum())} classes say nothing about the "
                "spread within a class; observe more, or give noise="
            )
        pooled = self.scatter / degrees
        if not bool((pooled.diagonal() if pooled.dim() == 2 else pooled).sum() > 0):
            raise NotFittedError("all examples of a class are equal: the spread within a class is zero; give noise=")
        return pooled

    def _log_prior(self) -> Tensor:
        alpha = self.concentration + self.counts.double()
        return (alpha / alpha.sum()).log()

    def _axes(self) -> Discriminant:
        shape, n = self.means.shape, self.counts.double().unsqueeze(1)
        if self.kind == "isotropic":
            noise = self._isotropic().expand(shape)
            precision = self.prior_precision + n / noise
            mean = (self.prior_precision * self.prior_mean + n * self.means / noise) / precision
            return Discriminant(mean, noise, 1.0 / precision, self._log_prior(), False)
        # a feature that never varies within a class would be known exactly
        noise = self._pooled()
        noise = noise.clamp(min=1e-12 * float(noise.mean())).expand(shape)
        strength = self.prior_count + n
        mean = (self.prior_count * self.prior_mean + n * self.means) / strength
        return Discriminant(mean, noise, noise / strength, self._log_prior(), False)

    def _isotropic(self) -> Tensor:
        """Noise variances, `(K, 1)`."""
        if isinstance(self.noise, str):
            return self._pooled().mean().expand(self.out_features, 1)
        given = self.noise.to(self.means)
        if given.dim() and len(given) != self.out_features:
            raise ArgumentError(f"{len(given)} noises were given and there are {self.out_features} classes")
        return given.reshape(-1, 1).expand(self.out_features, 1)

    def _full(self) -> Discriminant:
        pooled, n = self._pooled(), self.counts.double()
        level = pooled.diagonal().mean() * torch.eye(len(pooled), dtype=pooled.dtype, device=pooled.device)
        spread = (1.0 - self.shrinkage) * pooled + self.shrinkage * level
        factor = linalg.cholesky(spread, "scatter within classes")
        strength = self.prior_count + n
        mean = (self.prior_count * self.prior_mean + n.unsqueeze(1) * self.means) / strength.unsqueeze(1)
        return Discriminant(mean, factor, 1.0 / strength, self._log_prior(), True)

    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        """log p(y | phi): for fine-tuning an encoder on a replay memory."""
        return (y * torch.log_softmax(output.mean.flatten(0, -2), -1)).sum(-1)

    def divergence(self) -> Tensor:
        return self.means.new_zeros(())

    def score(self, kind: str, features: Tensor) -> Tensor | None:
        if kind != "relative_mahalanobis":
            return super().score(kind, features)
        own = self.discriminant()
        centre, scatter = self.statistics.background()
        whole = scatter / max(1, self.statistics.total - 1)
        if self.kind == "full":
            noise = linalg.cholesky(whole, "scatter of all features")
        else:
            noise = (whole.mean().expand_as(whole) if self.kind == "isotropic" else whole).unsqueeze(0)
        one = Discriminant(centre.unsqueeze(0), noise, noise.new_zeros(1), noise.new_zeros(1), self.kind == "full")
        phi = features.to(own.mean.dtype)
        near = own.distances(phi, predictive=False).amin(-1)
        return near - one.distances(phi, predictive=False)[:, 0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._made = None

        def only_device(tensor: Tensor) -> Tensor:
            # sums over a stream need double precision, whatever the network computes in
            return tensor.to(fn(tensor).device)

        return super()._apply(only_device, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("counts", "means"):  # as many classes as the state has
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor):
                setattr(self, name, torch.zeros_like(found, device=self.means.device))
                self.out_features = len(found)
        self._made = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, covariance={self.kind!r}"
