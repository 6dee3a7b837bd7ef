"""Kronecker factors of weights that are packed or stored the other way round, against the same net spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature import estimate
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import MISSING, REPEATED, Block, Layout
from bayesdl.curvature.plan import plan
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, targets


class Spelled(nn.Module):
    """`tests.attention_networks.Cross` (batch first) from four linear layers and nothing of ours."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        layer = net.attention
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        for name, w, b in zip("qkv", weights, biases, strict=True):
            linear = nn.Linear(4, 4).double()
            linear.weight.data, linear.bias.data = w.detach().clone(), b.detach().clone()
            self.add_module(name, linear)
        self.out, self.head = layer.out_proj, net.head

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            m(x).unflatten(-1, (2, 2)).transpose(1, 2) for m, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        h = ((q @ k.mT / math.sqrt(2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(self.out(h))).mean(1)


def kron(net: nn.Module, x: object, select: list[str], batches: int = 1) -> Tensor:
    y = targets("categorical")
    step = len(y) // batches
    rows = [slice(i, i + step) for i in range(0, len(y), step)]
    loader = [(tuple(t[r] for t in x) if isinstance(x, tuple) else x[r], y[r]) for r in rows]  # type: ignore[index]
    found = estimate(net, loader, "categorical", structure="kron", select=select, progress=False)
    assert isinstance(found, Kron)
    return found.to_dense()


@pytest.mark.parametrize("batches", [1, 2])
def test_packed_projections_have_the_factors_of_three_linear_layers(batches: int) -> None:
    # three queries over five keys: each third is averaged over its own number of positions
    net, x = BY_NAME["attention_across"].network(), BY_NAME["attention_across"].data()
    spelled = Spelled(net)
    torch.testing.assert_close(net(*x), spelled(*x))
    packed = kron(net, x, ["attention.in_proj_weight"], batches)
    alone = [kron(spelled, x, [f"{name}.weight"]) for name in "qkv"]
    torch.testing.assert_close(packed, torch.block_diag(*alone), rtol=1e-9, atol=1e-12)
    joint = kron(net, x, ["attention.in_proj_weight", "attention.in_proj_bias"], batches)
    weights = 3 * 4 * 4
    for i, name in enumerate("qkv"):
        own = kron(spelled, x, [f"{name}.weight", f"{name}.bias"])
        where = torch.cat([torch.arange(16 * i, 16 * (i + 1)), torch.arange(weights + 4 * i, weights + 4 * (i + 1))])
        torch.testing.assert_close(joint[where][:, where], own, rtol=1e-9, atol=1e-12)


def test_out_projection_is_an_ordinary_linear_layer() -> None:
    net, x = BY_NAME["attention_across"].network(), BY_NAME["attention_across"].data()
    ours = kron(net, x, ["attention.out_proj"])
    torch.testing.assert_close(ours, kron(Spelled(net), x, ["out"]), rtol=1e-9, atol=1e-12)


def test_weight_stored_transposed_has_the_factors_of_a_linear_layer() -> None:
    net, x = BY_NAME["weight_stored_transposed"].network(), BY_NAME["weight_stored_transposed"].data()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for ours, theirs in zip(net[::2], plain[::2], strict=True):
        theirs.weight.data, theirs.bias.data = ours.weight.detach().T.clone(), ours.bias.detach().clone()
    found, truth = kron(net, x, ["0"]), kron(plain, x, ["0"])
    order = torch.cat([torch.arange(20).view(5, 4).T.flatten(), torch.arange(20, 25)])
    torch.testing.assert_close(found, truth[order][:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["transposed_conv", "transposed_conv_output_padding"])
def test_transposed_convolution_equals_its_definition(name: str) -> None:
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    layer, y = net[0], net[0](x)
    g = gradients(net, y)  # (K, B, out, positions)
    groups, kernel = layer.groups, layer.kernel_size[0]
    inner, outer = layer.in_channels // groups, layer.out_channels // groups
    blocks = []
    for group in range(groups):
        a = x[:, group * inner : (group + 1) * inner]
        total = torch.zeros(outer * kernel, outer * kernel, dtype=torch.float64)
        for q in range(x.shape[-1]):
            patch = torch.zeros(*g.shape[:2], outer, kernel, dtype=torch.float64)
            for k in range(kernel):
                p = q * layer.stride[0] - layer.padding[0] + k * layer.dilation[0]
                if 0 <= p < y.shape[-1]:
                    patch[..., k] = g[:, :, group * outer : (group + 1) * outer, p]
            total += torch.einsum("kbi,kbj->ij", patch.flatten(2), patch.flatten(2))
        mean = torch.einsum("bit,bjt->ij", a, a) / (x.shape[0] * x.shape[-1])
        blocks.append(torch.kron(mean, total))  # the weight is stored as (in, out, kernel)
    torch.testing.assert_close(kron(net, x, ["0.weight"]), torch.block_diag(*blocks), rtol=1e-9, atol=1e-12)


def gradients(net: nn.Sequential, y: Tensor) -> Tensor:
    """Cotangents at the first layer's output for a root of the categorical Hessian."""
    y = y.detach().requires_grad_()
    f = net[1:](y)
    values, vectors = torch.linalg.eigh(oracles.lambda_formula("categorical", f.detach()))
    roots = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).permute(2, 0, 1)
    return torch.stack([torch.autograd.grad(f, y, v, retain_graph=True)[0] for v in roots])


def test_layout_survives_its_json_form() -> None:
    for name in ("transposed_conv2d", "weight_stored_transposed", "attention_with_all_options", "position_embedding"):
        case = BY_NAME[name]
        layout = plan(Network(case.network()), case.data())
        assert type(layout).from_json(layout.to_json()) == layout
        flat = torch.randn(2, layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layout.join(layout.split(flat)), flat)


def test_bare_parameters_need_no_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # a copy for every example, with an axis for the positions where the parameter has none
    case = BY_NAME["bare_positions"]
    net, x = case.network(), case.data()
    network = Network(net)
    layout = plan(network, x)
    axes = {block.name: block.axis for block in layout.blocks if block.kind == "dense"}
    assert axes == {"token": REPEATED, "places": REPEATED, "table": MISSING, "gain": MISSING - 1}

    def refused(*args: object) -> None:
        raise AssertionError("a second pass over the network")

    monkeypatch.setattr("bayesdl.curvature.factors.parameter_rows", refused)
    _, factors = layer_factors(network, layout, x, identity_cotangents, torch.float64)
    found = layout.join([f.jacobian().view(8, 3, b.groups, b.rows, b.columns) for b, f in _pairs(layout, factors)])
    torch.testing.assert_close(found, oracles.jacobian(net, x, layout.names), rtol=1e-9, atol=1e-12)


def test_parameters_of_torchs_own_kernels_are_never_copied() -> None:
    # a recurrent kernel would read a bias of another shape as it pleases
    class Own(nn.LSTM):
        pass

    case = BY_NAME["lstm"]
    net = case.network()
    net.cell.__class__ = Own  # the library takes only torch's own layers apart
    layout = plan(Network(net), case.data())
    assert {block.axis for block in layout.blocks if block.kind == "dense"} == {0}


def _pairs(layout: Layout, factors: list[Factor]) -> list[tuple[Block, Factor]]:
    return list(zip(layout.blocks, factors, strict=True))
