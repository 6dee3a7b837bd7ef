"""One small file of every kind, as a version wrote it: `python -m tests.kept_files` adds those of this version.

Never change or remove the files of a version that was released: later versions must read them. Those of a version that
is still in the making may be written anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.evaluation import Predictions
from bayesdl.samplers import SGLD

FOLDER = Path(__file__).parent / "kept"
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


def numbers(*shape: int) -> Tensor:
    """Numbers that every machine has to the last bit, so that a fingerprint of them is the same everywhere."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count).mul(5).remainder(11).float() - 5.0).div(8.0).view(shape)


X, TARGETS = numbers(6, 3), numbers(6, 2)


def network() -> nn.Sequential:
    """The network that all files are of."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(numbers(*parameter.shape))
    return net


def second() -> nn.Sequential:
    """Another member of an ensemble."""
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    return net


def wrapped(
    method: str | bdl.Laplace | bdl.VBLL, targets: Tensor = LABELS, likelihood: str = "categorical"
) -> bdl.BayesianModel:
    prior = bdl.GaussianPrior(1.0) if isinstance(method, bdl.Laplace) else None
    family = bdl.Gaussian(noise=0.5) if likelihood == "gaussian" and isinstance(method, bdl.Laplace) else likelihood
    return bdl.wrap(network(), method, [(X, targets)], likelihood=family, prior=prior, progress=False)


MODELS: dict[str, Callable[[], bdl.BayesianModel]] = {
    **{
        structure: lambda structure=structure: wrapped(bdl.Laplace(structure=structure))  # type: ignore[misc]
        for structure in ("full", "diag", "kron", "ekfac", "lowrank")
    },
    "mixed": lambda: wrapped(bdl.Laplace(structure={"0": "diag", "*": "full"})),
    "gaussian": lambda: wrapped(bdl.Laplace(select="last_layer"), TARGETS, "gaussian"),
    "last-layer": lambda: wrapped(bdl.VBLL(tuning="evidence"), TARGETS, "gaussian"),
    "classes": lambda: wrapped("vbll"),
    "ensemble": lambda: bdl.wrap([network(), second()], "ensemble", likelihood="categorical"),
    "temperature": lambda: bdl.wrap(network(), bdl.Temperature(temperature=2.0), likelihood="categorical"),
    "dropout": lambda: bdl.wrap(network(), "dropout", likelihood="categorical"),
    "map": lambda: bdl.wrap(network(), "map", likelihood=bdl.Gaussian(noise=0.5)),
}


def prior() -> bdl.Prior:
    """With numbers by name and tensors by name, and the report of a match."""
    target = bdl.functional.GP(outputs=2)
    report = bdl.functional.evaluate(network(), bdl.GaussianPrior(4.0), target, X, num_functions=20)
    shapes = {name: value.shape for name, value in network().named_parameters()}
    return bdl.GaussianPrior(dict.fromkeys(shapes, 4.0), {n: numbers(*s) for n, s in shapes.items()}, report)


def means(bayes: bdl.BayesianModel) -> list[list[float]]:
    """Predicted means, rounded."""
    return [[round(float(v), 6) for v in row] for row in bayes(X).mean]


def write(folder: Path) -> None:
    """All kinds of files, and what the models in them predict."""
    folder.mkdir(parents=True)
    expected = {}
    for name, make in MODELS.items():
        bayes = make()
        bayes.save(folder / f"{name}.safetensors")
        expected[name] = means(bayes)
    net = network()
    sampler = SGLD(net.named_parameters(), 1e-3, 6, generator=torch.Generator().manual_seed(0))
    chain = bdl.Chain(net, sampler=sampler, store=folder / "chain")
    for _ in range(3):
        sampler.zero_grad()
        nn.functional.cross_entropy(net(X), LABELS).backward()
        sampler.step()
        chain.step()
    expected["chain"] = means(bdl.BayesianModel(network(), chain.posterior(), "categorical"))
    (folder / "chain" / "lock").unlink()
    sums = bdl.curvature.Accumulator(network(), "categorical")
    sums.update((X[:3], LABELS[:3]))
    sums.save(folder / "fit.safetensors")
    prior().save(folder / "prior.safetensors")
    expected["prior"] = [[round(float(prior().log_prob({n: p.detach() for n, p in network().named_parameters()})), 6)]]
    Predictions.from_logits(numbers(6, 2), LABELS).save(folder / "predictions.npz")
    models = {"map": bdl.wrap(network(), "map", likelihood="categorical"), "kron": MODELS["kron"]()}
    report = bdl.compare(models, [(X, LABELS)], bootstrap=20, ood={"far": [(5 * X, LABELS)]}, progress=False)
    (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER / bdl.__version__)
