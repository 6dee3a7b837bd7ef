"""Curvature without a matrix: products with H by passes over the data, and every query by Krylov methods on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bayesdl.batch import BatchAdapter, index_batch, resolve_adapter
from bayesdl.curvature import traces
from bayesdl.curvature.cotangents import KINDS
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.krylov import Product, Solution, conjugate_gradients
from bayesdl.curvature.layout import Layout, cast
from bayesdl.curvature.linearised import Local, Problem, find_slopes
from bayesdl.curvature.plan import plan
from bayesdl.curvature.spectrum import Spectrum, exact_spectrum, lanczos_spectrum, whitened_logdet
from bayesdl.curvature.structure import Shift, Structure
from bayesdl.curvature.traces import Estimate, Probes
from bayesdl.data import check_rereadable, warn_if_unsteady
from bayesdl.distributed import share_of
from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError, UnsupportedError, check_finite
from bayesdl.likelihoods import Gaussian, Likelihood, resolve
from bayesdl.network import Network, first_inputs
from bayesdl.select import Selector

Preconditioner = str | Structure | None


def operator(
    model: nn.Module | Network,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    kind: str = "ggn",
    select: Selector = "all",
    bias: str = "joint",
    batch: str | BatchAdapter | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    allow_partial: bool = False,
) -> CurvatureOperator:
    """Curvature H of the log-likelihood as a linear operator: a SUM over the data, never a matrix.

    Args:
        model: trained network; never written to.
        data: loader of batches. It is read once here and once for every product, and must yield the same examples each
            time (for kind "mc" in the same order).
        likelihood: name or object; a Gaussian without noise counts as of unit noise.
        kind: "ggn" (J v forward, its Hessian in the outputs, J^T back), "mc", "empirical", or "hessian" (of
            -sum log p(y | f(theta)), by double backward; not positive semi-definite).
        select, bias, batch, samples, generator, allow_partial: as for `bayesdl.curvature.estimate`.
        dtype: of all products; the private clone of the network runs in it too. Default: at least float32.
        memory: bytes that one chunk of examples may take.

    Raises:
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
        UnknownNameError: no such kind.
    """
    if kind not in KINDS:
        raise UnknownNameError(f"kind {kind!r} is not known; choose one of {KINDS}")
    check_rereadable("data", data)
    try:
        share_of(data, None, None)
    except ArgumentError as error:
        raise UnsupportedError(
            "the loader yields one process's share of its data, and an operator runs in one process: give it a loader "
            "of all the data, or use bdl.curvature.estimate(..., distributed=True)"
        ) from error
    warn_if_unsteady(data)
    example = first_inputs(data, model.batch if isinstance(model, Network) else resolve_adapter(batch))
    network = model if isinstance(model, Network) else Network(model, select=select, batch=batch, example=example)
    family = resolve(likelihood)
    network = network.reading(family.output_axis)
    if isinstance(family, Gaussian) and family.noise is None:
        family = family.with_noise(1.0)
    wanted = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
    running = network if network.dtype is wanted else network.map(_to(wanted))
    layout = plan(running, example, bias)
    pair = index_batch(running.prepare(example), slice(0, 2))
    problem = Problem(
        running,
        layout,
        data,
        family,
        kind,
        samples,
        None if generator is None else (generator.device, generator.get_state()),
        memory,
        find_slopes(running, layout, pair) if kind == "ggn" else None,
        allow_partial,
    )
    return CurvatureOperator(problem, network)


@final
class CurvatureOperator:
    """A symmetric linear operator on the selected parameters; see `operator`.

    Directions are columns, as in scipy: `(P,)` or `(P, r)` in flat order. All r of them share one pass over the data.
    Where the layer factors of all cotangents cost less than r forward-mode products, those are used: their one backward
    pass serves any number of directions.

    Queries are about P = scale * H + diag(shift) as for `Structure`, and differentiable in scale and shift.
    """

    def __init__(self, problem: Problem, source: Network) -> None:
        self._problem, self._source = problem, source
        self._first = problem.visit(_ignore, 1, "curvature")

    @property
    def layout(self) -> Layout:
        """Blocks, and the order of the parameters in a direction."""
        return self._problem.layout

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.layout.numel, self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of all products."""
        return self._problem.dtype

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self._problem.network.device

    @property
    def kind(self) -> str:
        """ "ggn", "mc", "empirical" or "hessian"."""
        return self._problem.kind

    @property
    def num_data(self) -> int:
        """N."""
        return self._first.num_data

    @property
    def log_likelihood(self) -> float:
        """sum_n log p(y_n | f_n) at the network's weights."""
        return self._first.log_likelihood

    def matvec(self, v: Tensor) -> Tensor:
        """H v for a flat direction `(P,)`; one pass over the data."""
        if v.shape != (self.layout.numel,):
            raise ShapeError(f"a direction of shape {tuple(v.shape)} was given; expected ({self.layout.numel},)")
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def matmat(self, v: Tensor) -> Tensor:
        """H V for columns `(P, r)`; one pass over the data.

        Raises:
            ShapeError: another number of rows.
            ArgumentError: the loader does not yield the same data as before.
            NonFiniteError: NaN or infinity in V or in the product.
            StaleModelError: the user's model was written to since.
        """
        if v.dim() != 2 or len(v) != self.layout.numel:
            raise ShapeError(f"directions of shape {tuple(v.shape)} were given; expected ({self.layout.numel}, r)")
        check_finite(v, "the directions")
        self._source.check_values()
        with torch.inference_mode(False):
            rows = v.detach().T.to(device=self.device, dtype=self.dtype, copy=True)
            if not len(rows):
                return rows.T
            found, seen = self._problem.times(rows)
        self._problem.check_same(self._first, seen)
        return found.T

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v) if v.dim() == 1 else self.matmat(v)

    def to_dense(self) -> Tensor:
        """H as a `(P, P)` matrix in flat order; for tests and small models."""
        dense = self.matmat(torch.eye(self.layout.numel, dtype=self.dtype, device=self.device))
        return 0.5 * (dense + dense.T)

    def solve(
        self,
        b: Tensor,
        scale: Shift = 1.0,
        shift: Shift = 1.0,
        *,
        tol: float | None = None,
        max_iter: int = 1000,
        preconditioner: Preconditioner = None,
    ) -> Solution:
        """P^-1 b for columns `(P,)` or `(P, r)` by conjugate gradients; one pass over the data an iteration.

        Args:
            b: right-hand sides.
            scale: positive number.
            shift: positive: a number, one per block, or one per parameter.
            tol: relative residual; default 1e-4, and 1e-8 in float64.
            max_iter: iterations.
            preconditioner: "kron" fits the Kronecker-factored curvature once (of kind "ggn" for a Hessian) and solves
                with it; or any fitted `Structure` of the same parameters. Neither changes the answer. A shift per
                parameter enters a Kronecker structure as its mean over each block.

        Raises:
            NumericalError: P has a direction of negative curvature, or the residual does not fall below `tol`.
        """
        if b.dim() not in (1, 2) or len(b) != self.layout.numel:
            raise ShapeError(f"right-hand sides of shape {tuple(b.shape)}; expected ({self.layout.numel},) or with r")
        check_finite(b, "the right-hand sides")
        tol = tol if tol is not None else (1e-8 if self.dtype is torch.float64 else 1e-4)
        columns = b.to(device=self.device, dtype=self.dtype)
        columns = columns.unsqueeze(1) if b.dim() == 1 else columns
        factor, diagonal = self._scale(scale), flat_shift(self.layout, shift, self._like)
        precondition = self._preconditioner(preconditioner, scale, shift, diagonal.detach())
        solver = _Solver(self.matmat, precondition, tol, max_iter)
        value, iterations, residual = _Solve.apply(columns, factor, diagonal, solver)
        return Solution(value.squeeze(1) if b.dim() == 1 else value, iterations, residual)

    def quad(self, factors: Sequence[Factor], scale: Shift = 1.0, shift: Shift = 1.0, **options: Any) -> Tensor:
        """J P^-1 J^T `(B, K, K)` for the layer factors of one batch: B K right-hand sides of `solve`.

        Args:
            factors: as for `Structure.quad`.
            scale, shift, options: of `solve`.
        """
        shapes = [(b.groups, b.rows, b.columns) for b in self.layout.blocks]
        parts = [f.jacobian().unflatten(-1, s) for f, s in zip(factors, shapes, strict=True)]
        rows = self.layout.join(parts).to(self.dtype)
        solved = self.solve(rows.flatten(0, 1).T, scale, shift, **options).value
        return rows @ solved.T.reshape(rows.shape).mT

    def trace(
        self, num_probes: int = 30, method: str = "hutch++", generator: torch.Generator | None = None
    ) -> Estimate:
        """tr(H) from `num_probes` products, in one or two passes over the data; exact where they reach P.

        Args:
            num_probes: products.
            method: "hutch++", "xtrace" or "hutchinson"; see `bayesdl.curvature.traces.trace`.
            generator: default a fixed seed.
        """
        return traces.trace(self._probes(generator), num_probes, method)

    def diagonal(
        self, num_probes: int = 30, method: str = "hutch++", generator: torch.Generator | None = None
    ) -> Estimate:
        """diag(H) `(P,)` from `num_probes` products; exact where they reach P.

        `estimate(..., structure="diag")` has the exact diagonal of every kind but the Hessian's in one pass.
        """
        return traces.diagonal(self._probes(generator), num_probes, method)

    def logdet(
        self,
        scale: Shift = 1.0,
        shift: Shift = 1.0,
        *,
        num_probes: int = 16,
        steps: int = 32,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """log |P| by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017), with the error of the probes.

        `steps` passes over the data with `num_probes` directions each. The error of too few steps is not part of the
        standard error; it falls exponentially, at a rate given by the root of P's condition number. For several scalar
        shifts ask `spectrum` once. Exact where `num_probes` reaches P. Gradients towards scale and shift: of the
        estimate itself for a scalar shift, otherwise estimated with the same probes.

        Raises:
            NumericalError: P is not positive definite.
        """
        if torch.as_tensor(shift).numel() == 1:
            return self.spectrum(num_probes, steps, generator).logdet(scale, shift)
        diagonal = flat_shift(self.layout, shift, self._like.double())
        probes, definite = self._probes(generator), self.kind != "hessian"
        return whitened_logdet(probes, cast(scale, diagonal), diagonal, num_probes, steps, definite)

    def spectrum(self, num_probes: int = 16, steps: int = 32, generator: torch.Generator | None = None) -> Spectrum:
        """Quadrature nodes and weights of H's spectrum, from which any scalar scale and shift are had for nothing."""
        definite = self.kind != "hessian"
        if num_probes >= self.layout.numel:
            return exact_spectrum(self.to_dense(), definite)
        return lanczos_spectrum(self._probes(generator), num_probes, steps, definite)

    @cached_property
    def kron(self) -> Structure:
        """The Kronecker-factored curvature of the same data, fitted at the first use."""
        problem = self._problem
        return fit_curvature(
            problem.network,
            self.layout,
            problem.data,
            problem.likelihood,
            structure="kron",
            kind="ggn" if self.kind == "hessian" else self.kind,
            samples=problem.samples,
            dtype=self.dtype,
            memory=problem.memory,
            allow_partial=problem.allow_partial,
            progress=False,
        ).curvature

    @property
    def _like(self) -> Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device)

    def _probes(self, generator: torch.Generator | None) -> Probes:
        source = generator or torch.Generator().manual_seed(0)
        return Probes(self.matmat, self.layout.numel, self._like, source)

    def _scale(self, scale: Shift) -> Tensor:
        factor = cast(scale, self._like)
        if factor.numel() != 1 or not bool(factor > 0):
            raise ArgumentError(f"scale={scale!r}; expected one positive number")
        return factor.reshape(())

    def _preconditioner(self, given: Preconditioner, scale: Shift, shift: Shift, diagonal: Tensor) -> Product:
        if given is None:
            return _same
        if isinstance(given, str):
            if given != "kron":
                raise UnknownNameError(f"preconditioner {given!r} is not known; choose 'kron', a Structure, or None")
            given = self.kron
        if given.layout.names != self.layout.names:
            raise ArgumentError(
                f"the preconditioner covers {given.layout.numel} parameters of {len(given.layout.names)} tensors; "
                f"expected those of this operator ({self.layout.numel} of {len(self.layout.names)})"
            )
        structure, heat = given, torch.as_tensor(scale).detach()
        own = torch.as_tensor(shift).detach()
        if own.numel() > 1:
            own = torch.stack([part.mean() for part in structure.layout.split(diagonal)])

        def precondition(residual: Tensor) -> Tensor:
            return structure.solve(residual.T, heat, own).T.to(residual)

        return precondition


