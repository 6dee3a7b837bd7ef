"""A prior that is written and read again is the same law, with the same report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl import tensorfile
from bayesdl.errors import FileFormatError, UnsupportedError
from bayesdl.functional import FAMILIES, GP, LogNormal
from bayesdl.priors.files import PRIORS

X = torch.linspace(-2, 2, 20).unsqueeze(1)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


@cache
def matched(family: str) -> bdl.Prior:
    options: dict[str, Any] = {"distance": "energy", "steps": 4, "num_functions": 16, "progress": False}
    return bdl.functional.match(network(), GP(lengthscale=LogNormal(0.0, 0.1)), X, family=family, **options)


MADE: dict[str, Callable[[], bdl.Prior]] = {
    **{family: lambda family=family: matched(family) for family in FAMILIES},  # type: ignore[misc]
    "number": lambda: bdl.GaussianPrior(2.0, 0.3),
    "layers": lambda: bdl.GaussianPrior([1.0, 3.0]),
    "vector": lambda: bdl.GaussianPrior(torch.linspace(1, 2, 13), torch.linspace(0, 1, 13).double()),
    "hierarchy": lambda: bdl.HierarchicalPrior(2.5, {n: 1.0 for n, _ in network().named_parameters()}, step_cap=0.5),
    "horseshoe": lambda: bdl.HorseshoePrior(scale=0.1, learn_scale=False, slab=None),
    "student": lambda: bdl.StudentTPrior(0.2, fan_in=True, df=4.0),
    "laplace": lambda: bdl.LaplacePrior(0.2),
    "cauchy": lambda: bdl.CauchyPrior(0.1),
}


@pytest.mark.parametrize("name", MADE)
def test_the_same_law_comes_back(name: str, tmp_path: Path) -> None:
    prior, shapes = MADE[name](), {n: p.detach() for n, p in network().named_parameters()}
    prior.save(tmp_path / "p.safetensors")
    again = bdl.load_prior(tmp_path / "p.safetensors")
    assert type(again) is type(prior)
    assert torch.equal(again.log_prob(shapes), prior.log_prob(shapes))
    one, other = (p.sample(shapes, torch.Generator().manual_seed(1)) for p in (prior, again))
    assert all(torch.equal(one[key], other[key]) for key in shapes)
    assert getattr(again, "report", None) == getattr(prior, "report", None)
    if name in FAMILIES:
        report = again.report  # type: ignore[attr-defined]
        assert str(report) == str(prior.report)  # type: ignore[attr-defined]
        assert report.setting["family"] == name and "LogNormal(mean=0.0, variance=0.1)" in report.setting["target"]
        assert report.setting["measurement"].startswith("Measurement(inputs=shape (20, 1), num_points=100")


def test_every_prior_of_the_library_has_a_format() -> None:
    concrete = {
        kind for kind in vars(bdl.priors).values() if isinstance(kind, type) and issubclass(kind, bdl.Prior)
    } - {bdl.Prior, bdl.priors.ScaleMixturePrior}
    assert concrete == set(PRIORS.values())


def test_what_has_none_is_refused(tmp_path: Path) -> None:
    class Own(bdl.Prior):
        name = "gaussian"

        def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
            return torch.zeros(())

    with pytest.raises(UnsupportedError, match="Own has no file format"):
        Own().save(tmp_path / "p.safetensors")
    bayes = bdl.wrap(
        network(),
        bdl.Laplace(),
        [(X, X.sin())],
        likelihood=bdl.Gaussian(0.1),
        prior=bdl.GaussianPrior(1.0),
        progress=False,
    )
    with pytest.raises(UnsupportedError, match="as_prior"):
        bayes.as_prior().save(tmp_path / "p.safetensors")
    bayes.save(tmp_path / "b.safetensors")
    with pytest.raises(FileFormatError, match="holds no prior"):
        bdl.load_prior(tmp_path / "b.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gaussian", {"precision": {"named": {"0.weight": -1.0}}}),
        ("gaussian", {"precision": {"named": {"0.weight": 10**400}}}),
        ("gaussian", {"mean": {"named": {"0.weight": 1.0}}}),
        ("gaussian", {"mean": "a"}),
        ("gaussian", {"else": 1.0}),
        ("hierarchical", {"shape": 0.0}),
        ("hierarchical", {"fan_in": "no"}),
        ("spline", {"splines": {"named": {"0.weight": {"list": [0.0] * 24}}}}),
        ("spline", {"scales": {"named": {}}}),
        ("coupling", {"layers": {"list": [1.0]}}),
        ("coupling", {"layers": {"coupling": {}}}),
    ],
)
def test_forged_numbers_are_refused(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    matched(name).save(path)
    header, tensors = tensorfile.read_described(path)
    header["fields"].update(change)
    header[tensorfile.DIGEST] = tensorfile.checksum(header, tensors)
    save_file(tensors, path, {tensorfile.KEY: json.dumps(header)})
    with pytest.raises(FileFormatError, match="holds no prior, or it is damaged"):
        bdl.load_prior(path)
