"""Tests over training seeds: exact signed ranks against enumeration and SciPy, and the report that carries them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.seeds import paired_t, signed_ranks
from bayesdl.evaluation.table import holm
from tests.evaluation.made_up import classes


def enumerated(differences: np.ndarray) -> float:
    """The definition: all signs of the mean ranks, zeros left out."""
    stats = pytest.importorskip("scipy.stats")
    kept = differences[differences != 0]
    ranks = stats.rankdata(np.abs(kept))
    sums = np.array([ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=len(kept))])
    seen = ranks[kept > 0].sum()
    return min(1.0, 2 * min(float((sums <= seen).mean()), float((sums >= seen).mean())))


@pytest.mark.parametrize("n", [2, 5, 6, 11])
def test_signed_ranks_are_exact(n: int) -> None:
    rng = np.random.default_rng(n)
    stats = pytest.importorskip("scipy.stats")
    for shift in (0.0, 0.5, 3.0):
        smooth = rng.normal(size=n) + shift
        assert signed_ranks(smooth) == pytest.approx(enumerated(smooth), abs=1e-12)
        assert signed_ranks(smooth) == pytest.approx(float(stats.wilcoxon(smooth, method="exact").pvalue), abs=1e-12)
        tied = np.round(2 * smooth) / 2
        tied[0], tied[-1] = 0.0, 1.5
        assert signed_ranks(tied) == pytest.approx(enumerated(tied), abs=1e-12)
        assert signed_ranks(-tied) == pytest.approx(signed_ranks(tied), abs=1e-12)


def test_signed_ranks_at_their_ends() -> None:
    assert signed_ranks(np.zeros(4)) == 1.0
    assert signed_ranks(np.arange(1.0, 6.0)) == 2 / 2**5  # five seeds cannot reach 5 %
    assert signed_ranks(np.arange(1.0, 7.0)) == 2 / 2**6 < 0.05
    assert signed_ranks(np.array([1.0, -1.0])) == 1.0
    assert math.isnan(signed_ranks(np.array([1.0, math.inf])))
    assert 0 < signed_ranks(np.arange(1.0, 201.0)) < 1e-59  # no count overflows


def test_a_report_over_seeds_gives_either_test() -> None:
    seeds = {
        name: [classes(60, sharpness=sharpness + 0.05 * seed, seed=seed) for seed in range(6)]
        for name, sharpness in (("right", 1.0), ("sharp", 3.0), ("flat", 0.3))
    }
    shared = [member.targets for member in seeds["right"]]
    assert all(torch.equal(a.targets, b) for a, b in zip(seeds["flat"], shared, strict=True))
    rep = compare(seeds, bootstrap=0, progress=False)
    values = {row: rep.replicates["nll"][i] for i, row in enumerate(rep.rows)}
    for name, test in ((None, paired_t), ("t", paired_t), ("wilcoxon", signed_ranks)):
        raw = {row: test(values[row] - values["right"]) for row in ("sharp", "flat")}
        found = rep.difference("sharp", "right", "nll", test=name)
        assert (found.p, found.adjusted) == (raw["sharp"], holm(raw)["sharp"])
    assert rep.difference("sharp", "right", "nll", test="wilcoxon").low == rep.difference("sharp", "right", "nll").low
    with pytest.raises(ArgumentError, match="available: t, wilcoxon"):
        rep.difference("sharp", "right", "nll", test="sign")
    single = compare({row: members[0] for row, members in seeds.items()}, bootstrap=50, progress=False)
    with pytest.raises(ArgumentError, match="over training seeds"):
        single.difference("sharp", "right", "nll", test="wilcoxon")
