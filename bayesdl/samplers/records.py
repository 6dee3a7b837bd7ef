"""What is known of a collected sample: one line of a chain's index."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, final

from bayesdl.errors import FileFormatError

_FILE, _DIGEST = re.compile(r"sample-\d{6,}\.safetensors"), re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True)
class SampleRecord:
    """One sample theta_k of a chain. Fields of the sampler are None where the chain has none (`Chain(sampler=None)`).

    Attributes:
        id: from 0, in the order of collection, over all samples of the chain.
        chain: the chain's number.
        step: k; the sampler's count of steps before, or of calls of `chain.step` without a sampler.
        weight: of this sample in averages, up to a constant: the time that the step from theta_k advances, or 1 where
            samples are taken at equal distances.
        file: name of its file in the store, None where it was not kept or is held in memory.
        digest: checksum of that file.
        drops: ids of the samples that it took the place of.
        cycle, phase: of a cyclical schedule.
        lr, h, temperature, psi, time: of the step from theta_k, see `StepRecord`.
        loss: as given to `chain.step(loss=...)`.
        log_prior: log p(theta_k), up to a constant, where the prior has one in closed form.
    """

    id: int
    chain: int
    step: int
    weight: float = 1.0
    file: str | None = None
    digest: str | None = None
    drops: tuple[int, ...] = ()
    cycle: int | None = None
    phase: float | None = None
    lr: float | None = None
    h: float | None = None
    temperature: float | None = None
    psi: float | None = None
    time: float | None = None
    loss: float | None = None
    log_prior: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings and a list, as a line of JSON holds them."""
        return {**asdict(self), "drops": list(self.drops)}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Inverse of `to_json`. Raises `FileFormatError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            brief = str(found)[:200]
            raise FileFormatError(f"{brief} is no line of a chain's index; expected the entries {sorted(names)}")
        for name, value in found.items():
            if not _KINDS.get(name, _is_number_or_none)(value):
                raise FileFormatError(f"{name} of a line of a chain's index is {str(value)[:100]!r}")
        return cls(**{**found, "drops": tuple(found["drops"])})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_number_or_none(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 62
    return value is None or isinstance(value, float)


# what the entries of a line may be; a file's name is one of this folder's, never a path
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("id", "chain", "step"), _is_count),
    "cycle": lambda value: value is None or _is_count(value),
    "weight": lambda value: value is not None and _is_number_or_none(value) and 0 <= value < math.inf,
    "file": lambda value: value is None or (isinstance(value, str) and _FILE.fullmatch(value) is not None),
    "digest": lambda value: value is None or (isinstance(value, str) and _DIGEST.fullmatch(value) is not None),
    "drops": lambda value: isinstance(value, list) and all(_is_count(number) for number in value),
}


def relative_weights(records: Sequence[SampleRecord]) -> list[float]:
    """Weights of samples: those of their steps within a cycle, of mean 1 in each cycle of each chain."""
    cycles: dict[tuple[int, int | None], list[float]] = {}
    for record in records:
        cycles.setdefault((record.chain, record.cycle), []).append(record.weight)
    means = {cycle: sum(found) / len(found) for cycle, found in cycles.items()}
    found = [(record.weight, means[record.chain, record.cycle]) for record in records]
    return [weight / mean if mean > 0 else 1.0 for weight, mean in found]
