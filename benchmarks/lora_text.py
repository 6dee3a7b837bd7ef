"""LoRA on the published MiniLM-L6, fine-tuned on few sentences: what each way of making it Bayesian gains and costs.

    python benchmarks/lora_text.py --data FOLDER [--quick | --large] [--json benchmarks/results/lora_text.json]

FOLDER holds `sst2/{train,dev,test}.tsv.gz`, `ag_news/test.csv.gz` and `clinc150/data_full.json.gz`. Two tasks: the
feeling of film reviews (SST-2) and the kind of a news item from its headline (AG News, whose published test part is
split here). LoRA (r 8, alpha 16, dropout 0.1) on query and value and a new head are trained on 300 sentences, drawn
anew for each seed, cut to 40 tokens. Out of distribution: the out-of-scope questions of CLINC150. Temperature scaling
and the rows "held-out" see 80 labelled sentences that no other method sees; TFB sees 128 training sentences without
labels.

Every figure is a mean over seeds with its standard error (the sentences trained on, the head and the order change; the
test set does not). Costs are CPU seconds: of making the method relative to one training, and of predicting relative to
the plain network. The file is written anew after each seed, and a later call with the same sizes goes on behind its
seeds. The default sizes are those of a busy machine's spare hour; `--large` takes 2,000 sentences to train on and
1,000 to test on.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import finish, parser
from _text import Batch, Encoder, Texts, adapted_minilm, ag_news, minilm_folder, out_of_scope, sst2, train

import bayesdl as bdl

DRAWS, MEMBERS, LENGTH, SIZE = 10, 3, 40, 50
OUTSIDE = "clinc150"
PLAIN_KEYS = {key: key for key in ("accuracy", "nll", "ece", "brier")}
KEYS = PLAIN_KEYS | {f"auroc {score}": f"ood/{OUTSIDE}/{score}/auroc" for score in ("entropy", "epistemic")}


@dataclass(frozen=True)
class Problem:
    """The sentences of one seed."""

    train: Texts
    held_out: Texts
    test: Texts
    classes: int


@dataclass(frozen=True)
class Sizes:
    """How many of what."""

    train: int = 300
    held_out: int = 80
    test: int = 300
    outside: int = 100
    anchors: int = 128
    epochs: int = 5


def problem(task: str, folder: Path, sizes: Sizes, seed: int) -> Problem:
    if task == "sst2":
        whole = sst2(folder, "train").shuffled(seed)
        held, test = (sst2(folder, part).shuffled(0) for part in ("dev", "test"))
        return Problem(whole.part(0, sizes.train), held.part(0, sizes.held_out), test.part(0, sizes.test), 2)
    news, behind = ag_news(folder), sizes.test + sizes.held_out
    whole = news.part(behind, len(news.texts)).shuffled(seed)
    return Problem(whole.part(0, sizes.train), news.part(sizes.test, behind), news.part(0, sizes.test), 4)


def trained(folder: Path, encoder: Encoder, data: Problem, epochs: int, seed: int, device: str) -> tuple[Any, float]:
    """A network and the CPU seconds of its training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = adapted_minilm(folder, data.classes).to(device)
        return model, train(model, encoder, data.train, epochs, seed)


Wrapped = Callable[..., bdl.BayesianModel]


def methods(
    members: list[Any], batches: dict[str, list[Batch]], sizes: Any
) -> Iterator[tuple[str, bdl.BayesianModel, float]]:
    """Name, model, and seconds to make it beyond one training (that of the ensemble: not counted here)."""
    model = members[0]

    def wrap(network: Any, method: Any, data: Any = None) -> bdl.BayesianModel:
        return bdl.wrap(network, method, data, likelihood="categorical", batch="huggingface", progress=False)

    def made(work: Callable[[], bdl.BayesianModel]) -> tuple[bdl.BayesianModel, float]:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bayes = work()
        return bayes, time.process_time() - start

    yield "MAP", *made(lambda: wrap(model, "map"))
    yield "temperature, held-out", *made(lambda: wrap(model, "temperature", batches["held_out"]))
    tfb, seconds = made(lambda: wrap(model, bdl.TFB(num_samples=DRAWS, anchors=sizes.anchors), batches["anchors"]))
    yield "TFB", tfb, seconds
    tuned, more = made(lambda: tfb.tune("heldout", batches["held_out"], sigma_range=(0.01, 0.5), resolution=0.5))
    yield "TFB, held-out", tuned, seconds + more
    laplace, seconds = made(lambda: wrap(model, bdl.Laplace(select="lora", structure="kron"), batches["train"]))
    yield "Laplace-LoRA", laplace, seconds
    evidence, more = made(lambda: laplace.tune("evidence"))
    yield "Laplace-LoRA, evidence", evidence, seconds + more
    yield f"ensemble of {len(members)}", *made(lambda: wrap(members, "ensemble"))
    yield "MC dropout", *made(lambda: wrap(model, bdl.MCDropout(num_samples=DRAWS)))


