"""Chains inside a Lightning trainer, against the same loop written by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.samplers import SASGLD, SGHMC, Cyclical, SampleStore

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from bayesdl.integrations.lightning import ChainCallback  # noqa: E402

N = 48
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def data() -> torch.utils.data.DataLoader[Any]:
    x = torch.linspace(-1, 1, 3 * N).view(N, 3).sin()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long()), 8)


def sampler_of(net: nn.Module, kind: Any = SGHMC) -> Any:
    return kind(net.named_parameters(), 0.02, N, generator=torch.Generator().manual_seed(1))


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, kind: Any = SGHMC, seed: int = 0) -> None:
        super().__init__()
        self.net, self.kind = network(seed), kind

    def training_step(self, batch: Any, number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sampler_of(self.net, self.kind)


def trainer(folder: Path, steps: int, *callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, "max_steps": steps, **quiet, **options}
    return lightning.Trainer(callbacks=list(callbacks), default_root_dir=folder, **options)


def by_hand(steps: int, kind: Any = SGHMC, accumulate: int = 1, cyclical: bool = False, **options: Any) -> bdl.Chain:
    net = network()
    sampler = sampler_of(net, kind)
    schedule = Cyclical(sampler, 6, 2, 0.5) if cyclical else None
    chain = bdl.Chain(net, sampler=sampler, schedule=schedule, **options)
    seen = 0
    while True:
        for x, y in data():
            (nn.functional.cross_entropy(net(x), y) / accumulate).backward()
            seen += 1
            if seen % accumulate:
                continue
            sampler.step()
            sampler.zero_grad()
            if schedule is not None:
                schedule.step()
            chain.step(schedule is None or schedule.sampling)
            if chain.steps == steps:
                return chain


def same(a: bdl.posteriors.SamplePosterior, b: bdl.posteriors.SamplePosterior) -> bool:
    return all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


@pytest.mark.parametrize("kind", [SGHMC, SASGLD])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_s_chain_is_that_of_the_loop(kind: Any, accumulate: int, tmp_path: Path) -> None:
    module, samples = Module(kind), ChainCallback(burn_in=3, thin=2, net="net")
    with pytest.raises(NotFittedError, match="has not begun"):
        samples.posterior()
    trainer(tmp_path, 11, samples, accumulate_grad_batches=accumulate).fit(module, data())
    expected = by_hand(11, kind, accumulate, burn_in=3, thin=2)
    assert samples.chain.steps == 11 and same(samples.posterior(), expected.posterior())
    assert all(record.loss is not None for record in samples.chain.records)
    bdl.BayesianModel(module.net, samples.posterior(), "categorical")(torch.zeros(2, 3))


def test_cyclical_schedules_and_other_optimisers(tmp_path: Path) -> None:
    samples = ChainCallback(net="net", schedule=lambda sampler: Cyclical(sampler, 6, 2, 0.5))
    trainer(tmp_path, 12, samples).fit(Module(), data())
    assert same(samples.posterior(), by_hand(12, cyclical=True).posterior())
    sgd = lambda parameters, lr, n, generator: torch.optim.SGD([p for _, p in parameters], lr=lr)  # noqa: E731
    module, samples = Module(sgd), ChainCallback(burn_in=1, thin=2)
    trainer(tmp_path, 6, samples, accumulate_grad_batches=3).fit(module, data())
    assert samples.chain.steps == 6 and len(samples.chain) == 2
    assert set(samples.posterior().snapshots) == {f"net.{name}" for name, _ in module.net.named_parameters()}
    with pytest.raises(ArgumentError, match="needs a sampler, and the optimiser is SGD"):
        trainer(tmp_path, 1, ChainCallback(schedule=lambda s: Cyclical(s, 6))).fit(Module(sgd), data())
    with pytest.raises(ArgumentError, match="sampler= is found in the trainer"):
        ChainCallback(sampler=3)


@pytest.mark.parametrize("stored", [False, True])
def test_training_goes_on_from_a_checkpoint(stored: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"burn_in": 3, "thin": 2, "net": "net", "store": tmp_path / "c" if stored else None}
    saving = lambda: lightning.callbacks.ModelCheckpoint(tmp_path, "at", every_n_train_steps=6, save_top_k=-1)  # noqa: E731
    first = ChainCallback(**options)
    trainer(tmp_path, 11, first, saving(), enable_checkpointing=True).fit(Module(), data())
    first.chain.close()
    expected = by_hand(15, burn_in=3, thin=2).posterior()
    module, second = Module(seed=5), ChainCallback(**options)
    trainer(tmp_path, 15, second, saving(), enable_checkpointing=True).fit(
        module, data(), ckpt_path=tmp_path / "at.ckpt"
    )
    assert second.chain.steps == 15 and same(second.posterior(), expected)
    if stored:  # what was collected after the checkpoint was cut, and made again
        assert same(SampleStore(tmp_path / "c").posterior(module.net), expected)
    second.chain.close()
