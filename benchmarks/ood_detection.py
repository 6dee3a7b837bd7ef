"""Out-of-distribution detection on images: methods x scores, near and far, with bootstrap errors.

    python benchmarks/ood_detection.py --data FOLDER [--quick] [--only cifar10] [--json FILE [--resume]]

FOLDER holds `mnist`, `fashion_mnist`, `notmnist`, `kannada_mnist`, `cifar10`, `cifar100/ood.npz`, `textures/ood.npz`
(x, y) and `weights` with LeNet for MNIST and ResNet-20, 32 and 56 for CIFAR-10, trained by others. Nothing sees an
out-of-distribution image before it is scored; temperatures and priors are chosen on 1,000 held-out test images, and
the 2,000 that are scored are others. The network for Fashion-MNIST is trained here.

What needs the last layer alone reads the features of one pass over every set. First the numbers: the layer on those
features gives what the network gives, a last-layer Laplace on them what it gives on the whole network, and the rank
metrics equal scikit-learn's.
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
from _measure import compact, finish, parser
from _ood import QUICK, SETTINGS, TEST, Setting, Sizes
from defaults import loader
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.evaluation import OOD_METRICS, SCORES, FeatureDensity, Predictions, ood_score, score_metrics
from bayesdl.evaluation.feature_density import Kind
from bayesdl.evaluation.feature_statistics import FeatureReader
from bayesdl.network import Network

CLASSES = 10
KINDS: tuple[Kind, ...] = ("mahalanobis", "relative", "single", "density", "knn", "vim")
METRICS = ("auroc", "ap_out", "fpr95")
QUALITY = ("accuracy", "nll", "ece")
# What the printed table shows; everything is in the JSON.
SHOWN = ("max_prob", "entropy", "epistemic", "max_logit", "energy")
GROUPS = {"near/auroc", "far/auroc"}
OPTIONS: dict[str, Any] = {"likelihood": "categorical", "progress": False}
Pair = tuple[Tensor, Tensor]
Scored = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Features:
    """A setting behind its body: the last layer alone, and what it is given, read once."""

    net: nn.Sequential
    train: Pair
    held: Pair
    scored: dict[str, Tensor]

    @classmethod
    def of(cls, setting: Setting) -> Features:
        """One pass over every image; checked against the network itself."""
        reader = FeatureReader(Network(setting.net), setting.head, inputs=True)

        def read(x: Tensor) -> Tensor:
            return torch.cat([reader(part)[0] for part in x.split(100)]).float()

        net = nn.Sequential(setting.net.get_submodule(setting.head)).eval()
        scored = {place: read(x) for place, x in setting.scored.items()}
        with torch.no_grad():
            direct, behind = setting.net(setting.test[0][:200]), net(scored[TEST][:200])
        assert float((direct - behind).abs().max()) < 1e-4 * float(direct.abs().max())
        train, held = setting.train, setting.held
        return cls(net, (read(train[0]), train[1]), (read(held[0]), held[1]), scored)


Work = tuple[str, Callable[[], Any], bool]
"""A row: its name, what makes a model of it (a list of them is a mixture), whether that reads features."""


def last_layer(setting: Setting, features: Features) -> Iterator[Work]:
    """Methods that change the last layer alone, or what comes after it."""
    net, seen, held = features.net, loader(features.train), loader(features.held)
    laplace = bdl.Laplace(select="last_layer")
    yield "MAP", lambda: bdl.wrap(net, "map", **OPTIONS), True
    yield "temperature", lambda: bdl.wrap(net, "temperature", held, **OPTIONS), True
    yield "Laplace, last layer", lambda: bdl.wrap(net, laplace, seen, validation=held, **OPTIONS), True
    yield "Laplace, last layer, training data alone", lambda: bdl.wrap(net, laplace, seen, **OPTIONS), True
    yield "vbll, post hoc", lambda: bdl.wrap(net, "vbll", seen, validation=held, **OPTIONS), True
    sghmc = bdl.SGMCMC("sghmc", num_samples=30)
    yield "SGHMC, last layer", lambda: bdl.wrap(net, sghmc, loader(features.train, 125), **OPTIONS), True
    width, labels = features.train[0].shape[1], features.train[1]

    def generative() -> bdl.BayesianModel:
        head = bdl.last_layer.Generative(width, CLASSES, num_data=len(labels), covariance="full", tensor_output=True)
        head.fit(*features.train, shrinkage=1e-3)
        return bdl.BayesianModel(bdl.replace(net, "0", head, keep_weights=False), head.posterior(), head.likelihood())

    def prototype() -> bdl.BayesianModel:
        head = bdl.last_layer.Prototype(width, tensor_output=True)
        head.observe(*features.train)
        changed = bdl.replace(setting.net, setting.head, head, keep_weights=False)
        return bdl.BayesianModel(changed, head.posterior(), head.likelihood())

    yield "generative head", generative, True
    # It has no weights, and a network of no weights is none: the whole network it is.
    yield "prototype head", prototype, False


def whole(setting: Setting, sizes: Sizes) -> Iterator[Work]:
    """Methods over all layers, and further networks."""
    net, (x, y) = setting.net, setting.train

    def first(count: int, size: int) -> list[Pair]:
        return loader((x[:count], y[:count]), size)

    held = loader((setting.held[0][:300], setting.held[1][:300]), 100)
    swag = bdl.SWAG(epochs=4, lr=2e-3, collects=5, num_samples=sizes.samples)
    sghmc = bdl.SGMCMC("sghmc", num_samples=sizes.samples, burn_in=40, thin=16)
    few = first(sizes.curvature, 100)
    yield "Laplace, all layers", lambda: bdl.wrap(net, "laplace", few, validation=held, **OPTIONS), False
    yield "SWAG", lambda: bdl.wrap(net, swag, first(sizes.trained, 125), **OPTIONS), False
    yield "SGHMC, all layers", lambda: bdl.wrap(net, sghmc, first(sizes.train, 125), **OPTIONS), False
    if setting.members:
        yield "MC dropout", lambda: bdl.wrap(net, "dropout", **OPTIONS), False
        yield "ensemble of five", lambda: bdl.wrap(list(setting.members), "ensemble", **OPTIONS), False
    if setting.deeper:
        nets = [net, *(other for _, other in setting.deeper)]
        names = ", ".join(["ResNet-20", *(name.removeprefix("ResNet-") for name, _ in setting.deeper)])
        yield f"ensemble of {names}", lambda: [bdl.wrap(each, "map", **OPTIONS) for each in nets], False
        name, deepest = setting.deeper[-1]
        yield f"{name}, MAP", lambda: bdl.wrap(deepest, "map", **OPTIONS), False


def check_last_layer(setting: Setting, features: Features) -> float:
    """Largest difference in probability of a last-layer Laplace on 500 features to one on the whole network."""
    laplace, prior = bdl.Laplace(select="last_layer"), bdl.GaussianPrior(precision=1.0)
    count, rows = slice(0, 500), slice(0, 100)
    made = [
        bdl.wrap(net, laplace, loader((x[count], setting.train[1][count]), 250), prior=prior, **OPTIONS)(inputs).probs
        for net, x, inputs in (
            (setting.net, setting.train[0], setting.test[0][rows]),
            (features.net, features.train[0], features.scored[TEST][rows]),
        )
    ]
    return float((made[0] - made[1]).abs().max())


def feature_scores(features: Features) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every score of features on every set; the last layer stands for the network."""
    for kind in KINDS:
        density = FeatureDensity(kind=kind).fit(features.net[0], loader(features.train), progress=False)
        yield kind, {place: density.scores([(z,)]) for place, z in features.scored.items()}


