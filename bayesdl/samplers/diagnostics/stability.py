"""Whether the step of a sampler is small enough: h lambda_max, for loops of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.errors import ArgumentError
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.network import Network
from bayesdl.priors import GaussianPrior, Prior

if TYPE_CHECKING:
    from bayesdl.samplers.base import Sampler

FLAT = 1e-30  # precision that stands for none


@final
@dataclass(frozen=True)
class Stability:
    """The step of a sampler in the stiffest direction of its potential.

    Attributes:
        curvature: lambda_max of the potential U, in the sampler's preconditioner if it has one.
        size: h lambda_max; below 1 no variance of SGLD is inflated by more than a factor of 2.
        limit: where the scheme becomes unstable on a Gaussian.
        largest_lr: learning rate at that limit.
    """

    curvature: float
    size: float
    limit: float
    largest_lr: float

    @property
    def stable(self) -> bool:
        """Whether the step is below the limit."""
        return self.size < self.limit


def stability(
    sampler: Sampler,
    net: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    batch: str | BatchAdapter | None = None,
    generator: torch.Generator | None = None,
) -> Stability:
    """h lambda_max of a sampler where its network is now, by Lanczos steps on curvature-vector products.

    Args:
        sampler: its parameters must be the network's. Steps that adapt (SA-SGLD) count as the last one made.
        net: read only.
        data: loader; its first batches are read, up to 2,000 examples, and scaled to `num_data`.
        likelihood: whose negative mean log-likelihood the loop minimises.
        batch: adapter, as in `wrap`.
        generator: of the start vector; None is a fixed seed.

    Raises:
        ArgumentError: a parameter of the sampler is none of the network's.
        UnsupportedError: the network has no curvature products.
    """
    # the loop of `wrap` uses the samplers: imported when both are there
    from bayesdl.methods.energy import Energy
    from bayesdl.methods.stepsize import largest_curvature, stability_limit

    names = {id(parameter): name for name, parameter in net.named_parameters()}
    moving = [(group, parameter) for group in sampler.param_groups for parameter in group["params"]]
    missing = sum(id(parameter) not in names for _, parameter in moving)
    if missing:
        raise ArgumentError(f"{missing} of the sampler's {len(moving)} parameters are none of the network's")
    first, n = sampler.param_groups[0], sampler.num_data
    named = {names[id(parameter)]: (group, parameter) for group, parameter in moving}
    network = Network(net, select=list(named), batch=batch)
    scales = {
        name: (_scale(sampler, parameter) * (group["lr"] / first["lr"] if first["lr"] else 1.0))
        for name, (group, parameter) in named.items()
    }
    prior = sampler.prior or _gaussian({name: group["prior_precision"] for name, (group, _) in named.items()})
    source = torch.Generator().manual_seed(0) if generator is None else generator
    energy = Energy(resolve(likelihood), n, 1, n)
    curvature = largest_curvature(network, energy, data, prior, source, scales)
    if sampler.name == "entropy-mcmc":
        curvature += 2 / min(float(group["eta"]) for group in sampler.param_groups)
    psi = sampler.record.psi if sampler.iteration else 1.0
    stretch = psi * psi if sampler.underdamped else psi
    momentum = first.get("momentum", getattr(sampler, "momentum", 0.0))
    limit = 4.0 if sampler.name == "sa-sgld" and sampler.underdamped else stability_limit(sampler.name, momentum)
    size = first["lr"] / n * stretch * curvature
    return Stability(curvature, size, limit, limit * n / (stretch * curvature))


def _scale(sampler: Sampler, parameter: Tensor) -> Tensor:
    """The sampler's diagonal preconditioner; one where it has none, or has not learnt it."""
    square = sampler.state[parameter].get("square") if parameter in sampler.state else None
    one = torch.ones_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    if square is None:
        return one
    if sampler.name == "psgld":
        return one / (square.sqrt() + getattr(sampler, "eps", 0.0))
    return one * square.rsqrt()


def _gaussian(precisions: dict[str, Any]) -> Prior:
    return GaussianPrior({name: max(float(value), FLAT) for name, value in precisions.items()})
