"""The gradient of the potential per data point: that of the mean loss plus what the prior adds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, as_numbers
from bayesdl.priors import GaussianPrior, Prior, ScaleMixturePrior


@dataclass
class Block:
    """One parameter group during one step.

    Attributes:
        index, group: its place among the optimiser's groups that hold parameters, and its options.
        names: of the parameters.
        params: tensors that move: the parameters, or their float32 copies.
        grads: gradient of the mean loss.
        lr: learning rate of this step.
        forces: gradient of the mean potential, `grad - grad log p / N`, times `scales` once those are known.
        scales: diagonal preconditioner D by parameter, broadcastable; None is the identity.
    """

    index: int
    group: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    lr: float
    forces: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] | None = None


class Force(ABC):
    """How one kind of prior enters the force."""

    @abstractmethod
    def __call__(self, block: Block, num_data: int, out: list[Tensor]) -> list[Tensor]:
        """`grad - grad log p / N` for the tensors of a block, in `out` where that saves memory."""

    def prepare(self, blocks: Sequence[Block], generator: torch.Generator) -> None:
        """Called once a step before the blocks, with all of them."""
        return

    def scales(self, block: Block) -> list[Tensor] | None:
        """Diagonal preconditioner that the prior asks for."""
        return None

    def gibbs(self, blocks: Sequence[Block], temperature: float, generator: torch.Generator) -> None:
        """Draw the prior's own variables given the parameters."""
        return

    def state(self) -> dict[str, Tensor]:
        """Tensors of the prior's own variables."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue with such tensors."""
        return


@final
class GroupForce(Force):
    """N(0, 1 / lam), lam of the parameter group; in the operations of `torch.optim.SGD(weight_decay=lam / N)`."""

    def __call__(self, block: Block, num_data: int, out: list[Tensor]) -> list[Tensor]:
        precision = float(block.group["prior_precision"])
        if precision == 0:
            return list(block.grads)
        return _with_decay(block, precision / num_data, out)


@final
class GaussianForce(Force):
    """A `GaussianPrior`: a number, one per layer or one per parameter, around a mean."""

    def __init__(self, prior: GaussianPrior) -> None:
        self._prior = prior
        # what is named is looked up once the parameters are known
        precision = torch.zeros(2) if isinstance(prior.precision, Mapping) else as_numbers(prior.precision, "precision")
        mean = torch.ones(()) if isinstance(prior.mean, Mapping) else torch.as_tensor(prior.mean)
        self._scalar = float(precision) if precision.numel() == 1 and not bool(mean.any()) else None
        self._terms: dict[str, tuple[Tensor, Tensor]] = {}  # precision and mean by parameter name

    def prepare(self, blocks: Sequence[Block], generator: torch.Generator) -> None:
        names = [name for block in blocks for name in block.names]
        if self._scalar is None and list(self._terms) != names:
            self._terms = self._split(names, [p for block in blocks for p in block.params])

    def __call__(self, block: Block, num_data: int, out: list[Tensor]) -> list[Tensor]:
        if self._scalar is not None:
            return _with_decay(block, self._scalar / num_data, out)
        precision = [self._terms[name][0] for name in block.names]
        offset = torch._foreach_sub(block.params, [self._terms[name][1] for name in block.names])
        return list(torch._foreach_addcmul(block.grads, offset, precision, value=1.0 / num_data))

    def _split(self, names: list[str], params: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        own = dict(zip(names, params, strict=True))
        precision, mean = self._prior.per_parameter(own).cpu(), self._prior.centre(own).cpu().reshape(-1)
        sizes = [p.numel() for p in params]
        if mean.numel() not in (1, sum(sizes)):
            raise ArgumentError(f"the prior's mean has {mean.numel()} entries for {sum(sizes)} parameters")
        pieces, centres = (t.expand(sum(sizes)).split(sizes) for t in (precision, mean))
        return {
            name: (piece.reshape(p.shape).to(p), centre.reshape(p.shape).to(p))
            for name, piece, centre, p in zip(names, pieces, centres, params, strict=True)
        }


@final
class PriorForce(Force):
    """Any prior with a density, by its gradient over all parameters."""

    def __init__(self, prior: Prior) -> None:
        self._prior = prior
        self._grads: dict[str, Tensor] = {}

    def prepare(self, blocks: Sequence[Block], generator: torch.Generator) -> None:
        self._grads = self._prior.grad(_by_name(blocks))

    def __call__(self, block: Block, num_data: int, out: list[Tensor]) -> list[Tensor]:
        grads = [self._grads[name].to(p) for name, p in zip(block.names, block.params, strict=True)]
        return list(torch._foreach_add(block.grads, grads, alpha=-1.0 / num_data))


@final
class MixtureForce(Force):
    """A Gaussian whose variances are drawn too: its gradient given them, and their Gibbs update."""

    def __init__(self, prior: ScaleMixturePrior) -> None:
        self._prior = prior
        self._state: dict[str, Tensor] = {}
        self._variance: dict[str, Tensor] = {}

    def prepare(self, blocks: Sequence[Block], generator: torch.Generator) -> None:
        if not self._state:
            self._state = self._prior.start(_by_name(blocks), generator)
        if not self._variance:
            self._variance = self._prior.variance(_by_name(blocks), self._state)

    def __call__(self, block: Block, num_data: int, out: list[Tensor]) -> list[Tensor]:
        precision = torch._foreach_reciprocal([self._variance[name] for name in block.names])
        return list(torch._foreach_addcmul(block.grads, block.params, precision, value=1.0 / num_data))

    def scales(self, block: Block) -> list[Tensor] | None:
        return [self._variance[name].clamp(max=self._prior.step_cap) for name in block.names]

    def gibbs(self, blocks: Sequence[Block], temperature: float, generator: torch.Generator) -> None:
        self._state = self._prior.gibbs(_by_name(blocks), self._state, temperature, generator)
        self._variance = self._prior.variance(_by_name(blocks), self._state)

    def state(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load(self, state: dict[str, Tensor]) -> None:
        self._state, self._variance = dict(state), {}


def _with_decay(block: Block, decay: float, out: list[Tensor]) -> list[Tensor]:
    """`grad + decay theta`, rounded as SGD does."""
    if out[0].device.type == "cpu":  # nothing is fused there, and fresh memory is what costs
        for o, grad, param in zip(out, block.grads, block.params, strict=True):
            torch.add(grad, param, alpha=decay, out=o)
    else:
        torch._foreach_copy_(out, block.grads)
        torch._foreach_add_(out, block.params, alpha=decay)
    return out


def _by_name(blocks: Sequence[Block]) -> dict[str, Tensor]:
    return {name: p for block in blocks for name, p in zip(block.names, block.params, strict=True)}


def force_of(prior: Prior | None) -> Force:
    """The force that belongs to a prior; None is one precision per parameter group."""
    if prior is None:
        return GroupForce()
    if not isinstance(prior, Prior):
        raise ArgumentError(f"prior={prior!r}; expected a bdl.Prior such as bdl.GaussianPrior(precision=1.0)")
    if isinstance(prior, GaussianPrior):
        return GaussianForce(prior)
    if isinstance(prior, ScaleMixturePrior):
        return MixtureForce(prior)
    return PriorForce(prior)


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors; one synchronisation with the device."""
    norms = list(torch._foreach_norm(list(tensors)))
    if any(n.device != norms[0].device or n.dtype != norms[0].dtype for n in norms):
        norms = [n.to(norms[0].device, torch.float32) for n in norms]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
