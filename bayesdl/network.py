"""Network: the library's private view of a user's model. It reads the model's tensors and never writes to it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, HuggingFace, as_call, flatten_tensors, resolve_adapter, to_device
from bayesdl.clone import structural_clone, unwrap
from bayesdl.errors import ArgumentError, SelectionError, ShapeError, StaleModelError, UnsupportedError
from bayesdl.explicit import explicit
from bayesdl.select import Selector, Subnetwork, describe, resolve
from bayesdl.sharded import gathered

OutputAxis = int | Literal["auto"] | None

PROBES = 16  # values of each parameter that are compared to notice a write without a trace


class Network:
    """A private structural clone of a model (one per thread), the selected parameters, and a batch adapter.

    Args:
        model: any `nn.Module`; `torch.compile`, DataParallel and DDP wrappers are peeled off. Parameters sharded by
            FSDP2 are gathered into a copy in which later training is not noticed.
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
        source = gathered(unwrap(model))
        _refuse(source)
        with torch.inference_mode(False):  # tensors made in that mode could never take part in a derivative
            self._setup(explicit(structural_clone(source, _alias, _snapshot)), resolve_adapter(batch))
        # names of a clone: those of the source hold "_orig_mod" where a sub-module is compiled
        plain = structural_clone(source, _same, _same)
        self.requires_grad = {name: p.requires_grad for name, p in plain.named_parameters()}
        self._choose(select, example)

    def _setup(self, template: nn.Module, adapter: BatchAdapter) -> None:
        self._template = template
        self._local = threading.local()
        self._versions = {name: p._version for name, p in template.named_parameters()}
        self._values = _spread(template)
        self._in_place = any(getattr(module, "inplace", False) is True for module in template.modules())
        self.batch = adapter

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self._template.parameters())).device

    @property
    def dtype(self) -> torch.dtype | None:
        """The one floating dtype of all parameters; None where they differ."""
        kinds = {p.dtype for p in self._template.parameters() if p.is_floating_point()}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Selected parameters by name, sharing memory with the user's model."""
        everything = dict(self._template.named_parameters())
        return {name: everything[name] for name in self.names}

    @property
    def num_parameters(self) -> int:
        """Number of selected scalars, P."""
        if self.elements is not None:
            return sum(int(mask.sum()) for mask in self.elements.values())
        return sum(p.numel() for p in self.parameters.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers of the clone by name."""
        return {**dict(self._template.named_parameters()), **dict(self._template.named_buffers())}

    @property
    def template(self) -> nn.Module:
        """The clone that those of all threads are made from, for reading names; `module` is for running."""
        return self._template

    def module(self) -> nn.Module:
        """This thread's clone. Hooks put on it must be removed by whoever put them there."""
        if not hasattr(self._local, "module"):
            with torch.inference_mode(False):
                self._local.module = structural_clone(self._template, _same, _snapshot)
        return self._local.module

    def replace_module(self, module: nn.Module) -> Network:
        """A network over another module tree (same adapter, same selected names)."""
        return self._derived(explicit(structural_clone(module, _alias, _snapshot)))

    def reselect(self, select: Selector, example: Any = None) -> Network:
        """The same clone with another selection."""
        other = self._derived(self._template)
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
        other = self._derived(self._template)
        other.output_axis = output_axis
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> Network:
        """A network whose tensors went through `function` (device and dtype moves)."""

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
        self._versions = {name: p._version for name, p in self._template.named_parameters()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self.map(torch.clone)

    def _derived(self, template: nn.Module) -> Network:
        self.check_values()  # the new network counts writes from now on
        other = object.__new__(Network)
        other._setup(template, self.batch)
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

    def forward(self, module: nn.Module, call: Any, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """`__call__` on a given clone and prepared inputs."""
        size = known_batch_size(call)
        if size == 0:
            raise ShapeError("the batch is empty; expected at least one example")
        call = self._own(call)
        kwargs = dict(call.kwargs or {})
        if tensors:
            raw = torch.func.functional_call(module, _everywhere(module, tensors), call.args, kwargs, tie_weights=False)
        else:
            raw = module(*call.args, **kwargs)
        output = self.batch.read(raw, call) if isinstance(self.batch, HuggingFace) else extract_output(raw)
        return outputs_last(output, size, self.output_axis)

    def _own(self, call: Any) -> Any:
        # an in-place activation at the front would write to the data; out of place it would compute something else
        # wherever a way around it starts from the values that it overwrites
        if not self._in_place:
            return call
        tensors, rebuild = flatten_tensors(call)
        return rebuild([tensor.clone() for tensor in tensors])

    def check_fresh(self) -> None:
        """Raise `StaleModelError` if a parameter was written to since this network was made."""
        for name, parameter in self._template.named_parameters():
            if parameter._version != self._versions[name]:
                raise StaleModelError(
                    f"parameter {name!r} of the wrapped model was written to after the fit; the posterior belongs "
                    "to the old weights. Wrap the model again, or train a copy"
                )

    def check_values(self) -> None:
        """`check_fresh`, and compare some values of every parameter: once a prediction, not once a batch.

        Fused optimisers and writes to `.data` leave no other trace.
        """
        self.check_fresh()
        if not torch.allclose(_spread(self._template), self._values, rtol=0.0, atol=0.0, equal_nan=True):
            raise StaleModelError(
                "parameters of the wrapped model were written to after the fit; the posterior belongs to the old "
                "weights. Wrap the model again, or train a copy"
            )

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and values of every parameter and buffer of the base model."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _find_last_layer(self, example: Any) -> str:
        if example is None:
            raise SelectionError(
                'select="last_layer" finds the layer by running one batch: pass data (or example=), or name the layer'
            )
        seen: list[tuple[str, Tensor]] = []
        module = structural_clone(self._template, _same, _snapshot)  # fresh: its hooks die with it
        for name, layer in module.named_modules():
            if any(p is not None for p in layer._parameters.values()) or "parametrizations" in layer._modules:
                layer.register_forward_hook(_recorder(name, seen))
        call = self._own(self.prepare(example))
        with torch.no_grad():
            output = extract_output(module(*call.args, **dict(call.kwargs or {})))
        matches = [n for n, out in seen if out.data_ptr() == output.data_ptr() and out.numel() == output.numel()]
        if not matches:
            raise SelectionError(
                "no layer's output is the network's output (is there a softmax or a sum behind the last layer?); "
                f"name the layer instead, e.g. select={seen[-1][0] if seen else 'head'!r}"
            )
        # a module around the layer hands the same tensor on: the innermost one made it
        inner = [n for n in matches if not any(other != n and _below(other, n) for other in matches)]
        return inner[-1]


def extract_output(raw: Any) -> Tensor:
    """The output tensor of a call: the tensor itself, its `.logits`, or the entry "logits"."""
    if isinstance(raw, Tensor):
        return raw
    logits = getattr(raw, "logits", None)
    if logits is None and isinstance(raw, Mapping):
        logits = raw.get("logits")
    if isinstance(logits, Tensor):
        return logits
    if isinstance(raw, (tuple, list)) and len(raw) == 1 and isinstance(raw[0], Tensor):
        return raw[0]
    raise ShapeError(
        f"the network returned {type(raw).__name__}; expected a tensor or an object with .logits. Wrap it in a module "
        "that returns the outputs alone"
    )


def two_dimensional(output: Tensor, size: int | None = None) -> Tensor:
    """`(B,)` becomes `(B, 1)`; `(B, C)` stays; anything else raises `ShapeError`.

    `size` is B where it is known: a network that squeezes drops the batch axis of a single example too.
    """
    if size == 1 and output.dim() < 2:
        return output.reshape(1, -1)
    if output.dim() == 1:
        return output.unsqueeze(1)
    if output.dim() != 2:
        raise ShapeError(
            f"the network's output has shape {tuple(output.shape)}; expected (batch, outputs). The categorical "
            "likelihood takes positions, (B, T, C); for others pool them in a module around the network"
        )
    return output


def outputs_last(output: Tensor, size: int | None, axis: OutputAxis) -> Tensor:
    """Raw outputs with the numbers of one observation on the last axis: `(B, C)`, or `(B, positions..., C)`.

    Args:
        output: raw outputs.
        size: B where it is known.
        axis: `Likelihood.output_axis`; "auto" is the last of three axes `(B, T, C)`, the second of more `(B, C, H, W)`.
    """
    if axis is None or output.dim() < 3:
        return two_dimensional(output, size)
    place = (-1 if output.dim() == 3 else 1) if axis == "auto" else axis
    if not -output.dim() < place < output.dim():
        raise ShapeError(f"the network's output has shape {tuple(output.shape)}, and class_axis={place} is none of it")
    return output.movedim(place, -1)


def known_batch_size(call: Any) -> int | None:
    """Leading dimension that all tensors of a call share; None where they differ (graphs, shared masks)."""
    sizes = {tensor.shape[0] for tensor in flatten_tensors(call)[0]}
    return int(sizes.pop()) if len(sizes) == 1 else None


def first_inputs(data: Iterable[Any] | None, adapter: BatchAdapter) -> Any:
    """Inputs of a loader's first batch; None without data."""
    if data is None:
        return None
    for batch in data:
        return adapter(batch)[0]
    raise ArgumentError("the data loader yields no batch")


def _everywhere(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _spread(module: nn.Module) -> Tensor:
    """Up to PROBES values of every parameter, evenly spread, in one vector."""
    parameters = [p.detach() for p in module.parameters() if p.is_floating_point() and p.numel()]
    if not parameters:
        return torch.zeros(0)
    wide = torch.float64 if any(p.dtype is torch.float64 for p in parameters) else torch.float32
    picked = [_in_memory_order(p)[:: -(-p.numel() // PROBES)] for p in parameters]
    return torch.cat([values.to(device=picked[0].device, dtype=wide) for values in picked])


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view, also of dense tensors in another layout such as channels-last."""
    strides: tuple[int, ...] = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)


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
