"""Distances that fit a function in between: Wasserstein-1 by a critic, distributional sliced Wasserstein."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.functional.distances import projected

HIDDEN = 200
Draw = Callable[[], tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True)
class Wasserstein:
    """max over 1-Lipschitz f of E f(H) - E f(G), the critic f fitted anew for every step (Tran et al. 2022).

    Args:
        inner_steps: ascents of the critic.
        lr: of its Adagrad.
        penalty: "gp" (gradients of norm one between the draws) or "lp" (norms above one alone).
        weight: of the penalty.
        threshold: norm of the objective's gradient at which the critic is taken as fitted.
        redraw: fresh draws for every ascent.
    """

    inner_steps: int = 200
    lr: float = 0.02
    penalty: str = "gp"
    weight: float = 10.0
    threshold: float = 0.01
    redraw: bool = True

    def __post_init__(self) -> None:
        if self.penalty not in ("gp", "lp") or self.inner_steps < 1:
            raise ArgumentError(
                f"penalty={self.penalty!r} and inner_steps={self.inner_steps}; expected 'gp' or 'lp', >= 1"
            )

    def value(self, h: Tensor, g: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
        """E f(H) - E f(G) for the fitted critic, with its graph through `h`."""
        critic = self.fit(h.shape[1], draw, generator, h)
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        return _gap(critic, h, g)

    def fit(self, points: int, draw: Draw, generator: torch.Generator, like: Tensor) -> nn.Module:
        """A new critic and a new optimiser: nothing is carried over from one step of the prior to the next."""
        critic = _critic(points, generator).to(like)
        optimizer = torch.optim.Adagrad(critic.parameters(), lr=self.lr)
        h, g = draw()
        for step in range(self.inner_steps):
            if step and self.redraw:
                h, g = draw()
            optimizer.zero_grad()
            loss = self.weight * self._penalty(critic, h, g, generator) - _gap(critic, h, g)
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in critic.parameters() if p.grad is not None]).norm()
            if not bool(torch.isfinite(norm)):
                raise NonFiniteError(
                    f"the critic's gradient is {float(norm)} at its step {step}: lower the learning rate"
                )
            optimizer.step()
            if bool(norm < self.threshold):
                break
        return critic

    def _penalty(self, critic: nn.Module, h: Tensor, g: Tensor, generator: torch.Generator) -> Tensor:
        share = torch.rand(len(h), 1, 1, generator=generator).to(h)
        between = (share * h + (1.0 - share) * g).requires_grad_()
        total = h.new_zeros(())
        for values in between.unbind(2):
            (slope,) = torch.autograd.grad(critic(values).sum(), values, create_graph=True)
            excess = slope.norm(dim=1) - 1.0
            total = total + (excess.clamp(min=0) if self.penalty == "lp" else excess).square().mean()
        return total


@final
@dataclass(frozen=True)
class DistributionalSliced:
    """sup over laws of directions, kept apart by a penalty, of (E W_p^p)^(1/p) (Nguyen et al. 2021).

    Args:
        directions: drawn at once.
        inner_steps: ascents of the small network that makes the directions.
        lr: of its Adam.
        weight: lambda_C of the penalty on E|theta . theta'|.
        power: p.
    """

    directions: int = 128
    inner_steps: int = 20
    lr: float = 0.01
    weight: float = 1.0
    power: int = 2

    def value(self, h: Tensor, g: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
        """The distance with its graph through `h`, at directions fitted anew on draws of their own."""
        points = h.shape[1]
        net = nn.Linear(points, points).to(h)
        with torch.no_grad():  # starts at the uniform law
            net.weight.copy_(torch.eye(points) + 0.01 * torch.randn(points, points, generator=generator))
            net.bias.zero_()
        optimizer = torch.optim.Adam(net.parameters(), lr=self.lr)
        first, second = draw()
        for _ in range(self.inner_steps):
            theta = self._directions(net, points, generator)
            mean = projected(first, second, theta, self.power).mean()
            alike = (theta @ theta.mT).abs().mean()
            loss = self.weight * alike - mean.clamp(min=1e-12) ** (1.0 / self.power)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            theta = self._directions(net, points, generator)
        return projected(h, g, theta, self.power).mean().clamp(min=1e-12) ** (1.0 / self.power)

    def _directions(self, net: nn.Module, points: int, generator: torch.Generator) -> Tensor:
        start = torch.randn(self.directions, points, generator=generator).to(next(net.parameters()))
        moved = net(start / start.norm(dim=1, keepdim=True))
        return moved / moved.norm(dim=1, keepdim=True)


def _critic(points: int, generator: torch.Generator) -> nn.Module:
    critic = nn.Sequential(
        nn.Linear(points, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 1)
    )
    with torch.no_grad():
        for layer in critic:
            if isinstance(layer, nn.Linear):
                sd = math.sqrt(2.0 / (layer.in_features + layer.out_features))  # Glorot and Bengio 2010
                layer.weight.copy_(sd * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return critic


def _gap(critic: nn.Module, h: Tensor, g: Tensor) -> Tensor:
    """E f(H) - E f(G), one critic for all outputs, summed over them."""
    return torch.stack(
        [critic(a).mean() - critic(b).mean() for a, b in zip(h.unbind(2), g.unbind(2), strict=True)]
    ).sum()
