"""Recalibration: maps from logits to log-probabilities, fitted on held-out data, for any network or `BayesianModel`.

    fitted = Recalibrator("dirichlet").fit(logits, y)
    log_probs = fitted.transform(test_logits)
    predictions = fitted.apply(bayes_predictions)       # what `compare` takes

Logits (N, C) are raw outputs, or log-probabilities: for members the log of their mean, so that one temperature fits any
method. Nothing is clipped before a fit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.evaluation import binning, isotonic, validation
from bayesdl.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from bayesdl.evaluation.netcal import Law

Method = Literal[
    "temperature", "vector", "matrix", "dirichlet", "isotonic", "histogram", "platt", "beta", "bbq", "enir"
]
RegressionMethod = Literal["variance_scaling", "isotonic_quantile", "gp_normal", "gp_beta", "gp_cauchy"]
_LINEAR = ("vector", "matrix", "dirichlet")
_NETCAL = ("platt", "beta", "bbq", "enir")
# Temperatures are sought in [1 / LIMIT, LIMIT].
LIMIT = 100.0


@final
@dataclass(frozen=True)
class Recalibrator:
    """A rule for recalibration; `fit` returns a fitted one and leaves this as it is.

    Args:
        method: "temperature" (Guo et al. 2017), "vector" (scale and bias a class), "matrix" (affine map of the logits),
            "dirichlet" (affine map of the log-probabilities, Kull et al. 2019), "isotonic" and "histogram" (one class
            against the rest, rows renormalised: both can give zeros), or through netcal "platt", "beta", "bbq", "enir"
            (one class against the rest).
        penalty: of "matrix" and "dirichlet", on squared off-diagonal weights and on squared biases.
        bins: of "histogram".
    """

    method: Method = "temperature"
    penalty: float = 1e-2
    bins: int = 15

    def fit(self, logits: Any, y: Any, *, weights: Any = None) -> FittedRecalibrator:
        """Fit to logits (N, C), of data that the network was not trained on, and labels (N,); `weights` (N,).

        Raises:
            LabelError, ShapeError, NonFiniteError: bad input. ArgumentError: an unknown method.
        """
        if self.method not in get_args(Method):
            raise ArgumentError(f"method={self.method!r}: expected one of {', '.join(get_args(Method))}")
        f = _logits(logits)
        labels = validation.labels(y, len(f), f.shape[1]).to(f.device)
        mass = validation.example_weights(weights, len(f))
        if mass is not None and mass.dim() != 1:
            raise ShapeError(f"weights has shape {tuple(mass.shape)}, expected ({len(f)},)")
        mass = f.new_ones(len(f)) if mass is None else mass.to(f.device)
        if self.method == "temperature":
            return FittedRecalibrator(self, {"temperature": temperature(f, labels, mass)})
        if self.method in _LINEAR:
            return FittedRecalibrator(self, _affine(f, labels, mass, self.method, self.penalty))
        if self.method in _NETCAL:
            from bayesdl.evaluation.netcal import fit_columns

            if weights is not None:
                raise UnsupportedError(f"{self.method!r} is fitted by netcal, which takes no weights")
            return FittedRecalibrator(self, {}, fit_columns(self.method, f.softmax(-1), labels))
        fit = _histogram if self.method == "histogram" else _steps
        state: dict[str, Tensor] = {}
        probs = f.softmax(-1)
        for c in range(f.shape[1]):
            knots, values = fit(probs[:, c].contiguous(), (labels == c).double(), mass, self.bins)
            state |= {f"knots.{c}": knots, f"values.{c}": values}
        return FittedRecalibrator(self, state)


@final
@dataclass(frozen=True, eq=False)
class FittedRecalibrator:
    """A fitted map. `state` holds its tensors: `temperature` is T itself, not 1 / T."""

    settings: Recalibrator
    state: Mapping[str, Tensor]
    columns: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def temperature(self) -> float:
        """T of "temperature"; raises `UnsupportedError` for other methods."""
        if "temperature" not in self.state:
            raise UnsupportedError(f"{self.settings.method!r} has no temperature")
        return float(self.state["temperature"])

    def transform(self, logits: Any) -> Tensor:
        """Log-probabilities (N, C) float64; -inf where the map gives 0."""
        f = _logits(logits)
        state = {name: value.to(f.device) for name, value in self.state.items()}
        method = self.settings.method
        if method == "temperature":
            return (f / state["temperature"]).log_softmax(-1)
        if method in _LINEAR:
            if f.shape[1] != len(state["bias"]):
                raise ShapeError(f"logits of {f.shape[1]} classes; the map was fitted on {len(state['bias'])}")
            source = f.log_softmax(-1) if method == "dirichlet" else f
            moved = source * state["scale"] if method == "vector" else source @ state["weight"].T
            return (moved + state["bias"]).log_softmax(-1)
        probs = f.softmax(-1)
        count = len(self.columns) or len(state) // 2
        if probs.shape[1] != count:
            raise ShapeError(f"logits of {probs.shape[1]} classes; the map was fitted on {count}")
        if self.columns:
            moved = torch.stack([column(probs[:, c]) for c, column in enumerate(self.columns)], 1).to(probs)
        elif method == "histogram":
            parts = []
            for c in range(count):
                place = torch.searchsorted(state[f"knots.{c}"], probs[:, c].contiguous(), right=True)
                parts.append(state[f"values.{c}"][place])
            moved = torch.stack(parts, 1)
        else:
            parts = [isotonic.interpolate(state[f"knots.{c}"], state[f"values.{c}"], probs[:, c]) for c in range(count)]
            moved = torch.stack(parts, 1)
        total = moved.sum(1, keepdim=True)
        return torch.where(total > 0, moved / total.clamp_min(torch.finfo(torch.float64).tiny), probs).log()

    def apply(self, predictions: Predictions) -> Predictions:
        """The recalibrated forecasts, as predictions of one member: a map of the mean has no members left.

        Raises:
            UnsupportedError: predictions of another task than classification.
        """
        if predictions.task != "classification":
            raise UnsupportedError(f"recalibration of classes; these are predictions of a {predictions.task} task")
        if bool(predictions.log_mean_probs.isinf().any()):
            raise UnsupportedError("predictions with probabilities of 0 have no logits to recalibrate")
        made = self.transform(predictions.log_mean_probs)
        return Predictions(
            task="classification",
            log_probs=made[None],
            targets=predictions.targets,
            group=predictions.group,
            name=predictions.name,
            meta=predictions.meta,
        )


def temperature(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """T at the minimum of the mean NLL of logits / T, by safeguarded Newton steps over log T, which is exact.

    In 1 / T the NLL is convex, so the sign of its derivative brackets the one minimum.
    """
    share = weights / weights.sum()
    own = logits.gather(1, labels[:, None])[:, 0]

    def slope(log_t: float) -> float:
        beta = math.exp(-log_t)
        expected = ((logits * beta).softmax(-1) * logits).sum(-1)
        return float(share @ (expected - own))

    low, high = -math.log(LIMIT), math.log(LIMIT)
    if slope(low) <= 0 or slope(high) >= 0:
        # Falling all the way to the sharpest, or to the flattest: no minimum inside.
        bound = low if slope(low) <= 0 else high
        warnings.warn(
            f"the temperature {math.exp(bound):.3g} lies at its search bound; check the held-out labels", stacklevel=3
        )
        return logits.new_tensor(math.exp(bound))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return logits.new_tensor(math.exp((low + high) / 2))


@final
@dataclass(frozen=True, eq=False)
class RegressionRecalibration:
    """A recalibration of Gaussian or mixture forecasts, fitted on held-out data.

    Attributes:
        factor: (D,), by which variances are multiplied ("variance_scaling").
        knots, levels: (D, n + 2), PIT values and their empirical levels ("isotonic_quantile").
        deviations: one map of mean and deviation (N,) to deviation (N,) for each output ("gp_normal").
        laws: a law for each output, given mean and deviation ("gp_beta", "gp_cauchy").
    """

    factor: Tensor | None = None
    knots: Tensor | None = None
    levels: Tensor | None = None
    deviations: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    laws: tuple[Law, ...] = ()

    def apply(self, predictions: Predictions) -> Predictions:
        """Predictions with every component's variance scaled; "gp_normal": one Gaussian of the mean and new deviation.

        Raises `UnsupportedError` for what is no Gaussian mixture.
        """
        if self.factor is None and not self.deviations:
            what = "a bent or a Cauchy law" if self.laws else "an isotonic map of quantiles"
            raise UnsupportedError(f"{what} is no Gaussian mixture; use .quantile and .pit")
        if predictions.means is None or predictions.variances is None:
            raise UnsupportedError(f"predictions of a {predictions.task} task have no variances")
        kept = {name: getattr(predictions, name) for name in ("targets", "group", "name", "meta")}
        if self.factor is None:
            mean = predictions.mean
            moved = [made(m, s) for made, m, s in zip(self.deviations, *_columns(predictions), strict=True)]
            variances = torch.stack(moved, 1).square()[None]
            return Predictions(task=predictions.task, means=mean[None], variances=variances, **kept)
        return Predictions(
            task=predictions.task,
            means=predictions.means,
            variances=predictions.variances * self.factor.to(predictions.variances),
            member_weights=predictions.member_weights,
            **kept,
        )

    def pit(self, predictions: Predictions) -> Tensor:
        """(N, D), recalibrated PIT values of the targets."""
        if self.laws:
            given = zip(self.laws, *_columns(predictions), validation.wide(predictions.labelled()).T, strict=True)
            return torch.stack([law.cdf(mean, spread, y) for law, mean, spread, y in given], 1)
        if self.knots is None or self.levels is None:
            made = self.apply(predictions)
            return made.mixture.cdf(validation.wide(made.labelled()))
        cdf = predictions.mixture.cdf(validation.wide(predictions.labelled()))
        columns = zip(self.knots.to(cdf.device), self.levels.to(cdf.device), cdf.T, strict=True)
        return torch.stack([isotonic.interpolate(k, v, p) for k, v, p in columns], 1)

    def quantile(self, predictions: Predictions, q: float) -> Tensor:
        """(N, D), recalibrated quantiles."""
        q = validation.fraction(q, "q")
        if self.laws:
            laws = zip(self.laws, *_columns(predictions), strict=True)
            return torch.stack([law.quantile(mean, spread, q) for law, mean, spread in laws], 1)
        if self.knots is None or self.levels is None:
            return self.apply(predictions).mixture.quantile(q)
        parts = []
        for d, (knots, levels) in enumerate(zip(self.knots, self.levels, strict=True)):
            level = float(isotonic.interpolate(levels, knots, levels.new_tensor([q])))
            parts.append(predictions.mixture.quantile(min(max(level, 1e-12), 1 - 1e-12))[:, d])
        return torch.stack(parts, 1)


def recalibrate_regression(
    predictions: Predictions,
    method: RegressionMethod = "variance_scaling",
    *,
    epochs: int = 200,
    generator: torch.Generator | None = None,
) -> RegressionRecalibration:
    """Fit on held-out predictions with targets.

    "variance_scaling": the factor mean of (y - mean)^2 / variance, the maximum-likelihood one of Gaussians (Laves et
    al. 2020), for the variance of every member. "isotonic_quantile": PIT values are mapped to their empirical levels
    (Kuleshov et al. 2018). "gp_normal": the factor of each deviation varies with mean and deviation, by a Gaussian
    process of netcal (Kueppers et al. 2022), which takes gpytorch and minutes for thousands of examples. "gp_beta":
    such a process bends the distribution function by a beta map (Song et al. 2019), for noise that is skewed.
    "gp_cauchy": Cauchy laws of such scales, for heavy tails. The last two have `pit` and `quantile` alone.

    Args:
        epochs, generator: of the Gaussian processes; global random states are put back.

    Raises:
        UnsupportedError: predictions without Gaussian components. ArgumentError: another method.
        MissingDependencyError: netcal or gpytorch is not installed.
    """
    if predictions.means is None or predictions.variances is None:
        raise UnsupportedError(f"predictions of a {predictions.task} task have no Gaussian components to recalibrate")
    y = validation.wide(predictions.labelled())
    if method == "variance_scaling":
        return RegressionRecalibration(((y - predictions.mean).square() / predictions.variance).mean(0))
    if method not in get_args(RegressionMethod):
        raise ArgumentError(f"method={method!r}: expected one of {', '.join(get_args(RegressionMethod))}")
    if method != "isotonic_quantile":
        from bayesdl.evaluation.netcal import fit_deviations, fit_laws

        given = predictions.mean, predictions.variance.sqrt(), y
        if method == "gp_normal":
            return RegressionRecalibration(deviations=fit_deviations(*given, epochs=epochs, generator=generator))
        kind = "GPBeta" if method == "gp_beta" else "GPCauchy"
        return RegressionRecalibration(laws=fit_laws(kind, *given, epochs=epochs, generator=generator))
    ordered = predictions.mixture.cdf(y).sort(0).values.T
    n, d = ordered.shape[1], len(ordered)
    ends = ordered.new_zeros(d, 1), ordered.new_ones(d, 1)
    # Levels k / (n + 1), the mean of the k-th of n uniform values; ends keep 0 and 1 where they are.
    steps = torch.arange(1, n + 1, dtype=ordered.dtype, device=ordered.device) / (n + 1)
    levels = torch.cat([ends[0], steps.expand(d, n), ends[1]], 1)
    return RegressionRecalibration(None, torch.cat([ends[0], ordered, ends[1]], 1), levels)


def _columns(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Means and deviations (D, N)."""
    return predictions.mean.T, predictions.variance.sqrt().T


