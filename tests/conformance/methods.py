"""The methods that pass one battery, and the two problems that they pass it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.methods import CHAINS
from bayesdl.model import BayesianModel
from bayesdl.predictive import Predictive

Batches = list[tuple[Tensor, Tensor]]

SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"map": bdl.MAP()},
    "temperature": {"temperature": bdl.Temperature()},
    "laplace": {"laplace": bdl.Laplace(), "laplace-samples": bdl.Laplace(structure="diag", predictive="samples")},
    "gp": {"laplace-gp": bdl.SubsetGP(num_points=30)},
    "ella": {"laplace-ella": bdl.ELLA(num_points=6)},
    "valla": {"laplace-valla": bdl.VaLLA(num_inducing=6)},
    "swag": {"swag": bdl.SWAG(epochs=2, lr=0.02, rank=3, num_samples=3)},
    "ensemble": {"ensemble": bdl.Ensemble()},
    "dropout": {"dropout": bdl.MCDropout(num_samples=4)},
    "vbll": {"vbll": bdl.VBLL(), "vbll-full": bdl.VBLL(mode="full", epochs=2)},
    "student-t": {"student-t": bdl.StudentT()},
    "smc": {"smc": bdl.SMC(particles=8, moves=2, select="all")},
    "nuts": {"nuts": bdl.NUTS(num_samples=4, warmup=6, chains=1, max_tree_depth=2)},
    **{name: {name: bdl.SGMCMC(name, num_samples=4, thin=3, burn_in=6, cycles=2)} for name in CHAINS},
}
VARIANTS = {label: method for group in SETTINGS.values() for label, method in group.items()}
# what differs from one seed to the next: the fit, the prediction, or neither
# one task for each sampler but the default: what differs between tasks is common to all of them
ONE_TASK = {name: ("classification", "regression")[i % 2] for i, name in enumerate(CHAINS) if name != "sghmc"}
ONE_TASK["nuts"] = "regression"
RANDOM_FIT = {"laplace-gp", "laplace-ella", "laplace-valla", "swag", "vbll-full", "nuts", "smc", *CHAINS}
RANDOM_PREDICTION = {"dropout", "laplace-samples"}


@dataclass(frozen=True)
class Problem:
    likelihood: str
    networks: tuple[nn.Module, ...]
    train: Batches
    held_out: Batches

    def models(self, label: str) -> Any:
        return list(self.networks) if label == "ensemble" else self.networks[0]


def conv(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 3),
    )


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(net: nn.Module, data: Batches, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(15):
        for x, y in data:
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
    return net  # left in train mode, with gradients: as users hand networks over


def split(x: Tensor, y: Tensor) -> Batches:
    return list(zip(x.split(16), y.split(16), strict=True))


@cache
def problem(task: str) -> Problem:
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(0)
    if task == "classification":
        y = torch.randint(3, (90,), generator=g)
        x = torch.randn(90, 1, 6, 6, generator=g)
        x[torch.arange(90), 0, 2 * y] += 1.0  # a bright row says which class
        made, likelihood, loss = conv, "categorical", nn.functional.cross_entropy
    else:
        x = torch.randn(90, 3, generator=g)
        y = torch.stack([x.sin().sum(1), x[:, 0] * x[:, 1]], 1) + 0.3 * torch.randn(90, 2, generator=g)
        made, likelihood, loss = mlp, "gaussian", nn.functional.mse_loss
    training, held_out = split(x[:50], y[:50]), split(x[50:], y[50:])
    networks = tuple(train(made(seed), training, loss) for seed in range(3))
    torch.set_rng_state(state)
    return Problem(likelihood, networks, training, held_out)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(task: str, label: str, seed: int = 0, **options: Any) -> BayesianModel:
    given = problem(task)
    arguments = {"likelihood": given.likelihood, "generator": generator(seed), "progress": False, **options}
    return bdl.wrap(given.models(label), VARIANTS[label], given.train, **arguments)


@cache
def fitted(task: str, label: str) -> BayesianModel:
    return fit(task, label)


CASES = [
    pytest.param(task, label, id=f"{task}-{label}")
    for task in ("classification", "regression")
    for label in VARIANTS
    if (task, label) not in (("regression", "temperature"), ("classification", "student-t"))
    and ONE_TASK.get(label, task) == task
]
every = pytest.mark.parametrize(("task", "label"), CASES)


def same(a: Predictive, b: Predictive) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("mean", "variance", "aleatoric", "epistemic"))


def close(a: Predictive, b: Predictive, atol: float = 1e-6) -> bool:
    parts = ("mean", "variance", "aleatoric", "epistemic", "entropy")
    return all(torch.allclose(getattr(a, k).double(), getattr(b, k).double(), rtol=1e-4, atol=atol) for k in parts)


def inputs(task: str) -> Tensor:
    return torch.cat([x for x, _ in problem(task).held_out])


def nll(bayes: BayesianModel, data: Batches) -> float:
    pred, targets = bayes.predict_with_targets(data)
    assert targets is not None
    return -float(pred.log_prob(targets).double().mean())
