"""BayesVLM: a Laplace approximation over the projections of a vision-language model (Baumann et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Block, Layout
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, NumericalError, ShapeError, check_finite
from bayesdl.lora.contrastive import LOSSES, contrastive_ggn
from bayesdl.lora.towers import Towers
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.network import Network
from bayesdl.posteriors.projections import ProjectionPosterior
from bayesdl.priors.posterior import PosteriorPrior
from bayesdl.select import Selector

WEIGHTS = ("image.weight", "text.weight")
HALVINGS = 80


@final
@dataclass(frozen=True)
class BayesVLM(Method):
    """Kronecker-factored Laplace over the two projections of CLIP or SigLIP, without training and without labels.

    `bdl.wrap(bdl.lora.Towers.of(clip), "bayesvlm", pairs, likelihood="categorical")`; `pairs` yields features of images
    and of their texts, `(a_x, a_y)`, each `(N, q)`, before the projections (`bdl.lora.image_features`,
    `text_features`). Within a batch every embedding is told from all others of the batch, as in training: a large batch
    is the better curvature. Each tower's Gauss-Newton matrix holds the other one fixed.

    Args:
        loss: "infonce" (CLIP), "siglip", or "auto": by whether the towers have a bias, as only SigLIP's do.
        pseudo_count: how many pairs the posterior counts; None: those it saw. The original work counts one.
        dtype: of the curvature; default at least float32.
        select: not used; both projections are.

    The precision of the prior of each tower is that of the evidence, unless `prior=` is given (a scalar, or one for
    each tower).
    """

    loss: str = "auto"
    pseudo_count: float | None = None
    dtype: torch.dtype | None = None
    select: Selector | None = None

    name: ClassVar[str] = "bayesvlm"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        if self.loss not in ("auto", *LOSSES):
            raise ArgumentError(f'loss={self.loss!r}; expected "auto" or one of {LOSSES}')
        if self.pseudo_count is not None and not 0 < self.pseudo_count < math.inf:
            raise ArgumentError(f"pseudo_count={self.pseudo_count}; expected a positive number of pairs")
        towers = task.network.template
        if not isinstance(towers, Towers):
            raise ArgumentError(
                f"{type(towers).__name__} was given; a posterior over projections is over "
                "bdl.lora.Towers(W_x, W_y, scale), or bdl.lora.Towers.of(clip)"
            )
        network = task.network.reselect(list(WEIGHTS))
        loss = self.loss if self.loss != "auto" else "siglip" if towers.binary else "infonce"
        curvature, losses = self._curvature(network, towers, task, loss)
        curvature.check_finite()
        for name, factor in zip(WEIGHTS, curvature.outer, strict=True):
            if not bool(factor.any()):
                raise NumericalError(
                    f"the curvature of {name} is zero: does every batch hold one pair only? Contrastive losses tell "
                    "the pairs of a batch from each other"
                )
        pairs = float(curvature.rows[0])
        scale = 1.0 if self.pseudo_count is None else self.pseudo_count / pairs
        chosen, findings = self._precision(task, curvature, network, scale)
        evidence = log_evidence(curvature, network, chosen, scale) - scale * losses
        weights = ", ".join(f"{float(value):.4g}" for value in chosen)
        found = Finding("info", f"{loss} over {pairs:g} pairs; prior precisions {weights} of image and text", "", "fit")
        posterior = ProjectionPosterior(curvature, chosen, scale, evidence)
        return Fitted(posterior, task.likelihood, (found, *findings), network)

    def _curvature(self, network: Network, towers: Towers, task: Task, loss: str) -> tuple[Kron, Tensor]:
        """Factors of both towers, and the sums of their losses `(2,)`."""
        layers = (towers.image, towers.text)
        wide = self.dtype or torch.promote_types(towers.image.weight.dtype, torch.float32)
        curvature = Kron.empty(_layout(network), wide, network.device)
        losses = torch.zeros(2, dtype=torch.float64, device=network.device)
        data = task.need_data(self.name, "pairs of features (a_x, a_y)")
        with torch.no_grad():
            for number, images, texts in batches(network, data, progress=task.progress, describe="pairs"):
                with in_batch(number):
                    pair = _checked(images, layers[0], "images"), _checked(texts, layers[1], "texts")
                    if len(pair[0]) != len(pair[1]):
                        raise ShapeError(f"{len(pair[0])} images and {len(pair[1])} texts; expected pairs")
                    embedded = [_projected(layer, a, wide) for layer, a in zip(layers, pair, strict=True)]
                    for tower, features in enumerate(pair):
                        x, y = embedded[tower], embedded[1 - tower]
                        found, lost = contrastive_ggn(x, y, loss, *towers.at)
                        curvature.inner[tower][0] += features.to(wide).mT @ features.to(wide)
                        curvature.outer[tower][0] += found
                        curvature.rows[tower].add_(len(features))
                        losses[tower] += lost
        return curvature, losses

    def _precision(
        self, task: Task, curvature: Kron, network: Network, scale: float
    ) -> tuple[Tensor, tuple[Finding, ...]]:
        if isinstance(task.prior, PosteriorPrior):
            raise ArgumentError("the prior is an earlier posterior; bayesvlm takes a bdl.GaussianPrior")
        prior = task.gaussian_prior()
        if prior is not None:
            if bool(torch.as_tensor(prior.mean).any()):
                raise ArgumentError("a prior mean was given; the prior of bayesvlm has mean zero")
            given = torch.as_tensor(prior.precision, dtype=torch.float64, device=network.device)
            if given.shape not in ((), (1,), (2,)):
                raise ShapeError(
                    f"a prior precision of shape {tuple(given.shape)}; expected a scalar, or one per tower"
                )
            return given.expand(2).clone(), ()
        found = torch.stack([_best(curvature, network, tower, scale) for tower in range(2)])
        return found, (Finding("info", "the prior precisions maximise the evidence", "pass prior=", "prior"),)


def log_evidence(curvature: Kron, network: Network, precision: Tensor, scale: float) -> Tensor:
    """What the prior precision of each tower changes in its log evidence, `(2,)` float64.

    1/2 (p q log lambda - lambda |W|^2 - sum_ij log(n l_i m_j + lambda)): the determinant of A (x) B weighs each factor
    by the size of the other.
    """
    found = []
    for tower, name in enumerate(WEIGHTS):
        values = scale * curvature.eigen[tower].values.double()
        weight, level = network.parameters[name].detach().double(), precision[tower]
        spread = (values + level).log().sum()
        found.append(0.5 * (values.numel() * level.log() - level * weight.square().sum() - spread))
    return torch.stack(found)


def _best(curvature: Kron, network: Network, tower: int, scale: float) -> Tensor:
    """The precision of the largest evidence, by bisection of its logarithm.

    The slope in log lambda is 1/2 (gamma - lambda |W|^2), gamma = sum n l m / (n l m + lambda): the first term falls
    and the second grows, so that there is one maximum, with lambda at most p q / |W|^2.
    """
    values = scale * curvature.eigen[tower].values.double()
    size = network.parameters[WEIGHTS[tower]].detach().double().square().sum()
    if not bool(size > 0):
        raise ArgumentError(f"{WEIGHTS[tower]} is zero; its embeddings have no direction")
    high = (values.numel() / size).log()
    low = high - 80.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        level = middle.exp()
        rising = (values / (values + level)).sum() > level * size
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return (0.5 * (low + high)).exp()


def _checked(features: object, layer: torch.nn.Linear, what: str) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[1] != layer.in_features:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ShapeError(f"features of {what}: {shape}; expected (N, {layer.in_features})")
    found = features.to(layer.weight)
    check_finite(found, f"features of {what}")
    return found


def _projected(layer: torch.nn.Linear, features: Tensor, dtype: torch.dtype) -> Tensor:
    found: Tensor = features.to(dtype) @ layer.weight.to(dtype).mT
    return found if layer.bias is None else found + layer.bias.to(dtype)


def _layout(network: Network) -> Layout:
    shapes = tuple(tuple(value.shape) for value in network.parameters.values())
    blocks = tuple(
        Block(name.split(".")[0], "linear", (name,), (shape,), (name.split(".")[0],), 1, shape[0], shape[1])
        for name, shape in zip(WEIGHTS, shapes, strict=True)
    )
    return Layout(blocks, WEIGHTS, shapes)
