"""The likelihood p(y | f): scores targets, gives curvature its cotangents, turns latents into predictives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily

from bayesdl import mixtures
from bayesdl.errors import LabelError, NonFiniteError, ShapeError, UnsupportedError, check_finite
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.predictive import Predictive, Split


class Likelihood(ABC):
    """Base class. A subclass needs `distribution(f)` alone; everything else has a general default.

    The defaults are Monte Carlo over the latent with base noise common to all inputs, and the Hessian of
    -log p by automatic differentiation.
    """

    name: ClassVar[str] = "custom"
    task: ClassVar[str] = "count"

    @property
    def output_axis(self) -> int | Literal["auto"] | None:
        """Axis of a network's raw outputs that holds the C numbers of one observation, all others but the first being
        positions; "auto": by the number of axes (`bayesdl.network.outputs_last`). None: outputs are `(B, C)`."""
        return None

    @abstractmethod
    def distribution(self, f: Tensor) -> Distribution:
        """p(y | f) for outputs `(..., B, C)`; its batch shape starts with `(..., B)`."""

    def num_targets(self, outputs: int) -> int:
        """How many numbers y has per input when f has `outputs` of them (custom families: the same number)."""
        return outputs

    def check_outputs(self, f: Tensor) -> Tensor:
        """`f` in at least float32, after checks. Raises `NonFiniteError` or `ShapeError`."""
        check_finite(f, "the network's outputs")
        return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f

    def check_targets(self, f: Tensor, y: Tensor) -> Tensor:
        """Targets in the shape and dtype that `distribution(f).log_prob` wants.

        Raises:
            ShapeError: shapes do not agree (both are named).
            LabelError: a value that the family cannot produce.
            NonFiniteError: NaN or infinity.
        """
        if not isinstance(y, Tensor):
            raise LabelError(f"targets are {type(y).__name__}; expected a tensor")
        target = y.to(f.device)
        expected = self.num_targets(f.shape[-1])
        if target.dim() == 1 and expected == 1:
            target = target.unsqueeze(1)
        if target.shape != (f.shape[0], expected):
            raise ShapeError(
                f"targets have shape {tuple(y.shape)} and the outputs {tuple(f.shape)}; the {self.name} likelihood "
                f"expects targets of shape ({f.shape[0]}, {expected})"
            )
        target = target.to(f.dtype)
        if not bool(torch.isfinite(target).all()):
            raise NonFiniteError(f"targets: NaN or infinity, the first at index {first_bad(~torch.isfinite(target))}")
        return target

    def counted(self, y: Tensor) -> Tensor | None:
        """Mask of the observations among checked targets that count, `(B,)`; None: all of them do."""
        del y
        return None

    def num_counted(self, y: Tensor) -> int:
        """How many observations checked targets hold: all of the batch, less what `counted` leaves out."""
        mask = self.counted(y)
        return len(y) if mask is None else int(mask.sum())

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f) summed over outputs, `(B,)`; `y` as `check_targets` returns it."""
        distribution = self.distribution(f)
        return mixtures.per_example(distribution, distribution.log_prob(y))

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of -log p(y | f) in f, `(B, C)`."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            return torch.autograd.grad(-self.log_prob(leaf, y).sum(), leaf)[0]

    def sample(self, f: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of y given f: `(n, B, ...)`."""
        return mixtures.sample(self.distribution(f), n, generator)

    def hessian_root(self, f: Tensor) -> Tensor:
        """Cotangents V `(K, B, C)` with sum_k V_k V_k^T = Lambda, the Hessian of -log p in f.

        Default: automatic differentiation at the model's own mean prediction, which is exact for exponential
        families in natural parameters; negative eigenvalues, which other families can have, are clamped at zero.

        Raises:
            UnsupportedError: the Hessian is zero everywhere, as that of a density with a kink.
        """
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            distribution = self.distribution(leaf)
            # the mean of a discrete family is no value that it can take
            loss = -mixtures.unvalidated(distribution).log_prob(distribution.mean.detach()).sum()
            slope = torch.autograd.grad(loss, leaf, create_graph=True)[0]
            rows = [_gradient(slope[:, c].sum(), leaf) for c in range(f.shape[-1])]
        values, vectors = torch.linalg.eigh(torch.stack(rows, 1).double())
        if not bool((values > 0).any()):
            raise UnsupportedError(
                f"the {self.name} likelihood has no curvature at its mean; define hessian_root(f), for example from "
                "the Fisher information, in its class"
            )
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).to(f.dtype).permute(2, 0, 1)

    def hessian_times(self, f: Tensor, vectors: Tensor) -> Tensor:
        """Lambda u for vectors u `(B, C)`; families with a closed form need no root for it."""
        root = self.hessian_root(f).to(vectors)
        return torch.einsum("kbc,kb->bc", root, torch.einsum("kbc,bc->kb", root, vectors))

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        """The diagonal of Lambda, `(B, C)`: all that a last layer's diagonal curvature depends on."""
        return self.hessian_root(f).square().sum(0)

    def num_roots(self, f: Tensor) -> int:
        """K of `hessian_root`."""
        return len(self.hessian_root(f[:1]))

    def root_columns(self, f: Tensor, start: int, stop: int) -> Tensor:
        """`hessian_root(f)[start:stop]`; where there are many outputs a family forms no more than these."""
        return self.hessian_root(f)[start:stop]

    def subset_root(self, f: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
        """Few cotangents `(K, B, C)` whose products have the expectation Lambda: for families of many classes.

        Raises:
            UnsupportedError: the family has no classes.
        """
        raise UnsupportedError(f'classes={classes} is for the categorical likelihood; use kind="mc" with {self.name!r}')

    def predictive(self, latent: Latent, noise: Tensor) -> Predictive:
        """Latent -> Predictive; `noise` is base noise `(S, C)`."""
        self.check_outputs(latent.mean)
        if latent.mean.dtype in (torch.float16, torch.bfloat16):  # probabilities need at least single precision
            latent = latent.map(lambda tensor: tensor.float())
        return Predictive(self, latent, noise.to(latent.mean))

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        """The predictive distribution of y. Default: the mixture over draws of f."""
        weights, draws = latent.draws(noise)
        return self.mixture(weights, draws)

    def mixture(self, weights: Tensor, draws: Tensor) -> Distribution:
        """sum_s w_s p(y | f_s) for draws `(S, B, C)`; the plain family where S = 1."""
        if len(draws) == 1:
            return self.distribution(draws[0])
        parts = self.distribution(draws.transpose(0, 1))  # (B, S, ...)
        extra = len(parts.batch_shape) - 2
        if extra > 0:
            parts = Independent(parts, extra)
        return MixtureSameFamily(Categorical(weights.expand(draws.shape[1], -1)), parts)

    def components(self, latent: Latent, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(S,)`, means and variances `(S, B, C)` of y, noise included."""
        weights, draws = latent.draws(noise)
        distribution = self.distribution(draws)
        return weights, distribution.mean, distribution.variance

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """Law of total variance over the components, `(B, C)`."""
        weights, mean, variance = self.components(latent, noise)
        centre = torch.einsum("s,sbc->bc", weights, mean)
        epistemic = torch.einsum("s,sbc->bc", weights, (mean - centre).square())
        return Split(torch.einsum("s,sbc->bc", weights, variance), epistemic)

    def map(self, function: Callable[[Tensor], Tensor]) -> Likelihood:
        """Apply `function` to tensors the likelihood holds (none by default)."""
        del function
        return self

    def config(self) -> dict[str, object]:
        """JSON-ready constructor arguments, for files."""
        return {}


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:  # linear in the outputs
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found


def entropy_split(weights: Tensor, entropies: Tensor, total: Tensor) -> Split:
    """Aleatoric = expected entropy, epistemic = total - aleatoric >= 0 (Jensen), clamped at rounding."""
    aleatoric = torch.einsum("s,s...->...", weights, entropies)
    return Split(aleatoric, (total - aleatoric).clamp(min=0))


def first_bad(mask: Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    return tuple(int(i) for i in mask.nonzero()[0])


def scaled_mean(latent: GaussianLatent) -> Tensor:
    """Mean-field (probit) correction f / sqrt(1 + pi/8 var), `(B, C)` (MacKay 1992)."""
    return latent.mean / torch.sqrt(1.0 + torch.pi / 8.0 * latent.variance.clamp(min=0))
