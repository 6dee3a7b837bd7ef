"""Findings: what a method chose, and what looks wrong, in words with a next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bayesdl.evidence import effective_parameters, scatter

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


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


def diagnose(model: BayesianModel) -> Diagnosis:
    """Recorded choices, then checks on a Gaussian posterior: effective parameters, prior against weights."""
    from bayesdl.posteriors import GaussianPosterior

    found = list(model.record.findings)
    posterior = model.posterior
    if isinstance(posterior, GaussianPosterior):
        count = posterior.layout.numel
        effective = effective_parameters(posterior)
        found.append(
            Finding(
                "info",
                f"{effective:.1f} effective of {count} selected parameters ({len(posterior.layout.blocks)} blocks)",
            )
        )
        if effective < 0.01:
            found.append(
                Finding(
                    "warning",
                    "the prior dominates: the posterior has learnt almost nothing from the data",
                    'lower the prior precision, or tune("heldout", val_loader)',
                )
            )
        mass = float(scatter(posterior, model.network))
        # a rule may narrow the prior on purpose, to keep the posterior near the trained weights
        given = not any(finding.text.startswith("prior precision") for finding in model.record.findings)
        if given and mass > 10.0 * count:
            found.append(
                Finding(
                    "warning",
                    f"the weights lie far outside the prior: squared distance {mass:.3g} for {count} parameters",
                    'a smaller prior precision, or tune("heldout", val_loader)',
                )
            )
    return Diagnosis(tuple(found))
