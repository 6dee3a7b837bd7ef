"""Findings: what a method chose, and what looks wrong, in words with a next step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import UnsupportedError
from bayesdl.evidence import LOG_BOUND, effective_parameters, scatter

if TYPE_CHECKING:
    from bayesdl.curvature.structure import Structure
    from bayesdl.model import BayesianModel
    from bayesdl.posteriors.gaussian import GaussianPosterior
    from bayesdl.posteriors.samples import SamplePosterior


@dataclass(frozen=True)
class Finding:
    """One observation: severity "info" or "warning", what it is, what to do.

    A later finding on the same `topic` ("prior", "noise", "temperature") takes the place of earlier ones.
    """

    severity: str
    text: str
    action: str = ""
    topic: str = ""

    def __str__(self) -> str:
        return f"[{self.severity}] {self.text}" + (f" -> {self.action}" if self.action else "")


@dataclass(frozen=True)
class Diagnosis:
    """All findings of one model."""

    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that ask for something to be done."""
        return tuple(f for f in self.findings if f.severity == "warning")

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings) or "nothing to report"


# curvature per parameter, over the largest of any layer, below which a layer counts as dead
DEAD = 1e-10
# effective parameters per observed number from which a network counts as overfitted
CROWDED = 0.5


def diagnose(model: BayesianModel, data: Iterable[Any] | None = None, *, progress: bool = False) -> Diagnosis:
    """Recorded choices, then checks on a Gaussian posterior; `BayesianModel.diagnose` says which."""
    from bayesdl.posteriors import GaussianPosterior, SamplePosterior

    found = list(model.record.findings)
    posterior = model.posterior
    if isinstance(posterior, SamplePosterior) and posterior.chains is not None and data is not None:
        return Diagnosis((*found, *_converged(model, posterior, data)))
    if not isinstance(posterior, GaussianPosterior):
        if data is not None:
            raise UnsupportedError(
                f"method {model.method_name!r} has nothing that a loader could check; call diagnose() without, or use "
                'method "laplace"'
            )
        return Diagnosis(tuple(found))
    broken = _not_finite(posterior)
    if broken is not None:
        return Diagnosis((*found, broken))
    found += [*_effective(posterior), *_mass(posterior, model, found), *_bound(posterior, found), *_dead(posterior)]
    if data is not None:
        from bayesdl.residuals import findings, observe

        found += findings(observe(model, posterior, data, progress), model)
    return Diagnosis(tuple(found))


def _converged(model: BayesianModel, posterior: SamplePosterior, data: Iterable[Any]) -> list[Finding]:
    """Whether the chains agree in what they predict on the first batch."""
    from bayesdl.data import batches
    from bayesdl.latent import SampleLatent
    from bayesdl.samplers.diagnostics import quantities
    from bayesdl.samplers.diagnostics.summary import agreement_of

    with torch.no_grad():
        _, inputs, _ = next(iter(batches(model.network, data, progress=False, describe="diagnose", need_targets=False)))
        latent = posterior.push(model.network, inputs, None)
    assert isinstance(latent, SampleLatent) and posterior.chains is not None
    outputs = latent.samples.flatten(1, -2)
    return agreement_of(posterior.chains.to(outputs.device), quantities(outputs, model.likelihood))


def _not_finite(posterior: GaussianPosterior) -> Finding | None:
    for name, value in posterior.tensors().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return Finding(
                "warning",
                f"{name} of the posterior holds NaN or infinity: no prediction of it means anything",
                "fit again; look for extreme inputs or weights, or fit with dtype=torch.float64",
            )
    return None


def _effective(posterior: GaussianPosterior) -> list[Finding]:
    count, blocks = posterior.layout.numel, len(posterior.layout.blocks)
    effective = effective_parameters(posterior)
    found = [Finding("info", f"{effective:.1f} effective of {count} selected parameters ({blocks} blocks)")]
    if effective < 0.01:
        found.append(
            Finding(
                "warning",
                "the prior dominates: the posterior has learnt almost nothing from the data",
                'lower the prior precision, or tune("heldout", val_loader)',
            )
        )
    observed = posterior.num_data * posterior.layout.outputs
    if effective > CROWDED * observed:
        found.append(
            Finding(
                "warning",
                f"{effective:.1f} effective parameters for {observed} observed numbers: the network can fit them "
                "all, so that its training residuals, and the evidence, say little",
                'a larger prior precision, select="last_layer", or tune("heldout", val_loader)',
            )
        )
    return found


