"""Autoencoders: reconstructions of data under a law of the weights, beside the data themselves.

What is compared are laws over the data's own space: one draw is the reconstruction of one input by one draw of the
weights (Tran et al. 2021). Draws stand where functions do elsewhere, features where points do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, check_finite
from bayesdl.functional.families import Slot
from bayesdl.functional.functions import Pushforward

RECONSTRUCTED = 32  # inputs a step


@final
class Reconstructions:
    """Reconstructions as draws.

    Args:
        push: of the autoencoder.
    """

    def __init__(self, push: Pushforward) -> None:
        self._push = push

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Parameter tensors with a learned law."""
        return self._push.slots

    @property
    def held(self) -> dict[str, Tensor]:
        """Parameters held at one and zero."""
        return self._push.held

    def __call__(self, weights: Mapping[str, Tensor], inputs: Any, generator: torch.Generator) -> Tensor:
        """Reconstructions of M inputs by n draws of the weights: `(n M, features, 1)`."""
        values = self._push(weights, inputs, generator)
        return values.flatten(2).flatten(0, 1).unsqueeze(2)


@final
class Data:
    """Rows of a data set as the target.

    Args:
        rows: `(N, ...)`.
    """

    outputs = 1

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() < 2 or not len(rows):
            raise ShapeError(f"data of shape {tuple(rows.shape)} were given as the target; expected (N, features)")
        check_finite(rows, "the data given as the target")
        self._rows = rows.detach().flatten(1).double().cpu()

    def sample(self, inputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """As many rows as there are reconstructions of `inputs` `(M, ...)` by n functions: `(n M, features, 1)`."""
        return self._rows[torch.randint(len(self._rows), (n * len(inputs),), generator=generator)].unsqueeze(2)
