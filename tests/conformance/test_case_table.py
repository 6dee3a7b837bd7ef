"""Every layer x structure x kind against float64 brute force: one Jacobian a case, and what each structure keeps of it.

`full`, `lowrank` of full rank and `dual` are the dense matrix, `diag` its diagonal, `ekfac` its diagonal in the bases
that it names; the blocks of `kron` are built from the inputs and output gradients that plain hooks see.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayesdl.attention import Projection
from bayesdl.curvature.cotangents import CURVATURE_KINDS
from bayesdl.curvature.ekfac import EKFAC
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.hessian import HESSIAN_STRUCTURES
from bayesdl.curvature.layers import TRANSPOSED
from bayesdl.curvature.layout import REPEATED, Block, Layout
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.curvature.structure import Structure
from bayesdl.errors import UnsupportedError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, CASES, EXAMPLES, targets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CATEGORICAL = resolve("categorical")
DRAWS = {"samples": 2, "seed": 5}
Calls = list[tuple[nn.Module, Tensor, Tensor]]


class Problem(NamedTuple):
    """A case, planned; its Jacobian `(N, C, P)` and targets."""

    network: Network
    layout: Layout
    x: Any
    y: Tensor
    f: Tensor
    jacobian: Tensor

    def fit(self, structure: str, kind: str) -> Structure:
        rank = self.layout.numel if structure == "lowrank" else None
        source = torch.Generator().manual_seed(DRAWS["seed"])
        return fit_curvature(
            self.network,
            self.layout,
            [(self.x, self.y)],
            CATEGORICAL,
            structure=structure,
            kind=kind,
            samples=DRAWS["samples"],
            generator=source if kind == "mc" else None,
            rank=rank,
            progress=False,
            example=self.x,
        ).curvature

    def vectors(self, kind: str) -> Tensor:
        """Cotangents `(K, N, C)`; for the exact GGN another root of Lambda than the library's."""
        if kind == "ggn":
            values, turned = torch.linalg.eigh(oracles.lambda_formula("categorical", self.f))
            return (turned * values.clamp(min=0).sqrt().unsqueeze(1)).permute(2, 0, 1)
        if kind == "empirical":
            return oracles.score("categorical", self.f, self.y).unsqueeze(0)
        source = torch.Generator().manual_seed(DRAWS["seed"])
        drawn = CATEGORICAL.sample(self.f, DRAWS["samples"], source)
        return torch.stack([oracles.score("categorical", self.f, t) for t in drawn]) / DRAWS["samples"] ** 0.5


@cache
def problem(name: str) -> Problem:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    network = Network(net, select=case.select, example=x)
    layout = plan(network, x)
    jacobian = oracles.jacobian(net, x, network.names)
    return Problem(network, layout, x, targets("categorical"), oracles.outputs(net, x), jacobian)


