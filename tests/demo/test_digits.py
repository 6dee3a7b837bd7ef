"""The demo's images against brute force: splits, patches, rotation, blur."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_images

from bayesdl.demo import digits


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load()


def test_splits_partition_the_known_digits(data: digits.Digits) -> None:
    bunch = load_digits()
    parts = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs]).flatten(1)
    rows = sorted(map(tuple, (parts * 16).int().tolist()))
    expected = sorted(map(tuple, bunch.data[bunch.target < 8].astype(int).tolist()))
    assert rows == expected
    assert (len(data.train), len(data.validation)) == (digits.NUM_TRAIN, digits.NUM_VALIDATION)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_splits_are_stratified(data: digits.Digits, part: str) -> None:
    bunch = load_digits()
    share = np.bincount(bunch.target[bunch.target < 8]) / (bunch.target < 8).sum()
    images = getattr(data, part)
    counts = np.bincount(images.targets.numpy(), minlength=8)
    assert np.abs(counts - share * len(images)).max() <= 1.5  # rounding of each class, twice


def test_near_set_holds_exactly_the_digits_eight_and_nine(data: digits.Digits) -> None:
    bunch = load_digits()
    expected = bunch.images[bunch.target >= 8] / 16
    assert np.array_equal(data.ood["digits 8-9"][:, 0].numpy(), expected.astype(np.float32))


def test_patches_are_means_of_grey_blocks(data: digits.Digits) -> None:
    photographs = load_sample_images().images
    grey = photographs[1][32:64, 64:96].astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    expected = grey.reshape(8, 4, 8, 4).mean((1, 3))
    per_photograph, per_line = 13 * 20, 20  # 427 x 640 pixels in tiles of 32
    found = data.ood["photographs"][per_photograph + 1 * per_line + 2, 0]
    assert len(data.ood["photographs"]) == 2 * per_photograph
    assert np.abs(found.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("name", ["train", "digits 8-9", "photographs", "noise"])
def test_all_images_share_one_scale(data: digits.Digits, name: str) -> None:
    inputs = data.train.inputs if name == "train" else data.ood[name]
    assert inputs.dtype == torch.float32
    assert inputs.shape[1:] == (1, 8, 8)
    assert 0.0 <= inputs.min() < 0.1
    assert 0.9 < inputs.max() <= 1.0


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4])
def test_quarter_turns_are_exact_and_counter_clockwise(turns: int) -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(digits.rotate(images, 90.0 * turns), torch.rot90(images, turns, (2, 3)), atol=1e-5)


@pytest.mark.parametrize("sigma", digits.BLURS)
def test_blur_is_scipys_gaussian_filter(sigma: float) -> None:
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = ndimage.gaussian_filter(image[0, 0].numpy(), sigma, mode="nearest", truncate=3.0)
    assert np.abs(digits.blur(image, sigma)[0, 0].numpy() - expected).max() < 1e-12


def test_shifts_keep_labels_and_count(data: digits.Digits) -> None:
    for series in digits.shifts(data.test).values():
        assert list(series) == sorted(series)
        for shifted in series.values():
            assert torch.equal(shifted.targets, data.test.targets)
            assert shifted.inputs.shape == data.test.inputs.shape
