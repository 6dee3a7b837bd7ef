"""One forward and one backward pass with K batched cotangents give the factors of every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayesdl.batch import batch_size, flatten_tensors
from bayesdl.curvature.factor import Factor, dense_factor
from bayesdl.curvature.layers import Use, factor_of
from bayesdl.curvature.layout import Layout
from bayesdl.errors import UnsupportedError
from bayesdl.network import Network

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
) -> tuple[Tensor, list[Factor]]:
    """Outputs `(B, C)` and one factor per block for the cotangents `(K, B, C)` that the outputs ask for.

    Args:
        network: its clone is hooked during the call only.
        layout: which blocks, from `bayesdl.curvature.plan.plan`.
        inputs: one batch.
        cotangents: `f (B, C) -> V (K, B, C)`; the factors represent J_n^T V_n for every example n.
        dtype: of the factors, whatever the network's own dtype.

    Cost: one forward, one backward of activations for K cotangents. No gradient of a weight is formed.
    """
    hooked = {module for block in layout.blocks if block.kind != "dense" for module in block.modules}
    with torch.inference_mode(False), torch.enable_grad():
        call = _normal(network.prepare(inputs))
        output, taps = tapped_forward(network, call, hooked)
        vectors = cotangents(output.detach())
        gradients = backward(output, [tap.output for tap in taps], vectors.to(output.dtype))
    uses: dict[str, list[Use]] = defaultdict(list)
    for tap, gradient in zip(taps, gradients, strict=True):
        if gradient is not None:
            uses[tap.layer].append(Use(tap.module, tap.value, gradient))
    dense = _dense_rows(network, layout, call, vectors, output.detach(), dtype)
    factors: list[Factor] = []
    for block in layout.blocks:
        if block.kind == "dense":
            factors.append(dense_factor(dense[block.name]))
            continue
        calls = [use for module in block.modules for use in uses[module]]
        if calls:
            factors.append(factor_of(block, calls, len(output), dtype))
        else:  # the layer did not take part in this batch
            factors.append(dense_factor(output.new_zeros(len(vectors), len(output), block.numel, dtype=dtype)))
    return output.detach(), factors


def tapped_forward(network: Network, call: Any, hooked: set[str]) -> tuple[Tensor, list[Tap]]:
    """Forward pass of this thread's clone with the named layers' outputs turned into nodes of the graph.

    The layer's consumers get a clone of the tap, so that in-place operations behind the layer (residual sums,
    activations) cannot overwrite it.
    """
    module = network.module()
    taps: list[Tap] = []
    handles: list[RemovableHandle] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor | None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(output, Tensor) or not isinstance(value, Tensor):
                return None
            node = output if output.requires_grad else output.detach().requires_grad_()
            taps.append(Tap(name, layer, value.detach(), node))
            return node.clone()

        return record

    try:
        for name, layer in module.named_modules():
            if name in hooked:
                handles.append(layer.register_forward_hook(hook(name), with_kwargs=True))
        return network.forward(module, call), taps
    finally:
        for handle in handles:
            handle.remove()


def backward(output: Tensor, nodes: list[Tensor], vectors: Tensor) -> list[Tensor | None]:
    """Gradients `(K, *node.shape)` at every node for cotangents `(K, B, C)`; None where a node has no influence."""
    if not nodes or not output.requires_grad:
        return [None] * len(nodes)
    if len(vectors) == 1:
        single = torch.autograd.grad(output, nodes, vectors[0], allow_unused=True)
        return [None if g is None else g.unsqueeze(0) for g in single]
    try:
        return list(
            torch.autograd.grad(output, nodes, vectors, allow_unused=True, is_grads_batched=True, retain_graph=True)
        )
    except RuntimeError as error:
        if "vmap" not in str(error) and "batching rule" not in str(error):
            raise
    # an operation without a batching rule: one backward pass per cotangent
    rounds = [torch.autograd.grad(output, nodes, v, allow_unused=True, retain_graph=True) for v in vectors]
    return [
        None if column[0] is None else torch.stack([g for g in column if g is not None])
        for column in zip(*rounds, strict=True)
    ]


def _dense_rows(
    network: Network, layout: Layout, call: Any, vectors: Tensor, output: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rows `(K, B, P_block)` of the blocks without a closed form: per-example gradients under vmap."""
    blocks = [block for block in layout.blocks if block.kind == "dense"]
    if not blocks:
        return {}
    names = [name for block in blocks for name in block.parameters]
    everything = network.parameters
    selected = {name: everything[name].detach() for name in names}
    tensors, rebuild = flatten_tensors(call)
    module = network.module()
    batch = batch_size(call)
    batched = [t.shape[0] == batch for t in tensors]

    def rows(cotangent: Tensor, *example: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            single = [t.unsqueeze(0) if moved else t for t, moved in zip(example, batched, strict=True)]
            return network.forward(module, rebuild(single), parameters)[0]

        pulled = torch.func.vjp(forward, selected)
        pull = pulled[1]
        return torch.func.vmap(lambda v: pull(v)[0])(cotangent), pulled[0]

    where = (1, *(0 if moved else None for moved in batched))
    try:
        gradients, values = torch.func.vmap(rows, in_dims=where, out_dims=(1, 0), randomness="same")(
            vectors.to(output.dtype), *tensors
        )
    except RuntimeError as error:
        raise UnsupportedError(
            f"the gradients of {names[0]!r} need torch.func.vmap over the examples, and the network does not allow it "
            f"({str(error).splitlines()[0]}); leave these parameters out of select="
        ) from error
    tolerance = 1e3 * torch.finfo(output.dtype).eps * float(1.0 + output.abs().max())
    if not torch.allclose(values, output, atol=tolerance, rtol=0.0):
        raise UnsupportedError(
            "the network's output for an example depends on the other examples in the batch (batch statistics?); "
            "curvature per example is not defined for such a network"
        )
    return {
        block.name: torch.cat([gradients[name].flatten(2) for name in block.parameters], -1).to(dtype)
        for block in blocks
    }


def _normal(call: Any) -> Any:
    # tensors made under inference_mode cannot enter a graph: take ordinary copies
    tensors, rebuild = flatten_tensors(call)
    if any(t.is_inference() for t in tensors):
        return rebuild([t.clone() for t in tensors])
    return call


def identity_cotangents(f: Tensor) -> Tensor:
    """V = I: the Jacobian itself, `(C, B, C)`."""
    return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device).unsqueeze(1).expand(-1, len(f), -1)
