"""What a search for the scale of the noise saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, final

from bayesdl.errors import UnsupportedError

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


@final
@dataclass(frozen=True)
class Probe:
    """One scale that was tried: the change of the loss there, and whether it stayed within the tolerance."""

    sigma: float
    change: float
    passed: bool


@final
@dataclass(frozen=True)
class SearchReport:
    """A search for sigma.

    Attributes:
        sigma: chosen scale.
        status: "found", "cap" (the tolerance was never reached), "floor" (it was never kept), "given" or "heldout".
        change: of the loss at `sigma`, in units of the metric.
        curve: all probes on all anchors, by sigma.
        metric: what changes ("nll", ..., or "custom").
        tolerance: of the change.
        monotone: whether the change grows with sigma over the curve.
        anchors: examples (observations) the loss is a mean over.
        num_samples: draws a probe.
        seed: of the draws, the same in every probe.
        labels: "given" or "pseudo".
        seconds: of the whole search.
        passes: its cost in forward passes over all anchors, a pass of S draws counting as S.
        relative: standard deviation of an entry of the noise over the root mean square of Delta W, by layer.
    """

    sigma: float
    status: str
    change: float = 0.0
    curve: tuple[Probe, ...] = ()
    metric: str = "nll"
    tolerance: float = 0.0
    monotone: bool = True
    anchors: int = 0
    num_samples: int = 0
    seed: int = 0
    labels: str = ""
    seconds: float = 0.0
    passes: float = 0.0
    relative: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        rows = [f"sigma {self.sigma:.4g} ({self.status}), {self.metric} changes by {self.change:.3g}"]
        rows += [f"  {p.sigma:.4g}  {p.change:.4g}  {'passed' if p.passed else 'failed'}" for p in self.curve]
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        rest = dict(entry)
        curve = tuple(Probe(**probe) for probe in rest.pop("curve"))
        relative = tuple((str(name), float(value)) for name, value in rest.pop("relative"))
        return cls(curve=curve, relative=relative, **rest)


def search_report(model: BayesianModel) -> SearchReport:
    """How the scale of an adapter's posterior was chosen.

    Raises:
        UnsupportedError: the model has no such posterior.
    """
    from bayesdl.posteriors.lora import adapter_posterior

    report = adapter_posterior(model).report
    if report is None:
        raise UnsupportedError("the posterior was made without a search; fit it with bdl.TFB")
    return report
