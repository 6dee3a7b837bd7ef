"""Methods, and the registry that `wrap` looks names up in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.bayesvlm import BayesVLM
from bayesdl.methods.dropout import MCDropout
from bayesdl.methods.ensemble import Ensemble
from bayesdl.methods.fsp import FSPLaplace
from bayesdl.methods.function_space import ELLA, SubsetGP, VaLLA
from bayesdl.methods.laplace import Laplace
from bayesdl.methods.map import MAP
from bayesdl.methods.nuts import NUTS
from bayesdl.methods.sgmcmc import SGMCMC
from bayesdl.methods.smc import SMC
from bayesdl.methods.student_t import StudentT
from bayesdl.methods.swag import SWAG
from bayesdl.methods.temperature import Temperature
from bayesdl.methods.tfb import TFB
from bayesdl.methods.vbll import VBLL

CHAINS = ("sgld", "sghmc", "baoab", "sgnht", "psgld", "sa-sgld", "entropy-mcmc", "cyclical", "structured")

# name -> what makes the method: its class, or a class with the arguments that the name stands for
METHODS: dict[str, Callable[[], Method]] = {
    **{
        method.name: method
        for method in (
            MAP,
            Temperature,
            Laplace,
            SWAG,
            Ensemble,
            MCDropout,
            VBLL,
            StudentT,
            SubsetGP,
            ELLA,
            VaLLA,
            TFB,
            BayesVLM,
            NUTS,
            SMC,
        )
    },
    **{name: partial(SGMCMC, name) for name in CHAINS},
}

__all__ = [
    "CHAINS",
    "ELLA",
    "MAP",
    "METHODS",
    "NUTS",
    "SGMCMC",
    "SMC",
    "SWAG",
    "TFB",
    "VBLL",
    "BayesVLM",
    "Ensemble",
    "FSPLaplace",
    "Fitted",
    "Laplace",
    "MCDropout",
    "Method",
    "StudentT",
    "SubsetGP",
    "Task",
    "Temperature",
    "VaLLA",
    "resolve",
]


def resolve(method: str | Method | type[Method]) -> Method:
    """Name, object or class -> object.

    Raises:
        UnknownNameError: no such name.
        ArgumentError: neither name nor method.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        if method not in METHODS:
            raise UnknownNameError(f"method {method!r} is not known; choose one of {sorted(METHODS)}")
        return METHODS[method]()
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    raise ArgumentError(
        f"method={method!r} was given; pass one of {sorted(METHODS)} or an object such as bdl.Laplace()"
    )
