"""What torch.distributions lacks: sampling from a generator, quantiles of mixtures, log-densities per example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from bayesdl.errors import UnsupportedError

ENTROPY_POINTS = 512


def per_example(distribution: Distribution, value: Tensor) -> Tensor:
    """Sum a log-density or entropy of `distribution` over its batch axes behind the first: `(..., B)`.

    Those of a categorical are positions, each an observation of its own, and stay.
    """
    if isinstance(distribution, Categorical):
        return value
    outputs = len(distribution.batch_shape) - 1
    return value.flatten(-outputs).sum(-1) if outputs > 0 else value


def unvalidated(distribution: Distribution) -> Distribution:
    """The same object with the checks of its arguments switched off."""
    if isinstance(distribution, Independent):
        unvalidated(distribution.base_dist)
    distribution._validate_args = False
    return distribution


def entropy(distribution: Distribution) -> Tensor:
    """Entropy in nats of each example, `(B,)`.

    Closed where torch has one. Mixtures of normals and Poisson families: the mean of -log p over each component,
    at quasi-random points common to all examples, so that an example's entropy does not depend on its batch.
    Families unknown here: a Monte Carlo mean from a fixed seed, which does.
    """
    inner = _without_independent(distribution)
    single = _single_outputs(inner)
    if single is not None:
        return entropy(single).reshape(inner.batch_shape).sum(-1)
    if isinstance(inner, (Categorical, Bernoulli, Normal, MultivariateNormal, StudentT)):
        return per_example(distribution, distribution.entropy())
    mixed = isinstance(inner, MixtureSameFamily)
    parts = _components(inner) if isinstance(inner, MixtureSameFamily) else inner
    if not isinstance(parts, (Normal, Poisson, StudentT)):
        draws = sample(distribution, ENTROPY_POINTS, torch.Generator().manual_seed(0))
        return -per_example(distribution, distribution.log_prob(draws)).mean(0)
    centre = parts.mean if mixed else parts.mean.unsqueeze(1)  # (B, S, C)
    count = max(8, ENTROPY_POINTS // centre.shape[1])
    points = _unit_points(count, centre)
    weights = inner.mixture_distribution.probs if isinstance(inner, MixtureSameFamily) else centre.new_ones(1, 1)
    total = centre.new_zeros(centre.shape[0])
    for s in range(centre.shape[1]):  # one component at a time: memory for `count` draws, not for all
        values = _inverse(parts, centre[:, s], s, points)
        total = total - weights[:, s] * per_example(distribution, distribution.log_prob(values)).mean(0)
    return total


def _unit_points(count: int, like: Tensor) -> Tensor:
    """Quasi-random points `(count, 1, C)` in the open unit cube."""
    points = torch.quasirandom.SobolEngine(like.shape[-1], scramble=True, seed=0).draw(count, dtype=torch.float64)
    return points.clamp(1e-7, 1.0 - 1e-7).unsqueeze(1).to(like)


def _inverse(parts: Normal | Poisson | StudentT, centre: Tensor, s: int, points: Tensor) -> Tensor:
    """Values `(K, B, C)` of component `s` at the levels `points`."""
    if isinstance(parts, Normal):
        return centre + parts.scale[:, s] * torch.special.ndtri(points)
    if isinstance(parts, StudentT):
        return centre + parts.scale[:, s] * _student_quantile(parts.df[:, s], points)
    levels, rates = torch.broadcast_tensors(points, centre)
    flat = rates.reshape(-1, 1, rates.shape[-1])
    return _poisson_quantile(flat, flat.new_ones(1), levels.reshape(-1, levels.shape[-1])).reshape(rates.shape)


def _without_independent(distribution: Distribution) -> Distribution:
    return distribution.base_dist if isinstance(distribution, Independent) else distribution


def sample(distribution: Distribution, n: int, generator: torch.Generator | None) -> Tensor:
    """`n` draws that use `generator` alone, where torch's own `.sample` would use global state.

    Families unknown here run in a fork of that state.
    """
    if isinstance(distribution, Independent):
        return sample(distribution.base_dist, n, generator)
    single = _single_outputs(distribution)
    if single is not None:
        return sample(single, n, generator).reshape(n, *distribution.batch_shape)
    if isinstance(distribution, MixtureSameFamily):
        return _sample_mixture(distribution, n, generator)
    shape = torch.Size([n]) + distribution.batch_shape
    if isinstance(distribution, Categorical):
        flat = distribution.probs.reshape(-1, distribution.probs.shape[-1])
        drawn = torch.multinomial(flat, n, replacement=True, generator=generator)
        return drawn.T.reshape(shape)
    if isinstance(distribution, Bernoulli):
        return torch.bernoulli(distribution.probs.expand(shape), generator=generator)
    if isinstance(distribution, Normal):
        return distribution.loc + distribution.scale * _randn(shape, distribution.loc, generator)
    if isinstance(distribution, MultivariateNormal):
        noise = _randn(shape + distribution.event_shape, distribution.loc, generator)
        return distribution.loc + torch.einsum("...ij,...j->...i", distribution.scale_tril, noise)
    if isinstance(distribution, Poisson):
        return torch.poisson(distribution.rate.expand(shape), generator=generator)
    if isinstance(distribution, StudentT):
        half = 0.5 * distribution.df.expand(shape)
        mixing = torch._standard_gamma(half, generator) / half
        return distribution.loc + distribution.scale * _randn(shape, distribution.loc, generator) / mixing.sqrt()
    return _sample_seeded(distribution, n, generator)


def quantile(distribution: Distribution, q: float) -> Tensor:
    """`(B, C)` marginal quantiles.

    Normal families in closed form; mixtures by bisection on the marginal CDF between the extreme quantiles
    of the components, in float64, until the bracket is at most 1e-10 relative (integers: exact).

    Raises:
        UnsupportedError: the family has no CDF.
    """
    if isinstance(distribution, Independent):
        return quantile(distribution.base_dist, q)
    single = _single_outputs(distribution)
    if single is not None:
        return quantile(single, q).reshape(distribution.batch_shape)
    if isinstance(distribution, Normal):
        return distribution.icdf(torch.as_tensor(q, dtype=distribution.loc.dtype, device=distribution.loc.device))
    if isinstance(distribution, MultivariateNormal):
        return quantile(Normal(distribution.loc, distribution.variance.sqrt()), q)
    if isinstance(distribution, StudentT):
        return distribution.loc + distribution.scale * _student_quantile(distribution.df, q)
    if isinstance(distribution, Poisson):
        return _poisson_quantile(distribution.rate.unsqueeze(1), distribution.rate.new_ones(1), q)
    if isinstance(distribution, MixtureSameFamily):
        parts, weights = _components(distribution), distribution.mixture_distribution.probs
        if isinstance(parts, Normal):
            return normal_mixture_quantile(parts.loc, parts.scale, weights, q)
        if isinstance(parts, Poisson):
            return _poisson_quantile(parts.rate, weights, q)
    if type(distribution).icdf is not Distribution.icdf:  # a family of its own that knows its quantiles
        return distribution.icdf(distribution.mean.new_tensor(q))
    raise UnsupportedError(f"{type(distribution).__name__} has no quantile function; use .sample and take quantiles")


def _student_quantile(df: Tensor, q: Tensor | float) -> Tensor:
    """Quantiles of the standard Student-t with `df` degrees of freedom."""
    from scipy.special import stdtrit  # torch has no inverse of the incomplete beta function

    levels = q.double().cpu().numpy() if isinstance(q, Tensor) else q
    return torch.as_tensor(stdtrit(df.double().cpu().numpy(), levels)).to(df)


def normal_mixture_quantile(loc: Tensor, scale: Tensor, weights: Tensor, q: float) -> Tensor:
    """Quantiles `(B, C)` of mixtures of normals with `loc`, `scale` `(B, S, C)` and weights `(B, S)` or `(S,)`."""
    mean, sd = loc.double(), scale.double()
    share = weights.double().expand(mean.shape[:2]).unsqueeze(-1)
    ends = Normal(mean, sd).icdf(torch.as_tensor(q, dtype=mean.dtype, device=mean.device))
    low, high = ends.amin(1), ends.amax(1)
    for _ in range(200):
        if bool(((high - low) <= 1e-10 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-300)).all()):
            break
        middle = 0.5 * (low + high)
        below = (share * Normal(mean, sd).cdf(middle.unsqueeze(1))).sum(1) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found = (0.5 * (low + high)).detach()
    if not (torch.is_grad_enabled() and (mean.requires_grad or sd.requires_grad or share.requires_grad)):
        return found.to(loc.dtype)
    # one Newton step, whose derivative is that of the implicit function; the bisection has none
    parts = Normal(mean, sd)
    density = (share * parts.log_prob(found.unsqueeze(1)).exp()).sum(1).detach()
    return (found + (q - (share * parts.cdf(found.unsqueeze(1))).sum(1)) / density).to(loc.dtype)


def _poisson_quantile(rate: Tensor, weights: Tensor, q: float | Tensor) -> Tensor:
    rates = rate.double()
    share = weights.double().expand(rates.shape[:2]).unsqueeze(-1)

    def cdf(k: Tensor) -> Tensor:
        # P(Y <= k) is the upper regularised gamma function Q(k + 1, rate)
        return (share * torch.special.gammaincc(k.unsqueeze(1) + 1.0, rates)).sum(1)

    low = torch.full_like(rates.amax(1), -1.0)
    high = (rates.amax(1) + 1.0).ceil()
    while bool((cdf(high) < q).any()):
        high = torch.where(cdf(high) < q, 2.0 * high, high)
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor().clamp(min=0)
        below = cdf(middle) < q
        wide = high - low > 1
        low, high = torch.where(below & wide, middle, low), torch.where(~below & wide, middle, high)
    return high.to(rate.dtype)


def _single_outputs(distribution: Distribution) -> MixtureSameFamily | None:
    """Mixtures of normals that every output `(B, C)` has for itself, as those of B C examples of one output."""
    if not isinstance(distribution, MixtureSameFamily) or len(distribution.batch_shape) != 2:
        return None
    parts = distribution.component_distribution
    if not isinstance(parts, Normal):
        return None
    flat = Normal(parts.loc.flatten(0, 1).unsqueeze(-1), parts.scale.flatten(0, 1).unsqueeze(-1))
    return MixtureSameFamily(Categorical(distribution.mixture_distribution.probs.flatten(0, 1)), Independent(flat, 1))


def _components(distribution: MixtureSameFamily) -> Distribution:
    return _without_independent(distribution.component_distribution)


def _sample_mixture(distribution: MixtureSameFamily, n: int, generator: torch.Generator | None) -> Tensor:
    chosen = sample(distribution.mixture_distribution, n, generator)  # (n, B)
    parts = _components(distribution)
    if isinstance(parts, (Normal, Poisson)):
        # the chosen components alone, where drawing from all of them would cost S times as much
        rows = torch.arange(chosen.shape[1], device=chosen.device)
        if isinstance(parts, Poisson):
            return torch.poisson(parts.rate[rows, chosen], generator=generator)
        loc, scale = parts.loc[rows, chosen], parts.scale[rows, chosen]
        return loc + scale * _randn(loc.shape, loc, generator)
    values = sample(distribution.component_distribution, n, generator)  # (n, B, S, ...)
    index = chosen.reshape(*chosen.shape, *(1,) * (values.dim() - chosen.dim()))
    return values.gather(2, index.expand(*values.shape[:2], 1, *values.shape[3:])).squeeze(2)


def _sample_seeded(distribution: Distribution, n: int, generator: torch.Generator | None) -> Tensor:
    # a family of the user's own offers only .sample, which draws from global state: seed a fork of that state
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return distribution.sample(torch.Size([n]))


def _randn(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
