"""Posterior over the two projections of a vision-language model, pushed to its cosine scores in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.batch import Call
from bayesdl.curvature.intact import check_layout, check_structure
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Layout
from bayesdl.errors import ArgumentError, FileFormatError, ShapeError, check_finite
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.lora.cosine import Embeddings, score_moments
from bayesdl.lora.towers import Towers
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, frozen, standard_normal
from bayesdl.posteriors.gaussian import JOINT_OUTPUTS

SCORES = 1 << 23  # covariances, or variances where those are left out, that are computed at once


@final
@dataclass(frozen=True, eq=False)
class ProjectionPosterior(Posterior):
    """W ~ N(W_MAP, P^-1) for each tower, P = scale sum(a a') (x) sum(GGN) / N + precision (Baumann et al. 2024).

    In the eigenvectors of both factors an embedding W a has a covariance whose eigenvectors all embeddings share:
    U_B diag_j(sum_i (U_A' a)_i^2 / (n l_i m_j + precision)) U_B'. Scores are the moments of
    `bayesdl.lora.cosine_moments`, with the covariances between classes that their one projection makes.

    Attributes:
        curvature: both blocks, "image" and "text".
        precision: of the prior of each, `(2,)` float64.
        scale: what multiplies the curvature: pseudo-count over the number of pairs.
        evidence: log marginal likelihood of each tower's contrastive loss, `(2,)` float64.
    """

    curvature: Kron
    precision: Tensor
    scale: float
    evidence: Tensor

    kind: ClassVar[str] = "projections"

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        network.check_fresh()
        towers = _towers(network)
        images, texts = _arguments(towers, network.prepare(inputs))
        joint = len(texts) <= JOINT_OUTPUTS
        y = self.embeddings(network, 1, texts, shared=joint)
        parts = []
        for some in images.split(max(1, SCORES // len(texts) ** (2 if joint else 1))):
            latent = GaussianLatent(*score_moments(self.embeddings(network, 0, some), y, *towers.at))
            check_finite(latent.variance, "the posterior variances of the scores")
            parts.append(latent)
        return GaussianLatent.cat(parts)

    def embeddings(self, network: Network, tower: int, features: Tensor, *, shared: bool = False) -> Embeddings:
        """Embeddings of features `(n, q)` under the posterior.

        Args:
            network: over `Towers`.
            tower: 0 for images, 1 for texts.
            features: before the projection.
            shared: also the covariances between every two of them, `(p, n, n)`.
        """
        layer = (_towers(network).image, _towers(network).text)[tower]
        if features.dim() != 2 or features.shape[1] != layer.in_features:
            raise ShapeError(
                f"features of shape {tuple(features.shape)} for a projection of {layer.in_features}: expected (n, "
                f"{layer.in_features})"
            )
        eigen = self.curvature.eigen[tower]
        assert eigen.inner is not None and eigen.outer is not None
        like, mean = eigen.values, layer(features)
        weight = 1.0 / (self.scale * like[0] + self.precision[tower].to(like))  # (p, q)
        rotated = features.to(like) @ eigen.inner[0]
        variance = rotated.square() @ weight.mT
        between = torch.einsum("ji,ni,mi->jnm", weight, rotated, rotated) if shared else None
        return Embeddings(mean.to(like), eigen.outer[0], variance, between)

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        layout = self.curvature.layout
        noise = standard_normal((n, layout.numel), self.precision.float(), generator)
        offsets = self.curvature.sample(noise, self.scale, self.precision)
        means = {name: value.detach() for name, value in network.parameters.items()}
        drawn = [layout.to_dict(offset) for offset in offsets]
        return [frozen(network, {k: v + one[k].to(v) for k, v in means.items()}) for one in drawn]

    @property
    def forward_passes(self) -> float:
        return 1.0

    @property
    def over_weights(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        named = {f"curvature.{name}": value for name, value in self.curvature.tensors().items()}
        return named | {"precision": self.precision, "evidence": self.evidence}

    def config(self) -> dict[str, Any]:
        return {"layout": self.curvature.layout.to_json(), "scale": self.scale}

    def check(self, network: Network) -> None:
        """Raise unless there are two towers and their factors have their sizes."""
        check_layout(self.curvature.layout, network)
        check_structure(self.curvature)
        _towers(network)
        sound = self.precision.shape == self.evidence.shape == (2,) and bool((self.precision > 0).all())
        if not sound or not 0 < self.scale < float("inf"):
            raise FileFormatError(f"precisions {self.precision.tolist()} and scale {self.scale} of two projections")

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        prefix = "curvature."
        inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        shell = Kron.empty(Layout.from_json(config["layout"]), torch.float32, torch.device("meta"))
        return cls(shell.with_tensors(inner), tensors["precision"], float(config["scale"]), tensors["evidence"])


def _towers(network: Network) -> Towers:
    module = network.module()
    if not isinstance(module, Towers):
        raise ArgumentError(
            f"{type(module).__name__} was given; a posterior over projections is over bdl.lora.Towers(W_x, W_y, scale)"
        )
    return module


def _arguments(towers: Towers, call: Any) -> tuple[Tensor, Tensor]:
    given = call if isinstance(call, Call) else Call((call,))
    named = dict(zip(("images", "texts"), given.args, strict=False)) | dict(given.kwargs or {})
    images = named.get("images")
    if len(given.args) > 2 or set(named) - {"images", "texts"} or not isinstance(images, Tensor):
        raise ArgumentError("features of images (B, q_x) are expected, or (images, texts)")
    if not len(images):
        raise ShapeError("the batch is empty; expected at least one image")
    return images, towers.against(named.get("texts")).to(images)
