"""The report says what functions do, by distance too."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.functional import GP, Fixed, Grid, LogNormal, Measurement, distances
from bayesdl.functional.record import from_json, to_json
from bayesdl.functional.report import Fit, by_distance, describe, notes
from tests.untouched import untouched

GRID = torch.linspace(0, 2, 9).unsqueeze(1)


def test_correlation_of_a_stationary_process_is_its_kernel():
    """On a grid a narrow bin holds one distance, so that its mean is the kernel there."""
    own, wanted = GP(lengthscale=0.7, variance=3.0), GP("matern12", lengthscale=2.0)
    rows = by_distance(GRID, own.moments(GRID)[1].expand(2, 9, 9), wanted.moments(GRID)[1].expand(2, 9, 9), bins=25)
    assert [row[0] for row in rows] == pytest.approx([0.25 * k for k in range(1, 9)])
    for distance, first, second in rows:
        assert first == pytest.approx(math.exp(-0.5 * (distance / 0.7) ** 2), rel=1e-9)
        assert second == pytest.approx(math.exp(-distance / 2.0), rel=1e-9)


def test_bins_average_pairs_and_outputs():
    generator = torch.Generator().manual_seed(0)
    x, root = torch.rand(7, 3, generator=generator), torch.randn(2, 7, 7, generator=generator).double()
    own, wanted = root @ root.mT, torch.eye(7).double().expand(2, 7, 7)
    pairs = []
    for i in range(7):
        for j in range(i):
            values = [float(own[c, i, j] / (own[c, i, i] * own[c, j, j]).sqrt()) for c in range(2)]
            pairs.append((float((x[i] - x[j]).double().norm()), sum(values) / 2))
    largest = max(distance for distance, _ in pairs)
    expected = []
    for k in range(5):
        inside = [pair for pair in pairs if min(int(pair[0] / largest * 5), 4) == k]
        if inside:
            expected.append([sum(pair[i] for pair in inside) / len(inside) for i in range(2)])
    found = by_distance(x, own, wanted, bins=5)
    assert len(found) == len(expected)
    for row, (distance, value) in zip(found, expected, strict=True):
        assert row == pytest.approx((distance, value, 0.0), abs=1e-6)


def test_points_that_coincide_have_one_bin():
    rows = by_distance(torch.zeros(3, 1), torch.ones(1, 3, 3).double(), torch.eye(3).double().unsqueeze(0))
    assert rows == ((0.0, pytest.approx(1.0), 0.0),)


def test_a_linear_layer_has_the_correlations_of_its_kernel():
    """f = w x + b with unit variances: correlation (1 + x x') / sqrt((1 + x^2) (1 + x'^2))."""
    prior, target = bdl.GaussianPrior(1.0), GP(lengthscale=1.0)
    options = {"num_functions": 20_000, "measurement": Grid(0.0, 2.0, 3), "generator": torch.Generator().manual_seed(0)}
    report = bdl.functional.evaluate(nn.Linear(1, 1), prior, target, GRID, **options)
    (near, own, wanted), (far, last, _) = report.fit.correlation

    def kernel(a: float, b: float) -> float:
        return (1 + a * b) / math.sqrt((1 + a * a) * (1 + b * b))

    assert (near, far) == pytest.approx((1.0, 2.0))
    # a correlation r of 20,000 draws has a standard error of (1 - r^2) / 141, at most 0.006: four of them
    assert own == pytest.approx((kernel(0, 1) + kernel(1, 2)) / 2, abs=0.02)
    assert last == pytest.approx(kernel(0, 2), abs=0.024)
    assert wanted == pytest.approx(math.exp(-0.5))
    assert "correlation at distance 1: 0.8" in str(report)


def test_settings_in_words():
    assert describe(GP("matern32", LogNormal(0.0, 1.0), outputs=2)) == (
        "GP(kernel='matern32', lengthscale=LogNormal(mean=0.0, variance=1.0), variance=1.0, outputs=2, ard=False)"
    )
    assert describe(GP(lengthscale=torch.tensor([1.0, 2.0]))).startswith("GP(kernel='rbf', lengthscale=[1.0, 2.0]")
    assert describe(Measurement(torch.zeros(30, 2), 20)).startswith("Measurement(inputs=shape (30, 2), num_points=20")
    assert describe(Fixed(GRID)) == "Fixed(points=[[0.0], [0.25], [0.5], [0.75], [1.0], [1.25], [1.5], [1.75], [2.0]])"
    assert describe(object()) == "object"


def test_reports_survive_json():
    options = {"distance": "moments", "steps": 2, "num_functions": 8, "progress": False}
    report = bdl.functional.match(nn.Linear(1, 1), GP(), GRID, **options).report
    assert from_json(to_json(report)) == report
    for key, value in (("fit", {}), ("trace", 1.0), ("notes", [1]), ("parameters", {"w": {"std": "1"}}), ("more", 1)):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            from_json({**to_json(report), key: value})


def test_notes_name_what_went_wrong():
    close = Fit((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.0, 0.1, 0.05, (0.0, 0.0))
    assert notes(close, replace(close, covariance_error=0.2), {"w": {"std": 0.5}}) == ()
    assert "no closer" in notes(replace(close, covariance_error=0.3), replace(close, covariance_error=0.2))[0]
    assert "0.7 where the target's is 1" in notes(replace(close, std=(0.7, 0.7, 0.7)), None)[0]
    parameters = {"a": {"std": 1e-4}, "b": {"scale": 200.0}, "c": {"shape": 0.9, "rate": 2.0}}
    narrow, broad, infinite = notes(close, None, parameters)
    assert "of a ran to 0.0001" in narrow and "of b ran to 2e+02" in broad
    assert "of c has shape 0.9: the prior variance is infinite" in infinite


def test_what_was_done_about_the_network_and_the_inputs():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    options = {"steps": 2, "num_functions": 64, "progress": False}
    with untouched(net):
        report = bdl.functional.match(net, GP(), GRID, distance="moments", **options).report
    assert "dropout is off in the functions compared: ['1']" in report.notes
    assert any(note.startswith("9 inputs where 70 points of a measurement") for note in report.notes)
    assert report.trace == bdl.functional.match(net.eval(), GP(), GRID, distance="moments", **options).report.trace
    quiet = bdl.functional.match(nn.Linear(1, 1), GP(), GRID, distance="moments", measurement=Grid(0, 2, 9), **options)
    assert not any("inputs where" in note or "dropout" in note for note in quiet.report.notes)


def test_the_resolution_is_the_distance_of_the_target_to_itself():
    """Gaussian W2 of 64 draws in nine dimensions is biased upwards; the unbiased moments are around zero."""
    options = {"steps": 2, "num_functions": 64, "measurement": Grid(0, 2, 9), "progress": False}
    found = {
        name: bdl.functional.match(nn.Linear(1, 1), GP(), GRID, distance=name, **options).report.resolution
        for name in ("moments", "gaussian-w2", "dsw")
    }
    generator, k = torch.Generator().manual_seed(1), GP().moments(torch.linspace(0, 2, 9).unsqueeze(1))[1]
    draws = [GP().sample(torch.linspace(0, 2, 9).unsqueeze(1), 64, generator).float() for _ in range(200)]
    usual = torch.stack([distances.gaussian_w2(g, g, k, generator) for g in draws])
    # one draw of the same law: outside the range of 200 others once in a hundred
    assert float(usual.min()) <= found["gaussian-w2"] <= float(usual.max())
    assert abs(found["moments"]) < 0.3 and found["dsw"] is None