def close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-8) -> None:
    scale = max(float(expected.abs().max()), 1e-3)
    worst = float((found - expected).abs().max())
    assert worst <= rtol * scale, f"{what}: off by {worst:.2g} of {scale:.2g}"


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_what_a_structure_keeps_of_the_dense_matrix(name: str) -> None:
    given = problem(name)
    for kind in CURVATURE_KINDS:
        rows = torch.einsum("knc,ncp->knp", given.vectors(kind), given.jacobian).flatten(0, 1)
        dense = rows.mT @ rows
        kept = {"full": dense, "diag": torch.diag(dense.diagonal()), "lowrank": dense, "dual": dense}
        for structure in STRUCTURES:
            found = given.fit(structure, kind)
            if isinstance(found, EKFAC):
                expected = _in_its_bases(found, dense)
            elif structure in ("kron", "kron-lowrank"):  # whose rank no layer of the table exceeds
                expected = _kronecker(given, dense, given.vectors(kind))
            else:
                expected = kept[structure]
            close(found.to_dense(), expected, f"{structure}, {kind}", 1e-7 if structure == "lowrank" else 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_what_a_structure_keeps_of_the_hessian(name: str) -> None:
    given, net = problem(name), BY_NAME[name].network()
    if name == "bag_by_offsets":  # torch's own bag; the others are looked up and summed in two steps
        with pytest.raises(UnsupportedError, match="no second derivative.*kind="):
            given.fit("diag", "hessian")
        return
    bags = any(isinstance(part, nn.EmbeddingBag) for part in net.modules())
    if bags:  # torch knows no second derivative of them; central differences of the gradient are right to 1e-8
        dense = _by_differences(net, given)
    else:
        dense = oracles.loss_hessian(net, given.x, given.y, "categorical", given.layout.names)
    for structure in HESSIAN_STRUCTURES:
        expected = torch.diag(dense.diagonal()) if structure == "diag" else dense
        close(given.fit(structure, "hessian").to_dense(), expected, structure, 1e-6 if bags else 1e-7)


def test_the_table_is_whole() -> None:
    assert set(STRUCTURES) == {"full", "diag", "kron", "kron-lowrank", "ekfac", "lowrank", "dual"}
    assert set(HESSIAN_STRUCTURES) == {"full", "diag", "lowrank"}
    assert CURVATURE_KINDS == ("ggn", "mc", "empirical")


def _by_differences(net: nn.Module, given: Problem, step: float = 1e-5) -> Tensor:
    values = dict(net.named_parameters())
    chosen = [values[name] for name in given.layout.names]
    start = torch.cat([p.detach().flatten() for p in chosen])

    def gradient(flat: Tensor) -> Tensor:
        for p, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            p.data = piece.view_as(p)
        jac = oracles.jacobian(net, given.x, given.layout.names)
        return torch.einsum("nc,ncp->p", oracles.score("categorical", oracles.outputs(net, given.x), given.y), jac)

    units = torch.eye(len(start), dtype=torch.float64) * step
    return torch.stack([(gradient(start + unit) - gradient(start - unit)) / (2 * step) for unit in units])


def _in_its_bases(found: EKFAC, dense: Tensor) -> Tensor:
    units = torch.eye(len(dense), dtype=torch.float64)
    layout, eigen = found.layout, found.eigen
    basis = torch.stack([layout.join([e.back(v) for e, v in zip(eigen, layout.split(u), strict=True)]) for u in units])
    return basis.T @ torch.diag(torch.einsum("ip,pq,iq->i", basis, dense, basis)) @ basis


def _kronecker(given: Problem, dense: Tensor, vectors: Tensor) -> Tensor:
    """Block by block; what has no Kronecker form keeps its part of the dense matrix."""
    expected = torch.zeros_like(dense)
    for block in given.layout.blocks:
        place = _place(given.layout, block)
        grid = place.unsqueeze(1), place.unsqueeze(0)
        if block.kind not in ("linear", "rows"):
            expected[grid] = dense[grid]
            continue
        calls = _calls(given, block, vectors)
        expected[grid] = _of_rows(block, calls) if block.kind == "rows" else _of_linear(block, calls)
    return expected


def _place(layout: Layout, block: Block) -> Tensor:
    """Where the entries of a block, in the order of its matrices, lie in a flat vector."""
    flat = torch.arange(layout.numel, dtype=torch.float64)
    return layout.split(flat)[layout.blocks.index(block)].flatten().long()


def _calls(given: Problem, block: Block, vectors: Tensor) -> Calls:
    """Module, input and output gradients `(K, ...)` of every call; one example at a time where all share a call."""
    module = given.network.module()
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    owned = [part for path, part in module.named_modules() if path in block.modules]

    def record(part: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append((part, args[0].detach(), output))
        return output.clone()  # somebody may write to it

    hooks = [part.register_forward_hook(record) for part in owned]
    leaves = {name: p.clone().requires_grad_() for name, p in given.network.parameters.items()}
    f = given.network(given.x, leaves)
    for hook in hooks:
        hook.remove()
    outputs = [output for _, _, output in seen]
    rounds = [vectors]
    if block.axis <= REPEATED:
        rounds = [vectors * (torch.arange(EXAMPLES) == n)[None, :, None] for n in range(EXAMPLES)]
    calls: Calls = []
    for some in rounds:
        rows = [torch.autograd.grad(f, outputs, v, retain_graph=True, allow_unused=True) for v in some]
        for i, (m, a, output) in enumerate(seen):
            calls.append((m, a, torch.stack([torch.zeros_like(output) if r[i] is None else r[i] for r in rows])))
    return calls


def _of_linear(block: Block, calls: Calls) -> Tensor:
    """(sum a a^T / R) (x) (sum g g^T) a group, in the order of the block's matrices."""
    parts = [[c for c in calls if c[0].part == i] for i in range(3)] if isinstance(calls[0][0], Projection) else [calls]
    if len(parts) > block.groups:  # projections with weights of their own
        parts = [calls]
    return torch.block_diag(*[torch.kron(outer, inner) for some in parts for inner, outer in _moments(block, some)])


def _moments(block: Block, calls: Calls) -> Sequence[tuple[Tensor, Tensor]]:
    module = calls[0][0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return oracles.linear_kron(calls, block.has_bias)
    if isinstance(module, TRANSPOSED):
        return [_scattered(calls, group) for group in range(block.groups)]
    a = torch.cat([value.reshape(-1, value.shape[-1]) for _, value, _ in calls])
    g = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for _, _, gradient in calls])
    a = torch.cat([a, a.new_ones(len(a), 1)], -1) if block.has_bias else a
    return [(a.mT @ a / len(a), g.mT @ g)]


def _scattered(calls: Calls, group: int) -> tuple[Tensor, Tensor]:
    """Of a transposed convolution: an input position meets the output gradients that its kernel reaches.

    Those are read off the outputs of inputs that are one at a single position.
    """
    ((module, value, g),) = calls
    width, count = value.shape[1] // module.groups, value[0, 0].numel()
    channel = group * width
    single = value.new_zeros(count, value.shape[1], count)
    single[torch.arange(count), channel, torch.arange(count)] = 1.0
    weight = {"weight": module.weight.detach()}
    single = single.unflatten(2, value.shape[2:])
    reached = jacrev(lambda w: functional_call(module, w, (single,)))(weight)["weight"]
    reached = reached.flatten(-module.weight.dim() + 1).select(-2, channel)  # (T, out, positions.., out / groups k)
    rows = torch.einsum("knz,tzr->kntr", g.flatten(2), reached.flatten(1, -2)).flatten(0, 2)
    a = value[:, channel : channel + width].flatten(2).mT.flatten(0, 1)
    return a.mT @ a / len(a), rows.mT @ rows


def _of_rows(block: Block, calls: Calls) -> Tensor:
    """A linear layer on one-hot rows; padding is no datum."""
    hot, gradients = [], []
    for _, index, g in calls:
        used = index != block.padding
        hot.append(nn.functional.one_hot(index[used], block.columns).double())
        gradients.append(g[:, used].flatten(0, 1))
    a, g = torch.cat(hot), torch.cat(gradients)
    return torch.kron(g.mT @ g, a.mT @ a / len(a))
