"""A Bayesian classifier under the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from bayesdl.integrations.huggingface_model import as_module
from tests.lora.networks import adapted, batch
from tests.untouched import untouched

pytest.importorskip("peft")


class Rows(Dataset):  # type: ignore[type-arg]
    """Single examples."""

    def __init__(self, labels: bool) -> None:
        self.data = batch(6, labels=labels)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.data.items()}


METHODS: dict[str, Any] = {
    "tfb": bdl.TFB(sigma=0.1, num_samples=4),
    "laplace": bdl.Laplace(select="lora", structure="diag"),
    "ensemble": bdl.Ensemble(),
}


def made(method: str) -> bdl.BayesianModel:
    options: dict[str, Any] = {"likelihood": "categorical", "batch": "huggingface", "progress": False}
    models = [adapted("llama", 2, std=std) for std in (0.05, 0.1)]
    if method == "laplace":
        options["prior"] = bdl.GaussianPrior(5.0)
    data = [batch(6, labels=True)] if method == "laplace" else None
    return bdl.wrap(models if method == "ensemble" else models[0], METHODS[method], data, **options)


@pytest.fixture
def bayes() -> bdl.BayesianModel:
    return made("tfb")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [True, False])
def test_the_trainer_predicts(method: str, labels: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    bayes = made(method)
    from transformers import Trainer, TrainingArguments

    arguments: Any = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = Rows(labels)
    trainer = Trainer(model=as_module(bayes), args=arguments)
    found = trainer.predict(rows)  # type: ignore[arg-type]
    pred = bayes({key: value for key, value in rows.data.items() if key != "labels"})
    torch.testing.assert_close(torch.as_tensor(found.predictions), pred.mean.log(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.as_tensor(found.predictions).exp().sum(-1), torch.ones(6), atol=1e-5)
    if labels:
        nll = -float(pred.log_prob(rows.data["labels"]).mean())
        assert found.metrics["test_loss"] == pytest.approx(nll, rel=1e-4)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(nll, rel=1e-4)  # type: ignore[arg-type]


def test_it_has_nothing_to_train(bayes: bdl.BayesianModel) -> None:
    module = as_module(bayes)
    assert not module.training and list(module.parameters()) == []
    with pytest.raises(UnsupportedError, match="eval mode"):
        module.train()(**batch())
    gaussian = bdl.wrap(torch.nn.Linear(2, 1), "map", likelihood=bdl.Gaussian(1.0))
    with pytest.raises(UnsupportedError, match="no class probabilities"):
        as_module(gaussian)


def test_the_model_is_left_alone(bayes: bdl.BayesianModel) -> None:
    model = adapted("llama", 1)
    with untouched(model):
        own = bdl.wrap(model, bdl.TFB(sigma=0.1), likelihood="categorical", batch="huggingface")
        as_module(own).double()(**batch())
