"""Curvature of contrastive losses in the embeddings of one tower, the other tower's being fixed.

With x an embedding before normalisation, xhat = x / |x|, J = (I - xhat xhat') / |x| the Jacobian of normalisation and
Y the unit embeddings of the other tower in the same batch, the Gauss-Newton matrices of Baumann et al. 2024 ("Post-hoc
probabilistic vision-language models") are, with t the factor of the cosines,

    InfoNCE  t^2 J Y' (diag(pi) - pi pi') Y J,      pi = softmax(t Y xhat)
    SigLIP   t^2 J Y' diag(h (1 - h)) Y J,          h = sigmoid(t Y xhat + bias)

Their sum over a batch is a few matrix products: no matrix of a single pair is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError

# scores held at once
CHUNK = 1 << 25
LOSSES = ("infonce", "siglip")


def contrastive_ggn(x: Tensor, y: Tensor, loss: str, scale: float, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix `(p, p)` of a loss in the embeddings x, summed over them, and the loss itself.

    Args:
        x: embeddings `(N, p)` before normalisation.
        y: those of the other tower, `(N, p)`: row n belongs to row n of x, all others are what it is told from.
        loss: "infonce" (each x classifies the y) or "siglip" (each pair is a binary decision).
        scale: t.
        bias: added to the cosines of "siglip".

    Returns:
        The matrix, and the summed loss, a scalar in nats.

    Raises:
        ShapeError: shapes that do not fit.
        ArgumentError: an embedding of length zero, or an unknown loss.
    """
    if loss not in LOSSES:
        raise ArgumentError(f"loss={loss!r}; expected one of {LOSSES}")
    if x.dim() != 2 or x.shape != y.shape:
        raise ShapeError(f"embeddings {tuple(x.shape)} and {tuple(y.shape)}: expected pairs, both (N, p)")
    length = x.norm(dim=1, keepdim=True)
    others = y.norm(dim=1, keepdim=True)
    if not bool((length > 0).all() and (others > 0).all()):
        raise ArgumentError("an embedding has length zero; its direction is not defined")
    if loss == "infonce" and len(x) == 1:  # told from nothing
        return x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros((), dtype=torch.float64)
    unit, other = x / length, y / others
    share = x.new_zeros(len(y))  # what each y weighs in sum_n Y' diag(weights_n) Y / |x_n|^2
    total, value = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros((), dtype=torch.float64)
    step = max(1, CHUNK // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        cosine = unit[rows] @ other.mT
        own = torch.arange(start, start + len(cosine), device=x.device)
        weights, mean, lost = _outputs(cosine, loss, scale, bias, other, own)
        value += lost
        inverse = length[rows].reciprocal().square()
        share += (inverse * weights).sum(0)
        along = (weights * cosine) @ other  # M xhat, M = Y' diag(w) Y - mean mean'
        if mean is not None:
            total -= (inverse * mean).mT @ mean
            along = along - (mean * unit[rows]).sum(1, keepdim=True) * mean
        cross = (inverse * unit[rows]).mT @ along
        inside = (along * unit[rows]).sum(1, keepdim=True)
        total += (inverse * inside * unit[rows]).mT @ unit[rows] - cross - cross.mT
    total += (share.unsqueeze(1) * other).mT @ other
    return scale**2 * 0.5 * (total + total.mT), value


def _outputs(
    cosine: Tensor, loss: str, scale: float, bias: float, other: Tensor, own: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights `(n, N)` of the outer products, their mean embedding `(n, p)` for a softmax, and the summed loss."""
    here = torch.arange(len(cosine), device=cosine.device)
    if loss == "siglip":
        scores = scale * cosine + bias
        signed = -scores
        signed[here, own] = scores[here, own]
        probability = torch.sigmoid(scores)
        lost = -torch.nn.functional.logsigmoid(signed).sum(dtype=torch.float64)
        return probability * (1 - probability), None, lost
    logs = torch.log_softmax(scale * cosine, 1)
    weights = logs.exp()
    return weights, weights @ other, -logs[here, own].sum(dtype=torch.float64)
