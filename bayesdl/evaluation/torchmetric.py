"""Streams as torchmetrics: inside a `LightningModule`, a `MetricCollection`, or any loop that expects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdl.errors import require
from bayesdl.evaluation.fields import EXAMPLE_AXIS
from bayesdl.evaluation.predictions import Predictions


class Stream(Protocol):
    """What sums up: see `ClassificationStream`, `MetricStream`, `ScoreHistogram`."""

    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Any) -> None: ...
    def compute(self) -> dict[str, Any]: ...


def summed(make: Callable[[], Stream]) -> Any:
    """A `torchmetrics.Metric` over a stream whose state adds up, in constant memory; it takes what the stream takes.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
    """
    base: Any = require("torchmetrics").Metric

    class Summed(base):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self._names = tuple(make().state())
            for name, value in make().state().items():
                self.add_state(name, default=value, dist_reduce_fx="sum")

        def update(self, *args: Any, **kwargs: Any) -> None:
            part = make()
            part.update(*args, **kwargs)
            for name, value in part.state().items():
                setattr(self, name, getattr(self, name) + value.to(getattr(self, name).device))

        def compute(self) -> dict[str, Tensor]:
            whole = make()
            whole.load({name: getattr(self, name) for name in self._names})
            return {name: _number(value) for name, value in whole.compute().items()}

    return Summed()


def stored(make: Callable[[], Stream]) -> Any:
    """As `summed` for metrics that need all predictions together: they are kept, and gathered over processes.

    A sampler that pads repeats examples, which are then counted twice; `in_order` drops them.
    """
    base: Any = require("torchmetrics").Metric

    class Stored(base):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self._like: dict[str, Any] = {}
            for name, axis in EXAMPLE_AXIS.items():
                if axis is not None:
                    self.add_state(f"kept_{name}", default=[], dist_reduce_fx="cat")

        def update(self, predictions: Predictions) -> None:
            self._like = {"task": predictions.task, "member_weights": predictions.member_weights}
            for name, axis in EXAMPLE_AXIS.items():
                value = getattr(predictions, name)
                if axis is not None and value is not None:
                    getattr(self, f"kept_{name}").append(value.movedim(axis, 0))

        def compute(self) -> dict[str, Tensor]:
            fields: dict[str, Tensor] = {}
            for name, axis in EXAMPLE_AXIS.items():
                held = getattr(self, f"kept_{name}", None)
                if axis is not None and held is not None and len(held):
                    whole = held if isinstance(held, Tensor) else torch.cat(held)
                    fields[name] = whole.movedim(0, axis)
            stream = make()
            if fields:
                stream.update(Predictions(**self._like, **fields))  # type: ignore[arg-type]
            return {name: _number(value) for name, value in stream.compute().items()}

    return Stored()


def _number(value: Any) -> Tensor:
    return torch.tensor(float(getattr(value, "value", value)))
