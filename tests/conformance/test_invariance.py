"""Curvature is a sum over the data: it does not matter how they are cut, ordered or shared out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bayesdl as bdl
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.passes import Fit, Tally
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES, first, following
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests.cases import BY_NAME, EXAMPLES, targets

# between them: positions, groups, embeddings with padding, norms, per-example gradients
NETWORKS = ("position_embedding", "conv2d_groups", "bare_parameters")
# (likelihood, kind): closed-form, score, and the curvature of each output alone (open noise)
FAMILIES = (("categorical", "ggn"), ("poisson", "empirical"), ("gaussian", "ggn"))


@cache
def setting(name: str) -> tuple[Network, Any, Any]:
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    view = Network(net)
    return view, plan(view, x), x


def recipe(structure: str, layout: Any) -> Any:
    return {layout.blocks[0].name: "full", "*": "ekfac"} if structure == "mixed" else structure


def fit(name: str, structure: str, family: tuple[str, str], batches: list[Tensor], **options: Any) -> Fit:
    """Of the examples at the given indices, a tensor of them a batch."""
    view, layout, x = setting(name)
    y = targets(family[0])
    data = [(x[index], y[index]) for index in batches]
    options = {"structure": recipe(structure, layout), "kind": family[1], "progress": False, **options}
    return fit_curvature(view, layout, data, resolve(family[0]), **options)


@cache
def whole(name: str, structure: str, family: tuple[str, str]) -> Fit:
    return fit(name, structure, family, [torch.arange(EXAMPLES)])


def agree(found: Fit, expected: Fit, times: float = 1.0) -> None:
    assert found.num_data == times * expected.num_data
    assert found.log_likelihood == pytest.approx(times * expected.log_likelihood, rel=1e-12)
    assert len(found.parts) == len(expected.parts)
    if expected.squared_error is not None and found.squared_error is not None:
        torch.testing.assert_close(found.squared_error, times * expected.squared_error, rtol=1e-12, atol=0.0)
    for mine, theirs in zip((found.curvature, *found.parts), (expected.curvature, *expected.parts), strict=True):
        a, b = mine.to_dense(), times * theirs.to_dense()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


@st.composite
def cuts(draw: st.DrawFn) -> list[Tensor]:
    """All examples in any order, cut into batches of any sizes."""
    order = draw(st.permutations(range(EXAMPLES)))
    edges = sorted(draw(st.sets(st.integers(1, EXAMPLES - 1))))
    return [torch.tensor(order[a:b]) for a, b in zip([0, *edges], [*edges, EXAMPLES], strict=True)]


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), "mixed"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(batches=cuts(), name=st.sampled_from(NETWORKS), memory=st.sampled_from([None, 1, 20_000]))
def test_cuts_orders_and_chunks_do_not_matter(
    structure: str, family: tuple[str, str], batches: list[Tensor], name: str, memory: int | None
) -> None:
    agree(fit(name, structure, family, batches, memory=memory), whole(name, structure, family))


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), "mixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_twice_the_data_is_twice_the_curvature(name: str, structure: str, family: tuple[str, str]) -> None:
    everything = torch.arange(EXAMPLES)
    agree(fit(name, structure, family, [everything, everything]), whole(name, structure, family), times=2.0)


def reduce(tallies: list[Tally]) -> None:
    """What the reduction between processes does: every tally gets the sums of all, in place."""
    named = [[v for kept in t.parts or (t.curvature,) for v in kept.sums().values()] for t in tallies]
    for group in zip(*named, strict=True):
        total = torch.stack(list(group)).sum(0)
        for value in group:
            value.copy_(total)


# `dual` holds the examples themselves, and refuses to be added up
@pytest.mark.parametrize("structure", [*sorted(set(STRUCTURES) - {"dual"}), "mixed"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(batches=cuts(), name=st.sampled_from(NETWORKS))
def test_sums_over_shares_are_those_of_the_whole(structure: str, batches: list[Tensor], name: str) -> None:
    """Whatever `sums` leaves out must be the same on all processes, and what it holds must add up."""
    view, layout, x = setting(name)
    y, device = targets("categorical"), torch.device("cpu")
    form = recipe(structure, layout)
    fresh = [first(form, layout, torch.float64, device) for _ in batches]
    while True:
        tallies = [Tally(view, s, resolve("categorical"), "ggn", 1, None, torch.float64, None) for s in fresh]
        for tally, index in zip(tallies, batches, strict=True):
            tally.add(0, x[index], y[index])
        reduce(tallies)
        found = [following(form, tally.curvature) for tally in tallies]
        if found[0] is None:
            break
        fresh = [into for into in found if into is not None]
    expected = whole(name, structure, ("categorical", "ggn")).curvature.to_dense()
    for tally in tallies:
        close = 1e-9 * float(expected.abs().max())
        torch.testing.assert_close(tally.curvature.to_dense(), expected, rtol=1e-8, atol=close)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_posteriors_do_not_depend_on_how_the_data_are_cut(structure: str) -> None:
    name = "bare_parameters"
    net, x, y = BY_NAME[name].network(), setting(name)[2], targets("categorical")
    prior = bdl.GaussianPrior(precision=1.5)
    method = bdl.Laplace(structure=structure)
    options: dict[str, Any] = {"likelihood": "categorical", "prior": prior, "progress": False}
    one = bdl.wrap(net, method, [(x, y)], **options)
    several = bdl.wrap(net, method, [(x[5:], y[5:]), (x[:2], y[:2]), (x[2:5], y[2:5])], **options)
    torch.testing.assert_close(one.log_evidence(), several.log_evidence(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(one(x).latent.covariance, several(x).latent.covariance, rtol=1e-9, atol=1e-12)
