"""How many rows a forward pass may have: `max_rows` bounds them, and with them what lives at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl.batch import Call
from bayesdl.evaluation.cost import PeakMemory
from bayesdl.lora.tile import Rows
from tests.lora.networks import adapted, batch

pytest.importorskip("peft")


def passes(rows: int, **options: Any) -> list[int]:
    """Rows of every forward pass that one prediction makes."""
    method = bdl.TFB(**{"sigma": 0.05, "num_samples": 6, **options})
    bayes = bdl.wrap(adapted("bert"), method, likelihood="categorical", batch="huggingface", progress=False)
    inputs, seen = batch(rows), []
    bayes(inputs)  # compares a shared prefix with plain tiling once
    clone: Any = bayes.network.module()
    embeddings = clone.get_submodule("base_model.model.bert.embeddings")
    handle = embeddings.register_forward_hook(lambda _module, _args, output: seen.append(len(output)))
    bayes(inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [
        (5, None, [30]),
        (5, 30, [30]),
        (5, 29, [25, 5]),
        (5, 10, [10, 10, 10]),
        (5, 5, [5] * 6),
        (5, 3, [3, 2] * 6),
        (1, 4, [4, 2]),
        (5, 1, [1] * 30),
    ],
)
def test_rows_of_a_pass_are_bounded(rows: int, limit: int | None, expected: list[int]) -> None:
    assert passes(rows, max_rows=limit) == expected


@pytest.mark.parametrize(
    ("shapes", "tokens", "folds", "flats"),
    [
        ({"input_ids": (2, 5), "attention_mask": (2, 5)}, 5, (), (5,)),
        ({"input_ids": (2, 5), "attention_mask": (2, 5, 5)}, 5, (), (5,)),  # one mask for each pair of tokens
        ({"input_ids": (2, 4, 5), "attention_mask": (2, 4, 5)}, 20, (4,), (4, 20)),  # options as rows
        ({"input_ids": (2, 5), "option_ids": (2, 4, 3)}, 12, (4,), (4, 5, 12)),
    ],
)
def test_what_may_become_rows(
    shapes: dict[str, tuple[int, ...]], tokens: int, folds: tuple[int, ...], flats: tuple[int, ...]
) -> None:
    rows = Rows.of(Call((), {key: torch.ones(shape, dtype=torch.int64) for key, shape in shapes.items()}))
    assert (rows.count, rows.positions, rows.folds, rows.flats) == (2, tokens, folds, flats)
    assert rows.sizes == (2, *(2 * fold for fold in folds))


def test_one_draw_a_pass() -> None:
    assert passes(5, tile=False) == [5] * 6
    assert passes(5, tile=False, max_rows=2) == [2, 2, 1] * 6


def test_tokens_are_bounded_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesdl.lora.tile.TOKENS", 70)  # seven tokens a row: ten rows
    assert passes(5) == [10, 10, 10]


def test_rows_are_halved_where_memory_runs_out() -> None:
    bayes = bdl.wrap(
        adapted("bert"),
        bdl.TFB(sigma=0.05, num_samples=6),
        likelihood="categorical",
        batch="huggingface",
        progress=False,
    )
    inputs, seen = batch(5), []
    wanted = bayes(inputs).latent.samples
    clone: Any = bayes.network.module()

    def small(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen.append(len(output))
        if len(output) > 8:
            raise torch.cuda.OutOfMemoryError("tried to allocate")

    handle = clone.get_submodule("base_model.model.bert.embeddings").register_forward_hook(small)
    found = bayes(inputs).latent.samples
    assert seen == [30, 15, *[5] * 6]  # at most 30, 15 and 7 rows
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    handle.remove()
    clone.get_submodule("base_model.model.bert.embeddings").register_forward_hook(
        lambda _module, _args, _output: small(_module, _args, torch.empty(9))
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):  # a single row is too many: nothing is left to halve
        bayes(inputs)


@torch.no_grad()
def test_memory_falls_with_the_bound() -> None:
    # sixteen draws of 8 x 96 tokens against one: hidden states, keys and values live for one pass alone. Of the ratio
    # 16, weights and outputs that do not shrink leave at least 3
    model, inputs = adapted("bert", blocks=1), batch(8, 96)
    peaks = []
    for limit in (128, 8):
        method = bdl.TFB(sigma=0.05, num_samples=16, max_rows=limit)
        bayes = bdl.wrap(model, method, likelihood="categorical", batch="huggingface", progress=False)
        bayes(inputs)
        with PeakMemory(torch.device("cpu")) as peak:
            bayes(inputs)
        peaks.append(peak.bytes)
    assert peaks[0] > 3 * peaks[1]
