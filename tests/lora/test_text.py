"""Generation, scoring, multiple choice and merged draws, each against one draw after another by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from tests.lora.networks import adapted, batch
from tests.untouched import untouched

pytest.importorskip("peft")
SEARCH: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "beams": {"do_sample": False, "num_beams": 3}}


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    reading = options.pop("batch", "huggingface")
    method = bdl.TFB(**{"sigma": 0.1, "num_samples": 4, **options})
    return bdl.wrap(model, method, likelihood="categorical", batch=reading, progress=False)


def prompts(rows: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Padded on the left."""
    made = batch(rows, length, padded=False)
    made["attention_mask"][1, :2] = 0
    made["input_ids"][1, :2] = 0
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", SEARCH)
def test_tiled_generation_is_sequential(kind: str, way: str) -> None:
    model, inputs = adapted(kind, 2, causal=True), prompts()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **SEARCH[way]}
    with untouched(model):
        bayes = wrapped(model)
        tiled = bdl.lora.generate(bayes, inputs, **options)
        alone = bdl.lora.generate(wrapped(model, tile=False), inputs, **options)
        chunks = bdl.lora.generate(wrapped(model, max_rows=6), inputs, **options)
    assert tiled.shape == (4, 3, 11) and torch.equal(tiled[:, :, :5], inputs["input_ids"].expand(4, -1, -1))
    assert torch.equal(tiled, alone) and torch.equal(chunks, alone)
    assert not torch.equal(tiled[0], tiled[1])
    # one draw merged into a plain model writes the same text
    plain: Any = bdl.lora.merge_sample(bayes, 1)
    assert torch.equal(plain.generate(**inputs, **options), tiled[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", SEARCH)
def test_the_cache_changes_nothing(kind: str, way: str) -> None:
    model, inputs = adapted(kind, 2, causal=True), prompts()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **SEARCH[way]}
    bayes = wrapped(model)
    kept, recomputed = (bdl.lora.generate(bayes, inputs, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_padded_on_the_left_are_single_prompts(kind: str) -> None:
    model, inputs = adapted(kind, 2, causal=True), prompts()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    bayes = wrapped(model)
    together = bdl.lora.generate(bayes, inputs, **options)
    single = {key: value[1:2, 2:] for key, value in inputs.items()}
    assert torch.equal(bdl.lora.generate(bayes, single, **options)[:, 0, 3:], together[:, 1, 5:])
    # and so are their scores, whether positions are learnt (GPT-2) or relative
    padded, alone = bdl.lora.score(bayes, inputs), bdl.lora.score(bayes, single)
    for name in ("sequences", "log_prob", "spread", "mean_epistemic"):
        together, one = getattr(padded, name), getattr(alone, name)
        torch.testing.assert_close(together[..., 1], one[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", SEARCH)
def test_texts_that_end_early_are_padded(way: str) -> None:
    model, inputs = adapted("llama", 2, causal=True), prompts()
    free = bdl.lora.generate(wrapped(model, sigma=0.5), inputs, max_new_tokens=8, min_new_tokens=8, **SEARCH[way])
    end = int(free[0, 0, 7])  # the third token that draw 0 writes for the first prompt
    options = {"max_new_tokens": 8, "eos_token_id": end, "pad_token_id": 0, **SEARCH[way]}
    tiled = bdl.lora.generate(wrapped(model, sigma=0.5), inputs, **options)
    assert torch.equal(tiled, bdl.lora.generate(wrapped(model, sigma=0.5, tile=False), inputs, **options))
    if way == "greedy":
        assert tiled[0, 0, 7] == end and not bool(tiled[0, 0, 8:].any())
        assert bool(tiled[1:, :, 8:].any())  # others write on


def test_what_was_written_is_scored() -> None:
    # the log probability of a greedy text under its own draw, token by token, is the largest at every position
    model, inputs = adapted("llama", 2, causal=True), batch(2, 4, padded=False)
    bayes = wrapped(model)
    written = bdl.lora.generate(bayes, inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for index, function in enumerate(bayes.draw(4)):
        whole = {"input_ids": written[index], "attention_mask": torch.ones_like(written[index])}
        scores = bdl.lora.score(bayes, whole, prompt_length=4)
        best = function(whole).detach().log_softmax(-1)[:, 3:-1].amax(-1)
        torch.testing.assert_close(scores.tokens[index, :, 3:], best, rtol=1e-4, atol=1e-5)
        assert scores.mask.sum(1).tolist() == [5, 5]


def test_one_draw_for_every_row() -> None:
    model, inputs = adapted("llama", 2, causal=True), prompts()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    bayes = wrapped(model)
    tiled = bdl.lora.generate(bayes, inputs, **options)
    one = bdl.lora.generate(bayes, inputs, rows="one", **options)
    assert torch.equal(one, torch.stack([tiled[row, row] for row in range(3)]))


def test_sampled_tokens_repeat_and_leave_the_global_state() -> None:
    model, inputs = adapted("llama", 1, causal=True), prompts()
    bayes, options = wrapped(model), {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    with untouched(model):
        first = bdl.lora.generate(bayes, inputs, 3, generator=seeded(1), **options)
        again = bdl.lora.generate(bayes, inputs, 3, generator=seeded(1), **options)
        other = bdl.lora.generate(bayes, inputs, 3, generator=seeded(2), **options)
    assert first.shape[:2] == (3, 6) and torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("way", SEARCH)
def test_no_pass_has_more_rows_than_it_may(limit: int, way: str) -> None:
    model, inputs = adapted("llama", 2, causal=True), prompts()
    beams = SEARCH[way].get("num_beams", 1)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **SEARCH[way]}
    bayes, seen = wrapped(model, max_rows=limit), []
    clone = bayes.network.module()
    block: Any = clone.get_submodule("base_model.model.model.layers.0")
    handle = block.register_forward_hook(
        lambda _m, _a, out: seen.append(len(out[0] if isinstance(out, tuple) else out))
    )
    found = {rows: bdl.lora.generate(bayes, inputs, rows=rows, **options) for rows in ("tile", "one")}
    bdl.lora.score(bayes, inputs)
    handle.remove()
    assert max(seen) <= max(limit, beams)
    for rows, tokens in found.items():
        assert torch.equal(tokens, bdl.lora.generate(wrapped(model), inputs, rows=rows, **options))


def test_scores_are_summed_over_draws_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("llama", 2, causal=True), batch(4, 6)
    bayes = wrapped(model)
    whole = bdl.lora.score(bayes, inputs, 5)
    monkeypatch.setattr("bayesdl.lora.text.LOGITS", 2 * 4 * 6 * 100)  # two draws at a time
    parts = bdl.lora.score(bayes, inputs, 5)
    for name in ("tokens", "mask", "entropy", "epistemic"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_what_generation_refuses() -> None:
    model, inputs = adapted("llama", 1, causal=True), prompts()
    bayes = wrapped(model)
    with untouched(model):
        for name in ("assistant_model", "penalty_alpha"):
            with pytest.raises(UnsupportedError, match=name):
                bdl.lora.generate(bayes, inputs, **{name: 0.5})
        with pytest.raises(ArgumentError, match="rows='all'"):
            bdl.lora.generate(bayes, inputs, rows="all")
        with pytest.raises(ArgumentError, match='rows="one" gives'):
            bdl.lora.generate(bayes, inputs, 7, rows="one")
        with pytest.raises(UnsupportedError, match="'past_key_values'"):
            bdl.lora.generate(bayes, {**inputs, "past_key_values": object()})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_a_merged_draw_is_the_hooked_one(kind: str, variant: dict[str, Any]) -> None:
    model, inputs = adapted(kind, 2, **variant), batch()
    bayes = wrapped(model)
    wanted = bayes(inputs).latent.samples
    for index in (0, 3):
        with untouched(model), torch.no_grad():
            merged: Any = bdl.lora.merge_sample(bayes, index)
            kept: Any = bdl.lora.merge_sample(bayes, index, merge=False)
            torch.testing.assert_close(merged(**inputs).logits, wanted[index], rtol=2e-5, atol=1e-5)
            torch.testing.assert_close(kept(**inputs).logits, wanted[index], rtol=2e-5, atol=1e-5)
        assert not any("lora" in name for name in merged.state_dict()) and type(kept) is type(model)
    # nothing but rounding lies between them
    exact, double = adapted(kind, 2, **variant).double(), wrapped(adapted(kind, 2, **variant).double())
    plain = copy.deepcopy(exact).eval()
    with torch.no_grad():
        merged = bdl.lora.merge_sample(double, 1)
        wanted, tolerance = double(inputs).latent.samples[1], 1e-6 if kind == "llama" else 1e-11
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=tolerance, atol=tolerance)
        assert float((plain(**inputs).logits - wanted).abs().max()) > 1e-3
    with pytest.raises(ArgumentError, match="index=-1"):
        bdl.lora.merge_sample(bayes, -1)


def test_scores_of_sequences() -> None:
    model, inputs = adapted("llama", 2, causal=True), batch(4, 6)
    bayes = wrapped(model)
    scores = bdl.lora.score(bayes, inputs, prompt_length=2)
    for index, function in enumerate(bayes.draw(4)):
        logs = function(inputs).detach().log_softmax(-1)
        for row in range(4):
            length = int(inputs["attention_mask"][row].sum())
            own = [float(logs[row, t - 1, inputs["input_ids"][row, t]]) for t in range(2, length)]
            assert float(scores.sequences[index, row]) == pytest.approx(sum(own), abs=1e-4)
    logs = torch.stack([f(inputs).detach().double().log_softmax(-1) for f in bayes.draw(4)])[:, :, :-1]
    mean = logs.exp().mean(0)
    total = -(mean * mean.log()).sum(-1)
    within = -(logs.exp() * logs).sum(-1).mean(0)
    torch.testing.assert_close(scores.entropy.double(), total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.epistemic.double(), total - within, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.log_prob, scores.sequences.exp().mean(0).log(), rtol=1e-4, atol=1e-4)
    assert bool((scores.spread > 0).all()) and bool((scores.mean_epistemic > 0).all())
    with pytest.raises(ArgumentError, match="input_ids"):
        bdl.lora.score(bayes, {"inputs": inputs["input_ids"]})
    with pytest.raises(ShapeError, match="vocabulary"):
        bdl.lora.score(wrapped(adapted("llama", 1)), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_multiple_choice(side: str) -> None:
    model = adapted("llama", 2, causal=True)
    inputs = prompts() if side == "left" else batch(3, 5)
    answers = [7, 11, 42]
    bayes = wrapped(model, batch=bdl.batch.huggingface(position="last", classes=answers))
    pred = bayes(inputs)
    every = wrapped(model)(inputs).latent.samples
    last = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
    wanted = torch.stack([every[:, row, t][:, answers] for row, t in enumerate(last)], 1)
    torch.testing.assert_close(pred.latent.samples, wanted, rtol=1e-5, atol=1e-6)
    assert pred.mean.shape == (3, 3)
    labelled = {**inputs, "labels": torch.tensor([0, 2, 1])}
    _, targets = bayes.predict_with_targets([labelled])
    assert targets is not None and targets.tolist() == [0, 2, 1]
    laplace = bdl.wrap(
        model,
        bdl.Laplace(select="lora", structure="diag"),
        [labelled],
        likelihood="categorical",
        prior=bdl.GaussianPrior(10.0),
        batch=bdl.batch.huggingface(position="last", classes=answers),
        progress=False,
    )
    assert laplace(inputs).mean.shape == (3, 3)


def test_arguments_of_the_adapter() -> None:
    with pytest.raises(ArgumentError, match="position='first'"):
        bdl.batch.huggingface(position="first")
    with pytest.raises(ArgumentError, match="at least two"):
        bdl.batch.huggingface(classes=[3])
    model = adapted("llama", 1)
    with pytest.raises(ShapeError, match="without a tensor 'pooled'"):
        wrapped(model, batch=bdl.batch.huggingface(output="pooled"))(batch())
    with pytest.raises(ShapeError, match='position="last" needs'):
        wrapped(model, batch=bdl.batch.huggingface(position="last"))(batch())