def _mass(posterior: GaussianPosterior, model: BayesianModel, recorded: Sequence[Finding]) -> list[Finding]:
    count, mass = posterior.layout.numel, float(scatter(posterior, model.network))
    # a rule may narrow the prior on purpose, to keep the posterior near the trained weights
    given = not any(finding.text.startswith("prior precision") for finding in recorded)
    if not given or mass <= 10.0 * count:
        return []
    return [
        Finding(
            "warning",
            f"the weights lie far outside the prior: squared distance {mass:.3g} for {count} parameters",
            'a smaller prior precision, or tune("heldout", val_loader)',
        )
    ]


def _bound(posterior: GaussianPosterior, recorded: Sequence[Finding]) -> list[Finding]:
    """A prior that some rule drove as far as it goes, unless the rule itself said so."""
    chosen = [finding for finding in recorded if finding.topic == "prior"]
    if not chosen or any("bound" in finding.text for finding in chosen):
        return []
    logs = posterior.precision.double().log().abs()
    if not bool((logs >= LOG_BOUND - 0.05).any()):
        return []
    return [
        Finding(
            "warning",
            f"{int((logs >= LOG_BOUND - 0.05).sum())} of {logs.numel()} prior precisions lie at the search's bound",
            'use tune("heldout", val_loader), or pass prior=bdl.GaussianPrior(precision=...)',
            "prior",
        )
    ]


def _dead(posterior: GaussianPosterior) -> list[Finding]:
    layout = posterior.layout
    traces = block_traces(posterior.structure)
    if traces is None:
        return []
    mean = traces / traces.new_tensor([float(block.numel) for block in layout.blocks])
    dead = (mean <= DEAD * mean.max()).tolist()
    names = [block.name for block, hit in zip(layout.blocks, dead, strict=True) if hit]
    if not names:
        return []
    some = ", ".join(map(repr, names[:4])) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    return [
        Finding(
            "warning",
            f"the data say nothing about {some}: the curvature is zero, and the posterior there is the prior",
            "units that never fire, or a layer that later ones ignore? Leave it out of select=",
        )
    ]


def block_traces(structure: Structure) -> Tensor | None:
    """Trace of H over each block `(L,)`, float64; None for structures that hold no such thing cheaply."""
    from bayesdl.curvature.diag import Diag
    from bayesdl.curvature.dual import Dual
    from bayesdl.curvature.full import Full
    from bayesdl.curvature.lowrank import LowRank
    from bayesdl.curvature.mixed import Mixed
    from bayesdl.curvature.rotated import Rotated

    blocks = structure.layout.blocks
    if isinstance(structure, (Diag, Rotated)):
        pieces: Sequence[Tensor] = structure.eigenvalues().double().split([block.numel for block in blocks])
    elif isinstance(structure, Full):
        pieces = structure.matrix.diagonal().double().split([block.numel for block in blocks])
    elif isinstance(structure, Dual):  # of its rows alone, where they stand for more data than their own
        squares = [torch.stack([factor.square().double().sum() for factor in piece]) for piece in structure.pieces]
        return torch.stack(squares).sum(0)
    elif isinstance(structure, LowRank):
        basis = structure.basis.double()
        pieces = structure.layout.split(((basis @ structure.core.double()) * basis).sum(1))
    elif isinstance(structure, Mixed):
        parts = [block_traces(part) for part in structure.parts]
        if any(part is None for part in parts):
            return None
        known = torch.cat([part for part in parts if part is not None])
        order = torch.tensor([i for own in structure.members for i in own], device=known.device)
        return torch.empty_like(known).index_copy(0, order, known)
    else:
        return None
    return torch.stack([piece.sum() for piece in pieces])
