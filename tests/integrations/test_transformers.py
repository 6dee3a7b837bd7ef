"""Chains inside a Hugging Face trainer, against the same loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.samplers import SGHMC, SampleStore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from bayesdl.integrations.transformers import ChainCallback  # noqa: E402

N = 32
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Model(nn.Module):
    """Takes and returns what the trainer expects."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Linear(3, 5)
            self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))
        return (
            {"logits": logits}
            if labels is None
            else {
                "loss": nn.functional.cross_entropy(logits, labels),
                "logits": logits,
            }
        )


def examples() -> list[dict[str, Tensor]]:
    x = torch.linspace(-1, 1, 3 * N).view(N, 3).sin()
    return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]


def sampler_of(net: nn.Module) -> SGHMC:
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return SGHMC(named, 0.02, N, generator=torch.Generator().manual_seed(1))


def trainer(folder: Path, net: Model, samples: Any, steps: int, accumulate: int = 1, **options: Any) -> Any:
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no", **options}
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        gradient_accumulation_steps=accumulate, disable_tqdm=True, logging_strategy="no", seed=0, **options,
    )  # fmt: skip
    found = transformers.Trainer(
        net, args, train_dataset=examples(), optimizers=(sampler_of(net), None), callbacks=[samples]
    )
    found._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(found.train_dataset)
    return found


def by_hand(steps: int, accumulate: int = 1, frozen: bool = False, **options: Any) -> bdl.Chain:
    net = Model()
    if frozen:
        net.body.requires_grad_(False)
    sampler = sampler_of(net)
    chain = bdl.Chain(net, sampler=sampler, **options)
    rows, seen = examples(), 0
    while True:
        for start in range(0, N, 8):
            x, y = (torch.stack([row[key] for row in rows[start : start + 8]]) for key in ("x", "labels"))
            (net(x, y)["loss"] / accumulate).backward()
            seen += 1
            if seen % accumulate:
                continue
            sampler.step()
            sampler.zero_grad()
            chain.step()
            if chain.steps == steps:
                return chain


def same(a: bdl.posteriors.SamplePosterior, b: bdl.posteriors.SamplePosterior) -> bool:
    return all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_s_chain_is_that_of_the_loop(accumulate: int, tmp_path: Path) -> None:
    net, samples = Model(), ChainCallback(burn_in=2, thin=2)
    trainer(tmp_path, net, samples, 9, accumulate).train()
    expected = by_hand(9, accumulate, burn_in=2, thin=2)
    assert samples.chain.steps == 9 and len(samples.posterior()) == 3
    for name, values in samples.posterior().snapshots.items():
        # the trainer divides the loss of accumulated batches in another place
        assert torch.allclose(values, expected.posterior().snapshots[name], atol=0 if accumulate == 1 else 1e-6)
    bayes = bdl.BayesianModel(net, samples.posterior(), "categorical", batch="huggingface")
    assert bayes({"x": torch.zeros(2, 3)}).mean.shape == (2, 2)


def test_a_subset_of_the_parameters(tmp_path: Path) -> None:
    net, samples = Model(), ChainCallback(thin=3)
    net.body.requires_grad_(False)
    trainer(tmp_path, net, samples, 6).train()
    assert set(samples.posterior().snapshots) == {"head.weight", "head.bias"}
    assert same(samples.posterior(), by_hand(6, frozen=True, thin=3).posterior())


@pytest.mark.parametrize("stored", [False, True])
def test_training_goes_on_from_a_checkpoint(stored: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch", minversion="2.6", reason="transformers reads checkpoints with torch 2.6 and newer")
    options: dict[str, Any] = {"burn_in": 1, "thin": 2, "store": tmp_path / "c" if stored else None}
    saving = {"save_strategy": "steps", "save_steps": 5}
    first = ChainCallback(**options)
    trainer(tmp_path / "t", Model(), first, 8, **saving).train()
    first.chain.close()
    net, second = Model(4), ChainCallback(**options)
    trainer(tmp_path / "t", net, second, 13, **saving).train(resume_from_checkpoint=str(tmp_path / "t/checkpoint-5"))
    expected = by_hand(13, burn_in=1, thin=2).posterior()
    assert second.chain.steps == 13 and same(second.posterior(), expected)
    if stored:
        assert same(SampleStore(tmp_path / "c").posterior(net), expected)
    second.chain.close()


def test_what_the_trainer_does_by_default_is_no_sampling(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="set max_grad_norm=0"):
        trainer(tmp_path, Model(), ChainCallback(), 2, max_grad_norm=1.0).train()
    with pytest.raises(ArgumentError, match='set lr_scheduler_type="constant"'):
        trainer(tmp_path, Model(), ChainCallback(), 2, lr_scheduler_type="linear").train()
