"""The curvature of a few examples as a linear map on the parameters, and one pass of such maps over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesdl.batch import flatten_tensors
from bayesdl.curvature.backward import WORTH_LOOPING, backward, muted
from bayesdl.curvature.chunking import UNFACTORED, chunk_size, chunks
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.products import times, transposed_times
from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, UnsupportedError, check_finite
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network

Cotangents = Callable[[Tensor, Tensor], Tensor]

_ONE_THREAD = RLock()

# directions that one chunk of examples meets at once
GROUP = 16
# a direction by forward mode costs about as much as this many cotangents of the layer factors
COTANGENTS_PER_DIRECTION = 3


@dataclass(frozen=True)
class Local:
    """Curvature H_n summed over the examples of one chunk.

    Attributes:
        f: outputs `(B, C)`, or `(B, positions..., C)`.
        y: targets as the likelihood's `check_targets` returns them.
        product: directions `(r, P)` in flat order -> H times each, `(r, P)`.
    """

    f: Tensor
    y: Tensor
    product: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What one pass saw, to tell whether another pass saw the same.

    Attributes:
        num_data: N, the observations that count.
        log_likelihood, absolute: sum of log p(y | f) and of its absolute values.
        ordered: sum with weights that depend on the place in the pass.
        squared_error: `(C,)` sum of squared residuals, Gaussian only.
    """

    num_data: int
    log_likelihood: float
    absolute: float
    ordered: float
    squared_error: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A network, data and a likelihood, ready for passes.

    Attributes:
        network: in the dtype of the curvature.
        layout: its blocks.
        data: loader.
        likelihood: with its noise; see `closed`.
        kind: "ggn", "mc", "empirical" or "hessian".
        samples, seed: draws per example for kind "mc", and the state of their generator (None: a fixed seed).
        memory: bytes that one chunk of examples may take.
        slopes: how J v is had, "forward" or "backward" (double); None where neither works. See `find_slopes`.
        allow_partial: accept a loader that skips part of its data set.
    """

    network: Network
    layout: Layout
    data: Iterable[Any]
    likelihood: Likelihood
    kind: str
    samples: int = 1
    seed: tuple[torch.device, Tensor] | None = None
    memory: int | None = None
    slopes: str | None = None
    allow_partial: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of all products."""
        return self.network.dtype or torch.float32

    def visit(self, use: Callable[[Local], None], directions: int, describe: str, progress: bool = False) -> Seen:
        """One pass over the data: `use` gets the map of every chunk of examples in turn.

        Args:
            use: called with each chunk's `Local`, whose graph lives until the call returns.
            directions: how many directions each map will be given; decides the way.
            describe, progress: of the progress bar.

        Raises:
            NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
        """
        self.network.check_fresh()
        make, width = self._maker(directions)
        step = chunk_size(self.layout, "diag", self.dtype, width=width, memory=self.memory, device=self.network.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self.network.device)
        squared: Tensor | None = None
        count = 0
        source = batches(
            self.network, self.data, progress=progress, describe=describe, allow_partial=self.allow_partial
        )
        for number, inputs, target in source:
            for rows, labels in chunks(inputs, target, step):
                with in_batch(number), torch.inference_mode(False), torch.enable_grad():
                    local = make(rows, labels)
                    use(local)
                each = self.likelihood.log_prob(local.f, local.y).double().flatten()
                place = torch.arange(count, count + len(each), device=each.device)
                sums += torch.stack([each.sum(), each.abs().sum(), (each * (1.0 + place % 97)).sum()])
                mask = self.likelihood.counted(local.y)
                count += len(each) if mask is None else int(mask.sum())
                if isinstance(self.likelihood, Gaussian):
                    residual = (local.y - local.f).double().square().sum(0)
                    squared = residual if squared is None else squared + residual
        total, absolute, ordered = sums.tolist()
        return Seen(count, total, absolute, ordered, squared)

    def times(self, rows: Tensor, progress: bool = False) -> tuple[Tensor, Seen]:
        """H times directions `(r, P)` by one pass over the data: `(r, P)`."""
        total = torch.zeros_like(rows)

        def add(local: Local) -> None:
            total.add_(local.product(rows))

        seen = self.visit(add, len(rows), "product with the curvature", progress)
        check_finite(total, "the product with the curvature")
        return total, seen

    def check_same(self, before: Seen, after: Seen) -> None:
        """Raise `ArgumentError` unless two passes saw the same data; for kind "mc" in the same order."""
        slack = min(1e3 * torch.finfo(self.dtype).eps, 0.05) * (before.absolute + before.num_data)
        same = abs(before.log_likelihood - after.log_likelihood) <= slack
        if before.num_data != after.num_data or not same:
            raise ArgumentError(
                "every product with the curvature is a pass over the same data, and two passes of the loader differ: "
                f"{before.num_data} examples with log-likelihood {before.log_likelihood:.6g}, then {after.num_data} "
                f"with {after.log_likelihood:.6g}. Switch random augmentation off, or use "
                'bdl.curvature.estimate(..., structure="kron"), which takes one pass'
            )
        if self.kind == "mc" and not abs(before.ordered - after.ordered) <= 97.0 * slack:
            raise ArgumentError(
                'two passes of the loader differ in their order, and the targets drawn for kind="mc" follow it; pass '
                'a loader with shuffle=False, or kind="ggn"'
            )

    def _maker(self, directions: int) -> tuple[Callable[[Any, Any], Local], int]:
        """How a chunk becomes a map, and the number of copies of its activations that this takes."""
        if self.kind == "hessian":
            return self._hessian, 2 * min(GROUP, directions)
        if self._needs_slopes(directions):
            return self._by_slopes, 4
        rule = cotangent_rule(self.likelihood, self.kind, self.samples, self._generator())
        return lambda rows, labels: self._by_factors(rows, labels, rule), self._cotangents

    @property
    def _cotangents(self) -> int:
        """Per example, of the kind."""
        return {"mc": self.samples, "empirical": 1}.get(self.kind, self.layout.outputs)

    def _needs_slopes(self, directions: int) -> bool:
        """Whether J v and J^T u for each direction cost less than the factors of all cotangents."""
        if self.kind != "ggn":
            return False
        if self.layout.positions:  # one cotangent per output and position would be needed
            if self.slopes is None:
                raise UnsupportedError(
                    'products with the "ggn" of outputs at every position need J v, and an operation of this network '
                    'has neither forward mode nor a second derivative; use kind="mc" or "empirical"'
                )
            return True
        dense = sum(block.numel for block in self.layout.blocks if block.kind in UNFACTORED)
        work = self._cotangents * (self.layout.activations + dense)
        return self.slopes is not None and work > COTANGENTS_PER_DIRECTION * directions * self.layout.activations

    def _generator(self) -> torch.Generator | None:
        if self.seed is None:
            return None
        source = torch.Generator(self.seed[0])
        source.set_state(self.seed[1])
        return source

    def _by_factors(self, rows: Any, labels: Any, rule: Cotangents) -> Local:
        """V^T J D and J^T V u from layer factors: one backward pass whatever the number of directions."""
        seen: dict[str, Tensor] = {}

        def cotangents(f: Tensor) -> Tensor:
            seen["f"], seen["y"] = self._checked(f, labels)
            vectors, mask = rule(seen["f"], seen["y"]), self.likelihood.counted(seen["y"])
            return vectors if mask is None else vectors * mask.unsqueeze(-1)

        _, factors = layer_factors(self.network, self.layout, rows, cotangents, self.dtype)
        pairs = list(zip(factors, self.layout.blocks, strict=True))

        def product(directions: Tensor) -> Tensor:
            with torch.no_grad():
                pieces = zip(factors, self.layout.split(directions), strict=True)
                slopes = torch.stack([times(factor, piece) for factor, piece in pieces]).sum(0)
                return self.layout.join([transposed_times(factor, slopes, block) for factor, block in pairs])

        return Local(seen["f"], seen["y"], product)

    def _by_slopes(self, rows: Any, labels: Any) -> Local:
        """J v, Lambda times it, J^T back; one direction at a time."""
        call, leaves = self._call(rows), self._leaves()
        with unfused():
            output = self.network.forward(self.network.module(), call, leaves)
        f, y = self._checked(output.detach(), labels)
        mask, flat = self.likelihood.counted(y), f.flatten(0, -2)
        slope = self._slopes(call, output, leaves)

        def single(direction: Tensor) -> Tensor:
            weighted = self.likelihood.hessian_times(flat, slope(direction).flatten(0, -2)).view(output.shape)
            weighted = weighted if mask is None else weighted * mask.unsqueeze(-1)
            return self._flat(backward(output, list(leaves.values()), weighted.unsqueeze(0), keep=True), 1)[0]

        def product(directions: Tensor) -> Tensor:
            # forward mode alone does not know that padding is a constant by convention
            return torch.stack([single(d) for d in self.layout.without_padding(directions)])

        return Local(f, y, product)

    def _slopes(self, call: Any, output: Tensor, leaves: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """A flat direction -> J v, of the outputs' shape."""
        if self.slopes == "forward":
            plain = {name: leaf.detach() for name, leaf in leaves.items()}
            return lambda direction: push_forward(self.network, call, plain, self.layout.to_dict(direction))
        turned, pulled = pull_back(self.layout, output, leaves)
        return lambda direction: push_twice(turned, pulled, direction)

    def _hessian(self, rows: Any, labels: Any) -> Local:
        """Double backward through -sum log p(y | f(theta))."""
        call, leaves = self._call(rows), self._leaves()
        nodes = list(leaves.values())
        with unfused():
            output = self.network.forward(self.network.module(), call, leaves)
            f, y = self._checked(output, labels)
            loss = -self.likelihood.log_prob(f, y).sum()
            gradients = torch.autograd.grad(loss, nodes, create_graph=True, allow_unused=True)
        slope = named(self.layout, leaves, gradients)

        def product(directions: Tensor) -> Tensor:
            # batched, second derivatives of large networks are no faster, and those of convolutions far slower
            large = self.layout.numel + len(f) * self.layout.activations >= WORTH_LOOPING
            groups = directions.split(1 if large else GROUP)
            try:
                return torch.cat([self._flat(backward(slope, nodes, some, keep=True), len(some)) for some in groups])
            except NotImplementedError as error:
                raise UnsupportedError(
                    f'an operation of this network has no second derivative ({error}); use kind="ggn" instead of '
                    '"hessian"'
                ) from error

        return Local(f.detach(), y, product)

    def _checked(self, f: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        outputs = self.likelihood.check_outputs(f)
        return outputs, self.likelihood.check_targets(outputs, labels)

    def _call(self, rows: Any) -> Any:
        call = self.network.prepare(rows)
        tensors, rebuild = flatten_tensors(call)
        # tensors made under inference_mode cannot enter a graph
        return rebuild([t.clone() for t in tensors]) if any(t.is_inference() for t in tensors) else call

    def _leaves(self) -> dict[str, Tensor]:
        return {name: p.detach().clone().requires_grad_() for name, p in self.network.parameters.items()}

    def _flat(self, gradients: list[Tensor | None], count: int) -> Tensor:
        """Gradients `(r, *shape)` by parameter -> `(r, P)`; None counts as zero."""
        pairs = zip(self.network.parameters.items(), gradients, strict=True)
        values = {n: p.new_zeros(count, *p.shape) if g is None else g for (n, p), g in pairs}
        return self.layout.flatten(values, 1)


@contextmanager
def unfused() -> Iterator[None]:
    """Attention from plain matrix products: fused kernels know neither forward mode nor second derivatives.

    The choice of kernels belongs to the process, so one thread at a time; others meanwhile compute the same numbers.
    """
    with _ONE_THREAD, sdpa_kernel(SDPBackend.MATH):
        yield


def find_slopes(network: Network, layout: Layout, inputs: Any) -> str | None:
    """How J v can be had: "forward" (mode), "backward" (twice), or None; tried on the inputs given."""
    call = network.prepare(inputs)
    plain = {name: p.detach().clone() for name, p in network.parameters.items()}
    try:
        push_forward(network, call, plain, plain)
        return "forward"
    except RuntimeError:  # whatever is wrong with the inputs is raised again by the first pass
        pass
    try:
        with torch.inference_mode(False), torch.enable_grad(), unfused():
            leaves = {name: value.requires_grad_() for name, value in plain.items()}
            output = network.forward(network.module(), call, leaves)
            turned, pulled = pull_back(layout, output, leaves)
            push_twice(turned, pulled, torch.ones_like(pulled))
        return "backward"
    except RuntimeError:
        return None


def push_forward(network: Network, call: Any, plain: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """J v by forward mode, of the outputs' shape."""
    module = network.module()
    # torch's first use of forward mode warns about torch's own use of torch.jit.script
    with muted(".*torch.jit.script.*", DeprecationWarning), unfused(), torch.no_grad():
        pair = torch.func.jvp(lambda p: network.forward(module, call, p), (plain,), (direction,))
    return pair[1]


def pull_back(layout: Layout, output: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A cotangent u of the outputs' shape, and J^T u `(P,)` as a function of it."""
    turned = torch.zeros_like(output, requires_grad=True)
    with unfused():
        found = torch.autograd.grad(output, list(leaves.values()), turned, create_graph=True, allow_unused=True)
    return turned, named(layout, leaves, found)


def named(layout: Layout, leaves: dict[str, Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients in the order of the leaves -> flat `(P,)`; None counts as zero."""
    pairs = zip(leaves.items(), gradients, strict=True)
    return layout.flatten({name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs})


def push_twice(turned: Tensor, pulled: Tensor, direction: Tensor) -> Tensor:
    """J v as the gradient of v . J^T u in u."""
    return torch.autograd.grad(pulled, turned, direction, retain_graph=True)[0]
