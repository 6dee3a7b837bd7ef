"""The evidence of one fit over the logarithms of prior precisions and noise scales, a few vector operations a value.

Where H and the prior precision are diagonal in the same coordinates (eigen-coordinates of each layer; the parameters
themselves for `diag`), log|P| is a sum over one flat vector of eigenvalues, whatever the number of layers. Elsewhere
(`full` or `lowrank` under several precisions, noise scales that differ by output) the structure itself is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bayesdl.curvature.diag import Diag
from bayesdl.curvature.dual import Dual
from bayesdl.curvature.logsum import log_sum
from bayesdl.curvature.mixed import Mixed
from bayesdl.curvature.rotated import Rotated
from bayesdl.curvature.structure import Structure
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evidence import log_likelihood, squared_offsets
from bayesdl.network import Network
from bayesdl.posteriors.gaussian import GaussianPosterior

PRIORS = ("scalar", "layer", "parameter", "keep")
NOISES = (True, False, "scalar", "output")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of H where the prior precision is diagonal too.

    Attributes:
        values: `(P,)`, those under one precision side by side; float64 unless there is one precision for all.
        sizes: how many of them each precision holds for, `(G,)`.
    """

    values: Tensor
    sizes: Tensor

    def logdet(self, scale: Tensor, shift: Tensor) -> Tensor:
        """log|scale H + diag(shift)| for precisions `(G,)`."""
        if len(self.sizes) == 1:
            return log_sum(self.values, scale, shift.reshape(()))
        if len(self.sizes) != len(self.values):
            shift = shift.repeat_interleave(self.sizes, output_size=len(self.values))
        return torch.addcmul(shift, scale, self.values).log().sum()


def spectrum(structure: Structure, prior: str) -> Spectrum | None:
    """The spectrum under a prior of one precision ("scalar"), one per "layer" or per "parameter"; None without one."""
    if isinstance(structure, Dual) and structure.gap:  # a bound on log|P|, with a term that no eigenvalue holds
        return None
    if isinstance(structure, Mixed) and any(spectrum(part, "scalar") is None for part in structure.parts):
        return None
    blocks = structure.layout.blocks
    if structure.options.get("signed"):  # it knows itself where it is not positive definite
        return None
    if prior == "scalar" or (len(blocks) == 1 and prior == "layer"):
        values = structure.eigenvalues()
        return Spectrum(values, torch.tensor([len(values)], device=values.device))
    if prior == "parameter":
        if not isinstance(structure, Diag):
            return None
        values = structure.layout.join(structure.diagonal)
        return Spectrum(values.double(), torch.ones(len(values), dtype=torch.long, device=values.device))
    if isinstance(structure, Mixed):
        parts = [spectrum(part, prior) for part in structure.parts]
        pieces: dict[int, Tensor] = {}
        for own, part in zip(structure.members, parts, strict=True):
            if part is None:
                return None
            pieces |= dict(zip(own, part.values.split(part.sizes.tolist()), strict=True))
        values = torch.cat([pieces[i] for i in range(len(blocks))]).double()
    elif isinstance(structure, (Diag, Rotated)):
        values = structure.eigenvalues().double()
    else:
        return None
    return Spectrum(values, torch.tensor([block.numel for block in blocks], device=values.device))


