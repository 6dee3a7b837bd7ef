"""A Bayesian model at the end of a training by the Trainer of transformers, against `bdl.wrap` after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NotFittedError
from tests.integrations import trained_together
from tests.lora.networks import adapted, base, batch
from tests.processes import torchrun
from tests.untouched import untouched

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("peft", reason="peft is not installed")
from bayesdl.integrations.transformers import BayesCallback  # noqa: E402

ROWS = 24
LAST = bdl.Laplace(select="last_layer")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def examples() -> list[dict[str, Tensor]]:
    rows = batch(ROWS, labels=True)
    return [{key: value[row] for key, value in rows.items()} for row in range(ROWS)]


def loader() -> list[dict[str, Tensor]]:
    rows = batch(ROWS, labels=True)
    return [{key: value[start : start + 8] for key, value in rows.items()} for start in range(0, ROWS, 8)]


def questions() -> dict[str, Tensor]:
    return batch(5, seed=7)


def trainer(folder: Path, model: nn.Module, *callbacks: Any, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=0, **options,
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=examples(), callbacks=list(callbacks))


def wrapped(model: nn.Module, method: Any, data: Any = None) -> bdl.BayesianModel:
    data = loader() if data is None else data
    return bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False)


class Watched(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """The callback it is given, called on a model that is compared before and after."""

    def __init__(self, inner: BayesCallback) -> None:
        self.inner = inner

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        assert model.training
        with untouched(model):
            self.inner.on_train_end(args, state, control, model=model, **others)


def test_it_is_wrap_after_the_training(tmp_path: Path) -> None:
    model, callback = base("bert", 1), BayesCallback(LAST, progress=False)
    with pytest.raises(NotFittedError, match="not come to its end"):
        _ = callback.bayes
    trainer(tmp_path, model, Watched(callback)).train()
    expected = wrapped(model, LAST)(questions()).probs
    # the trainer's loader shuffles: the sums of the curvature are taken in another order
    torch.testing.assert_close(callback.bayes(questions()).probs, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model.eval()(**questions()).logits.softmax(-1), atol=1e-4)
    loaded = bdl.load(tmp_path / "bayesdl.safetensors", model, batch="huggingface")
    assert torch.equal(loaded(questions()).probs, callback.bayes(questions()).probs)


@pytest.mark.parametrize("method", [bdl.Laplace(select="lora", structure="diag"), bdl.TFB(sigma=0.1, num_samples=4)])
def test_adapters_of_peft(method: Any, tmp_path: Path) -> None:
    model, callback = adapted("bert", 1), BayesCallback(method, save=False, progress=False)
    trainer(tmp_path, model, Watched(callback)).train()
    expected = wrapped(model, method)(questions()).probs
    torch.testing.assert_close(callback.bayes(questions()).probs, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model.eval()(**questions()).logits.softmax(-1), atol=1e-5)
    assert not (tmp_path / "bayesdl.safetensors").exists()


def test_the_training_is_as_without_it(tmp_path: Path) -> None:
    plain, model = base("bert", 1), base("bert", 1)
    trainer(tmp_path, plain).train()
    trainer(tmp_path, model, BayesCallback(LAST, progress=False)).train()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    assert [part.training for part in model.modules()] == [part.training for part in plain.modules()]


@pytest.mark.dist
def test_two_processes_fit_together(tmp_path: Path) -> None:
    torchrun(trained_together.transformers, str(tmp_path))


@pytest.mark.dist
@pytest.mark.parametrize("how", [("even", "random", "open"), ("uneven", "seedable", "given")])
def test_two_processes_of_accelerate_fit_together(how: tuple[str, ...]) -> None:
    torchrun(trained_together.accelerate, *how)


def test_data_replace_the_training_loader(tmp_path: Path) -> None:
    few = loader()[:1]
    model, callback = base("bert", 1), BayesCallback(LAST, data=few, progress=False)
    trainer(tmp_path, model, callback).train()
    expected = wrapped(model, LAST, few)(questions()).probs
    assert torch.equal(callback.bayes(questions()).probs, expected)
    assert not torch.allclose(wrapped(model, LAST)(questions()).probs, expected, atol=1e-5)


def test_a_second_training_forgets_the_first(tmp_path: Path) -> None:
    model, callback = base("bert", 1), BayesCallback(LAST, save=False, progress=False)
    found = trainer(tmp_path, model, callback)
    found.train()
    first = callback.bayes
    callback.on_train_begin(found.args, found.state, found.control)
    with pytest.raises(NotFittedError):
        _ = callback.bayes
    found.train()
    assert callback.bayes is not first


def test_wrong_arguments_are_refused_before_the_training() -> None:
    with pytest.raises(ArgumentError, match="selection= was given; expected one of"):
        BayesCallback("laplace", selection="last")
    with pytest.raises(ArgumentError, match="pass a held-out loader as data="):
        BayesCallback("temperature")
    with pytest.raises(ArgumentError, match="no training loader any more"):
        BayesCallback("laplace").on_train_end(None, None, None, model=nn.Linear(2, 2))


@pytest.mark.parametrize(("module", "package"), [("transformers", "transformers"), ("lightning", "lightning.pytorch")])
def test_absent_packages_are_named_with_the_line_to_type(module: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from bayesdl.errors import MissingDependencyError\n"
        f"try:\n    import bayesdl.integrations.{module}\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert module in run.stdout and "pip install" in run.stdout
