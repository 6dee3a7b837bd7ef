"""Streams give what one call gives: any split, any order of merging, any metric; bad batches are named at the end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError, UnknownNameError
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.metrics import METRICS, metrics_for
from bayesdl.evaluation.mixing import cat_predictions
from bayesdl.evaluation.multiple_choice import multiple_choice, option_log_probs
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.streaming import ClassificationStream, MetricStream, in_order
from bayesdl.evaluation.validation import UndefinedError
from tests.evaluation.made_up import classes, numbers

SAME = ("nll", "brier", "accuracy", "ece", "mce", "ece_l2", "ece_unweighted", "nll_zero_count")


def drawn(n: int, c: int = 5) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, c, dtype=torch.float64, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def one_call(logits: Tensor, y: Tensor) -> dict[str, float]:
    """The pure functions."""
    return {name: getattr(cls, name)(y, logits=logits) for name in SAME}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_any_split_and_merge_is_one_call(sizes: list[int], as_probs: bool) -> None:
    logits, y = drawn(sum(sizes))
    streams = []
    for f, labels in zip(logits.split(sizes), y.split(sizes), strict=True):
        stream = ClassificationStream()
        stream.update(labels, **({"probs": f.softmax(-1)} if as_probs else {"logits": f}))
        streams.append(stream)
    forward, backward = streams[0], streams[-1]
    for stream in streams[1:]:
        forward = forward.merge(stream)
    for stream in streams[-2::-1]:
        backward = backward.merge(stream)
    expected = one_call(logits, y)
    assert forward.compute() == pytest.approx(expected, abs=1e-12)
    assert backward.compute() == pytest.approx(expected, abs=1e-12)
    # What two processes exchange is a sum of tensors.
    summed = ClassificationStream()
    states = [stream.state() for stream in streams]
    summed.load({name: torch.stack([s[name] for s in states]).sum(0) for name in states[0]})
    assert summed.compute() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [100_000, 1_000_000])
def test_no_result_depends_on_the_number_of_examples(n: int) -> None:
    # Constant confidence 0.953 in float32 and as many hits: float32 sums would stop growing or drift.
    stream = ClassificationStream()
    probs = torch.tensor([0.953, 0.047]).expand(n // 10, 2)
    y = (torch.arange(n) % 1000 >= 953).long()
    for part in y.split(n // 10):
        stream.update(part, probs=probs)
    assert stream.compute()["ece"] < 1e-7


def test_pixels_and_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 3, 5, generator=generator)  # (B, C, H, W)
    y = torch.randint(0, 4, (6, 3, 5), generator=generator)
    y[0] = 255
    y[1, :, 2:] = 255
    stream = ClassificationStream(class_axis=1, ignore_index=255)
    for part in (slice(0, 2), slice(2, 6)):
        stream.update(y[part], logits=logits[part])
    found = stream.compute()
    flat, labels = logits.movedim(1, -1).reshape(-1, 4), y.flatten()
    pooled = one_call(flat[labels != 255], labels[labels != 255])
    assert {name: found[name] for name in SAME} == pytest.approx(pooled, abs=1e-6)
    per_image = []
    for image, target in zip(logits.movedim(1, -1), y, strict=True):
        if bool((target != 255).any()):
            per_image.append(cls.nll(target[target != 255], logits=image[target != 255]))
    assert found["image_nll"] == pytest.approx(sum(per_image) / 5, abs=1e-6)
    assert stream.state()["image_sums"].numel() == 3


def test_zero_probability_and_half_precision() -> None:
    stream = ClassificationStream()
    stream.update([0, 1, 1], probs=torch.eye(2)[[0, 1, 0]])
    assert stream.compute()["nll"] == math.inf and stream.compute()["nll_zero_count"] == 1
    logits, y = drawn(50)
    half = ClassificationStream()
    half.update(y, logits=logits.half())
    assert half.compute() == pytest.approx(one_call(logits.half().float(), y), abs=1e-6)


def test_bad_batches_are_counted_and_the_first_is_named() -> None:
    logits, y = drawn(8)
    for index, (bad, error, text) in enumerate(
        [
            (torch.full_like(logits, torch.nan).softmax(-1), NonFiniteError, "8 rows"),
            (logits, ArgumentError, "8 rows of probs are negative or do not sum to 1"),
            (logits.softmax(-1), LabelError, "8 labels"),
        ]
    ):
        stream = ClassificationStream()
        stream.update(y, probs=logits.softmax(-1))
        stream.update(y, probs=logits.softmax(-1))
        stream.update(y + 9 if index == 2 else y, probs=bad)
        stream.update(y, probs=logits.softmax(-1))
        with pytest.raises(error, match=f"{text}.*number 2"):
            stream.compute()
    stream = ClassificationStream()
    with pytest.raises(UndefinedError):
        stream.compute()
    with pytest.raises(TypeError, match="exactly one"):
        stream.update(y)
    with pytest.raises(ShapeError):
        stream.update(y[:3], logits=logits)
    with pytest.raises(LabelError, match="integers"):
        stream.update(y.double(), logits=logits)
    with pytest.raises(ArgumentError, match="10 bins"):
        ClassificationStream(bins=10).load(stream.state())


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_metric_streams(task: str) -> None:
    whole = classes(60, sharpness=1.3) if task == "classification" else numbers(60, scale=0.8)
    absent = {"samples"} | (set() if whole.num_members > 1 else {"members"})
    names = [name for name, metric in metrics_for(task).items() if not absent & set(metric.needs)]
    left, right = MetricStream(names), MetricStream(names)
    index = torch.arange(60)
    for part in index[:40].split(7):
        left.update(whole.subset(part))
    right.update(whole.subset(index[40:]))
    found = left.merge(right).compute()
    assert found == pytest.approx({n: float(METRICS[n].fn(whole)) for n in names}, abs=1e-12)


def test_calibration_errors_stream_in_constant_memory() -> None:
    names = ("ece", "mce", "ece_l2", "ece_unweighted", "nll")
    whole = classes(700, sharpness=1.4)
    parts = [MetricStream(names) for _ in range(3)]
    for place, index in enumerate(torch.arange(700).split(50)):
        parts[place % 3].update(whole.subset(index))
    states = [part.state() for part in parts]
    assert all(sum(value.numel() for value in state.values()) == 1 + 1 + 3 * 15 for state in states)
    together = MetricStream(names)
    together.load({name: sum(state[name] for state in states) for name in states[0]})  # type: ignore[misc]
    expected = {name: float(METRICS[name].fn(whole)) for name in names}
    assert together.compute() == pytest.approx(expected, rel=1e-12)
    assert parts[0].merge(parts[1]).merge(parts[2]).compute() == pytest.approx(expected, rel=1e-12)
    assert METRICS["ece"].streaming == "constant" and METRICS["ece_mass"].streaming == "stored"


def test_states_of_sums_add_up_and_others_are_refused() -> None:
    whole = classes(30, sharpness=1.0)
    acc = METRICS["nll"].accumulator()
    acc.update(whole)
    again = METRICS["nll"].accumulator()
    again.load({name: 2 * value for name, value in acc.state().items()})
    assert again.compute() == pytest.approx(acc.compute())
    with pytest.raises(ArgumentError, match="in_order"):
        METRICS["aurc"].accumulator().state()
    with pytest.raises(UnknownNameError):
        MetricStream(["nil"])


def test_padding_of_samplers_counts_once() -> None:
    whole = classes(5, sharpness=1.0)
    parts = [whole.subset(torch.tensor([0, 2, 4])), whole.subset(torch.tensor([1, 3, 0]))]
    joined = in_order(parts, [[0, 2, 4], [1, 3, 0]], 5)
    assert joined.targets is not None and joined.targets.equal(whole.labelled())
    assert joined.probs.equal(whole.probs)
    with pytest.raises(ArgumentError, match="1 of 6 examples are missing, the first is 5"):
        in_order(parts, [[0, 2, 4], [1, 3, 0]], 6)
    with pytest.raises(ShapeError):
        in_order(parts, [[0, 2], [1, 3, 0]], 5)
    with pytest.raises(ArgumentError, match="different tasks"):
        cat_predictions([whole, numbers(3, scale=1.0)])


def test_multiple_choice_renormalises_over_the_options_given() -> None:
    scores = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -2.0, 0.0]], dtype=torch.float64)
    given = torch.tensor([[True, True, True], [True, True, False]])
    log_probs = option_log_probs(scores, given=given)
    assert log_probs.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert log_probs[1].exp().tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2)), 0.0])
    by_length = option_log_probs(scores, lengths=[[1, 4, 9], [2, 1, 1]], normalise="length")
    assert by_length[0].exp().tolist() == pytest.approx(torch.tensor([-1.0, -0.5, -1.0]).softmax(0).tolist())
    found = multiple_choice([0, 0], scores, given=given, group=["law", "art"])
    assert found.pooled["accuracy"] == 0.5 and found.groups["law"]["accuracy"] == 1.0
    assert found.counts == {"law": 1, "art": 1} and found.normalise == "none"
    assert found.pooled["nll"] == pytest.approx(-float(log_probs[0, 0] + log_probs[1, 0]) / 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"normalise": "length"}, "needs lengths"),
        ({"normalise": "length", "lengths": [[0, 1]]}, "at least one token"),
        ({"normalise": "words"}, "normalise="),
        ({"given": [[False, False]]}, "question 0 has no option"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        option_log_probs([[0.0, 1.0]], **options)  # type: ignore[arg-type]


def test_a_label_that_is_no_option_costs_infinity() -> None:
    found = Predictions(task="classification", log_probs=option_log_probs([[0.0, 0.0]], given=[[True, False]])[None])
    assert found.probs.tolist() == [[1.0, 0.0]]
