"""Out-of-distribution detection on images: methods x scores, near and far, with bootstrap errors.

    python benchmarks/ood_detection.py --data FOLDER [--quick] [--only cifar10] [--json FILE]

FOLDER holds `mnist`, `fashion_mnist`, `notmnist`, `kannada_mnist`, `cifar10`, `cifar100/ood.npz`, `textures/ood.npz`
(x, y) and `weights` with LeNet for MNIST and ResNet-20, 32 and 56 for CIFAR-10, trained by others. Nothing sees an
out-of-distribution image before it is scored; temperatures and priors are chosen on 1,000 held-out test images, and
the 2,000 that are scored are others. The network for Fashion-MNIST is trained here.

First the numbers: the rank metrics equal scikit-learn's on the first method's scores.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import compact, finish, parser
from defaults import Block, LeNet, ResNet20, loader
from fashion_last_layer import WIDTH, network
from fashion_last_layer import fit as trained
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.evaluation import OOD_METRICS, SCORES, FeatureDensity, Predictions, ood_score, score_metrics
from bayesdl.evaluation.feature_statistics import FeatureReader
from bayesdl.network import Network

TEST, CLASSES = "test", 10
KINDS = ("mahalanobis", "relative", "single", "density", "knn", "vim")
METRICS = ("auroc", "ap_out", "fpr95")
# What the printed table shows; everything is in the JSON.
SHOWN = ("max_prob", "entropy", "epistemic", "max_logit", "energy")
GROUPS = {"near/auroc", "far/auroc"}
Pair = tuple[Tensor, Tensor]
Scored = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Setting:
    """A trained network, what methods may read, the images scored, and which sets are near and far."""

    name: str
    net: nn.Module
    head: str
    width: int
    train: Pair
    held: Pair
    test: Pair
    outside: dict[str, Tensor]
    near: tuple[str, ...]
    more: Callable[[], Iterator[tuple[str, Any]]]


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
    return Setting(
        "mnist, LeNet", net.eval(), "fc2", 500, train,
        part("mnist/test.npz", slice(0, sizes.held)),
        part("mnist/test.npz", slice(sizes.held, sizes.held + sizes.test)),
        outside, ("kannada_mnist", "notmnist"), lambda: iter(()),
    )  # fmt: skip


def fashion(options: Any, sizes: Sizes) -> Setting:
    """The small network of `fashion_last_layer.py` with dropout, all others far."""
    train = archive(options.data / "fashion_mnist/train.npz", slice(0, sizes.train))

    def member(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return trained(network(0.2).train(), *train, sizes.steps, F.cross_entropy, seed)

    nets = [member(seed) for seed in range(5)]
    rows = slice(0, sizes.outside)
    outside = {
        name: archive(options.data / f"{name}/test.npz", rows)[0] for name in ("mnist", "notmnist", "kannada_mnist")
    }
    outside["textures"] = grey(archive(options.data / "textures/ood.npz", rows)[0])

    def more() -> Iterator[tuple[str, Any]]:
        yield "MC dropout", bdl.wrap(nets[0], "dropout", likelihood="categorical")
        yield "ensemble of five", bdl.wrap(nets, "ensemble", likelihood="categorical")

    held = archive(options.data / "fashion_mnist/test.npz", slice(0, sizes.held))
    test = archive(options.data / "fashion_mnist/test.npz", slice(sizes.held, sizes.held + sizes.test))
    return Setting("fashion_mnist, conv", nets[0], "8", WIDTH, train, held, test, outside, (), more)


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
    nets = [given(options.data, n, name) for n, name in ((3, "20-12fca82f"), (5, "32-d509ac18"), (9, "56-4bfd9763"))]

    def more() -> Iterator[tuple[str, Any]]:
        yield "ensemble of ResNet-20, 32, 56", [bdl.wrap(net, "map", likelihood="categorical") for net in nets]
        yield "ResNet-56, MAP", bdl.wrap(nets[2], "map", likelihood="categorical")
        if not options.skip_all_layers:
            few = loader((train[0][: sizes.curvature], train[1][: sizes.curvature]), 250)
            held_few = loader((held[0][:300], held[1][:300]), 100)
            yield (
                "Laplace, all layers",
                bdl.wrap(nets[0], "laplace", few, likelihood="categorical", validation=held_few, progress=False),
            )

    train = part("cifar10/train.npz", slice(0, sizes.train))
    held = part("cifar10/test.npz", slice(0, sizes.held))
    test = part("cifar10/test.npz", slice(sizes.held, sizes.held + sizes.test))
    return Setting("cifar10, ResNet-20", nets[0], "linear", 64, train, held, test, outside, ("cifar100",), more)


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


@dataclass(frozen=True)
class Sizes:
    """How many images each part takes, and how long what is trained here is trained."""

    train: int = 10_000
    held: int = 1000
    test: int = 2000
    outside: int = 2000
    curvature: int = 2000
    steps: int = 2000
    resamples: int = 500
    swag: int = 10


QUICK = Sizes(train=400, held=300, test=200, outside=150, curvature=200, steps=50, resamples=50, swag=3)
SETTINGS = {"mnist": lenet, "fashion": fashion, "cifar10": resnet}


def methods(setting: Setting, sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """Name and model (a list of models is a mixture of them) of every method that takes a trained network."""
    seen, held = loader(setting.train), loader(setting.held)
    options: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    yield "MAP", bdl.wrap(setting.net, "map", **options)
    yield "temperature", bdl.wrap(setting.net, "temperature", held, **options)
    last = bdl.Laplace(select="last_layer")
    yield "Laplace, last layer", bdl.wrap(setting.net, last, seen, validation=held, **options)
    yield "Laplace, last layer, training data alone", bdl.wrap(setting.net, last, seen, **options)
    yield "vbll, post hoc", bdl.wrap(setting.net, "vbll", seen, validation=held, **options)
    features, labels = features_of(setting, seen), setting.train[1]
    generative = bdl.last_layer.Generative(
        setting.width, CLASSES, num_data=len(labels), covariance="full", tensor_output=True
    )
    generative.fit(features, labels, shrinkage=1e-3)
    prototype = bdl.last_layer.Prototype(setting.width, tensor_output=True)
    prototype.observe(features, labels)
    for name, head in (("generative head", generative), ("prototype head", prototype)):
        changed = bdl.replace(setting.net, setting.head, head, keep_weights=False)
        yield name, bdl.BayesianModel(changed, head.posterior(), head.likelihood())
    few = loader((setting.train[0][: 2 * sizes.curvature], setting.train[1][: 2 * sizes.curvature]), 125)
    swag = bdl.SWAG(epochs=4, lr=2e-3, collects=5, num_samples=sizes.swag)
    yield "SWAG", bdl.wrap(setting.net, swag, few, **options)
    yield from setting.more()


def features_of(setting: Setting, data: list[Any]) -> Tensor:
    """What the last layer is given."""
    reader = FeatureReader(Network(setting.net), setting.head, inputs=True)
    return torch.cat([z for z, _, _ in reader.over(data, progress=False, targets=False)]).float()


def feature_scores(setting: Setting) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every score of features on every set; the features are read once, and the last layer stands for the network."""
    head, labels = setting.net.get_submodule(setting.head), setting.train[1]
    sets = {TEST: setting.test[0], **setting.outside}
    known = features_of(setting, loader(setting.train))
    read = {place: [(features_of(setting, [(part,) for part in x.split(500)]),)] for place, x in sets.items()}
    for kind in KINDS:
        density = FeatureDensity(kind=kind).fit(head, loader((known, labels)), progress=False)
        yield kind, {place: density.scores(batches) for place, batches in read.items()}


