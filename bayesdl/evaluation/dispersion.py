"""Whether predicted spreads are right: calibration of levels and variances, coverage where it is worst.

Arguments as in `bayesdl.evaluation.regression`; values are means over outputs. Functions ending in `_of` take checked
tensors: `cdf` PIT values, `variance` and `error` (N, D) float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import binning, regression, selective, validation, weighting


def miscal_area(
    targets: Any, *, mean: Any, variance: Any, member_weights: Any = None, weights: Any = None
) -> float | Tensor:
    """Area between the coverage of central intervals and their level, over all levels; exact from sorted PIT values."""
    mixture, y = regression.read(targets, mean, variance, member_weights)
    return miscal_area_of(mixture.cdf(y), validation.example_weights(weights, len(y)))


def miscal_area_of(cdf: Tensor, weights: Tensor | None) -> float | Tensor:
    """`miscal_area` of PIT values (N, D) under checked weights."""
    table = weighting.rows(weights, len(cdf), cdf.device)
    areas = []
    for column in (2 * cdf - 1).abs().clamp_max(1.0).T:
        ordered, order = column.sort()
        share = (table / table.sum(1, keepdim=True))[:, order].cumsum(1)
        edges = torch.cat([ordered.new_zeros(1), ordered, ordered.new_ones(1)])
        height = torch.cat([share.new_zeros(len(share), 1), share], 1)
        # Between two edges the coverage is constant, so the integrand |height - l| has the antiderivative below.
        areas.append((_signed_square(edges[1:] - height) - _signed_square(edges[:-1] - height)).sum(1) / 2)
    return weighting.finish(torch.stack(areas).mean(0), weights)


def ence(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    bins: int = 15,
    member_weights: Any = None,
    weights: Any = None,
    backend: validation.Backend = "torch",
) -> float | Tensor:
    """Expected normalised calibration error (Levi et al. 2022): mean over bins of |RMV - RMSE| / RMV.

    Equal-mass bins of the predicted standard deviation, RMV the root mean variance of a bin; equal deviations share a
    bin, so a constant one is a single bin.

    `backend="netcal"` computes it by netcal, whose bins of the deviation are equally wide between the smallest and the
    largest: another number, not a check of this one.
    """
    mixture, y = regression.read(targets, mean, variance, member_weights)
    if validation.other_backend(backend, weights):
        from bayesdl.evaluation.netcal import deviation_error

        return deviation_error("ence", mixture.mean, mixture.variance, y, validation.bin_count(bins))
    checked = validation.example_weights(weights, len(y))
    return ence_of(mixture.variance, y - mixture.mean, validation.bin_count(bins), checked)


def ence_of(variance: Tensor, error: Tensor, bins: int, weights: Tensor | None) -> float | Tensor:
    """`ence` of variances and errors (N, D)."""
    values = []
    for count, spread, squares in _bins(variance, error, bins, weights):
        held = count > 0
        root, missed = (spread / count.clamp_min(_TINY)).sqrt(), (squares / count.clamp_min(_TINY)).sqrt()
        gaps = torch.where(held, (root - missed).abs() / root.clamp_min(_TINY), 0.0)
        values.append(gaps.sum(1) / held.sum(1))
    return weighting.finish(torch.stack(values).mean(0), weights)


def uce(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    bins: int = 15,
    member_weights: Any = None,
    weights: Any = None,
    backend: validation.Backend = "torch",
) -> float | Tensor:
    """Uncertainty calibration error (Laves et al. 2020): sum_b (n_b / N) |MSE_b - mean variance_b|, equal-mass bins.

    `backend="netcal"` computes it by netcal, whose bins of the variance are equally wide between the smallest and the
    largest: another number, not a check of this one.
    """
    mixture, y = regression.read(targets, mean, variance, member_weights)
    if validation.other_backend(backend, weights):
        from bayesdl.evaluation.netcal import deviation_error

        return deviation_error("uce", mixture.mean, mixture.variance, y, validation.bin_count(bins))
    checked = validation.example_weights(weights, len(y))
    return uce_of(mixture.variance, y - mixture.mean, validation.bin_count(bins), checked)


def uce_of(variance: Tensor, error: Tensor, bins: int, weights: Tensor | None) -> float | Tensor:
    """`uce` of variances and errors (N, D)."""
    parts = [
        (spread - squares).abs().sum(1) / count.sum(1)
        for count, spread, squares in _bins(variance, error, bins, weights)
    ]
    return weighting.finish(torch.stack(parts).mean(0), weights)


def ause(targets: Any, *, mean: Any, variance: Any, member_weights: Any = None, weights: Any = None) -> float | Tensor:
    """Area under the sparsification error, relative to the mean absolute error (Ilg et al. 2018).

    The mean absolute error of what is left when the most uncertain examples are removed first, minus the same with the
    largest errors removed first, averaged over the removed fractions i / N.

    Raises:
        UndefinedError: every error is 0.
    """
    mixture, y = regression.read(targets, mean, variance, member_weights)
    return ause_of(mixture.variance.mean(1).sqrt(), (y - mixture.mean).abs().mean(1), weights)


def ause_of(deviation: Tensor, error: Tensor, weights: Any) -> float | Tensor:
    """`ause` of deviations and absolute errors (N,)."""
    checked = validation.example_weights(weights, len(error))
    # What is left when i examples are gone is the N - i most confident ones: a risk-coverage curve.
    excess = selective.eaurc(-deviation, error, weights=checked)
    overall = torch.as_tensor(weighting.mean(error, checked), dtype=torch.float64)
    values = torch.as_tensor(excess, dtype=torch.float64) / overall
    return weighting.defined(values, checked, "ause: every error is 0", "no errors")


def ssc(covered: Any, width: Any, *, strata: int = 5, weights: Any = None) -> float | Tensor:
    """Size-stratified coverage: the smallest coverage over equal-mass strata of the width (Angelopoulos et al. 2021).

    Args:
        covered: (N,) whether the interval or set holds the target. width: (N,) of the interval, or size of the set.
    """
    width = validation.vector(width, "width")
    inside = validation.binary_targets(covered, tuple(width.shape), "covered").to(width.device)
    checked = validation.example_weights(weights, len(width))
    strata = validation.bin_count(strata)
    index = binning.equal_mass(width, strata, checked)
    table = torch.stack([torch.ones_like(inside), inside])
    count, hits = binning.bin_totals(index, table, strata, checked).unbind(1)
    shares = torch.where(count > 0, hits / count.clamp_min(_TINY), torch.inf)
    return weighting.finish(shares.amin(1), checked)


def worst_slab(
    covered: Any,
    features: Any,
    *,
    mass: float = 0.1,
    directions: int = 200,
    generator: torch.Generator | None = None,
) -> float:
    """Coverage in the slab a <= v'x <= b of at least `mass` in which it looks worst (Cauchois et al. 2021).

    The slab is sought over random directions v on a random half of the examples and its coverage measured on the other
    half, so that the search does not bias it.

    Args:
        covered: (N,) whether the interval or set holds the target. features: (N, d) inputs or features.
        mass: least share of the examples in the slab. directions: how many are tried. generator: None is seeded with 0.

    Raises:
        ArgumentError: too few examples for a slab of that mass.
    """
    x = validation.wide(validation.tensor(features, "features"))
    validation.rank(x, "features", (2,))
    validation.finite(x, "features")
    inside = validation.binary_targets(covered, tuple(x.shape[:1]), "covered").to(x)
    mass, directions = validation.fraction(mass, "mass"), validation.bin_count(directions)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    search, measure = order[: len(x) // 2], order[len(x) // 2 :]
    least = math.ceil(mass * len(search) - 1e-9)
    if least < 2:
        raise ArgumentError(f"{len(x)} examples hold no slab of mass {mass:g}: give more, or a larger mass")
    shape = (x.shape[1], directions)
    v = torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device).to(x.device)
    v = v / v.norm(dim=0)
    # A contiguous stretch of least mean is shorter than twice the least length: longer ones split into two.
    longest = min(2 * least, len(search))
    lengths = sorted({round(float(n)) for n in torch.linspace(least, longest, 16).tolist()})
    best, found = math.inf, (0, 0.0, 0.0)
    for column in range(directions):
        ordered, place = (x[search] @ v[:, column]).sort()
        upto = torch.cat([inside.new_zeros(1), inside[search][place].cumsum(0)])
        for length in lengths:
            shares = (upto[length:] - upto[:-length]) / length
            start = int(shares.argmin())
            if float(shares[start]) < best:
                best = float(shares[start])
                found = (column, float(ordered[start]), float(ordered[start + length - 1]))
    projected = x[measure] @ v[:, found[0]]
    chosen = (projected >= found[1]) & (projected <= found[2])
    if not bool(chosen.any()):
        raise validation.UndefinedError("the slab holds none of the examples left for measuring", "empty slab")
    return float(inside[measure][chosen].mean())


_TINY = torch.finfo(torch.float64).tiny


def _signed_square(x: Tensor) -> Tensor:
    return x * x.abs()


def _bins(variance: Tensor, error: Tensor, bins: int, weights: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for v, e in zip(variance.T, error.T, strict=True):
        v = v.contiguous()
        index = binning.equal_mass(v, bins, weights)
        totals = binning.bin_totals(index, torch.stack([torch.ones_like(v), v, e.square()]), bins, weights)
        count, spread, squares = totals.unbind(1)
        found.append((count, spread, squares))
    return found
