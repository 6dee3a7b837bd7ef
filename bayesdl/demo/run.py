"""The two comparisons of `bayesdl demo`, from trained networks to a `Report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bayesdl.demo import diabetes, digits, networks
from bayesdl.demo.examples import Examples, loader
from bayesdl.demo.training import Recipe, trained

if TYPE_CHECKING:
    from bayesdl.evaluation.report import Report
    from bayesdl.model import BayesianModel

DIGITS_STORY = (
    f"A convolutional network is trained on {digits.NUM_TRAIN} images of the digits 0 to 7 until it fits them without "
    "error. Each method makes it Bayesian; temperature and the Laplace priors are tuned on "
    f"{digits.NUM_VALIDATION} other images. The rest is the test set, also rotated by up to {digits.ROTATIONS[-1]} "
    f"degrees and blurred by up to {digits.BLURS[-1]:g} pixels (columns “under shift” are means over that range). "
    "Digits 8 and 9, pieces of photographs and noise are unknown to the network, and it should say so."
)
DIABETES_STORY = (
    f"A small network is trained on {diabetes.NUM_TRAIN} patients to predict the course of diabetes over a year. Each "
    f"method makes it Bayesian, with its noise tuned on {diabetes.NUM_VALIDATION} other patients. One target unit is "
    "the standard deviation of the training targets."
)
MEMBERS = 5  # networks of the deep ensemble, the one that all other methods start from included


@final
@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on.

    Attributes:
        seed: of training and of everything that is drawn afterwards; the data and their splits stay the same.
        device: where everything is computed.
        cache: folder of trained networks; None trains anew and keeps nothing.
        epochs: for each network. draws: of Monte-Carlo dropout. bootstrap: resamples behind each interval.
        limit: examples of each data set that the methods are scored on; None for all.
        progress: progress bars on the standard error stream.
    """

    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    epochs: int = 60
    draws: int = 20
    bootstrap: int = 1000
    limit: int | None = None
    progress: bool = True

    def generator(self) -> torch.Generator:
        """A new generator of this run's seed."""
        return torch.Generator().manual_seed(self.seed)

    def scored(self, *tensors: Tensor) -> DataLoader:
        """Loader of data that the methods are scored on."""
        return loader(*(tensor[: self.limit] for tensor in tensors), device=self.device)


def compare_digits(settings: Settings) -> Report:
    """Six methods on a classifier of the digits 0 to 7: in distribution, under shift, and on what is no such digit."""
    from bayesdl.evaluation.compare import compare

    data = digits.load()
    recipe = Recipe("digits", epochs=settings.epochs)
    members = _train_members(
        lambda: networks.digits_network(digits.NUM_CLASSES), nn.functional.cross_entropy, data.train, recipe, settings
    )
    shift = {
        name: {severity: settings.scored(moved.inputs, moved.targets) for severity, moved in series.items()}
        for name, series in digits.shifts(data.test).items()
    }
    return compare(
        wrap_all(members, data.train, data.validation, "categorical", settings),
        settings.scored(data.test.inputs, data.test.targets),
        ood={name: settings.scored(inputs) for name, inputs in data.ood.items()},
        shift=shift,
        bootstrap=settings.bootstrap,
        generator=settings.generator(),
        progress=settings.progress,
    )


def compare_diabetes(settings: Settings) -> Report:
    """Methods for one real target, standardised, with Gaussian noise."""
    from bayesdl.evaluation.compare import compare

    data = diabetes.load()
    recipe = Recipe("diabetes", epochs=settings.epochs)
    members = _train_members(
        lambda: networks.diabetes_network(data.train.inputs.shape[1]),
        nn.functional.mse_loss,
        data.train,
        recipe,
        settings,
    )
    return compare(
        wrap_all(members, data.train, data.validation, "gaussian", settings),
        settings.scored(data.test.inputs, data.test.targets),
        bootstrap=settings.bootstrap,
        generator=settings.generator(),
        progress=settings.progress,
    )


def wrap_all(
    members: list[nn.Module],
    train: Examples,
    validation: Examples,
    likelihood: str,
    settings: Settings,
) -> Mapping[str, BayesianModel]:
    """The methods by row name; all but the ensemble start from the first network."""
    from bayesdl.methods.dropout import MCDropout
    from bayesdl.methods.laplace import Laplace
    from bayesdl.methods.swag import SWAG
    from bayesdl.wrap import wrap

    network = members[0]
    device = settings.device
    ordered = loader(train.inputs, train.targets, device=device)
    shuffled = loader(train.inputs, train.targets, batch_size=32, device=device, generator=settings.generator())
    held_out = loader(validation.inputs, validation.targets, device=device)

    def wrapped(model: Any, method: Any, data: Any = None) -> BayesianModel:
        # whatever a method leaves open (prior precision, noise, temperature) is chosen on the same held-out data
        return wrap(
            model,
            method,
            data,
            likelihood=likelihood,
            validation=held_out,
            generator=settings.generator(),
            progress=settings.progress,
        )

    rows = {"map": wrapped(network, "map", held_out)}
    if likelihood == "categorical":
        rows["temperature"] = wrapped(network, "temperature")
    for name, select in (("laplace, last layer", "last_layer"), ("laplace, all layers", "all")):
        rows[name] = wrapped(network, Laplace(select=select, structure="kron"), ordered)
    rows["swag"] = wrapped(network, SWAG(epochs=20, lr=1e-2), shuffled)
    rows["dropout"] = wrapped(network, MCDropout(num_samples=settings.draws), held_out)
    rows["ensemble"] = wrapped(members, "ensemble", held_out)
    return rows


def _train_members(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Examples,
    recipe: Recipe,
    settings: Settings,
) -> list[nn.Module]:
    """Train, or read from the cache, the networks of the ensemble; only their seeds differ."""
    inputs, targets = data.inputs.to(settings.device), data.targets.to(settings.device)
    members: list[nn.Module] = []
    total = MEMBERS * recipe.epochs
    with tqdm(total=total, desc="train", unit="epoch", disable=not settings.progress, leave=False) as bar:
        for member in range(MEMBERS):
            seed = settings.seed * MEMBERS + member
            members.append(
                trained(build, loss, inputs, targets, recipe, seed=seed, cache=settings.cache, on_epoch=bar.update)
            )
            bar.update((member + 1) * recipe.epochs - bar.n)
    return members
