"""Questions with a choice of answers: what each way of making a fine-tuned scorer of options Bayesian gains and costs.

    python benchmarks/lora_choices.py --data FOLDER [--quick | --large] [--json benchmarks/results/lora_choices.json]

FOLDER holds `qa/{arc_easy_train,arc_easy_test,arc_challenge_test}.jsonl.gz`. The published MiniLM-L6 scores every pair
of a question and an option by one number, and the softmax of these over the options is the answer: batches are
`(B, C, T)`, and questions with fewer options are filled up. LoRA (r 8, alpha 16, dropout 0.1) on query and value of the
last three blocks is trained on questions of ARC-Easy of at most ten words, drawn anew for each seed. Out of
distribution: questions of ARC-Challenge, of the same kind and harder, and the test set's own questions with the options
of one another, which have no right answer. Held-out rows see labelled questions that no other method sees; TFB sees
training questions without labels.

Figures, costs and the file are those of `lora_text.py`. The default sizes are those of a busy machine; `--large` takes
all short questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _choices import ChoiceEncoder, Questions, adapted_chooser, questions
from _measure import finish, parser
from _text import minilm_folder, train
from lora_text import DRAWS, MEMBERS, PLAIN_KEYS, averaged, earlier, measured

WORDS, LENGTH, SIZE, BLOCKS, RATE = 10, 48, 20, 3, 3e-3
OUTSIDE = ("arc_challenge", "exchanged_options")
KEYS = PLAIN_KEYS | {f"auroc {s}, {o}": f"ood/{o}/{s}/auroc" for o in OUTSIDE for s in ("entropy", "epistemic")}


@dataclass(frozen=True)
class Sizes:
    """How many of what."""

    train: int = 120
    held_out: int = 50
    test: int = 100
    outside: int = 30
    anchors: int = 40
    epochs: int = 3


def trained(folder: Path, encoder: Any, data: Questions, epochs: int, seed: int, device: str) -> tuple[Any, float]:
    """A network and the CPU seconds of its training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = adapted_chooser(folder, BLOCKS).to(device)
        return model, train(model, encoder, data, epochs, seed, lr=RATE)


def one_seed(folder: Path, encoder: Any, sizes: Sizes, seed: int, options: Any) -> dict[str, Any]:
    """The figures of every method, by name."""
    whole = questions(options.data, "arc_easy_train", WORDS).shuffled(seed)
    asked = questions(options.data, "arc_easy_test", WORDS).shuffled(0)
    harder = questions(options.data, "arc_challenge_test", WORDS).shuffled(0).part(0, sizes.outside)
    test, rest = asked.part(0, sizes.test), asked.part(sizes.test, len(asked))
    held_out, exchanged = rest.part(0, sizes.held_out), test.part(0, sizes.outside).exchanged()
    data = whole.part(0, sizes.train)
    fitted = [trained(folder, encoder, data, sizes.epochs, MEMBERS * seed + m, options.device) for m in range(MEMBERS)]
    batches = {
        "train": encoder.batches(data, SIZE),
        "anchors": encoder.batches(data.part(0, sizes.anchors), SIZE, labels=False),
        "held_out": encoder.batches(held_out, SIZE),
        "test": encoder.batches(test, SIZE),
    }
    outside = {
        name: encoder.batches(part, SIZE, labels=False) for name, part in zip(OUTSIDE, (harder, exchanged), strict=True)
    }
    members, seconds = [model for model, _ in fitted], fitted[0][1]
    return measured(members, seconds, batches, outside, sizes, KEYS, f"seed {seed}")


def main() -> None:
    """Every seed."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few questions: shows that it runs")
    options_parser.add_argument("--large", action="store_true", help="all short questions")
    options_parser.add_argument("--seeds", type=int, default=3)
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    sizes = Sizes(16, 8, 8, 4, 8, 1) if options.quick else Sizes()
    sizes = Sizes(500, 140, 400, 200, 400, 3) if options.large else sizes
    folder = minilm_folder()
    encoder = ChoiceEncoder.of(folder, LENGTH)
    figures = earlier(options.json, sizes) | {"sizes": vars(sizes), "draws": DRAWS, "members": MEMBERS}
    done: list[dict[str, Any]] = figures.get("arc_easy", {}).get("runs", [])
    for seed in range(len(done), options.seeds):
        done.append(one_seed(folder, encoder, sizes, seed, options))
        figures["arc_easy"] = averaged(done)
        finish(figures, options)


if __name__ == "__main__":
    main()
