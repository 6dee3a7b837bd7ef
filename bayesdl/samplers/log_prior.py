"""The prior's density at a sample, for the records."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayesdl.errors import UnsupportedError
from bayesdl.samplers.base import Sampler


def log_prior(sampler: Sampler, values: Mapping[int, Tensor]) -> float | None:
    """log p(theta), up to a constant; None where the prior has none in closed form.

    Args:
        sampler: whose prior it is.
        values: theta by the `id` of the sampler's parameters.
    """
    if sampler.prior is None:
        return -0.5 * sum(
            float(group["prior_precision"]) * _square([values[id(p)] for p in group["params"]])
            for group in sampler.param_groups
        )
    named: dict[str, Tensor] = {}
    for index, group in enumerate(sampler.param_groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        named.update({name: values[id(p)] for name, p in zip(names, group["params"], strict=True)})
    try:
        return float(sampler.prior.log_prob(named))
    except UnsupportedError:
        return None


def _square(tensors: list[Tensor]) -> float:
    norms = torch._foreach_norm(tensors)
    return float(torch.stack([norm.double().square().to(norms[0].device) for norm in norms]).sum())
