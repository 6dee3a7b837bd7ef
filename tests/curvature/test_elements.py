"""Subnetworks: every structure over single elements equals its definition on the dense matrix of those coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import SelectionError, ShapeError, UnsupportedError
from bayesdl.evidence import log_evidence
from bayesdl.model import BayesianModel
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests import oracles

G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=G)
TOKENS = torch.randint(0, 7, (6, 4), generator=G)
POINTS = torch.randn(6, 4, dtype=torch.float64, generator=G)
Y = torch.randint(0, 3, (6,), generator=G)


class Tokens(nn.Module):
    """An embedding with a padding row, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embed(x)) * self.gain)).mean(1)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    pairs = {"conv": (grouped, IMAGES), "mlp": (plain, POINTS), "tokens": (Tokens(), TOKENS)}
    return {name: (net.double().requires_grad_(False), x) for name, (net, x) in pairs.items()}


def some(net: nn.Module, share: float = 0.3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {name: torch.rand(p.shape, generator=g) < share for name, p in net.named_parameters()}


def restricted(net: nn.Module, x: Tensor, marks: dict[str, Tensor]) -> Tensor:
    """Columns of the Jacobian `(N, C, k)` at the marked elements, in the order of the parameters."""
    names = [name for name, _ in net.named_parameters()]
    where = torch.cat(
        [marks.get(n, torch.zeros(p.shape, dtype=torch.bool)).flatten() for n, p in net.named_parameters()]
    )
    return oracles.jacobian(net, x, names)[..., where]


def wrapped(net: nn.Module, x: Tensor, marks: dict[str, Tensor], structure: Any, **options: Any) -> BayesianModel:
    method = bdl.Laplace(select=bdl.select.mask(marks), structure=structure, **options)
    prior = bdl.GaussianPrior(precision=0.7)
    return bdl.wrap(
        net, method, [(x[:4], Y[:4]), (x[4:], Y[4:])], likelihood="categorical", prior=prior, progress=False
    )


def gaussian(model: BayesianModel) -> GaussianPosterior:
    assert isinstance(model.posterior, GaussianPosterior)
    return model.posterior


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("name", ["conv", "mlp", "tokens"])
@pytest.mark.parametrize("structure", ["full", "diag", "lowrank"])
def test_subnetwork_is_the_dense_matrix_of_its_coordinates(structure: str, name: str, bias: str) -> None:
    net, x = networks()[name]
    marks = some(net)
    rank = {"rank": 60} if structure == "lowrank" else {}
    bayes = wrapped(net, x, marks, structure, bias=bias, **rank)
    jac = restricted(net, x, marks)
    f = oracles.outputs(net, x)
    dense = oracles.ggn(jac, torch.stack([oracles.lambda_formula("categorical", row) for row in f]))
    dense = torch.diag(dense.diagonal()) if structure == "diag" else dense
    posterior = gaussian(bayes)
    assert posterior.layout.numel == len(dense) == bayes.network.num_parameters
    torch.testing.assert_close(posterior.curvature.to_dense(), dense, rtol=1e-8, atol=1e-10)
    precision = dense + 0.7 * torch.eye(len(dense), dtype=torch.float64)
    truth = oracles.linearized_covariance(jac, precision)
    torch.testing.assert_close(bayes(x).latent.covariance, truth, rtol=1e-7, atol=1e-10)
    weights = torch.cat([p[marks[n]] for n, p in net.named_parameters()])
    log_lik = oracles.log_likelihood("categorical", f, Y)
    torch.testing.assert_close(
        bayes.log_evidence(), oracles.log_evidence(log_lik, dense, 0.7, weights), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["mc", "empirical", "hessian"])
@pytest.mark.parametrize("name", ["conv", "mlp", "tokens"])
def test_other_kinds(name: str, kind: str) -> None:
    net, x = networks()[name]
    marks = some(net)
    where = torch.cat([marks[n].flatten() for n, _ in net.named_parameters()])
    options: dict[str, Any] = {"structure": "full", "kind": kind, "progress": False}
    whole = bdl.curvature.estimate(net, [(x, Y)], "categorical", **options).to_dense()[where][:, where]
    found = bdl.curvature.estimate(net, [(x, Y)], "categorical", select=bdl.select.mask(marks), **options)
    torch.testing.assert_close(found.to_dense(), whole, rtol=1e-8, atol=1e-10)


def test_vectors_go_to_the_blocks_and_back() -> None:
    # as by way of the whole tensors, which nothing but the number of selected elements may cost
    net, x = networks()["tokens"]
    marks = some(net) | {"norm.weight": torch.ones(4, dtype=torch.bool), "norm.bias": torch.ones(4, dtype=torch.bool)}
    layout = plan(Network(net, select=bdl.select.mask(marks)), x)
    assert {block.kind for block in layout.blocks} == {"elements", "scale"}
    flat = torch.randn(3, layout.numel, dtype=torch.float64)
    pieces = layout.split(flat)
    for block, piece in zip(layout.blocks, pieces, strict=True):
        torch.testing.assert_close(piece, block.pack(layout.to_dict(flat)), rtol=0.0, atol=0.0)
    torch.testing.assert_close(layout.join(pieces), flat, rtol=0.0, atol=0.0)
    with pytest.raises(ShapeError, match="has"):
        layout.split(flat[:, 1:])


@pytest.mark.parametrize("structure", ["kron", "ekfac", {"0": "full", "*": "diag"}])
def test_other_structures_keep_the_block_of_each_layer(structure: Any) -> None:
    # a layer of which all is selected keeps its own kind of curvature; elements have no Kronecker form: exact blocks
    net, x = networks()["mlp"]
    marks = {"0.weight": some(net)["0.weight"], "2.weight": torch.ones(3, 5, dtype=torch.bool)}
    marks["2.bias"] = torch.ones(3, dtype=torch.bool)
    whole = (
        bdl.curvature.estimate(net, [(x, Y)], "categorical", structure=structure, select="2", progress=False)
        if (isinstance(structure, str))
        else None
    )
    posterior = gaussian(wrapped(net, x, marks, structure))
    f = oracles.outputs(net, x)
    lam = torch.stack([oracles.lambda_formula("categorical", row) for row in f])
    dense = oracles.ggn(restricted(net, x, marks), lam)
    count = int(marks["0.weight"].sum())
    found = posterior.curvature.to_dense()
    torch.testing.assert_close(found[:count, :count], dense[:count, :count], rtol=1e-8, atol=1e-10)
    assert not found[:count, count:].any()
    if whole is not None:
        torch.testing.assert_close(found[count:, count:], whole.to_dense(), rtol=1e-8, atol=1e-10)
    else:
        torch.testing.assert_close(found[count:, count:].diagonal(), dense[count:, count:].diagonal())


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_draws_move_the_elements_alone(structure: str) -> None:
    net, x = networks()["tokens"]
    marks = some(net) | {"embed.weight": torch.ones(7, 4, dtype=torch.bool)}
    posterior = gaussian(wrapped(net, x, marks, structure, predictive="samples"))
    network = Network(net, select=bdl.select.mask(marks))
    for weights in posterior.prepare(network, 3, None):
        for name, value in net.named_parameters():
            moved = weights[name] != value if name in weights else torch.zeros(value.shape, dtype=torch.bool)
            expected = marks[name].clone()
            if name == "embed.weight":
                expected[0] = False  # padding
            assert torch.equal(moved, expected)


def test_draws_have_the_covariance_of_the_posterior() -> None:
    # relative error of a variance from 4,000 draws has standard deviation 2.2%: 15% is almost seven of them
    net, x = networks()["mlp"]
    bayes = wrapped(net, x, some(net), "full")
    values = torch.stack([f(x) for f in bayes.draw(4000, generator=torch.Generator().manual_seed(1))])
    torch.testing.assert_close(values.var(0), bayes(x).latent.variance, rtol=0.15, atol=1e-6)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_files_and_tuning(structure: str, tmp_path: Path) -> None:
    net, x = networks()["conv"]
    bayes = wrapped(net, x, some(net), structure).tune("evidence", prior="layer")
    posterior = gaussian(bayes)
    leaf = posterior.precision.log().requires_grad_()
    (slope,) = torch.autograd.grad(log_evidence(posterior, bayes.network, leaf.exp()), leaf)
    assert float(slope.abs().max()) < 1e-3
    bayes.save(tmp_path / "sub.safetensors")
    again = bdl.load(tmp_path / "sub.safetensors", net)
    torch.testing.assert_close(again(x).latent.covariance, bayes(x).latent.covariance, rtol=0.0, atol=0.0)
    assert gaussian(again).layout == posterior.layout
    torch.testing.assert_close(again.log_evidence(), bayes.log_evidence())


def test_all_elements_are_the_whole_network() -> None:
    net, x = networks()["conv"]
    marks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}
    assert plan(Network(net, select=bdl.select.mask(marks)), x) == plan(Network(net), x)


