"""What to label next: scores of single inputs (BALD, EPIG), and batches from a kernel (LCMD and simpler rules)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.gram import gram, joined
from bayesdl.curvature.plan import plan
from bayesdl.data import batches
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.evaluation import validation
from bayesdl.likelihoods import Gaussian
from bayesdl.model import BayesianModel
from bayesdl.network import Network, first_inputs

Rule = Literal["lcmd", "max_det", "max_diagonal", "farthest", "random"]
# Elements of the largest temporary of `epig_of`.
CHUNK = 1 << 22


def bald(predictive: Any) -> Tensor:
    """(B,) float64, mutual information in nats of y and the model (Houlsby et al. 2011) of a `Predictive` or
    `Predictions`.

    Classes: the epistemic part. Regression: 1/2 log(total / aleatoric), summed over outputs, which is exact for a
    Gaussian.

    Raises:
        UnsupportedError: counts, whose information has no closed form here.
    """
    if predictive.task in ("classification", "multilabel"):
        return validation.wide(predictive.epistemic)
    if predictive.task != "regression":
        raise UnsupportedError(f"bald: classes and regression; the predictive is of a {predictive.task} task")
    total, noise = validation.wide(predictive.total), validation.wide(predictive.aleatoric)
    return 0.5 * (total / noise).log().sum(-1)


def epig(
    model: BayesianModel,
    pool: Any,
    targets: Any,
    *,
    num_samples: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B,) float64, expected predictive information gain in nats (Bickford Smith et al. 2023).

    Mean over target inputs x* of the mutual information of y at a pool input and y* at x*: what a label tells about the
    predictions that matter. Classes by draws of functions; Gaussian regression in closed form from the joint.

    Args:
        pool, targets: one batch each of what the network takes; `targets` from where the model will be used.
        num_samples, generator: of the functions drawn.

    Raises:
        UnsupportedError: a likelihood of neither classes nor Gaussian noise.
    """
    if isinstance(model.likelihood, Gaussian):
        joint = model.joint(torch.cat([pool, targets]), num_samples=num_samples, generator=generator)
        size, outputs = joint.mean.shape
        matrix = validation.wide(joint.distribution.covariance_matrix.detach())
        return epig_gaussian(matrix.view(size, outputs, size, outputs), len(pool))
    functions = model.draw(num_samples, generator=generator)
    with torch.no_grad():
        each = [torch.stack([_probs(model, f(x)) for f in functions]) for x in (pool, targets)]
    return epig_of(*each)


