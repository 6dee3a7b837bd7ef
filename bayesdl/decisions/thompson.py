"""Thompson sampling: act as if one drawn function were the truth, which balances trying out and using what is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.model import BayesianModel


def thompson(
    model: BayesianModel,
    candidates: Any,
    functional: Callable[[Tensor], Tensor] | None = None,
    *,
    batch: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Candidates to try next, (q,) int64 positions, no one twice (Thompson 1933; batches: Kandasamy et al. 2018).

    Each place of the batch is taken by the best candidate under a draw of its own, one function for all candidates; a
    candidate that is taken already gives way to the next best under the same draw.

    Args:
        candidates: one batch of M inputs, as the network takes them.
        functional: what is to be large, ``functional(f) -> (M,)`` of outputs (M, C); None for networks of one output,
            whose output it is. Minimise with ``lambda f: -f[:, 0]``.
        batch: q, at most M.
        generator: of the draws.

    Raises:
        ArgumentError: a batch out of range, or several outputs and no functional. ShapeError: a functional that does
        not give one number a candidate. NonFiniteError: a draw that is NaN or infinite somewhere.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ArgumentError(f"batch={batch!r}: expected an integer of at least 1")
    chosen: list[int] = []
    for number, function in enumerate(model.draw(batch, generator=generator)):
        with torch.no_grad():
            outputs = function(candidates)
            if functional is None and (outputs.dim() != 2 or outputs.shape[1] != 1):
                raise ArgumentError(
                    f"outputs have shape {tuple(outputs.shape)}: say by functional= what is to be large, "
                    "for instance lambda f: f[:, 0]"
                )
            value = outputs[:, 0] if functional is None else functional(outputs)
        if value.shape != outputs.shape[:1]:
            raise ShapeError(
                f"the functional gave {tuple(value.shape)} for {len(outputs)} candidates; expected one number each"
            )
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"draw {number} is NaN or infinite at candidate {int((~value.isfinite()).nonzero()[0])}"
            )
        if batch > len(value):
            raise ArgumentError(f"batch={batch} of {len(value)} candidates")
        order = value.argsort(descending=True, stable=True).tolist()
        chosen.append(next(place for place in order if place not in chosen))
    return torch.tensor(chosen, dtype=torch.int64)
