"""Samples as they were kept become a posterior over the network's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesdl.errors import NotFittedError
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.records import SampleRecord, relative_weights

PROBE = ".probe"  # no tensor of a network has a name that begins with a dot


def decoded(values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the network: differences in bfloat16 are added to their base."""
    return {
        name: base[name].to(value.device) + value.float()
        if value.dtype is torch.bfloat16 and name in base and base[name].dtype is torch.float32
        else value
        for name, value in values.items()
    }


def assembled(
    samples: Sequence[tuple[SampleRecord, Mapping[str, Tensor], Mapping[str, Tensor]]], device: torch.device
) -> SamplePosterior:
    """One posterior of `(record, decoded tensors, base)`; a buffer that a sample lacks is as it was in its base.

    Raises:
        NotFittedError: fewer than two samples.
    """
    if len(samples) < 2:
        raise NotFittedError(
            f"{len(samples)} sample(s) were collected and kept, and a posterior takes two or more: lower burn_in or "
            "thin, raise max_samples, or run longer"
        )
    names = [name for name in dict.fromkeys(name for _, values, _ in samples for name in values) if name != PROBE]
    snapshots = {
        name: torch.stack([(values if name in values else base)[name].to(device) for _, values, base in samples])
        for name in names
    }
    records = [record for record, _, _ in samples]
    weights = torch.tensor(relative_weights(records), dtype=torch.float64)
    chains = torch.tensor([record.chain for record in records])
    return SamplePosterior(snapshots, (weights / weights.sum()).float().to(device), chains.to(device))
