"""Questions with a choice of answers, as batches of tokens for the benchmarks on text, and a scorer of answers."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _text import Batch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

OPTION, OPTIONS = re.compile(r"\s*Answer[1-9]:\s*"), 4


@dataclass(frozen=True)
class Questions:
    """Questions, the options of each, and which is right; -1 where none is."""

    stems: list[str]
    options: list[list[str]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def texts(self) -> list[str]:
        """What the length of a question goes by."""
        return [stem + max(options, key=len) for stem, options in zip(self.stems, self.options, strict=True)]

    def part(self, start: int, stop: int) -> Questions:
        return self.picked(list(range(start, min(stop, len(self)))))

    def picked(self, rows: list[int]) -> Questions:
        return Questions(*([column[i] for i in rows] for column in (self.stems, self.options, self.labels)))

    def shuffled(self, seed: int) -> Questions:
        return self.picked(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist())

    def exchanged(self) -> Questions:
        """Every question with the options of the one before: none of them is an answer."""
        return Questions(self.stems, [*self.options[-1:], *self.options[:-1]], [-1] * len(self))


def questions(folder: Path, name: str, words: int) -> Questions:
    """Those of a file `qa/NAME.jsonl.gz` whose stem has at most so many words, with three or four options."""
    found = Questions([], [], [])
    with gzip.open(folder / "qa" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            asked, rest = row["question"].split("\n\n", 1)
            stem = asked.split(": ", 1)[1].strip()
            options = OPTION.split(rest.split("\n\nAnswer format")[0])[1:]
            if len(stem.split()) <= words and len(options) <= OPTIONS:
                found.stems.append(stem)
                found.options.append([option.strip() for option in options])
                found.labels.append(int(row["answer"].removeprefix("answer")) - 1)
    return found


class Chooser(nn.Module):
    """One number for every pair of a question and an option, `(B, C, T)` -> `(B, C)`.

    A pair is one row of the encoder, question and option apart by their token types; its number is the scaled cosine of
    the two parts' mean hidden states, which a network for sentence embeddings has a first opinion on.
    """

    def __init__(self, encoder: Any, scale: float = 10.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> Any:
        from transformers.modeling_outputs import MultipleChoiceModelOutput

        tokens, mask, types = (value.flatten(0, 1) for value in (input_ids, attention_mask, token_type_ids))
        hidden = self.encoder(input_ids=tokens, attention_mask=mask, token_type_ids=types).last_hidden_state
        asked, offered = ((hidden * (mask * part).unsqueeze(-1)).sum(1) for part in (1 - types, types))
        scores = self.scale * torch.cosine_similarity(asked, offered, dim=-1).view(input_ids.shape[:2])
        if labels is None:
            return MultipleChoiceModelOutput(logits=scores)
        there = scores.masked_fill(~attention_mask.any(-1), -torch.inf)
        return MultipleChoiceModelOutput(loss=nn.functional.cross_entropy(there, labels), logits=scores)


@dataclass(frozen=True)
class ChoiceEncoder:
    """Tokens of questions and options, cut to a length and padded to the longest of the batch."""

    tokenizer: Any
    length: int

    @classmethod
    def of(cls, folder: Path, length: int) -> ChoiceEncoder:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), length)

    def batches(self, data: Questions, size: int, labels: bool = True) -> list[Batch]:
        """In order of length, which saves padding."""
        order = sorted(range(len(data)), key=lambda i: len(data.texts[i]))
        return [self.batch(data, order[i : i + size], labels) for i in range(0, len(order), size)]

    def batch(self, data: Questions, rows: list[int], labels: bool = True) -> Batch:
        """Tokens `(B, C, T)`; a question with fewer options than others has some without attended tokens."""
        chosen = data.picked(rows)
        counts = [len(options) for options in chosen.options]
        missing = (0, 0, 0, OPTIONS - max(counts))
        made = self.tokenizer(
            [stem for stem, count in zip(chosen.stems, counts, strict=True) for _ in range(count)],
            [option for options in chosen.options for option in options],
            **{"truncation": True, "max_length": self.length, "padding": True, "return_tensors": "pt"},
        )
        keys = ("input_ids", "attention_mask", "token_type_ids")
        filled = {key: pad(pad_sequence(list(made[key].split(counts)), batch_first=True), missing) for key in keys}
        return filled | {"labels": torch.tensor(chosen.labels)} if labels else filled


def adapted_chooser(folder: Path, blocks: int, rank: int = 8, dropout: float = 0.1) -> Any:
    """MiniLM as a scorer of options with LoRA on query and value of its last blocks, not trained yet."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    depth = encoder.config.num_hidden_layers
    places = {"layers_to_transform": list(range(depth - blocks, depth)), "layers_pattern": "layer"}
    targets = ["query", "value"]
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets, **places)
    return get_peft_model(Chooser(encoder), lora)
