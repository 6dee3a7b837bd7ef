"""The kernel J J^T between examples, against dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature import gram as module
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.gram import gram, joined
from bayesdl.curvature.plan import plan
from bayesdl.network import Network


def dense(net: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(parameters)
    return torch.cat([r.flatten(2) for r in rows.values()], -1).flatten(0, 1)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)),
        (5, 4, 4),
    ),
    "pointwise": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)),
        (5, 4, 2),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 2)), (5, 3)),
}


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_product_of_dense_jacobians(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    x = torch.randint(7, shape) if name == "embedding" else torch.randn(shape, dtype=torch.float64)
    network = Network(net)
    layout = plan(network, x)
    parts = [layer_factors(network, layout, rows, identity_cotangents, torch.float64)[1] for rows in x.split(2)]
    kernel = gram([joined(block) for block in zip(*parts, strict=True)])
    jacobian = dense(net, x)
    torch.testing.assert_close(kernel, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
