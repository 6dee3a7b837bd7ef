"""Trained networks and the images inside and outside of what they know, for `ood_detection.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from defaults import Block, LeNet, ResNet20
from fashion_last_layer import WIDTH, network
from fashion_last_layer import fit as trained
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
TEST = "test"


@dataclass(frozen=True)
class Sizes:
    """How many images each part takes, and how long what is trained or sampled here takes."""

    train: int = 10_000
    held: int = 1000
    test: int = 2000
    outside: int = 1200
    curvature: int = 1000
    trained: int = 4000
    steps: int = 2000
    resamples: int = 100
    samples: int = 10


QUICK = Sizes(train=400, held=300, test=200, outside=150, curvature=200, trained=200, steps=50, resamples=50, samples=3)


@dataclass(frozen=True)
class Setting:
    """A trained network, what methods may read, the images scored, which sets are near, and further networks.

    `members` are other seeds of the network, `deeper` networks of the same kind of other depths, each with its name.
    """

    name: str
    net: nn.Module
    head: str
    train: Pair
    held: Pair
    test: Pair
    outside: dict[str, Tensor]
    near: tuple[str, ...]
    members: tuple[nn.Module, ...] = ()
    deeper: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def scored(self) -> dict[str, Tensor]:
        """Every set of images that is scored, the test images first."""
        return {TEST: self.test[0], **self.outside}


def archive(path: Path, rows: slice) -> Pair:
    """Pixels in [0, 1] (N, channels, height, width) and labels."""
    with np.load(path) as file:
        x, y = file["x"][rows], file["y"][rows]
    pixels = torch.as_tensor(x).float() / 255
    return pixels if pixels.dim() == 4 else pixels.unsqueeze(1), torch.as_tensor(y).long()


def grey(pixels: Tensor) -> Tensor:
    """Colour images 32 x 32 as grey ones 28 x 28: mean of the channels, the middle."""
    return pixels.mean(1, keepdim=True)[:, :, 2:-2, 2:-2]


def colour(pixels: Tensor) -> Tensor:
    """Grey images 28 x 28 with a black border, three equal channels."""
    return F.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1)


def halves(pair: Pair, sizes: Sizes) -> tuple[Pair, Pair]:
    """Held-out images and, after them, those that are scored."""
    end = sizes.held + sizes.test
    return (pair[0][: sizes.held], pair[1][: sizes.held]), (pair[0][sizes.held : end], pair[1][sizes.held : end])


def lenet(options: Any, sizes: Sizes) -> Setting:
    """LeNet for MNIST. Near: other characters; far: clothes and textures."""
    net = LeNet()
    net.load_state_dict(torch.load(options.data / "weights/mnist_lenet/mnist_cnn.pt", weights_only=True))

    def scaled(pixels: Tensor) -> Tensor:
        return (pixels - 0.1307) / 0.3081

    def part(name: str, rows: slice) -> Pair:
        x, y = archive(options.data / name, rows)
        return scaled(x), y

    rows = slice(0, sizes.outside)
    outside = {name: part(f"{name}/test.npz", rows)[0] for name in ("kannada_mnist", "notmnist", "fashion_mnist")}
    outside["textures"] = scaled(grey(archive(options.data / "textures/ood.npz", rows)[0]))
    train = part("mnist/train.npz", slice(0, sizes.train))
    held, test = halves(part("mnist/test.npz", slice(0, sizes.held + sizes.test)), sizes)
    return Setting("mnist, LeNet", net.eval(), "fc2", train, held, test, outside, ("kannada_mnist", "notmnist"))


def fashion(options: Any, sizes: Sizes) -> Setting:
    """The small network of `fashion_last_layer.py` with dropout, five seeds of it, all others far."""
    train = archive(options.data / "fashion_mnist/train.npz", slice(0, sizes.train))

    def member(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return trained(network(0.2).train(), *train, sizes.steps, F.cross_entropy, seed)

    nets = tuple(member(seed) for seed in range(5))
    rows = slice(0, sizes.outside)
    names = ("mnist", "notmnist", "kannada_mnist")
    outside = {name: archive(options.data / f"{name}/test.npz", rows)[0] for name in names}
    outside["textures"] = grey(archive(options.data / "textures/ood.npz", rows)[0])
    held, test = halves(archive(options.data / "fashion_mnist/test.npz", slice(0, sizes.held + sizes.test)), sizes)
    assert nets[0].get_submodule("8").in_features == WIDTH
    return Setting("fashion_mnist, conv", nets[0], "8", train, held, test, outside, (), members=nets)


def resnet(options: Any, sizes: Sizes) -> Setting:
    """ResNet-20 for CIFAR-10. Near: CIFAR-100; far: textures and MNIST."""
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def scaled(pixels: Tensor) -> Tensor:
        return (pixels - mean.view(3, 1, 1)) / spread.view(3, 1, 1)

    def part(name: str, rows: slice) -> Pair:
        x, y = archive(options.data / name, rows)
        return scaled(x), y

    rows = slice(0, sizes.outside)
    outside = {
        "cifar100": part("cifar100/ood.npz", rows)[0],
        "textures": part("textures/ood.npz", rows)[0],
        "mnist": scaled(colour(archive(options.data / "mnist/test.npz", rows)[0])),
    }
    train = part("cifar10/train.npz", slice(0, sizes.train))
    held, test = halves(part("cifar10/test.npz", slice(0, sizes.held + sizes.test)), sizes)
    net = given(options.data, 3, "20-12fca82f")
    deeper = (
        ("ResNet-32", given(options.data, 5, "32-d509ac18")),
        ("ResNet-56", given(options.data, 9, "56-4bfd9763")),
    )
    return Setting("cifar10, ResNet-20", net, "linear", train, held, test, outside, ("cifar100",), deeper=deeper)


def given(folder: Path, blocks: int, name: str) -> nn.Module:
    """A ResNet of `blocks` blocks a stage."""
    net = ResNet20()
    if blocks != 3:
        for stage, (first, width, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), start=1):
            rest = [Block(width, width, 1) for _ in range(blocks - 1)]
            setattr(net, f"layer{stage}", nn.Sequential(Block(first, width, stride), *rest))
    path = folder / f"weights/cifar10_resnet/resnet{name}.th"
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return net.eval()


SETTINGS = {"mnist": lenet, "fashion": fashion, "cifar10": resnet}
