"""Whether a Gaussian posterior that was read from a file is whole, and belongs to the network at hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bayesdl.curvature.cotangents import KINDS
from bayesdl.curvature.intact import check_layout, check_structure
from bayesdl.errors import FileFormatError
from bayesdl.network import Network

if TYPE_CHECKING:
    from bayesdl.posteriors.gaussian import GaussianPosterior

PREDICTIVES = ("linearized", "samples")


def check_gaussian(posterior: GaussianPosterior, network: Network) -> None:
    """Raise `FileFormatError` unless all parts have the sizes that the network's selection demands."""
    layout = posterior.layout
    check_layout(layout, network)
    for kept in (*(posterior.parts or (posterior.curvature,)), *([posterior.earlier] if posterior.earlier else [])):
        check_structure(kept)
    layout.shifts(posterior.precision, posterior.precision)
    memory, noise, squared = posterior.memory, posterior.noise, posterior.squared_error
    sound = {
        "temperature": 0 < posterior.temperature < math.inf,
        "num_data": posterior.num_data >= 1,
        "log_likelihood": math.isfinite(posterior.log_likelihood),
        "fisher": posterior.fisher in KINDS,
        "predictive": posterior.predictive in PREDICTIVES,
        "memory": memory is None or (type(memory) is int and memory > 0),
        "prior_mean": posterior.prior_mean.numel() in (1, layout.numel),
        "noise": noise is None or (noise.dim() < 2 and bool((noise > 0).all())),
        "squared_error": squared is None or squared.dim() == 1,
    }
    for name, fine in sound.items():
        if not fine:
            raise FileFormatError(f"{name} of the posterior is {str(getattr(posterior, name))[:80]}")
