"""Which rule should choose the prior precision when nobody says anything? A study over networks and data sets.

    python benchmarks/defaults.py --data FOLDER [--splits 3] [--only 'uci/*'] [--json FILE]

FOLDER holds `uci/*.npz` (x, y, train_idx, test_idx), and, where present, `tabular/*.npz` (x, y), `mnist` with
`weights/mnist_lenet` and `cifar10` with `weights/cifar10_resnet`. Scikit-learn's digits are always there. Every network
is trained without looking at any of the rules; every rule sees the training loader alone, but those named "held-out".
Beside them stands the plain network, once with what the training data say (residual noise) and once with what a
held-out set says (noise or temperature). Differences to the latter are paired: over splits, or over the test points of
a single one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import finish, parser
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.demo import digits, networks
from bayesdl.demo.training import Recipe, train

RULES = ("evidence", "loo", "training")
PLAIN = "map, held-out"
TABULAR = ("banknote", "ionosphere", "phoneme", "sonar")


@dataclass(frozen=True)
class Problem:
    """A trained network, its training data, data it never saw to choose with, and data to score on."""

    name: str
    net: nn.Module
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    likelihood: str


def loader(pair: tuple[Tensor, Tensor], size: int = 500) -> list[tuple[Tensor, Tensor]]:
    """Batches in order."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


