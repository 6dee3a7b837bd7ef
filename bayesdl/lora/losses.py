"""The loss of anchors as a function of the scale of the noise: run at a cost, foreseen for nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import NonFiniteError
from bayesdl.likelihoods import Likelihood
from bayesdl.lora.anchors import RELATIVE_FLOOR, Anchors, Batch, Metric, mean_loss
from bayesdl.network import Network
from bayesdl.posteriors.lora import AdapterPosterior

KEPT = 1 << 22  # numbers of outputs of a run up to which they are kept


@final
class Losses:
    """The loss of one set of anchors, in forward passes counted by the way.

    Args:
        network: of the posterior.
        posterior: whose draws are the same at every scale.
        family: the likelihood.
        metric: the loss.
        anchors: a mean over which it is.
        below: the same on some of these anchors, which is told what it need not run.
    """

    def __init__(
        self,
        network: Network,
        posterior: AdapterPosterior,
        family: Likelihood,
        metric: str | Metric,
        anchors: Anchors,
        below: Losses | None = None,
    ) -> None:
        self.network, self.posterior, self.family, self.anchors = network, posterior, family, anchors
        self.metric, self.below, self.forwards = metric, below, 0
        self.plain = mean_loss(family, metric, anchors, self._own, "sigma 0")
        self.foresees = posterior.num_samples * sum(batch.plain.numel() for batch in anchors.batches) <= KEPT
        self._held: dict[float, dict[int, Tensor]] = {}

    def __call__(self, sigma: float) -> float:
        if sigma == 0:
            return self.plain
        noisy, span = self.posterior.with_sigma(sigma), (self.posterior.seed, 0, self.posterior.num_samples)
        self.forwards += self.anchors.count * self.posterior.num_samples
        made: dict[int, Tensor] = {}

        def outputs(batch: Batch) -> Tensor:
            found = self.family.check_outputs(noisy.outputs(self.network, batch.inputs, span))
            if self.foresees:
                made[batch.number] = found
            return found

        loss = mean_loss(self.family, self.metric, self.anchors, outputs, f"sigma {sigma:.4g}")
        if self.foresees:
            self._hold(sigma, made)
        return loss

    def change(self, sigma: float, two_sided: bool) -> float:
        """How far the loss moves from that of the network itself."""
        return self._counted(self(sigma) - self.plain, two_sided)

    def foreseen(self, sigma: float) -> float:
        """The loss at a scale that was not run, after one that was; infinite where it cannot be told.

        The draws are fixed, so every output is a smooth function of sigma: a parabola through the network's own and
        those at the two nearest scales that were run. Where only one was, the parabolas of the anchors `below` say how
        far a straight line errs.
        """
        nodes = self._nearest(sigma)
        try:
            moved = self._along(sigma, nodes)
            if len(nodes) == 1 and self.below is not None:
                more = self.below._nearest(sigma, nodes[0])
                moved += self.below._along(sigma, more) - self.below._along(sigma, nodes)
        except NonFiniteError:
            return math.inf
        return self.plain + moved

    def foreseen_change(self, sigma: float, two_sided: bool) -> float:
        """The change of that loss."""
        return self._counted(self.foreseen(sigma) - self.plain, two_sided)

    def _hold(self, sigma: float, made: dict[int, Tensor]) -> None:
        self._held[sigma] = made
        if self.below is not None:
            rows = {batch.number: batch.rows for batch in self.anchors.batches}
            inner = {batch.number: _places(rows[batch.number], batch.rows) for batch in self.below.anchors.batches}
            self.below._hold(sigma, {number: made[number][:, places] for number, places in inner.items()})

    def _nearest(self, sigma: float, first: float | None = None) -> list[float]:
        kept = [] if first is None else [first]
        rest = sorted(set(self._held) - set(kept), key=lambda run: abs(math.log(run / sigma)))
        return [*kept, *rest][:2]

    def _along(self, sigma: float, nodes: Sequence[float]) -> float:
        shares = [
            sigma / node * math.prod((sigma - other) / (node - other) for other in nodes if other != node)
            for node in nodes
        ]

        def outputs(batch: Batch) -> Tensor:
            runs = torch.stack([self._held[node][batch.number] for node in nodes], -1)
            return (1.0 - sum(shares)) * self._own(batch) + runs @ runs.new_tensor(shares)

        return mean_loss(self.family, self.metric, self.anchors, outputs, "forecast") - self.plain

    def _counted(self, moved: float, two_sided: bool) -> float:
        value = abs(moved) if two_sided else max(0.0, moved)
        return value / max(self.plain, RELATIVE_FLOOR) if self.metric == "nll-relative" else value

    def _own(self, batch: Batch) -> Tensor:
        return batch.plain.to(self.network.device).unsqueeze(0)


def _places(rows: Tensor, some: Tensor) -> Tensor:
    return torch.searchsorted(rows, some)
