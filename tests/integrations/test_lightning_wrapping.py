"""A Bayesian model at the end of a Lightning training, against `bdl.wrap` after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.integrations.wrapping import Wrapping
from tests.integrations import trained_together
from tests.processes import torchrun
from tests.untouched import untouched

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from bayesdl.integrations.lightning import BayesCallback  # noqa: E402

N = 48
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) + torch.randn(N, generator=torch.Generator().manual_seed(1)) > 0).long()
PRIOR = bdl.GaussianPrior(1.0)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Dropout in the training draws from the global state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def data(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 8, shuffle=shuffle)


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.03)


class Predictor(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, bayes: bdl.BayesianModel) -> None:
        super().__init__()
        self.bayes = bayes

    def predict_step(self, batch: Any, number: int) -> Tensor:
        return self.bayes(batch[0]).probs


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {"max_epochs": 3, "enable_checkpointing": False, **quiet, **options}
    return lightning.Trainer(callbacks=list(callbacks), default_root_dir=folder, **options)


def wrapped(net: nn.Module, loader: Any) -> bdl.BayesianModel:
    return bdl.wrap(net, "laplace", loader, likelihood="categorical", prior=PRIOR)


def laplace(**options: Any) -> BayesCallback:
    return BayesCallback("laplace", "categorical", prior=PRIOR, **options)


@pytest.mark.parametrize("network", [None, "net"])
def test_it_is_wrap_after_the_training(network: str | None, tmp_path: Path) -> None:
    module, callback = Module(), laplace(network=network)
    with pytest.raises(NotFittedError, match="not come to its end"):
        _ = callback.bayes
    trainer(tmp_path, callback).fit(module, data(shuffle=True))
    expected = wrapped(module.net, data())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    # the loader shuffles: the sums of the curvature are taken in another order
    torch.testing.assert_close(callback.bayes(x).probs, expected(x).probs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected(x).probs, module.net.eval()(x).softmax(-1), atol=1e-3)


def test_the_module_is_as_without_it(tmp_path: Path) -> None:
    def trained(*callbacks: Any) -> tuple[Module, Tensor]:
        torch.manual_seed(3)
        module = Module()
        trainer(tmp_path, *callbacks).fit(module, data(shuffle=True))
        return module, torch.get_rng_state()

    (plain, plain_state), (module, state) = trained(), trained(laplace())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in plain.state_dict().items())
    assert [part.training for part in module.modules()] == [part.training for part in plain.modules()]
    assert torch.equal(plain_state, state), "the global random state moved"


class Watched(lightning.Callback):  # type: ignore[misc, name-defined]
    """The callback it is given, called on a module that is compared before and after."""

    def __init__(self, inner: BayesCallback) -> None:
        self.inner = inner

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        assert pl_module.training
        with untouched(pl_module):
            self.inner.on_train_end(trainer, pl_module)


def test_the_module_is_untouched_while_it_is_wrapped(tmp_path: Path) -> None:
    callback = laplace(network="net")
    trainer(tmp_path, Watched(callback)).fit(Module(), data(shuffle=True))
    assert isinstance(callback.bayes, bdl.BayesianModel)


def test_data_replace_the_training_loader(tmp_path: Path) -> None:
    half = [(X[:20], Y[:20])]
    module, callback = Module(), laplace(data=half, network="net")
    trainer(tmp_path, callback).fit(module, data())
    expected = wrapped(module.net, half)
    assert torch.equal(callback.bayes(X[:5]).probs, expected(X[:5]).probs)
    assert not torch.allclose(wrapped(module.net, data())(X[:5]).probs, expected(X[:5]).probs, atol=1e-4)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("method", ["laplace", bdl.Laplace(select="last_layer"), "dropout"])
def test_the_trainer_predicts(method: Any, inference_mode: bool, tmp_path: Path) -> None:
    module, callback = Module(), BayesCallback(method, "categorical", network="net", progress=False)
    trainer(tmp_path, callback).fit(module, data())
    expected = callback.bayes(X[:8]).probs.detach()
    predictor = trainer(tmp_path, inference_mode=inference_mode)
    found = predictor.predict(Predictor(callback.bayes), DataLoader(TensorDataset(X), 8))
    torch.testing.assert_close(found[0].detach(), expected)


def test_a_checkpoint_of_the_last_step_is_wrapped_without_training(tmp_path: Path) -> None:
    module, first = Module(), laplace(network="net")
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, "last")
    trainer(tmp_path, saving, first, enable_checkpointing=True).fit(module, data())
    again = laplace(network="net")
    trainer(tmp_path, again).fit(Module(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(again.bayes(X[:5]).probs, first.bayes(X[:5]).probs)


def test_wrong_arguments_are_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="selection= was given; expected one of"):
        BayesCallback("laplace", "categorical", selection="last")
    with pytest.raises(ArgumentError, match="model= was given"):
        BayesCallback("laplace", "categorical", model=nn.Linear(1, 1))
    with pytest.raises(KeyError, match="'laplac' is not known"):
        BayesCallback("laplac", "categorical")
    with pytest.raises(ArgumentError, match="can be read once"):
        BayesCallback("laplace", "categorical", data=iter([(X, Y)]))
    with pytest.raises(ArgumentError, match="pass a held-out loader as data="):
        BayesCallback("temperature", "categorical")
    module = Module()
    with pytest.raises(ArgumentError, match=r"Module has no network 'body'; it has \['net'\]"):
        trainer(tmp_path, BayesCallback("laplace", "categorical", network="body")).fit(module, data())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in Module().state_dict().items())


@pytest.mark.dist
def test_two_processes_fit_together() -> None:
    torchrun(trained_together.lightning)


def test_methods_that_cannot_add_up_shares_are_refused_before_the_training() -> None:
    share = DataLoader(TensorDataset(X, Y), sampler=DistributedSampler(range(N), num_replicas=2, rank=0))
    for method in ("vbll", "tfb", "sghmc"):
        with pytest.raises(ArgumentError, match=rf'method "{method}" cannot add up.*data=.*distributed=False'):
            Wrapping(method, "categorical", None, None, {}).check(share)
    Wrapping("vbll", "categorical", None, None, {"distributed": False}).check(share)
    Wrapping("vbll", "categorical", [(X, Y)], None, {}).check(share)
    Wrapping("laplace", "categorical", None, None, {}).check(share)
    Wrapping("vbll", "categorical", None, None, {}).check(data())
