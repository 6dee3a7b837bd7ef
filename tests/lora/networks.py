"""Tiny random transformers with trained-looking adapters, built in code: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, CLASSES = 100, 32, 3
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}


def base(kind: str, blocks: int = 3, causal: bool = False) -> nn.Module:
    """A random network: Llama, GPT-2 or BERT; a classifier, or a causal model."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    rest: dict[str, Any] = {} if causal else {"num_labels": CLASSES}
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
            **rest,
        )
        return LlamaForCausalLM(config) if causal else LlamaForSequenceClassification(config)
    if kind == "gpt2":
        gpt = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=blocks,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
            **rest,
        )
        return GPT2LMHeadModel(gpt) if causal else GPT2ForSequenceClassification(gpt)
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
        **rest,
    )
    return BertForSequenceClassification(bert)


def adapted(kind: str = "llama", blocks: int = 3, causal: bool = False, std: float = 0.05, **options: Any) -> Any:
    """The same with an adapter whose B is random: peft starts it at zero."""
    from peft import LoraConfig, get_peft_model

    network = base(kind, blocks, causal)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[kind],
        "task_type": "CAUSAL_LM" if causal else "SEQ_CLS",
        "fan_in_fan_out": kind == "gpt2",
        **options,
    }
    model = get_peft_model(network, LoraConfig(**settings))
    train(model, std)
    return model


def train(model: nn.Module, std: float = 0.05, seed: int = 1) -> None:
    """B as if it had been trained."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.is_floating_point():
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=source))


def batch(
    rows: int = 5, length: int = 7, labels: bool = False, padded: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Tokens, some of them padded on the right."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=source)
    mask = torch.ones_like(tokens)
    if padded:
        for row in range(0, rows, 2):
            mask[row, length - 1 - row % 3 :] = 0
        tokens = tokens * mask
    made = {"input_ids": tokens, "attention_mask": mask}
    if labels:
        made["labels"] = torch.randint(CLASSES, (rows,), generator=source)
    return made
