"""Several draws in one forward pass: rows repeated sample-major, in chunks of bounded size."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import Call, flatten_tensors
from bayesdl.errors import ShapeError, UnsupportedError
from bayesdl.lora.hooks import Injection
from bayesdl.network import Network

log = logging.getLogger(__name__)

TOKENS = 1 << 15  # tokens per forward pass where `max_rows` is not given
LEADERS = ("input_ids", "inputs_embeds", "pixel_values")
TOKEN_TYPES = (torch.int64, torch.int32)
Sharing = Callable[[nn.Module, tuple[int, ...], int], AbstractContextManager[None]]


@final
@dataclass(frozen=True)
class Rows:
    """A prepared call and what its tensors' first axes mean.

    Attributes:
        call: prepared inputs.
        count: B.
        positions: tokens of an item: T, the C T of multiple choice `(B, C, T)`, or 0 where inputs have no second axis.
        folds: second axes that a model may fold into its rows, so that layers see B C of them.
        flats: how many rows an item may become where a layer sees rows alone, `(B T, in)`.
    """

    call: Any
    count: int
    positions: int
    folds: tuple[int, ...] = ()
    flats: tuple[int, ...] = ()

    @classmethod
    def of(cls, call: Any) -> Rows:
        """Read off the leading tensor: "input_ids", or else the first one.

        Raises:
            ShapeError: there is none, or it is empty.
            UnsupportedError: keys whose rows belong to the adapter's own bookkeeping.
        """
        kwargs = dict(call.kwargs or {}) if isinstance(call, Call) else {}
        for key in ("adapter_names", "past_key_values"):
            if kwargs.get(key) is not None:
                raise UnsupportedError(f"the batch holds {key!r}: rows belong to draws while sampling; leave it out")
        tensors = flatten_tensors(call)[0]
        leader = next((kwargs[key] for key in LEADERS if isinstance(kwargs.get(key), Tensor)), None)
        leader = tensors[0] if leader is None and tensors else leader
        if leader is None or not len(leader):
            raise ShapeError("the batch is empty, or holds no tensor; expected at least one example")
        masks = {id(value) for key, value in kwargs.items() if "mask" in key}  # (B, T, T) are no texts of T options
        known = [t for t in tensors if len(t) == len(leader) and id(t) not in masks]
        parts = [t for t in known if t is leader or t.dtype in TOKEN_TYPES]
        folded = [t for t in parts if t.dim() > (2 if t.dtype in TOKEN_TYPES else 3)]
        flats = {t.shape[1] for t in parts if t.dim() > 1} | {t.shape[1] * t.shape[2] for t in folded}
        tokens = [t[0].numel() for t in parts if t.dtype in TOKEN_TYPES]
        if leader.dim() > 1 and leader.dtype not in TOKEN_TYPES:
            tokens.append(leader.shape[1])
        folds = sorted({t.shape[1] for t in folded})
        return cls(call, len(leader), max(tokens, default=0), tuple(folds), tuple(sorted(flats | set(folds))))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that layers may see for the items."""
        return (self.count, *(self.count * fold for fold in self.folds))

    def piece(self, start: int, stop: int) -> Rows:
        """Items start..stop-1."""
        call = self._mapped(lambda tensor: tensor[start:stop])
        return replace(self, call=call, count=min(stop, self.count) - start)

    def tiled(self, times: int) -> Any:
        """The call with every item repeated, sample-major."""
        if times == 1:
            return self.call
        return self._mapped(lambda tensor: tensor.repeat(times, *(1,) * (tensor.dim() - 1)))

    def ambiguous(self, draws: int) -> bool:
        """Whether another axis of some input has as many entries as a pass of so many draws may have rows."""
        rows = {draws * size for size in self.sizes}
        return any(rows & set(tensor.shape[1:]) for tensor in flatten_tensors(self.call)[0])

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Any:
        tensors, rebuild = flatten_tensors(self.call)
        return rebuild([function(t) if len(t) == self.count else t for t in tensors])


