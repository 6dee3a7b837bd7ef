"""The largest scale whose change of a loss stays within a tolerance, and the scale of least held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from bayesdl.errors import ArgumentError
from bayesdl.lora.report import Probe

Curve = Callable[[float], float]

GUARDS = (2.0, 4.0, 8.0)
ROUGH = 0.3  # resolution of a pilot's search
AIM = 0.45  # of the resolution, by which a probe aims past a crossing that it expects


@final
@dataclass
class _Bracket:
    """Probes of one change curve, each scale once."""

    change: Curve
    tolerance: float
    seen: dict[float, float] = field(default_factory=dict)

    def passes(self, sigma: float) -> bool:
        if sigma not in self.seen:
            self.seen[sigma] = self.change(sigma)
        return self.seen[sigma] <= self.tolerance

    def crossing(self, low: float, high: float) -> float | None:
        """Where a curve a sigma + b sigma^2 through two probes meets the tolerance; None if it falls there.

        A finite set of draws has a mean, which makes the change linear in small sigma; their spread makes it quadratic.
        """
        below, above = self.seen.get(low, 0.0) / low, self.seen.get(high, 0.0) / high
        square = (above - below) / (high - low)
        linear = below - square * low
        inside = linear**2 + 4.0 * square * self.tolerance
        if inside < 0 or linear + math.sqrt(inside) <= 0:
            return None
        at = 2.0 * self.tolerance / (linear + math.sqrt(inside))
        return at


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
    change: Curve,
    tolerance: float,
    bounds: tuple[float, float],
    resolution: float,
    pilot: Curve | None = None,
) -> Found:
    """The largest sigma found to pass, a failing one being within a factor 1 + resolution above it.

    Args:
        change: c(sigma) >= 0, a fixed function; it passes where c <= tolerance.
        tolerance: of it.
        bounds: the range of sigma.
        resolution: of the ratio of failing to passing scale.
        pilot: a cheap curve near `change`, which says where to look; what is returned was probed on `change` itself.

    Returns:
        Status "cap" where the upper bound passes, "floor" (sigma 0) where the lower one fails, else "found".
        A curve that is not monotone: the scales 1/2, 1/4 and 1/8 of the outcome are probed too (on the pilot where
        there is one), and the search goes on below one that fails.

    Raises:
        ArgumentError: an empty range, a negative tolerance or resolution.
    """
    low, high = bounds
    if not (0 < low < high and math.isfinite(high) and tolerance >= 0 and resolution > 0):
        raise ArgumentError(
            f"sigma_range={bounds}, tolerance={tolerance}, resolution={resolution}: expected 0 < low < high, a "
            "tolerance from zero and a positive resolution"
        )
    probes = _Bracket(change, tolerance)
    guide = None if pilot is None else _Bracket(pilot, tolerance)
    sigma, status = _search(probes, guide, low, high, resolution)
    curve = tuple(Probe(s, probes.seen[s], probes.seen[s] <= tolerance) for s in sorted(probes.seen))
    return Found(sigma, status, probes.seen.get(sigma, 0.0), curve)


def _search(probes: _Bracket, guide: _Bracket | None, low: float, high: float, step: float) -> tuple[float, str]:
    if guide is None:
        if probes.passes(high):
            return _guarded(probes, None, low, high, step, "cap")
        if not probes.passes(low):
            return 0.0, "floor"
        return _guarded(probes, None, low, _close(probes, low, high, step), step, "found")
    if guide.passes(high):
        bottom, top = high, high
    elif not guide.passes(low):
        bottom, top = low, low
    else:
        bottom = top = _about(guide, low, high)
    # walk outwards from the pilot's answer, along its slope, until the true curve is bracketed
    bottom, top = _bracketed(probes, guide, min(max(bottom, low), high), low, high, step)
    if not probes.passes(bottom):
        return 0.0, "floor"
    if bottom == top:
        return _guarded(probes, guide, low, high, step, "cap")
    return _guarded(probes, guide, low, _close(probes, bottom, top, step), step, "found")


def _about(guide: _Bracket, low: float, high: float) -> float:
    """Where a curve crosses, roughly: no better than it stands for the true one."""
    bottom = _close(guide, low, high, ROUGH)
    top = min(sigma for sigma, value in guide.seen.items() if sigma > bottom and value > guide.tolerance)
    crossing = guide.crossing(bottom, top)
    return crossing if crossing is not None and bottom < crossing < top else math.sqrt(bottom * top)


def _bracketed(
    probes: _Bracket, guide: _Bracket, guess: float, low: float, high: float, step: float
) -> tuple[float, float]:
    """A passing and a failing scale; the upper bound twice where it passes, the lower one first where it fails."""
    before: float | None = None
    slope, reach = _slope(guide), AIM * math.log1p(step)
    at, passing, failing = guess, 0.0, math.inf
    while True:
        passed = probes.passes(at)
        passing, failing = (at, failing) if passed else (passing, at)
        if passing and failing < math.inf:
            return passing, failing
        if (passed and at == high) or (not passed and at == low):
            return at, high
        value = probes.seen[at]
        known = value > 0 and probes.tolerance > 0
        jump = abs(math.log(probes.tolerance / value)) / slope if known else math.log(2.0)
        if before is not None:
            crossing = probes.crossing(min(at, before), max(at, before))
            jump = math.log(crossing / at) * (1 if passed else -1) if crossing is not None else jump
            jump = max(jump, reach)
        before = at
        far = math.exp(jump + reach)  # beyond the crossing, so that both sides of it are known
        at, reach = min(high, at * far) if passed else max(low, at / far), 2 * reach


def _slope(guide: _Bracket) -> float:
    """Exponent of the pilot's curve where it crosses the tolerance; 2 where it does not say."""
    around = sorted((s, c) for s, c in guide.seen.items() if c > 0)
    pairs = [(a, b) for a, b in pairwise(around) if a[1] <= guide.tolerance < b[1]]
    if not pairs:
        return 2.0
    (s0, c0), (s1, c1) = pairs[-1]
    return min(max(math.log(c1 / c0) / math.log(s1 / s0), 0.5), 4.0)


def _close(probes: _Bracket, low: float, high: float, step: float) -> float:
    """The passing end of a bracket narrowed to a ratio 1 + step: bisection in logarithms, or better where it can be."""
    end, halved = 1.0 + step, True
    while high / low > end * (1 + 1e-12):
        width, at = math.log(high / low), math.sqrt(low * high)
        crossing = probes.crossing(low, high) if halved else None
        if crossing is not None and low < crossing < high and high / low > end * end:
            at = low * end if crossing <= low * end else high / end if crossing >= high / end else crossing * end**-AIM
        low, high = (at, high) if probes.passes(at) else (low, at)
        halved = math.log(high / low) <= width / 2
    return low


def _guarded(
    probes: _Bracket, guide: _Bracket | None, low: float, sigma: float, step: float, status: str
) -> tuple[float, str]:
    """Look for failures below the outcome, where the curve is not monotone."""
    watch = guide or probes
    while True:
        below = [sigma / by for by in GUARDS if sigma / by >= low]
        failed = [at for at in below if not watch.passes(at) and not probes.passes(at)]
        if not failed:
            return sigma, status
        if not probes.passes(low):
            return 0.0, "floor"
        sigma, status = _close(probes, low, min(failed), step), "found"


def least(loss: Curve, bounds: tuple[float, float], resolution: float) -> dict[float, float]:
    """Probes of a golden-section search over log sigma for the least loss, 0 and both bounds among them."""
    low, high = bounds
    seen = {sigma: loss(sigma) for sigma in (0.0, low, high)}
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
