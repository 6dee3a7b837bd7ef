"""A real pretrained network: the published MiniLM-L6 with an adapter on all its blocks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from tests.lora import minilm
from tests.untouched import untouched


@pytest.fixture(scope="module")
def path() -> Path:
    return minilm.folder()


@pytest.fixture(scope="module")
def inputs(path: Path) -> dict[str, Tensor]:
    return minilm.tokens(path)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return minilm.adapted(path)


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.05, "num_samples": 4, **options})
    return bdl.wrap(model, method, None, likelihood="categorical", batch="huggingface", progress=False)


@torch.no_grad()
def draws(bayes: bdl.BayesianModel, inputs: dict[str, Tensor]) -> Tensor:
    return bayes(inputs).latent.samples


@torch.no_grad()
def test_it_is_the_published_network(path: Path, inputs: dict[str, Tensor]) -> None:
    network = minilm.encoder(path)
    hidden = network(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    unit = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = unit @ unit.T
    assert hidden.shape[-1] == 384
    assert similarity[0, 1] > 0.5  # a cat on a mat, a kitten on a rug
    assert float(similarity[0, 2:].abs().max()) < 0.2 and float(similarity[2, 3].abs()) < 0.2
    alone = network(**{key: value[:1, : int(mask[0].sum())] for key, value in inputs.items()}).last_hidden_state
    torch.testing.assert_close(alone[0], hidden[0, : alone.shape[1]], rtol=1e-4, atol=1e-5)  # padding changes nothing


def test_tiled_is_sequential_and_the_model_is_left_alone(model: Any, inputs: dict[str, Tensor]) -> None:
    with untouched(model):
        alone = draws(wrapped(model, tile=False), inputs)
        for options in ({}, {"max_rows": 3}, {"max_rows": 8}):
            torch.testing.assert_close(draws(wrapped(model, **options), inputs), alone, rtol=1e-5, atol=2e-6)
        last = draws(wrapped(model, layers="last-2", tile=False), inputs)
        shared = draws(wrapped(model, layers="last-2", share_prefix=True), inputs)
    torch.testing.assert_close(shared, last, rtol=1e-5, atol=2e-6)
    assert float((alone.roll(1, 0) - alone).abs().max()) > 1e-3  # so that the comparisons can fail


@torch.no_grad()
def test_without_noise_it_is_the_model_itself(model: Any, inputs: dict[str, Tensor]) -> None:
    silent = draws(wrapped(model, sigma=0.0), inputs)
    assert all(torch.equal(draw, model(**inputs).logits) for draw in silent)


@torch.no_grad()
def test_a_draw_merged_is_that_draw(model: Any, inputs: dict[str, Tensor]) -> None:
    bayes = wrapped(model)
    merged: Any = bdl.lora.merge_sample(bayes, 2)
    torch.testing.assert_close(merged(**inputs).logits, draws(bayes, inputs)[2], rtol=1e-4, atol=1e-5)


def test_wrapping_without_a_search_takes_a_second_at_most(model: Any) -> None:
    # CPU time, which other processes do not lengthen
    start = time.process_time()
    wrapped(model)
    assert time.process_time() - start < 1.0


def test_the_scale_is_found_on_sentences(model: Any, inputs: dict[str, Tensor]) -> None:
    with untouched(model):
        method = bdl.TFB(tolerance=0.01, num_samples=4, sigma_range=(1e-3, 1.0))
        bayes = bdl.wrap(model, method, [inputs], likelihood="categorical", batch="huggingface", progress=False)
    report = bdl.lora.search_report(bayes)
    assert report.status == "found" and report.change <= 0.01
    above = [probe for probe in report.curve if probe.sigma > report.sigma]
    assert not above[0].passed and above[0].sigma / report.sigma <= 1.0201
    pred = bayes(inputs)
    own = torch.log_softmax(bayes.network(inputs), -1)
    target = own.argmax(-1)
    change = float((-pred.log_prob(target) + own.max(-1).values).mean())
    assert abs(change) == pytest.approx(report.change, abs=1e-5)
