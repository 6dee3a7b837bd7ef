"""Metrics at speed: a streaming pass beside netcal's ECE, ranks beside one sort, a bootstrap beside one evaluation.

    python benchmarks/evaluation.py [--quick] [--device cpu] [--json benchmarks/results/evaluation.json]

First the numbers: NLL, Brier, accuracy and ECE of the pass equal the pure functions in float64 and netcal's ECE; AUROC
and AURC equal scikit-learn and the definition; resampled values equal the metrics of the copied examples.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import alternate, finish, parser
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bayesdl.evaluation import bootstrap, classification, ranking, selective
from bayesdl.evaluation.metrics import METRICS, evaluate_metrics
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.streaming import ClassificationStream

BATCH = 65_536
RESAMPLED = ("nll", "brier", "accuracy", "ece")


def forecasts(n: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    """Probabilities in float32 and labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(n, classes, generator=generator)).softmax(-1)
    return probs.to(device), torch.multinomial(probs, 1, generator=generator)[:, 0].to(device)


def streamed(probs: Tensor, y: Tensor) -> dict[str, float]:
    """All four metrics in one pass over batches."""
    stream = ClassificationStream()
    for p, labels in zip(probs.split(BATCH), y.split(BATCH), strict=True):
        stream.update(labels, probs=p)
    return stream.compute()


def relative(one: float, other: float) -> float:
    """Relative difference."""
    return abs(one - other) / max(abs(other), 1e-300)


def check(device: str, peer: bool) -> dict[str, float]:
    """Largest relative differences to the references."""
    probs, y = forecasts(20_000, 10, device)
    found = streamed(probs, y)
    # Rows in float32 miss 1 by rounding; the reference reads the same numbers.
    pure = {name: getattr(classification, name)(y, probs=probs) for name in RESAMPLED}
    errors = {"pass": max(relative(found[name], value) for name, value in pure.items())}
    if peer:
        from netcal.metrics import ECE

        # netcal's bins close on the right; no forecast here lies on an edge.
        errors["netcal"] = relative(found["ece"], float(ECE(15).measure(probs.cpu().numpy(), y.cpu().numpy())))
    scores = (torch.rand(5000, device=device) * 500).round()
    wrong = torch.rand(5000, device=device) < 0.3
    expected = float(roc_auc_score(wrong.cpu(), scores.cpu()))
    errors["auroc"] = relative(float(ranking.auroc(scores, wrong)), expected)
    plain = torch.randperm(5000, device=device).double()
    order = plain.argsort(descending=True)
    curve = wrong.double()[order].cumsum(0) / torch.arange(1, 5001, device=device)
    errors["aurc"] = relative(float(selective.aurc(plain, wrong)), float(curve.mean()))
    small = Predictions.from_probs(probs[:300], y[:300])
    resamples = bootstrap.Resamples.draw(300, 5)
    values = bootstrap.resample(small, RESAMPLED, resamples)
    for i, row in enumerate(resamples.matrix()):
        copies = small.subset(torch.arange(300).repeat_interleave(row.long()))
        worst = max(relative(float(values[name][i]), float(METRICS[name].fn(copies))) for name in RESAMPLED)
        errors["bootstrap"] = max(errors.get("bootstrap", 0.0), worst)
    return errors


def main() -> None:
    """Check, measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a tenth of the sizes, three repeats")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    device, peer, scale = chosen.device, not chosen.no_peer, 10 if chosen.quick else 1
    chosen.repeats = 3 if chosen.quick else chosen.repeats
    errors = check(device, peer)
    assert max(errors.values()) < 1e-6, errors
    figures: dict[str, Any] = {"relative errors": errors}
    for n, classes in ((1_000_000 // scale, 10), (50_000 // scale, 1000)):
        probs, y = forecasts(n, classes, device)
        work: dict[str, Any] = {"pass": lambda p=probs, t=y: streamed(p, t)}
        if peer:
            from netcal.metrics import ECE

            arrays = probs.cpu().numpy(), y.cpu().numpy()
            work["netcal"] = lambda a=arrays: ECE(15).measure(*a)
        seconds = alternate(work, chosen.repeats, device)
        figures[f"{n} x {classes}"] = {"seconds": seconds}
        if peer:
            figures[f"{n} x {classes}"]["pass / netcal"] = seconds["pass"] / seconds["netcal"]
    n = 10_000_000 // scale
    scores = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(device)
    wrong = (torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.1).to(device)
    seconds = alternate(
        {
            "sort": lambda: scores.sort(),
            "auroc": lambda: ranking.auroc(scores, wrong),
            "aurc": lambda: selective.aurc(scores, wrong),
        },
        min(chosen.repeats, 5),
        device,
    )
    figures[f"{n} scores"] = {
        "seconds": seconds,
        "auroc / sort": seconds["auroc"] / seconds["sort"],
        "aurc / sort": seconds["aurc"] / seconds["sort"],
    }
    probs, y = forecasts(100_000 // scale, 10, device)
    seconds = alternate(
        {
            "evaluation": lambda: evaluate_metrics(Predictions.from_probs(probs, y), RESAMPLED),
            "bootstrap": lambda: bootstrap.resample(
                Predictions.from_probs(probs, y), RESAMPLED, bootstrap.Resamples.draw(len(y), 1000)
            ),
        },
        3,
        device,
    )
    figures[f"1000 resamples of {len(y)}"] = {
        "seconds": seconds,
        "bootstrap / evaluation": seconds["bootstrap"] / seconds["evaluation"],
    }
    finish(figures, chosen)


if __name__ == "__main__":
    main()
