"""Features of a whole data set, computed once: in memory, or in a temporary file where they are too many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, BayesDLError, ShapeError, check_finite
from bayesdl.last_layer.features import AGREEMENT, features
from bayesdl.likelihoods.base import Likelihood
from bayesdl.network import Network

_FOLLOWED = (
    "layer {!r} applied to its features does not give the network's outputs: something follows the layer. A Bayesian "
    "last layer needs the layer whose output is the network's output"
)


def each_batch(
    network: Network, layer: str, data: Iterable[Any], *, progress: bool
) -> Iterator[tuple[int, Tensor, Any]]:
    """Yield `(number, features (B, ..., d), target)`; the first batch proves that the layer makes the outputs.

    Raises:
        ShapeError: the layer applied to the features is not the network's output (something follows the layer).
        NonFiniteError: NaN or infinity in the features; the batch is named.
    """
    with torch.no_grad():
        for number, inputs, target in batches(network, data, progress=progress, describe="features"):
            with in_batch(number):
                if number:
                    phi = features(network, layer, inputs)
                else:
                    phi = proven(network, layer, inputs)
                check_finite(phi, "features")
            yield number, phi, target


def observations(
    network: Network, layer: str, likelihood: Likelihood, outputs: int, data: Iterable[Any], *, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features `(M, d)` and checked targets `(M, ...)` of the observations that count: positions are rows.

    Args:
        network: read for its features.
        layer: the last layer.
        likelihood: checks the targets.
        outputs: K, numbers per observation that the layer makes.
        data: loader.
        progress: show a bar.

    Raises:
        ArgumentError: every target of the data is ignored.
        ShapeError, LabelError, NonFiniteError: as `each_batch` and the likelihood.
    """
    found = False
    for number, phi, target in each_batch(network, layer, data, progress=progress):
        with in_batch(number):
            made = likelihood.check_outputs(phi.new_zeros(*phi.shape[:-1], outputs))
            y = likelihood.check_targets(made, target)
        mask = likelihood.counted(y)
        rows = phi.flatten(0, -2)
        goal = y if made.dim() == 2 else y.flatten()
        if mask is not None and not bool(mask.all()):
            keep = mask.flatten()
            rows, goal = rows[keep], goal[keep]
        if len(rows):
            found = True
            yield rows, goal
    if not found:
        raise ArgumentError("every target of the data is ignored; at least one has to count")


@contextmanager
def gathered(parts: Iterable[tuple[Tensor, Tensor]], budget: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All features `(N, d)` and targets of `parts`; features beyond `budget` bytes live in a temporary file."""
    with tempfile.TemporaryDirectory(prefix="bayesdl-") as folder, (Path(folder) / "features").open("wb") as file:
        held: list[Tensor] = []
        targets: list[Tensor] = []
        rows = size = spilled = width = 0
        dtype, device = torch.float32, torch.device("cpu")
        for phi, y in parts:
            rows, width, dtype, device = rows + len(phi), phi.shape[1], phi.dtype, phi.device
            held.append(phi)
            targets.append(y)
            size += phi.numel() * phi.element_size()
            if size > budget:
                spilled += _spill(file, held)
                held, size = [], 0
        if not spilled:
            yield torch.cat(held), torch.cat(targets)
            return
        _spill(file, held)
        file.flush()
        mapped = torch.from_file(file.name, shared=False, size=rows * width, dtype=dtype).reshape(rows, width)
        yield mapped.to(device), torch.cat(targets)


def _spill(file: BinaryIO, held: list[Tensor]) -> int:
    for phi in held:
        file.write(phi.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return len(held)


def proven(network: Network, layer: str, inputs: Any) -> Tensor:
    """Features of a batch for which the layer makes the network's outputs from them.

    Raises:
        ShapeError: it does not.
    """
    outputs = network(inputs)
    try:
        phi = features(network, layer, inputs)
        found = network.module().get_submodule(layer)(phi)
    except RuntimeError as error:
        if isinstance(error, BayesDLError):
            raise
        raise ShapeError(
            f"{_FOLLOWED.format(layer)} (the rest of the network cannot take its features: {error})"
        ) from error
    found = getattr(found, "logits", found)
    if found.shape != outputs.shape or not torch.allclose(
        found, outputs, rtol=AGREEMENT, atol=AGREEMENT * float(outputs.abs().max().clamp(min=1e-6))
    ):
        raise ShapeError(_FOLLOWED.format(layer))
    return phi
