"""Tests over training seeds: exact signed ranks against enumeration and SciPy, and the report that carries them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.seeds import paired_t, signed_ranks
from bayesdl.evaluation.significance import holm
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


def test_predictions_of_every_seed_on_every_set() -> None:
    def made(sharpness: float, seed: int, shift: float = 0.0) -> Predictions:
        return classes(60, sharpness=sharpness, seed=seed, shift=shift)

    names = {"right": 1.0, "sharp": 3.0}
    seeds = {name: [made(s, 0), made(s + 0.1, 0)] for name, s in names.items()}
    ood = {"far": {name: [made(s, 5, 0.5), made(s + 0.1, 6, 0.7)] for name, s in names.items()}}
    shift = {"blur": [{name: [made(s, 0, 0.2), made(s, 0, 0.4)] for name, s in names.items()}]}
    held = {name: [made(s, 8), made(s, 9)] for name, s in names.items()}
    rep = compare(seeds, ood=ood, shift=shift, calibration=held, bootstrap=0, progress=False)
    assert rep.rows == ("right", "right + T", "sharp", "sharp + T")
    assert f"means and standard errors over 2 training seeds, targets {rep.details['data']}" in str(rep)
    for index in (0, 1):
        alone = compare(
            {name: found[index] for name, found in seeds.items()},
            ood={"far": {name: found[index] for name, found in ood["far"].items()}},
            shift={"blur": [{name: found[index] for name, found in shift["blur"][0].items()}]},
            calibration={name: found[index] for name, found in held.items()},
            bootstrap=0,
            progress=False,
        )
        assert alone.columns == rep.columns and {"ood/far/auroc", "shift/blur/1/nll"} <= set(rep.columns)
        for column in rep.columns:
            for place, row in enumerate(rep.rows):
                assert rep.replicates[column][place][index] == pytest.approx(alone[row][column], abs=0, nan_ok=True)
    with pytest.raises(ArgumentError, match=r"ood\['far'\]\['sharp'\]: expected a list of 2 predictions"):
        compare(seeds, ood={"far": {**ood["far"], "sharp": ood["far"]["sharp"][0]}}, progress=False)
    with pytest.raises(ArgumentError, match=r"calibration\['right'\]: 3 predictions were given, expected 2"):
        compare(seeds, calibration={**held, "right": [*held["right"], held["right"][0]]}, progress=False)
