"""Likelihoods p(y | f), and the registry that `wrap` looks names up in."""

from __future__ import annotations

from typing import Any

from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.likelihoods.base import Likelihood
from bayesdl.likelihoods.bernoulli import Bernoulli
from bayesdl.likelihoods.categorical import Categorical
from bayesdl.likelihoods.gaussian import Gaussian, Heteroscedastic
from bayesdl.likelihoods.normal_gamma import NormalGamma
from bayesdl.likelihoods.poisson import Poisson

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "heteroscedastic": Heteroscedastic,
    "normal_gamma": NormalGamma,
    "poisson": Poisson,
}

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Heteroscedastic",
    "Likelihood",
    "NormalGamma",
    "Poisson",
    "resolve",
]


def resolve(likelihood: str | Likelihood | None, **config: Any) -> Likelihood:
    """Name or object -> object.

    Raises:
        UnknownNameError: no such name.
        ArgumentError: None or a type was given.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise UnknownNameError(f"likelihood {likelihood!r} is not known; choose one of {sorted(LIKELIHOODS)}")
        return LIKELIHOODS[likelihood](**config)
    raise ArgumentError(
        f"likelihood={likelihood!r} was given; pass one of {sorted(LIKELIHOODS)} or an instance of bdl.Likelihood"
    )
