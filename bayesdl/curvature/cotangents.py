"""The kinds of curvature: which cotangents V are propagated back, H = sum_n J_n^T V_n V_n^T J_n."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.likelihoods import Likelihood

__all__ = ["CURVATURE_KINDS", "KINDS", "cotangent_rule"]

CURVATURE_KINDS = ("ggn", "mc", "empirical")
# the Hessian of -log p in the parameters themselves is no sum of outer products
KINDS = (*CURVATURE_KINDS, "hessian")


def cotangent_rule(
    likelihood: Likelihood, kind: str, samples: int = 1, generator: torch.Generator | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(f, y) -> V (K, B, C)` with curvature sum_n J_n^T V_n V_n^T J_n.

    Raises:
        UnknownNameError: no such kind.
        UnsupportedError: kind "hessian", which has none.
    """
    if kind == "ggn":
        return lambda f, y: likelihood.hessian_root(f)
    if kind == "empirical":
        return lambda f, y: likelihood.score(f, y).unsqueeze(0)
    if kind == "mc":
        if samples < 1:
            raise ArgumentError(f"samples={samples}; the Monte Carlo Fisher needs at least one draw per example")

        source = generator

        def drawn(f: Tensor, y: Tensor) -> Tensor:
            nonlocal source
            if source is None:  # the global state is the user's
                source = torch.Generator(f.device).manual_seed(0)
            targets = likelihood.sample(f, samples, source)
            return torch.stack([likelihood.score(f, t) for t in targets]) / samples**0.5

        return drawn
    if kind == "hessian":
        raise UnsupportedError(
            "a Hessian is no sum of outer products of cotangents; fit it with bdl.curvature.estimate or bdl.Laplace, "
            'or use kind="ggn"'
        )
    raise UnknownNameError(f"kind {kind!r} is not known; choose one of {KINDS}")
