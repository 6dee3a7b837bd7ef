"""Sentence embeddings by hand, and Bayesian last layers on them against the same fit on embeddings made once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from tests.lora.networks import CLASSES, HIDDEN, VOCABULARY, adapted, base, batch
from tests.untouched import untouched

pytest.importorskip("peft")


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """One sentence after another, its attended tokens alone, in the encoder that the adapter lives in."""
    found = []
    encoder = copy.deepcopy(model).get_base_model().base_model.eval()
    for row in range(len(inputs["input_ids"])):
        kept = inputs["attention_mask"][row].bool()
        one = {"input_ids": inputs["input_ids"][row, kept].unsqueeze(0)}
        mean = encoder(**one).last_hidden_state[0].mean(0)
        found.append(mean / mean.norm())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_it_is_the_mean_of_the_attended_tokens(kind: str) -> None:
    model, inputs = adapted(kind, 2).train(), batch(labels=True)
    with untouched(model):
        found = bdl.lora.embed(model, inputs)
    assert found.shape == (5, HIDDEN) and not found.requires_grad
    torch.testing.assert_close(found, by_hand(model, inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    # the adapter counts, and models without one are taken as they are
    plain = base(kind, 2)
    assert float((bdl.lora.embed(plain, inputs) - found).abs().max()) > 1e-3
    encoder: Any = plain.base_model
    torch.testing.assert_close(bdl.lora.embed(encoder, inputs), bdl.lora.embed(plain, inputs))


def test_half_precision_sums_in_single() -> None:
    model, inputs = adapted("bert", 1), batch()
    wanted = bdl.lora.embed(model, inputs)
    half = bdl.lora.embed(copy.deepcopy(model).bfloat16(), inputs)
    assert half.dtype is torch.bfloat16 and float((half.float() - wanted).abs().max()) < 0.02


def data(count: int = 3) -> list[dict[str, Tensor]]:
    return [batch(12, seed=seed, labels=True) for seed in range(count)]


@pytest.mark.parametrize("method", ["vbll", "laplace"])
def test_last_layers_on_embeddings(method: str) -> None:
    model, loader = adapted("bert", 2), data()
    torch.manual_seed(3)
    head = nn.Linear(HIDDEN, CLASSES)
    net = bdl.lora.Embedder(model, head)
    chosen = bdl.VBLL(tuning="evidence") if method == "vbll" else bdl.Laplace(select="last_layer", structure="full")
    options: dict[str, Any] = {"likelihood": "categorical", "prior": bdl.GaussianPrior(2.0), "progress": False}
    with untouched(model):
        bayes = bdl.wrap(net, chosen, loader, batch="huggingface", **options)
        pred = bayes(batch())
    once = [(bdl.lora.embed(model, made), made["labels"]) for made in loader]
    same = bdl.wrap(head, chosen, once, **options)
    assert pred.mean.shape == (5, CLASSES) and bool((pred.epistemic > 0).all())
    torch.testing.assert_close(pred.latent.mean, same(by_hand(model, batch())).latent.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        pred.latent.variance, same(by_hand(model, batch())).latent.variance, rtol=1e-3, atol=1e-5
    )


def test_adapters_below_a_head_take_their_posteriors() -> None:
    net = bdl.lora.Embedder(adapted("bert", 2), nn.Linear(HIDDEN, CLASSES))
    with untouched(net):
        bayes = bdl.wrap(net, bdl.TFB(sigma=0.1), likelihood="categorical", batch="huggingface", progress=False)
        assert float(bayes(batch()).epistemic.min()) > 0


def test_errors() -> None:
    model = adapted("bert", 1)
    with pytest.raises(ArgumentError, match="BertForSequenceClassification.*no tokeniser|PeftModel.*no tokeniser"):
        bdl.lora.embed(model, ["a text"])
    with pytest.raises(ShapeError, match="no attended token"):
        bdl.lora.embed(model, {key: 0 * value for key, value in batch().items()})
    with pytest.raises(ShapeError, match="without hidden states"):
        bdl.lora.embed(nn.Embedding(3, 4), {"input": torch.zeros(2, 3, dtype=torch.long)})
    from peft import PromptTuningConfig, get_peft_model

    prompted = get_peft_model(base("bert", 1), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        bdl.lora.embed(prompted, batch())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    layers = pytest.importorskip("sentence_transformers.models")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path)
    encoder: Any = base("bert", 1).base_model
    encoder.save_pretrained(tmp_path)
    parts = [
        layers.Transformer(str(tmp_path)),
        layers.Pooling(HIDDEN, pooling_mode=pooling),
    ]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    texts = ["w3 w4 w5 w6", "w7 w8", "w9"]
    wanted = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    with untouched(model):
        found = bdl.lora.embed(model, texts)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if pooling == "mean":
        rows = [[1, *(int(word[1:]) for word in text.split())] for text in texts]
        tokens = [torch.tensor([row]) for row in rows]
        alone = torch.cat([bdl.lora.embed(encoder, {"input_ids": t}) for t in tokens])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    # a last layer on it, from the tokens that its own preprocessing makes
    tokens = {key: value for key, value in model.preprocess(texts).items() if isinstance(value, Tensor)}
    loader = [{**tokens, "labels": torch.tensor([0, 1, 2])}]
    net = bdl.lora.Embedder(model, nn.Linear(HIDDEN, CLASSES))
    bayes = bdl.wrap(net, "vbll", loader, likelihood="categorical", batch="huggingface", progress=False)
    assert bayes(tokens).mean.shape == (3, CLASSES)
