"""The dictionaries of the library in the loggers they are meant for, without a server and without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn

import bayesdl as bdl

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations.md"
pytestmark = [  # of the loggers, about what they are built on
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
NOISE = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.fixture(scope="module")
def bayes() -> bdl.BayesianModel:
    data = [(X, X.sum(1, keepdim=True) + NOISE[:, None])]
    return bdl.wrap(network(), bdl.Laplace(), data, likelihood=bdl.Gaussian(noise=0.3), progress=False)


@pytest.fixture(scope="module")
def values(bayes: bdl.BayesianModel) -> dict[str, float]:
    report = bdl.compare(
        {"laplace": bayes}, [(X, X.sum(1, keepdim=True))], ood={"far away": [(9 * X, 9 * X.sum(1, keepdim=True))]}
    )
    return dict(report["laplace"]) | bdl.evaluate(bayes, [(X, X.sum(1, keepdim=True))])


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    found = pytest.importorskip("mlflow", reason="the package that logs")
    found.set_tracking_uri((tmp_path / "runs").as_uri())
    found.set_experiment("tests")
    return found


def test_mlflow_keeps_every_number(mlflow: Any, values: dict[str, float], bayes: bdl.BayesianModel) -> None:
    with mlflow.start_run() as run:
        mlflow.log_metrics(values)
        bayes.save("bayes.safetensors")
        mlflow.log_artifact("bayes.safetensors")
    assert mlflow.get_run(run.info.run_id).data.metrics == values
    stored = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="bayes.safetensors")
    assert torch.equal(bdl.load(stored, network())(X).variance, bayes(X).variance)


def test_the_page_makes_a_model_of_mlflow(mlflow: Any, bayes: bdl.BayesianModel) -> None:
    snippet = next(s for s in re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if "mlflow" in s)
    safetensors.torch.save_file(network().state_dict(), "net.safetensors")
    names = {"mlflow": mlflow, "safetensors": safetensors, "torch": torch, "bdl": bdl, "pandas": pd, "bayes": bayes}
    with mlflow.start_run() as run:
        exec(compile(snippet, str(PAGE), "exec"), names | {"make_network": network})
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    found = model.predict(pd.DataFrame(X.numpy()))
    expected = bayes(X)
    torch.testing.assert_close(torch.tensor(found["mean"].to_numpy()), expected.mean[:, 0], check_dtype=False)
    torch.testing.assert_close(torch.tensor(found["std"].to_numpy()), expected.variance[:, 0].sqrt(), check_dtype=False)
    assert (found["low"] < found["mean"]).all() and (found["mean"] < found["high"]).all()


def test_wandb_keeps_every_number(values: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the package that logs")
    monkeypatch.chdir(tmp_path)
    run = wandb.init(mode="offline", dir=tmp_path, project="tests", settings=wandb.Settings(silent=True))
    try:
        run.log(values)
        assert {key: run.summary[key] for key in values} == values
    finally:
        run.finish()


def test_tensorboard_keeps_every_number(values: dict[str, float], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package that logs")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for key, value in values.items():
            writer.add_scalar(key, value)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {key: events.Scalars(key)[0].value for key in events.Tags()["scalars"]}
    assert found == pytest.approx(values, rel=1e-6)  # it stores single precision
