"""Statistics: merging is exact in any order, and raw or augmented moments are what they say."""

import pytest
import torch

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.last_layer import Statistics


def data(n=50, d=4, k=2, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, d, generator=generator, dtype=torch.float64) + shift
    return phi, torch.randn(n, k, generator=generator, dtype=torch.float64) + shift


def assert_same(a, b, tolerance=1e-12):
    assert a.count == b.count
    for name, value in a.tensors().items():
        other = b.tensors()[name]
        assert torch.allclose(value, other, rtol=tolerance, atol=tolerance * float(other.abs().max() + 1)), name


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_shards_merge_to_the_whole_in_any_order(order):
    phi, y = data()
    shards = [slice(0, 7), slice(7, 8), slice(8, 50)]
    parts = [Statistics.of(phi[shards[i]], y[shards[i]]) for i in order]
    assert_same(parts[0] + parts[1] + parts[2], Statistics.of(phi, y))


def test_a_large_mean_costs_no_accuracy():
    phi, y = data()
    far = Statistics.of(phi[:20] + 1e6, y[:20] + 1e6) + Statistics.of(phi[20:] + 1e6, y[20:] + 1e6)
    near = Statistics.of(phi, y)
    assert torch.allclose(far.scatter, near.scatter, rtol=1e-7)  # raw moments would keep four digits
    assert torch.allclose(far.cross, near.cross, rtol=1e-6, atol=1e-6)


def test_raw_and_augmented_moments():
    phi, y = data(shift=2.0)
    raw = Statistics.of(phi, y).uncentred()
    assert torch.allclose(raw.scatter, phi.mT @ phi)
    assert torch.allclose(raw.cross, phi.mT @ y)
    assert torch.allclose(raw.residual, y.square().sum(0))
    one = torch.cat([phi, torch.ones(50, 1, dtype=torch.float64)], 1)
    joint = Statistics.of(phi, y).with_constant()
    assert torch.allclose(joint.scatter, one.mT @ one)
    assert torch.allclose(joint.cross, one.mT @ y)


def test_half_precision_batches_are_summed_in_float64():
    phi, y = data()
    assert Statistics.of(phi.half(), y.half()).scatter.dtype is torch.float64


def test_bad_input():
    phi, y = data()
    with pytest.raises(ShapeError, match=r"\(50, 4\).*\(49, 2\)"):
        Statistics.of(phi, y[:49])
    with pytest.raises(NonFiniteError, match="targets"):
        Statistics.of(phi, y / 0.0)
    with pytest.raises(ArgumentError, match="without examples"):
        Statistics.of(phi[:0], y[:0])
    with pytest.raises(ShapeError, match="merged"):
        _ = Statistics.of(phi, y) + Statistics.of(phi, y[:, 0])
