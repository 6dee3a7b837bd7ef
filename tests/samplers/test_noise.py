"""The noise stream: moments and shape of its normals, order, state."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from bayesdl.samplers.noise import NoiseStream

SIZE = 2_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standard_normal(dtype: torch.dtype, generator: torch.Generator) -> None:
    from scipy.stats import kstest

    x = NoiseStream(generator).draw([torch.empty(SIZE, dtype=dtype)])[0].double()
    # moments of a normal within 5 of their standard deviations over 2e6 draws: eight checks, failure below 1e-5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170), (8, 105, 2_016_000)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(spread / SIZE)
    assert kstest(x[:200_000].numpy(), "norm").pvalue > 1e-6
    half = SIZE // 2
    for y, z in ((x[:-1], x[1:]), (x[:half], x[half:]), (x[:half].square() - 1, x[half:].square() - 1)):
        # neighbours, the two of a pair, and their squares (product of variance 4) are uncorrelated
        assert abs(float((y * z).mean())) < 5 * math.sqrt(4 / len(y))


def test_the_lattice_of_pairs_has_the_moments_claimed() -> None:
    u = (np.arange(2**20) + 0.5) / 2**20
    angle = 2 * np.pi * np.arange(2**12) / 2**12
    for power, moment in ((2, 1.0), (4, 3.0)):
        found = ((-2 * np.log(u)) ** (power // 2)).mean() * (np.cos(angle) ** power).mean()
        assert found == pytest.approx(moment, rel=1e-5 if power == 4 else 1e-6)


def test_parameters_take_their_noise_from_one_flat_draw_in_order() -> None:
    shapes = [(3, 4), (), (5,), (2, 2, 2)]
    pieces = [v.clone() for v in NoiseStream(torch.Generator().manual_seed(1)).draw([torch.empty(s) for s in shapes])]
    flat = NoiseStream(torch.Generator().manual_seed(1)).draw([torch.empty(26)])[0]
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), flat)
    assert [piece.shape for piece in pieces] == [torch.Size(s) for s in shapes]


def test_mixed_dtypes() -> None:
    like = [torch.empty(5), torch.empty(4, dtype=torch.float64), torch.empty(3)]
    drawn = NoiseStream(torch.Generator().manual_seed(1)).draw(like)
    assert [d.dtype for d in drawn] == [v.dtype for v in like]
    assert len(set(torch.cat([d.double() for d in drawn]).tolist())) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state(dtype: torch.dtype) -> None:
    like = [torch.empty(7, dtype=dtype)]
    stream = NoiseStream(torch.Generator().manual_seed(1))
    stream.draw(like)
    state = copy.deepcopy(stream.state())
    twin = copy.deepcopy(stream)
    expected = [stream.draw(like)[0].clone() for _ in range(3)]
    other = NoiseStream(torch.Generator().manual_seed(2))
    assert not torch.equal(other.draw(like)[0], expected[0])
    other.load(state)
    for value in expected:
        assert torch.equal(other.draw(like)[0], value)
        assert torch.equal(twin.draw(like)[0], value)


def test_seeds() -> None:
    like = [torch.empty(100)]
    first = NoiseStream(torch.Generator().manual_seed(1)).draw(like)[0]
    assert torch.equal(first, NoiseStream(torch.Generator().manual_seed(1)).draw(like)[0])
    assert not torch.equal(first, NoiseStream(torch.Generator().manual_seed(2)).draw(like)[0])
    shared = torch.Generator().manual_seed(1)
    assert not torch.equal(NoiseStream(shared).draw(like)[0], NoiseStream(shared).draw(like)[0])
    torch.manual_seed(5)
    one, two = NoiseStream().draw(like)[0], NoiseStream().draw(like)[0]
    torch.manual_seed(5)
    assert torch.equal(one, NoiseStream().draw(like)[0]) and not torch.equal(one, two)


def test_other_randomness_is_independent_of_the_noise() -> None:
    stream = NoiseStream(torch.Generator().manual_seed(1))
    a = torch.rand(3, generator=stream.spawn())
    stream.draw([torch.empty(9)])
    assert torch.equal(a, torch.rand(3, generator=stream.spawn()))


def test_devices(device: torch.device) -> None:
    drawn = NoiseStream(torch.Generator().manual_seed(1)).draw([torch.empty(1000, device=device)])[0]
    assert drawn.device.type == device.type and 0.8 < float(drawn.std()) < 1.2
