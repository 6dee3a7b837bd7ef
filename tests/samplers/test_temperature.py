"""Effective temperatures of the codes that people have, and what a weight decay is worth."""

from __future__ import annotations

import pytest
import torch

from bayesdl.errors import ArgumentError, LossScaleError
from bayesdl.samplers import Decreasing, check_loss_scale, effective_temperature, precision_from_weight_decay


def test_effective_temperatures() -> None:
    n, lr = 50_000, 0.1
    assert effective_temperature(lr, 2 * lr / n, n) == pytest.approx(1)
    assert effective_temperature(lr, 2 * lr, n) == pytest.approx(n)  # temperature 1 on a mean log-posterior
    assert effective_temperature(lr, 2 * 0.9 * lr / 50_000 / n, n, friction=0.9) == pytest.approx(2e-5)
    assert effective_temperature(lr, 2 * lr * 1e-4, n) == pytest.approx(5)


def test_precisions() -> None:
    assert precision_from_weight_decay(5e-4, 50_000) == 25
    assert precision_from_weight_decay(0.0, 10) == 0
    for bad in ((-1.0, 10), (float("nan"), 10), (0.1, 0)):
        with pytest.raises(ArgumentError):
            precision_from_weight_decay(*bad)
    for lr, q, n, f in ((0.0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(ArgumentError):
            effective_temperature(lr, q, n, f)


def test_loss_scale() -> None:
    x, y = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.ones(9)

    def loss(batch: object, reduction: str = "mean") -> torch.Tensor:
        inputs, target = batch.values() if isinstance(batch, dict) else batch  # type: ignore[misc, attr-defined]
        return torch.nn.functional.mse_loss(inputs.sum(1), target, reduction=reduction)

    assert check_loss_scale(loss, (x, y)) == pytest.approx(1)
    assert check_loss_scale(loss, {"x": x, "y": y}) == pytest.approx(1)
    assert check_loss_scale(lambda t: t.square().mean(), x) == pytest.approx(1)
    with pytest.raises(LossScaleError, match="2 times the loss of 4"):
        check_loss_scale(lambda batch: loss(batch, "sum"), (x, y))
    with pytest.raises(ArgumentError, match="at least 2"):
        check_loss_scale(loss, (x[:1], y[:1]))


def test_decreasing_rates() -> None:
    assert Decreasing(2.0, 3.0, 1.0)(1) == 0.5
    with pytest.raises(ArgumentError):
        Decreasing(1.0, gamma=0.5)