def scored(setting: Setting, model: Any) -> tuple[Scored, Predictions]:
    """Every score that the method has on every set, and its predictions on the test images."""
    sets = {TEST: setting.test[0], **setting.outside}
    found: Scored = {}
    for place, x in sets.items():
        made = predicted(model, x, setting.test[1] if place == TEST else None)
        if place == TEST:
            test = made
        for name in SCORES:
            try:
                found.setdefault(name, {})[place] = ood_score(made, name)
            except bdl.evaluation.UndefinedError:
                found.pop(name, None)
    return found, test


def predicted(model: Any, x: Tensor, y: Tensor | None) -> Predictions:
    """Predictions of a model, or of an equal mixture of several networks."""
    models = model if isinstance(model, list) else [model]
    made = [each.predict(list(x.split(200)), generator=torch.Generator().manual_seed(0)) for each in models]
    if len(made) == 1:
        return Predictions.from_predictive(made[0], y)
    return Predictions.from_logits(torch.stack([each.latent.mean for each in made]), y)


def separation(setting: Setting, scores: dict[str, Tensor], sizes: Sizes) -> dict[str, list[float]]:
    """[value, bootstrap standard error] of the AUROC of each set and of every metric near and far.

    Near and far are plain means over sets; the test images are resampled in common.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = {key: resampled(len(value), sizes.resamples, generator) for key, value in scores.items()}
    values: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for place in setting.outside:
        one = score_metrics(scores[TEST], scores[place])
        many = score_metrics(scores[TEST], scores[place], id_weights=drawn[TEST], ood_weights=drawn[place])
        for metric in METRICS:
            values[f"{place}/{metric}"] = torch.tensor(one[metric])
            errors[f"{place}/{metric}"] = torch.as_tensor(many[metric])
    groups = {"near": setting.near, "far": tuple(place for place in setting.outside if place not in setting.near)}
    for group, places in groups.items():
        for metric in METRICS if places else ():
            keys = [f"{place}/{metric}" for place in places]
            values[f"{group}/{metric}"] = torch.stack([values[key] for key in keys]).mean()
            errors[f"{group}/{metric}"] = torch.stack([errors[key] for key in keys]).mean(0)
    kept = [key for key in values if key.endswith("/auroc") or key.split("/")[0] in groups]
    return {key: [round(float(values[key]), 4), round(float(errors[key].std()), 4)] for key in kept}


def resampled(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Weights (R, N) of a multinomial bootstrap."""
    draws = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())


