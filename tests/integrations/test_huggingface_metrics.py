from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ShapeError
from bayesdl.integrations.huggingface_metrics import calibration_metrics

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def given(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    return SimpleNamespace(predictions=logits.detach().numpy(), label_ids=labels.numpy())


def test_the_numbers_of_evaluate() -> None:
    expected = bdl.evaluate(bdl.wrap(network(), "map", likelihood="categorical"), [(X, LABELS)])
    assert calibration_metrics(given(network()(X), LABELS)) == pytest.approx(expected, rel=1e-6)
    whole = SimpleNamespace(predictions=(network()(X).detach().numpy(), "hidden states"), label_ids=LABELS.numpy())
    assert calibration_metrics(whole) == pytest.approx(expected, rel=1e-6)


def test_tokens_without_label_are_left_out() -> None:
    labels = LABELS.view(10, 5).clone()
    labels[:, 3:] = -100
    found = calibration_metrics(given(network()(X.view(10, 5, 4)), labels))
    kept = X.view(10, 5, 4)[:, :3].flatten(0, 1)
    assert found == pytest.approx(calibration_metrics(given(network()(kept), labels[:, :3].flatten())))


def test_shapes_have_to_fit() -> None:
    with pytest.raises(ShapeError, match=r"expected \(N, C\) and \(N,\)"):
        calibration_metrics(given(network()(X), LABELS[:-1]))


def test_under_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": x, "labels": label} for x, label in zip(X, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(Model(), arguments, eval_dataset=rows, compute_metrics=calibration_metrics)
    found = trainer.evaluate()
    for name, value in calibration_metrics(given(network()(X), LABELS)).items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6)
    assert found["eval_nll"] == pytest.approx(found["eval_loss"], rel=1e-4)
