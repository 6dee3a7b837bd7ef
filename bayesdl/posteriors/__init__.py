"""Posteriors, and the registry that files look kinds up in."""

from bayesdl.posteriors.base import Posterior
from bayesdl.posteriors.gaussian import GaussianPosterior
from bayesdl.posteriors.last_layer import LastLayerPosterior
from bayesdl.posteriors.lora import AdapterPosterior
from bayesdl.posteriors.masks import MaskPosterior
from bayesdl.posteriors.point import PointPosterior
from bayesdl.posteriors.projections import ProjectionPosterior
from bayesdl.posteriors.samples import SamplePosterior
from bayesdl.posteriors.scaled import ScaledPosterior
from bayesdl.posteriors.spanned import SpannedPosterior

POSTERIORS: dict[str, type[Posterior]] = {
    kind.kind: kind
    for kind in (
        PointPosterior,
        GaussianPosterior,
        SamplePosterior,
        ScaledPosterior,
        MaskPosterior,
        LastLayerPosterior,
        AdapterPosterior,
        ProjectionPosterior,
        SpannedPosterior,
    )
}

__all__ = [
    "POSTERIORS",
    "AdapterPosterior",
    "GaussianPosterior",
    "LastLayerPosterior",
    "MaskPosterior",
    "PointPosterior",
    "Posterior",
    "ProjectionPosterior",
    "SamplePosterior",
    "ScaledPosterior",
    "SpannedPosterior",
]