def check(scores: dict[str, Tensor], place: str) -> float:
    """Largest difference to scikit-learn in AUROC and average precision."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = score_metrics(scores[TEST], scores[place])
    labels = np.concatenate([np.zeros(len(scores[TEST])), np.ones(len(scores[place]))])
    both = torch.cat([scores[TEST], scores[place]]).numpy()
    pairs = (("auroc", roc_auc_score(labels, both)), ("ap_out", average_precision_score(labels, both)))
    return max(abs(float(found[name]) - float(theirs)) for name, theirs in pairs)


def run(setting: Setting, sizes: Sizes, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """All feature scores and all methods of one setting into `figures`, kept after each: the last ones take longest."""
    figures |= {"images": {TEST: len(setting.test[0])}, "near": setting.near, "features": {}, "methods": {}}
    figures["images"] |= {place: len(x) for place, x in setting.outside.items()}
    start = time.perf_counter()
    for kind, values in feature_scores(setting):
        figures["features"][kind] = separation(setting, values, sizes)
        report(setting, kind, {kind: figures["features"][kind]}, start)
    for name, model in methods(setting, sizes):
        scores, test = scored(setting, model)
        if "difference to scikit-learn" not in figures:
            worst = max(check(scores["entropy"], place) for place in setting.outside)
            assert worst < 1e-9, worst
            figures["difference to scikit-learn"] = worst
        quality = bdl.evaluation.evaluate_metrics(test, ("accuracy", "nll", "ece"))
        figures["methods"][name] = {key: round(value, 4) for key, value in quality.items()} | {
            "scores": {score: separation(setting, values, sizes) for score, values in scores.items()}
        }
        report(setting, name, figures["methods"][name]["scores"], start)
        keep()


def report(setting: Setting, name: str, scores: dict[str, dict[str, list[float]]], start: float) -> None:
    """One line of progress."""
    keys = [f"{group}/auroc" for group in ("near", "far")]
    shown = {score: [found[key][0] for key in keys if key in found] for score, found in scores.items()}
    print(f"{time.perf_counter() - start:6.0f} s  {setting.name}: {name}  {json.dumps(shown)}", flush=True)


def table(figures: dict[str, Any]) -> str:
    """AUROC in percent, near / far, of one setting: methods x scores, and the feature scores below."""
    found = figures["methods"]
    lines = ["| method | accuracy | NLL | " + " | ".join(SHOWN) + " |", "| --- " * (len(SHOWN) + 3) + "|"]
    for name, row in found.items():
        scores = {score: pair(row["scores"][score]) if score in row["scores"] else "" for score in SHOWN}
        # One network with fixed weights has no epistemic part to rank by.
        scores["epistemic"] = "" if set(scores["epistemic"].split(" / ")) <= {"50.0"} else scores["epistemic"]
        lines.append(f"| {name} | {100 * row['accuracy']:.1f} | {row['nll']:.3f} | {' | '.join(scores.values())} |")
    features = ", ".join(f"{kind} {pair(values)}" for kind, values in figures["features"].items())
    errors = [
        values[key][1] for row in found.values() for values in row["scores"].values() for key in GROUPS & set(values)
    ]
    errors += [values[key][1] for values in figures["features"].values() for key in GROUPS & set(values)]
    error = f"Standard errors are at most {100 * max(errors):.1f}."
    return "\n".join([*lines, "", f"Features of the plain network: {features}. {error}"])


def pair(values: dict[str, list[float]]) -> str:
    """`near / far`."""
    return " / ".join(f"{100 * values[key][0]:.1f}" for key in ("near/auroc", "far/auroc") if key in values)


def kept(figures: dict[str, Any], path: Path | None) -> None:
    """Write what there is so far."""
    if path is not None:
        path.write_text(compact(figures) + "\n")


def main() -> None:
    """Run the settings, print tables and JSON."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few images: shows that it runs")
    options_parser.add_argument("--only", choices=tuple(SETTINGS), default=None)
    options_parser.add_argument("--skip-all-layers", action="store_true", help="leave Laplace over all layers out")
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    sizes = QUICK if options.quick else Sizes()
    figures: dict[str, Any] = {"metrics": {name: OOD_METRICS[name].definition for name in METRICS}, "settings": {}}
    for name, make in SETTINGS.items():
        if options.only in (None, name):
            setting = make(options, sizes)
            found = figures["settings"][setting.name] = {}
            run(setting, sizes, found, lambda: kept(figures, options.json))
            print(table(found), flush=True)
    finish(figures, options)


if __name__ == "__main__":
    main()
