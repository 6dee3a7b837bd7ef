"""The exact Hessian of -sum log p(y | f(theta)) in the structures that hold it: full, diag, lowrank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.diag import Diag
from bayesdl.curvature.full import Full
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.linearised import GROUP, Local, Problem, Seen
from bayesdl.curvature.lowrank import DEFAULT_RANK, OVERSAMPLING, LowRank
from bayesdl.curvature.passes import Fit, check_curvature
from bayesdl.curvature.registry import STRUCTURES, Recipe, check_recipe, check_shared
from bayesdl.curvature.structure import Structure
from bayesdl.data import check_rereadable
from bayesdl.errors import UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network

__all__ = ["HESSIAN_STRUCTURES", "fit_hessian"]

HESSIAN_STRUCTURES = ("full", "diag", "lowrank")
# every parameter costs two backward passes over the data
MAX_DIAGONAL = 20_000
# block Lanczos steps, each a pass over the data
STEPS = 4


def fit_hessian(
    network: Network,
    layout: Layout,
    data: Iterable[Any],
    likelihood: Likelihood,
    *,
    structure: Recipe,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    allow_partial: bool = False,
    progress: bool = True,
    rank: int | None = None,
    shared: str = "expand",
) -> Fit:
    """The Hessian at the network's weights; signed, because it need not be positive semi-definite there.

    "full" and "diag": products with all P unit vectors, `GROUP` of them at once, in one pass over the data: two
    backward passes a parameter and example. "lowrank": the eigenvectors of largest magnitude in the space of `STEPS`
    block Lanczos steps, a pass each (exact where that space is everything).

    Raises:
        UnsupportedError: another structure, or too many parameters for it.
        ArgumentError: "lowrank", and the loader does not yield the same data in each pass.
        NumericalError: the Hessian is exactly zero.
    """
    check_recipe(structure, rank)
    if not isinstance(structure, str) or structure not in HESSIAN_STRUCTURES:
        raise UnsupportedError(
            f'structure={structure!r} with kind="hessian": a Hessian is no sum of outer products, which this is made '
            f'of. Use one of {HESSIAN_STRUCTURES}, or kind="ggn"'
        )
    check_shared(structure, shared)
    dtype = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
    if isinstance(likelihood, Gaussian) and likelihood.noise is None:
        likelihood = likelihood.with_noise(1.0)
    found: Structure = STRUCTURES[structure].empty(layout, dtype, network.device)  # refuses what does not fit
    running = network if network.dtype is dtype else network.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    problem = Problem(running, layout, data, likelihood, "hessian", memory=memory, allow_partial=allow_partial)
    if structure == "lowrank":
        check_rereadable("data", data)
        found, seen = _lowrank(problem, min(rank or DEFAULT_RANK, layout.numel), progress)
    elif structure == "full":
        found, seen = _full(problem, progress)
    else:
        found, seen = _diagonal(problem, progress)
    found.check_finite()
    check_curvature(found)
    return Fit(found, (), seen.num_data, seen.log_likelihood, seen.squared_error)


def _full(problem: Problem, progress: bool) -> tuple[Full, Seen]:
    size = problem.layout.numel
    matrix = torch.zeros(size, size, dtype=problem.dtype, device=problem.network.device)

    def add(local: Local) -> None:
        for start, rows in _units(matrix):
            matrix[start : start + len(rows)] += local.product(rows)

    seen = problem.visit(add, GROUP, "Hessian", progress)
    return Full.of_dense(problem.layout, 0.5 * (matrix + matrix.T), True), seen


def _diagonal(problem: Problem, progress: bool) -> tuple[Diag, Seen]:
    size = problem.layout.numel
    if size > MAX_DIAGONAL:
        raise UnsupportedError(
            f"the exact diagonal of a Hessian over {size} parameters takes as many products with it (limit "
            f'{MAX_DIAGONAL}); use kind="ggn", structure="lowrank", fewer parameters, or the estimate '
            'bdl.curvature.operator(..., kind="hessian").diagonal()'
        )
    total = torch.zeros(size, dtype=problem.dtype, device=problem.network.device)

    def add(local: Local) -> None:
        for start, rows in _units(total):
            total[start : start + len(rows)] += local.product(rows).diagonal(start)

    seen = problem.visit(add, GROUP, "diagonal of the Hessian", progress)
    return Diag(problem.layout, tuple(part.clone() for part in problem.layout.split(total)), True), seen


def _units(like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All unit vectors, a group at a time: the first one's place and `(r, P)`."""
    size = len(like)
    for start in range(0, size, GROUP):
        rows = like.new_zeros(min(GROUP, size - start), size)
        rows.diagonal(start).fill_(1.0)
        yield start, rows


def _lowrank(problem: Problem, rank: int, progress: bool) -> tuple[LowRank, Seen]:
    """Rayleigh-Ritz on a block Krylov space: the image of every block is known, so no further product is needed."""
    size, device = problem.layout.numel, problem.network.device
    width = min(rank + OVERSAMPLING, size)
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.linalg.qr(start)[0].to(device)
    basis, images = block[:, :0], block[:, :0]
    first: Seen | None = None
    for _ in range(STEPS):
        image, seen = problem.times(block.T.to(problem.dtype).contiguous(), progress)
        first = first or seen
        problem.check_same(first, seen)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image.T.double()], 1)
        block = _beyond(image.T.double(), basis, min(width, size - basis.shape[1]), problem.dtype)
        if not block.shape[1]:
            break
    core = basis.T @ images
    values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
    kept = values.abs().argsort(descending=True)[:rank]
    kept = kept[values[kept].abs() > size * torch.finfo(problem.dtype).eps * values.abs().max()]
    u, m = (basis @ vectors[:, kept]).to(problem.dtype), torch.diag(values[kept]).to(problem.dtype)
    return LowRank(problem.layout, u, m, rank=rank, signed=True), first or seen


def _beyond(image: Tensor, basis: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """Orthonormal columns of the image outside the basis, at most so many; none where only rounding is left."""
    scale = float(image.norm())
    rest = image
    for _ in range(2):
        rest = rest - basis @ (basis.T @ rest)
    vectors, lengths, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = vectors[:, lengths > 1e2 * torch.finfo(dtype).eps * scale][:, :most]
    kept = kept - basis @ (basis.T @ kept)  # short columns were scaled up, and their rounding with them
    return torch.linalg.qr(kept)[0]
