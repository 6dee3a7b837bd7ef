"""Base noise of adapters: draw n of a layer is a function of (seed, adapter, layer, n) and of nothing else.

With B = U diag(d) V' the posterior is Delta A = sigma R Z, R = V diag(1/d) V', Z standard normal, so that
Delta W = s sigma P Z with P = B R = U V': the same law as a standard deviation sigma / d_i on the i-th row of V'A (Shi
et al. 2024, "Training-free Bayesianization for low-rank adapters"), and unique, whatever signs an SVD chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from bayesdl.lora.adapters import AdaptedLayer, weight

NEGLIGIBLE = 1e-6  # directions of B below this share of the largest are dropped


@final
@dataclass(frozen=True)
class Roots:
    """What turns base noise into noise of a layer.

    Attributes:
        inner: R, `(r, r)`, the pseudo-inverse square root of B'B.
        outer: P = B R, `(out, r)`.
        spectrum: d, `(r,)`, descending.
    """

    inner: Tensor
    outer: Tensor
    spectrum: Tensor


def roots(up: Tensor) -> Roots:
    """R, P and d of the matrix B `(out, r)`, in float64."""
    left, spectrum, right = torch.linalg.svd(up.detach().double(), full_matrices=False)
    keep = spectrum >= NEGLIGIBLE * spectrum.max()
    inverse = torch.where(keep, spectrum, torch.ones_like(spectrum)).reciprocal() * keep
    return Roots(right.mT @ (inverse.unsqueeze(-1) * right), (left * keep) @ right, spectrum)


def base_noise(seed: int, layer: AdaptedLayer, index: int) -> Tensor:
    """Z of one layer and draw: `(r, in)`, standard normal, float32, on the CPU."""
    text = f"{seed}|{layer.adapter}|{layer.name}|{index}".encode()
    # all of this key counts: torch's CPU generator keeps 32 bits of a seed, among which streams would collide
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    stream = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(stream.standard_normal((layer.rank, layer.inputs), dtype=np.float32))


@final
class Draws:
    """Noise of all layers of one model: made on demand, kept for one seed.

    Args:
        module: holds the layers; read once.
        layers: those with noise.
        stored: a seed and its first draws Z `(n, r, in)` by layer key, which stand in for those of the generator.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[AdaptedLayer],
        stored: tuple[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._stored = stored
        self.roots = {layer.key: roots(weight(layer.up(module))) for layer in layers}
        self._kept: tuple[int, dict[tuple[str, bool, torch.dtype, torch.device], Tensor]] = (0, {})

    def noise(
        self, layer: AdaptedLayer, seed: int, start: int, stop: int, like: Tensor, *, whitened: bool = True
    ) -> Tensor:
        """R Z_n of draws start..stop-1, `(stop - start, r, in)`, in dtype and device of `like`; else Z_n."""
        kept = self._kept
        if kept[0] != seed:
            kept = self._kept = (seed, {})
        place = (layer.key, whitened, like.dtype, like.device)
        held = kept[1].get(place)
        have = 0 if held is None else len(held)
        if held is None or have < stop:
            wide = torch.float64 if like.dtype is torch.float64 else torch.float32
            more = torch.stack([self._base(seed, layer, n) for n in range(have, stop)]).to(like.device, wide)
            if whitened:
                more = self.roots[layer.key].inner.to(more) @ more
            more = more.to(like.dtype)
            held = more if held is None else torch.cat([held, more])
            kept[1][place] = held
        return held[start:stop]

    def _base(self, seed: int, layer: AdaptedLayer, index: int) -> Tensor:
        if self._stored is not None and self._stored[0] == seed:
            found = self._stored[1].get(layer.key)
            if found is not None and index < len(found):
                return found[index].float().cpu()
        return base_noise(seed, layer, index)

    def outer(self, layer: AdaptedLayer, like: Tensor) -> Tensor:
        """P, `(out, r)`, dtype and device of `like`."""
        return self.roots[layer.key].outer.to(like)
