"""Samplers that are `torch.optim.Optimizer`s: gradient of the mean loss in, a chain from the posterior out."""

from bayesdl.samplers import diagnostics
from bayesdl.samplers.baoab import BAOAB
from bayesdl.samplers.base import Sampler
from bayesdl.samplers.batches import Batches
from bayesdl.samplers.chain import Chain
from bayesdl.samplers.cyclical import Cyclical
from bayesdl.samplers.entropy import EntropyMCMC
from bayesdl.samplers.noticing import ResumeWarning, StochasticForwardWarning
from bayesdl.samplers.pooling import pooled
from bayesdl.samplers.psgld import PSGLD
from bayesdl.samplers.record import StepRecord
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.sa_sgld import SASGLD, UnweightedChainWarning
from bayesdl.samplers.sghmc import SGHMC
from bayesdl.samplers.sgld import SGLD
from bayesdl.samplers.sgnht import SGNHT
from bayesdl.samplers.store import SampleStore
from bayesdl.samplers.structured import Structured
from bayesdl.samplers.temperature import (
    Decreasing,
    check_loss_scale,
    effective_temperature,
    precision_from_weight_decay,
)

SAMPLERS: dict[str, type[Sampler]] = {
    "sgld": SGLD,
    "sghmc": SGHMC,
    "baoab": BAOAB,
    "sgnht": SGNHT,
    "psgld": PSGLD,
    "sa-sgld": SASGLD,
    "entropy-mcmc": EntropyMCMC,
}

__all__ = [
    "BAOAB",
    "PSGLD",
    "SAMPLERS",
    "SASGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Batches",
    "Chain",
    "Cyclical",
    "Decreasing",
    "EntropyMCMC",
    "ResumeWarning",
    "SampleRecord",
    "SampleStore",
    "Sampler",
    "StepRecord",
    "StochasticForwardWarning",
    "Structured",
    "UnweightedChainWarning",
    "check_loss_scale",
    "diagnostics",
    "effective_temperature",
    "pooled",
    "precision_from_weight_decay",
]
