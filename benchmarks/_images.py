"""Grey images of a data folder, and training on them, shared by the sampler benchmarks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bayesdl as bdl

BATCH = 128
CHANCE = math.log(10)
Pair = tuple[Tensor, Tensor]


def images(options: Any, name: str, part: str, rows: slice) -> Pair:
    """`(N, 784)` pixels from 0 to 1 and labels of `<options.data>/<name>/<part>.npz`, on `options.device`."""
    with np.load(options.data / name / f"{part}.npz") as archive:
        x, y = archive["x"][rows], archive["y"][rows]
    pixels = torch.as_tensor(x).to(options.device).float().reshape(len(x), -1) / 255
    return pixels, torch.as_tensor(y).to(options.device).long()


def batches(pair: Pair, size: int = 1000) -> list[Pair]:
    """Batches in order."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


def perceptron(width: int, hidden: int, seed: int) -> nn.Module:
    """ReLU network with `hidden` layers of `width` units, 784 inputs and 10 outputs."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in in (784, *(width,) * (hidden - 1)):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(
    net: nn.Module, optimizer: Any, data: Pair, steps: int, seed: int, schedule: Any = None, chain: Any = None
) -> bool:
    """`steps` steps on shuffled batches; False as soon as the loss is not finite, or if it ends above chance."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    last: list[float] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data[0]), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(data[0][rows]), data[1][rows])
        loss.backward()
        last = [*last[-49:], float(loss.detach())]
        if not math.isfinite(last[-1]):
            return False
        try:
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if chain is not None:
                chain.step(getattr(schedule, "sampling", True), loss=last[-1])
        except bdl.errors.NonFiniteError:
            return False
    return sum(last) / len(last) < CHANCE
