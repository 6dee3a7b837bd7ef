"""Plan: cut the selection into blocks, and prove on two examples that every block's factor is the true gradient.

Closed forms are trusted only after the check: a weight that is also used outside its layer's own forward, a custom
subclass, an unusual batch axis would otherwise give silently wrong curvature. A block that fails the check falls
back to exact per-example gradients.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesdl.batch import batch_size, index_batch
from bayesdl.curvature.backward import backward, coarsest, recorded_dtypes, tolerance
from bayesdl.curvature.elements import restricted
from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.factors import Tap, layer_factors, tapped_forward
from bayesdl.curvature.layers import CHANNEL_WISE, block_of, joins_bias
from bayesdl.curvature.layout import MISSING, REPEATED, Block, Layout
from bayesdl.curvature.projections import composite_blocks, is_composite
from bayesdl.curvature.sketch import Sketches
from bayesdl.data import check_inputs, in_batch
from bayesdl.errors import ArgumentError, BayesDLError, UnreachedParameterError, UnsupportedError, check_finite
from bayesdl.network import Network
from bayesdl.streaming import Change

# what torch's functions raise on shapes that they cannot take
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
_RANDOM = (
    "two forward passes on the same inputs give different outputs, in eval mode: something in the network is random "
    "there (F.dropout without training=self.training, a noise layer, a sampled latent?). Curvature belongs to one "
    "function: switch the randomness off"
)
_MIXED = (
    "the network's output for an example depends on the other examples in the batch (batch statistics, attention over "
    "the batch axis?); curvature per example is not defined for such a network"
)
_Owned = tuple[tuple[str, str | None], ...]  # a layer's own parameter names and their full names


def plan(network: Network, example: Any, bias: str = "joint") -> Layout:
    """The layout of a network's selected parameters, checked on the first two examples of a batch.

    Args:
        network: with its selection.
        example: one batch of inputs.
        bias: "joint" treats weight and bias of a layer as one block, "separate" as two.

    Raises:
        UnreachedParameterError: a selected parameter has no influence on the outputs.
        UnsupportedError: neither a closed form nor per-example gradients exist for a parameter.
    """
    if bias not in ("joint", "separate"):
        raise ArgumentError(f"bias={bias!r}; choose 'joint' or 'separate'")
    blocks = _candidates(network, bias)
    hooked = {module: 0 for block in blocks for module in block.modules}
    with in_batch(0):
        check_inputs(example)
    with torch.inference_mode(False), torch.enable_grad():
        pair = _rows(network, example, 2)
        alone, two = tapped_forward(network, pair, hooked)
        among, three = tapped_forward(network, _rows(network, example, 3), hooked)
        truth = _true_gradients(network, pair)
        again = network.forward(network.module(), pair)
        _check_same(alone.detach(), again.detach(), truth.kind, _RANDOM)
        _check_same(alone.detach(), among.detach()[:2], truth.kind, _MIXED)
    outputs = truth[0].shape[2:]
    proof = _Proof(network, pair, truth, two)
    blocks = [_repeated(block, two, three, proof) or _placed(block, two, three) for block in blocks]
    checked = [block for block in blocks if block.kind != "dense"]
    while checked:
        layout = _layout(network, checked, two, outputs)
        try:
            wrong = _disagreeing(network, layout, pair, truth)
        except _MISFITS:  # a subclass with a forward of its own, on shapes that its base could not take
            wrong = {block.name for block in checked if not proof.holds([block])}
            if not wrong:
                raise
        if not wrong:
            break
        checked = [block for block in checked if block.name not in wrong]
    covered = {name for block in checked for name in block.parameters}
    held = network.held
    dense = [_dense(name, held[name]) for name in network.names if name not in covered]
    bare = _bare(network)
    copied = [_copied(block, proof) if block.name in bare else block for block in dense]
    if copied != dense and proof.holds([*checked, *copied]):  # all at once, too
        dense = copied
    layout = _layout(network, [*checked, *dense], two, outputs)
    return layout if network.elements is None else restricted(layout, network.elements)


def _check_same(one: Tensor, other: Tensor, kind: torch.dtype, message: str) -> None:
    """Raise unless the outputs of two examples are what they were before."""
    # the outputs of a deep network in bfloat16 agree to a few per cent
    slack = min(tolerance(kind), 0.1) * float(1e-3 + one.abs().max())
    if not float((one - other).abs().max()) <= slack:
        raise UnsupportedError(message)


def _layout(network: Network, blocks: list[Block], taps: list[Tap], outputs: torch.Size) -> Layout:
    order = {name: i for i, name in enumerate(network.names)}
    held = network.held
    return Layout(
        tuple(sorted(blocks, key=lambda block: min(order[name] for name in block.parameters))),
        network.names,
        tuple(tuple(held[name].shape) for name in network.names),
        sum(tap.output.numel() for tap in taps) // 2,
        outputs[-1],
        outputs[:-1].numel() if len(outputs) > 1 else 0,
    )


def _rows(network: Network, example: Any, count: int) -> Any:
    call = network.prepare(example)
    size = batch_size(call)
    return index_batch(call, torch.arange(count, device=network.device) % size)


def _candidates(network: Network, bias: str) -> list[Block]:
    """Blocks of the layers that own selected parameters and share them with no layer of another kind."""
    names = {id(p): name for name, p in network.held.items()}
    users: dict[_Owned, list[tuple[str, nn.Module]]] = defaultdict(list)
    uses: dict[str, set[_Owned]] = defaultdict(set)
    for path, module in network.module().named_modules():
        own = {key: names.get(id(p)) for key, p in module._parameters.items() if p is not None}
        known = is_composite(module) or set(own) <= {"weight", "bias"}
        if not any(own.values()) or not known:
            continue
        key = tuple(sorted(own.items()))
        users[key].append((path, module))
        for name in own.values():
            if name is not None:
                uses[name].add(key)
    blocks: list[Block] = []
    for key, owners in users.items():
        kinds = {(type(module), getattr(module, "padding_idx", None)) for _, module in owners}
        shared_elsewhere = any(len(uses[name]) > 1 for _, name in key if name is not None)
        if len(kinds) != 1 or shared_elsewhere:
            continue
        module, paths, own = owners[0][1], tuple(path for path, _ in owners), dict(key)
        if is_composite(module):
            blocks += composite_blocks(module, own, paths, bias)
            continue
        weight, shift = own.get("weight"), own.get("bias")
        pairs = [(weight, shift)]
        if weight is not None and shift is not None and not (bias == "joint" and joins_bias(module)):
            pairs = [(weight, None), (None, shift)]
        found = [block_of(module, w, b, paths) for w, b in pairs]
        labels = [paths[0] or "network"] if len(pairs) == 1 else [str(weight), str(shift)]
        blocks += [replace(block, name=label) for block, label in zip(found, labels, strict=True) if block is not None]
    return blocks


def _placed(block: Block, two: list[Tap], three: list[Tap]) -> Block:
    """Find the batch axis by running two and three examples; without one the block becomes dense."""
    axes: set[int | None] = set()
    mine = [[tap for tap in taps if tap.layer in block.modules] for taps in (two, three)]
    if len(mine[0]) != len(mine[1]):  # called as often as there are examples, say
        return replace(block, kind="dense")
    for a, b in zip(*mine, strict=True):
        before, after = a.output.shape, b.output.shape
        changed = [i for i, (m, n) in enumerate(zip(before, after, strict=False)) if m != n]
        if len(before) != len(after) or len(changed) != 1 or 2 * after[changed[0]] != 3 * before[changed[0]]:
            axes.add(None)
        elif before[changed[0]] == 2:
            axes.add(changed[0])
        else:
            axes.add(-1 if changed[0] == 0 else None)
    fixed = any(isinstance(tap.module, CHANNEL_WISE) for tap in mine[0])
    if len(axes) != 1 or None in axes or (fixed and axes - {0, -1}):
        return replace(block, kind="dense")
    return replace(block, axis=axes.pop() or 0)


class _Truth(NamedTuple):
    """What automatic differentiation says about two examples.

    Attributes:
        vectors: cotangents, one for each example.
        gradients: every selected parameter's gradients `(2, ...)`, or their sketches.
        kind: the coarsest dtype that the network computes in.
        sketches: of a sharded network, whose gradients would not fit; None for the gradients themselves.
    """

    vectors: Tensor
    gradients: dict[str, Tensor]
    kind: torch.dtype
    sketches: Sketches | None

    def pair(self, block: Block, factor: Factor, example: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """J^T v of an example by the factor and by automatic differentiation."""
        ours = _row(factor, example)
        if self.sketches is None:
            return ours.to(dtype, copy=True), block.pack(
                {name: self.gradients[name][example].to(dtype) for name in block.parameters}
            )
        values = block.unpack(ours)
        mine = [self.sketches.of(name, values[name]).to(dtype) for name in block.parameters]
        return torch.stack(mine), torch.stack([self.gradients[name][example].to(dtype) for name in block.parameters])


@dataclass(frozen=True)
class _Proof:
    """Trials: whether the network computes the same with a batch axis where it has none."""

    network: Network
    pair: Any
    truth: _Truth
    taps: list[Tap]

    @cached_property
    def plain(self) -> Tensor:
        """Outputs `(2, C)` of the network as it is."""
        with torch.no_grad():
            return self.network.forward(self.network.module(), self.pair)

    def holds(self, blocks: list[Block]) -> bool:
        """Whether outputs and gradients are right; not where whoever reads the values wants them as they are."""
        layout = _layout(self.network, blocks, self.taps, self.plain.shape[1:])
        close = tolerance(self.truth.kind) * float(1.0 + self.plain.abs().max())
        try:
            output = layer_factors(self.network, layout, self.pair, lambda f: self.truth[0], torch.float32)[0]
            same = output.shape == self.plain.shape and torch.allclose(output, self.plain, rtol=0.0, atol=close)
            return same and not _disagreeing(self.network, layout, self.pair, self.truth)
        except (*_MISFITS, BayesDLError):
            return False


def _repeated(block: Block, two: list[Tap], three: list[Tap], proof: _Proof) -> Block | None:
    """An embedding looked up once for all examples, if its rows may be repeated for each."""
    shapes = {tap.output.shape for taps in (two, three) for tap in taps if tap.layer in block.modules}
    if block.kind != "rows" or len(shapes) != 1:
        return None
    leading = shapes.pop()[0] == 1
    trials = [replace(block, axis=axis) for axis in ((REPEATED, MISSING) if leading else (MISSING,))]
    return next((trial for trial in trials if proof.holds([trial])), None)


def _bare(network: Network) -> set[str]:
    """Selected parameters that no layer of torch holds, whose kernels take their shapes on trust."""
    module = network.module()
    kernels = {id(p) for part in module.modules() if _is_torchs(part) for p in part._parameters.values()}
    return {name for name, p in network.held.items() if id(p) not in kernels}


def _is_torchs(part: nn.Module) -> bool:
    own = (base for base in type(part).__mro__ if base is not nn.Module)
    return any(base.__module__.startswith("torch.nn.modules.") for base in own)


def _copied(block: Block, proof: _Proof) -> Block:
    """A bare parameter (position table, class token, gain) with a copy for each example, if the network allows it."""
    axes = [MISSING, MISSING - 1, MISSING - 2, MISSING - 3]
    if block.shapes[0][:1] == (1,):
        axes.insert(0, REPEATED)
    trials = (replace(block, axis=axis) for axis in axes)
    return next((trial for trial in trials if proof.holds([trial])), block)


def _true_gradients(network: Network, pair: Any) -> _Truth:
    """Two random cotangents `(2, 2, ..., C)`, one an example, and every selected parameter's gradients `(2, ...)`."""
    sketches: Sketches | None = None
    through: dict[str, Change] = {}
    if network.sharded:
        held = network.held
        sketches = Sketches(held)
        leaves, through = sketches.probes()
    else:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in network.parameters.items()}
    with recorded_dtypes() as kinds:
        output = network.forward(network.module(), pair, through or leaves)
    device = network.device.type
    if network.sharded and torch.is_autocast_enabled(device):  # what is kept for the backward pass does not show it
        kinds.add(torch.get_autocast_dtype(device))
    with in_batch(0):
        check_finite(output.detach(), "the network's outputs")
    noise = torch.randn(2, *output.shape[1:], generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([torch.stack([noise[0], noise[1] * 0.0]), torch.stack([noise[0] * 0.0, noise[1]])]).to(output)
    # one cotangent at a time: batched passes are among what is to be proved
    rounds = [backward(output, list(leaves.values()), v.unsqueeze(0), keep=True) for v in vectors]
    missing = [name for name, g in zip(leaves, rounds[0], strict=True) if g is None]
    if missing:
        raise UnreachedParameterError(
            f"{len(missing)} selected parameter(s) have no influence on the outputs, the first is "
            f"{missing[0]!r}; leave "
            "them out of select= (is there a second head, or a detach()?)"
        )
    pairs = zip(leaves, *rounds, strict=True)
    gradients = {name: torch.cat([a, b]) for name, a, b in pairs if a is not None and b is not None}
    return _Truth(vectors, gradients, coarsest([*kinds, output.dtype, network.dtype or torch.float32]), sketches)


def _disagreeing(network: Network, layout: Layout, pair: Any, truth: _Truth) -> set[str]:
    vectors, kind = truth.vectors, truth.kind
    work = torch.promote_types(network.dtype or torch.float32, torch.float32)
    _, factors = layer_factors(network, layout, pair, lambda f: vectors, work)
    wrong = set()
    for block, factor in zip(layout.blocks, factors, strict=True):
        scale, error = torch.zeros(2, dtype=work)
        silent = False
        for k in range(2):  # one after another: a last layer of many classes is large
            ours, true = truth.pair(block, factor, k, work)
            extremes = [extreme.abs().cpu() for part in (ours, true) for extreme in part.aminmax()]
            scale = torch.stack([scale, *extremes]).max()
            # an example without a gradient (all its units are dead) proves nothing about an unusual batch axis
            silent = silent or (block.axis != 0 and not bool(extremes[2]) and not bool(extremes[3]))
            error = torch.maximum(error, ours.sub_(true).abs_().max().cpu())
        if silent or not float(error) <= tolerance(kind) * float(scale):  # NaN disagrees
            wrong.add(block.name)
    return wrong


def _row(factor: Factor, example: int) -> Tensor:
    """J^T v of an example for the cotangent of the same number, `(G, out, in)`."""
    if isinstance(factor, LinearFactor):
        return factor.g[:, example, example].mT @ factor.a[:, example]
    index, g = factor.index[example], factor.g[0, example, example]
    rows = g.new_zeros(factor.size, g.shape[-1])
    return rows.index_add_(0, index[index >= 0], g[index >= 0]).T.unsqueeze(0)


def _dense(name: str, value: Tensor) -> Block:
    return Block(name, "dense", (name,), (tuple(value.shape),), (), 1, value.numel(), 1)
