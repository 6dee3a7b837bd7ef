"""What a `Predictive` says about its members: log-probabilities or Gaussian components, scores of raw outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesdl.evaluation import validation

# Members whose mean is the predictive's to this are its members; with a link in between they are something else.
MEMBER_TOLERANCE = 1e-4


def class_fields(predictive: Any) -> dict[str, Any]:
    """`log_probs`, `member_weights`, `max_logit` and `energy` of a classification or multilabel `Predictive`."""
    coarse = predictive.probs.dtype in validation.HALF
    probs, latent, task = validation.tensor(predictive.probs, "probs"), predictive.latent, predictive.task
    samples = getattr(latent, "samples", None)
    raw = (latent.mean[None] if samples is None else samples).detach()
    weights = None if samples is None else validation.member_weights(latent.weights, len(raw))
    raw = raw.float() if raw.dtype in validation.HALF else raw
    if raw.shape[-1] == 1:
        # One logit f is the pair (-f/2, f/2): the same probabilities, and scores that treat both labels alike.
        scores = raw_scores(torch.cat([-raw / 2, raw / 2], -1), weights)
    else:
        scores = raw_scores(raw, weights) if task == "classification" else {}
    if samples is not None:
        members = raw.log_softmax(-1) if task == "classification" else torch.nn.functional.logsigmoid(raw)
        share = raw.new_full((len(raw),), 1 / len(raw)) if weights is None else weights.to(raw)
        mixture = torch.einsum("s,snc->nc", share, members.exp())
        if mixture.shape == probs.shape and bool(((mixture - probs).abs() <= MEMBER_TOLERANCE).all()):
            return {"log_probs": members, "member_weights": weights, **scores}
    elif task == "classification" and _certain(latent) and raw.shape[1:] == probs.shape:
        # Outputs that are known have log-probabilities of their own, where probabilities would round to 0.
        known = validation.wide(raw).log_softmax(-1)
        if bool(((known[0].exp() - probs).abs() <= MEMBER_TOLERANCE).all()):
            return {"log_probs": known, **scores}
    return {"log_probs": log_of(probs[None], coarse and task == "classification"), **scores}


def _certain(latent: Any) -> bool:
    variance = getattr(latent, "variance", None)
    return variance is not None and not bool(variance.any())


def moment_fields(predictive: Any, task: str) -> dict[str, Any]:
    """`means`, `variances` and `member_weights` of a regression or count `Predictive`."""
    weights, means, variances = (part.detach() for part in predictive.components)
    # A count of rate 0 has no density; what needs one is then undefined rather than an error for the whole row.
    if task == "count" and not bool((variances > 0).all()):
        return {"means": predictive.mean.detach()[None]}
    return {"means": means, "variances": variances, "member_weights": weights}


def log_of(probs: Tensor, coarse: bool) -> Tensor:
    """Log of probabilities; `coarse` ones are renormalised."""
    # Half precision leaves row sums further from 1 than the float32 that they are stored as may be.
    return probs.log() - probs.sum(-1, keepdim=True).log() if coarse else probs.log()


def raw_scores(logits: Tensor, member_weights: Tensor | None) -> dict[str, Tensor]:
    """OOD scores (N,) of raw outputs (S, N, C), averaged over members."""
    top, free = -validation.wide(logits.amax(-1)), -validation.wide(logits.logsumexp(-1))
    if member_weights is None:
        return {"max_logit": top.mean(0), "energy": free.mean(0)}
    weights = member_weights.to(top)
    return {"max_logit": weights @ top, "energy": weights @ free}