def uci(folder: Path, name: str, split: int) -> Problem:
    """A 2 x 50 ReLU network trained by Adam for as many epochs as overfits the small sets."""
    with np.load(folder / "uci" / f"{name}.npz") as archive:
        x, y = archive["x"], archive["y"]
        rows, tests = archive["train_idx"][split], archive["test_idx"][split]
    generator = torch.Generator().manual_seed(split)
    order = torch.randperm(len(rows), generator=generator).numpy()
    held, rows = rows[order[: len(rows) // 10]], rows[order[len(rows) // 10 :]][:8000]
    centre, spread = x[rows].mean(0), x[rows].std(0)
    x = (x - centre) / np.where(spread < 1e-8, 1.0, spread)
    y = (y - y[rows].mean()) / y[rows].std()

    def pick(index: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(x[index]).float(), torch.as_tensor(y[index]).float().unsqueeze(1)

    train_pair = pick(rows)
    torch.manual_seed(split)
    net = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(min(400, 400 * 1000 // len(rows))):
        shuffled = torch.randperm(len(rows), generator=generator)
        for batch in shuffled.split(64):
            optimiser.zero_grad()
            F.mse_loss(net(train_pair[0][batch]), train_pair[1][batch]).backward()
            optimiser.step()
    return Problem(f"uci/{name}", net, train_pair, pick(held), pick(tests), "gaussian")


def sklearn_digits(seed: int) -> Problem:
    """The demo's convolutional network."""
    data = digits.load()
    net = train(
        lambda: networks.digits_network(digits.NUM_CLASSES),
        F.cross_entropy,
        data.train.inputs,
        data.train.targets,
        Recipe("digits", epochs=60),
        seed=seed,
    )
    parts = [(part.inputs, part.targets) for part in (data.train, data.validation, data.test)]
    return Problem("digits/conv", net, *parts, "categorical")


def tabular(folder: Path, name: str, split: int) -> Problem:
    """A 2 x 50 ReLU classifier trained on a third of the rows until it knows them by heart."""
    with np.load(folder / "tabular" / f"{name}.npz") as archive:
        x, y = torch.as_tensor(archive["x"]).float(), torch.as_tensor(archive["y"]).long().flatten()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    x, y = x[order], (y - y.min())[order]
    size, held = len(x) // 3, len(x) // 15
    x = (x - x[:size].mean(0)) / x[:size].std(0).clamp(min=1e-6)
    torch.manual_seed(split)
    net = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(400):
        optimiser.zero_grad()
        F.cross_entropy(net(x[:size]), y[:size]).backward()
        optimiser.step()
    parts = [(x[p], y[p]) for p in (slice(0, size), slice(size, size + held), slice(size + held, None))]
    return Problem(f"tabular/{name}", net, *parts, "categorical")


class LeNet(nn.Module):
    """The layout of the published MNIST weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def lenet(folder: Path) -> Problem:
    """LeNet on MNIST, trained by others."""
    net = LeNet()
    net.load_state_dict(torch.load(folder / "weights/mnist_lenet/mnist_cnn.pt", weights_only=True))

    def images(name: str, rows: slice) -> tuple[Tensor, Tensor]:
        with np.load(folder / "mnist" / name) as archive:
            x, y = archive["x"][rows], archive["y"][rows]
        return (torch.as_tensor(x).float().unsqueeze(1) / 255 - 0.1307) / 0.3081, torch.as_tensor(y).long()

    test = images("test.npz", slice(0, 10000))
    return Problem(
        "mnist/lenet",
        net,
        images("train.npz", slice(0, 10000)),
        (test[0][:2000], test[1][:2000]),
        (test[0][2000:6000], test[1][2000:6000]),
        "categorical",
    )


class Block(nn.Module):
    """Residual block with the parameter-free shortcut (option A)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.widen = (out - width) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.widen, self.widen))
        return F.relu(y + short)


class ResNet20(nn.Module):
    """The layout of the published CIFAR-10 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet(folder: Path) -> Problem:
    """ResNet-20 on CIFAR-10, trained by others on the whole training set, of which the rules see 3 %."""
    net = ResNet20()
    state = torch.load(folder / "weights/cifar10_resnet/resnet20-12fca82f.th", weights_only=True, map_location="cpu")
    net.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def images(name: str, rows: int) -> tuple[Tensor, Tensor]:
        with np.load(folder / "cifar10" / name) as archive:
            x, y = archive["x"][:rows], archive["y"][:rows]
        return (torch.as_tensor(x).float() / 255 - mean.view(3, 1, 1)) / spread.view(3, 1, 1), torch.as_tensor(y).long()

    test = images("test.npz", 2500)  # few points: the covariance of each costs ten backward passes through 20 layers
    held, score = (test[0][:500], test[1][:500]), (test[0][500:], test[1][500:])
    return Problem("cifar10/resnet20", net, images("train.npz", 1500), held, score, "categorical")


def rows_of(
    problem: Problem, structures: tuple[str, ...], selections: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], bdl.BayesianModel]]]:
    """Models by row name, made when asked for."""
    seen, held = loader(problem.train), loader(problem.held_out)
    options: dict[str, Any] = {"likelihood": problem.likelihood, "progress": False}
    baseline = "temperature" if problem.likelihood == "categorical" else "map"
    yield "map", lambda: bdl.wrap(problem.net, "map", seen, **options)
    yield PLAIN, lambda: bdl.wrap(problem.net, baseline, held, **options)
    for select in selections:
        for structure in structures:
            method = bdl.Laplace(select=select, structure=structure)
            base = bdl.wrap(problem.net, method, seen, prior=bdl.GaussianPrior(1.0), **options)
            for rule in RULES:
                yield f"laplace {select} {structure}, {rule}", lambda base=base, rule=rule: base.tune(rule)
            for name, errors in (("held-out", 0.0), ("held-out, one standard error", 1.0)):
                yield (
                    f"laplace {select} {structure}, {name}",
                    lambda base=base, errors=errors: base.tune("heldout", held, standard_errors=errors),
                )


def losses(problem: Problem, structures: tuple[str, ...], selections: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Test NLL of every point for every row."""
    found = {}
    for name, make in rows_of(problem, structures, selections):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make()
            parts = [model(x).log_prob(y) for x, y in loader(problem.test)]
        found[name] = -torch.cat(parts).double().detach().numpy()
    return found


def mean_and_error(runs: list[np.ndarray]) -> list[float]:
    """Mean over all splits, and its standard error: over splits, or over the points of a single one."""
    values = np.array([run.mean() for run in runs]) if len(runs) > 1 else runs[0]
    return [round(float(values.mean()), 4), round(float(values.std(ddof=1) / len(values) ** 0.5), 4)]


def problems(options: Any) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names, and how to train the network of one split."""
    for seed in range(options.splits):
        yield "digits/conv", lambda seed=seed: sklearn_digits(seed)
    if options.data is None:
        return
    for path in sorted((options.data / "uci").glob("*.npz")):
        with np.load(path) as archive:
            published = len(archive["train_idx"])
        for split in range(min(options.splits, published)):
            yield f"uci/{path.stem}", lambda name=path.stem, split=split: uci(options.data, name, split)
    for name in TABULAR if (options.data / "tabular").exists() else ():
        for split in range(options.splits):
            yield f"tabular/{name}", lambda name=name, split=split: tabular(options.data, name, split)
    if (options.data / "weights/mnist_lenet").exists():
        yield "mnist/lenet", lambda: lenet(options.data)
    if (options.data / "weights/cifar10_resnet").exists():
        yield "cifar10/resnet20", lambda: resnet(options.data)


def main() -> None:
    """Run the study, average over splits, print a table and JSON."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder of data sets")
    options_parser.add_argument("--splits", type=int, default=3)
    options_parser.add_argument("--structures", default="kron")
    options_parser.add_argument("--selections", default="last_layer,all")
    options_parser.add_argument("--only", default="*", help="pattern of problem names")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    structures, selections = tuple(options.structures.split(",")), tuple(options.selections.split(","))
    runs: dict[str, list[dict[str, np.ndarray]]] = {}
    for name, make in problems(options):
        if fnmatch(name, options.only):
            runs.setdefault(name, []).append(losses(make(), structures, selections))
            print(name, {row: round(float(v.mean()), 3) for row, v in runs[name][-1].items()}, flush=True)
    table, gaps = {}, {}
    for name, found in runs.items():
        table[name] = {row: mean_and_error([run[row] for run in found]) for row in found[0]}
        gaps[name] = {row: mean_and_error([run[row] - run[PLAIN] for run in found]) for row in found[0] if row != PLAIN}
    figures = {
        "splits": {name: len(found) for name, found in runs.items()},
        "test NLL, mean and standard error": table,
        f"difference to {PLAIN!r}, mean and standard error": gaps,
    }
    finish(figures, options)


if __name__ == "__main__":
    main()
