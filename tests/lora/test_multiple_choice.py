"""Questions with options `(B, C, T)`, each option a row of the encoder: draws, curvature, options that are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ShapeError
from bayesdl.outputs import ABSENT
from bayesdl.posteriors.lora import AdapterPosterior
from tests.lora.networks import HIDDEN, VOCABULARY, base, batch, train
from tests.lora.test_laplace import dense
from tests.untouched import untouched

pytest.importorskip("peft")
OPTIONS = 4


def chooser(blocks: int = 3, **options: Any) -> Any:
    """BERT with one score for each pair of a question and an option."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForMultipleChoice

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **options}
    model = get_peft_model(BertForMultipleChoice(config), LoraConfig(**settings))
    train(model)
    return model.eval()


def questions(rows: int = 3, length: int = 6, labels: bool = False, absent: bool = False) -> dict[str, Tensor]:
    """Tokens of questions with their options; the last option of every second question may be missing."""
    flat = batch(rows * OPTIONS, length)
    made = {key: value.view(rows, OPTIONS, length).clone() for key, value in flat.items()}
    if absent:
        made["attention_mask"][::2, -1] = 0
        made["input_ids"][::2, -1] = 0
    if labels:
        made["labels"] = torch.arange(rows) % (OPTIONS - 1)
    return made


def wrapped(model: Any, method: Any, data: Any = None, **options: Any) -> bdl.BayesianModel:
    return bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False, **options)


def noisy(model: Any, **options: Any) -> bdl.BayesianModel:
    return wrapped(model, bdl.TFB(**{"sigma": 0.1, "num_samples": 4, **options}))


def draws(model: bdl.BayesianModel, inputs: Any) -> Tensor:
    return model(inputs).latent.samples


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"target_modules": "all-linear"}])
@torch.no_grad()
def test_every_option_is_a_row_under_the_draws_of_its_question(variant: dict[str, Any]) -> None:
    model, inputs = chooser(2, **variant), questions()
    with untouched(model):
        alone = draws(noisy(model, tile=False), inputs)
        for rows in (None, 1, 2, 3, 5, 7, 12):
            torch.testing.assert_close(draws(noisy(model, max_rows=rows), inputs), alone, rtol=1e-5, atol=1e-5)
        bayes = noisy(model)
        # the score of an option does not hang on the others: it is that of a question with fewer of them
        for option in range(OPTIONS - 1):
            pair = {key: value[:, option : option + 2].contiguous() for key, value in inputs.items()}
            torch.testing.assert_close(draws(bayes, pair), alone[..., option : option + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bayes.draw(4)[2](inputs), alone[2], rtol=1e-5, atol=1e-5)
        merged: Any = bdl.lora.merge_sample(bayes, 2)
        torch.testing.assert_close(merged(**inputs).logits, alone[2], rtol=1e-4, atol=1e-5)
        assert torch.equal(draws(noisy(model, sigma=0.0), inputs)[1], model(**inputs).logits)
    assert alone.std(0).mean() > 0.01 and alone.shape == (4, 3, OPTIONS)


@pytest.mark.parametrize("num_samples", [2, 3, OPTIONS, 5])
def test_a_shared_prefix_runs_every_option_once(num_samples: int) -> None:
    model, inputs = chooser(), questions(length=7)  # no axis of it is as long as a pass has rows
    bayes = noisy(model, layers="last-1", num_samples=num_samples, share_prefix=True)
    draws(bayes, inputs)
    seen: list[int] = []
    blocks: Any = bayes.network.module().get_submodule("base_model.model.bert.encoder.layer")
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(len(out))) for b in blocks]
    shared = draws(bayes, inputs)
    for handle in handles:
        handle.remove()
    assert seen == [3 * OPTIONS, 3 * OPTIONS, 3 * OPTIONS * num_samples]
    plain = draws(noisy(model, layers="last-1", num_samples=num_samples, tile=False), inputs)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    posterior = bayes.posterior
    assert isinstance(posterior, AdapterPosterior) and posterior.cache.sharing is not None


