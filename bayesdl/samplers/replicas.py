"""One chain on several data-parallel ranks: every rank moves its own copy, and the copies have to stay equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.distributed import Group, resolve_group
from bayesdl.errors import DistributedError

EVERY = 1000  # steps between comparisons
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 2**61 - 1  # so that a digest and its negative are 64-bit integers


@final
class Replicas:
    """Ranks of a `DistributedDataParallel` network; nothing to compare for any other.

    Gradients are averaged over the ranks, noise is not: each rank's sampler draws its own, and from other seeds the
    copies drift apart while every loss still looks right.
    """

    def __init__(self, net: nn.Module) -> None:
        self._group: Group | None = None
        if isinstance(net, nn.parallel.DistributedDataParallel):
            handle: Any = net.process_group
            self._group = resolve_group(handle)
        self._checked = False

    def check(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Compare the bits of the parameters after the first step and every `EVERY` steps.

        Raises:
            DistributedError: they differ; on all ranks.
        """
        if self._group is None or (self._checked and step % EVERY):
            return
        self._checked = True
        digest = digest_of(parameters)
        if self._group.largest([digest, -digest]) != [digest, -digest]:
            lowest = -self._group.largest([-digest])[0]
            raise DistributedError(
                f"step {step}: the parameters are not the same on the {self._group.size} ranks of this chain (digests "
                f"{digest} here, {lowest} on another): start all ranks from equal parameters, and give every rank's "
                "sampler the same noise, generator=torch.Generator().manual_seed(seed) with one seed for all"
            )


def digest_of(parameters: Mapping[str, Tensor]) -> int:
    """A number of the tensors' bits; one synchronisation with their device."""
    sums = [p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in parameters.values()]
    total = 0
    for value in torch.stack(sums).tolist():
        total = (total * 1_000_003 + value) % _MODULUS
    return total
