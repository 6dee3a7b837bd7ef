"""Step sizes of samplers from the largest curvature of the potential."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.batch import batch_size
from bayesdl.curvature.krylov import lanczos
from bayesdl.curvature.operators import operator
from bayesdl.distributed import Group, together
from bayesdl.errors import StepSizeError
from bayesdl.methods.energy import Energy
from bayesdl.methods.pieces import Pieces
from bayesdl.network import Network
from bayesdl.priors import GaussianPrior, Prior, ScaleMixturePrior
from bayesdl.samplers.forces import Block, GaussianForce

EXAMPLES = 2000  # of the data, from the front of the loader, whose curvature stands for that of all
STEPS = 8  # Lanczos steps; the largest Ritz value is then within a few per cent of the largest eigenvalue
DIMENSIONLESS = 0.2  # h lambda_max of the default: no variance is inflated by more than 1 / (1 - 0.1)


def largest_curvature(
    network: Network,
    energy: Energy,
    data: Iterable[Any],
    prior: Prior,
    generator: torch.Generator,
    scales: Mapping[str, Tensor] | None = None,
    group: Group | None = None,
) -> float:
    """Largest eigenvalue of D^1/2 (GGN - Hessian of log p(theta)) D^1/2 at the network's weights, from below.

    Args:
        network: with its selection; in the dtype that the chain runs in.
        energy: of the same network.
        data: loader; its first batches are read, up to `EXAMPLES` examples, and scaled to all.
        prior: its curvature is added.
        generator: of the start vector.
        scales: D by parameter name; None is the identity.
        group: processes that share the work and all get the number that one alone would, to the bit.

    Raises:
        UnsupportedError: the network has no curvature products; the chain then needs its lr from the user.
    """
    held = list(_front(network, data))
    pieces = Pieces(group, len(held))
    parts = pieces.cut(held)
    with together(group):  # with more processes than pieces, one for its layout
        products = {i: operator(network, parts[i], energy.likelihood, allow_partial=True) for i in pieces.own or [0]}
    first, device = next(iter(products.values())), None if group is None else group.device
    counted = pieces.total(
        lambda i: torch.tensor(products[i].num_data, device=device), torch.zeros((), dtype=torch.int64, device=device)
    )
    factor = energy.num_data / int(counted)
    layout = first.layout
    flat = layout.flatten
    root = 1.0
    if not isinstance(prior, ScaleMixturePrior):
        bend = _prior_curvature(prior, network.parameters, flat, layout.to_dict)
    else:
        # its steps are h min(variance, cap), so that in their units the prior's curvature is at most 1
        root = math.sqrt(prior.step_cap)
        bend = lambda v: v / prior.step_cap  # noqa: E731
    diagonal = root if scales is None else root * flat(scales).to(first.dtype).sqrt().unsqueeze(1)

    def product(v: Tensor) -> Tensor:
        turned = diagonal * v
        curved = pieces.total(lambda i: products[i].matmat(turned), turned)
        return diagonal * (factor * curved + bend(turned).to(turned))

    start = torch.randn(layout.numel, 1, generator=generator).to(first.device, first.dtype)
    return float(lanczos(product, start, STEPS).eigen()[0].max())


def gradient_squares(
    network: Network,
    module: nn.Module,
    energy: Energy,
    parameters: list[tuple[str, nn.Parameter]],
    source: Iterator[Any],
    group: Group | None = None,
) -> dict[str, Tensor]:
    """Mean over the batches of one pass of the squared gradient of the mean loss, by parameter name.

    Args:
        source: `(number, inputs, target)`, at least one pass long.
        group: as for `largest_curvature`.
    """
    leaves = [parameter for _, parameter in parameters]
    pieces = Pieces(group, energy.num_batches)
    sums: dict[int, Tensor] = {}
    with together(group):
        for batch, (_, inputs, target) in enumerate(islice(source, energy.num_batches)):
            piece = pieces.of(batch)
            if piece not in pieces.own:
                continue
            with torch.enable_grad():
                found = torch.autograd.grad(energy.loss(network, module, inputs, target), leaves)
            squares = torch.cat([grad.reshape(-1) for grad in found]).square().div_(energy.num_batches)
            sums[piece] = sums[piece] + squares if piece in sums else squares
    total = pieces.total(lambda i: sums[i], torch.cat([leaf.detach().reshape(-1) for leaf in leaves]))
    split = total.split([leaf.numel() for leaf in leaves])
    return {name: part.view(leaf.shape) for (name, leaf), part in zip(parameters, split, strict=True)}


def stability_limit(sampler: str, momentum: float) -> float:
    """Largest h lambda of a stable step on a Gaussian (closed forms of the schemes)."""
    if sampler == "sghmc":
        return 2 * (1 + momentum)
    return 4.0 if sampler in ("baoab", "sgnht") else 2.0


def check_stable(sampler: str, momentum: float, lr: float, num_data: int, largest: float) -> None:
    """Raise `StepSizeError` for steps at which the stiffest direction grows without bound."""
    limit = stability_limit(sampler, momentum)
    if lr / num_data * largest >= limit:
        raise StepSizeError(
            f"lr={lr:g}: h lambda_max = lr / N * lambda_max is {lr / num_data * largest:.3g} "
            f"(N={num_data}, lambda_max={largest:.4g}) and {sampler} is stable below {limit:g}; the largest admissible "
            f"lr is {limit * num_data / largest:.4g}, the default {DIMENSIONLESS * num_data / largest:.4g}"
        )


def _front(network: Network, data: Iterable[Any]) -> Iterator[Any]:
    seen = 0
    for batch in data:
        yield batch
        seen += batch_size(network.batch(batch)[0])
        if seen >= EXAMPLES:
            return


def _prior_curvature(prior: Prior, parameters: Mapping[str, Tensor], flat: Any, by_name: Any) -> Any:
    """`v (P, r) -> Hessian of -log p times v` at the parameters."""
    if isinstance(prior, GaussianPrior):
        names, values = list(parameters), list(parameters.values())
        block = Block(0, {}, names, values, [torch.zeros_like(v) for v in values], 0.0)
        force = GaussianForce(prior)
        shifted = [v + 1 for v in values]
        lower, upper = (_force(force, block, point) for point in (values, shifted))
        diagonal = flat({n: u - low for n, u, low in zip(names, upper, lower, strict=True)}).unsqueeze(1)
        return lambda v: diagonal.to(v) * v

    def times(v: Tensor) -> Tensor:
        columns = []
        for column in v.T:
            direction = by_name(column)
            leaves = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
            with torch.enable_grad():
                slope = torch.autograd.grad(prior.log_prob(leaves), list(leaves.values()), create_graph=True)
                along = torch.stack([(g * direction[n]).sum() for g, n in zip(slope, leaves, strict=True)]).sum()
            if not along.requires_grad:  # linear pieces, as of a Laplace prior
                columns.append(torch.zeros_like(column))
                continue
            found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
            pairs = zip(leaves.items(), found, strict=True)
            columns.append(-flat({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}).to(column))
        return torch.stack(columns, 1)

    return times


def _force(force: GaussianForce, block: Block, point: list[Tensor]) -> list[Tensor]:
    block.params = [p.double() for p in point]
    block.grads = [torch.zeros_like(p) for p in block.params]
    force.prepare([block], torch.Generator())
    return [t.clone() for t in force(block, 1, [torch.empty_like(p) for p in block.params])]
