"""Noise of adapters as forward hooks on A and B of a private clone; the weights are never written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import UnsupportedError
from bayesdl.lora.adapters import AdaptedLayer
from bayesdl.lora.draws import Draws

HALF = (torch.float16, torch.bfloat16)
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


@final
class Injection:
    """What the hooks of one forward pass share: which draws its rows belong to.

    Args:
        layers: those with noise.
        draws: their noise.
        sigma: its scale.
        seed: of the draws.
        form: "A" adds sigma R Z x behind A; "P" adds sigma P Z x behind B in float32, which cancels nothing between R
            and B; "auto" takes "P" where half-precision numbers reach the layer.

    Rows are sample-major: row n B + b is draw `start` + n of item b.
    """

    def __init__(
        self, layers: Iterable[AdaptedLayer], draws: Draws, sigma: float, seed: int, form: str = "auto"
    ) -> None:
        self.layers = tuple(layers)
        self.draws, self.sigma, self.seed, self.form = draws, sigma, seed, form
        self.active = False
        self.start, self.stop, self.rows = 0, 0, 0
        self.folds: tuple[int, ...] = ()
        self.flats: tuple[int, ...] = ()
        self.expands = False
        self._fired: set[str] = set()
        self._held: dict[str, Tensor] = {}

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        """Hooks on a clone, for as long as the block runs."""
        handles, patched = [], []
        try:
            for layer in self.layers:
                part: Any = module.get_submodule(layer.name)
                handles.append(part.lora_A[layer.adapter].register_forward_hook(self._behind_a(layer)))
                handles.append(part.lora_B[layer.adapter].register_forward_hook(self._behind_b(layer)))
                if layer.dora:
                    norm: Any = part.lora_magnitude_vector[layer.adapter]
                    norm.__dict__["get_lora_weight"] = self._without_noise(norm.get_lora_weight)
                    patched.append(norm)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for norm in patched:
                del norm.__dict__["get_lora_weight"]

    @contextmanager
    def drawing(
        self,
        start: int,
        stop: int,
        rows: int,
        folds: tuple[int, ...] = (),
        flats: tuple[int, ...] = (),
        expands: bool = False,
    ) -> Iterator[None]:
        """Noise for one forward pass.

        Args:
            start: first draw.
            stop: behind the last one.
            rows: of the whole pass, a multiple of the number of draws.
            folds: C, where layers may see rows `(rows C, ..., in)`: options of multiple choice, each a row of its own.
            flats: T, where layers may see rows `(rows T, in)`.
            expands: whether rows may be repeated in place on the way (beams).
        """
        self.start, self.stop, self.rows, self.expands = start, stop, rows, expands
        self.folds, self.flats = folds, flats
        self._fired.clear()
        self._held.clear()
        self.active = self.sigma > 0
        try:
            yield
        finally:
            self.active = False
            self._held.clear()
        silent = [layer.name for layer in self.layers if layer.key not in self._fired]
        if self.sigma > 0 and silent:
            raise UnsupportedError(
                f"the adapter of {silent[0]!r} was not called in the forward pass ({len(silent)} of "
                f"{len(self.layers)} layers were not): is it bypassed? Leave it out with layers="
            )

    def _behind_a(self, layer: AdaptedLayer) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            x = args[0]
            self._aligned(layer, x)
            self._fired.add(layer.key)
            count = self.stop - self.start
            rows = x.reshape(count, -1, x.shape[-1])
            if self.form == "P" or (self.form == "auto" and x.dtype in HALF):
                noise = self.draws.noise(layer, self.seed, self.start, self.stop, x, whitened=False)
                self._held[layer.key] = torch.bmm(rows, noise.mT).reshape(*x.shape[:-1], -1)
                return None
            noise = self.draws.noise(layer, self.seed, self.start, self.stop, x)
            plain = output.reshape(count, -1, output.shape[-1])
            return torch.baddbmm(plain, rows, noise.mT, alpha=self.sigma).reshape(output.shape)

        return hook

    def _behind_b(self, layer: AdaptedLayer) -> Hook:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            held = self._held.pop(layer.key, None)
            if not self.active or held is None:
                return None
            wide = torch.float64 if output.dtype is torch.float64 else torch.float32
            held, plain = held.to(wide), output.to(wide)
            return torch.add(plain, held @ self.draws.outer(layer, held).mT, alpha=self.sigma).to(output.dtype)

        return hook

    def _without_noise(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def quiet(*args: Any, **kwargs: Any) -> Tensor:
            # peft sends an identity matrix through A and B for the norm of DoRA's columns: no rows of the batch
            active, self.active = self.active, False
            try:
                return function(*args, **kwargs)
            finally:
                self.active = active

        return quiet

    def _aligned(self, layer: AdaptedLayer, x: Tensor) -> None:
        if self.stop - self.start == 1:
            return
        leading = x.shape[0]
        if leading == self.rows or (self.expands and leading % self.rows == 0):
            return
        share, rest = divmod(leading, self.rows)
        if not rest and (share in self.folds or (x.dim() == 2 and share in self.flats)):
            return
        raise UnsupportedError(
            f"layer {layer.name!r} saw inputs {tuple(x.shape)} where {self.rows} rows of {self.stop - self.start} "
            "draws were expected: rows are not aligned with draws (tokens routed to experts?). Use TFB(tile=False), "
            "one draw a forward pass"
        )
