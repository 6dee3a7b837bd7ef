"""Finding the low-rank layers of a model, and refusing those whose mathematics or code paths do not hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NonFiniteError, SelectionError, UnsupportedError, require

Layers = str | Iterable[str]

LAST = re.compile(r"last-(\d+)")
# classes of peft whose forward never calls lora_A and lora_B on rows of tokens
BYPASSING = ("Embedding", "_ConvNd", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "ParamWrapper")


@final
@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer W0 x + s B A x under one adapter.

    Attributes:
        name: of the peft layer within the model.
        adapter: name of the adapter.
        inputs: columns of A.
        outputs: rows of B.
        rank: r.
        scaling: s, which covers rsLoRA and ranks per layer.
        dora: whether the layer normalises columns (DoRA); the norm stays at the mean then.
    """

    name: str
    adapter: str
    inputs: int
    outputs: int
    rank: int
    scaling: float
    dora: bool = False

    @property
    def key(self) -> str:
        """Unique within the model."""
        return f"{self.name}|{self.adapter}"

    @property
    def weights(self) -> tuple[str, str]:
        """Parameter names of A and B."""
        return f"{self.name}.lora_A.{self.adapter}.weight", f"{self.name}.lora_B.{self.adapter}.weight"

    def down(self, module: nn.Module) -> nn.Module:
        """The linear layer A in a model."""
        return module.get_submodule(f"{self.name}.lora_A.{self.adapter}")

    def up(self, module: nn.Module) -> nn.Module:
        """The linear layer B in a model."""
        return module.get_submodule(f"{self.name}.lora_B.{self.adapter}")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**entry)


def find_layers(
    module: nn.Module,
    adapter: str | Sequence[str] | None = None,
    layers: Layers = "all",
    blocks: str | None = None,
) -> tuple[AdaptedLayer, ...]:
    """The low-rank layers of a model, checked.

    Args:
        module: a `PeftModel`, or any module that holds peft LoRA layers.
        adapter: names; None means the active ones.
        layers: "all"; "last-k", those within the last k blocks; a regular expression on layer names; or a list.
        blocks: path of the list of blocks, for "last-k", where there are several.

    Raises:
        UnsupportedError: no low-rank layer, a merged or disabled adapter, a layer or a variant without this posterior.
        SelectionError: an unknown or inactive adapter, or no layer selected.
        ArgumentError: an untrained B.
        NonFiniteError: NaN or infinity in A or B.
    """
    tuner = require("peft.tuners.lora.layer", extra="llm")
    found = {name: part for name, part in module.named_modules() if isinstance(part, tuner.LoraLayer)}
    if not found:
        raise UnsupportedError(
            "the model holds no LoRA layer of peft; train an adapter first: peft.get_peft_model(model, "
            "peft.LoraConfig(...))"
        )
    known = sorted({key for part in found.values() for key in (*part.lora_A, *part.lora_embedding_A)})
    names = _adapters(found, adapter, known)
    chosen = _selected(module, found, layers, blocks)
    result, refused = [], []
    for name, part in chosen.items():
        for own in names:
            if own in part.lora_embedding_A or (own in part.lora_A and _bypasses(part, own)):
                refused.append(name)
            elif own in part.lora_A:
                _check(name, part, own)
                result.append(_described(name, part, own))
    if refused:
        raise UnsupportedError(
            f"no posterior for the adapters of {_some(refused)} ({type(found[refused[0]]).__name__}): their forward "
            'does not call A and B row by row. Leave them out with layers="<regular expression>"; they then stay at '
            "their trained values"
        )
    if not result:
        raise SelectionError(f"layers={layers!r} selects no layer of adapter {names}; there are {_some(list(found))}")
    return tuple(result)


