"""A sampler's own stream of standard normal noise, one flat draw a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError

_ANGLE_BITS, _RADIUS_BITS = 12, 20  # of the 32 random bits that a pair of normals takes
_MANTISSA, _ONE = 0x7FFFF8, 0x3F800000  # 20 leading bits of a float32's mantissa; the bits of 1.0


@final
class NoiseStream:
    """Normal noise for a list of tensors, drawn parameter by parameter in fixed order.

    On a CPU, float32 noise takes 32 bits of SFC64 a pair and the Box-Muller transform in vectorised operations: less
    than three quarters of the time of `Tensor.normal_`, which is most of the cost of a Langevin step. The pairs lie on
    2^20 radii (up to 5.4 standard deviations) and 2^12 equally spaced directions; mean, variance and kurtosis agree
    with the normal's to 1e-6. Other dtypes use NumPy's ziggurat, other devices torch's own generator there.

    Args:
        generator: one number is drawn from it as the seed; None draws that number from torch's global generator, as
            data loaders do, so that `torch.manual_seed` makes a script repeatable.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        device = "cpu" if generator is None else generator.device
        self._seed = int(torch.randint(2**62, (), generator=generator, device=device))
        self._bits = np.random.SFC64(np.random.SeedSequence(self._seed))
        self._normal = np.random.Generator(self._bits)
        self._elsewhere: dict[torch.device, torch.Generator] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def draw(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Noise in the shapes, dtypes and devices of `like`: views of a buffer that the next draw overwrites."""
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for tensor in like:
            key = (tensor.device, tensor.dtype)
            sizes[key] = sizes.get(key, 0) + tensor.numel()
        flat = {key: self._fill(key, size) for key, size in sizes.items()}
        used = dict.fromkeys(sizes, 0)
        views = []
        for tensor in like:
            key = (tensor.device, tensor.dtype)
            views.append(flat[key][used[key] : used[key] + tensor.numel()].view(tensor.shape))
            used[key] += tensor.numel()
        return views

    def spawn(self) -> torch.Generator:
        """A generator on the CPU for whatever is not noise, independent of it."""
        word = np.random.SeedSequence(self._seed, spawn_key=(1,)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word >> np.uint64(1)))

    def state(self) -> dict[str, Any]:
        """Everything that decides the noise to come: numbers and tensors."""
        words = self._bits.state["state"]["state"].astype(np.uint64).view(np.int64)
        return {
            "seed": self._seed,
            "bits": torch.from_numpy(words.copy()),
            "devices": {str(device): source.get_state() for device, source in self._elsewhere.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        words = state["bits"].cpu().numpy().view(np.uint64)
        self._seed = int(state["seed"])
        self._bits.state = {
            "bit_generator": "SFC64",
            "state": {"state": words.copy()},
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._elsewhere = {}
        for name, source in state["devices"].items():
            self._elsewhere[torch.device(name)] = torch.Generator(name)
            self._elsewhere[torch.device(name)].set_state(source.cpu())

    def _fill(self, key: tuple[torch.device, torch.dtype], size: int) -> Tensor:
        device, dtype = key
        if not dtype.is_floating_point:
            raise ArgumentError(f"noise for parameters of {dtype}; expected floating-point parameters")
        room = size + size % 2
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() != room:  # kept: fresh pages cost as much as the noise in them
            buffer = self._buffers[key] = torch.empty(room, device=device, dtype=dtype)
        if device.type != "cpu":
            if device not in self._elsewhere:
                self._elsewhere[device] = torch.Generator(device).manual_seed(self._seed)
            return buffer.normal_(generator=self._elsewhere[device])
        if dtype is torch.float32:
            self._box_muller(buffer)
        else:
            buffer.copy_(torch.from_numpy(self._normal.standard_normal(room)))
        return buffer

    def _box_muller(self, out: Tensor) -> None:
        """r cos, r sin with r^2 = -2 log u; u at the middles of 2^20 cells of (0, 1), never 0 or 1."""
        pairs = out.numel() // 2
        words = torch.from_numpy(self._bits.random_raw((pairs + 1) // 2).view(np.int32))[:pairs]
        first, second = out[:pairs], out[pairs:]
        first.copy_(words >> (32 - _ANGLE_BITS)).mul_(2 * math.pi / 2**_ANGLE_BITS)
        # the low bits become the mantissa of a float in [1, 2), exactly
        words.bitwise_left_shift_(23 - _RADIUS_BITS).bitwise_and_(_MANTISSA).bitwise_or_(_ONE)
        radius = words.view(torch.float32).neg_().add_(2 - 2.0 ** -(_RADIUS_BITS + 1)).log_().mul_(-2).sqrt_()
        torch.sin(first, out=second).mul_(radius)
        first.cos_().mul_(radius)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}
