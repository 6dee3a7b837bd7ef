"""Which of a chain's samples are kept where their number is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from bayesdl.errors import ArgumentError

KEEP = ("last", "reservoir")


@final
@dataclass(frozen=True)
class Retention:
    """At most `max_samples`: the last ones, or a uniform draw from all of them (reservoir sampling, Vitter 1985).

    Decisions depend on the sample's number and the chain's alone, so that an interrupted chain makes the same ones.
    """

    max_samples: int | None
    keep: str
    chain: int

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ArgumentError(f"keep={self.keep!r}; expected one of {KEEP}")
        if self.max_samples is not None and (isinstance(self.max_samples, bool) or self.max_samples < 1):
            raise ArgumentError(f"max_samples={self.max_samples!r}; expected at least 1, or None for all samples")

    def admit(self, number: int, kept: Sequence[int]) -> tuple[bool, tuple[int, ...]]:
        """Whether sample `number` (from 0) is kept beside `kept`, and which of those it takes the place of."""
        if self.max_samples is None or len(kept) < self.max_samples:
            return True, ()
        if self.keep == "last":
            return True, (min(kept),)
        source = np.random.default_rng(np.random.SeedSequence(self.chain, spawn_key=(number,)))
        place = int(source.integers(number + 1))
        return (True, (sorted(kept)[place],)) if place < self.max_samples else (False, ())
