"""What a regression network would have said about some training points without them, for its last layer to be tuned by.

The features of an overfitted network have seen the targets: residuals of the last layer alone, left out or not, are
those of the training set. The whole network's linear model in function space has left-out residuals that are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.data import batches
from bayesdl.last_layer.features import features
from bayesdl.likelihoods import Likelihood
from bayesdl.network import Network

LIMIT = 1500  # training examples times outputs: the kernel of the linear model is decomposed whole


def left_out_pairs(
    network: Network,
    layer: str,
    likelihood: Likelihood,
    data: Iterable[Any],
    misfit: Tensor,
    limit: int = LIMIT,
) -> tuple[Tensor, Tensor]:
    """Features `(N, d)` of the first training examples, and targets `(N, K)` at their left-out distance.

    Args:
        network: trained on the data, one row of outputs an example.
        layer: its last layer.
        likelihood: checks the targets.
        data: training loader, or the features of no more than `limit / K` of its examples.
        misfit: root mean squared residual of the network over all training points, `(K,)`. By how much a left-out
            residual exceeds the network's own is estimated on the examples used, the network's own are known of all.
        limit: examples times outputs.

    Raises:
        UnsupportedError: a layer of the network has no Jacobian.
    """
    from bayesdl.tuning.training import first_batches, network_residuals  # imports the methods, which import this

    count = max(2, limit // len(misfit))
    kept = first_batches(network, data, count)
    level = misfit.double().clamp(min=1e-12)
    found, own = network_residuals(
        network, likelihood, kept, count, level=level, prior_mean=torch.zeros((), device=level.device)
    )
    usual = own.square().mean(0).sqrt()
    found = found * torch.where(usual > 0, misfit.to(own) / usual, torch.ones_like(usual))
    with torch.no_grad():
        parts = [features(network, layer, inputs) for _, inputs, _ in batches(network, kept, progress=False)]
        phi = torch.cat(parts)[: len(found)]
        linear = network.module().get_submodule(layer)
        mean = linear(phi)
    return phi, mean.double() + found


def misfit(linear: nn.Linear, phi: Tensor, y: Tensor) -> Tensor:
    """Root mean squared residual `(K,)` of a layer on features `(N, d)` and targets `(N, K)`, float64."""
    with torch.no_grad():
        return (y.double() - linear(phi).double()).square().mean(0).sqrt()
