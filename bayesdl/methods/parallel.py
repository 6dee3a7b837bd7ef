"""How the chains of one process run: one after another, or in one vectorised pass a step.

Chains that share their passes are those they would be alone up to the rounding of batched products, which a long chain
amplifies until the two are different draws of the same law. A choice by the clock would therefore make the samples
depend on what else the machine was doing: it is made only where `parallel="fastest"` asks for it, and then reported.
`"auto"` is a rule: on a CPU it counts chains and bytes, with bounds read off `benchmarks/many_chains.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bayesdl.diagnose import Finding
from bayesdl.distributed import Group, together
from bayesdl.errors import UnsupportedError
from bayesdl.methods.batched import quiet, start_together, step_together, unbatchable
from bayesdl.methods.chains import Job, advance, start
from bayesdl.methods.footprint import footprint
from bayesdl.methods.remembered import recall, remember

PARALLEL = ("auto", "sequential", "batched", "fastest")
ROUNDS = 3  # timed steps of each way; the shortest counts, which other work on the machine has lengthened least
TOPIC = "chains"
FEWEST = 4  # chains on a CPU: fewer save less than vectorising costs
SMALL = 4 << 20  # bytes of a chain's weights and activations: larger ones are bound by memory, not by calls
MOST = 1 << 30  # bytes of those of all chains
SAME = 'parallel="sequential" has the same bits for any number of chains, processes and workers'
APART, SHARED = "run one after another", "share one pass a step"


def share_passes(jobs: Sequence[Job], group: Group | None) -> tuple[bool, tuple[Finding, ...]]:
    """Whether the chains of a process share their passes, and what has to be said about it; the same on all processes.

    A store remembers the choice, and a run that goes on from it takes it again.

    Args:
        jobs: all chains.
        group: processes that run them, each its share.

    Raises:
        UnsupportedError: `parallel="batched"` is not possible.
    """
    settings = jobs[0].settings
    mine = jobs if group is None else jobs[:: group.size]  # of the first process, which has the most
    if len(mine) == 1 or settings.workers > 1:
        return False, ()
    with together(group):
        verdict, findings = torch.zeros((), dtype=torch.int64), tuple[Finding, ...]()
        if group is None or group.rank == 0:
            before = recall(settings.store)
            chosen, findings = _chosen([_unstored(job) for job in mine], before)
            if chosen != before:
                remember(settings.store, chosen)
            verdict.fill_(int(chosen))
    if group is not None:
        verdict = verdict.to(group.device)
        group.spread([verdict])
    return bool(verdict), findings


def _chosen(jobs: Sequence[Job], before: bool | None) -> tuple[bool, tuple[Finding, ...]]:
    """The way for these chains, given that of the run that they go on from, if there is one."""
    way, device = jobs[0].settings.parallel, next(jobs[0].module.parameters()).device
    if way in ("sequential", "batched"):
        reason = unbatchable(jobs[0]) if way == "batched" else ""
        if reason:
            raise UnsupportedError(f'parallel="batched" is not possible: {reason}; use "sequential" or workers=')
        shared = way == "batched"
        if before in (None, shared):
            return shared, ()
        text = (
            f"the chains of the store {SHARED if before else APART}, and from here they {SHARED if shared else APART}"
        )
        return shared, (Finding("warning", text, "other rounding than of one unbroken run", TOPIC),)
    if before is not None:
        text = f"{len(jobs)} chains {SHARED if before else APART}, as in the run that this one goes on from"
        return before, (Finding("info", text, "" if not before else SAME, TOPIC),)
    reason = unbatchable(jobs[0])
    if not reason and way == "auto" and device.type == "cpu":
        reason = _too_little_to_gain(jobs)
    if reason:
        return False, (_one_by_one(reason),)
    return _by_trial(jobs, device, timed=way == "fastest")


def _too_little_to_gain(jobs: Sequence[Job]) -> str:
    """Why chains on a CPU had better run one after another; empty where they gain by sharing their passes."""
    if len(jobs) < FEWEST:
        return f"fewer than {FEWEST} gain nothing by sharing their passes"
    size = footprint(jobs[0])
    if size > SMALL:
        return (
            f"weights and activations of each take {_megabytes(size)}, and above {_megabytes(SMALL)} sharing is slower"
        )
    if size * len(jobs) > MOST:
        return f"weights and activations of all take {_megabytes(size * len(jobs))}, and {_megabytes(MOST)} is the most"
    return ""


def _unstored(job: Job) -> Job:
    """Without the store, which trials must not touch."""
    return replace(job, settings=replace(job.settings, store=None))


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def seconds_a_step(jobs: Sequence[Job], rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds of one step of all chains, one after another and together: the shortest of some steps after a first one.

    The chains are throw-away ones, from the same seeds as those to come, which are not moved: neither weights nor
    random streams, nor the loader's generator. It costs about `rounds + 1` steps of all chains, and as many of one.
    """
    device = next(jobs[0].module.parameters()).device
    alone, chains = start(jobs[0]), start_together(jobs)
    rounds = min(rounds, alone.total - 1)  # a schedule makes no more steps than its cycles hold
    one = _shortest(lambda step: advance(jobs[0], alone, step), rounds, device)
    return one * len(jobs), _shortest(lambda step: step_together(chains, step), rounds, device)


def _by_trial(jobs: Sequence[Job], device: torch.device, *, timed: bool) -> tuple[bool, tuple[Finding, ...]]:
    try:
        if not timed:
            with quiet("error"):
                step_together(start_together(jobs), 0)
            why = f"weights and activations of each take no more than {_megabytes(SMALL)}"
            if device.type != "cpu":
                why = f"on {device.type}, small kernels wait for their launch"
            return True, (Finding("info", f"{len(jobs)} chains {SHARED}: {why}", SAME, TOPIC),)
        with quiet():
            apart, shared = seconds_a_step(jobs)
    except (UnsupportedError, NotImplementedError) as error:
        return False, (_one_by_one(str(error)),)
    except UserWarning as warning:
        return False, (_one_by_one(f"torch would run them so inside a shared pass: {warning}"),)
    except torch.OutOfMemoryError:
        return False, (_one_by_one(f"{len(jobs)} of them do not fit into the memory of {device}"),)
    chosen = shared < apart
    took = f"a step of all takes {1e3 * apart:.3g} ms apart, {1e3 * shared:.3g} ms together"
    text = f"{len(jobs)} chains {SHARED if chosen else APART}: {took}"
    pin = "batched" if chosen else "sequential"
    return chosen, (Finding("info", text, f'parallel="{pin}" for the same bits in the next run', TOPIC),)


def _one_by_one(reason: str) -> Finding:
    return Finding("info", f"chains {APART}: {reason}", 'parallel="fastest" measures both ways', TOPIC)


def _shortest(step: Callable[[int], None], rounds: int, device: torch.device) -> float:
    """Seconds of a step; the first one, which allocates and compiles, is not counted."""
    seconds = []
    for number in range(rounds + 1):
        begun = _now(device)
        step(number)
        seconds.append(_now(device) - begun)
    return min(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
