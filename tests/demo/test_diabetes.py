"""The demo's regression table: splits and standardisation."""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes

from bayesdl.demo import diabetes


def test_training_rows_have_zero_mean_and_unit_deviation() -> None:
    data = diabetes.load()
    for values in (data.train.inputs, data.train.targets):
        assert values.mean(0).abs().max() < 1e-5
        assert (values.std(0) - 1).abs().max() < 1e-5


def test_splits_partition_the_table() -> None:
    bunch = load_diabetes(scaled=False)
    data = diabetes.load()
    values = torch.cat([data.train.targets, data.validation.targets, data.test.targets])[:, 0].double()
    target = torch.as_tensor(bunch.target)
    back = values * data.target_std + (target.sum() - data.target_std * values.sum()) / len(target)
    assert torch.allclose(back.sort().values, target.sort().values, atol=1e-3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [240, 80, 122]


def test_every_load_is_the_same() -> None:
    first, second = diabetes.load(), diabetes.load()
    assert torch.equal(first.test.inputs, second.test.inputs)
