"""Curvature from batches that the user's own loop hands over, interruptible at any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.curvature.intact import check_layout
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe, check_recipe, check_shared
from bayesdl.curvature.run import Run, read_run
from bayesdl.curvature.structure import Structure
from bayesdl.data import check_batch, in_batch
from bayesdl.errors import ArgumentError, FileFormatError, NotFittedError
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector, describe
from bayesdl.tensorfile import DAMAGE


@final
class Accumulator:
    """Sums curvature batch by batch: for streams of any length, and for fits that must survive an interruption.

        acc = bdl.curvature.Accumulator(net, "categorical", structure="ekfac")
        acc.resume("fit.safetensors")                  # False where there is no such file yet
        while True:
            for number, batch in enumerate(loader):    # in the same order every time
                if number < acc.batches:               # read before the interruption
                    continue
                acc.update(batch)
                if number % 100 == 0:
                    acc.save("fit.safetensors")
            if not acc.next_pass():                    # "kron", "diag" and "full" take one pass
                break
        curvature = acc.result()

    An interrupted and resumed fit gives the same bits as one that was not. The memory taken is that of the structure
    and of one chunk of a batch.

    Args:
        model: trained network; never written to.
        likelihood, structure, kind, select, bias, batch, samples, generator, dtype, memory, rank, shared, classes: see
            `bayesdl.curvature.estimate`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        structure: Recipe = "kron",
        kind: str = "ggn",
        select: Selector = "all",
        bias: str = "joint",
        batch: str | BatchAdapter | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        rank: int | None = None,
        shared: str = "expand",
        classes: int | None = None,
    ) -> None:
        check_recipe(structure, rank)
        check_shared(structure, shared)
        self._model, self._likelihood, self._select, self._bias = model, resolve(likelihood), select, bias
        self._batch = batch
        self._options: dict[str, Any] = {
            "structure": structure,
            "kind": kind,
            "samples": samples,
            "generator": generator,
            "dtype": dtype,
            "memory": memory,
            "rank": rank,
            "shared": shared,
            "classes": classes,
        }
        self._run: Run | None = None

    @property
    def batches(self) -> int:
        """Read in the present pass."""
        return 0 if self._run is None else self._run.batches

    @property
    def examples(self) -> int:
        """Read in the present pass."""
        return 0 if self._run is None else self._run.examples

    @property
    def number(self) -> int:
        """Of the present pass, from 0."""
        return 0 if self._run is None else self._run.number

    def update(self, batch: Any) -> None:
        """Add one batch.

        Raises:
            NonFiniteError, ShapeError, LabelError: bad data; the message says which batch. What this batch had added
                before it was found is in the sums: go on from a saved file, or anew.
            UnsupportedError: the network or the size does not allow this structure.
        """
        with torch.inference_mode(False):
            if self._run is None:
                self._run = self._begin(batch)
            number = self._run.batches
            with in_batch(number):
                inputs, target = check_batch(self._run.network.batch(batch))
            self._run.add(number, inputs, target)

    def next_pass(self) -> bool:
        """End the pass: whether `update` must be given all the batches once more.

        Raises:
            NotFittedError: no batch was given in this pass.
            ArgumentError: two passes saw different data.
            NumericalError: the curvature is exactly zero.
        """
        with torch.inference_mode(False):
            return self._running().next_pass()

    def result(self) -> Structure:
        """The curvature. After `next_pass()` was False, or for structures of one pass at any time: of the data so far.

        Raises:
            NotFittedError: no batch was given, or the structure needs another pass.
            NumericalError: the curvature is exactly zero.
        """
        return self.fit().curvature

    def fit(self) -> Fit:
        """The curvature with its side results: count, log-likelihood, squared residuals."""
        run = self._running()
        if run.number + 1 < run.passes:
            raise NotFittedError(
                f"structure={run.structure!r} takes {run.passes} passes over the data and this is pass "
                f"{run.number + 1}: call next_pass() at the end of the data, and read them again"
            )
        return run.fit()

    def save(self, path: str | Path) -> None:
        """Write the state atomically: the old file or the new one, whenever the process dies.

        Raises:
            NotFittedError: no batch was given.
        """
        self._running().save(path, **self._settings())

    def resume(self, path: str | Path) -> bool:
        """Go on where a saved accumulator was; False, and nothing happens, where there is no such file.

        Raises:
            FileFormatError: another network, other settings, or a damaged file.
            ArgumentError: this accumulator has been given batches already.
        """
        if self._run is not None:
            raise ArgumentError("this accumulator has been given batches already; resume() comes before the first")
        if not Path(path).exists():
            return False
        header, _ = read_run(path)
        with torch.inference_mode(False):
            try:
                layout = Layout.from_json(header["layout"])
                network = self._network([str(name) for name in layout.names])
                check_layout(layout, network)
            except DAMAGE as error:
                raise FileFormatError(f"{path} is damaged, or of another network: {error!r}") from error
            run = self._on(network, layout)
            run.resume(path, **self._settings())
        self._run = run
        return True

    def _begin(self, batch: Any) -> Run:
        network = self._network(self._select, resolve_adapter(self._batch)(batch)[0])
        return self._on(network, plan(network, network.batch(batch)[0], self._bias))

    def _on(self, network: Network, layout: Layout) -> Run:
        return Run(network, layout, self._likelihood, **self._options)

    def _network(self, select: Selector, example: Any = None) -> Network:
        axis = self._likelihood.output_axis
        return Network(self._model, select=select, batch=self._batch, example=example, output_axis=axis)

    def _running(self) -> Run:
        if self._run is None or not self._run.batches:
            raise NotFittedError("no batch was given yet: call update(batch) first")
        return self._run

    def _settings(self) -> dict[str, Any]:
        return {"select": describe(self._select), "bias": self._bias}
