"""The largest scale whose change of a loss stays within a tolerance, and the scale of least held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from bayesdl.errors import ArgumentError
from bayesdl.lora.report import Probe

Curve = Callable[[float], float]

GUARDS = (2.0, 4.0, 8.0)
ROUGH = 0.25  # how near, in logarithms, a pilot settles
TRIES = 8  # of a pilot to settle
FINE = 0.02  # of the resolution, to which the crossing of a forecast is computed
AIM = 0.45  # of the resolution, by which a probe aims past a crossing that it expects


@final
@dataclass(frozen=True)
class Level:
    """The change on some of the anchors.

    Attributes:
        change: c(sigma) >= 0, a fixed function, at a cost.
        forecast: what it may be elsewhere after the first call, for nothing; None: a curve through the last two values.
    """

    change: Curve
    forecast: Curve | None = None


@final
@dataclass
class _Probes:
    """Values of one level, each scale once, and what they let one expect elsewhere."""

    level: Level
    tolerance: float
    step: float
    seen: dict[float, float] = field(default_factory=dict)

    def passes(self, sigma: float) -> bool:
        if sigma not in self.seen:
            self.seen[sigma] = self.level.change(sigma)
        return self.seen[sigma] <= self.tolerance

    def crossing(self, low: float, high: float) -> float | None:
        """Where the forecast meets the tolerance; None where it lies on one side of it at both ends."""
        if self._expected(low) > self.tolerance or self._expected(high) <= self.tolerance:
            return None
        fine = math.log1p(FINE * self.step)
        while math.log(high / low) > fine:
            at = math.sqrt(low * high)
            low, high = (low, at) if self._expected(at) > self.tolerance else (at, high)
        return low

    def beyond(self, at: float, low: float, high: float) -> float:
        """Where the curve may cross next, upwards of a scale that passed, downwards of one that failed."""
        if self.passes(at):
            top = min((sigma for sigma in self.seen if sigma > at and not self.passes(sigma)), default=high)
            crossing = self.crossing(at, top)
            return top if crossing is None else crossing
        bottom = max((sigma for sigma in self.seen if sigma < at and self.passes(sigma)), default=low)
        crossing = self.crossing(bottom, at)
        return bottom if crossing is None else crossing

    def _expected(self, sigma: float) -> float:
        if sigma in self.seen:
            return self.seen[sigma]
        return self._fitted(sigma) if self.level.forecast is None else self.level.forecast(sigma)

    def _fitted(self, sigma: float) -> float:
        """a sigma + b sigma^2 through the two nearest values; b sigma^2 through a single one.

        A finite set of draws has a mean, which makes the change linear in small sigma; their spread makes it quadratic.
        """
        near = sorted(self.seen, key=lambda run: abs(math.log(run / sigma)))[:2]
        slopes = [self.seen[run] / run for run in near]
        if len(near) == 1:
            return slopes[0] / near[0] * sigma**2
        square = (slopes[1] - slopes[0]) / (near[1] - near[0])
        return (slopes[0] + square * (sigma - near[0])) * sigma


@final
@dataclass(frozen=True)
class Found:
    """Outcome: the largest scale that passed (0 where none did), its change, status and all probes by sigma."""

    sigma: float
    status: str
    change: float
    curve: tuple[Probe, ...]

    @property
    def monotone(self) -> bool:
        """Whether the change grows along the curve."""
        return all(a.change <= b.change for a, b in pairwise(self.curve))


def largest_passing(
    level: Level,
    tolerance: float,
    bounds: tuple[float, float],
    resolution: float,
    pilots: Sequence[Level] = (),
) -> Found:
    """The largest sigma found to pass, a failing one being within a factor 1 + resolution above it.

    Args:
        level: the change on all anchors; it passes where c <= tolerance.
        tolerance: of it.
        bounds: the range of sigma.
        resolution: of the ratio of failing to passing scale.
        pilots: cheap levels near it, the cheapest first, which say where to look. What is returned, and the failing
            scale above it, were probed on `level` itself; forecasts too only say where to look.

    Returns:
        Status "cap" where the upper bound passes, "floor" (sigma 0) where the lower one fails, else "found".
        A curve that is not monotone: the scales 1/2, 1/4 and 1/8 of the outcome are probed too (on the cheapest pilot
        where there is one), and the search goes on below one that fails.

    Raises:
        ArgumentError: an empty range, a negative tolerance or resolution.
    """
    low, high = bounds
    if not (0 < low < high and math.isfinite(high) and tolerance >= 0 and resolution > 0):
        raise ArgumentError(
            f"sigma_range={bounds}, tolerance={tolerance}, resolution={resolution}: expected 0 < low < high, a "
            "tolerance from zero and a positive resolution"
        )
    probes, *guides = (_Probes(one, tolerance, resolution) for one in (level, *pilots))
    start = math.sqrt(low * high)
    for guide in guides:
        start = _settled(guide, start, low, high)
    bottom, top = _bracketed(probes, start, low, high)
    if not probes.passes(bottom):
        sigma, status = 0.0, "floor"
    else:
        sigma, status = (high, "cap") if bottom == top else (_close(probes, bottom, top), "found")
        sigma, status = _guarded(probes, guides[0] if guides else probes, low, sigma, status)
    curve = tuple(Probe(s, probes.seen[s], probes.seen[s] <= tolerance) for s in sorted(probes.seen))
    return Found(sigma, status, probes.seen.get(sigma, 0.0), curve)


def _settled(guide: _Probes, start: float, low: float, high: float) -> float:
    """Where a pilot crosses, no better than it stands for the true curve: tried until what it expects stays there."""
    at = start
    for _ in range(TRIES):
        ahead = guide.beyond(at, low, high)
        if abs(math.log(ahead / at)) <= ROUGH:
            return ahead
        at = ahead
    return at


def _bracketed(probes: _Probes, start: float, low: float, high: float) -> tuple[float, float]:
    """A passing and a failing scale; the upper bound twice where it passes, the lower one first where it fails."""
    at, reach = start, math.log1p(probes.step)
    while True:
        passed = probes.passes(at)
        passing = [sigma for sigma in probes.seen if probes.passes(sigma)]
        failing = [sigma for sigma in probes.seen if not probes.passes(sigma)]
        if passing and failing and max(passing) < min(failing):
            return max(passing), min(failing)
        if passing and failing:  # not monotone: the lowest crossing
            return max((s for s in passing if s < min(failing)), default=low), min(failing)
        if (passed and at == high) or (not passed and at == low):
            return at, high
        # the first forecast may miss to either side; a later one misses little, and is to be known from both
        jump, first = abs(math.log(probes.beyond(at, low, high) / at)), len(probes.seen) == 1
        jump = reach if jump <= reach else jump if first else jump + AIM * math.log1p(probes.step)
        reach *= 1.0 if first else 2.0
        at = min(high, at * math.exp(jump)) if passed else max(low, at / math.exp(jump))


def _close(probes: _Probes, low: float, high: float) -> float:
    """The passing end of a bracket narrowed to the resolution, as forecast, by halves where that erred."""
    end, trusted = 1.0 + probes.step, True
    while high / low > end * (1 + 1e-12):
        at, expected = math.sqrt(low * high), None
        crossing = probes.crossing(low, high) if trusted and high / low > end * end else None
        if crossing is not None:
            at = low * end if crossing <= low * end else high / end if crossing >= high / end else crossing * end**-AIM
            expected = at <= crossing
        passed = probes.passes(at)
        low, high = (at, high) if passed else (low, at)
        trusted = expected is None or passed is expected
    return low


def _guarded(probes: _Probes, watch: _Probes, low: float, sigma: float, status: str) -> tuple[float, str]:
    """Look for failures below the outcome, where the curve is not monotone."""
    while True:
        below = [sigma / by for by in GUARDS if sigma / by >= low]
        failed = [at for at in below if not watch.passes(at) and not probes.passes(at)]
        if not failed:
            return sigma, status
        if not probes.passes(low):
            return 0.0, "floor"
        sigma, status = _close(probes, low, min(failed)), "found"


def least(
    loss: Curve, bounds: tuple[float, float], resolution: float, forecast: Curve | None = None
) -> dict[float, float]:
    """Probes of a search over log sigma for the least loss, 0 among them.

    A forecast, for nothing after the first probe, says where to look, until its least lies within the resolution of a
    probe. Without one, or where it does not settle: a golden-section search, which probes both bounds too.
    """
    low, high = bounds
    seen = {0.0: loss(0.0)}
    at = math.sqrt(low * high)
    for _ in range(TRIES if forecast is not None else 0):
        assert forecast is not None
        seen[at] = loss(at)
        at = _lowest(forecast, low, high)
        if any(run and abs(math.log(at / run)) <= math.log1p(resolution) for run in seen):
            return seen
    seen |= {sigma: loss(sigma) for sigma in bounds}
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = math.log(low), math.log(high)
    inner = [b - ratio * (b - a), a + ratio * (b - a)]
    values = [loss(math.exp(x)) for x in inner]
    seen |= {math.exp(x): v for x, v in zip(inner, values, strict=True)}
    while b - a > math.log1p(resolution):
        if values[0] <= values[1]:
            b, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = b - ratio * (b - a)
            values[0] = seen[math.exp(inner[0])] = loss(math.exp(inner[0]))
        else:
            a, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = a + ratio * (b - a)
            values[1] = seen[math.exp(inner[1])] = loss(math.exp(inner[1]))
    return seen


def _lowest(curve: Curve, low: float, high: float) -> float:
    """Where a curve is lowest: on a grid, and on finer ones around its best point."""
    points = 16
    for _ in range(4):
        grid = [low * (high / low) ** (index / points) for index in range(points + 1)]
        best = min(range(points + 1), key=[curve(sigma) for sigma in grid].__getitem__)
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points)]
        points = 6
    return grid[best]
