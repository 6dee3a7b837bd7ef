"""Joint predictive log-loss: do the members agree on which inputs go together? Marginal scores cannot tell.

Blocks of tau inputs are scored by -log sum_s w_s prod_t p_s(y_t | x_t), in nats per block (Osband et al. 2022). It
takes members that are functions: each answers for all inputs of a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation import validation
from bayesdl.evaluation.predictions import Predictions
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.linalg import cholesky

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

Sampling = Literal["random", "dyadic"]


def member_log_likelihood(predictions: Predictions) -> Tensor:
    """(S, N) float64, log p_s(y_n | x_n) of every member.

    Raises:
        UndefinedError: there is one member, whose joint is a product of marginals by construction, or no targets.
    """
    if predictions.num_members < 2:
        raise validation.UndefinedError(
            "a joint log-loss needs members that are functions; these predictions hold one", "one member"
        )
    targets = predictions.labelled()
    if predictions.log_probs is not None and predictions.task == "classification":
        members = validation.wide(predictions.log_probs)
        return members.gather(2, targets[None, :, None].expand(len(members), -1, 1))[..., 0]
    if predictions.task != "regression":
        raise validation.UndefinedError("joint log-loss: classification and regression", f"not for {predictions.task}")
    return predictions.mixture.member_log_prob(validation.wide(targets))


def joint_nll(
    members: Predictions | Tensor,
    *,
    tau: int = 10,
    sampling: Sampling = "random",
    blocks: int | None = None,
    member_weights: Any = None,
    generator: torch.Generator | None = None,
) -> float:
    """Joint log-loss in nats per block of `tau` inputs; with tau = 1 it is the NLL.

    Args:
        members: predictions with members, or log-likelihoods (S, N) of the targets under each member.
        sampling: "random": a random partition of the inputs into blocks. "dyadic": every block repeats two anchor
            inputs, tau times in all, which keeps large tau informative.
        blocks: number of blocks; None takes N // tau for "random" (which needs at most that), N for "dyadic".
        member_weights: (S,), where `members` is a matrix.
        generator: for the blocks; None is seeded with 0.

    Raises:
        UndefinedError: fewer than two members. ArgumentError: fewer inputs than a block takes.
    """
    return float(_losses(members, tau, sampling, blocks, member_weights, generator)[0].mean())


def model_joint_nll(
    model: BayesianModel,
    x: Any,
    targets: Tensor,
    *,
    tau: int = 10,
    sampling: Sampling = "random",
    blocks: int | None = None,
    num_samples: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    """`joint_nll` of a model itself: in closed form where the functions are Gaussian, else from drawn functions.

    -log N(y; m, K + s^2 I) of every block for a Gaussian likelihood over a Gaussian belief, whose members no one would
    have to draw: from S draws the joint density of many inputs is estimated poorly.

    Args:
        x: a batch of N inputs, one tensor. targets: (N,) or (N, C).
        tau, sampling, blocks: as in `joint_nll`.
        num_samples, generator: of the functions, where they are drawn; the generator chooses the blocks too.

    Raises:
        ShapeError: inputs that are no tensor, or other targets. ArgumentError: fewer inputs than a block takes.
    """
    if not isinstance(x, Tensor) or len(x) != len(targets):
        raise ShapeError(f"x must be one tensor of as many inputs as there are targets ({len(targets)})")
    tau = validation.bin_count(tau)
    index = _blocks(len(x), tau, sampling, blocks, generator).to(x.device)
    likelihood = model.likelihood
    if isinstance(likelihood, Gaussian) and isinstance(model(x[:1]).latent, GaussianLatent):
        y = validation.wide(targets).reshape(len(x), -1)
        return sum(_block_nll(model, likelihood, x[rows], y[rows]) for rows in index) / len(index)
    with torch.no_grad():
        functions = model.draw(num_samples, generator=generator)
        each = torch.stack([_own_log_prob(likelihood, f(x), targets) for f in functions])
    return float(_of_blocks(validation.wide(each).reshape(num_samples, -1), index, None)[0].mean())


def _own_log_prob(likelihood: Likelihood, f: Tensor, targets: Tensor) -> Tensor:
    return likelihood.log_prob(f, likelihood.check_targets(f, targets))


def _block_nll(model: BayesianModel, likelihood: Gaussian, x: Tensor, y: Tensor) -> float:
    # An input that occurs twice in a dyadic block has one function value and two noises.
    _, where = torch.unique(x.flatten(1), dim=0, return_inverse=True)
    places = torch.arange(len(x), device=x.device)
    first = places.new_full((int(where.max()) + 1,), len(x)).scatter_reduce(0, where, places, "amin")
    joint = model.joint(x[first])
    noise = validation.wide(likelihood.scale(joint.mean).detach()).square().expand_as(joint.mean)[where].flatten()
    covariance = validation.wide(joint.covariance.detach())[where][:, :, where]
    root = cholesky(covariance.flatten(2).flatten(0, 1) + torch.diag(noise), "joint covariance of the targets")
    off = (y - validation.wide(joint.mean.detach())[where]).reshape(-1, 1)
    z = torch.linalg.solve_triangular(root, off, upper=False)
    return float(0.5 * z.square().sum() + root.diagonal().log().sum() + 0.5 * len(noise) * math.log(2 * math.pi))


def joint_gain(
    members: Predictions | Tensor,
    *,
    tau: int = 10,
    sampling: Sampling = "random",
    blocks: int | None = None,
    member_weights: Any = None,
    generator: torch.Generator | None = None,
) -> float:
    """Nats per block that the joint gains over the product of its marginals; 0 for members that are independent."""
    joint, marginal = _losses(members, tau, sampling, blocks, member_weights, generator)
    return float((marginal - joint).mean())


def _losses(
    members: Predictions | Tensor,
    tau: Any,
    sampling: str,
    blocks: int | None,
    member_weights: Any,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    tau = validation.bin_count(tau)
    if isinstance(members, Predictions):
        log_p, weights = member_log_likelihood(members), members.member_weights
    else:
        log_p = validation.wide(validation.tensor(members, "members"))
        validation.rank(log_p, "members", (2,))
        validation.not_empty(log_p, "members")
        if bool((~(log_p < torch.inf)).any()):
            raise ArgumentError("members: log-likelihoods (S, N) must be below +inf and not NaN")
        weights = validation.member_weights(member_weights, len(log_p))
        if len(log_p) < 2:
            raise validation.UndefinedError("a joint log-loss needs members; one was given", "one member")
    return _of_blocks(log_p, _blocks(log_p.shape[1], tau, sampling, blocks, generator).to(log_p.device), weights)


def _of_blocks(log_p: Tensor, index: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Joint and summed marginal losses (blocks,)."""
    share = log_p.new_full((len(log_p),), -math.log(len(log_p))) if weights is None else weights.to(log_p).log()
    each = log_p[:, index]
    joint = -(each.sum(-1) + share[:, None]).logsumexp(0)
    marginal = -(each + share[:, None, None]).logsumexp(0).sum(-1)
    return joint, marginal


def _blocks(size: int, tau: int, sampling: str, blocks: int | None, generator: torch.Generator | None) -> Tensor:
    """Indices (blocks, tau)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    device = generator.device
    if sampling == "random":
        if size < tau:
            raise ArgumentError(f"blocks of tau={tau} inputs need at least as many; there are {size}")
        possible = size // tau
        count = possible if blocks is None else validation.bin_count(blocks)
        if count > possible:
            raise ArgumentError(f"blocks={count}: {size} inputs make {possible} blocks of {tau}")
        return torch.randperm(size, generator=generator, device=device)[: count * tau].reshape(count, tau)
    if sampling != "dyadic":
        raise ArgumentError(f"sampling={sampling!r}: expected 'random' or 'dyadic'")
    if size < 2:
        raise ArgumentError("dyadic blocks need two anchor inputs; there is one")
    count = size if blocks is None else validation.bin_count(blocks)
    first = torch.randint(size, (count,), generator=generator, device=device)
    second = (first + torch.randint(1, size, (count,), generator=generator, device=device)) % size
    side = torch.randint(2, (count, tau), generator=generator, device=device).bool()
    return torch.where(side, first[:, None], second[:, None])
