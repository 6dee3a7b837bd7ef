"""Several chains of one network as one posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.assembling import assembled, decoded

if TYPE_CHECKING:
    from bayesdl.samplers.chain import Chain


def pooled(chains: Sequence[Chain]) -> SamplePosterior:
    """The samples of several chains of one network as one posterior; a chain has the weight of its samples.

    Raises:
        NotFittedError: fewer than two samples in all.
    """
    samples = []
    for chain in chains:
        base = chain._tensors.base
        samples += [(record, decoded(chain._samples.read(record), base), base) for record in chain.kept]
    return assembled(samples, chains[0]._tensors.device)
