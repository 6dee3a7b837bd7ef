"""Online evidence training: the network and its hyper-parameters together, on the training data alone.

Steps of the network on the log joint under the present prior and noise alternate with maximisations of the Laplace
evidence over prior and noise at the present weights (Immer et al. 2021, "Scalable marginal likelihood estimation for
model selection in deep learning"). Where both stand still the weights are the mode under that prior, and the evidence
is stationary: for a linear model with Gaussian noise that is the exact type-II maximum likelihood. Elsewhere it keeps a
network from overfitting without held-out data; a network that was stopped in time may do a little better without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, batch_size, resolve_adapter
from bayesdl.clone import independent_copy, unwrap
from bayesdl.curvature.registry import Recipe
from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, NonFiniteError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.likelihoods import resolve as resolve_likelihood
from bayesdl.methods.laplace import Laplace
from bayesdl.model import BayesianModel
from bayesdl.network import Network, first_inputs
from bayesdl.posteriors import GaussianPosterior
from bayesdl.priors import GaussianPrior
from bayesdl.select import Selector
from bayesdl.wrap import wrap

Optimiser = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# a layer that the evidence switches off altogether would otherwise make the loss as stiff as its precision is large
LIMITS = (1e-6, 1e6)


@final
class EvidenceTrainer:
    """Prior precisions and noise for a training loop of the user's own.

        trainer = bdl.EvidenceTrainer(net, loader, "categorical")
        for epoch in range(100):
            for x, y in loader:
                optimizer.zero_grad()
                trainer.loss(net(x), y).backward()   # or: own_mean_loss + trainer.regulariser()
                optimizer.step()
            trainer.step()
        bayes = trainer.fit()

    It reads the network and never writes to it. No weight decay belongs into the optimiser: the regulariser is one.

    Args:
        model: the network that is being trained.
        data: training loader; read once at every tuning.
        likelihood: name or object; an open Gaussian noise is tuned too.
        structure, kind, select: of the curvature, as for `bdl.Laplace`.
        prior: "scalar", "layer" or "parameter".
        precision: where to start.
        burn_in: epochs before the first tuning.
        every: epochs between tunings.
        limits: smallest and largest precision.
        batch: batch adapter.
        generator: for kind "mc".
        progress: show progress bars of the fits.

    Attributes:
        history: evidence after each tuning.
        precision: present prior precision, as `bdl.GaussianPrior` takes it.
        likelihood: with the present noise.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        likelihood: str | Likelihood,
        *,
        structure: Recipe = "kron",
        kind: str = "ggn",
        select: Selector = "all",
        prior: str = "layer",
        precision: float = 1.0,
        burn_in: int = 10,
        every: int = 5,
        limits: tuple[float, float] = LIMITS,
        batch: str | BatchAdapter | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> None:
        if prior not in ("scalar", "layer", "parameter"):
            raise ArgumentError(f"prior={prior!r}; choose 'scalar', 'layer' or 'parameter'")
        if burn_in < 0 or every < 1 or not 0 < limits[0] <= precision <= limits[1]:
            raise ArgumentError(
                f"burn_in={burn_in}, every={every}, precision={precision}, limits={limits}; expected burn_in >= 0, "
                "every >= 1 and a precision within positive limits"
            )
        self._model, self._data, self._batch = unwrap(model), data, batch
        self._method = Laplace(select=select, structure=structure, kind=kind)
        self._prior, self._limits, self._generator, self._progress = prior, limits, generator, progress
        self._burn_in, self._every, self._epoch = burn_in, every, 0
        self._family = resolve_likelihood(likelihood)
        self.network = Network(
            self._model, select=select, batch=batch, example=first_inputs(data, resolve_adapter(batch))
        )
        if self.network.elements is not None:
            raise UnsupportedError("evidence training selects whole parameters, not single elements of them")
        self._num_data = sum(batch_size(inputs) for _, inputs, _ in batches(self.network, data, progress=False))
        self.precision: Tensor = torch.tensor(float(precision), dtype=torch.float64)
        self.history: list[float] = []
        self.likelihood: Likelihood = self._family
        if isinstance(self._family, Gaussian) and self._family.noise is None:
            self.likelihood = self._family.with_noise(1.0)
        own = dict(self._model.named_parameters())
        missing = [name for name in self.network.names if name not in own]
        if missing:
            raise UnsupportedError(f"parameter {missing[0]!r} is not the model's own: pass the module that holds it")
        self._weights = {name: own[name] for name in self.network.names}
        self._shifts: dict[str, Tensor] = {n: self.precision.to(w.device, w.dtype) for n, w in self._weights.items()}

    def regulariser(self) -> Tensor:
        """-log p(theta) / N without constants: the sum of precision times theta^2, over 2 N; differentiable."""
        squares = [(self._shifts[name] * weight.square()).sum() for name, weight in self._weights.items()]
        return torch.stack(squares).sum() / (2.0 * self._num_data)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-likelihood of a batch under the present noise, plus `regulariser`."""
        f = self.likelihood.check_outputs(outputs.unsqueeze(1) if outputs.dim() == 1 else outputs)
        y = self.likelihood.check_targets(f, target)
        return self.regulariser() - self.likelihood.log_prob(f, y).mean()

    def step(self) -> bool:
        """To be called after every epoch; tunes when it is time to, and says whether it did."""
        self._epoch += 1
        due = self._epoch - self._burn_in
        if due < 0 or due % self._every:
            return False
        self.fit()
        return True

    def fit(self) -> BayesianModel:
        """Curvature at the present weights, and the evidence's maximum over prior and noise, from now on in use.

        Returns:
            The posterior, which belongs to these weights: train on, and it refuses to predict.
        """
        prior = GaussianPrior(precision=self.precision)
        bayes = wrap(
            self._model,
            self._method,
            self._data,
            likelihood=self._family,
            prior=prior,
            batch=self._batch,
            generator=self._generator,
            progress=self._progress,
        ).tune("evidence", prior=self._prior)
        posterior = bayes.posterior
        if not isinstance(posterior, GaussianPosterior):
            raise UnsupportedError(f"the fit gave a {type(posterior).__name__}; evidence training needs a Gaussian one")
        posterior = posterior.with_prior(posterior.precision.clamp(*self._limits))
        bayes = bayes.replaced(posterior=posterior)
        self.precision, self.likelihood = posterior.precision, bayes.likelihood
        self._shifts = self._by_name(posterior)
        self.history.append(float(bayes.log_evidence()))
        return bayes

    def _by_name(self, posterior: GaussianPosterior) -> dict[str, Tensor]:
        """The precision of every weight, broadcastable to it."""
        layout, value = posterior.layout, posterior.precision
        blocks = layout.shifts(value, value)
        sizes = [(b.groups, b.rows, b.columns) for b in layout.blocks]
        flat = layout.join([shift.expand(size) for shift, size in zip(blocks, sizes, strict=True)])
        named = layout.to_dict(flat)
        return {name: named[name].to(weight.device, weight.dtype) for name, weight in self._weights.items()}


@dataclass(frozen=True)
class EvidenceFit:
    """What `evidence_training` leaves.

    Attributes:
        model: the trained network.
        bayes: its Laplace posterior at the last prior and noise.
        history: evidence after each tuning.
    """

    model: nn.Module
    bayes: BayesianModel
    history: tuple[float, ...]


def evidence_training(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    optimizer: Optimiser | None = None,
    epochs: int = 100,
    burn_in: int = 10,
    every: int = 5,
    structure: Recipe = "kron",
    kind: str = "ggn",
    select: Selector = "all",
    prior: str = "layer",
    precision: float = 1.0,
    batch: str | BatchAdapter | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> EvidenceFit:
    """Train a copy of a network together with its prior precisions and noise.

    Args:
        model: where to start; never written to.
        data: training loader.
        likelihood: name or object; an open Gaussian noise is learnt too.
        optimizer: from the copy's parameters to an optimiser without weight decay; default Adam with rate 1e-3.
        epochs: passes over the data.
        burn_in, every, structure, kind, select, prior, precision, batch, generator: see `EvidenceTrainer`.
        progress: show progress bars.

    Raises:
        NonFiniteError: the loss became NaN or infinite; the batch is named.
    """
    copy = independent_copy(unwrap(model)).train()
    trainer = EvidenceTrainer(
        copy,
        data,
        likelihood,
        structure=structure,
        kind=kind,
        select=select,
        prior=prior,
        precision=precision,
        burn_in=burn_in,
        every=every,
        batch=batch,
        generator=generator,
        progress=progress,
    )
    trainable = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    chosen = trainable or [parameter for parameter in copy.parameters() if parameter.is_floating_point()]
    for parameter in chosen:
        parameter.requires_grad_()
    steps = optimizer(chosen) if optimizer is not None else torch.optim.Adam(chosen, lr=1e-3)
    network = trainer.network
    for epoch in range(epochs):
        for number, inputs, target in batches(network, data, progress=progress, describe=f"epoch {epoch + 1}"):
            with torch.inference_mode(False), torch.enable_grad(), in_batch(number):
                steps.zero_grad(set_to_none=True)
                loss = trainer.loss(network.forward(copy, network.prepare(inputs)), target)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError("the training loss is NaN or infinite: lower the learning rate")
                loss.backward()
                steps.step()
        trainer.step()
    copy.train(model.training)
    bayes = trainer.fit()
    return EvidenceFit(copy, bayes, tuple(trainer.history))
