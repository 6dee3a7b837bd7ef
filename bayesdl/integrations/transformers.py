"""Callbacks of a Hugging Face trainer: around `bdl.wrap` when training ends, around `bdl.Chain` while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from torch import nn

from bayesdl.batch import BatchAdapter
from bayesdl.errors import ArgumentError, require
from bayesdl.integrations.collecting import Collector, Schedule
from bayesdl.integrations.huggingface_metrics import calibration_metrics
from bayesdl.integrations.huggingface_model import as_module
from bayesdl.integrations.wrapping import Wrapping
from bayesdl.likelihoods import Likelihood
from bayesdl.methods import Method
from bayesdl.model import BayesianModel
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers import Chain, Sampler
from bayesdl.samplers.packing import pack, unpack
from bayesdl.tensorfile import read_described, write_described

__all__ = ["BayesCallback", "ChainCallback", "as_module", "calibration_metrics"]

_transformers = require("transformers", extra="llm")
FILE = "bayesdl-chain.safetensors"
MODEL_FILE = "bayesdl.safetensors"


@final
class BayesCallback(_transformers.TrainerCallback):  # type: ignore[name-defined]
    """Makes the model of a `transformers.Trainer` Bayesian when its training ends: `bdl.wrap` on the training loader.

        callback = BayesCallback(bdl.Laplace(select="last_layer"))
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        callback.bayes({"input_ids": tokens, "attention_mask": mask})

    The model is not written to. `bdl.load(f"{output_dir}/bayesdl.safetensors", model)` reads what `save` wrote, around
    a model with the weights of the end of training: with `load_best_model_at_end`, the best ones.

    Args:
        method: name or object, as in `bdl.wrap`.
        likelihood: as in `bdl.wrap`.
        data: loader to wrap with instead of the training loader, which may augment, or leave out its last batch.
        batch: of `bdl.wrap`.
        save: whether the first process writes `bayesdl.safetensors` into the output directory.
        options: of `bdl.wrap`: `validation=`, `select=`, `prior=`, `generator=`. Where the trainer runs several
            processes, each with a share of its loader, "laplace" is fitted by all of them together
            (`distributed=False`: by each alone); other methods then need `data=`.

    Raises:
        BayesDLError: at once for arguments that `bdl.wrap` does not have or accept; as `bdl.wrap` when training ends.
    """

    def __init__(
        self,
        method: str | Method,
        likelihood: str | Likelihood = "categorical",
        *,
        data: Iterable[Any] | None = None,
        batch: str | BatchAdapter | None = "huggingface",
        save: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._wrapping = Wrapping(method, likelihood, data, batch, options)
        self._save = save

    @property
    def bayes(self) -> BayesianModel:
        """The Bayesian model. Raises `NotFittedError` before the end of training."""
        return self._wrapping.bayes

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **others: Any) -> None:
        """Forget an earlier training, and look whether the method can be fitted to what the trainer's loader yields."""
        self._wrapping.clear()
        self._wrapping.check(train_dataloader)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, train_dataloader: Any = None, **others: Any
    ) -> None:
        """Wrap the model; the first process writes it beside what the trainer saves."""
        bayes = self._wrapping.finish(model, train_dataloader)
        if self._save and state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            bayes.save(folder / MODEL_FILE)


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
