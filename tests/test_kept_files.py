"""Files of every released version load, and predict what they predicted then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from bayesdl.evaluation import Predictions
from bayesdl.samplers import SGLD, SampleStore
from tests.kept_files import FOLDER, LABELS, MODELS, X, means, network, numbers

VERSIONS = sorted(path for path in FOLDER.iterdir() if path.is_dir())
FILES = [
    path for version in VERSIONS for path in sorted(version.glob("*.safetensors")) if path.stem not in ("fit", "prior")
]


def expected(version: Path) -> dict[str, list[list[float]]]:
    return json.loads((version / "expected.json").read_text(encoding="utf-8"))


def test_this_version_is_kept_in_full() -> None:
    mine = {path.stem for path in FILES if path.parent.name == bdl.__version__}
    assert mine == set(MODELS), "python -m tests.kept_files writes the files of a new version"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_models(path: Path) -> None:
    bayes = bdl.load(path, network())
    if path.stem == "dropout":  # masks come from torch's generator, which promises nothing between versions
        assert bayes(X).probs.shape == (6, 2)
        return
    found = torch.tensor(means(bayes))
    torch.testing.assert_close(found, torch.tensor(expected(path.parent)[path.stem]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_everything_else(version: Path, tmp_path: Path) -> None:
    posterior = SampleStore(version / "chain").posterior(network())
    found = means(bdl.BayesianModel(network(), posterior, "categorical"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected(version)["chain"]), rtol=1e-4, atol=1e-4)

    shutil.copytree(version / "chain", tmp_path / "chain")
    net = network()
    sampler = SGLD(net.named_parameters(), 1e-3, 6, generator=torch.Generator().manual_seed(0))
    chain = bdl.Chain(net, sampler=sampler, store=tmp_path / "chain")
    assert chain.resume()
    assert chain.steps == 3

    sums = bdl.curvature.Accumulator(network(), "categorical")
    assert sums.resume(version / "fit.safetensors")
    assert sums.batches == 1

    prior = bdl.load_prior(version / "prior.safetensors")
    assert isinstance(prior, bdl.GaussianPrior)
    found = prior.log_prob({name: value.detach() for name, value in network().named_parameters()})
    assert float(found) == pytest.approx(expected(version)["prior"][0][0], abs=1e-5)
    assert "covariance error" in str(prior.report)

    predictions = Predictions.load(version / "predictions.npz")
    assert predictions.targets is not None
    assert predictions.targets.tolist() == LABELS.tolist()
    torch.testing.assert_close(predictions.probs.float(), numbers(6, 2).softmax(-1))

    report = bdl.Report.from_json((version / "report.json").read_text(encoding="utf-8"))
    assert report.rows == ("map", "kron")
    assert report["map"]["nll"] > 0
