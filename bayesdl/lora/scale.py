"""Choosing the scale of an adapter's noise on data, with the same draws at every scale."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.likelihoods import Likelihood
from bayesdl.lora.adapters import weight
from bayesdl.lora.anchors import Anchors, Metric, check_metric, gather
from bayesdl.lora.losses import Losses
from bayesdl.lora.report import Probe, SearchReport
from bayesdl.lora.search import Found, Level, largest_passing, least
from bayesdl.network import Network
from bayesdl.posteriors.lora import AdapterPosterior, adapter_posterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

PILOTS = (16, 4)  # one anchor of so many guides the search
FEWEST_ANCHORS = 128  # from which on they do
WIDEST = 1e3  # to which a search by held-out data widens its range unasked: far more noise than adapters have weight


@final
@dataclass(frozen=True)
class SearchSettings:
    """Arguments of a search; those of `bdl.TFB` say what they mean."""

    tolerance: float = 0.003
    metric: str | Metric = "nll"
    num_samples: int = 10
    anchors: int = 500
    labels: str = "auto"
    sigma_range: tuple[float, float] = (1e-4, 1e-1)
    resolution: float = 0.02
    two_sided: bool = True

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a metric of one's own is named "custom" and has to be given again."""
        return {**dataclasses.asdict(self), "metric": self.metric_name}

    @property
    def metric_name(self) -> str:
        """Name of the metric."""
        return self.metric if isinstance(self.metric, str) else "custom"


def search_scale(
    network: Network,
    posterior: AdapterPosterior,
    likelihood: Likelihood,
    data: Iterable[Any],
    settings: SearchSettings,
    progress: bool = False,
) -> tuple[AdapterPosterior, tuple[Finding, ...]]:
    """The largest scale whose change of the anchors' loss stays within the tolerance.

    One anchor of 16, and then one of 4, guide the search where there are 128 or more; what it returns was probed
    on all.
    """
    check_metric(settings.metric)
    started = time.perf_counter()
    drawn = dataclasses.replace(posterior, num_samples=settings.num_samples, search=settings.to_json())
    anchors = gather(network, likelihood, data, settings.anchors, settings.labels, progress)
    levels: list[Losses] = []
    for stride in (*(PILOTS if anchors.count >= FEWEST_ANCHORS else ()), 1):
        chosen = anchors.every(stride)
        below = levels[-1] if levels else None
        levels.append(Losses(network, drawn, likelihood, settings.metric, chosen, below))
    *pilots, whole = (_level(losses, settings.two_sided) for losses in levels)
    found = largest_passing(whole, settings.tolerance, settings.sigma_range, settings.resolution, pilots)
    forwards = anchors.count + sum(losses.forwards for losses in levels)
    report = SearchReport(
        sigma=found.sigma,
        status=found.status,
        change=found.change,
        curve=found.curve,
        metric=settings.metric_name,
        tolerance=settings.tolerance,
        monotone=found.monotone,
        anchors=anchors.count,
        num_samples=settings.num_samples,
        seed=drawn.seed,
        labels=anchors.labels,
        seconds=time.perf_counter() - started,
        passes=forwards / anchors.count,
        relative=relative_noise(network, drawn, found.sigma),
    )
    return drawn.with_sigma(found.sigma, report), _findings(found, report, settings)


def _level(losses: Losses, two_sided: bool) -> Level:
    forecast = (lambda sigma: losses.foreseen_change(sigma, two_sided)) if losses.foresees else None
    return Level(lambda sigma: losses.change(sigma, two_sided), forecast)


def tune_tolerance(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    progress: bool = False,
    **options: Any,
) -> BayesianModel:
    """Repeat the search of `bdl.TFB` on other anchors or with other settings.

    Args:
        model: fitted by `bdl.TFB`.
        data: anchors; default those of the fit.
        options: any of `tolerance, metric, num_samples, anchors, labels, sigma_range, resolution, two_sided`; the
            others are those of the fit.

    Raises:
        UnsupportedError: another posterior.
        ArgumentError: no data, or an unknown option.
    """
    posterior = adapter_posterior(model)
    loader = model.fit_data if data is None else data
    if loader is None:
        raise ArgumentError('tune("tolerance", loader) needs a loader of anchors')
    names = {entry.name for entry in dataclasses.fields(SearchSettings)}
    odd = sorted(set(options) - names)
    if odd:
        raise ArgumentError(f"option {odd[0]!r} is not known; choose among {sorted(names)}")
    kept: dict[str, Any] = {**posterior.search, **options}
    if kept.get("metric") == "custom":
        raise ArgumentError("the search used a metric of your own, which a file does not hold: pass metric=")
    if "sigma_range" in kept:
        kept["sigma_range"] = tuple(kept["sigma_range"])
    settings = SearchSettings(**kept)
    tuned, findings = search_scale(model.network, posterior, model.likelihood, loader, settings, progress)
    return model.replaced(posterior=tuned, findings=findings)


