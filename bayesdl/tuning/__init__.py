"""Choosing hyper-parameters without a refit: one entry, one rule a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.lora.scale import tune_heldout_scale, tune_tolerance
from bayesdl.posteriors import AdapterPosterior
from bayesdl.tuning.evidence import tune_evidence
from bayesdl.tuning.heldout import tune_heldout
from bayesdl.tuning.last_layer import LAST_LAYER_RULES, is_last_layer_regression, tune_last_layer
from bayesdl.tuning.loo import tune_loo
from bayesdl.tuning.training import tune_training

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

RULES: dict[str, Callable[..., BayesianModel]] = {
    "evidence": tune_evidence,
    "heldout": tune_heldout,
    "loo": tune_loo,
    "tolerance": tune_tolerance,
    "training": tune_training,
}


def tune(model: BayesianModel, rule: str, data: Iterable[Any] | None, **options: Any) -> BayesianModel:
    """Dispatch to a rule; a new model comes back.

    Raises:
        UnknownNameError: no such rule.
        ArgumentError: an option that the rule does not take.
    """
    if rule not in RULES:
        raise UnknownNameError(f"tuning rule {rule!r} is not known; choose one of {sorted(RULES)}")
    if is_last_layer_regression(model) and rule in LAST_LAYER_RULES:
        return tune_last_layer(model, rule, data, **_known(tune_last_layer, rule, options))
    if isinstance(model.posterior, AdapterPosterior) and rule == "heldout" and data is not None:
        return tune_heldout_scale(model, data, **_known(tune_heldout_scale, rule, options))
    return RULES[rule](model, data, **_known(RULES[rule], rule, options))


def _known(function: Callable[..., BayesianModel], rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as they are. Raises `ArgumentError` that names those which a rule does not take."""
    parameters = inspect.signature(function).parameters.values()
    taken = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(taken))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ArgumentError(f'tune("{rule}") was given {", ".join(unknown)}; it takes {", ".join(taken)}')
    return options