def test_selections() -> None:
    net, x = networks()["mlp"]
    flat = torch.cat([p.flatten() for p in net.parameters()])
    network = Network(net, select=bdl.select.largest_magnitude(7))
    assert network.elements is not None and network.select == "magnitude(7)"
    kept = torch.cat([p[network.elements[n]] for n, p in net.named_parameters() if n in network.elements])
    torch.testing.assert_close(kept.abs().sort()[0], flat.abs().sort()[0][-7:])
    assert Network(net, select=bdl.select.largest_magnitude(0.5)).num_parameters == round(0.5 * len(flat))
    head = Network(net, select=bdl.select.largest_magnitude(4, within="last_layer"), example=x)
    assert set(head.names) <= {"2.weight", "2.bias"} and head.num_parameters == 4
    g = torch.Generator().manual_seed(3)
    first, second = bdl.select.random(9, g), bdl.select.random(9, g)
    one, again, other = (Network(net, select=s).elements for s in (first, first, second))
    assert one is not None and again is not None and other is not None
    assert one.keys() == again.keys() and all(torch.equal(one[n], again[n]) for n in one)
    assert one.keys() != other.keys() or not all(torch.equal(one[n], other[n]) for n in one)


def test_largest_variance() -> None:
    net, x = networks()["mlp"]
    prior = bdl.GaussianPrior(precision=0.7)
    method = bdl.Laplace(structure="diag")
    diag = bdl.wrap(net, method, [(x, Y)], likelihood="categorical", prior=prior, progress=False)
    h = gaussian(diag).curvature.to_dense().diagonal()
    expected = torch.zeros(len(h), dtype=torch.bool)
    expected[h.argsort()[:6]] = True
    network = Network(net, select=bdl.select.largest_variance(6, diag))
    assert network.elements is not None
    marks = [network.elements.get(n, torch.zeros(p.shape, dtype=torch.bool)) for n, p in net.named_parameters()]
    assert torch.equal(torch.cat([m.flatten() for m in marks]), expected)


