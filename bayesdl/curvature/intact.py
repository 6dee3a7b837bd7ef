"""Whether curvature that was read from a file is whole, and belongs to the network at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from bayesdl.curvature.dual import Dual
from bayesdl.curvature.ekfac import EKFAC
from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.layout import KINDS, Block, Layout
from bayesdl.curvature.lowrank import LowRank
from bayesdl.curvature.mixed import Mixed
from bayesdl.curvature.registry import first
from bayesdl.curvature.structure import Structure
from bayesdl.errors import FileFormatError
from bayesdl.network import Network

DTYPES = (torch.float32, torch.float64)
LARGEST = 1 << 62  # what torch can count
AXES = 64  # of a tensor
COUNTS = (".index", ".lengths")  # integers beside the factors of `Dual`


def check_layout(layout: Layout, network: Network) -> None:
    """Raise `FileFormatError` unless the blocks cover the network's selected parameters, each once, in their shapes."""
    shapes = {name: tuple(value.shape) for name, value in network.parameters.items()}
    held = dict(zip(layout.names, (tuple(shape) for shape in layout.shapes), strict=True))
    if held != shapes or len(held) != len(layout.names):
        raise FileFormatError("the curvature is of other parameters, or of other shapes, than the network's selection")
    covered = [name for block in layout.blocks for name in block.parameters]
    if sorted(covered) != sorted(shapes):
        raise FileFormatError("the blocks of the curvature do not cover the selected parameters, each once")
    for value, least in ((layout.activations, 0), (layout.outputs, 1), (layout.positions, 0)):
        _check_number(value, least, LARGEST, "a size of the layout")
    modules = dict(network.template.named_modules())
    owned = dict(network.template.named_parameters(remove_duplicate=False))
    for block in layout.blocks:
        _check_block(block, shapes, modules)
        own = {id(owned[name]) for name in block.parameters}
        odd = [name for name in block.modules if not own & _parameters_at(name, modules)]
        if odd:
            raise FileFormatError(f"block {block.name!r} is of layer {odd[0]!r}, which has none of its parameters")


def _parameters_at(name: str, modules: Mapping[str, nn.Module]) -> set[int]:
    """Which parameters a layer has; a product inside attention or a recurrent cell has those of that layer."""
    held = {id(parameter) for parameter in modules[name].parameters()}
    return held or {id(parameter) for parameter in modules[name.rpartition(".")[0]].parameters(recurse=False)}


def _check_block(block: Block, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, nn.Module]) -> None:
    name = f"block {block.name!r}"
    if block.kind not in KINDS or (block.kind == "elements") != (block.whole is not None):
        raise FileFormatError(f"{name} is of kind {block.kind!r}; expected one of {KINDS}")
    if [tuple(shape) for shape in block.shapes] != [shapes[parameter] for parameter in block.parameters]:
        raise FileFormatError(f"{name} has other shapes than the network's parameters")
    missing = [module for module in block.modules if module not in modules]
    if missing:
        raise FileFormatError(f"{name} is of layer {missing[0]!r}, which the network lacks")
    for what in ("groups", "rows", "columns"):
        _check_number(getattr(block, what), 1, LARGEST, f"{what} of {name}")
    _check_number(block.axis, -AXES, AXES, f"axis of {name}")
    _check_number(block.padding, -1, block.columns, f"padding of {name}")
    if block.whole is not None:
        if block.whole.whole is not None or block.whole.parameters != block.parameters:
            raise FileFormatError(f"{name} holds elements of no whole block")
        _check_block(block.whole, shapes, modules)
        _check_elements(block, block.whole.numel)
    elif (block.groups, block.rows, block.columns) not in _cuts(block, [modules[module] for module in block.modules]):
        raise FileFormatError(f"{name} is not {block.groups} x {block.rows} x {block.columns}, as the file says")


def _check_elements(block: Block, size: int) -> None:
    places = block.elements
    for place in places:
        _check_number(place, 0, size, f"elements of block {block.name!r}")
    rising = all(a < b for a, b in pairwise(places))
    if not places or not rising or (block.groups, block.rows, block.columns) != (1, len(places), 1):
        raise FileFormatError(f"block {block.name!r} does not list its elements in order, each once")


def _cuts(block: Block, modules: list[nn.Module]) -> list[tuple[int, int, int]]:
    """Groups, rows and columns that a block of these shapes may have."""
    sizes = [math.prod(shape) for shape in block.shapes]
    if block.kind == "rows":
        return [(1, block.shapes[0][1], block.shapes[0][0])]
    if block.kind != "linear":
        return [(1, sum(sizes), 1)]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    if linear:
        return [(1, linear[0].out_features, linear[0].in_features + block.has_bias)]
    units = block.groups * block.rows
    fits = units * (block.columns - block.has_bias) == sizes[0] and sizes[1:] in ([], [units])
    return [(block.groups, block.rows, block.columns)] if fits else []