def without_cache(call: Any, module: nn.Module) -> Any:
    """The call with `use_cache=False` where the model has such a switch: nobody reads the keys and values."""
    config = getattr(module, "config", None)
    switch = getattr(config, "use_cache", None) if not isinstance(config, dict) else config.get("use_cache")
    if not isinstance(call, Call) or call.args or switch is not True or not _takes_switch(module):
        return call
    return Call((), {"use_cache": False, **(call.kwargs or {})})


def _takes_switch(module: nn.Module) -> bool:
    peft: Any = module
    below = peft.get_base_model() if hasattr(peft, "get_base_model") else peft
    parameters = inspect.signature(below.forward).parameters.values()
    # a network of one's own around a model of transformers may show its config, and pass nothing on
    passed_on = hasattr(below, "config_class") and any(p.kind is p.VAR_KEYWORD for p in parameters)
    return passed_on or any(p.name == "use_cache" for p in parameters)


def run(
    network: Network,
    call: Any,
    injection: Injection,
    start: int,
    stop: int,
    *,
    max_rows: int | None = None,
    tile: bool = True,
    sharing: Sharing | None = None,
) -> Tensor:
    """Outputs `(S, B, C)` of draws start..stop-1 at one batch.

    Args:
        network: the private view; its clone of this thread is run.
        call: prepared inputs.
        injection: the noise.
        start, stop: draws.
        max_rows: rows per forward pass; default about `TOKENS` tokens.
        tile: False runs draws one by one.
        sharing: computes blocks in front of all noise once for all draws.

    Raises:
        ShapeError: outputs without one row per input row.
    """
    module = network.module()
    rows = Rows.of(without_cache(call, module))
    limit = max_rows or max(1, TOKENS // max(1, rows.positions))
    with injection.attached(module):
        while True:
            try:
                return _chunked(network, module, rows, injection, start, stop, limit, tile, sharing)
            except torch.cuda.OutOfMemoryError:
                if limit <= 1:
                    raise
                limit = min(limit, rows.count * (stop - start)) // 2 or 1
                log.info("out of memory: %d rows per forward pass from now on", limit)


def _chunked(
    network: Network,
    module: nn.Module,
    rows: Rows,
    injection: Injection,
    start: int,
    stop: int,
    limit: int,
    tile: bool,
    sharing: Sharing | None,
) -> Tensor:
    width = min(rows.count, limit)
    if injection.sigma == 0:  # every draw is the network itself
        parts = [network.forward(module, piece.call) for piece in pieces(rows, width)]
        return torch.cat(parts).unsqueeze(0).expand(stop - start, *(-1,) * parts[0].dim())
    together = max(1, limit // width) if tile else 1
    chunks = []
    for first in range(start, stop, together):
        last = min(first + together, stop)
        parts = [_forward(network, module, piece, injection, first, last, sharing) for piece in pieces(rows, width)]
        chunks.append(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def pieces(rows: Rows, width: int) -> Iterator[Rows]:
    """A batch in parts of at most `width` items."""
    if width >= rows.count:
        yield rows
        return
    for first in range(0, rows.count, width):
        yield rows.piece(first, first + width)


def _forward(
    network: Network,
    module: nn.Module,
    rows: Rows,
    injection: Injection,
    start: int,
    stop: int,
    sharing: Sharing | None,
) -> Tensor:
    count = stop - start
    total = rows.count * count
    shared = sharing is not None and count > 1 and not rows.ambiguous(count)
    context = sharing(module, rows.sizes, count) if shared and sharing is not None else nullcontext()
    with context, injection.drawing(start, stop, total, rows.folds, rows.flats):
        output = network.forward(module, rows.tiled(count))
    if len(output) != total:
        raise ShapeError(
            f"the outputs have shape {tuple(output.shape)} for {total} rows: the batch changes inside the model, so "
            "rows do not belong to draws; use TFB(tile=False)"
        )
    return output.reshape(count, rows.count, *output.shape[1:])
