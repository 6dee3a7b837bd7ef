"""What only data can say of a Laplace posterior: whether the weights are its mode, what it leaves out, how it spreads.

One pass over the training data gives, from the factors of the outputs' Jacobian,

- the gradient of the log joint at the weights and the Newton step d = P^-1 g it asks for, in posterior standard
  deviations: sqrt(d^T P d / P) per parameter; half of d^T P d is what the log joint would gain;
- residuals (or losses) of every point, and those it would have if it had been left out (`bayesdl.tuning.loo.cavity`);
- the variance of the outputs at every point.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.batch import batch_size
from bayesdl.curvature.chunking import chunks
from bayesdl.curvature.products import transposed_times
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.likelihoods import Gaussian
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.grid import observed
from bayesdl.tuning.loo import cavity

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

# posterior standard deviations, rms over the parameters, that the mode may lie from the weights
MODE = 1.0
# left-out over training residual (rms), and nats between left-out and training loss
RATIO, NATS = 1.5, 0.1
# largest over smallest variance of the outputs on the training data below which nothing is told apart
SPREAD = 1.01


@dataclass(frozen=True, eq=False)
class Observations:
    """One pass over the data.

    Attributes:
        count: observations.
        step: sqrt(d^T P d / P), a float.
        gain: 1/2 d^T P d in nats.
        variance: mean variance of the outputs of every observation `(N,)`.
        trained: squared residual over noise, or negative log-likelihood, of every observation at the weights `(N,)`.
        left_out: the same without that observation; None with too many outputs for their covariance.
    """

    count: int
    step: float
    gain: float
    variance: Tensor
    trained: Tensor
    left_out: Tensor | None


def observe(model: BayesianModel, posterior: GaussianPosterior, data: Iterable[Any], progress: bool) -> Observations:
    """One pass over the training data.

    Raises:
        ArgumentError: the data are not as many as the posterior was fitted on.
    """
    layout, likelihood, heat = posterior.layout, model.likelihood, posterior.temperature
    pulled = [posterior.precision.new_zeros(b.groups, b.rows, b.columns, dtype=torch.float64) for b in layout.blocks]
    spreads, losses, others = [], [], []
    examples = 0
    step = posterior.chunk_size(model.network)
    for number, inputs, target in batches(model.network, data, progress=progress, describe="diagnose"):
        examples += batch_size(inputs)
        for rows, labels in chunks(inputs, target, step):
            with in_batch(number):
                for mean, goal, factors in observed(model, posterior, rows, torch.as_tensor(labels)):
                    exact = mean.double()
                    wanted = goal.double() if goal.dtype.is_floating_point else goal
                    score = likelihood.score(exact, wanted)
                    for total, factor, block in zip(pulled, factors, layout.blocks, strict=True):
                        total -= transposed_times(factor, score.to(factor.g).unsqueeze(0), block)[0].double()
                    latent = posterior.latent(
                        mean, posterior.structure.prepared(factors), posterior.scale, posterior.shift
                    )
                    spreads.append(latent.variance.double().mean(-1).cpu())
                    losses.append(_loss(model, exact, wanted).cpu())
                    if latent.covariance is not None:
                        root = likelihood.hessian_root(exact)
                        moved = cavity(exact, latent.covariance.double() / heat, root, score).mean
                        others.append(_loss(model, moved, wanted).cpu())
    variance, trained = torch.cat(spreads), torch.cat(losses)
    if len(trained) != posterior.num_data and examples != posterior.num_data:
        raise ArgumentError(
            f"diagnose was given {len(trained)} observations; the posterior was fitted on {posterior.num_data}. Pass "
            "the training loader"
        )
    step_size, gain = _newton(model, posterior, layout.join(pulled) / heat)
    left = torch.cat(others) if len(others) == len(losses) else None
    return Observations(len(trained), step_size, gain, variance, trained, left)


def findings(seen: Observations, model: BayesianModel) -> tuple[Finding, ...]:
    """What a pass over the data says, in words."""
    return (*_mode(seen, model), *_left_out(seen, model), *_spread(seen))


def _newton(model: BayesianModel, posterior: GaussianPosterior, slope: Tensor) -> tuple[float, float]:
    """The Newton step of the log joint in posterior standard deviations per parameter, and its gain in nats."""
    weights = posterior.layout.flatten({k: v.detach() for k, v in model.network.parameters.items()}).double()
    blocks = posterior.layout.split(weights - posterior.prior_mean.to(weights))
    shifts = posterior.layout.shifts(posterior.shift, weights)
    pull = posterior.layout.join([block * shift for block, shift in zip(blocks, shifts, strict=True)])
    gradient = slope.to(weights) - pull
    square = float((gradient * posterior.structure.solve(gradient, posterior.scale, posterior.shift).double()).sum())
    return (max(square, 0.0) / len(weights)) ** 0.5, 0.5 * square


def _loss(model: BayesianModel, outputs: Tensor, target: Tensor) -> Tensor:
    likelihood = model.likelihood
    if isinstance(likelihood, Gaussian) and likelihood.noise is not None:
        level = torch.as_tensor(likelihood.noise, dtype=outputs.dtype, device=outputs.device)
        return ((target - outputs) / level).square().mean(-1)
    return -likelihood.log_prob(outputs, target)


def _mode(seen: Observations, model: BayesianModel) -> tuple[Finding, ...]:
    text = (
        f"the mode lies {seen.step:.3g} posterior standard deviations from the weights (rms over parameters; a Newton "
        f"step would raise the log joint by {seen.gain:.3g} nats)"
    )
    if seen.step <= MODE:
        return (Finding("info", text),)
    recorded = [finding for finding in model.record.findings if finding.topic == "prior"]
    if recorded and not any("by evidence" in finding.text for finding in recorded):
        return (Finding("info", f"{text}: the rule that chose the prior set a width around the weights, not a mode"),)
    action = (
        "the network was not trained to this prior's mode: train on with weight decay = prior precision / N, choose "
        'the prior by tune("training") or tune("heldout", val_loader), or learn both with bdl.evidence_training'
    )
    return (Finding("warning", text, action),)


def _left_out(seen: Observations, model: BayesianModel) -> tuple[Finding, ...]:
    if seen.left_out is None:
        return ()
    trained, left = float(seen.trained.mean()), float(seen.left_out.mean())
    if isinstance(model.likelihood, Gaussian):
        first, second = trained**0.5, left**0.5
        text = (
            f"residuals over the noise (rms): {first:.3g} on the training data, {second:.3g} with each point left out"
        )
        apart = second > RATIO * max(first, 1e-12)
    else:
        text = f"loss per observation: {trained:.3g} nats on the training data, {left:.3g} with each point left out"
        apart = left > trained + NATS and left > RATIO * trained
    if not apart:
        return (Finding("info", text),)
    action = (
        "the network fits its training data closer than it would have predicted them: the evidence, and a noise "
        'from training residuals, mislead: use tune("training"), or tune("heldout", val_loader)'
    )
    return (Finding("warning", text, action),)


def _spread(seen: Observations) -> tuple[Finding, ...]:
    low, middle, high = (float(v) for v in seen.variance.quantile(seen.variance.new_tensor([0.0, 0.5, 1.0])))
    text = f"variance of the outputs on the training data: {low:.3g} to {high:.3g}, median {middle:.3g}"
    if seen.count > 1 and high <= SPREAD * low:
        action = (
            "every input is as uncertain as any other: select layers before the last bias, or lower the prior precision"
        )
        return (Finding("warning", text, action),)
    return (Finding("info", text),)