def test_refusals() -> None:
    net, x = networks()["mlp"]
    data = [(x, Y)]
    for amount in (0, 44, 1.5, True, -1):
        with pytest.raises(SelectionError, match="from 1 to 43"):
            Network(net, select=bdl.select.largest_magnitude(amount))
    with pytest.raises(SelectionError, match="'nowhere'"):
        Network(net, select=bdl.select.mask({"nowhere": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(SelectionError, match="torch.bool of shape"):
        Network(net, select=bdl.select.mask({"0.bias": torch.ones(5)}))
    with pytest.raises(SelectionError, match="selects no element"):
        Network(net, select=bdl.select.mask({"0.bias": torch.zeros(5, dtype=torch.bool)}))
    with pytest.raises(SelectionError, match="within"):
        Network(net, select=bdl.select.random(2, within=bdl.select.random(2)))
    with pytest.raises(UnsupportedError, match="whole parameters"):
        bdl.wrap(net, "swag", data, likelihood="categorical", select=bdl.select.random(2))
    kron = bdl.wrap(net, "laplace", data, likelihood="categorical", prior=bdl.GaussianPrior(1.0), progress=False)
    with pytest.raises(bdl.errors.ArgumentError, match='structure="diag"'):
        bdl.select.largest_variance(2, kron)
