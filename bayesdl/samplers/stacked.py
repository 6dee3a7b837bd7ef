"""Several chains of one sampler in one step: their weights are the rows of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.samplers.base import Sampler
from bayesdl.samplers.noise import NoiseStream


@final
class StackedNoise:
    """Noise for a matrix of chains: each row is what its chain's own stream would give to its parameters.

    Args:
        streams: of the chains.
        sizes: numbers of weights of the parameters in a row, in their order.
    """

    def __init__(self, streams: Sequence[NoiseStream], sizes: Sequence[int]) -> None:
        self._streams, self._sizes = list(streams), list(sizes)
        self._room: Tensor | None = None

    def workspace(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Room for one matrix `(chains, P)`, which the next draw overwrites."""
        (matrix,) = like
        if self._room is None:
            width = matrix.shape[1] + matrix.shape[1] % 2  # streams draw pairs
            self._room = torch.empty(len(matrix), width, device=matrix.device, dtype=matrix.dtype)
        return [self._room[:, : matrix.shape[1]]]

    def draw(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Noise for one matrix, in that room."""
        views = self.workspace(like)
        assert self._room is not None
        for stream, row in zip(self._streams, self._room, strict=True):
            stream.fill(row)
        return views

    def draw_apart(self, like: Tensor) -> Tensor:
        """Noise for a matrix in memory of its own, drawn parameter by parameter."""
        out = torch.empty_like(like)
        for stream, row in zip(self._streams, out, strict=True):
            for piece in row.split(self._sizes):
                piece.copy_(stream.draw_apart(piece))
        return out


@final
class Stacked:
    """One sampler that moves all chains, in place of their own ones, which count its steps and keep their own numbers.

    The state of the chains' samplers (momenta, and numbers such as a friction or a monitor) is at any time what it
    would be had they moved by themselves: a chain can be stored, and go on apart.

    Args:
        leader: a sampler over the one matrix, with a prior that is the same for every weight.
        followers: the chains' own samplers, of equal settings and after equally many steps; their parameters are views
            of the rows.
        matrix: `(chains, P)`, the leader's parameter.
        sizes: as in `StackedNoise`.
    """

    def __init__(self, leader: Sampler, followers: Sequence[Sampler], matrix: nn.Parameter, sizes: Sequence[int]):
        moving: Any = leader
        moving._noise = StackedNoise([one._noise for one in followers], sizes)
        moving._chains = tuple(followers)
        leader.iteration = followers[0].iteration
        self._leader, self._followers, self._matrix = leader, list(followers), matrix
        self._linked: dict[str, Tensor] = {}
        self._take_over()
        leader.register_pre_update_hook(self._count)

    def step(self, gradients: Tensor) -> None:
        """Move all chains by the gradients of their mean losses, `(chains, P)`.

        Raises:
            NonFiniteError: NaN or infinity in a gradient; nothing has moved, and no chain has counted the step.
        """
        first = self._followers[0]
        self._leader.param_groups[0]["lr"] = first.param_groups[0]["lr"]  # a schedule may have set them
        self._leader.temperature = first.temperature
        self._matrix.grad = gradients
        self._leader.step()
        self._link()

    def _count(self, leader: Sampler) -> None:
        for one in self._followers:
            one.follow(one._describe(leader.record.lr, leader.record.temperature))

    def _take_over(self) -> None:
        """Begin with the states that the chains hold."""
        own = [self._parameters(one) for one in self._followers]
        for key in self._followers[0].state.get(own[0][0], ()):  # samplers without a state have no entry
            rows = [
                torch.cat([one.state[parameter][key].reshape(-1) for parameter in parameters])
                for one, parameters in zip(self._followers, own, strict=True)
            ]
            self._leader.state[self._matrix][key] = torch.stack(rows)
        self._link()

    def _link(self) -> None:
        """Make the chains' states views of the leader's rows, which most samplers then change in place."""
        held: dict[str, Tensor] = self._leader.state.get(self._matrix, {})
        if held.keys() == self._linked.keys() and all(held[key] is value for key, value in self._linked.items()):
            return
        for number, one in enumerate(self._followers):
            parameters = self._parameters(one)
            cut = {key: value[number].split([p.numel() for p in parameters]) for key, value in held.items()}
            for index, parameter in enumerate(parameters):
                one.state[parameter] = {key: pieces[index].view(parameter.shape) for key, pieces in cut.items()}
        self._linked = dict(held)

    @staticmethod
    def _parameters(one: Sampler) -> list[Tensor]:
        return [parameter for group in one.param_groups for parameter in group["params"]]
