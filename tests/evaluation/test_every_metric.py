"""Properties that every entry of METRICS has: order, precision, units, splits and merges do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesdl.evaluation import METRICS, Metric, MetricStream, Predictions, metric_values, metrics_for

KINDS = ("classification", "multilabel", "regression", "draws", "count")
repeatable = settings(derandomize=True, deadline=None, max_examples=8)


def made(kind: str, n: int, seed: int, *, dtype: torch.dtype = torch.float64, unit: float = 1.0) -> Predictions:
    """Three members with targets; `unit` rescales the targets of numbers."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(3, n, 4, dtype=torch.float64, generator=generator)
    y = unit * torch.randn(n, 4, dtype=torch.float64, generator=generator)
    if kind == "classification":
        return Predictions.from_logits(f.to(dtype), torch.randint(0, 4, (n,), generator=generator))
    if kind == "multilabel":
        targets = torch.randint(0, 2, (n, 4), generator=generator)
        return Predictions("multilabel", log_probs=torch.nn.functional.logsigmoid(f.to(dtype)), targets=targets)
    mean, variance = unit * f.to(dtype), unit**2 * (f.square() + 0.1).to(dtype)
    if kind == "draws":
        return Predictions.from_samples(mean, y)
    if kind == "regression":
        return Predictions.from_gaussian(mean, variance, y)
    log_prob = -torch.rand(n, dtype=torch.float64, generator=generator)
    return Predictions("count", means=mean.abs(), variances=variance, targets=y.abs(), log_prob=log_prob)


def defined(found: Predictions) -> dict[str, Metric]:
    names = metrics_for(found.task)
    return {name: names[name] for name, value in metric_values(found, tuple(names)).items() if not value.reason}


@pytest.mark.parametrize("kind", KINDS)
@repeatable
@given(n=st.integers(12, 60), seed=st.integers(0, 1000))
def test_the_order_of_the_examples_does_not_matter(kind: str, n: int, seed: int) -> None:
    found = made(kind, n, seed)
    shuffled = found.subset(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))
    for name, metric in defined(found).items():
        if name != "joint_nll_10":  # its blocks are drawn by position
            assert metric.fn(shuffled) == pytest.approx(metric.fn(found), rel=1e-9, abs=1e-11), name


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_within_its_rounding(kind: str) -> None:
    double, single = made(kind, 200, 3), made(kind, 200, 3, dtype=torch.float32)
    for name, metric in defined(double).items():
        assert metric.fn(single) == pytest.approx(metric.fn(double), rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("kind", ["regression", "draws"])
@repeatable
@given(unit=st.sampled_from([1e-3, 0.5, 60.0]), seed=st.integers(0, 1000))
def test_a_change_of_units_changes_values_by_their_unit(kind: str, unit: float, seed: int) -> None:
    one, other = made(kind, 40, seed), made(kind, 40, seed, unit=unit)
    for name, metric in defined(one).items():
        value = metric.fn(one)
        assert isinstance(value, float)
        expected = {
            "target units": unit * value,
            "target units squared": unit**2 * value,
            "fraction": value,
            "nats": value + 4 * math.log(unit),
            "nats per block": value + 40 * math.log(unit),
        }[metric.unit]
        assert metric.fn(other) == pytest.approx(expected, rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
@repeatable
@given(sizes=st.lists(st.integers(1, 15), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_splits_and_the_order_of_merges_do_not_matter(kind: str, sizes: list[int], seed: int) -> None:
    found = made(kind, sum(sizes) + 12, seed)
    names = tuple(name for name in defined(found) if name != "joint_nll_10")
    parts = []
    for rows in torch.arange(len(found)).split([*sizes, 12]):
        stream = MetricStream(names)
        stream.update(found.subset(rows))
        parts.append(stream)
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward.merge(part)
    for part in parts[-2::-1]:
        backward = backward.merge(part)
    expected = {name: METRICS[name].fn(found) for name in names}
    assert forward.compute() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert backward.compute() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@repeatable
@given(n=st.integers(20, 80), seed=st.integers(0, 1000), decimals=st.integers(0, 2))
def test_ties_in_any_order_are_the_same(n: int, seed: int, decimals: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 0.5 + 0.5 * torch.rand(n, dtype=torch.float64, generator=generator).round(decimals=decimals)
    probs, y = torch.stack([top, 1 - top], -1), torch.randint(0, 2, (n,), generator=generator)
    order = y.argsort(stable=True)
    mixed, sorted_by_label = Predictions.from_probs(probs, y), Predictions.from_probs(probs[order], y[order])
    for name, metric in metrics_for("classification").items():
        if "members" not in metric.needs and not metric_values(mixed, (name,))[name].reason:
            found = metric.fn(sorted_by_label)
            assert isinstance(found, float)
            assert found == pytest.approx(metric.fn(mixed), rel=1e-9, abs=1e-11), name


@pytest.mark.parametrize("kind", KINDS)
def test_devices_agree(kind: str, device: torch.device) -> None:
    found = made(kind, 50, 0)
    moved = found.map(lambda t: t.to(device))
    for name, metric in defined(found).items():
        value = metric.fn(moved)
        assert not isinstance(value, Tensor)
        assert value == pytest.approx(metric.fn(found), rel=1e-9, abs=1e-11), name
