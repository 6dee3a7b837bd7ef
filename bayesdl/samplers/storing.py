"""Writing a chain's folder so that a kill at any moment loses at most the sample being written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers.memory import Values
from bayesdl.samplers.packing import pack, unpack
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.sampled import Sampled
from bayesdl.samplers.store import (
    BASE,
    INDEX,
    LOCK,
    RESUME,
    SAMPLE,
    SampleStore,
    check_network,
    read_index,
    read_sample,
)
from bayesdl.tensorfile import read_described, sync_folder, write_described


@final
class StoredSamples:
    """The one writer of a chain's folder.

    Order of writing: the sample (temporary file, fsync, rename, fsync of the folder); its line in the index, fsync; the
    resume file like a sample; only then are files removed that the sample took the place of. So whatever the resume
    file counts is there, and what came after it is cut and made again.

    Args:
        path: the folder; made at the first step.
        writes: False on the ranks of a data-parallel chain that only count along.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self._writes = Path(path), writes
        self._records: list[SampleRecord] = []
        self._dropped: set[int] = set()
        self._length = 0  # of the index in bytes
        self._dead: list[str] = []
        self._lock: weakref.finalize[[int], StoredSamples] | None = None

    def records(self) -> list[SampleRecord]:
        return list(self._records)

    def kept(self) -> list[SampleRecord]:
        return [record for record in self._records if record.file is not None and record.id not in self._dropped]

    def read(self, record: SampleRecord) -> dict[str, Tensor]:
        return read_sample(self.path, record)

    def begin(self, sampled: Sampled, settings: dict[str, Any], plan: int | None) -> None:
        """Make the folder. Raises `ArgumentError` where it holds a chain already, or the disk cannot hold the plan."""
        if not self._writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if (self.path / RESUME).exists() or (self.path / INDEX).exists():
            raise ArgumentError(
                f"{self.path} holds a chain already: call chain.resume() before the first step to go on with it, or "
                "give another folder"
            )
        need_room(self.path, sampled.planned(plan), f"the chain with max_samples={plan}")
        header = {"kind": "chain", **settings, "sampled": sampled.shapes(), "others": sampled.fingerprint()}
        write_described(self.path / BASE, header, _some(sampled.base))
        write_described(self.path / RESUME, {"kind": "resume", "records": 0, "tree": None}, _some({}))

    def add(self, record: SampleRecord, values: Values) -> None:
        last = self._records[-1] if self._records else None
        if last is not None and last.step == record.step and last.file is not None and last in self.kept():
            # the same theta_k once more: samplers in a time of their own collect long stays several times
            self._append(dataclasses.replace(record, file=last.file, digest=last.digest))
            return
        name, digest = SAMPLE.format(record.id), None
        if self._writes:
            need_room(self.path, sum(v.numel() * v.element_size() for v in values.values()))
            digest = write_described(self.path / name, {"kind": "sample", "id": record.id}, dict(values))
        self._append(dataclasses.replace(record, file=name, digest=digest))

    def skip(self, record: SampleRecord) -> None:
        self._append(record)

    def checkpoint(self, tree: Any) -> None:
        """Write the resume file; then remove what nothing refers to any more."""
        if not self._writes:
            return
        packed, tensors = pack(tree)
        header = {"kind": "resume", "records": len(self._records), "tree": packed}
        write_described(self.path / RESUME, header, _some(tensors))
        for name in self._dead:
            (self.path / name).unlink(missing_ok=True)
        self._dead = []

    def resume(self, sampled: Sampled, settings: dict[str, Any]) -> Any:
        """The tree of the last checkpoint, with the folder as it was then; None where there is none.

        Raises:
            FileFormatError: another network, other settings, or a damaged folder.
        """
        if not (self.path / RESUME).exists():
            if (self.path / INDEX).exists():
                raise FileFormatError(
                    f"{self.path} holds samples and no {RESUME}: read them with SampleStore, and begin a chain in "
                    "another folder"
                )
            self._clear()
            return None
        header, tensors = read_described(self.path / RESUME)
        count, packed = header.get("records"), header.get("tree")
        if type(count) is not int or count < 0 or "tree" not in header:
            raise FileFormatError(f"{self.path / RESUME} is damaged: it does not say how many samples it counts")
        self._open(sampled, settings, count)
        if packed is None:
            if self._writes:
                (self.path / INDEX).unlink(missing_ok=True)
                (self.path / RESUME).unlink()
                self._clear()
            return None
        tree = unpack(packed, tensors)  # before anything is cut
        self._cut()
        return tree

    def state(self) -> dict[str, Any]:
        """How many samples there are, for the checkpoints of somebody else's."""
        return {"count": len(self._records)}

    def load(self, state: dict[str, Any], sampled: Sampled, settings: dict[str, Any], tree: Callable[[], Any]) -> None:
        """Go back to such a state: `tree()` is that of the resume file to write, then later samples are cut.

        Raises:
            FileFormatError: as `resume`, and where a sample of then was dropped since.
        """
        self._open(sampled, settings, int(state["count"]))
        self.checkpoint(tree())
        self._cut()

    def _open(self, sampled: Sampled, settings: dict[str, Any], count: int) -> None:
        """Check the folder, and read the index up to `count` samples; nothing is written."""
        if self._writes:
            self._take_lock()
        store = SampleStore(self.path)
        check_network(self.path, store.header, sampled)
        for key, value in settings.items():
            if store.header.get(key) != value:
                raise FileFormatError(
                    f"{self.path} was written with {key}={store.header.get(key)!r}, and this chain has {key}={value!r}"
                    ": a resumed chain has the settings it was begun with"
                )
        records, ends = read_index(self.path / INDEX)
        if len(records) < count:
            raise FileFormatError(f"{self.path / INDEX} has {len(records)} lines, and {count} are needed to go on")
        self._records, self._length = records[:count], ends[count - 1] if count else 0
        self._dropped = {number for record in self._records for number in record.drops}
        for record in self.kept():
            if not (self.path / str(record.file)).exists():
                raise FileFormatError(f"{self.path / str(record.file)} is missing, and the index counts it")
        sampled.begin(store.base)

    def _cut(self) -> None:
        self._truncate()
        self._clear()

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def _append(self, record: SampleRecord) -> None:
        line = json.dumps(record.to_json()).encode() + b"\n"
        if self._writes:
            self._truncate()  # what a failed write left
            try:
                with open(self.path / INDEX, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                self._truncate()
                raise
            if not self._records:
                sync_folder(self.path)
            self._length += len(line)
        self._records.append(record)
        self._dropped.update(record.drops)
        self._dead += [str(self._records[number].file) for number in record.drops]
        used = {record.file for record in self.kept()}  # a file may be there under several records
        self._dead = [name for name in self._dead if name not in used]

    def _truncate(self) -> None:
        path = self.path / INDEX
        if self._writes and path.exists() and path.stat().st_size > self._length:
            with open(path, "r+b") as file:
                file.truncate(self._length)
                os.fsync(file.fileno())

    def _clear(self) -> None:
        """Remove temporary files, and samples that the index does not know."""
        if not self._writes or not self.path.is_dir():
            return
        names = {record.file for record in self.kept()}
        for pattern in (".base.*", ".resume.*", ".sample-*", "sample-*.safetensors"):
            for path in self.path.glob(pattern):
                if path.name not in names:
                    path.unlink()

    def _take_lock(self) -> None:
        if os.name != "posix" or self._lock is not None:
            return
        import fcntl

        # a record lock: it ends with the process, and workers that it forks do not hold it
        handle = os.open(self.path / LOCK, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise ArgumentError(f"another process is writing the chain in {self.path}: end it first") from error
        self._lock = weakref.finalize(self, os.close, handle)


def _some(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors or {"empty": torch.zeros(1)}


def need_room(path: Path, size: int, why: str = "the next sample") -> None:
    free = shutil.disk_usage(path).free
    if free < size:
        raise ArgumentError(
            f"the disk of {path} has {free / 2**20:.1f} MiB left, and {why} takes {size / 2**20:.1f} MiB: lower "
            'max_samples, raise thin, pass dtype="bfloat16-delta", or give a folder on another disk'
        )
