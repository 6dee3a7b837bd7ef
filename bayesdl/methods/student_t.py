"""Student-t last layer: the exact regression of `bdl.VBLL` under an unknown scale of prior and noise together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from bayesdl.errors import UnsupportedError
from bayesdl.likelihoods import Gaussian
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.vbll import VBLL
from bayesdl.select import Selector


@final
@dataclass(frozen=True)
class StudentT(Method):
    """`bdl.VBLL(noise="gamma")` under its own name: one inverse-gamma scale multiplies prior and noise of an output.

    The predictive is Student-t with 2 a_n degrees of freedom, a_n = shape + n / 2 (n - 1 for a flat intercept): heavier
    tails than a Gaussian's where data are few (a scale mixture of Gaussian processes on the features).

    Args:
        shape: a_0 of the inverse-gamma prior; with `rate` zero the reference prior p(s^2) = 1 / s^2.
        rate: b_0.
        layer, intercept, prior_sharing, tuning, cache_bytes: as in `bdl.VBLL`.
        select: not used; a last layer is chosen by `layer`.
    """

    shape: float = 0.0
    rate: float = 0.0
    layer: str = "auto"
    intercept: str = "flat"
    prior_sharing: str = "output"
    tuning: str = VBLL.tuning
    cache_bytes: int = 2**31
    select: Selector | None = None

    name: ClassVar[str] = "student-t"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        if not isinstance(task.likelihood, Gaussian):
            raise UnsupportedError(
                f"the {task.likelihood.name} likelihood has no Student-t last layer; use "
                'likelihood="gaussian", or method "vbll" for classes'
            )
        exact = VBLL(
            noise="gamma",
            noise_prior=(self.shape, self.rate),
            layer=self.layer,
            intercept=self.intercept,
            prior_sharing=self.prior_sharing,
            tuning=self.tuning,
            cache_bytes=self.cache_bytes,
        )
        return exact.fit(task)
