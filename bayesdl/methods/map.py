"""MAP: the network as it is, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from bayesdl.methods.base import Fitted, Method, Task, with_residual_noise
from bayesdl.posteriors import PointPosterior


@final
@dataclass(frozen=True)
class MAP(Method):
    """No uncertainty about the weights. Data is used only to choose an open Gaussian noise."""

    name: ClassVar[str] = "map"
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        posterior = PointPosterior()
        likelihood, findings = with_residual_noise(task, posterior)
        return Fitted(posterior, likelihood, findings)
