"""The folder of a chain, as readers see it: one file a sample, and an index that only grows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from bayesdl.errors import FileFormatError
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.assembling import PROBE, assembled, decoded
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.sampled import Sampled
from bayesdl.tensorfile import DIGEST, KEY, read_described

BASE, INDEX, RESUME, LOCK = "base.safetensors", "index.jsonl", "resume.safetensors", "lock"
SAMPLE = "sample-{:06d}.safetensors"


@final
class SampleStore:
    """Reads the folder that `bdl.Chain(store=...)` writes, at any moment, also while it is being written.

        base.safetensors            buffers at the start (and the parameters that "bfloat16-delta" is relative to),
                                    names and shapes of the sampled parameters, a hash of everything else
        sample-000017.safetensors   the sampled parameters, and the buffers that training has changed
        index.jsonl                 one line a sample: see `SampleRecord`
        resume.safetensors          everything that decides the steps after the last sample

    Args:
        path: the folder.

    Raises:
        FileFormatError: it holds no chain, or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header, self.base = read_described(self.path / BASE)
        if self.header.get("kind") != "chain":
            raise FileFormatError(f"{self.path / BASE} is no base of a chain")
        if not _is_base(self.header):
            raise FileFormatError(f"{self.path / BASE} is damaged: its header does not describe a chain")

    @property
    def chain(self) -> int:
        """Number of the chain."""
        return int(self.header["chain"])

    def records(self) -> list[SampleRecord]:
        """Of all samples collected so far, those dropped again among them."""
        return read_index(self.path / INDEX)[0]

    def kept(self) -> list[SampleRecord]:
        """Of the samples that can be read."""
        return kept_of(self.records())

    def read(self, record: SampleRecord) -> dict[str, Tensor]:
        """Tensors of one sample by name.

        Raises:
            FileFormatError: the file is damaged, another than the index says, or was dropped since.
        """
        try:
            values = decoded(read_sample(self.path, record), self.base)
        except RuntimeError as error:  # a difference to a base of another shape
            raise FileFormatError(f"{self.path / str(record.file)} is damaged: {error}") from error
        self._check(record, values)
        return values

    def _check(self, record: SampleRecord, values: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(shape) for name, (shape, _) in self.header["sampled"].items()}
        buffers = {name: tuple(value.shape) for name, value in self.base.items() if name not in shapes}
        found = {name: tuple(value.shape) for name, value in values.items() if name != PROBE}
        odd = [name for name, shape in found.items() if {**buffers, **shapes}.get(name) != shape]
        odd += sorted(set(shapes) - set(found))
        if odd or not all(values[name].is_floating_point() for name in shapes):
            raise FileFormatError(
                f"{self.path / str(record.file)} is no sample of this chain: see {odd or 'its dtypes'}"
            )

    def posterior(self, net: nn.Module) -> SamplePosterior:
        """The samples kept, for the network they are of, where it is.

        Raises:
            FileFormatError: another network: in its parameters' shapes, or the values of those that are not sampled.
            NotFittedError: fewer than two samples.
        """
        named = dict(self.header["sampled"])
        sampled = Sampled(net, list(named), "keep", "float32")
        check_network(self.path, self.header, sampled)
        return assembled(self._all(), sampled.device)

    def _all(self) -> list[tuple[SampleRecord, dict[str, Tensor], dict[str, Tensor]]]:
        kept = self.kept()
        try:
            return [(record, self.read(record), self.base) for record in kept]
        except FileFormatError:
            if self.kept() == kept:
                raise
            return self._all()  # the writer dropped a sample meanwhile


def check_network(path: Path, header: Mapping[str, Any], sampled: Sampled) -> None:
    """Raise `FileFormatError` unless the folder's samples are of this network."""
    mine = {"sampled": sampled.shapes(), "others": sampled.fingerprint()}
    for key, what in (("sampled", "sampled parameters"), ("others", "values of the parameters that are not sampled")):
        if header[key] != mine[key]:
            raise FileFormatError(
                f"{path} holds the chain of another network: it has other {what} ({_brief(header[key])}, here "
                f"{_brief(mine[key])}); give the network that the chain was begun with, or another folder"
            )


def read_index(path: Path) -> tuple[list[SampleRecord], list[int]]:
    """Records, and the length of the file in bytes after each; a last line without its end is left out.

    Raises:
        FileFormatError: a line in the middle is damaged.
    """
    records: list[SampleRecord] = []
    ends: list[int] = []
    content = path.read_bytes() if path.exists() else b""
    *lines, _ = content.split(b"\n")
    for number, line in enumerate(lines):
        try:
            record = SampleRecord.from_json(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise FileFormatError(f"{path}: line {number + 1} is damaged: {error}") from error
        if record.id != number or any(dropped >= number for dropped in record.drops):
            raise FileFormatError(f"{path}: line {number + 1} is damaged: it is of sample {record.id}")
        records.append(record)
        ends.append((ends[-1] if ends else 0) + len(line) + 1)
    return records, ends


def kept_of(records: list[SampleRecord]) -> list[SampleRecord]:
    """Those with a file that no later sample took the place of."""
    dropped = {number for record in records for number in record.drops}
    return [record for record in records if record.file is not None and record.id not in dropped]


def read_sample(folder: Path, record: SampleRecord) -> dict[str, Tensor]:
    """Tensors as stored.

    Raises:
        FileFormatError: no such file, a damaged one, or another than the record says.
    """
    from safetensors import safe_open

    path = folder / str(record.file)
    tensors = read_described(path)[1]
    if record.digest is None:  # a rank that does not write knows the sample and not its file
        return tensors
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()[KEY])[DIGEST]
    except OSError as error:
        raise FileFormatError(f"{path} was dropped while it was read") from error
    if found != record.digest:
        raise FileFormatError(
            f"{path} is not the sample that the index speaks of: digest {found[:12]}, expected {record.digest[:12]}"
        )
    return tensors


def _is_base(header: Mapping[str, Any]) -> bool:
    sampled, chain = header.get("sampled"), header.get("chain")
    if not isinstance(sampled, dict) or not isinstance(header.get("others"), str):
        return False
    if isinstance(chain, bool) or not isinstance(chain, int) or not 0 <= chain < 1 << 62:
        return False
    pairs = [value for value in sampled.values() if isinstance(value, list) and len(value) == 2]
    return len(pairs) == len(sampled) and all(
        isinstance(shape, list) and all(isinstance(n, int) for n in shape) and isinstance(dtype, str)
        for shape, dtype in pairs
    )


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else f"{len(value)} tensors"
