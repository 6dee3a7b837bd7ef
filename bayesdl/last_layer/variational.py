"""Variational last layers on the features of a network that stays as it is; the trunk runs once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.last_layer.ascent import ascend
from bayesdl.last_layer.cache import gathered, observations
from bayesdl.last_layer.features import linear_layer
from bayesdl.last_layer.harmless import LIMIT, training_losses, widest_prior
from bayesdl.last_layer.heteroscedastic import Heteroscedastic
from bayesdl.last_layer.parameterisation import Covariance, make
from bayesdl.likelihoods import Bernoulli, Categorical, Likelihood
from bayesdl.likelihoods import Heteroscedastic as HeteroscedasticLikelihood
from bayesdl.methods.base import Fitted, Task
from bayesdl.posteriors.last_layer import GaussianWeights, LastLayerPosterior
from bayesdl.priors import GaussianPrior

if TYPE_CHECKING:
    from bayesdl.methods.vbll import VBLL

HALF = (torch.float16, torch.bfloat16)
ROUNDS, STEPS, TOLERANCE = 20, 200, 1e-6  # of a heteroscedastic fit: choices of the prior, steps for each


def classify(method: VBLL, task: Task, layer: str, data: Iterable[Any], likelihood: Categorical | Bernoulli) -> Fitted:
    """Maximise the bound of `bayesdl.last_layer.ascent` from the network's own weights."""
    linear = linear_layer(task.network, layer)
    outputs, bias = linear.out_features, linear.bias is not None
    prior = task.gaussian_prior(layer)
    binary = isinstance(likelihood, Bernoulli)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        seen = observations(task.network, layer, likelihood, outputs, data, progress=task.progress)
        for phi, y in seen:
            wide = phi.float() if phi.dtype in HALF else phi
            yield (torch.cat([wide, wide.new_ones(len(wide), 1)], 1) if bias else wide), y

    with gathered(pairs(), method.cache_bytes) as (phi, y):
        with torch.device(phi.device):
            covariance = make(method.covariance, phi.shape[1], outputs).to(phi.dtype)
        counted = torch.ones(phi.shape[1], dtype=torch.bool, device=phi.device)
        counted[-1] = not bias
        precision = None if prior is None else float(precision_of(prior, 1, phi)[0])
        start, how = weights_of(linear).to(phi.dtype), "by the bound" if prior is None else "as given"
        if prior is None and method.tuning == "training" and method.mean == "keep":
            precision, allowed = widest_prior(phi, y, start, covariance, likelihood, binary=binary)
            how = f"so as to cost the training data at most {allowed:.2g} nats"
        found = ascend(
            phi,
            (y if binary else nn.functional.one_hot(y, outputs)).to(phi.dtype),
            start,
            covariance,
            prior_precision=precision,
            penalised=counted,
            bound=method.bound,
            binary=binary,
            keep_mean=method.mean == "keep",
        )
        harm = _harm(phi, y, start, found.mean, covariance, likelihood) if prior is None else ()
    scale = torch.ones(2, outputs, dtype=phi.dtype, device=phi.device)
    belief = GaussianWeights.of(found.mean, covariance, scale, bias, bound=found.bounds[-1])
    findings = [*harm, Finding("info", f"prior precision {float(found.prior_precision[0]):.3g} {how}", topic="prior")]
    if not found.converged:
        findings.append(
            Finding("warning", f"the bound still moved after {len(found.bounds)} rounds", "fix the prior: prior=...")
        )
    return Fitted(
        LastLayerPosterior(layer, belief),
        likelihood,
        tuple(findings),
        cost=(("bound", found.bounds[-1]), ("rounds", float(len(found.bounds)))),
    )


