"""Tuning the exact regression of a last layer: its statistics hold all that another prior or noise needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.last_layer.cache import gathered, observations
from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.features import linear_layer
from bayesdl.last_layer.leftout import left_out_pairs, misfit
from bayesdl.last_layer.rules import held_out, leave_one_out, left_out
from bayesdl.last_layer.search import maximise
from bayesdl.likelihoods import Gaussian, Likelihood, NormalGamma
from bayesdl.posteriors.last_layer import ConjugateWeights, LastLayerPosterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

LAST_LAYER_RULES = {
    "evidence": "by evidence",
    "loo": "by leave-one-out",
    "training": "by residuals of left-out training points",
    "heldout": "on held-out data",
}
PRIORS = ("output", "shared", "keep")
CACHE = 2**31


def is_last_layer_regression(model: BayesianModel) -> bool:
    """Whether the posterior is the exact one of a regression on features."""
    posterior = model.posterior
    return isinstance(posterior, LastLayerPosterior) and isinstance(posterior.belief, ConjugateWeights)


def tune_last_layer(
    model: BayesianModel,
    rule: str,
    data: Iterable[Any] | None = None,
    *,
    prior: str = "output",
    noise: bool = True,
    cache_bytes: int = CACHE,
    progress: bool = False,
) -> BayesianModel:
    """Another prior precision and noise for the exact regression of a last layer; nothing is refitted.

    Args:
        model: a frozen regression, point noise or Student-t.
        rule: "evidence" (from the stored statistics, no data), "loo" (exact, over the training features), "training"
            (residuals of the whole network's linear model, see `bayesdl.last_layer.leftout`) or "heldout".
        data: held-out loader; for "loo" and "training" the training loader, default the one of the fit.
        prior: one precision per "output", one "shared" by all of them, or "keep".
        noise: False keeps the noise.
        cache_bytes: features beyond this live in a temporary file.
        progress: show a bar.

    Raises:
        ArgumentError: no data for a rule that needs some, or an unknown prior.
    """
    if prior not in PRIORS:
        raise ArgumentError(f'prior={prior!r} for tune("{rule}"); choose one of {PRIORS}')
    posterior = model.posterior
    assert isinstance(posterior, LastLayerPosterior) and isinstance(posterior.belief, ConjugateWeights)
    old = posterior.belief.regression
    kept: dict[str, Tensor | None] = {
        "prior_precision": old.prior_precision if prior == "keep" else None,
        "noise_variance": None if noise else old.noise_variance,
    }
    if rule == "evidence":
        new, _ = maximise(old, sharing="output" if prior == "keep" else prior, **kept)
    else:
        source = model.fit_data if rule != "heldout" and data is None else data
        if source is None:
            raise ArgumentError(
                'tune("heldout", val_loader) needs a loader of data the network was not trained on'
                if rule == "heldout"
                else f'tune("{rule}", train_loader) needs the training loader; the model does not remember it'
            )
        layer = posterior.layer_of(model.network)
        # the shape of the targets is the same for every noise
        pairs = observations(model.network, layer, Gaussian(1.0), old.num_outputs, source, progress=progress)
        with gathered(pairs, cache_bytes) as (phi, y):
            if rule == "training":
                own = misfit(linear_layer(model.network, layer), phi, y)
                phi, y = left_out_pairs(model.network, layer, Gaussian(1.0), source, own)
            choose = {"loo": leave_one_out, "training": left_out, "heldout": held_out}[rule]
            new = choose(old, phi, y, shared=prior == "shared", **kept)
    likelihood, new = _likelihood(model.likelihood, old, new, rule)
    changed = LastLayerPosterior(posterior.layer, ConjugateWeights(new), posterior.trunk)
    found = []
    if prior != "keep":
        found.append(_finding("prior", "prior precision", new.prior_precision, rule))
    if noise:
        found.append(_finding("noise", "noise", new.noise_variance.sqrt(), rule))
    return model.replaced(posterior=changed, likelihood=likelihood, findings=tuple(found))


def _likelihood(
    before: Likelihood, old: ConjugateRegression, new: ConjugateRegression, rule: str
) -> tuple[Likelihood, ConjugateRegression]:
    if torch.equal(old.noise_variance, new.noise_variance):
        return before, new
    if not isinstance(before, NormalGamma):
        return Gaussian(noise=new.noise_variance.sqrt()), new
    shape, rate = before.parameters(old.noise_variance)
    if rule == "evidence" and bool((shape > 0.5 * old.degrees).any()):  # a proper prior over the noise
        rate = rate + 0.5 * (new.misfit(new.ratio) - old.misfit(old.ratio))
    else:  # the reference prior: R / degrees is the noise of the evidence, other rules put theirs in its place
        rate = shape * new.noise_variance
    return NormalGamma(shape, rate), new.with_hyperparameters(new.ratio, rate / (shape - 1.0))


def _finding(topic: str, what: str, values: Tensor, rule: str) -> Finding:
    text = ", ".join(f"{float(value):.3g}" for value in values)
    return Finding("info", f"{what} {text} {LAST_LAYER_RULES[rule]}", topic=topic)
