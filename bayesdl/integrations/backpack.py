"""Curvature from BackPACK as a second source, computed on a private copy that BackPACK may hook as it likes.

BackPACK (Dangel, Kunstner, Hennig 2020) computes the same generalised Gauss-Newton matrix by code of its own. Where it
is right the two agree, which is what this is for; where it is known to be wrong this refuses: its Kronecker factors of
convolutions are mis-scaled, and it has no account of weights used twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.clone import independent_copy
from bayesdl.curvature.diag import Diag
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import check_curvature
from bayesdl.curvature.plan import plan
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches, in_batch, peek
from bayesdl.errors import ArgumentError, UnsupportedError, require
from bayesdl.likelihoods import Categorical, Gaussian, Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector

__all__ = ["estimate"]

# BackPACK's extension, and the attribute of a parameter in which it leaves the result
EXTENSIONS = {"diag": ("DiagGGNExact", "diag_ggn_exact"), "kron": ("KFLR", "kflr")}


def estimate(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    structure: str = "diag",
    select: Selector = "all",
    batch: str | BatchAdapter | None = None,
    allow_partial: bool = False,
    progress: bool = True,
) -> Structure:
    """The exact GGN `sum_n J_n^T Lambda_n J_n` by BackPACK, in the structures of this library.

    Equal to `bayesdl.curvature.estimate(model, data, likelihood, structure=structure, kind="ggn", bias=...)` with
    `bias="joint"` for "diag" and `bias="separate"` for "kron", and usable wherever that is.

    Args:
        model: an `nn.Sequential` (nested ones are fine) of layers that BackPACK knows, each used once. It is never
            written to: BackPACK's hooks go to a copy in memory of its own, in eval mode.
        data: loader of batches.
        likelihood: "categorical", or "gaussian" with its noise given.
        structure: "diag"; or "kron", where all selected parameters belong to linear layers.
        select: which parameters; see `bayesdl.select.resolve`.
        batch: batch adapter.
        allow_partial: accept a loader that skips part of its data set (drop_last).
        progress: whether to show progress bars.

    Raises:
        MissingDependencyError: BackPACK is not installed.
        ArgumentError: another structure.
        UnsupportedError: another kind of network or likelihood, or a case in which BackPACK is known to be wrong.
    """
    if structure not in EXTENSIONS:
        raise ArgumentError(f"structure={structure!r}; BackPACK is asked for one of {sorted(EXTENSIONS)}")
    family = resolve(likelihood)
    if not (isinstance(family, Categorical) or (isinstance(family, Gaussian) and family.noise is not None)):
        raise UnsupportedError(
            f"BackPACK differentiates the losses of the categorical likelihood and of a gaussian with its noise given, "
            f"not of {family!r}; use bayesdl.curvature.estimate"
        )
    data, first = peek(data)
    inputs = resolve_adapter(batch)(first)[0]
    network = Network(model, select=select, batch=batch, example=inputs)
    layout = plan(network, inputs, "separate" if structure == "kron" else "joint")
    _check_supported(network, layout, structure)
    dtype = torch.promote_types(network.dtype or torch.float32, torch.float32)
    curvature = (Diag if structure == "diag" else Kron).empty(layout, dtype, network.device)
    with torch.inference_mode(False), torch.enable_grad():
        passes = _Passes(model, network, family, structure)
        for number, rows, target in batches(network, data, progress=progress, allow_partial=allow_partial):
            with in_batch(number):
                results = passes(network.prepare(rows), target)
                if isinstance(curvature, Diag):
                    _add_diagonals(curvature, results)
                elif isinstance(curvature, Kron):
                    _add_factors(curvature, results, passes.size)
                curvature.check_finite()
    check_curvature(curvature)
    return curvature


class _Passes:
    """A copy of the network with BackPACK's hooks on it; a call is one forward and one backward pass over a batch."""

    def __init__(self, model: nn.Module, network: Network, likelihood: Likelihood, structure: str) -> None:
        self.backpack = require("backpack", extra="laplace")
        extension, self.attribute = EXTENSIONS[structure]
        self.extension = getattr(require("backpack.extensions", extra="laplace"), extension)()
        self.network, self.likelihood = network, likelihood
        copy = independent_copy(model)
        for parameter in copy.parameters():
            parameter.requires_grad_(True)
        for module in copy.modules():  # the same values in a chain of layers, and BackPACK reads what each was given
            if getattr(module, "inplace", False) is True:
                module.__dict__["inplace"] = False
        self.parameters = dict(copy.named_parameters())
        self.module = self.backpack.extend(copy.eval())
        regression = isinstance(likelihood, Gaussian)
        loss = nn.MSELoss(reduction="sum") if regression else nn.CrossEntropyLoss(reduction="sum")
        self.loss = self.backpack.extend(loss)
        self.size = 0

    def __call__(self, call: Any, target: Any) -> dict[str, Any]:
        """What BackPACK found, by name of the selected parameter."""
        raw = self.module(*call.args)
        f = self.likelihood.check_outputs(raw.detach())
        y = self.likelihood.check_targets(f, target)
        if self.likelihood.num_counted(y) != len(y):
            raise UnsupportedError("BackPACK knows no targets that are left out (ignore_index)")
        self.size = len(y)
        if isinstance(self.likelihood, Gaussian):
            # the Hessian of a squared error is 2; that of the likelihood 1 / noise^2
            weight = 0.5**0.5 / self.likelihood.scale(f)
            scaled = self._rescaled(weight)
            value = self.loss(scaled(raw), weight * y)
        else:
            value = self.loss(raw, y)
        with self.backpack.backpack(self.extension):
            try:
                value.backward()
            except NotImplementedError as error:
                raise UnsupportedError(f"BackPACK cannot: {str(error).splitlines()[0]}") from error
        return {name: getattr(self.parameters[name], self.attribute) for name in self.network.names}

    def _rescaled(self, weight: Tensor) -> nn.Module:
        # without the random numbers of an ordinary start
        layer = nn.utils.skip_init(nn.Linear, len(weight), len(weight), bias=False, device=weight.device)
        layer.weight = nn.Parameter(torch.diag(weight))
        return self.backpack.extend(layer)


