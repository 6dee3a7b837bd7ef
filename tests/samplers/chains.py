"""What the samplers' tests share: steps on a Gaussian potential by hand-written gradients, and Monte Carlo checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def step_on_gaussian(sampler: Any, parameter: Tensor, variance: Tensor | float, noise: Tensor | None = None) -> None:
    """One step with the gradient of U = theta^2 / (2 variance), given as that of the mean loss, noise of U added."""
    parameter.grad = parameter.detach() / variance / sampler.num_data
    if noise is not None:
        parameter.grad += noise / sampler.num_data
    sampler.step()


def assert_mean(values: Tensor, expected: float, relative_error: float, sd: float = 4.0) -> None:
    """Independent estimates `(n,)` average to `expected` within `sd` standard errors, which are small enough to tell.

    The estimates of many chains are close to normal in the mean: with sd = 4 a right sampler fails once in 16,000.
    """
    error = float(values.double().std() / len(values) ** 0.5)
    mean = float(values.double().mean())
    assert error < relative_error * abs(expected), f"standard error {error:.3g} is too large to test {expected:.4g}"
    assert abs(mean - expected) < sd * error, f"{mean:.5g} +- {error:.2g}, expected {expected:.5g}"
