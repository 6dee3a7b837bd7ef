"""Prior of a classifier's last layer: the widest posterior that costs the training points next to nothing.

The bound's own estimate does harm on separable features: larger means with a smaller prior precision leave the
divergence as it is and the fit only better, so that the precision falls without end. A trained classifier's
probabilities are the best that its training data can say; the posterior adds what it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.last_layer.ascent import curvature
from bayesdl.last_layer.parameterisation import Covariance
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Likelihood

GRID = torch.logspace(6, -4, 21, dtype=torch.float64)  # prior precisions, the narrowest posterior first
LIMIT = 1500  # training points that are asked


@torch.no_grad()
def widest_prior(
    phi: Tensor, targets: Tensor, mean: Tensor, covariance: Covariance, likelihood: Likelihood, *, binary: bool = False
) -> tuple[float, float]:
    """The least prior precision below which some costs too much, and the cost allowed, in nats per training point.

    The covariance at every candidate is that of the curvature at the means (Laplace), which bounds from above what the
    variational one costs where both are small. The means stay those of the network.

    Args:
        phi: features with their constant, `(N, d')`.
        targets: as the likelihood takes them, `(N, ...)`.
        mean: of the weights, `(K, d')`.
        covariance: scratch; what it holds afterwards is one of the candidates.
        likelihood: the predictive whose cost counts.
        binary: K two-class problems.
    """
    from bayesdl.tuning.training import harm_of  # imports the methods, which import this

    scatter = curvature(phi, mean, binary=binary)
    seen, goal = phi[:LIMIT], targets[:LIMIT]
    logits = seen @ mean.mT
    plain = training_losses(likelihood, logits, torch.zeros_like(logits), goal)
    allowed = harm_of(plain, len(phi))
    eye = torch.eye(phi.shape[1], dtype=scatter.dtype, device=scatter.device)
    best = float(GRID[0])
    for candidate in GRID.tolist():
        covariance.set_precision(scatter + candidate * eye)
        cost = training_losses(likelihood, logits, covariance.quad(seen), goal) - plain
        if not float(cost.mean()) <= allowed:
            break
        best = candidate
    return best, allowed


def training_losses(likelihood: Likelihood, mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Predictive NLL of every point `(N,)` for outputs of mean and variance `(N, K)`."""
    from bayesdl.tuning.temperature import predictive_losses

    return predictive_losses(likelihood, GaussianLatent(mean, variance), targets)
