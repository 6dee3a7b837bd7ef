"""The horseshoe (Carvalho, Polson and Scott 2010), plain or with a slab that bounds the large weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.priors.heavy_tails import check_positive
from bayesdl.priors.mixtures import ScaleMixturePrior, Scales, inverse_gamma

_SPLIT = 2.0  # series below, continued fraction above
_TERMS, _LEVELS = 32, 60
_EULER = 0.5772156649015329
_LOG_2_PI_CUBED = math.log(2 * math.pi**3)


@final
@dataclass(frozen=True)
class HorseshoePrior(ScaleMixturePrior):
    """w_i ~ N(0, l_i^2 tau^2), l_i ~ C+(0, 1), tau ~ C+(0, scale) for each parameter tensor.

    With `slab` c the density is multiplied by `prod_i exp(-w_i^2 / (2 c^2))` (up to a constant): the variance given the
    scales is `1 / (1 / (l_i^2 tau^2) + 1 / c^2)` and their conditionals stay as they are (Nishimura and Suchard 2023).

    Gibbs steps, with auxiliary n_i and q (Makalic and Schmidt 2016): `l_i^2 ~ IG(1, 1/n_i + w_i^2 / (2 tau^2))`,
    `n_i ~ IG(1, 1 + 1/l_i^2)`, `tau^2 ~ IG((d + 1) / 2, 1/q + sum w_i^2 / (2 l_i^2))`,
    `q ~ IG(1, 1/scale^2 + 1/tau^2)`.

    Args:
        scale: of tau; tau itself where `learn_scale` is False.
        learn_scale: draw tau.
        slab: c, or None.
        step_cap: see `ScaleMixturePrior`.
    """

    scale: float = 1.0
    learn_scale: bool = True
    slab: float | None = None
    step_cap: float = 1.0

    name: ClassVar[str] = "horseshoe"

    def __post_init__(self) -> None:
        check_positive(self, "scale", "step_cap", *(() if self.slab is None else ("slab",)))

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Marginal over l for tau = scale: the sum of `log(e^x E1(x) / (tau sqrt(2 pi^3)))`, x = w^2 / (2 tau^2).

        Up to a constant with a slab. Infinite where a weight is 0.

        Raises:
            UnsupportedError: tau is learned, and the density given it is not that of the prior.
        """
        self._need_fixed("log_prob")
        values = []
        for p in parameters.values():
            w = p.double()
            density = scaled_e1(w.square() / (2 * self.scale**2)).log() - math.log(self.scale) - 0.5 * _LOG_2_PI_CUBED
            values.append((density if self.slab is None else density - w.square() / (2 * self.slab**2)).sum())
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def grad(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`-(w / tau^2) (1 / (x e^x E1(x)) - 1) - w / slab^2`; infinite at 0."""
        self._need_fixed("grad")
        found = {}
        for name, p in parameters.items():
            w = p.double()
            x = w.square() / (2 * self.scale**2)
            score = -(w / self.scale**2) * (1 / (x * scaled_e1(x)) - 1)
            found[name] = (score if self.slab is None else score - w / self.slab**2).to(p)
        return found

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if self.slab is not None:
            raise UnsupportedError("a horseshoe with a slab is known up to a constant: draw it by Gibbs steps")
        variance = self.variance(parameters, self.start(parameters, generator))
        return {
            name: (torch.randn(p.shape, generator=generator) * variance[name].cpu().sqrt()).to(p)
            for name, p in parameters.items()
        }

    def start(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Scales:
        scales: Scales = {}
        for name, p in parameters.items():
            tau = torch.full((), self.scale, dtype=torch.float64)
            if self.learn_scale:
                tau = tau * torch.empty((), dtype=torch.float64).cauchy_(generator=generator).abs()
            local = torch.empty(p.shape, dtype=torch.float64).cauchy_(generator=generator).square()
            # the auxiliaries in equilibrium with what was drawn
            scales[f"{name}/local"] = local
            scales[f"{name}/local_aux"] = inverse_gamma(torch.ones_like(local), 1 + 1 / local, 1.0, generator)
            scales[f"{name}/global"] = tau.square()
            rate = 1 / self.scale**2 + 1 / tau.square()
            scales[f"{name}/global_aux"] = inverse_gamma(torch.ones_like(rate), rate, 1.0, generator)
        return scales

    def gibbs(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Scales:
        drawn: Scales = {}
        for name, p in parameters.items():
            square = p.detach().double().square().cpu()
            one = torch.ones_like(square)
            tau, tau_aux = scales[f"{name}/global"], scales[f"{name}/global_aux"]
            local = inverse_gamma(
                one, 1 / scales[f"{name}/local_aux"] + square / (2 * tau), temperature, generator
            ).clamp(_TINY, _HUGE)
            if self.learn_scale:
                rate = 1 / tau_aux + (square / (2 * local)).sum()
                tau = inverse_gamma(rate.new_tensor((p.numel() + 1) / 2), rate, temperature, generator)
                tau = tau.clamp(_TINY, _HUGE)
                tau_aux = inverse_gamma(torch.ones_like(tau), 1 / self.scale**2 + 1 / tau, temperature, generator)
            drawn[f"{name}/local"] = local
            drawn[f"{name}/local_aux"] = inverse_gamma(one, 1 + 1 / local, temperature, generator)
            drawn[f"{name}/global"], drawn[f"{name}/global_aux"] = tau, tau_aux
        return drawn

    def variance(self, parameters: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, p in parameters.items():
            variance = scales[f"{name}/local"] * scales[f"{name}/global"]
            if self.slab is not None:
                variance = 1 / (1 / variance + 1 / self.slab**2)
            found[name] = variance.clamp(_TINY, _HUGE).to(p)
        return found

    def _need_fixed(self, what: str) -> None:
        if self.learn_scale:
            raise UnsupportedError(
                f"HorseshoePrior(learn_scale=True) has no {what} in closed form: its scales are drawn by Gibbs steps; "
                "learn_scale=False fixes tau = scale"
            )


_TINY, _HUGE = 1e-30, 1e30  # variances and their reciprocals stay within float32


def scaled_e1(x: Tensor) -> Tensor:
    """`e^x E1(x)` for x >= 0 as one function, float64: neither overflows nor loses digits. Infinite at 0."""
    if bool((x < 0).any()):
        raise ArgumentError("e^x E1(x) was asked for a negative x")
    x = x.double()
    small = torch.where(x < _SPLIT, x, torch.ones_like(x))
    total, term = torch.zeros_like(small), torch.ones_like(small)
    for k in range(1, _TERMS):
        term = term * -small / k
        total = total - term / k
    series = torch.exp(small) * (total - torch.log(small) - _EULER)
    large = torch.where(x < _SPLIT, torch.full_like(x, _SPLIT), x)
    tail = torch.zeros_like(large)
    for k in range(_LEVELS, 0, -1):
        tail = k * k / (large + 2 * k + 1 - tail)
    return torch.where(x < _SPLIT, series, 1 / (large + 1 - tail))
