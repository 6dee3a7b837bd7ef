"""Temperature scaling (Guo et al. 2017): one number on the logits, fitted on held-out data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from bayesdl.errors import UnsupportedError
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.model import BayesianModel
from bayesdl.posteriors import PointPosterior, ScaledPosterior


@final
@dataclass(frozen=True)
class Temperature(Method):
    """f / T with T at the minimum of the NLL.

    Args:
        temperature: a fixed T; None fits it on the data given to `wrap`, which should be held out.
    """

    temperature: float | None = None

    name: ClassVar[str] = "temperature"
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        if task.likelihood.task not in ("classification", "multilabel"):
            raise UnsupportedError(
                f"temperature scaling needs logits (categorical or bernoulli); the likelihood is "
                f"{task.likelihood.name}. "
                'For regression choose the noise on held-out data: wrap(net, "map", val_loader, likelihood="gaussian")'
            )
        base = PointPosterior()
        if self.temperature is not None:
            value = torch.tensor(float(self.temperature), dtype=torch.float64)
            return Fitted(ScaledPosterior(base, value), task.likelihood)
        data = task.need_data(self.name, "held-out data, not the training set")
        tuned = BayesianModel(task.network, base, task.likelihood).tune("heldout", data, progress=task.progress)
        return Fitted(tuned.posterior, tuned.likelihood, tuned.record.findings)
