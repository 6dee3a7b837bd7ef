"""Sentence embeddings: the mean over attended tokens at unit length, as features of a Bayesian last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import as_call, huggingface_adapter
from bayesdl.clone import unwrap
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError, check_finite
from bayesdl.network import Network


@final
class Embedder(nn.Module):
    """A transformer as a map from tokens to a unit vector, and on to outputs where it has a head.

        net = bdl.lora.Embedder(model, nn.Linear(384, 4))          # train the head, or all of it
        bayes = bdl.wrap(net, "vbll", loader, likelihood="categorical", batch="huggingface")

    Args:
        model: of transformers, with or without an adapter of peft (a head of its own is passed by), or a
            `SentenceTransformer`, whose own pooling then stands in for the mean.
        head: takes `(B, d)`; None leaves the embeddings as they are.

    Raises:
        UnsupportedError: virtual tokens of a peft prompt, which the model below them does not see.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = _encoder(model)
        self.head = nn.Identity() if head is None else head

    def forward(self, **inputs: Any) -> Tensor:
        """Embeddings `(B, d)`, or what the head makes of them.

        Args:
            inputs: "input_ids" `(B, T)` (or "inputs_embeds") with their "attention_mask", and whatever else the model
                takes.

        Raises:
            ShapeError: the model returns no hidden states of tokens, or a sequence has no attended token.
        """
        if isinstance(self.encoder, nn.Sequential):  # modules that hand on one dictionary: sentence-transformers
            raw = self.encoder(dict(inputs))
        else:
            raw = self.encoder(**dict(as_call(self.encoder, inputs).kwargs or {}))
        return self.head(nn.functional.normalize(_pooled(raw, inputs.get("attention_mask")), dim=-1))


def embed(model: nn.Module, batch: Any) -> Tensor:
    """Embeddings of a batch, `(B, d)` of unit length, without gradients; the model stays as it is.

    Features computed once for a linear model of one's own: `bdl.wrap(nn.Linear(d, C), "laplace", [(z, y)], ...)`.

    Args:
        model: as in `Embedder`; one is taken with its head.
        batch: a mapping of tokens (labels are left out), or, for a `SentenceTransformer`, a list of texts.

    Raises:
        ArgumentError: texts for a model that has no tokeniser.
        ShapeError: the model returns no hidden states of tokens.
        NonFiniteError: NaN or infinity in the embeddings.
    """
    model = unwrap(model)
    network = Network(model if isinstance(model, Embedder) else Embedder(model), batch="huggingface")
    with torch.no_grad():
        found = network(huggingface_adapter(_tokens(model, batch))[0])
    check_finite(found, "embeddings")
    return found


def _pooled(raw: Any, mask: Tensor | None) -> Tensor:
    if isinstance(raw, Mapping) and isinstance(raw.get("sentence_embedding"), Tensor):
        return raw["sentence_embedding"]
    hidden = getattr(raw, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ShapeError(
            f"the model returned {type(raw).__name__} without hidden states (B, T, d) of its tokens; pass the encoder "
            "of transformers (AutoModel), or a SentenceTransformer"
        )
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    if mask is None:
        return wide.mean(1).to(hidden.dtype)
    weight = mask.to(wide).unsqueeze(-1)
    count = weight.sum(1)
    if not bool((count > 0).all()):
        raise ShapeError("a sequence has no attended token; its embedding is not defined")
    return ((wide * weight).sum(1) / count).to(hidden.dtype)


def _encoder(model: nn.Module) -> nn.Module:
    """The transformer below adapters and heads."""
    model = unwrap(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedError(
            "the model has virtual tokens of a peft prompt, which the transformer below them does not see; embeddings "
            "are for adapters in its layers, such as LoRA"
        )
    below: Any = getattr(model, "get_base_model", None)
    model = model if below is None else below()
    inner = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    return inner if isinstance(inner, nn.Module) else model


def _tokens(model: Any, batch: Any) -> Any:
    texts = [batch] if isinstance(batch, str) else batch
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return batch
    tokenise = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
    if tokenise is None:
        raise ArgumentError(
            f"texts were given to {type(model).__name__}, which has no tokeniser: pass the mapping that a tokeniser of "
            "transformers makes of them"
        )
    return {key: value for key, value in tokenise(list(texts)).items() if isinstance(value, Tensor)}
