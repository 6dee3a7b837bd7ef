"""A fit in progress: the pass that it is in, the sums so far, and the file that survives an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.curvature.intact import check_structure
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit, Tally, check_curvature, check_same_data
from bayesdl.curvature.registry import Recipe, check_recipe, check_shared, first, following, num_passes
from bayesdl.curvature.structure import Structure
from bayesdl.distributed import Group
from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.likelihoods import Likelihood
from bayesdl.network import Network
from bayesdl.tensorfile import DAMAGE, read_described, write_described

VERSION = 1


@final
class Run:
    """Batches in, curvature out; as many passes over the data as the structure takes.

    Args:
        network: whose curvature it is.
        layout: its blocks.
        likelihood, structure, kind, samples, generator, dtype, memory, rank, shared, classes: see
            `bayesdl.curvature.estimate`.

    Attributes:
        number: of the present pass, from 0.
        batches: read in the present pass.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        likelihood: Likelihood,
        *,
        structure: Recipe,
        kind: str,
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
        if dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(f"dtype={dtype}; curvature is summed in torch.float32 or torch.float64")
        self.network, self.layout, self.likelihood = network, layout, likelihood
        self.structure, self.kind, self.samples, self.memory, self.rank = structure, kind, samples, memory, rank
        self.shared, self.classes = shared, classes
        self.dtype = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
        if generator is None and (kind == "mc" or classes is not None):  # the global state is the user's
            generator = torch.Generator(network.device).manual_seed(0)
        self._generator = generator
        self._start = None if generator is None else generator.get_state()
        self.number = self.batches = 0
        self._before: Fit | None = None
        self._tally = self._fresh(
            first(structure, layout, self.dtype, network.device, rank).with_options({"shared": shared})
        )

    @property
    def passes(self) -> int:
        """How often the data are read."""
        return num_passes(self.structure)

    @property
    def examples(self) -> int:
        """Read in the present pass."""
        return self._tally.examples

    def add(self, number: int, inputs: Any, target: Any) -> None:
        """One batch; `number` is what errors call it."""
        self._tally.add(number, inputs, target)
        self.batches += 1

    def combine(self, group: Group) -> None:
        """Add up what all processes have read in this pass."""
        self._tally.combine(group)

    def fit(self) -> Fit:
        """What the present pass has found, of use only after the last one.

        Raises:
            NumericalError: the curvature is exactly zero.
        """
        found = self._tally.result()[0]
        check_curvature(found.curvature)
        return found

    def next_pass(self, group: Group | None = None) -> bool:
        """Whether all the data must be read again; this run then waits for them.

        Raises:
            NumericalError: the curvature is exactly zero.
            ArgumentError: the pass that ends read other data than the one before it.
        """
        found, absolute = self._tally.result()
        check_curvature(found.curvature)
        if self._before is not None:
            check_same_data(self._before, found, absolute, self.network.dtype or torch.float32)
        into = following(self.structure, found.curvature)
        if into is None:
            return False
        if group is not None:  # bases may differ between machines
            sums = into.sums()
            group.spread([value for name, value in into.tensors().items() if name not in sums])
        self.number, self.batches = self.number + 1, 0
        self._before, self._tally = found, self._fresh(into)
        return True

    def save(self, path: str | Path, **settings: Any) -> None:
        """Write everything that `resume` needs, atomically: the old file or the new one, whenever the process dies."""
        tally = self._tally
        header = {
            "run": VERSION,
            "settings": self._settings() | settings,
            "layout": self.layout.to_json(),
            "number": self.number,
            "batches": self.batches,
            "count": tally.count,
            "examples": tally.examples,
            "parts": len(tally.parts),
            "before": None if self._before is None else [self._before.num_data, self._before.log_likelihood],
        }
        tensors = {"scores": tally.scores}
        for prefix, kept in (("curvature", tally.curvature), *((f"part.{c}", p) for c, p in enumerate(tally.parts))):
            tensors |= {f"{prefix}.{name}": value for name, value in kept.tensors().items()}
        if tally.squared is not None:
            tensors["squared"] = tally.squared
        if self._generator is not None and self._start is not None:
            tensors |= {"generator": self._generator.get_state(), "start": self._start}
        write_described(Path(path), header, tensors)

    def resume(self, path: str | Path, **settings: Any) -> bool:
        """Go on where a saved run was; False where there is no such file.

        Raises:
            FileFormatError: another network, other settings, or no file of a run.
        """
        if not Path(path).exists():
            return False
        header, tensors = read_run(path)
        mine = {"layout": self.layout.to_json(), **self._settings(), **settings}
        if not isinstance(header.get("settings"), dict) or "layout" not in header:
            raise FileFormatError(f"{path} is damaged: it does not say what it is a fit of")
        theirs = {"layout": header["layout"], **header["settings"]}
        for key, value in json.loads(json.dumps(mine)).items():
            if theirs.get(key) != value:
                what = f": {theirs.get(key)!r} there, {value!r} here" if key != "layout" else ""
                raise FileFormatError(
                    f"{path} belongs to a fit with another {key}{what}; delete the file to start anew, or give the "
                    "settings and the network that it was begun with"
                )
        try:
            self._restore(header, {name: value.to(self.network.device) for name, value in tensors.items()})
        except DAMAGE as error:
            raise FileFormatError(f"{path} is damaged: {error!r}") from error
        return True

    def _restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        empty = self._tally.curvature
        for _ in range(int(header["number"])):  # the kind of structure that this pass fills
            into = following(self.structure, empty)
            if into is None:
                raise FileFormatError("the file holds a later pass than this structure takes")
            empty = into

        def kept(prefix: str) -> Structure:
            own = {n[len(prefix) + 1 :]: v for n, v in tensors.items() if n.startswith(prefix + ".")}
            found = empty.with_tensors(own)
            check_structure(found)
            expected = {name: value.dtype for name, value in empty.tensors().items()}
            if {name: value.dtype for name, value in found.tensors().items()} != expected:
                raise FileFormatError("the sums are of another dtype")
            return found

        for name in ("number", "batches", "parts", "count", "examples"):
            if type(header[name]) is not int or not 0 <= header[name] < 1 << 62:
                raise FileFormatError(f"{name} is {str(header[name])[:80]}; expected a whole number from zero")
        tally = self._fresh(kept("curvature"))
        tally.parts = tuple(kept(f"part.{c}") for c in range(int(header["parts"])))
        tally.count, tally.examples = int(header["count"]), int(header["examples"])
        tally.scores, tally.squared = tensors["scores"], tensors.get("squared")
        for sums, shape in ((tally.scores, (2,)), (tally.squared, None)):
            wrong = sums is not None and (sums.dtype is not torch.float64 or sums.dim() != 1)
            if wrong or (sums is not None and shape not in (None, tuple(sums.shape))):
                raise FileFormatError("the sums of the log-likelihood or of the squared errors are damaged")
        self.number, self.batches, self._tally = int(header["number"]), int(header["batches"]), tally
        if header["before"] is not None:
            count, score = header["before"]
            self._before = Fit(empty, (), int(count), float(score), None)
        if self._generator is not None:
            self._generator.set_state(tensors["generator"].cpu())
            self._start = tensors["start"].cpu()

    def _fresh(self, into: Structure) -> Tally:
        if self._generator is not None and self._start is not None:
            self._generator.set_state(self._start)  # every pass draws the same targets
        source, kind = self._generator, self.kind
        return Tally(
            self.network, into, self.likelihood, kind, self.samples, source, self.dtype, self.memory, self.classes
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "network (fingerprint)": self.network.fingerprint(),
            "selection": list(self.network.names),
            "likelihood": [self.likelihood.name, self.likelihood.config()],
            "structure": self.structure
            if isinstance(self.structure, str)
            else [list(p) for p in self.structure.items()],
            "kind": self.kind,
            "samples": self.samples,
            "generator": self._generator is not None,
            "dtype": str(self.dtype),
            "memory": self.memory,
            "rank": self.rank,
            "shared": self.shared,
            "classes": self.classes,
        }


def read_run(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `Run.save` wrote.

    Raises:
        FileFormatError: it did not.
    """
    header, tensors = read_described(Path(path))
    if header.get("run") != VERSION:
        raise FileFormatError(f"{path} is no file of an unfinished fit of this version of the library")
    return header, tensors
