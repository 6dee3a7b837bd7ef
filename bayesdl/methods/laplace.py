"""Laplace approximation: a Gaussian at the trained weights with the curvature of the loss there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.curvature.cotangents import KINDS
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe, check_recipe, check_shared
from bayesdl.diagnose import Finding
from bayesdl.distributed import resolve_group, together
from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.network import first_inputs
from bayesdl.posteriors import GaussianPosterior
from bayesdl.priors import GaussianPrior, Prior
from bayesdl.priors.posterior import PosteriorPrior
from bayesdl.select import Selector
from bayesdl.tuning.evidence import maximise

APART = Finding(
    "info",
    "weights and biases have blocks of their own, as the prior has other precisions for them",
    'bias="separate" says the same',
    "bias",
)


@final
@dataclass(frozen=True)
class Laplace(Method):
    """N(theta_MAP, P^-1) (MacKay 1992; Daxberger et al. 2021).

    Args:
        select: Bayesian parameters: "all", "last_layer" (or "last"), "requires_grad", "lora", names, a pattern, a
            predicate, or single elements (`bdl.select.largest_magnitude` and its kin).
        structure: "full", "diag", "kron", "kron-lowrank", "ekfac" (two passes over the data) or "lowrank" (three); or a
            dictionary from layer patterns to these, e.g. `{"head": "full", "*": "kron"}`.
        kind: "ggn", "mc" (Fisher from sampled targets), "empirical" or "hessian" (exact, of the log-likelihood;
            structures "full", "diag", "lowrank"). Where the Hessian has negative eigenvalues, as at weights that are no
            minimum, give a prior whose precision outweighs them: the evidence has no maximum there, and every query
            refuses a precision that is not positive definite.
        bias: "joint" (weight and bias of a layer share one block) or "separate"; Kronecker factors are separate too
            under a prior that names other precisions for biases than for weights.
        predictive: "linearized" (closed-form covariance of the outputs) or "samples" (weights drawn, network run).
        temperature: T of the posterior p^(1/T), which multiplies its covariance by T; 1 is Bayes.
        samples: draws of y per example for kind "mc".
        classes: for kind "ggn" with thousands of classes: how many of them enter exactly, the most probable of each
            example; one draw stands for the others. See `bayesdl.curvature.estimate`.
        dtype: of the curvature; default at least float32.
        memory: bytes that one chunk of examples may take while fitting.
        allow_partial: accept a loader that skips part of its data (drop_last).
        rank: of structure "lowrank" or "kron-lowrank"; default 32.
        kron_rank: "kron" becomes "kron-lowrank" of this rank: so many eigenpairs are kept of factors that are too large
            to hold, such as those of wide layers and vocabularies.
        shared: for "kron", "kron-lowrank" and "ekfac", how positions of convolutions and sequences are treated:
            "expand" or "reduce"; see `bayesdl.curvature.kron.Kron`.
        resume: a file that keeps the state of the fit, from which an interrupted one goes on; the loader must keep its
            order.
        every: batches after which that file is written anew.
    """

    select: Selector | None = "all"
    structure: Recipe = "kron"
    kind: str = "ggn"
    bias: str = "joint"
    predictive: str = "linearized"
    temperature: float = 1.0
    samples: int = 1
    dtype: torch.dtype | None = None
    memory: int | None = None
    allow_partial: bool = False
    rank: int | None = None
    shared: str = "expand"
    classes: int | None = None
    kron_rank: int | None = None
    resume: str | Path | None = None
    every: int = 100

    name: ClassVar[str] = "laplace"
    trains: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        self.check()
        data = task.need_data(self.name)
        prior = task.prior.diagonal if isinstance(task.prior, PosteriorPrior) else task.gaussian_prior()
        with together(resolve_group(task.distributed)):
            example = first_inputs(data, task.network.batch)
        with together(resolve_group(task.distributed)), task.network.session():
            layout = plan(task.network, example, self.bias)
            apart = self._apart(layout, task.prior)
            layout = plan(task.network, example, "separate") if apart else layout
        fit = fit_curvature(
            task.network,
            layout,
            data,
            task.likelihood,
            structure=self.recipe,
            kind=self.kind,
            samples=self.samples,
            generator=task.generator,
            dtype=self.dtype,
            memory=self.memory,
            allow_partial=self.allow_partial,
            rank=self.rank if self.kron_rank is None else self.kron_rank,
            shared=self.shared,
            classes=self.classes,
            progress=task.progress,
            distributed=task.distributed,
            resume=self.resume,
            every=self.every,
            example=example,
        )
        fitted = self.finish(fit, task, prior)
        return replace(fitted, findings=(*fitted.findings, APART)) if apart else fitted

    def _apart(self, layout: Layout, prior: Prior | None) -> bool:
        """Whether a named prior has other precisions for biases than for weights, and Kronecker factors share them."""
        if not isinstance(prior, GaussianPrior) or not isinstance(prior.precision, Mapping):
            return False
        recipes = self.structure.values() if isinstance(self.structure, Mapping) else (self.structure,)
        if not {"kron", "ekfac"} & set(recipes):
            return False
        named = prior.precision
        return any(len({named.get(name) for name in block.parameters}) > 1 for block in layout.blocks)

    def finish(self, fit: Fit, task: Task, prior: GaussianPrior | None) -> Fitted:
        """The posterior of a fit, with what the user left open at the maximum of the evidence."""
        posterior = self._posterior(fit, task, prior)
        rule = "scalar" if prior is None else "keep"
        findings: tuple[Finding, ...] = ()
        if prior is None or posterior.noise is not None:
            posterior, findings = maximise(posterior, task.network, rule, True, "gradient", 100)
        likelihood: Likelihood = task.likelihood
        if isinstance(likelihood, Gaussian) and posterior.noise is not None:
            likelihood = likelihood.with_noise(posterior.noise)
        return Fitted(posterior, likelihood, findings)

    @property
    def recipe(self) -> Recipe:
        """`structure`, with "kron-lowrank" in the place of "kron" where it has a rank."""
        if self.kron_rank is None:
            return self.structure
        if isinstance(self.structure, Mapping):
            return {pattern: _ranked(name) for pattern, name in self.structure.items()}
        return _ranked(self.structure)

    def check(self) -> None:
        """Raise where an argument has a value that is not accepted."""
        check_recipe(self.structure, self.rank)
        if self.kron_rank is not None:
            names = list(self.structure.values()) if isinstance(self.structure, Mapping) else [self.structure]
            if "kron" not in names or self.rank is not None:
                raise ArgumentError(
                    f"kron_rank={self.kron_rank} was given with structure={self.structure!r} and rank={self.rank}; it "
                    'belongs to structure="kron", whose only rank it is'
                )
            check_recipe(self.recipe, self.kron_rank)
        check_shared(self.recipe, self.shared)
        if self.kind not in KINDS:
            raise UnknownNameError(f"kind {self.kind!r} is not known; choose one of {KINDS}")
        if self.predictive not in ("linearized", "samples"):
            raise ArgumentError(f"predictive={self.predictive!r}; choose 'linearized' or 'samples'")
        if not self.temperature > 0:
            raise ArgumentError(f"temperature={self.temperature}; expected a positive number")

    def _posterior(self, fit: Fit, task: Task, prior: GaussianPrior | None) -> GaussianPosterior:
        device = task.network.device

        def wide(value: object) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64, device=device)

        open_noise = isinstance(task.likelihood, Gaussian) and task.likelihood.noise is None
        noise = None
        if open_noise and fit.squared_error is not None:
            noise = (fit.squared_error / fit.num_data).sqrt().clamp(min=1e-6)
            if not fit.parts:  # one common factor: start from the pooled residual
                noise = noise.square().mean().sqrt().expand_as(noise).clone()
        mean = wide(0.0 if prior is None else prior.mean)
        if mean.dim() and mean.shape != (fit.curvature.layout.numel,):
            raise ArgumentError(
                f"a prior mean of shape {tuple(mean.shape)} was given; expected a number or one per selected parameter "
                f"({fit.curvature.layout.numel},)"
            )
        posterior = GaussianPosterior(
            fit.curvature,
            fit.parts,
            _by_block(fit.curvature.layout, wide(1.0 if prior is None else prior.precision)),
            mean,
            noise,
            float(self.temperature),
            fit.num_data,
            fit.log_likelihood,
            fit.squared_error,
            self.kind,
            self.predictive,
            self.memory,
        )
        if isinstance(task.prior, PosteriorPrior):
            posterior = _after(posterior, task.prior)
        # raise here, not at the first prediction, if the prior does not fit the structure
        posterior.structure.logdet(posterior.scale, posterior.shift)
        return posterior


def _ranked(name: str) -> str:
    return "kron-lowrank" if name == "kron" else name


def _by_block(layout: Layout, precision: Tensor) -> Tensor:
    """One precision a block where one per parameter says no more: every structure takes that."""
    if precision.shape != (layout.numel,):
        return precision
    pieces = layout.split(precision)
    if all(bool((piece == piece.flatten()[0]).all()) for piece in pieces):
        return torch.stack([piece.flatten()[0] for piece in pieces])
    return precision


def _after(posterior: GaussianPosterior, prior: PosteriorPrior) -> GaussianPosterior:
    """A fit whose prior is the posterior of an earlier one: their precisions add."""
    if posterior.noise is not None or posterior.temperature != 1.0:
        raise UnsupportedError(
            "after an earlier fit the noise and the temperature are settled: pass the likelihood of that fit, e.g. "
            "bdl.Gaussian(noise=...), and leave temperature=1.0"
        )
    prior.check_fits(posterior.layout)
    if prior.curvature.recipe != posterior.curvature.recipe:
        raise ArgumentError(
            f"the prior holds curvature of structure {prior.curvature.recipe!r} and this fit of "
            f"{posterior.curvature.recipe!r}; precisions of one structure add, so fit both with the same"
        )
    return replace(posterior, earlier=prior.curvature.map(lambda tensor: tensor.to(posterior.precision.device)))
