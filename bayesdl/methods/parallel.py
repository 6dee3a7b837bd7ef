"""How the chains of one process run: one after another, or in one vectorised pass a step.

Chains that share their passes are those they would be alone up to the rounding of batched products, which a long chain
amplifies until the two are different draws of the same law. A choice by the clock would therefore make the samples
depend on what else the machine was doing: it is made only where `parallel="fastest"` asks for it, and then reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bayesdl.diagnose import Finding
from bayesdl.distributed import Group, together
from bayesdl.errors import ShapeError, UnsupportedError
from bayesdl.methods.batched import quiet, start_together, step_together, unbatchable
from bayesdl.methods.chains import Job, advance, start

PARALLEL = ("auto", "sequential", "batched", "fastest")
ROUNDS = 3  # timed steps of each way; the shortest counts, which other work on the machine has lengthened least
TOPIC = "chains"


def share_passes(jobs: Sequence[Job], group: Group | None) -> tuple[bool, tuple[Finding, ...]]:
    """Whether the chains of a process share their passes, and what has to be said about it; the same on all processes.

    Args:
        jobs: all chains.
        group: processes that run them, each its share.

    Raises:
        UnsupportedError: `parallel="batched"` is not possible.
    """
    settings = jobs[0].settings
    mine = jobs if group is None else jobs[:: group.size]  # of the first process, which has the most
    if settings.parallel == "sequential" or len(mine) == 1 or settings.workers > 1:
        return False, ()
    reason = unbatchable(jobs[0])
    if settings.parallel == "batched":
        if reason:
            raise UnsupportedError(f'parallel="batched" is not possible: {reason}; use "sequential" or workers=')
        return True, ()
    device = next(jobs[0].module.parameters()).device
    if settings.parallel == "auto" and device.type == "cpu":
        return False, ()
    if reason:
        return False, (_one_by_one(reason),)
    with together(group):
        verdict, findings = torch.zeros((), dtype=torch.int64), tuple[Finding, ...]()
        if group is None or group.rank == 0:
            faster, findings = _by_trial(mine, device, timed=settings.parallel == "fastest")
            verdict.fill_(int(faster))
    if group is not None:
        verdict = verdict.to(group.device)
        group.spread([verdict])
    return bool(verdict), findings


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
            text = f"{len(jobs)} chains share one pass a step: on {device.type}, small kernels wait for their launch"
            return True, (Finding("info", text, 'parallel="fastest" measures it', TOPIC),)
        with quiet():
            apart, shared = seconds_a_step(jobs)
    except (UnsupportedError, ShapeError, NotImplementedError) as error:
        return False, (_one_by_one(str(error)),)
    except UserWarning as warning:
        return False, (_one_by_one(f"torch would run them so inside a shared pass: {warning}"),)
    except torch.OutOfMemoryError:
        return False, (_one_by_one(f"{len(jobs)} of them do not fit into the memory of {device}"),)
    chosen = shared < apart
    way = "share one pass a step" if chosen else "run one after another"
    text = f"{len(jobs)} chains {way}: a step of all takes {1e3 * apart:.3g} ms apart, {1e3 * shared:.3g} ms together"
    pin = "batched" if chosen else "sequential"
    return chosen, (Finding("info", text, f'parallel="{pin}" for the same bits in the next run', TOPIC),)


def _one_by_one(reason: str) -> Finding:
    return Finding("info", f"chains run one after another: {reason}", topic=TOPIC)


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