def _check_supported(network: Network, layout: Layout, structure: str) -> None:
    seen: set[int] = set()
    for name, module in network.template.named_modules(remove_duplicate=False):
        held = [id(module), *(id(p) for p in module._parameters.values() if p is not None)]
        if module._modules and type(module) is not nn.Sequential:
            raise UnsupportedError(
                f"module {name or 'network'!r} is a {type(module).__name__}; BackPACK is used for nn.Sequential alone, "
                "because nothing checks what it makes of other connections. Use bayesdl.curvature.estimate"
            )
        if any(i in seen for i in held):
            raise UnsupportedError(
                f"module {name!r} shares a layer or a parameter with another; BackPACK miscounts those"
            )
        seen.update(held)
    if structure != "kron":
        return
    for block in layout.blocks:
        for path in block.modules or (block.name,):
            module = network.template.get_submodule(path) if block.modules else None
            if not isinstance(module, nn.Linear):
                raise UnsupportedError(
                    f"layer {path!r} is no linear layer: BackPACK mis-scales the Kronecker factors of convolutions and "
                    'has none of other layers; use structure="diag", or bayesdl.curvature.estimate'
                )


def _add_diagonals(curvature: Diag, results: dict[str, Tensor]) -> None:
    for block, total in zip(curvature.layout.blocks, curvature.diagonal, strict=True):
        total += block.pack({name: results[name].to(total) for name in block.parameters})


def _add_factors(curvature: Kron, results: dict[str, list[Tensor]], size: int) -> None:
    parts = zip(curvature.layout.blocks, curvature.inner, curvature.outer, curvature.rows, strict=True)
    for block, inner, outer, rows in parts:
        found = results[block.parameters[0]]
        if inner.dim() == 0:  # a long bias, of which the diagonal is kept
            outer += found[0].diagonal().to(outer).reshape(outer.shape)
            continue
        outer += found[0].to(outer)
        # BackPACK's input factor is the mean over the batch; a bias meets the constant one
        inner += size * found[1].to(inner) if block.kind == "linear" else size
        rows += size
