"""What a chain did and what looks wrong with it, in words, from its records and its outputs at probe inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdl.diagnose import Diagnosis, Finding
from bayesdl.errors import ShapeError
from bayesdl.likelihoods import Likelihood
from bayesdl.samplers.diagnostics.convergence import FEWEST, by_chain, convergence, quantities
from bayesdl.samplers.diagnostics.diversity import diversity
from bayesdl.samplers.diagnostics.weights import weighted_ess
from bayesdl.samplers.records import SampleRecord, relative_weights

FEW = 10  # independent draws below which averages are rough
LOOSE, TIGHT = 1.1, 1.05  # R-hat
DRIFT = 4.0  # standard errors between the mean losses of a chain's halves
ALIKE = 0.1  # KL within cycles over that between them


def summary(
    records: Sequence[SampleRecord],
    outputs: Tensor | None = None,
    likelihood: Likelihood | None = None,
    targets: Tensor | None = None,
) -> Diagnosis:
    """Findings on one chain, or several of one network.

    Args:
        records: of the samples, S of them; chains one after another.
        outputs: `(S, P, C)` of the same samples at probe inputs, None without a probe.
        likelihood: turns outputs into probabilities or means; None compares the outputs themselves.
        targets: of the probe inputs, for their log-likelihood.

    Raises:
        ShapeError: another number of outputs than of records.
    """
    if not records:
        return Diagnosis((Finding("warning", "no sample was collected", "lower burn_in or thin, or run longer"),))
    if outputs is not None and len(outputs) != len(records):
        raise ShapeError(f"outputs of {len(outputs)} samples for {len(records)} records")
    found = [_what(records), *_temperature(records), *_weights(records), *_steps(records), *_drift(records)]
    if outputs is not None:
        values = outputs if likelihood is None else quantities(outputs, likelihood, targets)
        found += agreement_of(torch.tensor([r.chain for r in records]), values)
        if likelihood is not None and likelihood.name == "categorical":
            found += _cycles(records, outputs.softmax(-1))
    return Diagnosis(tuple(found))


def _what(records: Sequence[SampleRecord]) -> Finding:
    chains, last = len({r.chain for r in records}), records[-1]
    text = f"{len(records)} samples of {chains} chain{'s' * (chains > 1)}, up to step {last.step}"
    if last.lr is not None and last.h is not None and last.temperature is not None:
        text += f"; T_eff {last.temperature:g}, lr {last.lr:.4g}, h {last.h:.4g}"
    return Finding("info", text)


def _temperature(records: Sequence[SampleRecord]) -> list[Finding]:
    known = [r.temperature for r in records if r.temperature is not None]
    odd = [t for t in known if not 0.1 <= t <= 10]
    if not odd:
        return []
    return [
        Finding(
            "warning",
            f"{len(odd)} of {len(known)} samples were drawn at temperature {odd[0]:g}: that is the law p^(1/T), not "
            "the posterior",
            "temperature=1 is Bayes; of a cyclical schedule collect with chain.step(schedule.sampling)",
        )
    ]


def _weights(records: Sequence[SampleRecord]) -> list[Finding]:
    size = weighted_ess(torch.tensor(relative_weights(records), dtype=torch.float64))
    if size >= 0.5 * len(records):
        return []
    return [
        Finding(
            "warning",
            f"the weights of {len(records)} samples are worth {size:.1f} equal ones",
            'collect="time" takes samples that weigh the same',
        )
    ]


def _steps(records: Sequence[SampleRecord]) -> list[Finding]:
    psi = [r.psi for r in records if r.psi is not None]
    if not psi or max(psi) == min(psi):
        return []
    found = [Finding("info", f"the adaptive factor of the step ran from {min(psi):.3g} to {max(psi):.3g}")]
    if max(psi) < 1.01 * min(psi):
        found.append(
            Finding(
                "warning",
                "the step hardly adapts: zeta is far below or far above what psi answers to",
                "look at smallest, largest, r and omega of the sampler",
            )
        )
    return found


def _drift(records: Sequence[SampleRecord]) -> list[Finding]:
    found = []
    for chain in sorted({r.chain for r in records}):
        losses = [r.loss for r in records if r.chain == chain and r.loss is not None]
        half = len(losses) // 2
        if half < FEWEST:
            continue
        first, second = torch.tensor(losses[:half]).double(), torch.tensor(losses[-half:]).double()
        error = math.sqrt(float(first.var() + second.var()) / half)
        gap = float(first.mean() - second.mean())
        if abs(gap) > DRIFT * error:
            word = "falls" if gap > 0 else "rises"
            found.append(
                Finding(
                    "warning",
                    f"the training loss of chain {chain} still {word}: {float(first.mean()):.4g} in its first half, "
                    f"{float(second.mean()):.4g} in its second (standard error {error:.2g})",
                    "a longer burn_in" if gap > 0 else "a smaller lr, or a start nearer to the posterior",
                )
            )
    return found


def agreement_of(chains: Tensor, values: Tensor) -> list[Finding]:
    """Findings on quantities `(S, Q)` of samples from the chains of ids `(S,)`."""
    draws = by_chain(values.reshape(len(chains), -1), chains)
    if draws.shape[1] < FEWEST:
        return [
            Finding("warning", f"{draws.shape[1]} samples a chain are too few to judge convergence", "collect more")
        ]
    result = convergence(draws)
    text = (
        f"at the probe inputs R-hat is above {TIGHT} for {100 * result.share_above(TIGHT):.0f} % and above {LOOSE} for "
        f"{100 * result.share_above(LOOSE):.0f} % of {result.rhat.numel()} quantities; effective samples: median "
        f"{result.median_ess:.0f}, least {result.smallest_ess:.0f} of {result.chains * result.draws}"
    )
    found = [Finding("info", text)]
    if result.share_above(LOOSE) > 0.05:
        found.append(
            Finding(
                "warning",
                "chains do not agree in function space" if result.chains > 1 else "the chain drifts in function space",
                "a longer burn_in, more steps, or cyclical step sizes",
            )
        )
    if result.median_ess < FEW:
        found.append(
            Finding(
                "warning",
                f"predictions average over about {result.median_ess:.0f} independent draws",
                "more steps, a larger thin at as many samples, a larger lr or momentum",
            )
        )
    if result.chains == 1:
        found.append(Finding("info", "one chain cannot see modes that it never visited", "run several (chains=)"))
    return found


def _cycles(records: Sequence[SampleRecord], probs: Tensor) -> list[Finding]:
    if any(r.cycle is None for r in records):
        return []
    pairs = [(r.chain, r.cycle) for r in records]
    order = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    spread = diversity(probs, torch.tensor([order[pair] for pair in pairs], device=probs.device))
    if math.isnan(spread.kl_within) or math.isnan(spread.kl_between):
        return []
    text = (
        f"samples of one cycle disagree at {100 * spread.disagreement_within:.1f} % of the probe inputs (KL "
        f"{spread.kl_within:.3g}), of different cycles at {100 * spread.disagreement_between:.1f} % "
        f"(KL {spread.kl_between:.3g})"
    )
    found = [Finding("info", text)]
    if spread.kl_within < ALIKE * spread.kl_between:
        found.append(
            Finding(
                "warning", "samples of one cycle are nearly copies of each other", "lr_min above 0, or a larger thin"
            )
        )
    return found