@dataclass(frozen=True, eq=False)
class Surface:
    """log p(D) of a fit as a function of log-precisions `(G,)` and log-noises (`()` common, `(C,)` by output, None).

    Attributes:
        posterior: the fit.
        squares: squared distance to the prior mean under each precision, `(G,)`.
        sizes: parameters under each precision, `(G,)`.
        fixed: log-precisions that are kept `(G,)`; None where they are tuned.
        relative: `(C,)` that the noise factors multiply; None where the noise is not tuned.
        by_output: whether every output has a factor of its own.
        eigen: see `spectrum`; None where there is none.
    """

    posterior: GaussianPosterior
    squares: Tensor
    sizes: Tensor
    fixed: Tensor | None
    relative: Tensor | None
    by_output: bool
    eigen: Spectrum | None

    @classmethod
    def of(cls, posterior: GaussianPosterior, network: Network, prior: str, noise: bool | str) -> Self:
        """The surface for a kind of prior of `PRIORS` and a noise of `NOISES`.

        Raises:
            UnsupportedError: the structure does not take one precision per parameter, or the fit holds no curvature
                of each output alone.
        """
        layout, kept = posterior.layout, posterior.precision.numel()
        kind = prior
        if prior == "keep":
            kind = "scalar" if kept == 1 else "layer" if kept == len(layout.blocks) else "parameter"
        blocks = squared_offsets(posterior, network)
        if kind == "parameter":
            squares = layout.join(blocks)
            sizes = torch.ones_like(squares)
            # refuses what no such structure can answer, with the alternatives
            posterior.structure.logdet(posterior.scale, posterior.shift.expand(layout.numel))
        else:
            squares = torch.stack([block.sum() for block in blocks])
            sizes = squares.new_tensor([float(block.numel) for block in layout.blocks])
        if kind == "scalar":
            squares, sizes = squares.sum().reshape(1), sizes.sum().reshape(1)
        relative, by_output = _relative(posterior, noise)
        fixed = posterior.precision.double().log().reshape(-1) if prior == "keep" else None
        structure = posterior.curvature if relative is not None else posterior.structure
        return cls(
            posterior, squares, sizes, fixed, relative, by_output, None if by_output else spectrum(structure, kind)
        )

    def start(self) -> tuple[Tensor, Tensor | None]:
        """Log-precisions `(G,)` and log-noises of the fit itself."""
        if self.fixed is not None:
            precision = self.fixed
        else:
            present = self.posterior.precision.double().log().reshape(-1)
            precision = present if len(present) == len(self.sizes) else present.mean().expand(len(self.sizes)).clone()
        noise = self.posterior.noise
        if self.relative is None or noise is None:
            return precision, None
        ratio = (noise.double() / self.relative).square()
        return precision, 0.5 * (ratio if self.by_output else ratio.mean()).log()

    def level(self, log_noise: Tensor | None) -> Tensor | None:
        """Noise scales `(C,)`."""
        if self.relative is None or log_noise is None:
            return self.posterior.noise
        return self.relative * log_noise.exp()

    def precision(self, log_precision: Tensor) -> Tensor:
        """As a posterior stores it: a scalar, one per layer or one per parameter."""
        if self.fixed is not None:
            return self.posterior.precision
        value = log_precision.exp()
        return value.reshape(()) if len(value) == 1 and self.posterior.layout.numel > 1 else value

    def logdet(self, log_precision: Tensor, log_noise: Tensor | None) -> Tensor:
        """log|P|."""
        posterior, level = self.posterior, self.level(log_noise)
        shift = log_precision.exp() / posterior.temperature
        if self.eigen is not None:
            if self.relative is None or level is None or log_noise is None:
                return self.eigen.logdet(posterior.scale.double(), shift)
            unit = level[0] ** -posterior.noise_power / posterior.temperature
            return self.eigen.logdet(unit, shift)
        if self.relative is not None and not self.by_output and level is not None:
            unit = level[0] ** -posterior.noise_power / posterior.temperature
            return posterior.curvature.logdet(unit, self._shaped(shift))
        return posterior.structure_at(level).logdet(posterior.scale_at(level), self._shaped(shift))

    def value(self, log_precision: Tensor, log_noise: Tensor | None) -> Tensor:
        """log p(D)."""
        posterior = self.posterior
        shift = log_precision.exp() / posterior.temperature
        prior = (self.squares * shift).sum() - (self.sizes * shift.log()).sum()
        likelihood = log_likelihood(posterior, self.level(log_noise)) / posterior.temperature
        return likelihood - 0.5 * (prior + self.logdet(log_precision, log_noise))

    def _shaped(self, shift: Tensor) -> Tensor:
        return shift.reshape(()) if len(shift) == 1 else shift


def _relative(posterior: GaussianPosterior, noise: bool | str) -> tuple[Tensor | None, bool]:
    if noise is False or (noise is True and posterior.noise is None):
        return None, False
    if posterior.noise is None:
        raise UnsupportedError(
            f"noise={noise!r} was asked for, but this fit holds no open noise: pass bdl.Gaussian() without noise= to "
            "leave it open"
        )
    if noise == "output" and not posterior.parts and len(posterior.noise) > 1:
        raise UnsupportedError(
            'noise="output" needs the curvature of each output alone, which a fit with kind="ggn" and an open noise '
            'keeps; this one has a common factor: noise="scalar"'
        )
    if posterior.parts:
        return torch.ones_like(posterior.noise, dtype=torch.float64), noise != "scalar"
    return posterior.noise.double(), False


def check_choice(prior: str, noise: bool | str) -> None:
    """Raise `ArgumentError` unless both are known."""
    if prior not in PRIORS:
        raise ArgumentError(f"prior={prior!r}; choose one of 'scalar', 'layer', 'parameter' or 'keep'")
    if noise not in NOISES:
        raise ArgumentError(f"noise={noise!r}; choose True, False, 'scalar' or 'output'")
