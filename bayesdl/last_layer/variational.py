"""Variational last layers on the features of a network that stays as it is; the trunk runs once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError
from bayesdl.last_layer.ascent import ascend
from bayesdl.last_layer.cache import gathered, observations
from bayesdl.last_layer.features import linear_layer
from bayesdl.last_layer.parameterisation import make
from bayesdl.likelihoods import Bernoulli, Categorical
from bayesdl.methods.base import Fitted, Task
from bayesdl.posteriors.last_layer import GaussianWeights, LastLayerPosterior
from bayesdl.priors import GaussianPrior

if TYPE_CHECKING:
    from bayesdl.methods.vbll import VBLL

HALF = (torch.float16, torch.bfloat16)


def classify(method: VBLL, task: Task, layer: str, data: Iterable[Any], likelihood: Categorical | Bernoulli) -> Fitted:
    """Maximise the bound of `bayesdl.last_layer.ascent` from the network's own weights."""
    linear = linear_layer(task.network, layer)
    outputs, bias = linear.out_features, linear.bias is not None
    prior = task.gaussian_prior()
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
        found = ascend(
            phi,
            (y if binary else nn.functional.one_hot(y, outputs)).to(phi.dtype),
            weights_of(linear).to(phi.dtype),
            covariance,
            prior_precision=None if prior is None else float(precision_of(prior, 1, phi)[0]),
            penalised=counted,
            bound=method.bound,
            binary=binary,
            keep_mean=method.mean == "keep",
        )
    scale = torch.ones(2, outputs, dtype=phi.dtype, device=phi.device)
    belief = GaussianWeights.of(found.mean, covariance, scale, bias, bound=found.bounds[-1])
    how = "by the bound" if prior is None else "as given"
    findings = [Finding("info", f"prior precision {float(found.prior_precision[0]):.3g} {how}", topic="prior")]
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
