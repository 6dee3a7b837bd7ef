"""Training a private copy of a network with a Bayesian head: mode "full" of `bdl.VBLL`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import UnsupportedError
from bayesdl.last_layer.cache import proven
from bayesdl.last_layer.features import linear_layer
from bayesdl.last_layer.head import LinearHead
from bayesdl.last_layer.heads import Classification, Regression
from bayesdl.last_layer.heteroscedastic import Heteroscedastic
from bayesdl.last_layer.output import HeadOutput
from bayesdl.last_layer.surgery import parameter_groups, replace
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.likelihoods import Heteroscedastic as HeteroscedasticLikelihood
from bayesdl.methods.base import Fitted, Task, residual_noise
from bayesdl.network import first_inputs
from bayesdl.posteriors import PointPosterior
from bayesdl.posteriors.last_layer import LastLayerPosterior

if TYPE_CHECKING:
    from bayesdl.methods.vbll import VBLL

CLIP = 1.0  # of the gradient norm, as for any network with a learned noise


def train(method: VBLL, task: Task, layer: str, data: Iterable[Any]) -> Fitted:
    """Train a copy of the network with a head in place of `layer`; the posterior holds all that changed.

    Raises:
        UnsupportedError: a likelihood without a trained head.
    """
    head = _head(method, task, layer, data)
    with torch.no_grad():
        proven(task.network, layer, first_inputs(data, task.network.batch))
    copy = _without_head(replace(task.models[0], layer, head), layer)
    whole = nn.ModuleList([copy, head]).train()
    optimizer = torch.optim.AdamW(parameter_groups(whole, method.weight_decay), lr=method.lr)
    last = float("nan")
    for epoch in range(method.epochs):
        total, seen = 0.0, 0
        for number, inputs, target in batches(
            task.network, data, progress=task.progress, describe=f"vbll epoch {epoch + 1}/{method.epochs}"
        ):
            with torch.enable_grad(), in_batch(number):
                optimizer.zero_grad(set_to_none=True)
                loss = _output(task, copy, head, inputs).loss(target.to(task.network.device))
                loss.backward()
                nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
                optimizer.step()
            total, seen = total + float(loss.detach()), seen + 1
        last = total / seen
    whole.eval()
    found = Finding("info", f"trained for {method.epochs} epochs to a bound of {-last:.4g} nats per example")
    posterior = head.posterior(layer)
    held = LastLayerPosterior(layer, posterior.belief, _trunk(task, copy))
    given = isinstance(task.likelihood, Gaussian) and task.likelihood.noise is not None
    return Fitted(
        held,
        task.likelihood if given else head.likelihood(),
        (found,),
        cost=(("epochs", float(method.epochs)), ("loss", last)),
    )


def _head(method: VBLL, task: Task, layer: str, data: Iterable[Any]) -> LinearHead:
    linear = linear_layer(task.network, layer)
    task.likelihood.check_outputs(linear.weight.new_zeros(1, linear.out_features))
    prior = task.gaussian_prior(layer)
    options: dict[str, Any] = {
        "num_data": _count(task, data),
        "covariance": method.covariance,
        "rank": method.rank,
        "noise": method.noise,
        "bias": linear.bias is not None,
        "noise_prior": method.noise_prior or (0.5, 0.05),
        "prior_precision": None if prior is None else float(torch.as_tensor(prior.precision).reshape(-1)[0]),
    }
    sizes = (linear.in_features, linear.out_features)
    if isinstance(task.likelihood, HeteroscedasticLikelihood):
        kept = {name: options[name] for name in ("num_data", "covariance", "rank", "prior_precision")}
        return Heteroscedastic(sizes[0], sizes[1] // 2, bias=linear.bias is not None, **kept)
    if isinstance(task.likelihood, (Categorical, Bernoulli)):
        options |= {"likelihood": task.likelihood.name, "link": task.likelihood.link}
        if isinstance(task.likelihood, Categorical) and task.likelihood.ignore_index is not None:
            options["ignore_index"] = task.likelihood.ignore_index
        return Classification(*sizes, bound=method.bound, **options)
    if isinstance(task.likelihood, Gaussian):
        known = task.likelihood.noise is not None
        start = (
            torch.as_tensor(task.likelihood.noise) if known else residual_noise(task, PointPosterior(), task.likelihood)
        )
        return Regression(*sizes, init_noise=start.cpu(), fixed_noise=known, **options)
    raise UnsupportedError(
        f"the {task.likelihood.name} likelihood has no trained head; use gaussian, heteroscedastic, "
        "categorical or bernoulli"
    )


def _count(task: Task, data: Iterable[Any]) -> int:
    """Supervised elements: tokens, not sequences; those that are ignored do not count."""
    total = 0
    for _, _, target in batches(task.network, data, progress=False, describe="count"):
        y = torch.as_tensor(target)
        if isinstance(task.likelihood, Categorical):
            ignored = task.likelihood.ignore_index
            total += y.numel() if ignored is None else int((y != ignored).sum())
        else:
            total += len(y)
    return max(1, total)


def _without_head(copy: nn.Module, layer: str) -> nn.Module:
    """The network with nothing in the place of its head: it returns the features, pooled as its outputs are."""
    parent, _, attribute = layer.rpartition(".")
    if not attribute:
        return nn.Identity()
    setattr(copy.get_submodule(parent), attribute, nn.Identity())
    return copy


def _output(task: Task, copy: nn.Module, head: LinearHead, inputs: Any) -> HeadOutput:
    phi = task.network.forward(copy, task.network.prepare(inputs))
    return HeadOutput(head, *head.moments(phi), phi)


def _trunk(task: Task, copy: nn.Module) -> dict[str, Tensor]:
    """Tensors of the trained copy under the network's names."""
    own = dict((*copy.named_parameters(), *copy.named_buffers()))
    names = task.network.tensors
    return {n: t.detach().clone() for n, t in own.items() if n in names}
