"""Trainings by Lightning, transformers and accelerate on two processes of torchrun; each function runs on both.

At their end every process must hold what `bdl.wrap` makes of the trained network and all the data on one process alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.posteriors import GaussianPosterior
from tests.together import same_everywhere

ROWS = 41  # no multiple of any batch: samplers repeat examples to even the shares out
PRIOR = bdl.GaussianPrior(1.0)
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) + torch.randn(ROWS, generator=torch.Generator().manual_seed(1)) > 0).long()
DATA = TensorDataset(X, Y)


@contextmanager
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    assert dist.get_world_size() == 2
    dist.barrier()
    dist.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def is_that_of_one_process(found: bdl.BayesianModel, net: nn.Module, inputs: Any, data: Any, **options: Any) -> None:
    """Curvature, and probabilities where the prior was given; and both processes hold the same bits."""
    method, net = options.pop("method", "laplace"), copy.deepcopy(net)
    for buffer in net.buffers():  # running statistics are those of the first process
        dist.broadcast(buffer, 0)
    options = {"likelihood": "categorical", "progress": False, "distributed": False, "prior": PRIOR, **options}
    expected = bdl.wrap(net, method, data, **options)
    mine, theirs = found.posterior, expected.posterior
    assert isinstance(mine, GaussianPosterior) and isinstance(theirs, GaussianPosterior)
    assert mine.num_data == theirs.num_data == ROWS
    # sums in another order, in float32
    dense = theirs.curvature.to_dense()
    torch.testing.assert_close(mine.curvature.to_dense(), dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    if torch.equal(mine.precision, theirs.precision):
        torch.testing.assert_close(found(inputs).probs, expected(inputs).probs, rtol=1e-4, atol=1e-5)
    same_everywhere(found(inputs).probs, *mine.tensors().values())


def lightning() -> None:
    import warnings

    warnings.simplefilter("ignore")
    from lightning import pytorch

    from bayesdl.integrations.lightning import BayesCallback

    class Module(pytorch.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, number: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.03)

    callback = BayesCallback("laplace", "categorical", network="net", prior=PRIOR, progress=False)
    module = Module()
    trainer = pytorch.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, 8, shuffle=True))
    with one_thread():
        is_that_of_one_process(callback.bayes, module.net, X[:5], [(X, Y)])


def transformers(folder: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainingArguments

    from bayesdl.integrations.transformers import BayesCallback
    from tests.lora.networks import base, batch

    rows = batch(ROWS, labels=True)
    last = bdl.Laplace(select="last_layer")
    model, callback = base("bert", 1), BayesCallback(last, prior=PRIOR, progress=False)
    args = TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=0, ddp_backend="gloo",
    )  # fmt: skip
    data = [{key: value[row] for key, value in rows.items()} for row in range(ROWS)]
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    questions = batch(5, seed=7)
    with one_thread():
        is_that_of_one_process(callback.bayes, model, questions, [rows], method=last, batch="huggingface")
        dist.barrier()
        loaded = bdl.load(f"{folder}/bayesdl.safetensors", model, batch="huggingface")
        assert torch.equal(loaded(questions).probs, callback.bayes(questions).probs)


def accelerate(even: str, seedable: str, prior: str) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration

    how = DataLoaderConfiguration(even_batches=even == "even", use_seedable_sampler=seedable == "seedable")
    accelerator = Accelerator(cpu=True, dataloader_config=how)
    net = network()
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), 0.03), DataLoader(DATA, 4, shuffle=True)
    )
    for _ in range(2 if even == "even" else 0):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()
    plain = accelerator.unwrap_model(net)
    given = PRIOR if prior == "given" else None
    options: dict[str, Any] = {"likelihood": "categorical", "distributed": True, "prior": given, "progress": False}
    found = bdl.wrap(plain, "laplace", loader, **options)
    with one_thread():
        is_that_of_one_process(found, plain, X[:5], [(X, Y)])
        stream = accelerator.prepare(DataLoader(Stream(), 2))
        with pytest.raises(ArgumentError, match="one of 2 shares.*DataLoaderDispatcher.*distributed=True"):
            bdl.wrap(plain, "laplace", stream, **options | {"distributed": None})
        with pytest.raises(ArgumentError, match="DataLoaderDispatcher.*nobody knows how many"):
            bdl.wrap(plain, "laplace", stream, **options)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))