def tune_heldout_scale(
    model: BayesianModel,
    data: Iterable[Any],
    *,
    sigma_range: tuple[float, float] | None = None,
    resolution: float = 0.05,
    progress: bool = False,
) -> BayesianModel:
    """The scale of least NLL on held-out data, with the same draws everywhere: a handful of scales are run.

    The present scale and none at all are among the candidates, so that the loss on these data never rises. Without
    `sigma_range` the method's own range is searched, and beyond it for as long as its upper end is the best.

    Raises:
        ArgumentError: no targets.
    """
    posterior = adapter_posterior(model)
    low, high = map(float, sigma_range or posterior.search.get("sigma_range", SearchSettings().sigma_range))
    started = time.perf_counter()
    anchors = _labelled(model, data, progress)
    curve = Losses(model.network, posterior, model.likelihood, "nll", anchors)
    forecast = curve.foreseen if curve.foresees else None
    seen = {posterior.sigma: curve(posterior.sigma), **least(curve, (low, high), resolution, forecast)}
    best = _best(seen)
    while sigma_range is None and high < WIDEST and _ends(best, high, resolution):
        low, high = high, 10.0 * high
        seen |= least(curve, (low, high), resolution, forecast)
        best = _best(seen)
    report = SearchReport(
        sigma=best,
        status="heldout",
        change=seen[best] - curve.plain,
        curve=tuple(Probe(s, seen[s] - curve.plain, seen[s] <= curve.plain) for s in sorted(seen)),
        anchors=anchors.count,
        num_samples=posterior.num_samples,
        seed=posterior.seed,
        labels=anchors.labels,
        seconds=time.perf_counter() - started,
        passes=1.0 + curve.forwards / anchors.count,
        relative=relative_noise(model.network, posterior, best),
    )
    text = f"sigma {best:.4g} has the least NLL on held-out data ({seen[best]:.4g}; {curve.plain:.4g} without noise)"
    finding = Finding("info", text, "", "sigma")
    if _ends(best, high, resolution):
        finding = Finding("warning", f"{text}, the upper end of sigma_range", "widen sigma_range", "sigma")
    return model.replaced(posterior=posterior.with_sigma(best, report), findings=(finding,))


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=lambda sigma: (losses[sigma], sigma))


def _ends(sigma: float, high: float, resolution: float) -> bool:
    """Whether a scale is the upper end of its range."""
    return high / (1.0 + resolution) < sigma <= high * (1.0 + 1e-9)


def relative_noise(network: Network, posterior: AdapterPosterior, sigma: float) -> tuple[tuple[str, float], ...]:
    """Standard deviation of an entry of the noise over the root mean square entry of s B A, by layer."""
    found = []
    for layer in posterior.layers:
        down, up = (weight(part(network.template)).double() for part in (layer.down, layer.up))
        size = float(((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt())
        spectrum = posterior.spectra[layer.key]
        kept = int((spectrum > 1e-6 * spectrum.max()).sum())
        # both times s sqrt(out in): sqrt(rank of P / out) is the spread of an entry of P Z
        found.append((layer.key, sigma * math.sqrt(kept * layer.inputs) / max(size, 1e-30)))
    return tuple(found)


def _labelled(model: BayesianModel, data: Iterable[Any], progress: bool) -> Anchors:
    try:
        return gather(model.network, model.likelihood, data, 1 << 62, "given", progress)
    except ArgumentError as error:
        if "no labels" in str(error):
            raise ArgumentError("the held-out loader yields no targets; expected (inputs, target)") from error
        raise


def _findings(found: Found, report: SearchReport, settings: SearchSettings) -> tuple[Finding, ...]:
    unit = {"nll": "nats per anchor", "gibbs": "nats per anchor", "flip": "of the anchors"}.get(report.metric, "")
    text = (
        f"sigma {found.sigma:.4g} changes {report.metric} by {found.change:.3g} {unit} (tolerance "
        f"{settings.tolerance:g}) on {report.anchors} anchors with {report.labels} labels"
    )
    if found.status == "found":
        return (Finding("info", text, "", "sigma"),)
    if found.status == "cap":
        problem = f"the tolerance was never reached: {text}, the upper end of sigma_range"
        advice = "widen sigma_range, or lower the tolerance"
    else:
        problem = "no scale kept the tolerance: sigma is 0, and predictions are those of the network itself"
        advice = "raise the tolerance, or widen sigma_range downwards"
    warnings.warn(f"{problem}; {advice}", stacklevel=2)
    return (Finding("warning", problem, advice, "sigma"),)
