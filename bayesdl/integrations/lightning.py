"""Callbacks of a Lightning trainer: around `bdl.wrap` when training ends, around `bdl.Chain` while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.errors import ArgumentError, require
from bayesdl.integrations.collecting import Collector, Schedule
from bayesdl.integrations.wrapping import Wrapping
from bayesdl.likelihoods import Likelihood
from bayesdl.methods import Method
from bayesdl.model import BayesianModel
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers import Chain

__all__ = ["BayesCallback", "ChainCallback"]

_lightning = require("lightning.pytorch", extra="lightning")


@final
class BayesCallback(_lightning.Callback):  # type: ignore[name-defined]
    """Makes the network of a `lightning.Trainer` Bayesian when its training ends: `bdl.wrap` on the training loader.

        callback = BayesCallback("laplace", "categorical", network="net")
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
        callback.bayes(x)

    The module is not written to. The fit runs on the device of the training, where `bayes` stays. Callbacks that set
    the weights at the end, such as averages of them, belong before this one in the trainer's list. The trainer's
    checkpoints hold nothing of it: `callback.bayes.save(path)`.

    Args:
        method: name or object, as in `bdl.wrap`.
        likelihood: as in `bdl.wrap`.
        data: loader to wrap with instead of the training loader, which may augment, or leave out its last batch.
        network: attribute of the module that is the network, such as "net" or "model.encoder", where the module's own
            forward is not the network; None is the module itself.
        batch: of `bdl.wrap`.
        options: of `bdl.wrap`: `validation=`, `select=`, `prior=`, `generator=`. Where the trainer runs several
            processes, each with a share of its loader, "laplace" is fitted by all of them together
            (`distributed=False`: by each alone); other methods then need `data=`.

    Raises:
        BayesDLError: at once for arguments that `bdl.wrap` does not have or accept; as `bdl.wrap` when training ends.
    """

    def __init__(
        self,
        method: str | Method,
        likelihood: str | Likelihood,
        *,
        data: Iterable[Any] | None = None,
        network: str | None = None,
        batch: str | BatchAdapter | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._network = network
        self._wrapping = Wrapping(method, likelihood, data, batch, options)

    @property
    def bayes(self) -> BayesianModel:
        """The Bayesian model. Raises `NotFittedError` before the end of training."""
        return self._wrapping.bayes

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Forget an earlier training, and look for the network."""
        self._wrapping.clear()
        _network(pl_module, self._network)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Look whether the method can be fitted to what the trainer's loader yields."""
        self._wrapping.check(trainer.train_dataloader)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Wrap the network while it is on the device of the training, which the trainer takes it off afterwards."""
        self._wrapping.finish(_network(pl_module, self._network), trainer.train_dataloader)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Wrap a network that had no training left to do: its checkpoint was that of the last step."""
        if not self._wrapping.done:
            self._wrapping.finish(_network(pl_module, self._network), trainer.train_dataloader)


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
        self._collector.begin(_network(pl_module, self._net), trainer.optimizers[0], trainer.global_step)
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


def _network(module: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return module
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        have = [child for child, _ in module.named_children()]
        raise ArgumentError(f"{type(module).__name__} has no network {name!r}; it has {have}") from error
