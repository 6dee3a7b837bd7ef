"""Samples from a Lightning trainer: a callback around `bdl.Chain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from bayesdl.errors import ArgumentError, require
from bayesdl.integrations.collecting import Collector, Schedule
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers import Chain

__all__ = ["ChainCallback"]

_lightning = require("lightning.pytorch", extra="lightning")


@final
class ChainCallback(_lightning.Callback):  # type: ignore[name-defined]
    """Collects samples while a `lightning.Trainer` runs; `configure_optimizers` returns a `bdl.samplers` sampler.

        samples = ChainCallback(burn_in=500, thin=50, net="net")
        Trainer(max_steps=5000, callbacks=[samples]).fit(module, loader)
        bayes = bdl.BayesianModel(module.net, samples.posterior(), "categorical")

    With another optimiser the network is collected as it is after its steps. Accumulated batches and steps that mixed
    precision skips do not count. Checkpoints of the trainer hold the chain's counters, and the samples of a chain in
    memory; a chain in a folder is cut to the checkpoint that training goes on from.

    Args:
        burn_in, thin: in steps of the optimiser, see `bdl.Chain`.
        net: attribute of the module that is the network, such as "net" or "model.encoder"; None is the module itself.
        schedule: sampler -> `Cyclical` around it.
        options: of `bdl.Chain`.
    """

    def __init__(
        self,
        burn_in: int = 0,
        thin: int = 1,
        *,
        net: str | None = None,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._net = net
        self._collector = Collector(schedule, {"burn_in": burn_in, "thin": thin, **options})
        self._saved: dict[str, Any] | None = None

    @property
    def chain(self) -> Chain:
        """The chain. Raises `NotFittedError` before training."""
        return self._collector.chain

    def posterior(self) -> SamplePosterior:
        """The samples. Raises `NotFittedError` where there are fewer than two."""
        return self._collector.posterior()

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the chain around the module's network and the trainer's optimiser."""
        if len(trainer.optimizers) != 1:
            raise ArgumentError(f"the trainer has {len(trainer.optimizers)} optimisers; a chain takes one sampler")
        net = pl_module if self._net is None else pl_module.get_submodule(self._net)
        self._collector.begin(net, trainer.optimizers[0], trainer.global_step)
        if self._saved is not None:
            self._collector.load_state_dict(self._saved)
            self._saved = None

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step the chain where the optimiser made a step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._collector.step(trainer.global_step, loss if isinstance(loss, Tensor) else None)

    def state_dict(self) -> dict[str, Any]:
        """Goes into the trainer's checkpoints."""
        return self._collector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken when training goes on from a checkpoint; read when it starts, once the chain is there."""
        self._saved = state_dict or None
