"""MC dropout (Gal and Ghahramani 2016) on the network's own dropout layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import nn

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.methods.base import Fitted, Method, Task, with_residual_noise
from bayesdl.posteriors import MaskPosterior
from bayesdl.posteriors.masks import DROPOUTS


@final
@dataclass(frozen=True)
class MCDropout(Method):
    """Predictions averaged over dropout masks; a mask is one function, shared by all inputs.

    Args:
        num_samples: masks per prediction.
        rate: replaces the rate of every dropout layer; None keeps the rates the network was trained with.
    """

    num_samples: int = 32
    rate: float | None = None

    name: ClassVar[str] = "dropout"
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        if self.num_samples < 1:
            raise ArgumentError(f"num_samples={self.num_samples}; expected at least 1")
        if self.rate is not None and not 0.0 <= self.rate < 1.0:
            raise ArgumentError(f"rate={self.rate}; expected a probability in [0, 1)")
        modules: dict[str, Any] = dict(task.network.module().named_modules())
        odd = [n for n, m in modules.items() if isinstance(m, (nn.AlphaDropout, nn.FeatureAlphaDropout))]
        if odd:
            raise UnsupportedError(f"layer {odd[0]!r} is an alpha dropout, whose masks are not multiplicative")
        layers = tuple(
            name for name, module in modules.items() if isinstance(module, DROPOUTS) and self._rate(module) > 0
        )
        if not layers:
            raise UnsupportedError(
                "the network has no dropout layer with a rate above zero (functional dropout cannot be seen); use "
                '"laplace", "swag" or an ensemble, or give the layers a rate: bdl.MCDropout(rate=0.1)'
            )
        posterior = MaskPosterior(layers, self.num_samples, self.rate)
        likelihood, findings = with_residual_noise(task, posterior)
        return Fitted(posterior, likelihood, findings)

    def _rate(self, module: Any) -> float:
        return float(module.p) if self.rate is None else self.rate