def flat_shift(layout: Layout, shift: Shift, like: Tensor) -> Tensor:
    """A scalar, one per block or one per parameter as one number per parameter `(P,)`."""
    sizes = [(b.groups, b.rows, b.columns) for b in layout.blocks]
    parts = zip(layout.shifts(shift, like), sizes, strict=True)
    return layout.join([s.expand(size) for s, size in parts])


class _Solver:
    """Conjugate gradients on scale * H + diag(shift)."""

    def __init__(self, product: Product, precondition: Product, tol: float, max_iter: int) -> None:
        self._product, self._precondition, self._tol, self._max_iter = product, precondition, tol, max_iter

    def __call__(self, b: Tensor, scale: Tensor, shift: Tensor) -> Solution:
        def shifted(v: Tensor) -> Tensor:
            return scale * self._product(v) + shift.unsqueeze(1) * v

        return conjugate_gradients(shifted, b, self._precondition, self._tol, self._max_iter)


class _Solve(torch.autograd.Function):
    """x = P^-1 b; backward solves once more, with the incoming gradient on the right."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, scale: Tensor, shift: Tensor, solver: _Solver) -> tuple[Tensor, int, float]:
        found = solver(b, scale, shift)
        ctx.save_for_backward(b, scale, shift, found.value)
        ctx.solver = solver
        return found.value, found.iterations, found.residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        b, scale, shift, x = ctx.saved_tensors
        turned = ctx.solver(gradient, scale, shift).value
        image = (b - shift.unsqueeze(1) * x) / scale  # H x
        return turned, -(turned * image).sum(), -(turned * x).sum(1), None


def _to(dtype: torch.dtype) -> Any:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def _ignore(local: Local) -> None:
    del local


def _same(vectors: Tensor) -> Tensor:
    return vectors
