"""How many samples are kept, and which."""

from __future__ import annotations

import torch

from bayesdl.samplers.retention import Retention
from tests.samplers.loops import assert_equal, network, run_sgld


def test_memory_is_bounded() -> None:
    chain, left = run_sgld(network(), 20, max_samples=3)
    assert_equal(chain.posterior(), left[-3:])
    assert len(chain) == 3 and len(chain.records) == 20
    chain, left = run_sgld(network(), 20, max_samples=3, keep="reservoir")
    steps = [record.step for record in chain.kept]
    assert_equal(chain.posterior(), [left[k] for k in steps])
    assert steps != [17, 18, 19]


def test_reservoir_is_uniform() -> None:
    # 3000 chains, 4 of 12 samples: each is kept with probability 1/3, counts have sd sqrt(3000 * 2/9) = 25.8;
    # a right reservoir is outside of 4 sd for one of 12 numbers in 1,300 seeds, and the seeds are fixed
    counts = torch.zeros(12)
    for chain in range(3000):
        retention, kept = Retention(4, "reservoir", chain), []
        for number in range(12):
            admitted, drops = retention.admit(number, kept)
            kept = [k for k in kept if k not in drops] + [number] * admitted
        counts[kept] += 1
    assert counts.sum() == 12_000 and float((counts - 1000).abs().max()) < 4 * 25.8
