"""A network made Bayesian at the end of training: what the callbacks of the trainers share."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, final

from torch import nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.data import check_rereadable
from bayesdl.distributed import is_share
from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.likelihoods import Likelihood
from bayesdl.likelihoods import resolve as resolve_likelihood
from bayesdl.methods import Method
from bayesdl.methods import resolve as resolve_method
from bayesdl.methods.temperature import Temperature
from bayesdl.model import BayesianModel
from bayesdl.wrap import wrap


@final
class Wrapping:
    """A call of `bdl.wrap` that waits for its network; its arguments are checked now, not after hours of training.

    Args:
        method, likelihood, batch: of `bdl.wrap`.
        data: loader to wrap with; None takes the trainer's.
        options: the other arguments of `bdl.wrap`.

    Raises:
        ArgumentError: an argument that `bdl.wrap` does not have or accept, or temperature scaling without held-out
            data.
        UnknownNameError: the method or the likelihood has no such name.
    """

    def __init__(
        self,
        method: str | Method,
        likelihood: str | Likelihood,
        data: Iterable[Any] | None,
        batch: str | BatchAdapter | None,
        options: dict[str, Any],
    ) -> None:
        known = inspect.signature(wrap).parameters
        for name in options:
            if name not in known or name == "model":
                raise ArgumentError(f"{name}= was given; expected one of {sorted(set(known) - {'model'})}")
        self._method = resolve_method(method)
        resolve_adapter(batch)
        for name, given in (("data", data), ("validation", options.get("validation"))):
            check_rereadable(name, given)
        if isinstance(self._method, Temperature) and data is None and options.get("validation") is None:
            raise ArgumentError(
                f'method "{self._method.label}" was given without data=; what the network was trained on makes it too '
                "sure, so pass a held-out loader as data="
            )
        self._data = data
        self._options = {"likelihood": resolve_likelihood(likelihood), "batch": batch, **options}
        self._bayes: BayesianModel | None = None

    @property
    def bayes(self) -> BayesianModel:
        """The Bayesian model. Raises `NotFittedError` before the end of training."""
        if self._bayes is None:
            raise NotFittedError("training has not come to its end: there is no Bayesian model yet")
        return self._bayes

    @property
    def done(self) -> bool:
        """Whether there is a Bayesian model."""
        return self._bayes is not None

    def clear(self) -> None:
        """Call when training begins: the model of an earlier training is not that of this one."""
        self._bayes = None

    def check(self, loader: Any) -> None:
        """Call before the first step.

        Raises:
            ArgumentError: the trainer's loader yields a share of the data, and the method cannot add shares up.
        """
        if self._data is None and self._undecided(loader) and not self._method.shares:
            raise ArgumentError(
                f"the trainer's loader yields one process's share of the data, and method \"{self._method.label}\" "
                "cannot add up shares: pass a loader of all the data as data=, or distributed=False for the share alone"
            )

    def finish(self, net: nn.Module, loader: Any) -> BayesianModel:
        """Wrap a trained network, with the trainer's loader where no data were given; all its processes take part.

        Raises:
            BayesDLError: as `bdl.wrap`.
        """
        if self._data is None and loader is None:
            raise ArgumentError("the trainer has no training loader any more: pass the callback data=")
        options = self._options
        if self._data is None and self._undecided(loader) and self._method.shares:
            options = {**options, "distributed": True}
        self._bayes = wrap(net, self._method, loader if self._data is None else self._data, **options)
        return self._bayes

    def _undecided(self, loader: Any) -> bool:
        return loader is not None and self._options.get("distributed") is None and is_share(loader)
