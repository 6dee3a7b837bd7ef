"""What is known of a collected sample: one line of a chain's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, final

from bayesdl.errors import FileFormatError


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
        """Numbers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Inverse of `to_json`. Raises `FileFormatError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise FileFormatError(f"{found!r} is no line of a chain's index; expected the entries {sorted(names)}")
        return cls(**{**found, "drops": tuple(found["drops"])})


def relative_weights(records: Sequence[SampleRecord]) -> list[float]:
    """Weights of samples: those of their steps within a cycle, of mean 1 in each cycle of each chain."""
    cycles: dict[tuple[int, int | None], list[float]] = {}
    for record in records:
        cycles.setdefault((record.chain, record.cycle), []).append(record.weight)
    means = {cycle: sum(found) / len(found) for cycle, found in cycles.items()}
    found = [(record.weight, means[record.chain, record.cycle]) for record in records]
    return [weight / mean if mean > 0 else 1.0 for weight, mean in found]