def _harm(
    phi: Tensor, y: Tensor, own: Tensor, mean: Tensor, covariance: Covariance, likelihood: Likelihood
) -> tuple[Finding, ...]:
    """A warning where the posterior costs the training points more than their own spread explains."""
    from bayesdl.tuning.training import harm_of  # imports the methods, which import this

    seen, goal = phi[:LIMIT], y[:LIMIT]
    with torch.no_grad():
        logits = seen @ own.mT
        plain = training_losses(likelihood, logits, torch.zeros_like(logits), goal)
        cost = float((training_losses(likelihood, seen @ mean.mT, covariance.quad(seen), goal) - plain).mean())
    allowed = 2.0 * harm_of(plain, len(phi))
    if cost <= allowed:
        return ()
    text = f"the posterior costs the training data {cost:.2g} nats a point against the network, more than {allowed:.2g}"
    return (Finding("warning", text, 'use bdl.VBLL() as it is (mean="keep", tuning="training"), or fix the prior'),)


def weights_of(linear: nn.Linear) -> Tensor:
    """Weight and bias of a layer side by side, `(K, d')`."""
    if linear.bias is None:
        return linear.weight.detach()
    return torch.cat([linear.weight.detach(), linear.bias.detach().unsqueeze(1)], 1)


def precision_of(prior: GaussianPrior, outputs: int, like: Tensor) -> Tensor:
    """lambda per output `(K,)` of a prior over a last layer.

    Raises:
        ArgumentError: a mean that is not zero, or other numbers of precisions than one or K.
    """
    value = torch.as_tensor(prior.precision, dtype=like.dtype, device=like.device)
    mean = torch.as_tensor(prior.mean)
    if value.numel() not in (1, outputs) or bool(mean.any()):
        raise ArgumentError(
            f"a Bayesian last layer takes a prior of mean zero with one precision, or one per output ({outputs}); "
            f"got {value.numel()} precisions"
        )
    return value.reshape(-1).expand(outputs)


def model_noise(
    method: VBLL, task: Task, layer: str, data: Iterable[Any], likelihood: HeteroscedasticLikelihood
) -> Fitted:
    """L-BFGS on the bound of a `Heteroscedastic` head over cached features, from the network's own weights.

    Without a prior, one precision for the means and one for the log-variances maximise the bound in turn with it
    (MacKay 1992).
    """
    linear = linear_layer(task.network, layer)
    outputs = linear.out_features
    prior = task.gaussian_prior(layer)
    seen = observations(task.network, layer, likelihood, outputs, data, progress=task.progress)
    with gathered(seen, method.cache_bytes) as (phi, y), torch.enable_grad():
        with torch.device(phi.device):
            head = Heteroscedastic(
                linear.in_features,
                outputs // 2,
                num_data=len(phi),
                covariance=method.covariance,
                rank=method.rank,
                prior_precision=None if prior is None else float(precision_of(prior, 1, phi)[0]),
            ).double()
        head.start_from(linear)
        precision = head.prior_precision.expand(outputs, -1).clone()
        head.prior_precision = precision
        rounds = ROUNDS if prior is None else 1
        value = -math.inf
        for number in range(rounds):
            before, value = value, _maximise(head, phi.double(), y.double())
            settled = abs(value - before) <= TOLERANCE * abs(value)
            if (number and settled) or number == rounds - 1:
                break
            spread = (head.mean.square() + head.covariance.diagonal()).detach()[:, :-1]
            for rows in (slice(0, outputs // 2), slice(outputs // 2, outputs)):
                precision[rows, :-1] = spread[rows].numel() / spread[rows].sum()
    belief = head.float().posterior(layer).belief
    how = "by the bound" if prior is None else "as given"
    text = ", ".join(f"{float(precision[row, 0]):.3g}" for row in (0, -1))
    found = Finding("info", f"prior precisions {text} of means and log-variances {how}", topic="prior")
    bounded = replace(belief, bound=value) if isinstance(belief, GaussianWeights) else belief
    chosen = likelihood if likelihood.nodes is not None else head.likelihood()
    return Fitted(LastLayerPosterior(layer, bounded), chosen, (found,), cost=(("bound", value),))


def _maximise(head: Heteroscedastic, phi: Tensor, y: Tensor) -> float:
    """The bound of log p(data) at its maximum; in place."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head(phi).loss(y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return -float(head(phi).loss(y)) * len(phi)