def epig_of(pool: Any, targets: Any) -> Tensor:
    """`epig` from probabilities of coherent members: pool (S, N, C) and targets (S, M, C), member by member."""
    first, second = (validation.wide(validation.probabilities(p)) for p in (pool, targets))
    if first.dim() != 3 or second.dim() != 3 or len(first) != len(second):
        raise ShapeError(f"members {tuple(first.shape)} and {tuple(second.shape)}: expected (S, N, C) and (S, M, C)")
    own, other = _entropy(first.mean(0)), _entropy(second.mean(0))
    step = max(1, CHUNK // (second[0].numel() * first.shape[2]))
    found = []
    for start in range(0, first.shape[1], step):
        part = first[:, start : start + step]
        both = torch.einsum("snc,smd->nmcd", part, second) / len(first)
        found.append((own[start : start + step, None] + other - _entropy(both.flatten(2))).mean(1))
    return torch.cat(found).clamp_min(0.0)


def epig_gaussian(covariance: Tensor, num_pool: int) -> Tensor:
    """`epig` from the covariance (B, C, B, C) of y, noise included, at pool inputs followed by target inputs."""
    size = len(covariance)
    diagonal = covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    alone = torch.linalg.slogdet(diagonal).logabsdet
    pool, rest = slice(0, num_pool), slice(num_pool, size)
    cross = covariance[pool][:, :, rest].permute(0, 2, 1, 3)  # (N, M, C, C)
    shape = cross.shape
    top = torch.cat([diagonal[pool][:, None].expand(shape), cross], -1)
    low = torch.cat([cross.mT, diagonal[rest].expand(shape)], -1)
    together = torch.linalg.slogdet(torch.cat([top, low], -2)).logabsdet
    return (0.5 * (alone[pool][:, None] + alone[rest] - together)).mean(1).clamp_min(0.0)


def gradient_kernel(
    model: nn.Module | Network | BayesianModel, data: Iterable[Any], *, batch: Any = None, progress: bool = False
) -> Tensor:
    """(N, N) float64, inner products of the gradients of the outputs at all inputs of a loader, summed over outputs.

    The empirical neural tangent kernel of the selected parameters, from layer factors: no Jacobian is formed for linear
    layers. Memory is N^2 and the factors of all inputs.
    """
    network = model.network if isinstance(model, BayesianModel) else model
    network = network if isinstance(network, Network) else Network(network, batch=batch)
    layout = plan(network, first_inputs(data, network.batch))
    dtype = torch.promote_types(network.dtype or torch.float32, torch.float32)
    inputs = [x for _, x, _ in batches(network, data, progress=progress, need_targets=False)]
    total: Tensor | None = None
    for output in range(layout.outputs):
        parts = [layer_factors(network, layout, x, _one_output(output), dtype)[1] for x in inputs]
        kernel = gram([joined(list(block)) for block in zip(*parts, strict=True)])
        total = kernel if total is None else total + kernel
    if total is None:
        raise ArgumentError("the network has no outputs")
    return total


def select(
    model: nn.Module | Network | BayesianModel,
    pool: Iterable[Any],
    n: int,
    *,
    train: Iterable[Any] | None = None,
    rule: Rule = "lcmd",
    noise: float = 1e-2,
    batch: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(n,) int64, pool inputs to label next, chosen by `select_from` with the gradient kernel of the network.

    Args:
        pool: loader of candidates. train: loader of what is labelled already, whose points are centres from the start.
    """
    both = [*pool, *(train or [])]
    kernel = gradient_kernel(model, both, batch=batch)
    network = model.network if isinstance(model, BayesianModel) else model
    network = network if isinstance(network, Network) else Network(network, batch=batch)
    size = sum(_size(x) for _, x, _ in batches(network, pool, progress=False, need_targets=False))
    return select_from(kernel, n, num_pool=size, rule=rule, noise=noise, generator=generator)


def select_from(
    kernel: Any,
    n: int,
    *,
    num_pool: int | None = None,
    rule: Rule = "lcmd",
    noise: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(n,) int64, in order of choice, from a kernel (N, N) whose first `num_pool` points are candidates.

    The others are labelled already: they are centres of "lcmd" and "farthest" and are conditioned on by "max_det".

    Args:
        rule: "lcmd": largest cluster, maximum distance (Holzmueller et al. 2023). "max_det": greedy largest determinant
            of kernel + `noise` I, relative to the mean diagonal. "farthest": farthest from all centres. "max_diagonal":
            largest variance, without regard to each other. "random".

    Raises:
        ArgumentError: more points than candidates. ShapeError: no square kernel.
    """
    k = validation.wide(validation.tensor(kernel, "kernel"))
    if k.dim() != 2 or k.shape[0] != k.shape[1]:
        raise ShapeError(f"kernel has shape {tuple(k.shape)}, expected (N, N)")
    validation.finite(k, "kernel")
    size = len(k) if num_pool is None else num_pool
    if isinstance(n, bool) or not 1 <= n <= size <= len(k):
        raise ArgumentError(f"{n} points of {size} candidates, in a kernel of {len(k)}: expected 1 <= n <= candidates")
    if rule == "random":
        device = "cpu" if generator is None else generator.device
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return torch.randperm(size, generator=generator, device=device)[:n]
    if rule == "max_diagonal":
        return k.diagonal()[:size].sort(descending=True, stable=True).indices[:n]
    if rule == "max_det":
        return _max_det(k, n, size, noise)
    if rule not in ("lcmd", "farthest"):
        raise ArgumentError(f"rule={rule!r}: expected lcmd, max_det, max_diagonal, farthest or random")
    return _clusters(k, n, size, rule == "lcmd")


def _clusters(k: Tensor, n: int, size: int, largest_cluster: bool) -> Tensor:
    own = k.diagonal()
    # Without a centre every distance is that to the origin of feature space: the first point has the largest norm.
    nearest, distance = own.new_zeros(size, dtype=torch.int64), own[:size].clone()
    for centre in range(size, len(k)):
        nearest, distance = _closer(k, own, centre, nearest, distance, first=centre == size)
    chosen: list[int] = []
    free = torch.ones(size, dtype=torch.bool, device=k.device)
    for _ in range(n):
        reach = distance
        if largest_cluster:
            mass = own.new_zeros(len(k)).index_add_(0, nearest, distance * free)
            # A cluster whose points are all on its centre, or taken, has no mass.
            reach = torch.where(nearest == int(mass.argmax()), distance, -torch.inf)
        point = int(torch.where(free, reach, -torch.inf).argmax())
        if not bool(free[point]):
            point = int(free.nonzero()[0])
        chosen.append(point)
        free[point] = False
        nearest, distance = _closer(k, own, point, nearest, distance, first=len(k) == size and len(chosen) == 1)
    return torch.tensor(chosen)


def _closer(
    k: Tensor, own: Tensor, centre: int, nearest: Tensor, distance: Tensor, *, first: bool
) -> tuple[Tensor, Tensor]:
    size = len(distance)
    to = (own[:size] + own[centre] - 2 * k[:size, centre]).clamp_min(0.0)
    better = torch.ones_like(to, dtype=torch.bool) if first else to < distance
    return torch.where(better, centre, nearest), torch.where(better, to, distance)


def _max_det(k: Tensor, n: int, size: int, noise: float) -> Tensor:
    """Pivoted Cholesky: the point of largest variance given all before it, of observations with noise."""
    level = noise * float(k.diagonal().mean())
    kept = k[:size, :size]
    if size < len(k):
        known = k[size:, size:] + level * torch.eye(len(k) - size, dtype=k.dtype, device=k.device)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(known), k[size:, :size], upper=False)
        kept = kept - half.T @ half
    variance = kept.diagonal().clone()
    rows = kept.new_zeros(n, size)
    chosen: list[int] = []
    for step in range(n):
        masked = variance.clone()
        masked[chosen] = -torch.inf
        point = int(masked.argmax())
        chosen.append(point)
        rows[step] = (kept[point] - rows[:step, point] @ rows[:step]) / (variance[point] + level).sqrt()
        variance = variance - rows[step].square()
    return torch.tensor(chosen)


def _one_output(output: int) -> Callable[[Tensor], Tensor]:
    def cotangent(f: Tensor) -> Tensor:
        vectors = torch.zeros_like(f)[None]
        vectors[..., output] = 1.0
        return vectors

    return cotangent


def _probs(model: BayesianModel, outputs: Tensor) -> Tensor:
    law = model.likelihood.distribution(outputs)
    if isinstance(law, Categorical):
        return law.probs
    if isinstance(law, Bernoulli) and law.probs.shape[-1] == 1:
        return torch.cat([1 - law.probs, law.probs], -1)
    raise UnsupportedError(f"epig: classes or Gaussian noise; the likelihood is {model.likelihood.name}")


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)


def _size(x: Any) -> int:
    from bayesdl.batch import batch_size

    return batch_size(x)