class TwoTowers(nn.Module):
    """Questions `(B, T)` and options `(B, C, U)` through one encoder, called twice with different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = base("bert").bert
        self.config = self.encoder.config  # which has a switch use_cache that this forward does not take

    def forward(self, input_ids: Tensor, attention_mask: Tensor, option_ids: Tensor, option_mask: Tensor) -> Tensor:
        asked = self.encoder(input_ids, attention_mask).last_hidden_state[:, 0]
        found = self.encoder(option_ids.flatten(0, 1), option_mask.flatten(0, 1)).last_hidden_state[:, 0]
        return (asked.unsqueeze(1) * found.view(*option_ids.shape[:2], -1)).mean(-1)


@pytest.mark.parametrize("layers", ["all", "last-2"])
@pytest.mark.parametrize("num_samples", [2, OPTIONS, 5])
def test_an_encoder_that_is_called_twice(layers: str, num_samples: int) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TwoTowers(), LoraConfig(r=4, target_modules=["query", "value"]))
    train(model)
    options = questions()
    inputs = batch(3, 7) | {"option_ids": options["input_ids"], "option_mask": options["attention_mask"]}
    with untouched(model):
        alone = draws(noisy(model, layers=layers, num_samples=num_samples, tile=False), inputs)
        tiled = draws(noisy(model, layers=layers, num_samples=num_samples), inputs)
    torch.testing.assert_close(tiled, alone, rtol=1e-5, atol=1e-5)
    assert alone.std(0).mean() > 1e-3


def test_curvature_is_the_dense_ggn() -> None:
    model, data = chooser(1, target_modules=["query", "dense"], r=2).double(), questions(labels=True)
    wanted = dense(model, data)
    for name in ("full", "diag"):
        found = bdl.curvature.estimate(
            model, [data], "categorical", structure=name, select="lora", batch="huggingface", progress=False
        ).to_dense()
        error = found - wanted if name == "full" else found.diagonal() - wanted.diagonal()
        assert float(error.abs().max()) < 1e-10 * float(wanted.abs().max())


def test_a_missing_option_is_impossible_and_changes_nothing_else() -> None:
    model, filled = chooser(2).double(), questions(labels=True, absent=True)
    filled = {key: value[::2].contiguous() for key, value in filled.items()}  # all of these lack their last option
    short = {key: value[:, :-1].contiguous() if value.dim() == 3 else value for key, value in filled.items()}
    prior = bdl.GaussianPrior(5.0)
    for method, data in (
        (bdl.TFB(sigma=0.1, num_samples=3), False),
        (bdl.Laplace(select="lora", structure="full"), True),
        (bdl.Laplace(select="lora", structure="diag"), True),
        ("map", False),
    ):
        made, wanted = (
            wrapped(model, method, [given] if data else None, **({"prior": prior} if data else {}))
            for given in (filled, short)
        )
        with untouched(model):
            one, other = (
                b({k: v for k, v in given.items() if k != "labels"}) for b, given in ((made, filled), (wanted, short))
            )
        assert not bool(one.mean[:, -1].any())
        torch.testing.assert_close(one.mean[:, :-1], other.mean)
        if not data:  # with draws of a Gaussian's own the split is one of a finite number of draws
            torch.testing.assert_close(one.total, other.total)
            torch.testing.assert_close(one.epistemic, other.epistemic, rtol=1e-6, atol=1e-9)
        if data:
            torch.testing.assert_close(made.log_evidence(), wanted.log_evidence())


def test_searches_see_the_options_that_there_are() -> None:
    model, data = chooser(2), questions(6, labels=True, absent=True)
    search: dict[str, Any] = {"num_samples": 3, "sigma_range": (1e-3, 1.0)}
    bayes = wrapped(model, bdl.TFB(**search), [data])
    report = bdl.lora.search_report(bayes)
    logits = bayes(data | {}).latent.samples
    own = model(**{key: data[key] for key in ("input_ids", "attention_mask")}).logits.detach()
    absent = ~data["attention_mask"].any(-1)
    assert bool((logits[:, absent] == ABSENT).all())

    def loss(samples: Tensor) -> float:
        kept = samples.double().masked_fill(absent, -torch.inf).softmax(-1).mean(0)
        return -float(kept[torch.arange(6), data["labels"]].log().mean())

    assert report.status == "found"
    assert report.change == pytest.approx(abs(loss(logits) - loss(own.unsqueeze(0))), abs=1e-6)


def test_batches_that_are_filled_up_differently_are_refused() -> None:
    model, whole = chooser(1), questions()
    fewer = {key: value[:, :-1].contiguous() for key, value in whole.items()}
    bayes = noisy(model)
    with pytest.raises(ShapeError, match=r"batches have \[3, 4\] outputs.*filled up"):
        bayes.predict([whole, fewer])


def test_a_trainer_s_batches() -> None:
    model, data = chooser(2), questions(labels=True, absent=True)
    module = bdl.integrations.transformers.as_module(noisy(model))
    found = module(**data)
    torch.testing.assert_close(found.logits.exp().sum(-1), torch.ones(3))
    torch.testing.assert_close(found.loss, -found.logits[torch.arange(3), data["labels"]].mean())
