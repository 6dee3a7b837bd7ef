"""Samples from a Hugging Face trainer: a callback around `bdl.Chain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from torch import nn

from bayesdl.errors import ArgumentError, require
from bayesdl.integrations.collecting import Collector, Schedule
from bayesdl.integrations.huggingface_metrics import calibration_metrics
from bayesdl.integrations.huggingface_model import as_module
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers import Chain, Sampler
from bayesdl.samplers.packing import pack, unpack
from bayesdl.tensorfile import read_described, write_described

__all__ = ["ChainCallback", "as_module", "calibration_metrics"]

_transformers = require("transformers", extra="llm")
FILE = "bayesdl-chain.safetensors"


@final
class ChainCallback(_transformers.TrainerCallback):  # type: ignore[name-defined]
    """Collects samples while a `transformers.Trainer` runs with a `bdl.samplers` sampler.

        opt = bdl.samplers.SGLD(model.named_parameters(), lr=1e-3, num_data=len(data))
        samples = ChainCallback(burn_in=500, thin=50)
        Trainer(model, args, train_dataset=data, optimizers=(opt, None), callbacks=[samples]).train()
        bayes = bdl.BayesianModel(model, samples.posterior(), "categorical", batch="huggingface")

    Set `lr_scheduler_type="constant"` and `max_grad_norm=0` in the arguments: what the trainer does by default, a rate
    that runs to zero and clipped gradients, is no sampling of the posterior, and is refused. The parameters of the
    sampler are the sampled ones, so that a peft model's chain stores its adapters alone. Checkpoints of the trainer
    hold the chain's counters too.

    Args:
        burn_in, thin: in steps of the optimiser, see `bdl.Chain`.
        schedule: sampler -> `Cyclical` around it.
        options: of `bdl.Chain`.
    """

    def __init__(self, burn_in: int = 0, thin: int = 1, *, schedule: Schedule | None = None, **options: Any) -> None:
        super().__init__()
        self._collector = Collector(schedule, {"burn_in": burn_in, "thin": thin, **options})
        self._loss: float | None = None

    @property
    def chain(self) -> Chain:
        """The chain. Raises `NotFittedError` before training."""
        return self._collector.chain

    def posterior(self) -> SamplePosterior:
        """The samples. Raises `NotFittedError` where there are fewer than two."""
        return self._collector.posterior()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **others: Any
    ) -> None:
        """Make the chain around the model and the trainer's optimiser."""
        self._collector.begin(model, optimizer, state.global_step)
        sampler = self.chain.sampler
        if isinstance(sampler, Sampler):
            _check_arguments(args)
        if state.global_step and not self.chain.steps:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            header, tensors = read_described(path)
            self._collector.load_state_dict(unpack(header["tree"], tensors))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Step the chain: the optimiser has made a step."""
        self._collector.step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put the chain's counters beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tree, tensors = pack(self._collector.state_dict())
            write_described(folder / FILE, {"kind": "callback", "tree": tree}, tensors)


def _check_arguments(args: Any) -> None:
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if str(name) == "linear" or str(name).startswith("cosine"):
        raise ArgumentError(
            f"lr_scheduler_type={name!r} takes the sampler's step to zero, where it stands still: set "
            'lr_scheduler_type="constant" in the training arguments'
        )
    if args.max_grad_norm:
        raise ArgumentError(
            f"max_grad_norm={args.max_grad_norm} clips gradients, and the chain would sample another law than the "
            "posterior: set max_grad_norm=0 in the training arguments"
        )
