"""Total = aleatoric + epistemic against enumeration and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.evaluation import decomposition as dec
from bayesdl.evaluation.validation import UndefinedError

repeatable = settings(derandomize=True, deadline=None, max_examples=40)
G = [[[0.9, 0.1]], [[0.1, 0.9]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_members_that_disagree(dtype: torch.dtype) -> None:
    # The entropy of an ensemble is that of its mean, 0.693, not the members' 0.325.
    found = dec.split(probs=torch.tensor(G, dtype=dtype))
    assert float(found.total) == pytest.approx(0.693147, abs=1e-6)
    assert float(found.aleatoric) == pytest.approx(0.325083, abs=1e-6)
    assert float(found.epistemic) == pytest.approx(0.368064, abs=1e-6)
    assert dec.disagreement(probs=torch.tensor(G, dtype=dtype)) == 1.0
    assert dec.variation_ratio(probs=torch.tensor(G, dtype=dtype)) == 0.5


def test_zero_probabilities_cost_nothing() -> None:
    found = dec.split(probs=[[[1.0, 0.0]], [[0.0, 1.0]]])
    assert (float(found.total), float(found.aleatoric)) == pytest.approx((math.log(2), 0.0))


@repeatable
@given(st.integers(1, 6), st.integers(1, 20), st.integers(2, 6), st.floats(0.1, 30), st.integers(0, 1000))
def test_identity_and_sign(members: int, n: int, classes: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, n, classes, generator=generator)
    weights = torch.rand(members, generator=generator) + 0.1
    found = dec.split(logits=logits, member_weights=weights)
    assert torch.allclose(found.total, found.aleatoric + found.epistemic, rtol=0, atol=1e-12)
    assert bool((found.epistemic >= 0).all()) and bool((found.total <= math.log(classes) + 1e-9).all())
    share = (weights.double() / weights.double().sum())[:, None, None]
    mean = (share * logits.double().softmax(-1)).sum(0)
    assert torch.allclose(found.total, torch.distributions.Categorical(mean).entropy(), atol=1e-9)
    again = dec.split(probs=logits.double().softmax(-1), member_weights=weights)
    assert torch.allclose(found.epistemic, again.epistemic, atol=1e-9)


def test_equal_members_have_no_epistemic_part() -> None:
    logits = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1)
    assert float(dec.split(logits=logits).epistemic.max()) < 1e-12


def test_moments_follow_the_law_of_total_variance() -> None:
    # Variance of 200 000 draws: relative error about sqrt(2 / n) = 0.3 %; 2 % is over six standard errors.
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(3, 4, 2, generator=generator), torch.rand(3, 4, 2, generator=generator) + 0.2
    weights = torch.tensor([0.5, 0.3, 0.2])
    found = dec.split(mean=mean, variance=variance, member_weights=weights)
    pick = torch.multinomial(weights, 200_000, replacement=True, generator=generator)
    y = mean[pick] + variance[pick].sqrt() * torch.randn(200_000, 4, 2, generator=generator)
    assert torch.allclose(found.total.float(), y.var(0), rtol=0.02)
    assert torch.allclose(found.aleatoric.float(), torch.einsum("s,snd->nd", weights, variance), rtol=1e-5)
    assert torch.allclose(found.total, found.aleatoric + found.epistemic)


def test_labels_of_a_multilabel_task_add_up() -> None:
    probs = torch.tensor([[[0.9, 0.5]], [[0.1, 0.5]]], dtype=torch.float64)
    found = dec.split_bernoulli(probs.log())
    assert float(found.total) == pytest.approx(2 * math.log(2))
    assert float(found.epistemic) == pytest.approx(0.368064, abs=1e-6)


def test_log_complement_at_both_ends() -> None:
    p = torch.tensor([1e-300, 1e-20, 0.3, 0.5, 0.7], dtype=torch.float64)
    assert torch.allclose(dec.log_complement(p.log()), torch.log1p(-p), rtol=1e-12, atol=0)
    tiny = torch.tensor([1e-20, 1e-300], dtype=torch.float64)
    assert torch.allclose(dec.log_complement(-tiny), tiny.log(), rtol=1e-12)
    ends = dec.log_complement(torch.tensor([0.0, -math.inf], dtype=torch.float64))
    assert ends.tolist() == [-math.inf, 0.0]


def test_votes_by_hand() -> None:
    # Votes 2, 1, 0 of three members: two of three pairs differ; largest count 2 of 3.
    probs = torch.eye(3)[torch.tensor([[0, 2], [0, 2], [1, 2]])]
    assert dec.disagreement(probs=probs, per_example=True).tolist() == pytest.approx([2 / 3, 0])
    assert dec.variation_ratio(probs=probs, per_example=True).tolist() == pytest.approx([1 / 3, 0])
    assert dec.disagreement(probs=probs) == pytest.approx(1 / 3)


def test_bad_input() -> None:
    with pytest.raises(UndefinedError) as caught:
        dec.disagreement(probs=torch.full((1, 2, 2), 0.5))
    assert caught.value.reason == "one member"
    with pytest.raises(TypeError, match="exactly one"):
        dec.split(probs=G, mean=G)
    with pytest.raises(ValueError, match="expected 3-D"):
        dec.split(probs=[[0.5, 0.5]])
    with pytest.raises(ValueError, match="member_weights"):
        dec.split(probs=G, member_weights=[1.0])
