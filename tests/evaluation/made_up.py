"""A small report built by hand, and predictions with known properties, shared by the tests of reports and pages."""

from __future__ import annotations

import torch

from bayesdl.evaluation.cells import Cell, Column
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report

NAMES = ("plain", '<b>bold & "quoted"</b>')


def report() -> Report:
    """Two rows and four columns: one tested, one with a reason for its gap, one infinite, one without direction."""
    columns = (
        Column("nll", "NLL", "proper", "min", "nats", "Mean of minus the log probability.", n=500),
        Column("accuracy", "accuracy", "accuracy", "max", "fraction", "Share of labels predicted right.", n=500),
        Column("ece", "ECE", "calibration", "min", "fraction", "Expected calibration error.", n=500),
        Column("peak_mib", "peak memory", "cost", "min", "MiB", "Highest memory during a prediction."),
        Column("parameters", "parameters", "cost", "none", "", "How many.", headline=False),
    )
    first = {
        "nll": Cell(0.25, 0.21, 0.30, best=True),
        "accuracy": Cell(0.9, 0.87, 0.92, best=True),
        "ece": Cell(0.02, 0.0, 0.03, expected=0.018, expected_high=0.027),
        "peak_mib": Cell(None, note="not measured here"),
        "parameters": Cell(1234.0),
    }
    second = {
        "nll": Cell(float("inf"), p=0.004),
        "accuracy": Cell(0.89, 0.86, 0.92, best=True, p=0.3),
        "ece": Cell(0.08, 0.05, 0.1, p=0.002, expected=0.017, expected_high=0.026),
        "peak_mib": Cell(12.5, best=True),
        "parameters": Cell(99.0),
    }
    details = {
        "task": "classification", "n": 500, "bootstrap": 200, "level": 0.95, "seed": 3, "score": "entropy",
        "sizes": {"test": 500}, "versions": {"bayesdl": "0"}, "methods": {NAMES[1]: {"temperature": 0.5}},
        "notes": ["One < two."],
    }  # fmt: skip
    return Report(NAMES, columns, dict(zip(NAMES, (first, second), strict=True)), details)


def classes(n: int, *, sharpness: float, shift: float = 0.0, seed: int = 0, members: int = 3) -> Predictions:
    """Labels drawn from the softmax of random logits; forecasts are that law with logits times `sharpness`.

    `sharpness` 1 is a perfectly calibrated forecaster, above 1 an over-confident one. `shift` shrinks the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(n, 4, generator=generator, dtype=torch.float64) * (1 - shift)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    noise = 0.3 * sharpness * torch.randn(members, n, 4, generator=generator, dtype=torch.float64)
    return Predictions.from_logits(sharpness * logits + (noise if members > 1 else 0.0), targets)


def numbers(n: int, *, scale: float, seed: int = 0) -> Predictions:
    """Standard normal targets; the forecast is N(0, scale^2), so `scale` 1 is perfectly calibrated."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    mean = torch.zeros(n, 1, dtype=torch.float64)
    return Predictions.from_gaussian(mean, torch.full_like(mean, scale**2), targets)
