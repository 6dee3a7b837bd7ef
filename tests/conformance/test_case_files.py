"""A Laplace posterior of every architecture of the case table comes back from its file as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from tests.cases import CASES, Case, targets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize(("structure", "bias"), [("kron", "joint"), ("diag", "separate")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved_and_loaded(case: Case, structure: str, bias: str, tmp_path: Path) -> None:
    net, x = case.network(), case.data()
    bayes = bdl.wrap(
        net,
        bdl.Laplace(select=case.select, structure=structure, bias=bias),
        [(x, targets("categorical"))],
        likelihood="categorical",
        prior=bdl.GaussianPrior(precision=1.0),
        progress=False,
    )
    bayes.save(tmp_path / "posterior.safetensors")
    again = bdl.load(tmp_path / "posterior.safetensors", net)
    before, after = bayes(x).latent, again(x).latent
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.variance, after.variance)
