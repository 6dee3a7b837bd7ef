"""One forward and one backward pass with K batched cotangents give the factors of every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from bayesdl.batch import batch_size, flatten_tensors
from bayesdl.curvature.backward import backward, is_looped, parameter_rows
from bayesdl.curvature.elements import chosen
from bayesdl.curvature.factor import Factor, LinearFactor, dense_factor
from bayesdl.curvature.layers import Builder, Use, builder_of, empty_factor
from bayesdl.curvature.layout import MISSING, REPEATED, Layout
from bayesdl.errors import ShapeError
from bayesdl.network import Network
from bayesdl.outputs import known_batch_size

# scalars of all gradients together, up to which one batched pass is the better one
AT_ONCE = 1 << 22

Cotangents = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tap:
    """One call of a hooked layer: its name, its input, and its output as a node of the graph."""

    layer: str
    module: nn.Module
    value: Tensor
    output: Tensor


def layer_factors(
    network: Network,
    layout: Layout,
    inputs: Any,
    cotangents: Cotangents,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
) -> tuple[Tensor, list[Factor]]:
    """Outputs `(B, C)` and one factor per block for the cotangents `(K, B, C)` that the outputs ask for.

    Args:
        network: its clone is hooked during the call only.
        layout: which blocks, from `bayesdl.curvature.plan.plan`.
        inputs: one batch.
        cotangents: `f (B, C) -> V (K, B, C)`; the factors represent J_n^T V_n for every example n.
        dtype: of the factors, whatever the network's own dtype.
        graph: whether outputs and factors are to be differentiated towards inputs that require it.

    Cost: one forward, one backward of activations for K cotangents. No gradient of a weight is formed.
    """
    if layout.whole is not None:
        output, whole = layer_factors(network, layout.whole, inputs, cotangents, dtype, graph)
        return output, [chosen(factor, block) for factor, block in zip(whole, layout.blocks, strict=True)]
    forward = _Forward(network, layout, inputs, cotangents, dtype, graph)
    return forward.output if graph else forward.output.detach(), forward.factors(forward.vectors)


def factors_in_turn(
    network: Network, layout: Layout, inputs: Any, cotangents: Cotangents, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Iterator[list[Factor]]]:
    """`layer_factors` in parts, each of a few cotangents, whose contributions add up.

    Unless everything is small, cotangents go back one after another, and each is handed on as soon as it is back: those
    of all of them are never held, nor copied next to each other. Worth it where `goes_in_turn`. Factors of one position
    per example, which are small, come together in the last part. A factor that a part does not have stands there
    without examples, and `again` marks further cotangents of the same inputs.
    """
    forward = _Forward(network, layout, inputs, cotangents, dtype)
    return forward.output.detach(), forward.in_turn()


class _Forward:
    """A forward pass whose layers are tapped, the cotangents it asks for, and what they give when they go back."""

    def __init__(
        self,
        network: Network,
        layout: Layout,
        inputs: Any,
        cotangents: Cotangents,
        dtype: torch.dtype,
        graph: bool = False,
    ) -> None:
        self.network, self.layout, self.dtype, self.graph = network, layout, dtype, graph
        hooked = {module: block.axis for block in layout.blocks if block.kind != "dense" for module in block.modules}
        with self._recording():
            self.call = _normal(network.prepare(inputs))
            self.copies = _copies(network, layout, self.call)
            self.output, self.taps = tapped_forward(network, self.call, hooked, self.copies, graph)
            if self.output.dim() != 2 and not layout.positions:
                raise ShapeError(
                    f"the outputs have shape {tuple(self.output.shape)}; the curvature belongs to outputs "
                    f"(B, {layout.outputs})"
                )
            self.vectors = cotangents(self.output.detach()).to(self.output.dtype)
        self.nodes = [*(tap.output for tap in self.taps), *self.copies.values()]
        dense = [name for block in layout.blocks if block.kind == "dense" for name in block.parameters]
        self.alone = [name for name in dense if name not in self.copies]
        self.builders: dict[int, Builder] = {}

    def factors(self, vectors: Tensor, keep: bool = False) -> list[Factor]:
        """One per block, for cotangents `(K, B, C)`; `keep` the graph for more."""
        with self._recording():
            gradients = backward(self.output, self.nodes, vectors, keep, self.graph)
            rows: dict[str, Tensor] = {}
            if self.alone:
                output = self.output.detach()
                rows = parameter_rows(self.network, self.alone, self.call, vectors, output, self.graph)
        for (name, copy), gradient in zip(self.copies.items(), gradients[len(self.taps) :], strict=True):
            rows[name] = copy.new_zeros(len(vectors), *copy.shape) if gradient is None else gradient
        reached: dict[str, list[tuple[Tap, Tensor]]] = defaultdict(list)
        for tap, gradient in zip(self.taps, gradients[: len(self.taps)], strict=True):
            if gradient is not None:
                reached[tap.layer].append((tap, gradient))
        found: list[Factor] = []
        for i, block in enumerate(self.layout.blocks):
            if block.kind == "dense":
                found.append(dense_factor(torch.cat([_flat(rows[n]) for n in block.parameters], -1).to(self.dtype)))
                continue
            calls = [pair for module in block.modules for pair in reached[module]]
            if not calls:
                found.append(empty_factor(block, vectors, self.dtype))
                continue
            if i not in self.builders:
                uses = [Use(tap.module, tap.value) for tap, _ in calls]
                self.builders[i] = builder_of(block, uses, len(self.output), self.dtype)
            found.append(self.builders[i]([gradient for _, gradient in calls]))
        return found

    def in_turn(self) -> Iterator[list[Factor]]:
        """See `factors_in_turn`."""
        size = len(self.vectors) * sum(node.numel() for node in self.nodes)
        if len(self.vectors) == 1 or self.alone or (size <= AT_ONCE and not is_looped(self.output, self.nodes)):
            yield self.factors(self.vectors)
            return
        absent = [empty_factor(block, self.vectors[:1, :0], self.dtype) for block in self.layout.blocks]
        small: list[list[LinearFactor]] = [[] for _ in absent]
        for k, vector in enumerate(self.vectors):
            part: list[Factor] = []
            for factor, kept, nothing in zip(self.factors(vector.unsqueeze(0), True), small, absent, strict=True):
                if isinstance(factor, LinearFactor) and factor.positions == 1:
                    kept.append(factor)
                    part.append(nothing)
                else:
                    part.append(replace(factor, again=k > 0))
            yield part
        yield [
            replace(kept[0], g=torch.cat([factor.g for factor in kept], 1)) if kept else nothing
            for kept, nothing in zip(small, absent, strict=True)
        ]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), _twice_differentiable(self.graph):
            yield


def _twice_differentiable(graph: bool) -> AbstractContextManager[None]:
    """Fused attention has one derivative only; its explicit form has all."""
    return sdpa_kernel(SDPBackend.MATH) if graph else nullcontext()


def tapped_forward(
    network: Network,
    call: Any,
    hooked: Mapping[str, int],
    tensors: Mapping[str, Tensor] | None = None,
    graph: bool = False,
) -> tuple[Tensor, list[Tap]]:
    """Forward pass of this thread's clone with the named layers' outputs turned into nodes of the graph.

    The layer's consumers get a clone of the tap, so that in-place operations behind the layer (residual sums,
    activations) cannot overwrite it. A layer that runs once for all examples (a position embedding) gets a batch axis
    here, because the cotangents of its output would otherwise arrive summed over the examples.

    Args:
        network: the network.
        call: prepared inputs.
        hooked: `Block.axis` by name of the layer.
        tensors: stand in for parameters, by name.
        graph: whether the layers' inputs are to be differentiated.
    """
    module = network.module()
    size = batch_size(call) if any(axis <= REPEATED for axis in hooked.values()) else 0
    taps: list[Tap] = []
    handles: list[RemovableHandle] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor | None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(output, Tensor) or not isinstance(value, Tensor):
                return None
            axis = hooked[name]
            if axis <= REPEATED:
                value, output = _repeat(value, size, axis), _repeat(output, size, axis)
            node = output if output.requires_grad else output.detach().requires_grad_()
            taps.append(Tap(name, layer, value if graph else value.detach(), node))
            return node.clone()

        return record

    try:
        for name, layer in module.named_modules():
            if name in hooked:
                handles.append(layer.register_forward_hook(hook(name), with_kwargs=True))
        output = network.forward(module, call, tensors)
    finally:
        for handle in handles:
            handle.remove()
    examples = known_batch_size(call)
    if examples is not None and len(output) != examples:
        raise ShapeError(
            f"the network returned {len(output)} rows of outputs for {examples} examples; one row each is expected. "
            "Keep positions apart, (B, T, C), with the categorical likelihood, or give each of them as an example"
        )
    return output, taps


def _repeat(tensor: Tensor, size: int, axis: int) -> Tensor:
    if axis == REPEATED:
        return tensor.expand(size, *tensor.shape[1:])
    return tensor.reshape((1,) * (MISSING - axis) + tensor.shape).expand(size, *(1,) * (MISSING - axis), *tensor.shape)


def _copies(network: Network, layout: Layout, call: Any) -> dict[str, Tensor]:
    """A copy for every example, as leaves of the graph, of the parameters that allow it: one pass serves them too."""
    axes = {b.parameters[0]: b.axis for b in layout.blocks if b.kind == "dense" and b.axis <= REPEATED}
    if not axes:
        return {}
    values, size = network.parameters, batch_size(call)
    return {name: _repeat(values[name].detach(), size, axis).requires_grad_() for name, axis in axes.items()}


def _normal(call: Any) -> Any:
    # tensors made under inference_mode cannot enter a graph: take ordinary copies
    tensors, rebuild = flatten_tensors(call)
    if any(t.is_inference() for t in tensors):
        return rebuild([t.clone() for t in tensors])
    return call


def _flat(rows: Tensor) -> Tensor:
    # a parameter may be a scalar
    return rows.reshape(*rows.shape[:2], -1)


def identity_cotangents(f: Tensor) -> Tensor:
    """V = I: the Jacobian itself, `(C, B, C)`."""
    return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device).unsqueeze(1).expand(-1, len(f), -1)
