"""Draws of a low-rank adapter: tiled against one after another, a shared prefix, and what a search for the scale costs.

The network has the shape of MiniLM-L6 (BERT, 6 blocks, hidden 384, 12 heads) with random weights and LoRA (r 8) on
query and value; ten draws. Nothing is downloaded.

    python benchmarks/lora.py [--device cuda] [--quick] [--json benchmarks/results/lora.json]

What is equal is checked before anything is timed: tiled, shared and sequential outputs of the same draws, and draws of
the hooked network against a merged copy (the script fails above 1e-4 of the largest output). Times are CPU seconds of
the process on a CPU. "plain" is ten forward passes of peft's own model in eval mode, without any noise.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from _measure import alternate, finish, parser, peak_bytes

import bayesdl as bdl
from bayesdl.lora.tile import Rows

DRAWS, TOKENS, VOCABULARY = 10, 32, 2000
TOLERANCE = 1e-4


def network(device: str) -> Any:
    """BERT of MiniLM's shape with an adapter whose B is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=4,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval().to(device)


def batch(rows: int, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens."""
    tokens = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.01, "num_samples": DRAWS, **options})
    return bdl.wrap(model, method, likelihood="categorical", batch="huggingface", progress=False)


def draws(bayes: bdl.BayesianModel, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return bayes.posterior.push(bayes.network, inputs, bayes.posterior.prepare(bayes.network, None, None)).samples


def check(one: torch.Tensor, other: torch.Tensor, what: str) -> float:
    """Largest difference relative to the largest output."""
    error = float((one - other).abs().max() / other.abs().max())
    assert error < TOLERANCE, f"{what}: {error:.2e}"
    return error


def curve(model: Any, rows: int, options: Any) -> dict[str, Any]:
    """One batch size."""
    inputs = batch(rows, options.device)
    models = {
        "sequential": wrapped(model, tile=False),
        "tiled": wrapped(model),
        "last 2, sequential": wrapped(model, layers="last-2", tile=False),
        "last 2, tiled": wrapped(model, layers="last-2", share_prefix=False),
        "last 2, shared": wrapped(model, layers="last-2", share_prefix=True),
    }
    made = {name: draws(bayes, inputs) for name, bayes in models.items()}
    errors = [check(made["tiled"], made["sequential"], "tiled")]
    errors += [check(made[f"last 2, {way}"], made["last 2, sequential"], way) for way in ("tiled", "shared")]
    with torch.no_grad():
        merged: Any = bdl.lora.merge_sample(models["tiled"], 3)
        errors.append(check(merged(**inputs).logits, made["tiled"][3], "merged"))

    def plain() -> None:
        with torch.no_grad():
            for _ in range(DRAWS):
                model(**inputs)

    call = models["tiled"].network.prepare(inputs)
    repeated = Rows.of(call).tiled(DRAWS)

    def wide() -> None:  # the floor of tiling: the same rows without noise
        with torch.no_grad():
            model(**dict(repeated.kwargs or {}))

    work: dict[str, Any] = {name: lambda bayes=bayes: draws(bayes, inputs) for name, bayes in models.items()}
    seconds = alternate({"plain": plain, "wide": wide, **work}, options.repeats, options.device)
    figures = {
        "largest relative difference": float(f"{max(errors):.1g}"),
        "ten plain forwards / tiled": round(seconds["plain"] / seconds["tiled"], 2),
        "sequential / tiled": round(seconds["sequential"] / seconds["tiled"], 2),
        "sequential / ten plain forwards": round(seconds["sequential"] / seconds["plain"], 2),
        "tiled / one plain forward of all rows": round(seconds["tiled"] / seconds["wide"], 2),
        "last 2 of 6: sequential / tiled": round(seconds["last 2, sequential"] / seconds["last 2, tiled"], 2),
        "last 2 of 6: sequential / shared": round(seconds["last 2, sequential"] / seconds["last 2, shared"], 2),
        "last 2 of 6: ten plain forwards / shared": round(seconds["plain"] / seconds["last 2, shared"], 2),
        "last 2 of 6: shared / one plain forward": round(DRAWS * seconds["last 2, shared"] / seconds["plain"], 2),
    }
    if rows > 1:  # max_rows bounds what lives at once
        bounded = wrapped(model, max_rows=rows)
        bytes_ = {way: peak_bytes(lambda b=b: draws(b, inputs), options.device) for way, b in
                  (("tiled", models["tiled"]), ("bounded", bounded))}  # fmt: skip
        figures["peak memory, tiled / max_rows of one draw"] = round(bytes_["tiled"] / max(bytes_["bounded"], 1), 2)
    return figures


def search(model: Any, options: Any) -> dict[str, Any]:
    """TFB on 500 anchors (128 with --quick), in forward passes over them, counted and in time."""
    count = 128 if options.quick else 500
    data = [batch(50, options.device, seed) for seed in range(-(-count // 50))]
    figures: dict[str, Any] = {"anchors": count}

    def forwards() -> None:
        with torch.no_grad():
            for inputs in data:
                model(**inputs)

    floor = alternate({"forward": forwards}, 3, options.device)["forward"]
    for layers in ("all", "last-2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.process_time() if options.device == "cpu" else time.perf_counter()
            method = bdl.TFB(anchors=count, layers=layers, tolerance=1e-3)
            bayes = bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False)
            spent = (time.process_time() if options.device == "cpu" else time.perf_counter()) - start
        report = bdl.lora.search_report(bayes)
        figures[f"layers {layers}"] = {
            "status": report.status,
            "probes on all anchors": len(report.curve),
            "draws of all anchors and the pass of the network itself": round(report.passes, 1),
            "time / one forward pass over the anchors": round(spent / floor, 1),
        }
    return figures


def main() -> None:
    """Measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="fewer batch sizes, repeats and anchors")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        given.repeats = min(given.repeats, 3)
    model = network(given.device)
    figures: dict[str, Any] = {
        f"batch {rows} of {TOKENS} tokens": curve(model, rows, given)
        for rows in ((1, 4) if given.quick else (1, 2, 4, 8))
    }
    figures["search"] = search(model, given)
    finish(figures, given)


if __name__ == "__main__":
    main()
