"""A Gaussian noise for methods that train or sample on the training data, whose own residuals understate it."""

from __future__ import annotations

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, SelectionError, UnreachedParameterError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.methods.base import Task, residual_noise, with_residual_noise
from bayesdl.posteriors import PointPosterior, Posterior

LIMIT = 1500  # training examples times outputs whose left-out residuals are found


def with_left_out_noise(task: Task, posterior: Posterior | None = None) -> tuple[Likelihood, tuple[Finding, ...]]:
    """A Gaussian likelihood without noise gets the root mean squared residual of each output with each point left out.

    An overfitted network has next to no residuals where it was trained, and a chain with so little noise would sample
    functions that all know the training targets by heart. By how much a residual grows when its point is left out of
    the linearised network is found for the first examples (`bayesdl.tuning.training.network_residuals`), and the
    residuals of all examples are scaled by it. Networks without a Jacobian keep the plain residuals, and the finding
    says so.

    Args:
        task: with the training loader.
        posterior: whose predictions leave the residuals; None: the network as it is.
    """
    from bayesdl.tuning.training import first_batches, network_residuals  # imports the methods, which import this

    likelihood, posterior = task.likelihood, posterior or PointPosterior()
    if not isinstance(likelihood, Gaussian) or likelihood.noise is not None or task.data is None:
        return with_residual_noise(task, posterior)
    level = residual_noise(task, posterior, likelihood)
    safe = level.clamp(min=1e-12)
    count = max(2, LIMIT // len(level))
    try:
        kept = first_batches(task.network, task.data, count)
        found, own = network_residuals(
            task.network, likelihood, kept, count, level=safe, prior_mean=level.new_zeros(())
        )
    except (ArgumentError, SelectionError, UnreachedParameterError, UnsupportedError) as error:
        text = f"the noise is the residual on the training data, which an overfitted network understates: {error}"
        return likelihood.with_noise(safe), (Finding("warning", text, "pass validation=..., or a noise", "noise"),)
    usual = own.square().mean(0).sqrt().clamp(min=1e-12)
    noise = safe * (found.square().mean(0).sqrt() / usual).clamp(min=1.0).to(safe)
    text = ", ".join(f"{float(v):.4g}" for v in noise)
    plain = ", ".join(f"{float(v):.4g}" for v in safe)
    return likelihood.with_noise(noise), (
        Finding(
            "info", f"noise {text} is the residual with each training point left out ({plain} with it)", "", "noise"
        ),
    )