def scored(model: Any, sets: dict[str, Tensor], y: Tensor) -> tuple[Scored, Predictions]:
    """Every score that the method has on every set, and its predictions on the test images."""
    found: Scored = {}
    for place, x in sets.items():
        made = predicted(model, x, y if place == TEST else None)
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
    made = [each.predict(list(x.split(100)), generator=torch.Generator().manual_seed(0)) for each in models]
    if len(made) == 1:
        return Predictions.from_predictive(made[0], y)
    return Predictions.from_logits(torch.stack([each.latent.mean for each in made]), y)


def separation(setting: Setting, scores: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, list[float]]:
    """[value, bootstrap standard error] of the AUROC of each set and of every metric near and far.

    Near and far are plain means over sets; the test images are resampled in common.
    """
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


def resampled(setting: Setting, resamples: int) -> dict[str, Tensor]:
    """Weights (R, N) of a multinomial bootstrap of every set, the same for all methods and scores."""
    generator, drawn = torch.Generator().manual_seed(0), {}
    for place, x in setting.scored.items():
        draws = torch.randint(len(x), (resamples, len(x)), generator=generator)
        weights = torch.zeros(resamples, len(x), dtype=torch.float64)
        drawn[place] = weights.scatter_add_(1, draws, torch.ones(draws.shape).double())
    return drawn


