"""Batch adapters: what loaders yield, and how inputs reach `forward`."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.batch import (
    Call,
    as_call,
    batch_size,
    flatten_tensors,
    huggingface_adapter,
    index_batch,
    pair_adapter,
    resolve_adapter,
    to_device,
)
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.network import Network

X = torch.arange(12.0).reshape(3, 4)
Y = torch.tensor([0, 1, 1])
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], Pair(X, Y), {"x": X, "labels": Y}, {"x": X, "y": Y}, {"x": X, "target": Y}]
)
def test_pairs_and_mappings(batch: Any) -> None:
    inputs, target = pair_adapter(batch)
    assert target is Y
    assert (inputs["x"] if isinstance(inputs, dict) else inputs) is X


@pytest.mark.parametrize("batch", [X, [X], (X,)])
def test_inputs_alone(batch: Any) -> None:
    inputs, target = pair_adapter(batch)
    assert inputs is X and target is None


def test_batches_that_cannot_be_split() -> None:
    with pytest.raises(ArgumentError, match=r"3 elements .* \(\(x1, x2\), y\)"):
        pair_adapter((X, X, Y))
    with pytest.raises(ArgumentError, match=r"several target keys \['labels', 'y'\]"):
        pair_adapter({"x": X, "labels": Y, "y": Y})
    with pytest.raises(ArgumentError, match="expects mappings from the loader, got list"):
        huggingface_adapter([X, Y])
    with pytest.raises(ArgumentError, match=r"batch='hf' is not known; choose one of \['auto', 'huggingface'\]"):
        resolve_adapter("hf")


def test_a_callable_adapter() -> None:
    network = Network(nn.Linear(4, 2), batch=lambda b: (b[2], b[0]))
    assert network.batch((Y, None, X)) == (X, Y)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(a * b)


class Keywords(Two):
    def forward(self, *, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(a * b)


class Mapped(Two):
    def forward(self, inputs: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return self.head(inputs["a"] * inputs["nested"][0])


class Listed(Two):
    def forward(self, inputs: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.head(inputs[0] * inputs[1])


class Stars(Two):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(args[0] * args[1] if args else kwargs["a"] * kwargs["b"])


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Two(), (X, X)),
        (Two(), [X, X]),
        (Two(), {"a": X, "b": X}),
        (Two(), Call((X,), {"b": X})),
        (Keywords(), {"a": X, "b": X}),
        (Mapped(), {"a": X, "nested": [X, X]}),
        (Listed(), [X, X]),
        (Listed(), (X, X)),
        (Stars(), (X, X)),
        (Stars(), {"a": X, "b": X}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_inputs_reach_forward(net: Two, inputs: Any) -> None:
    expected = net.head(X * X)
    assert torch.equal(Network(net)(inputs), expected)
    call = Network(net).prepare(inputs)
    assert batch_size(call) == 3
    assert torch.equal(Network(net)(index_batch(call, slice(1, 3))), expected[1:])
    tensors, rebuild = flatten_tensors(call)
    assert len(tensors) >= 2
    assert torch.equal(Network(net)(rebuild([t[:1] for t in tensors])), expected[:1])


def test_optional_second_argument_of_forward_is_no_reason_to_unpack_a_tensor() -> None:
    class Masked(Two):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return self.head(a if b is None else a * b)

    net = Masked()
    assert torch.equal(Network(net)(X), net.head(X))
    assert torch.equal(Network(net)((X, X)), net.head(X * X))


def test_moves_reach_every_level_and_floats_alone_change_dtype() -> None:
    inputs = {"a": [X, (Y, UserDict(deep=X))], "n": 3, "text": "as it is"}
    moved = to_device(inputs, torch.device("cpu"), torch.float64)
    assert moved["a"][0].dtype is torch.float64 and moved["a"][1][0].dtype is torch.long
    assert moved["a"][1][1]["deep"].dtype is torch.float64
    assert moved["n"] == 3 and moved["text"] == "as it is"
    assert to_device(X, torch.device("cpu"), None) is X


def test_batch_sizes() -> None:
    assert batch_size((X, {"m": torch.tensor(2.0), "y": Y})) == 3
    with pytest.raises(ShapeError, match=r"leading dimensions \[2, 3\]"):
        batch_size((X, X[:2]))
    with pytest.raises(ShapeError, match="no tensor"):
        batch_size({"text": "a"})


@dataclass
class ModelOutput:
    logits: Tensor
    loss: Tensor | None = None


class TinyText(nn.Module):
    """A hand-written model in the manner of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        logits = self.head(hidden.mean(1))
        return ModelOutput(logits, None if labels is None else nn.functional.cross_entropy(logits, labels))


def text_batch() -> UserDict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8]])
    return UserDict(input_ids=ids, attention_mask=(ids > 0).long(), labels=Y)


@pytest.mark.parametrize("batch", ["auto", "huggingface", None])
def test_dictionaries_of_text_models(batch: str | None) -> None:
    net, data = TinyText(), [text_batch()]
    bayes = bdl.wrap(net, "laplace", data, likelihood="categorical", batch=batch, progress=False)
    expected = torch.softmax(net(**text_batch()).logits, -1)
    point = bdl.wrap(net, "map", likelihood="categorical", batch=batch)
    assert torch.allclose(point(text_batch()).probs, expected)  # labels in the batch do no harm
    assert torch.allclose(point.predict(data).probs, expected)
    assert bayes.predict(data).probs.shape == (3, 2)


def test_a_real_text_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 20, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    )
    with torch.no_grad():
        expected = torch.softmax(net(**batch).logits, -1)
    for adapter in ("auto", "huggingface"):
        bayes = bdl.wrap(net, "map", likelihood="categorical", batch=adapter)
        assert torch.allclose(bayes.predict([batch]).probs, expected, atol=1e-6)
    network = Network(net, select="last_layer", batch="huggingface", example=network_inputs(batch))
    assert network.names == ("classifier.weight", "classifier.bias")
    # one answer per example, whatever shares its batch
    single = {key: value[:1] for key, value in batch.items()}
    assert torch.allclose(bayes(single).probs, expected[:1], atol=1e-6)


def network_inputs(batch: Any) -> Any:
    return huggingface_adapter(batch)[0]


def test_as_call_leaves_a_call_alone() -> None:
    call = Call((X,), None)
    assert as_call(nn.Linear(4, 2), call) is call


def test_arrays_are_no_tensors() -> None:
    x = np.zeros((4, 3))
    for method in ("map", "laplace", "vbll", "sghmc"):
        with pytest.raises(ArgumentError, match=r"numpy array \(4, 3\) of float64; expected tensors: torch.as_tensor"):
            bdl.wrap(nn.Linear(3, 2), method, [(x, np.zeros(4, int))], likelihood="categorical")(x)