def fingerprint(module: nn.Module, layers: Iterable[AdaptedLayer]) -> str:
    """SHA-256 over names and values of A and B of the given layers."""
    digest = hashlib.sha256()
    for layer in layers:
        for name, part in zip(layer.weights, (layer.down(module), layer.up(module)), strict=True):
            value = weight(part)
            digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|{layer.scaling}\n".encode())
            digest.update(value.contiguous().reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def block_list(module: nn.Module, names: Iterable[str], path: str | None = None) -> str:
    """Path of the one `ModuleList` that holds all layers of the given names that lie in any.

    Raises:
        SelectionError: there is none, or several share them.
    """
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    if path is not None:
        if path not in lists:
            raise SelectionError(f"blocks={path!r} is no ModuleList of the model; there are {_some(list(lists))}")
        return path
    names = list(names)
    held = {key: [n for n in names if n.startswith(key + ".")] for key in lists}
    covered = {n for inside in held.values() for n in inside}
    whole = [key for key, inside in held.items() if covered and len(inside) == len(covered)]
    if not whole:
        raise SelectionError(
            f"the adapted layers lie in no list of blocks, or in several ({_some([k for k in held if held[k]])}); "
            'name one: blocks="path.of.the.list"'
        )
    return min(whole, key=len)


def block_of(name: str, path: str) -> int | None:
    """Index of the block of the list at `path` that a layer lies in; None outside of it."""
    if not name.startswith(path + "."):
        return None
    return int(name[len(path) + 1 :].split(".")[0])


def _adapters(found: Mapping[str, Any], adapter: str | Sequence[str] | None, known: list[str]) -> list[str]:
    active = sorted({key for part in found.values() for key in part.active_adapters})
    names = active if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
    for name in names:
        if name not in known:
            raise SelectionError(f"adapter {name!r} is not in the model; there are {known}")
        if name not in active:
            raise SelectionError(f"adapter {name!r} is not active ({active} are); call model.set_adapter({name!r})")
    if not names:
        raise SelectionError(f"no adapter is active; the model has {known}: call model.set_adapter({known[0]!r})")
    return names


def _selected(module: nn.Module, found: Mapping[str, Any], layers: Layers, blocks: str | None) -> dict[str, Any]:
    if isinstance(layers, str):
        if layers == "all":
            return dict(found)
        last = LAST.fullmatch(layers)
        if last is not None:
            path = block_list(module, found, blocks)
            first = len(module.get_submodule(path)) - int(last[1])  # type: ignore[arg-type]
            if int(last[1]) < 1 or first < 0:
                raise SelectionError(f"layers={layers!r}, and {path!r} has {first + int(last[1])} blocks")
            place = {name: block_of(name, path) for name in found}
            return {n: part for n, part in found.items() if (at := place[n]) is not None and at >= first}
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise SelectionError(f'layers={layers!r} is not "all", "last-k" or a regular expression') from error
        return {name: part for name, part in found.items() if pattern.search(name)}
    wanted = list(layers)
    for name in wanted:
        if name not in found:
            raise SelectionError(f"layers names {name!r}, which is no LoRA layer; there are {_some(list(found))}")
    return {name: found[name] for name in wanted}


def _bypasses(part: Any, adapter: str) -> bool:
    kinds = {kind.__name__ for kind in type(part).__mro__ if kind.__module__.startswith("peft.")}
    plain = isinstance(part.lora_A[adapter], nn.Linear) and isinstance(part.lora_B[adapter], nn.Linear)
    return not plain or bool(kinds & set(BYPASSING))


def _check(name: str, part: Any, adapter: str) -> None:
    if part.merged:
        raise UnsupportedError(
            f"the adapter is merged into {name!r}, where no draw can reach it; call model.unmerge_adapter()"
        )
    if part.disable_adapters:
        raise UnsupportedError(f"the adapters of {name!r} are disabled; call model.enable_adapter_layers()")
    variant = getattr(part, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise UnsupportedError(
            f"{name!r} is a {type(variant).__name__}, which is not the product B A that the posterior is over; plain "
            "LoRA, rsLoRA and DoRA are supported"
        )
    for letter, layer in (("A", part.lora_A[adapter]), ("B", part.lora_B[adapter])):
        if not bool(torch.isfinite(layer.weight).all()):
            raise NonFiniteError(f"lora_{letter} of {name!r} holds NaN or infinity")
    if not bool(part.lora_B[adapter].weight.any()):
        raise ArgumentError(
            f"lora_B of {name!r} is zero: the adapter was never trained, and the posterior spreads in the column "
            "space of a trained B"
        )


def _described(name: str, part: Any, adapter: str) -> AdaptedLayer:
    outputs, rank = part.lora_B[adapter].weight.shape
    inputs = part.lora_A[adapter].weight.shape[1]
    dora = adapter in getattr(part, "lora_variant", {})
    return AdaptedLayer(name, adapter, inputs, outputs, rank, float(part.scaling[adapter]), dora)


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(map(repr, names[:limit])) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, detached."""
    value = module.weight
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"{type(module).__name__} has no weight")
    return value.detach()