def check_structure(kept: Structure) -> None:
    """Raise `FileFormatError` unless the tensors have the shapes that the layout demands, all in one floating dtype."""
    tensors = kept.tensors()
    if isinstance(kept, Mixed):
        for part in kept.parts:
            check_structure(part)
        _check_dtypes({f"{i}": value for i, part in enumerate(kept.parts) for value in part.per_block()[:1]})
    elif isinstance(kept, LowRank):
        _check_dtypes(tensors)
        _check_shapes({"basis": kept.basis}, {"basis": (kept.layout.numel, kept.basis.shape[-1])})
        rank = kept.basis.shape[-1]
        _check_shapes({"core": kept.core}, {"core": (rank, rank)})
        if kept.image is not None:
            _check_shapes({"image": kept.image}, {"image": (kept.layout.numel, rank)})
    elif isinstance(kept, EKFAC):
        _check_dtypes(tensors)
        _check_shapes(tensors, _rotated_shapes(kept))
    elif isinstance(kept, Dual):
        for name, value in tensors.items():
            if not name.endswith(COUNTS):  # a projection is kept in double precision beside factors in single
                _check_dtypes({name: value})
        _check_dual(kept)
    else:
        found = next(iter(tensors.values())).dtype
        dtype = found if found in DTYPES else torch.float32
        # on the device without memory: a file may claim any size
        reference = first(kept.recipe, kept.layout, dtype, torch.device("meta"), kept.options.get("rank")).tensors()
        _check_shapes(tensors, {name: tuple(value.shape) for name, value in reference.items()})
        odd = [name for name, value in tensors.items() if value.dtype != reference[name].dtype]
        if odd:
            raise FileFormatError(f"the curvature's tensor {odd[0]!r} is of {tensors[odd[0]].dtype}")


def _rotated_shapes(kept: EKFAC) -> dict[str, tuple[int, ...]]:
    """Of the values, and of those bases that are there: a block may have none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (block, inner, outer) in enumerate(zip(kept.layout.blocks, kept.inner, kept.outer, strict=True)):
        shapes[f"values.{i}"] = (block.groups, block.rows, block.columns)
        if inner is not None:
            shapes[f"inner.{i}"] = (block.groups, block.columns, block.columns)
        if outer is not None:
            shapes[f"outer.{i}"] = (block.groups, block.rows, block.rows)
    return shapes


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    dtypes = {value.dtype for value in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise FileFormatError(f"the curvature is in {sorted(map(str, dtypes))}; expected one of {DTYPES}")


def _check_dual(kept: Dual) -> None:
    for piece in kept.pieces:
        for factor, block in zip(piece, kept.layout.blocks, strict=True):
            _check_factor(factor, block)
    rows = len(kept.kernel(1.0))  # a product of all factors with each other, which predictions need too
    if kept.basis is not None:
        _check_shapes({"basis": kept.basis}, {"basis": (rows, kept.basis.shape[-1])})
        rows = kept.basis.shape[-1]
    if kept.core is not None:
        _check_shapes({"core": kept.core}, {"core": (rows, rows)})
    blocks = kept.layout.blocks
    expected = {f"gap.{j}": (b.groups, b.rows, b.columns) for j, b in enumerate(blocks)} if kept.gap else {}
    _check_shapes({f"gap.{j}": value for j, value in enumerate(kept.gap)}, expected)


def _check_factor(factor: Factor, block: Block) -> None:
    if isinstance(factor, LinearFactor):
        whole = factor.a.dim() == 4 and factor.g.dim() == 5
        sizes = (len(factor.a), factor.a.shape[-1], factor.g.shape[-1]) if whole else ()
        if sizes != (block.groups, block.columns, block.rows):
            raise FileFormatError(f"the factors of block {block.name!r} are not of its {block.rows} x {block.columns}")
    elif not bool(((factor.index >= 0) & (factor.index < block.columns)).all()):
        raise FileFormatError(f"the factors of block {block.name!r} are of rows beyond its {block.columns}")


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            there, here = shapes.get(name, "absent"), expected.get(name, "absent")
            raise FileFormatError(f"the curvature's tensor {name!r} is {there}; expected {here}")


def _check_number(value: object, least: int, end: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
        raise FileFormatError(f"{what} is {str(value)[:40]}; expected a whole number from {least} to below {end}")
