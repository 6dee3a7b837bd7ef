"""Images of 8 x 8 pixels that scikit-learn carries: in-distribution, shifted, near-OOD, far-OOD.

The network only ever sees the digits 0 to 7. The digits 8 and 9 are the near-OOD set; patches of photographs and noise
are the far one. No file is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from bayesdl.demo.examples import Examples

NUM_CLASSES = 8
NUM_TRAIN = 200
NUM_VALIDATION = 200
SPLIT_SEED = 0  # every run sees the same splits, whatever its own seed
ROTATIONS = (15, 30, 45, 60, 75)
BLURS = (0.5, 1.0, 1.5, 2.0, 3.0)
_PATCH_SCALE = 4  # a patch's pixel is the mean of 4 x 4 pixels: at full resolution most patches hold one flat colour
_GREY = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601


@final
@dataclass(frozen=True, eq=False)
class Digits:
    """What the demo trains on and is scored on: grey images (N, 1, 8, 8) in [0, 1] with labels (N,).

    `ood` holds images by name that are none of the digits 0 to 7; nothing trains on them.
    """

    train: Examples
    validation: Examples
    test: Examples
    ood: Mapping[str, Tensor]


def load() -> Digits:
    """Stratified splits of the digits 0 to 7, and the three OOD sets."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    inputs = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.as_tensor(bunch.target, dtype=torch.long)
    known = labels < NUM_CLASSES
    inside, classes = inputs[known], labels[known]
    train, rest = train_test_split(
        range(len(inside)), train_size=NUM_TRAIN, stratify=classes.numpy(), random_state=SPLIT_SEED
    )
    validation, test = train_test_split(
        rest, train_size=NUM_VALIDATION, stratify=classes[rest].numpy(), random_state=SPLIT_SEED
    )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return Digits(
        train=Examples(inside[train], classes[train]),
        validation=Examples(inside[validation], classes[validation]),
        test=Examples(inside[test], classes[test]),
        ood={
            "digits 8-9": inputs[~known],
            "photographs": photograph_patches(),
            "noise": torch.rand(500, 1, 8, 8, generator=generator),
        },
    )


def photograph_patches() -> Tensor:
    """Every 32 x 32 tile of scikit-learn's two sample photographs, as a grey image (N, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        colours = torch.tensor(photograph, dtype=torch.float32) / 255.0  # a copy: the array cannot be written to
        grey = colours @ torch.tensor(_GREY)
        small = functional.avg_pool2d(grey[None, None], _PATCH_SCALE)[0, 0]
        tiles.append(small.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 1, 8, 8))
    return torch.cat(tiles)


def rotate(inputs: Tensor, degrees: float) -> Tensor:
    """Images (N, 1, H, W) turned counter-clockwise about their centre, bilinear, black outside."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = inputs.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(inputs), 2, 3)
    grid = functional.affine_grid(matrix, list(inputs.shape), align_corners=False)
    return functional.grid_sample(inputs, grid, align_corners=False)


def blur(inputs: Tensor, sigma: float) -> Tensor:
    """Images (N, 1, H, W) under a Gaussian of standard deviation `sigma` pixels, cut at three of them; edges repeat."""
    radius = math.ceil(3.0 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=inputs.dtype, device=inputs.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(inputs, [radius] * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


def shifts(test: Examples) -> dict[str, dict[float, Examples]]:
    """The test set under growing rotation (degrees) and blur (standard deviation in pixels); labels unchanged."""
    return {
        "rotation": {d: Examples(rotate(test.inputs, d), test.targets) for d in ROTATIONS},
        "blur": {s: Examples(blur(test.inputs, s), test.targets) for s in BLURS},
    }