def one_seed(task: str, folder: Path, encoder: Encoder, sizes: Sizes, seed: int, options: Any) -> dict[str, Any]:
    """The figures of every method, by name."""
    data = problem(task, options.data, sizes, seed)
    fitted = [
        trained(folder, encoder, data, sizes.epochs, MEMBERS * seed + member, options.device)
        for member in range(MEMBERS)
    ]
    outside = out_of_scope(options.data).shuffled(0).part(0, sizes.outside)
    batches = {
        "train": encoder.batches(data.train, SIZE),
        "anchors": encoder.batches(data.train.part(0, sizes.anchors), SIZE, labels=False),
        "held_out": encoder.batches(data.held_out, SIZE),
        "test": encoder.batches(data.test, SIZE),
        "outside": encoder.batches(outside, SIZE, labels=False),
    }
    outside = {OUTSIDE: batches["outside"]}
    return measured([model for model, _ in fitted], fitted[0][1], batches, outside, sizes, KEYS, f"{task} {seed}")


def measured(
    members: list[Any],
    training: float,
    batches: dict[str, list[Batch]],
    outside: dict[str, list[Batch]],
    sizes: Any,
    keys: dict[str, str],
    what: str,
) -> dict[str, Any]:
    """Every method on one test set, given networks and the CPU seconds that one of them took to train."""
    rows: dict[str, Any] = {}
    plain = math.nan
    for name, bayes, seconds in methods(members, batches, sizes):
        start = time.process_time()
        found = bdl.evaluate(bayes, batches["test"], ood=outside)
        spent = time.process_time() - start
        plain = spent if name == "MAP" else plain
        seconds += (len(members) - 1) * training if name.startswith("ensemble") else 0.0
        rows[name] = {short: found[key] for short, key in keys.items() if key in found}
        rows[name] |= {"made / training": seconds / training, "predicted / plain": spent / plain}
        if name.startswith("TFB"):
            report = bdl.lora.search_report(bayes)
            rows[name] |= {"sigma": report.sigma, "passes over the anchors": report.passes}
        rows[name] = {key: round(value, 4) for key, value in rows[name].items()}
        print(what, name, rows[name], flush=True)
    return rows


def averaged(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over seeds."""

    def pair(values: list[float]) -> list[float]:
        error = [float(f"{statistics.stdev(values) / math.sqrt(len(values)):.2g}")] if len(values) > 1 else []
        return [float(f"{statistics.mean(values):.4g}"), *error]

    names = seeds[0]
    rows = {name: {key: pair([seed[name][key] for seed in seeds]) for key in names[name]} for name in names}
    return {"seeds": len(seeds), "mean and standard error": rows, "runs": seeds}


def earlier(path: Path | None, sizes: Any) -> dict[str, Any]:
    """What a file holds of runs of these sizes."""
    if path is None or not path.exists():
        return {}
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held if held.get("sizes") == vars(sizes) else {}


def main() -> None:
    """Every task and seed."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few sentences: shows that it runs")
    options_parser.add_argument("--large", action="store_true", help="many sentences")
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--tasks", nargs="+", default=["ag_news", "sst2"])
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    sizes = Sizes(32, 20, 40, 20, 20, 1) if options.quick else Sizes()
    sizes = Sizes(2000, 300, 1000, 500, 500, 3) if options.large else sizes
    folder = minilm_folder()
    encoder = Encoder.of(folder, LENGTH)
    figures = earlier(options.json, sizes) | {"sizes": vars(sizes), "draws": DRAWS, "members": MEMBERS}
    for task in options.tasks:
        done: list[dict[str, Any]] = figures.get(task, {}).get("runs", [])
        for seed in range(len(done), options.seeds):
            done.append(one_seed(task, folder, encoder, sizes, seed, options))
            figures[task] = averaged(done)
            finish(figures, options)


if __name__ == "__main__":
    main()