def _logits(value: Any) -> Tensor:
    f = validation.logits(value)
    if f.dim() != 2:
        raise ShapeError(
            f"logits have shape {tuple(f.shape)}, expected (N, C); for members pass the log of their mean probability"
        )
    return validation.wide(f)


def _affine(f: Tensor, labels: Tensor, weights: Tensor, method: str, penalty: float) -> dict[str, Tensor]:
    """Minimise the weighted NLL of an affine map by L-BFGS in float64 from the identity; convex."""
    classes = f.shape[1]
    source = f.log_softmax(-1) if method == "dirichlet" else f
    share = weights / weights.sum()
    off = 1 - torch.eye(classes, dtype=f.dtype, device=f.device)
    with torch.inference_mode(False), torch.enable_grad():
        source, share = source.clone(), share.clone()
        vector = method == "vector"
        start = f.new_ones(classes) if vector else torch.eye(classes, dtype=f.dtype, device=f.device)
        weight, bias = start.clone().requires_grad_(), f.new_zeros(classes).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            moved = (source * weight if vector else source @ weight.T) + bias
            loss = -share @ moved.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            if not vector:
                loss = loss + penalty * ((weight * off).square().sum() + bias.square().sum())
            loss.backward()
            return loss

        optimizer.step(closure)
    return {"scale" if vector else "weight": weight.detach(), "bias": bias.detach()}


def _steps(scores: Tensor, outcomes: Tensor, weights: Tensor, _bins: int) -> tuple[Tensor, Tensor]:
    return isotonic.fit(scores, outcomes, weights)


def _histogram(scores: Tensor, outcomes: Tensor, weights: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Inner edges and rates of equal-mass bins; a value on an edge belongs to the bin above."""
    held = weights > 0
    scores, outcomes, weights = scores[held], outcomes[held], weights[held]
    index = binning.equal_mass(scores, validation.bin_count(bins), weights)
    used, index = index.unique(return_inverse=True)
    mass = weights.new_zeros(len(used)).index_add_(0, index, weights)
    rate = weights.new_zeros(len(used)).index_add_(0, index, weights * outcomes) / mass.clamp_min(1e-300)
    low = weights.new_full((len(used),), torch.inf).scatter_reduce_(0, index, scores, "amin")
    high = weights.new_zeros(len(used)).scatter_reduce_(0, index, scores, "amax")
    return (high[:-1] + low[1:]) / 2, rate