def check_ranks(scores: dict[str, Tensor], place: str) -> float:
    """Largest difference to scikit-learn in AUROC and average precision."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = score_metrics(scores[TEST], scores[place])
    labels = np.concatenate([np.zeros(len(scores[TEST])), np.ones(len(scores[place]))])
    both = torch.cat([scores[TEST], scores[place]]).numpy()
    pairs = (("auroc", roc_auc_score(labels, both)), ("ap_out", average_precision_score(labels, both)))
    return max(abs(float(found[name]) - float(theirs)) for name, theirs in pairs)


def run(setting: Setting, sizes: Sizes, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """All feature scores and all methods of one setting into `figures`, kept after each row; rows there stay."""
    figures |= {"images": {place: len(x) for place, x in setting.scored.items()}, "near": list(setting.near)}
    rows, start = figures.setdefault("methods", {}), time.process_time()
    drawn, features = resampled(setting, sizes.resamples), Features.of(setting)
    figures["last layer on features, difference in probability"] = check_last_layer(setting, features)
    assert figures["last layer on features, difference in probability"] < 1e-5, figures
    if "features" not in figures:
        figures["features"] = {kind: separation(setting, found, drawn) for kind, found in feature_scores(features)}
    for name, make, behind in (*last_layer(setting, features), *whole(setting, sizes)):
        if name in rows:
            continue
        scores, test = scored(make(), features.scored if behind else setting.scored, setting.test[1])
        if "difference to scikit-learn" not in figures:
            worst = max(check_ranks(scores["entropy"], place) for place in setting.outside)
            assert worst < 1e-9, worst
            figures["difference to scikit-learn"] = worst
        quality = bdl.evaluation.evaluate_metrics(test, QUALITY)
        rows[name] = {key: round(value, 4) for key, value in quality.items()} | {
            "scores": {score: separation(setting, values, drawn) for score, values in scores.items()}
        }
        print(f"{time.process_time() - start:6.0f} s of CPU  {setting.name}: {name}  {brief(rows[name])}", flush=True)
        keep()


def brief(row: dict[str, Any]) -> str:
    """One line of progress."""
    shown = {score: pair(values) for score, values in row["scores"].items()}
    return json.dumps({key: row[key] for key in QUALITY} | shown)


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


def main() -> None:
    """Run the settings, print tables and JSON."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few images: shows that it runs")
    options_parser.add_argument("--only", choices=tuple(SETTINGS), default=None)
    options_parser.add_argument("--resume", action="store_true", help="keep the rows that the file of --json has")
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    sizes = QUICK if options.quick else Sizes()
    figures: dict[str, Any] = {"metrics": {name: OOD_METRICS[name].definition for name in METRICS}, "settings": {}}
    if options.resume and options.json is not None and options.json.exists():
        figures["settings"] = json.loads(options.json.read_text())["settings"]

    def keep() -> None:
        if options.json is not None:
            options.json.write_text(compact(figures) + "\n")

    for name, make in SETTINGS.items():
        if options.only in (None, name):
            setting = make(options, sizes)
            run(setting, sizes, figures["settings"].setdefault(setting.name, {}), keep)
            print(table(figures["settings"][setting.name]), flush=True)
    finish(figures, options)


if __name__ == "__main__":
    main()
