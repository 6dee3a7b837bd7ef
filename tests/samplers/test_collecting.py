"""When a chain keeps theta_k, and with which weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.samplers import SASGLD, SGLD, Cyclical, Decreasing
from bayesdl.samplers.collecting import EqualTimes
from bayesdl.samplers.record import StepRecord
from tests.samplers.loops import N, assert_equal, backward, batch, network, sgld, source_of, state


@pytest.mark.parametrize("attached", [True, False])
def test_burn_in_counts_all_calls_and_thin_those_of_sampling(attached: bool) -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=3, thin=2, sampler=sampler if attached else None)
    pattern = [True, False, False, True, False, True, True, False, False, True, True, True]
    collected = []
    for k, sampling in enumerate(pattern):
        backward(net, k)
        sampler.step()
        if chain.step(sampling):
            collected.append(k)
    # calls 3, 5, 6, 9, 10, 11 are of sampling and behind burn-in: every second of them
    assert collected == [5, 9, 11] and chain.steps == len(pattern)


def test_accumulation_skipped_steps_and_closures_are_counted_right() -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=1, thin=2, sampler=sampler)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    left = []
    for k in range(5):
        sampler.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):  # chain.step after each micro-batch, as a careless loop does
            x, y = batch(k)
            scaler.scale(nn.functional.cross_entropy(net(x[part]), y[part]) / 2).backward()
            assert not chain.step()
        if k == 2:  # infinite gradients: the scaler skips this step
            next(net.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        before = sampler.iteration
        at = state(net)
        scaler.step(sampler)
        scaler.update()
        if sampler.iteration > before:
            left.append(at)
        chain.step()
    assert chain.steps == sampler.iteration == 4
    sampler.step(lambda: backward(net, 9))
    assert chain.step()
    assert [record.step for record in chain.records] == [2, 4]
    assert torch.equal(chain.posterior().snapshots["0.weight"][0], left[2]["0.weight"])


def test_of_several_steps_between_two_calls_the_last_counts() -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(6):
        backward(net, k)
        sampler.step()
        if k % 3 == 2:
            chain.step()
    assert [record.step for record in chain.records] == [2, 5] and chain.steps == 2


def test_equal_times_against_brute_force() -> None:
    weights = (torch.rand(400, generator=source_of(3)) ** 3 + 0.01).tolist()
    rule, found = EqualTimes(burn_in=100, thin=2), []
    sampling = [k < 250 or k >= 300 for k in range(400)]
    for k, w in enumerate(weights):
        copies = rule.ahead(StepRecord(k, w, w, 1.0, w, w, 0.0))
        found += [k] * copies * sampling[k]
        rule.call(sampling[k])
    spacing = 2 * sum(weights[:100]) / 100
    assert rule.spacing == pytest.approx(spacing)
    ends, clock = {}, 0.0
    for k in range(100, 400):
        if sampling[k]:
            ends[k] = (clock, clock + weights[k])
            clock += weights[k]
    expected = [k for j in range(1, int(clock / spacing) + 1) for k, (a, b) in ends.items() if a <= j * spacing < b]
    assert found == expected and len(expected) > 80 and len(set(expected)) < len(expected)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_adaptive_steps_are_collected_at_equal_distances_in_their_time(momentum: float) -> None:
    net = network()
    rates = lambda k: 0.01 * (1 + k % 4)  # noqa: E731
    sampler = SASGLD(net.named_parameters(), rates, N, momentum=momentum, generator=source_of(0))
    chain = bdl.Chain(net, burn_in=30, thin=1, sampler=sampler)
    assert chain.collect == "time"
    left, weights = [], []
    for k in range(150):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        weights.append(sampler.record.weight)
        chain.step()
    spacing = sum(weights[:30]) / 30
    clock, j, expected = 0.0, 1, []
    for k in range(30, 150):
        clock += weights[k]
        while j * spacing < clock:
            expected.append(k)
            j += 1
    assert [record.step for record in chain.records] == expected
    assert len(set(expected)) < len(expected), "no step was long enough to be collected twice"
    assert_equal(chain.posterior(), [left[k] for k in expected])
    assert torch.allclose(chain.posterior().weights, torch.full((len(expected),), 1 / len(expected)))


def test_steps_of_an_adaptive_sampler_carry_their_weights() -> None:
    net = network()
    sampler = SASGLD(net.named_parameters(), lambda k: 0.01 * (1 + k % 3), N, generator=source_of(0))
    chain = bdl.Chain(net, burn_in=5, thin=2, sampler=sampler, collect="steps")
    psi = []
    for k in range(25):
        backward(net, k)
        sampler.step()
        psi.append(sampler.record.psi * sampler.record.lr)
        chain.step()
    kept = torch.tensor([psi[k] for k in range(6, 25, 2)])
    assert torch.allclose(chain.posterior().weights, kept / kept.sum())
    assert kept.max() > 1.2 * kept.min()


def test_decreasing_steps_carry_their_weights() -> None:
    net = network()
    rate = Decreasing(0.1, 1.0, 0.7)
    sampler = sgld(net, lr=rate)
    chain = bdl.Chain(net, sampler=sampler, thin=2)
    for k in range(10):
        backward(net, k)
        sampler.step()
        chain.step()
    expected = torch.tensor([rate(k) for k in range(1, 10, 2)])
    assert torch.allclose(chain.posterior().weights, expected / expected.sum())


@pytest.mark.parametrize("kind", [SGLD, SASGLD])
def test_cycles_weigh_the_same_and_steps_within_them_as_long_as_they_are(kind: Any) -> None:
    net = network()
    sampler = kind(net.named_parameters(), 0.05, N, generator=source_of(1))
    schedule = Cyclical(sampler, cycle=10, cycles=3, explore=0.6, lr_min=0.01)
    chain = bdl.Chain(net, sampler=schedule)
    assert chain.collect == "steps"
    weights: list[list[float]] = [[], [], []]
    while not schedule.finished:
        backward(net, schedule.steps)
        sampler.step()
        schedule.step()
        if chain.step(schedule.sampling):
            weights[schedule.index].append(sampler.record.weight)
    assert [len(cycle) for cycle in weights] == [4, 4, 4]
    shares = chain.posterior().weights.view(3, 4)
    assert torch.allclose(shares.sum(1), torch.full((3,), 1 / 3))
    expected = torch.tensor(weights)
    assert torch.allclose(shares, expected / expected.sum(1, keepdim=True) / 3)
    assert [record.cycle for record in chain.records] == [0] * 4 + [1] * 4 + [2] * 4
    assert [record.phase for record in chain.records[:4]] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert {record.temperature for record in chain.records} == {1.0}
