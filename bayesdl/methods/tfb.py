"""Training-free Bayesianisation of a trained low-rank adapter (Shi et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.lora.adapters import Layers, find_layers
from bayesdl.lora.anchors import Metric
from bayesdl.lora.report import SearchReport
from bayesdl.methods.base import Fitted, Method, Task, with_residual_noise
from bayesdl.posteriors import PointPosterior
from bayesdl.posteriors.lora import AdapterPosterior, Running
from bayesdl.select import Selector


@final
@dataclass(frozen=True)
class TFB(Method):
    """Isotropic Gaussian noise in the column space of every low-rank update, as much of it as the anchors bear.

    Delta W = s B A + s sigma P Z, with P an orthonormal basis of the columns of B and Z standard normal: one scale
    sigma for all layers, the largest whose loss on the anchors changes by no more than a tolerance. Where the loss is
    convex in sigma that is variational inference with an isotropic prior in the same subspace. It needs no training and
    no labels.

    Args:
        tolerance: of the change of the loss; 0.003 nats, or 0.01 for "flip", are usual.
        metric: "nll" of the mean over draws, in nats per anchor; "nll-relative", as a share; "gibbs", the mean over
            draws of each one's; "flip", the share of anchors whose answer changes; or a callable (outputs (S, B, C),
            the network's own (B, C), y) -> (B,).
        num_samples: draws, in the search and in predictions.
        anchors: examples taken from the loader, in its order.
        labels: "given", "pseudo" (the network's own answers), or "auto": given where the batches hold them.
        sigma: given: no search, and no data needed.
        sigma_range: searched, in logarithms.
        resolution: ratio, less one, between the sigma returned and the next one known to fail.
        two_sided: whether a loss that falls counts as a change too.
        layers: "all", "last-k" (in the last k blocks), a regular expression on layer names, or a list of them.
        share_prefix: compute the blocks in front of all noise once for all draws: "auto", True or False.
        adapter: name or names; None takes the active ones.
        tile: several draws in one forward pass; False for models whose rows interact.
        max_rows: bound on the rows of a forward pass; None bounds its tokens.
        seed: of the draws, unless `wrap` is given a generator.
        blocks: path of the list of blocks, for models that have several.
        select: not used; layers are chosen by `layers`.
    """

    tolerance: float = 0.003
    metric: str | Metric = "nll"
    num_samples: int = 10
    anchors: int = 500
    labels: str = "auto"
    sigma: float | None = None
    sigma_range: tuple[float, float] = (1e-4, 1e-1)
    resolution: float = 0.02
    two_sided: bool = True
    layers: Layers = "all"
    share_prefix: bool | str = "auto"
    adapter: str | Sequence[str] | None = None
    tile: bool = True
    max_rows: int | None = None
    seed: int = 0
    blocks: str | None = None
    select: Selector | None = None

    name: ClassVar[str] = "tfb"
    streams: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        from bayesdl.lora.scale import SearchSettings, search_scale

        if task.prior is not None:
            raise UnsupportedError('method "tfb" has no prior: its scale is set by tolerance=, or given as sigma=')
        if self.share_prefix not in (True, False, "auto"):
            raise ArgumentError(f'share_prefix={self.share_prefix!r}; expected True, False or "auto"')
        network = task.network
        layers = find_layers(network.template, self.adapter, self.layers, self.blocks)
        settings = SearchSettings(
            *(self.tolerance, self.metric, self.num_samples, self.anchors),
            *(self.labels, self.sigma_range, self.resolution, self.two_sided),
        )
        posterior = AdapterPosterior.of(
            network,
            layers,
            self.sigma or 0.0,
            seed=self.seed,
            num_samples=self.num_samples,
            running=Running(self.tile, self.max_rows, self.share_prefix, self.blocks),
            search=settings.to_json(),
        )
        posterior = posterior.with_seed(posterior.reseeded(task.generator))
        likelihood, findings = with_residual_noise(task, PointPosterior())
        if self.sigma is None:
            data = task.need_data(self.name, "some examples, which need no labels (or give sigma=)")
            posterior, chosen = search_scale(network, posterior, likelihood, data, settings, task.progress)
        else:
            report = SearchReport(self.sigma, "given", num_samples=self.num_samples, seed=posterior.seed)
            posterior = posterior.with_sigma(self.sigma, report)
            chosen = (Finding("info", f"sigma {self.sigma:g} was given", 'tune("tolerance", loader)', "sigma"),)
        selected = network.reselect(list(posterior.names))
        cost = (
            ("parameters", float(sum(layer.rank * layer.inputs for layer in layers))),
            ("search_passes", 0.0 if posterior.report is None else posterior.report.passes),
        )
        return Fitted(posterior, likelihood, (*findings, *chosen), selected, cost)
