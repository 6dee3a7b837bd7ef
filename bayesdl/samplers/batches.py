"""A data loader that remembers where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch

from bayesdl.errors import ArgumentError


@final
class Batches:
    """One epoch of a `DataLoader` per iteration, with `state_dict`: an interrupted epoch goes on at its next batch.

        batches = bdl.samplers.Batches(DataLoader(data, 128, shuffle=True, generator=torch.Generator().manual_seed(0)))
        chain = bdl.Chain(net, sampler=opt, store="chain-0", loader=batches)
        chain.resume()
        while chain.steps < total:
            for x, y in batches: ...

    The state is that of the loader's generators at the start of the epoch and the number of batches since; going on
    reads those batches again and passes over them. Augmentation that draws from global random state is not restored.

    Args:
        loader: with `generator=`, if it shuffles: the global random state is never set.

    Raises:
        ArgumentError: the loader shuffles by global random state.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        sampler = getattr(loader, "sampler", None)
        found = [getattr(part, "generator", None) for part in (loader, sampler)]
        self._generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        drawing = (torch.utils.data.RandomSampler, torch.utils.data.WeightedRandomSampler)
        if isinstance(sampler, drawing) and sampler.generator is None:
            raise ArgumentError(
                "the loader shuffles by torch's global random state, which is never restored: pass generator= to it"
            )
        self.epoch = self.position = 0
        self._start = [g.get_state() for g in self._generators]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        passed = self.position
        if passed:
            for generator, state in zip(self._generators, self._start, strict=True):
                generator.set_state(state)
        self._start = [g.get_state() for g in self._generators]
        for number, batch in enumerate(self.loader):
            if number >= passed:
                self.position = number + 1
                yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and the generators' states."""
        states = self._start if self.position else [g.get_state() for g in self._generators]
        return {"epoch": self.epoch, "position": self.position, "generators": list(states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken: the next iteration is the rest of that epoch."""
        if len(state_dict["generators"]) != len(self._generators):
            raise ArgumentError(
                f"the state is of a loader with {len(state_dict['generators'])} generators, and this one has "
                f"{len(self._generators)}"
            )
        self.epoch, self.position = int(state_dict["epoch"]), int(state_dict["position"])
        self._start = list(state_dict["generators"])
        for generator, state in zip(self._generators, self._start, strict=True):
            generator.set_state(state)
