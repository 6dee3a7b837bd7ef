"""A structure per layer pattern: each group is what that structure is alone, and nothing lies between groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.chunking import chunk_size
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.mixed import Mixed
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests.cases import BY_NAME, mlp, real, targets
from tests.networks import OUTPUTS

# network, structures by pattern, and the parameters that each group must hold
GROUPS: list[tuple[str, dict[str, str], list[list[str]]]] = [
    ("mlp", {"2": "full", "*": "kron"}, [["2"], ["0"]]),
    ("mlp", {"*": "ekfac"}, [["0", "2"]]),
    ("frames", {"conv*": "ekfac", "norm": "diag", "*": "full"}, [["conv"], ["norm"], ["group", "head", "last"]]),
    ("encoder_layer", {"layer.norm?": "full", "layer": "kron", "*": "diag"}, []),
    ("position_embedding", {"embed": "ekfac", "place": "diag", "*": "full"}, [["embed"], ["place"]]),
]


def fitted(name: str, structure: Any, **options: Any) -> Any:
    case = BY_NAME[name]
    data = [(case.data(), targets("categorical"))]
    return estimate(case.network(), data, "categorical", structure=structure, progress=False, **options)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kind", ["ggn", "mc", "empirical"])
@pytest.mark.parametrize(("name", "structure", "expected"), GROUPS)
def test_groups_are_the_structures_alone(
    name: str, structure: dict[str, str], expected: list[list[str]], kind: str
) -> None:
    found = fitted(name, structure, kind=kind)
    assert isinstance(found, Mixed)
    assert found.kinds == tuple(structure.values())
    dense, left = found.to_dense(), torch.ones(found.layout.numel, found.layout.numel, dtype=torch.bool)
    index = found.layout.to_dict(torch.arange(found.layout.numel))
    for i, (part, chosen) in enumerate(zip(found.parts, structure.values(), strict=True)):
        names = list(part.layout.names)
        alone = fitted(name, chosen, kind=kind, select=names)
        where = torch.cat([index[n].flatten() for n in names])
        close(dense[where.unsqueeze(1), where], alone.to_dense())
        left[where.unsqueeze(1), where] = False
        if i < len(expected):
            assert {n.split(".")[0] for n in names} == set(expected[i])
    assert not bool(dense[left].any())
    covered = [n for part in found.parts for n in part.layout.names]
    assert sorted(covered) == sorted(found.layout.names)


def test_one_prior_precision_per_parameter_is_refused_where_a_group_cannot_take_it() -> None:
    found = fitted("mlp", {"2": "full", "*": "kron"})
    with pytest.raises(UnsupportedError, match="diag.*full"):
        found.logdet(1.0, torch.ones(found.layout.numel))


def test_the_first_pattern_wins_and_one_left_without_layers_is_accepted() -> None:
    found = fitted("mlp", {"0": "diag", "*": "full"}, select="0")
    assert found.kinds == ("diag",)
    assert found.recipe == {"0": "diag", "*": "full"}
    reverse = fitted("mlp", {"*": "full", "0": "diag"})
    assert reverse.kinds == ("full",)


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        ({"2": "full"}, ArgumentError, r"matches '0'; add them.*\*"),
        ({"head": "full", "*": "kron"}, ArgumentError, r"pattern 'head'.*'0', '2'"),
        ({"2": "dense", "*": "kron"}, UnknownNameError, "'dense'.*ekfac"),
        ({}, ArgumentError, "layer patterns"),
        ({0: "full"}, ArgumentError, "layer patterns"),
        ({"*": None}, ArgumentError, "None.*name"),
        (None, ArgumentError, "None.*name"),
        ({"*": {"*": "full"}}, ArgumentError, "expected a name"),
    ],
)
def test_recipes_that_are_refused(structure: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted("mlp", structure)
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    with pytest.raises(error, match=message):
        bdl.wrap(net, bdl.Laplace(structure=structure), [(x, targets("categorical"))], likelihood="categorical")


def test_a_size_that_does_not_fit_is_that_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesdl.curvature.full.MAX_BYTES", 8 * 18 * 18)
    fitted("mlp", {"2": "full", "*": "kron"})  # 18 parameters in layer 2
    with pytest.raises(UnsupportedError, match="25 parameters"):
        fitted("mlp", {"0": "full", "*": "kron"})


def test_only_the_full_groups_count_as_whole_jacobian_rows() -> None:
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    layout = plan(Network(net), x)
    sizes = {}
    for structure in ("full", "kron"):
        sizes[structure] = chunk_size(layout, structure, torch.float64, memory=1 << 20)
    mixed = fitted("mlp", {"2": "full", "*": "kron"})
    found = chunk_size(layout, mixed, torch.float64, memory=1 << 20)
    assert sizes["full"] < found < sizes["kron"]
    scalars = (3 * layout.activations + 2 * 18) * OUTPUTS
    assert found == (1 << 20) // (8 * scalars)


def test_non_finite_curvature_names_the_layer() -> None:
    found = fitted("mlp", {"2": "full", "*": "kron"})
    found.parts[1].outer[0][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0'"):
        found.check_finite()


# --- as a posterior ---


def regression() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = mlp().double()
    return net, [(real(4)(torch.Generator().manual_seed(1)), targets("gaussian"))]


def test_open_noise_of_several_outputs() -> None:
    net, data = regression()
    network = Network(net)
    layout = plan(network, data[0][0])
    options: dict[str, Any] = {"kind": "ggn", "progress": False}
    mixed = fit_curvature(network, layout, data, resolve("gaussian"), structure={"2": "full", "*": "ekfac"}, **options)
    index = layout.to_dict(torch.arange(layout.numel))
    for select, kind in (("2", "full"), ("0", "ekfac")):
        part = Network(net, select=select, example=data[0][0])
        alone = fit_curvature(part, plan(part, data[0][0]), data, resolve("gaussian"), structure=kind, **options)
        where = torch.cat([index[n].flatten() for n in part.names])
        for mine, theirs in zip(mixed.parts, alone.parts, strict=True):
            close(mine.to_dense()[where.unsqueeze(1), where], theirs.to_dense())
    assert mixed.num_data == 8


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("structure", [{"2": "full", "*": "kron"}, {"0": "ekfac", "*": "diag"}])
def test_save_and_load(likelihood: str, structure: Mapping[str, str], tmp_path: Path) -> None:
    net, data = regression()
    data = [(data[0][0], targets(likelihood))]
    bayes = bdl.wrap(net, bdl.Laplace(structure=structure), data, likelihood=likelihood, progress=False)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert isinstance(again.posterior, GaussianPosterior)
    assert again.posterior.curvature.recipe == structure
    x = data[0][0]
    assert torch.equal(again(x).variance, bayes(x).variance)
    assert torch.equal(again.log_evidence(), bayes.log_evidence())
    draws = [b.draw(1, generator=torch.Generator().manual_seed(2))[0](x) for b in (bayes, again)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("rule", ["evidence", "loo", "heldout"])
def test_tuning(rule: str) -> None:
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    data = [(x, targets("categorical"))]
    structure = {"2": "full", "*": "ekfac"}
    bayes = bdl.wrap(net, bdl.Laplace(structure=structure), data, likelihood="categorical", progress=False)
    if rule == "evidence":
        tuned = bayes.tune("evidence", prior="layer")
        assert float(tuned.log_evidence()) >= float(bayes.log_evidence()) - 1e-8
        return
    # one group of everything is the structure itself, so every choice must be the same
    whole = [
        bdl.wrap(net, bdl.Laplace(structure=s), data, likelihood="categorical", progress=False).tune(rule, data)
        for s in ("ekfac", {"*": "ekfac"})
    ]
    precisions = [b.posterior.precision for b in whole if isinstance(b.posterior, GaussianPosterior)]
    close(precisions[0], precisions[1])
    close(whole[0](x).mean, whole[1](x).mean)
    assert bool(torch.isfinite(bayes.tune(rule, data)(x).mean).all())
