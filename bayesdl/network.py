"""Network: the library's private view of a user's model. It reads the model's tensors and never writes to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, HuggingFace, as_call, flatten_tensors, resolve_adapter, to_device
from bayesdl.clone import is_quantised, structural_clone, unwrap
from bayesdl.errors import ArgumentError, SelectionError, ShapeError, StaleModelError, UnsupportedError
from bayesdl.explicit import explicit
from bayesdl.freshness import digest, spread
from bayesdl.outputs import (
    OutputAxis,
    extract_output,
    known_batch_size,
    outputs_last,
    picks_positions,
    without_absent_options,
)
from bayesdl.select import Selector, Subnetwork, describe, resolve
from bayesdl.sharded import stripped
from bayesdl.streaming import Change, Streamed, Whole, is_sharded


class Network:
    """A private structural clone of a model (one per thread), the selected parameters, and a batch adapter.

    Args:
        model: any `nn.Module`; `torch.compile`, DataParallel and DDP wrappers are peeled off. Matrices that FSDP2 has
            sharded stay so: each is gathered where it is used and no longer, see `bayesdl.streaming`; all processes
            then make the same calls.
        select: which parameters are Bayesian; see `bayesdl.select.resolve`.
        batch: "auto", "huggingface", or a callable `batch -> (inputs, target)`.
        example: one batch of inputs; needed where `select="last_layer"`.
        output_axis: axis of the raw outputs that holds the C numbers of one observation, the others being positions;
            "auto": the last of three axes, the second of more. None: outputs are `(B, C)`.

    The clone aliases the memory of the model's parameters and owns copies of its buffers. It is always in
    eval mode. `names` are the selected parameters; `elements` marks the selected entries of each (None: all of them).
    Writing to the model's parameters after this (training on) makes every later call raise
    `StaleModelError`, because a posterior belongs to the weights it was computed at.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Selector = "all",
        batch: str | BatchAdapter | None = None,
        example: Any = None,
        output_axis: OutputAxis = None,
    ) -> None:
        self.output_axis = output_axis
        if not isinstance(model, nn.Module):
            hint = "; bdl.as_module(function, parameters) makes a function one" if callable(model) else ""
            raise ArgumentError(f"a torch.nn.Module is expected, got {type(model).__name__}{hint}")
        source = stripped(unwrap(model))
        _refuse(source)
        with torch.inference_mode(False):  # tensors made in that mode could never take part in a derivative
            self._setup(explicit(structural_clone(source, _alias, _snapshot)), resolve_adapter(batch), None)
        # names of a clone: those of the source hold "_orig_mod" where a sub-module is compiled
        plain = structural_clone(source, _same, _same)
        self.requires_grad = {name: p.requires_grad for name, p in plain.named_parameters()}
        self._choose(select, example)

    def _setup(self, template: nn.Module, adapter: BatchAdapter, streamed: Streamed | None) -> None:
        self._template = template
        if streamed is None and any(is_sharded(p) for p in template.parameters()):
            streamed = Streamed(template)
        self._streamed = streamed
        self._local = threading.local()
        self._watch()
        self._values = spread(template)
        self._in_place = any(getattr(module, "inplace", False) is True for module in template.modules())
        self.batch = adapter

    def _watch(self) -> None:
        # read once: going through a large model costs as much as a small forward pass
        self._watched = tuple((name, p, p._version) for name, p in self._template.named_parameters())
        kinds = {p.dtype for _, p, _ in self._watched if p.is_floating_point()}
        self._dtype = kinds.pop() if len(kinds) == 1 else None

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self._template.parameters())).device

    @property
    def dtype(self) -> torch.dtype | None:
        """The one floating dtype of all parameters; None where they differ."""
        return self._dtype

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over processes."""
        return self._streamed is not None

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Selected parameters by name, sharing memory with the user's model; sharded ones are gathered when read."""
        return self._whole(self.held)

    @property
    def held(self) -> dict[str, Tensor]:
        """Selected parameters as this process holds them, for names, shapes and identity."""
        everything = dict(self._template.named_parameters())
        return {name: everything[name] for name in self.names}

    @property
    def num_parameters(self) -> int:
        """Number of selected scalars, P."""
        if self.elements is not None:
            return sum(int(mask.sum()) for mask in self.elements.values())
        return sum(p.numel() for p in self.held.values())

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All parameters and buffers of the clone by name."""
        return self._whole({**dict(self._template.named_parameters()), **dict(self._template.named_buffers())})

    def session(self) -> AbstractContextManager[None]:
        """Processes that hold the shards of one model may do different things inside; none leaves before the others.

        Needed around whatever differs between them, such as passes over shares of the data. No collective of theirs
        may happen inside. Does nothing for a model that is not sharded.
        """
        return nullcontext() if self._streamed is None else self._streamed.exchange.session()

    @property
    def template(self) -> nn.Module:
        """The clone that those of all threads are made from, for reading names; `module` is for running."""
        return self._template

    def module(self) -> nn.Module:
        """This thread's clone. Hooks put on it must be removed by whoever put them there."""
        if not hasattr(self._local, "module"):
            self._local.module = self._fresh()
        return self._local.module

    def replace_module(self, module: nn.Module) -> Network:
        """A network over another module tree (same adapter, same selected names)."""
        return self._derived(explicit(structural_clone(module, _alias, _snapshot)))

    def reselect(self, select: Selector, example: Any = None) -> Network:
        """The same clone with another selection."""
        other = self._derived(self._template, self._streamed)
        other._choose(select, example)
        return other

    def _choose(self, select: Selector, example: Any) -> None:
        inside = select.within if isinstance(select, Subnetwork) else select
        self.select = describe(select)
        self.elements: dict[str, Tensor] | None = None
        self.names = resolve(inside, self._template, self.requires_grad, lambda: self._find_last_layer(example))
        if isinstance(select, Subnetwork):
            self.elements = select.masks(self.parameters)
            self.names = tuple(name for name in self.names if name in self.elements)

    def reading(self, output_axis: OutputAxis) -> Network:
        """The same clone with another meaning of the outputs' axes."""
        if output_axis == self.output_axis:
            return self
        other = self._derived(self._template, self._streamed)
        other.output_axis = output_axis
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> Network:
        """A network whose tensors went through `function` (device and dtype moves).

        Raises:
            UnsupportedError: quantised weights were to change their device.
        """
        for name, tensor in self._template.named_parameters():
            if is_quantised(tensor) and function(torch.empty(0, device=tensor.device)).device != tensor.device:
                raise UnsupportedError(
                    f"{name!r} is quantised ({type(tensor).__name__}) and stays where it is: move the model before it "
                    "is wrapped"
                )

        def parameter(tensor: Tensor) -> Tensor:
            return nn.Parameter(function(tensor.detach()), requires_grad=False)

        with torch.inference_mode(False):
            return self._derived(structural_clone(self._template, parameter, function))

    def __getstate__(self) -> dict[str, Any]:
        # clones belong to the threads of a process: the one it is sent to makes its own
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
        self._watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self.map(torch.clone)

    def _derived(self, template: nn.Module, streamed: Streamed | None = None) -> Network:
        self.check_values()  # the new network counts writes from now on
        other = object.__new__(Network)
        other._setup(template, self.batch, streamed)
        other.requires_grad, other.select, other.names = self.requires_grad, self.select, self.names
        other.elements = self.elements
        other.output_axis = self.output_axis
        return other

    def prepare(self, inputs: Any) -> Any:
        """Inputs on the network's device, in its floating dtype, bound to the forward signature."""
        return to_device(as_call(self._template, inputs), self.device, self.dtype)

    def __call__(self, inputs: Any, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs `(B, C)` for a batch of inputs; `(B, T, C)`, `(B, H, W, C)` where `output_axis` allows positions.

        Args:
            inputs: what the network takes.
            tensors: parameters or buffers by name that replace the network's own in this call.

        Raises:
            ShapeError: the outputs are not one tensor of shape `(B, C)` or `(B,)`, or with positions.
            StaleModelError: the user's model was trained on after it was wrapped.
        """
        self.check_fresh()
        return self.forward(self.module(), self.prepare(inputs), tensors)

    def forward(self, module: nn.Module, call: Any, tensors: Mapping[str, Change] | None = None) -> Tensor:
        """`__call__` on a given clone and prepared inputs; the weights of a sharded model may go through functions."""
        size = known_batch_size(call)
        if size == 0:
            raise ShapeError("the batch is empty; expected at least one example")
        call = self._own(call)
        kwargs = dict(call.kwargs or {})
        if self._streamed is not None:
            with self._streamed.running(module, _everywhere(module, tensors or {})):
                raw = module(*call.args, **kwargs)
        elif tensors:
            given: dict[str, Any] = _everywhere(module, tensors)
            raw = torch.func.functional_call(module, given, call.args, kwargs, tie_weights=False)
        else:
            raw = module(*call.args, **kwargs)
        output = self.batch.read(raw, call) if isinstance(self.batch, HuggingFace) else extract_output(raw)
        return outputs_last(without_absent_options(output, call), size, self.output_axis)

    def _own(self, call: Any) -> Any:
        # an in-place activation at the front would write to the data; out of place it would compute something else
        # wherever a way around it starts from the values that it overwrites
        if not self._in_place:
            return call
        tensors, rebuild = flatten_tensors(call)
        return rebuild([tensor.clone() for tensor in tensors])

    def check_fresh(self) -> None:
        """Raise `StaleModelError` if a parameter was written to since this network was made."""
        for name, parameter, version in self._watched:
            if parameter._version != version:
                raise StaleModelError(
                    f"parameter {name!r} of the wrapped model was written to after the fit; the posterior belongs "
                    "to the old weights. Wrap the model again, or train a copy"
                )

    def check_values(self) -> None:
        """`check_fresh`, and compare some values of every parameter: once a prediction, not once a batch.

        Fused optimisers and writes to `.data` leave no other trace.
        """
        self.check_fresh()
        if not torch.allclose(spread(self._template), self._values, rtol=0.0, atol=0.0, equal_nan=True):
            raise StaleModelError(
                "parameters of the wrapped model were written to after the fit; the posterior belongs to the old "
                "weights. Wrap the model again, or train a copy"
            )

    def fingerprint(self, concerns: Callable[[str], bool] | None = None) -> str:
        """SHA-256 over names, shapes, dtypes and values of every parameter and buffer of the base model.

        Args:
            concerns: which names count; default all. Sharded models count all, which every process then reads together.
        """
        if self._streamed is None:
            tensors = self.tensors
            return digest(tensors if concerns is None else {k: v for k, v in tensors.items() if concerns(k)})
        if self._streamed.digest is None:
            self._streamed.digest = digest(self.tensors)
        return self._streamed.digest

    def _fresh(self) -> nn.Module:
        with torch.inference_mode(False):
            clone = structural_clone(self._template, _same, _snapshot)
        return clone if self._streamed is None else self._streamed.install(clone)

    def _whole(self, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors if self._streamed is None else Whole(self._streamed, tensors)

    def _find_last_layer(self, example: Any) -> str:
        if example is None:
            raise SelectionError(
                'select="last_layer" finds the layer by running one batch: pass data (or example=), or name the layer'
            )
        seen: list[tuple[str, Tensor]] = []
        module = self._fresh()  # its hooks die with it
        for name, layer in module.named_modules():
            if any(p is not None for p in layer._parameters.values()) or "parametrizations" in layer._modules:
                layer.register_forward_hook(_recorder(name, seen))
        call = self._own(self.prepare(example))
        with torch.no_grad(), self.session():
            output = extract_output(module(*call.args, **dict(call.kwargs or {})))
        matches = [n for n, out in seen if out.data_ptr() == output.data_ptr() and out.numel() == output.numel()]
        # sequence classifiers of decoders score every token, and take the scores of one
        matches = matches or [n for n, out in seen if picks_positions(output, out)]
        if not matches:
            raise SelectionError(
                "no layer's output is the network's output (is there a softmax or a sum behind the last layer?); "
                f"name the layer instead, e.g. select={seen[-1][0] if seen else 'head'!r}"
            )
        # a module around the layer hands the same tensor on: the innermost one made it
        inner = [n for n in matches if not any(other != n and _below(other, n) for other in matches)]
        return inner[-1]


def first_inputs(data: Iterable[Any] | None, adapter: BatchAdapter) -> Any:
    """Inputs of a loader's first batch; None without data."""
    if data is None:
        return None
    for batch in data:
        return adapter(batch)[0]
    raise ArgumentError("the data loader yields no batch")


def _everywhere(module: nn.Module, tensors: Mapping[str, Change]) -> dict[str, Change]:
    """The given tensors under one name for every module that holds them.

    torch's own treatment of ties swaps a module that has two names twice, and then puts the second swap's leftovers
    back: such a module would keep the given tensors for good.
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    given = {id(named[name]): value for name, value in tensors.items() if name in named}
    return {
        f"{path}.{key}" if path else key: given[id(held)]
        for path, part in module.named_modules()
        for key, held in (*part._parameters.items(), *part._buffers.items())
        if held is not None and id(held) in given
    }


def _alias(tensor: Tensor) -> Tensor:
    # detach() shares memory and version counter, but survives the user's `net.to(...)`, which swaps .data
    # (an inference tensor can never take part in a derivative: a copy stands in for it)
    shared = tensor.detach().clone() if tensor.is_inference() else tensor.detach()
    return nn.Parameter(shared, requires_grad=False)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _recorder(name: str, seen: list[tuple[str, Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((name, output))

    return record


def _below(name: str, parent: str) -> bool:
    return not parent or name.startswith(parent + ".")


def _refuse(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"module {name or type(module).__name__!r} is a TorchScript module, which has no Python structure; "
                "wrap the eager network it was made from"
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise UnsupportedError(
                f"embedding {name!r} has max_norm, which rewrites its weight in every forward pass; the library never "
                "writes to your model. Renormalise once and set max_norm=None"
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedError(
                f"parameter {name!r} is lazy and not initialised: run one batch through the model first"
            )
