"""Backward passes for several cotangents at once, and exact per-example gradients of whole parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from bayesdl.batch import batch_size, flatten_tensors
from bayesdl.errors import UnsupportedError
from bayesdl.network import Network

# fused attention has no batched backward pass: torch would warn, and loop over the cotangents as is done here
UNBATCHED = ("ScaledDotProduct",)
# neither do convolutions, silently; the loop keeps what lies between them in the cache (measured on a CPU: 1.4 to 1.7
# times faster), unless everything is so small that the calls themselves cost more
LOOPED = ("ConvolutionBackward", "MkldnnConvolution")
WORTH_LOOPING = 100_000
_ONE_THREAD = RLock()

# a wrong formula is off by its own size; rounding is not
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference below which two ways to a gradient agree."""
    return TOLERANCE.get(dtype, 2e-3)


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype in which two ways to a gradient may differ most."""
    return max(dtypes, key=tolerance)


@contextmanager
def recorded_dtypes() -> Iterator[set[torch.dtype]]:
    """Floating dtypes in which a forward pass keeps what its derivative needs; `torch.autocast` shows nowhere else."""
    found: set[torch.dtype] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def backward(
    output: Tensor, nodes: list[Tensor], vectors: Tensor, keep: bool = False, graph: bool = False
) -> list[Tensor | None]:
    """Gradients `(K, *node.shape)` at every node for cotangents `(K, B, C)`; None where a node has no influence.

    Args:
        output: `(B, C)`.
        nodes: of its graph.
        vectors: cotangents.
        keep: the graph for another pass.
        graph: whether the gradients themselves are to be differentiated.
    """
    if not nodes or not output.requires_grad:
        return [None] * len(nodes)
    if len(nodes) == 1 and _is_output(nodes[0], output):
        return [vectors]
    if graph:
        twice = [torch.autograd.grad(output, nodes, v, allow_unused=True, create_graph=True) for v in vectors]
        return [_stacked(column) for column in zip(*twice, strict=True)]
    if len(vectors) == 1:
        single = torch.autograd.grad(output, nodes, vectors[0], allow_unused=True, retain_graph=keep)
        return [None if g is None else _strided(g).unsqueeze(0) for g in single]
    if not is_looped(output, nodes):
        try:
            return list(
                torch.autograd.grad(output, nodes, vectors, allow_unused=True, is_grads_batched=True, retain_graph=True)
            )
        except (RuntimeError, UserWarning):
            pass  # an operation that cannot be batched, or whatever is really wrong, which is raised again below
    rounds = [torch.autograd.grad(output, nodes, v, allow_unused=True, retain_graph=True) for v in vectors]
    return [_stacked(column) for column in zip(*rounds, strict=True)]


def is_looped(output: Tensor, nodes: list[Tensor]) -> bool:
    """Whether several cotangents go back one after another, for `backward` as above."""
    slow: tuple[str, ...] = UNBATCHED
    if output.device.type == "cpu" and sum(node.numel() for node in nodes) >= WORTH_LOOPING:
        slow += LOOPED
    return _contains(output, slow)


def _is_output(node: Tensor, output: Tensor) -> bool:
    """Whether the output is nothing but a clone of the node: behind the last layer."""
    step = output.grad_fn
    if step is None or step.name() != "CloneBackward0":
        return False
    before, place = step.next_functions[0]
    if node.grad_fn is not None:
        return before is node.grad_fn and place == node.output_nr
    return getattr(before, "variable", None) is node


def _stacked(column: tuple[Tensor | None, ...]) -> Tensor | None:
    parts = [_strided(g) for g in column if g is not None]
    if not parts:
        return None
    # the cotangents of one example lie side by side in memory, which is how factors multiply them
    return torch.stack(parts, 1).transpose(0, 1) if parts[0].dim() > 1 else torch.stack(parts)


def _contains(output: Tensor, names: tuple[str, ...]) -> bool:
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if any(name in node.name() for name in names):
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


@contextmanager
def muted(message: str, category: type[Warning]) -> Iterator[None]:
    """Keep one of torch's own warnings from the user, one thread at a time.

    Warning filters belong to the process, and so does the level of torch's forward mode, which callers use inside.
    """
    with _ONE_THREAD, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message, category=category)
        yield


def _strided(gradient: Tensor) -> Tensor:
    # functional calls such as F.embedding(..., sparse=True) return sparse gradients
    return gradient.to_dense() if gradient.is_sparse else gradient


def parameter_rows(
    network: Network, names: list[str], call: Any, vectors: Tensor, output: Tensor, graph: bool = False
) -> dict[str, Tensor]:
    """J_n^T v for whole parameters: `(K, B, *shape)` by name.

    All examples together under vmap; one after another where an operation has no batching rule (recurrent cells), has
    a wrong one, or the network's control flow depends on the data. Rows are trusted once their sum over the examples
    is the gradient of the batch.

    Args:
        network: the network.
        names: of the parameters.
        call: prepared inputs.
        vectors: cotangents `(K, B, C)`.
        output: `(B, C)` of the whole batch, to compare with.
        graph: whether the rows are to be differentiated.

    Raises:
        UnsupportedError: an example's output depends on the other examples of the batch, or cannot be had alone.
    """
    everything = network.parameters
    selected = {name: everything[name].detach() for name in names}
    truth, close = _of_batch(network, selected, call, vectors[0])
    try:
        # torch loops by itself over operations without a batching rule, which is what is wanted
        with muted(".*batching rule.*", UserWarning):
            gradients, values = _all_examples(network, selected, call, vectors)
        sound = _add_up(gradients, truth, vectors, close)
    except (RuntimeError, ValueError, UserWarning):
        sound = False
    if not sound:
        gradients, values = _one_by_one(network, selected, call, vectors, graph)
    # rounding of the outputs; inside, a network may be coarser than they are
    slack = max(1e3 * torch.finfo(output.dtype).eps, close if close > tolerance(output.dtype) else 0.0)
    slack *= float(1.0 + output.abs().max())
    if not torch.allclose(values, output, atol=slack, rtol=0.0) or not _add_up(gradients, truth, vectors, close):
        raise UnsupportedError(
            "the network's output for an example depends on the other examples in the batch (batch statistics?); "
            "curvature per example is not defined for such a network"
        )
    return gradients


def _of_batch(
    network: Network, selected: dict[str, Tensor], call: Any, vector: Tensor
) -> tuple[dict[str, Tensor], float]:
    """sum_n J_n^T v_n by one ordinary backward pass, and the relative error that its precision allows."""
    leaves = {name: value.clone().requires_grad_() for name, value in selected.items()}
    with recorded_dtypes() as kinds:
        output = network.forward(network.module(), call, leaves)
    gradients = backward(output, list(leaves.values()), vector.unsqueeze(0))
    pairs = zip(leaves.items(), gradients, strict=True)
    sums = {name: torch.zeros_like(leaf) if g is None else g[0] for (name, leaf), g in pairs}
    return sums, tolerance(coarsest([*kinds, output.dtype, *(value.dtype for value in selected.values())]))


def _add_up(rows: dict[str, Tensor], truth: dict[str, Tensor], vectors: Tensor, close: float) -> bool:
    for name, value in ((name, row.detach()) for name, row in rows.items()):
        if value.shape != (*vectors.shape[:2], *truth[name].shape):
            return False
        scale = float(value[0].abs().sum(0).max())
        if not float((value[0].sum(0) - truth[name]).abs().max()) <= close * scale:
            return not bool(torch.isfinite(truth[name]).all())  # named later, with its layer
    return True


def _all_examples(
    network: Network, selected: dict[str, Tensor], call: Any, vectors: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    tensors, rebuild = flatten_tensors(call)
    module = network.module()

    def rows(cotangent: Tensor, *example: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        def forward(parameters: dict[str, Tensor]) -> Tensor:
            return network.forward(module, rebuild([t.unsqueeze(0) for t in example]), parameters)[0]

        pulled = torch.func.vjp(forward, selected)
        pull = pulled[1]
        return torch.func.vmap(lambda v: pull(v)[0])(cotangent), pulled[0]

    where = (1, *(0 for _ in tensors))
    return torch.func.vmap(rows, in_dims=where, out_dims=(1, 0), randomness="same")(vectors, *tensors)


def _one_by_one(
    network: Network, selected: dict[str, Tensor], call: Any, vectors: Tensor, graph: bool
) -> tuple[dict[str, Tensor], Tensor]:
    tensors, rebuild = flatten_tensors(call)
    module = network.module()
    rows: dict[str, list[Tensor]] = {name: [] for name in selected}
    values = []
    for i in range(batch_size(call)):
        leaves = {name: value.clone().requires_grad_() for name, value in selected.items()}
        try:
            output = network.forward(module, rebuild([t[i : i + 1] for t in tensors]), leaves)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(
                f"the gradients of {next(iter(selected))!r} need the network to run on one example alone, and it "
                f"does not ({str(error).splitlines()[0]}); leave these parameters out of select="
            ) from error
        gradients = backward(output, list(leaves.values()), vectors[:, i : i + 1], graph=graph)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            rows[name].append(leaf.new_zeros(len(vectors), *leaf.shape) if gradient is None else gradient)
        values.append(output.detach())
    return {name: torch.stack(parts, 1) for name, parts in rows.items()}, torch.cat(values)
