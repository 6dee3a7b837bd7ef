"""Certificates for selective prediction: a threshold whose error rate on accepted inputs is below a target, with proof.

The guarantee is over the draw of the calibration data: with probability at least 1 - delta the true risk among accepted
inputs is at most `risk` (Geifman and El-Yaniv 2017, Angelopoulos et al. 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import validation

Correction = Literal["fixed_sequence", "bonferroni"]
Bound = Literal["clopper_pearson", "hoeffding_bentkus", "empirical_bernstein"]


@final
@dataclass(frozen=True)
class Certificate:
    """What `certify` proved.

    Attributes:
        certified: whether any threshold passed; if not, `threshold` is infinite: abstain always.
        threshold: accept inputs whose confidence is at least this. coverage: share of the calibration data accepted.
        limit: upper limit of the risk among accepted inputs. accepted, errors: the counts behind it.
        risk, delta, n, num_thresholds: what was asked, of how many examples and thresholds.
    """

    certified: bool
    threshold: float
    coverage: float
    limit: float
    accepted: int
    errors: float
    risk: float
    delta: float
    n: int
    num_thresholds: int
    correction: str
    bound: str

    def __str__(self) -> str:
        setting = f"n = {self.n}, delta = {self.delta:g}, {self.num_thresholds} thresholds, {self.correction}"
        if not self.certified:
            aim = f"below {self.risk:g} with confidence {1 - self.delta:g}"
            return f"no threshold keeps the risk {aim}: abstain ({setting})"
        return (
            f"accept confidence >= {self.threshold:.6g}: coverage {self.coverage:.4g}, risk at most {self.limit:.4g} "
            f"<= {self.risk:g} with confidence {1 - self.delta:g} ({setting})"
        )


def certify(
    confidence: Any,
    loss: Any,
    risk: float,
    *,
    delta: float = 0.05,
    thresholds: Any = None,
    correction: Correction = "fixed_sequence",
    bound: Bound = "clopper_pearson",
) -> Certificate:
    """The threshold of largest coverage whose risk is proved to be at most `risk`.

    Args:
        confidence: (N,) of held-out examples, higher is more certain. loss: (N,) 0/1 errors, or losses in [0, 1].
        risk: target risk among accepted inputs. delta: probability with which the proof may fail.
        thresholds: candidates, fixed without the labels; None takes 20 levels of the confidences themselves, which does
            not look at the labels either.
        correction: "fixed_sequence" tests from strict to loose at delta each and stops at the first failure;
            "bonferroni" tests all at delta / number of thresholds. Thresholds that accept too few examples to prove
            `risk` even without an error are left out of either.
        bound: "clopper_pearson" is exact for 0/1 losses; "hoeffding_bentkus" and "empirical_bernstein" take any in
            [0, 1].

    Raises:
        ArgumentError: losses outside [0, 1], or fractions where `bound` needs 0/1.
    """
    scores = validation.wide(validation.vector(confidence, "confidence")).cpu()
    losses = validation.wide(validation.vector(loss, "loss", length=len(scores))).cpu()
    risk, delta = validation.fraction(risk, "risk"), validation.fraction(delta, "delta")
    if bool(((losses < 0) | (losses > 1)).any()):
        raise ArgumentError("loss: values in [0, 1] are expected; divide a bounded loss by its bound")
    if bound == "clopper_pearson" and bool(((losses != 0) & (losses != 1)).any()):
        raise ArgumentError('loss: "clopper_pearson" takes 0/1 errors; bound="hoeffding_bentkus" takes fractions')
    if correction not in ("fixed_sequence", "bonferroni"):
        raise ArgumentError(f"correction={correction!r}: expected 'fixed_sequence' or 'bonferroni'")
    chosen = None if thresholds is None else validation.vector(thresholds, "thresholds")
    # In the dtype of the confidences, so that 0.7 and a float32 0.7 are one number.
    chosen = None if chosen is None else chosen.to(validation.vector(confidence, "confidence").dtype)
    # Too few accepted to prove anything even without an error: left out, which looks at no label.
    candidates = [
        t
        for t in _candidates(scores, chosen)
        if upper_limit(torch.zeros(int((scores >= t).sum())), delta, bound) <= risk
    ]
    level = delta if correction == "fixed_sequence" else delta / max(1, len(candidates))
    best: tuple[float, float, int, float] | None = None
    for threshold in candidates:
        kept = losses[scores >= threshold]
        limit = upper_limit(kept, level, bound)
        if limit <= risk:
            best = (threshold, limit, len(kept), float(kept.sum()))
        elif correction == "fixed_sequence":
            break
    facts = {
        "risk": risk, "delta": delta, "n": len(scores), "num_thresholds": len(candidates),
        "correction": correction, "bound": bound,
    }  # fmt: skip
    if best is None:
        return Certificate(False, math.inf, 0.0, math.nan, 0, 0.0, **facts)  # type: ignore[arg-type]
    threshold, limit, accepted, errors = best
    return Certificate(True, threshold, accepted / len(scores), limit, accepted, errors, **facts)  # type: ignore[arg-type]


def upper_limit(losses: Tensor, delta: float, bound: Bound = "clopper_pearson") -> float:
    """Upper limit of the mean of losses (m,) in [0, 1], too low with probability at most `delta`; 1 for m = 0."""
    m = len(losses)
    if m == 0:
        return 1.0
    mean, total = float(losses.mean()), float(losses.sum())
    if bound == "clopper_pearson":
        return binomial_limit(round(total), m, delta)
    if bound == "empirical_bernstein":
        # Maurer and Pontil (2009), with the unbiased sample variance.
        variance = float(losses.var()) if m > 1 else 0.25
        spread = math.log(2 / delta)
        return min(1.0, mean + math.sqrt(2 * variance * spread / m) + 7 * spread / (3 * max(m - 1, 1)))
    if bound != "hoeffding_bentkus":
        raise ArgumentError(f"bound={bound!r}: expected clopper_pearson, hoeffding_bentkus or empirical_bernstein")
    from scipy.stats import binom

    def tail(mu: float) -> float:
        a = min(mean, mu)
        divergence = sum(p * math.log(p / q) for p, q in ((a, mu), (1 - a, 1 - mu)) if p > 0)
        return min(math.exp(-m * divergence), math.e * float(binom.cdf(math.ceil(total - 1e-9), m, mu)))

    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > delta else (low, middle)
    return high


def binomial_limit(errors: int, trials: int, delta: float) -> float:
    """Clopper and Pearson's (1934) upper limit of a rate: Beta^-1(1 - delta; k + 1, m - k), 1 for k = m or m = 0."""
    if errors >= trials:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(errors + 1, trials - errors, 1 - delta))


def _candidates(scores: Tensor, thresholds: Tensor | None) -> list[float]:
    """From strict to loose."""
    if thresholds is None:
        levels = torch.arange(20, dtype=torch.float64) / 20
        chosen = torch.quantile(scores, levels, interpolation="lower")
    else:
        chosen = validation.wide(thresholds).cpu()
    return sorted({float(t) for t in chosen}, reverse=True)
