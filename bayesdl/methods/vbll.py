"""Bayesian last layers: exact for regression, variational for classification, the trunk as it is or trained along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import (
    ArgumentError,
    SelectionError,
    UnknownNameError,
    UnreachedParameterError,
    UnsupportedError,
)
from bayesdl.last_layer.cache import gathered, observations
from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.features import last_linear, linear_layer
from bayesdl.last_layer.leftout import left_out_pairs, misfit
from bayesdl.last_layer.rules import leave_one_out, leave_one_out_residuals, left_out
from bayesdl.last_layer.search import SHARINGS, maximise
from bayesdl.last_layer.statistics import Statistics
from bayesdl.last_layer.variational import classify, model_noise, precision_of
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood, NormalGamma
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.network import first_inputs
from bayesdl.posteriors.last_layer import ConjugateWeights, LastLayerPosterior
from bayesdl.select import Selector
from bayesdl.streaming import GATHER

MODES = ("frozen", "full")
RULES = ("evidence", "loo", "training")
OVERFITTED = 1.5  # left-out over fitted residuals from which on a warning is given


@final
@dataclass(frozen=True)
class VBLL(Method):
    """A Bayesian last layer (Harrison, Willes and Snoek 2024); exact where a closed form exists.

    Frozen regression is conjugate: one pass over the data, no gradient step. Frozen classification maximises a bound on
    features that are computed once.

    Args:
        mode: "frozen" (the trunk stays as it is) or "full" (a private copy is trained with a Bayesian head).
        layer: name of the `nn.Linear` whose output is the network's output; "auto" finds it.
        covariance: of a classification or trained head: "full", "diag", "shared", "precision" or, trained only,
            "lowrank".
        bound: on the softmax: "km", "jensen", or trained only "km_reduced".
        noise: "point" or "gamma" (unknown noise, Student-t predictive).
        mean: frozen classification: "keep" the means of the network, or "refit" them to the bound.
        intercept: frozen regression: "flat", "proper" or "none".
        prior_sharing: frozen regression: one prior precision per "output", or "shared".
        tuning: frozen regression: prior and noise by left-out residuals of the whole network ("training", chosen by
            the study in benchmarks/README.md; under a given noise no wider than 300 times what the evidence or the
            targets' spread ask for; with `wrap(..., validation=loader)` the held-out data decide), by
            "evidence", or by exact leave-one-out of the last layer ("loo"); the latter two take the features as they
            are, and those of an overfitted network have seen the noise. Frozen classification: "training" takes the
            widest prior that costs the training points next to nothing (with mean="keep"), "evidence" the bound's.
        rank: of "lowrank".
        epochs: mode "full".
        lr: mode "full", AdamW.
        weight_decay: mode "full", on the trunk alone.
        cache_bytes: features beyond this live in a temporary file.
        noise_prior: (a, b) of the gamma prior over 1 / s^2 for noise="gamma"; None is the reference prior (frozen).
        select: not used; a last layer is chosen by `layer`.

    A prior with precisions by name, as `bdl.functional.match` finds it, gives that of the layer's weight.
    """

    mode: str = "frozen"
    layer: str = "auto"
    covariance: str = "full"
    bound: str = "km"
    noise: str = "point"
    mean: str = "keep"
    intercept: str = "flat"
    prior_sharing: str = "output"
    tuning: str = "training"
    rank: int = 8
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    cache_bytes: int = 2**31
    noise_prior: tuple[float, float] | None = None
    select: Selector | None = None

    name: ClassVar[str] = "vbll"
    trains: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        self._check()
        data = task.need_data(self.name)
        layer = self._layer(task, data)
        if self.mode == "full":
            if task.network.sharded:
                raise UnsupportedError(f'mode="full" trains the model, whose weights are sharded; {GATHER}')
            from bayesdl.last_layer.training import train

            return train(self, task, layer, data)
        if isinstance(task.likelihood, Gaussian):
            return self._regression(task, layer, data)
        if isinstance(task.likelihood, (Categorical, Bernoulli)):
            if self.tuning == "loo":
                raise UnsupportedError('tuning="loo" is exact for regression alone; use "training" or "evidence"')
            return classify(self, task, layer, data, task.likelihood)
        if isinstance(task.likelihood, Heteroscedastic):
            return model_noise(self, task, layer, data, task.likelihood)
        raise UnsupportedError(
            f"the {task.likelihood.name} likelihood has no closed-form last layer; use "
            'bdl.Laplace(select="last_layer"), or likelihood="gaussian", "heteroscedastic", "categorical", "bernoulli"'
        )

    def _check(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("tuning", self.tuning, RULES),
            ("mean", self.mean, ("refit", "keep")),
            ("noise", self.noise, ("point", "gamma")),
            ("prior_sharing", self.prior_sharing, SHARINGS),
        ):
            if value not in known:
                raise UnknownNameError(f"{name}={value!r} is not known; choose one of {known}")

    def _layer(self, task: Task, data: Iterable[Any]) -> str:
        if self.layer == "auto":
            return last_linear(task.network, first_inputs(data, task.network.batch))
        linear_layer(task.network, self.layer)
        return self.layer

    def _regression(self, task: Task, layer: str, data: Iterable[Any]) -> Fitted:
        given = task.likelihood
        family = given.with_noise(1.0) if isinstance(given, Gaussian) and given.noise is None else given

        width = linear_layer(task.network, layer).out_features
        pairs = observations(task.network, layer, family, width, data, progress=task.progress)
        moments: list[Statistics] = []
        with gathered(_tap(pairs, moments), self.cache_bytes) as (phi, y):
            unseen, found = self._left_out(task, layer, data, phi, y)
            regression, findings = self._hyperparameters(moments[0], task, layer, phi, y, unseen)
            findings += found or (() if task.held_out else _overfitted(regression, phi, y))
        likelihood, regression = self._likelihood(task, regression)
        return Fitted(LastLayerPosterior(layer, ConjugateWeights(regression)), likelihood, findings)

    def _left_out(
        self, task: Task, layer: str, data: Iterable[Any], phi: Tensor, y: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, tuple[Finding, ...]]:
        """Pairs that stand for held-out data, where there are none and the rule asks for them."""
        family = task.likelihood
        fixed = task.prior is not None and isinstance(family, Gaussian) and family.noise is not None
        if self.tuning != "training" or task.held_out or fixed or not isinstance(family, Gaussian):
            return None, ()
        own = misfit(linear_layer(task.network, layer), phi, y)
        try:
            features, targets = left_out_pairs(task.network, layer, family.with_noise(1.0), data, own)
        except (UnsupportedError, UnreachedParameterError, SelectionError) as error:
            text = f"prior and noise are those of the evidence, which trusts the features: {error}"
            return None, (Finding("warning", text, "pass validation=..."),)
        ratio = misfit(linear_layer(task.network, layer), features, targets) / own.clamp(min=1e-300)
        found: tuple[Finding, ...] = ()
        if bool((ratio > OVERFITTED).any()):
            text = (
                f"left-out residuals are {float(ratio.max()):.2g} times those of the training data: the network has "
                "overfitted; what was left open is chosen by the former"
            )
            advice = "held-out data choose best: wrap(..., validation=loader)"
            found = (Finding("warning", text, advice, "overfit"),)
        return (features, targets), found

    def _hyperparameters(
        self,
        total: Statistics,
        task: Task,
        layer: str,
        phi: Tensor,
        y: Tensor,
        unseen: tuple[Tensor, Tensor] | None,
    ) -> tuple[ConjugateRegression, tuple[Finding, ...]]:
        start = ConjugateRegression.decompose(total, intercept=self.intercept)
        outputs, like = start.num_outputs, start.values
        prior = task.gaussian_prior(layer)
        precision = None if prior is None else precision_of(prior, outputs, like)
        variance = None
        if isinstance(task.likelihood, Gaussian) and task.likelihood.noise is not None:
            variance = task.likelihood.scale(like.new_zeros(1, outputs)).square()
        best, edge = maximise(start, sharing=self.prior_sharing, prior_precision=precision, noise_variance=variance)
        # one prior for all outputs is the evidence's; the other rules then choose the noise
        common = best.prior_precision if self.prior_sharing == "shared" and variance is None else precision
        shared = self.prior_sharing == "shared"
        if self.tuning == "loo":
            best = leave_one_out(best, phi, y, prior_precision=common, noise_variance=variance, shared=shared)
        elif unseen is not None:
            best = left_out(best, *unseen, prior_precision=common, noise_variance=variance, shared=shared)
        how = "residuals of left-out training points" if unseen is not None else self.tuning
        if unseen is None and self.tuning == "training":
            how = "evidence"
        findings = []
        if precision is None:
            text = ", ".join(f"{float(v):.3g}" for v in best.prior_precision)
            findings.append(Finding("info", f"prior precision {text} by {how}", topic="prior"))
        if variance is None:
            text = ", ".join(f"{float(v):.3g}" for v in best.noise_variance.sqrt())
            findings.append(Finding("info", f"noise {text} by {how}", topic="noise"))
        if bool(edge.any()):
            findings.append(
                Finding(
                    "warning",
                    f"the prior precision of outputs {edge.nonzero().flatten().tolist()} lies at the end of the range "
                    "searched: the features explain all, or none, of the targets (are they constant?)",
                    "check the targets, or fix the prior: prior=bdl.GaussianPrior(precision=...)",
                )
            )
        return best, tuple(findings)

    def _likelihood(self, task: Task, regression: ConjugateRegression) -> tuple[Likelihood, ConjugateRegression]:
        if self.noise == "point":
            given = isinstance(task.likelihood, Gaussian) and task.likelihood.noise is not None
            return task.likelihood if given else Gaussian(noise=regression.noise_variance.sqrt()), regression
        if isinstance(task.likelihood, Gaussian) and task.likelihood.noise is not None:
            raise ArgumentError('noise="gamma" infers the noise; leave bdl.Gaussian() without one')
        a0, b0 = self.noise_prior or (0.0, 0.0)
        shape = a0 + 0.5 * regression.degrees
        # by evidence the noise of the best ratio is R / degrees; any other rule says what takes its place
        rate = b0 + 0.5 * regression.degrees * regression.noise_variance
        if not shape > 1:
            raise ArgumentError(f"{regression.statistics.count} examples give a noise without a variance; use more")
        scaled = regression.with_hyperparameters(regression.ratio, rate / (shape - 1.0))
        return NormalGamma(torch.full_like(rate, shape), rate), scaled


def _tap(parts: Iterable[tuple[Tensor, Tensor]], totals: list[Statistics]) -> Iterator[tuple[Tensor, Tensor]]:
    """Hand pairs on and keep their statistics."""
    for phi, y in parts:
        totals[:] = [totals[0] + Statistics.of(phi, y)] if totals else [Statistics.of(phi, y)]
        yield phi, y


def _overfitted(regression: ConjugateRegression, phi: Tensor, y: Tensor) -> tuple[Finding, ...]:
    fitted, left_out = leave_one_out_residuals(regression, phi, y)
    ratio = (left_out.square().mean(0) / fitted.square().mean(0).clamp(min=1e-300)).sqrt()
    if not bool((ratio > OVERFITTED).any()):
        return ()
    return (
        Finding(
            "warning",
            f"left-out residuals are {float(ratio.max()):.2g} times the fitted ones: the last layer fits noise",
            "choose prior and noise on held-out data: wrap(..., validation=loader)",
            "overfit",
        ),
    )
