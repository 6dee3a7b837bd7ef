"""Categorical likelihood on logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution

from bayesdl.errors import ArgumentError, LabelError, ShapeError
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods.base import Likelihood, first_bad, scaled_mean
from bayesdl.predictive import Split

LINKS = ("probit", "mean_field", "bridge", "mc")
# scalars of draws of the outputs held at once
DRAWS = 1 << 23
# rows of the outputs that tell probabilities from logits
PROBED = 16


@final
@dataclass(frozen=True)
class Categorical(Likelihood):
    """y is one of C classes, f are logits `(B, C)`, targets are integers `(B,)`.

    Sequences and images have one observation at every position. Their logits `(B, T, C)` or `(B, C, H, W)` meet targets
    `(B, T)` or `(B, H, W)`; the library keeps the classes last, so that predictions are `(B, T, C)` and `(B, H, W, C)`.

    Args:
        link: how a Gaussian latent becomes class probabilities: "probit" (each logit shrunk by its own variance, MacKay
            1992), "mean_field" (each difference of two logits by its variance, Lu, Ie and Sha 2020, second order; knows
            covariances, at the cost of C^2 numbers an input), "bridge" (Laplace bridge to a Dirichlet, Hobbhahn et al.
            2022) or "mc" (draws with common base noise).
        normalize: before the bridge, shrink latents whose mean variance exceeds sqrt(C/2) to it, the widest that
            the bridge maps well (its normalised variant).
        ignore_index: positions (or examples) with this target count neither in N nor in the likelihood nor in the
            curvature: padding, unlabelled pixels. As in `torch.nn.functional.cross_entropy`; None: every target counts.
        class_axis: axis of the network's raw outputs that holds the classes. None: the last of `(B, T, C)`, axis 1 of
            `(B, C, H, W)`. Give 1 for torch's order `(B, C, T)`.
    """

    link: str = "probit"
    normalize: bool = True
    ignore_index: int | None = -100
    class_axis: int | None = None

    name: ClassVar[str] = "categorical"
    task: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ArgumentError(f"link={self.link!r} is not known; choose one of {LINKS}")
        if self.class_axis == 0:
            raise ArgumentError("class_axis=0 is the batch; give the axis of the outputs that holds the classes")

    @property
    def output_axis(self) -> int | Literal["auto"]:
        return "auto" if self.class_axis is None else self.class_axis

    def distribution(self, f: Tensor) -> Distribution:
        return TorchCategorical(logits=f)

    def num_targets(self, outputs: int) -> int:
        return 1

    def check_outputs(self, f: Tensor) -> Tensor:
        if f.shape[-1] < 2:
            raise ShapeError(
                f"the outputs have shape {tuple(f.shape)}; the categorical likelihood needs at least 2 "
                "logits per input. "
                'For one logit use likelihood="bernoulli"; for one real value "gaussian"; for one log-rate "poisson"'
            )
        f = super().check_outputs(f)
        _refuse_probabilities(f.detach())
        return f

    def check_targets(self, f: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor):
            raise LabelError(f"targets are {type(y).__name__}; expected a tensor of class indices")
        if f.dim() == 2 and y.dim() == 2 and y.shape[1] == 1:
            y = y.squeeze(1)
        self._check_shapes(f, y)
        if y.dtype.is_floating_point or y.dtype in (torch.bool, torch.complex64):
            raise LabelError(f"targets have dtype {y.dtype}; the categorical likelihood expects integer class indices")
        y = y.long()  # before the comparisons: a mask of bytes holds no -100
        bad = (y < 0) | (y >= f.shape[-1])
        if self.ignore_index is not None:
            bad &= y != self.ignore_index
        if bool(bad.any()):
            found = first_bad(bad)
            place = found[0] if len(found) == 1 else found
            value = int(y[found])
            advice = (
                f"; if {value} marks what does not count, bdl.Categorical(ignore_index={value})" if y.dim() > 1 else ""
            )
            raise LabelError(
                f"target {value} at index {place} is outside 0..{f.shape[-1] - 1} (the network has "
                f"{f.shape[-1]} outputs){advice}"
            )
        return y.to(f.device)

    def _check_shapes(self, f: Tensor, y: Tensor) -> None:
        given = f"targets have shape {tuple(y.shape)} and the outputs {tuple(f.shape)}"
        if y.shape != f.shape[:-1]:
            hint = " (of one-hot rows: y.argmax(-1))" if y.shape == f.shape else ""
            if f.dim() > 2 and self.class_axis is None:
                hint = (
                    " (classes last). If the network puts the classes elsewhere, say where: bdl.Categorical(class_axis="
                )
                hint += "1)" if f.dim() == 3 else "-1)"
            raise ShapeError(
                f"{given}; the categorical likelihood expects class indices of shape {tuple(f.shape[:-1])}{hint}"
            )
        if self.class_axis is None and f.dim() == 3 and f.shape[1] == f.shape[2]:
            raise ShapeError(
                f"{given}: which axis holds the classes is ambiguous; pass likelihood=bdl.Categorical(class_axis=-1) "
                "where it is the last, class_axis=1 for the order of torch.nn.functional.cross_entropy"
            )

    def counted(self, y: Tensor) -> Tensor | None:
        return None if self.ignore_index is None else y != self.ignore_index

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f), `(B,)` or per position `(B, T)`; exactly zero where the target is ignored."""
        found = torch.log_softmax(f, -1).gather(-1, self._class(y).unsqueeze(-1)).squeeze(-1)
        mask = self.counted(y)
        return found if mask is None else found.masked_fill(~mask, 0.0)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        gradient = torch.softmax(f, -1)
        gradient = gradient.scatter_add(-1, self._class(y).unsqueeze(-1), -gradient.new_ones(y.shape).unsqueeze(-1))
        mask = self.counted(y)
        return gradient if mask is None else gradient.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _class(self, y: Tensor) -> Tensor:
        """Targets with a class of the network in the place of `ignore_index`."""
        return y if self.ignore_index is None else y.masked_fill(y == self.ignore_index, 0)

    def hessian_root(self, f: Tensor) -> Tensor:
        return self.root_columns(f, 0, f.shape[-1])

    def hessian_times(self, f: Tensor, vectors: Tensor) -> Tensor:
        p = torch.softmax(f, -1).to(vectors)
        return p * (vectors - (p * vectors).sum(-1, keepdim=True))

    def num_roots(self, f: Tensor) -> int:
        return int(f.shape[-1])

    def root_columns(self, f: Tensor, start: int, stop: int) -> Tensor:
        # diag(p) - p p^T = sum_k v_k v_k^T with v_k = sqrt(p_k) (e_k - p)
        p = torch.softmax(f.detach(), -1)
        chosen = p[..., start:stop].movedim(-1, 0).unsqueeze(-1)
        root = -chosen.sqrt() * p
        count = torch.arange(len(chosen), device=p.device)
        root[count, ..., start + count] += chosen.squeeze(-1).sqrt()
        return root

    def subset_root(self, f: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
        """Roots of the `classes` most probable classes and of one that is drawn among the others, `(K, ..., C)`.

        Lambda = sum_c p_c s_c s_c^T with s_c = e_c - p. The most probable classes T enter as they are. The rest is
        q E[s_c s_c^T], q = 1 - p(T), for c drawn with p_c / q outside T: one draw of it, times q, is unbiased.
        Without a rest (`classes` = C) the sum is exact.
        """
        p = torch.softmax(f.detach(), -1)
        share, index = p.topk(min(classes, p.shape[-1]), -1)
        if index.shape[-1] < p.shape[-1]:
            others = p.scatter(-1, index, 0.0)
            rest = others.sum(-1, keepdim=True)
            # where nothing is left its weight is zero, whatever is drawn
            flat = torch.where(rest > 0, others, 1.0).flatten(0, -2)
            drawn = torch.multinomial(flat, 1, generator=generator).view(rest.shape)
            share, index = torch.cat([share, rest], -1), torch.cat([index, drawn], -1)
        root = -share.sqrt().unsqueeze(-1) * p.unsqueeze(-2)
        root.scatter_add_(-1, index.unsqueeze(-1), share.sqrt().unsqueeze(-1))
        return root.movedim(-2, 0)

    def hessian_diagonal(self, f: Tensor) -> Tensor:
        p = torch.softmax(f.detach(), -1)
        return p * (1.0 - p)

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        if not isinstance(latent, GaussianLatent) or self.link == "mc":
            return self.mixture(*latent.draws(noise))
        if self.link == "probit":
            return TorchCategorical(logits=scaled_mean(latent))
        if self.link == "mean_field":
            return TorchCategorical(logits=_pairwise(latent))
        return TorchCategorical(logits=self._log_concentration(latent))

    def mixture(self, weights: Tensor, draws: Tensor) -> Distribution:
        # in log space, so that a class of tiny probability keeps its log-probability
        shares = weights.log().view(-1, *(1,) * (draws.dim() - 1)) + torch.log_softmax(draws, -1)
        return TorchCategorical(logits=torch.logsumexp(shares, 0))

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """Total entropy, expected entropy and mutual information, `(B,)` nats (per position, where there are any).

        With the bridge all three are closed forms of its Dirichlet. With the probit link there is none, so both
        parts come from draws; `total` is then the entropy of the draws' mean, not of the probit probabilities.
        """
        if isinstance(latent, GaussianLatent) and self.link == "bridge":
            alpha = self._log_concentration(latent).double().clamp(max=500.0).exp()
            strength = alpha.sum(-1, keepdim=True)
            share = alpha / strength
            aleatoric = -(share * (torch.digamma(alpha + 1.0) - torch.digamma(strength + 1.0))).sum(-1)
            return Split(
                aleatoric.to(latent.mean.dtype), (entropy(share) - aleatoric).clamp(min=0).to(latent.mean.dtype)
            )
        aleatoric, mean = latent.mean.new_zeros(()), latent.mean.new_zeros(())
        for weights, draws in _some_draws(latent, noise):
            probs = torch.softmax(draws, -1)
            aleatoric = aleatoric + torch.einsum("s,s...->...", weights, entropy(probs))
            mean = mean + torch.einsum("s,s...->...", weights, probs)
        return Split(aleatoric, (entropy(mean) - aleatoric).clamp(min=0))

    def _log_concentration(self, latent: GaussianLatent) -> Tensor:
        """log alpha `(B, C)` of the Dirichlet matched to the logits in softmax coordinates."""
        mean, variance = _zero_sum(latent)
        classes = mean.shape[-1]
        variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
        if self.normalize:
            # only ever down: scaling a narrow Gaussian up would make it as good as certain
            factor = (variance.mean(-1, keepdim=True) / math.sqrt(classes / 2.0)).clamp(min=1.0)
            mean, variance = mean / factor.sqrt(), variance / factor
        growth = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2.0 * math.log(classes)
        constant = math.log(1.0 - 2.0 / classes) if classes > 2 else -math.inf
        return torch.logaddexp(growth, torch.full_like(growth, constant)) - variance.log()

    def config(self) -> dict[str, object]:
        return {
            "link": self.link,
            "normalize": self.normalize,
            "ignore_index": self.ignore_index,
            "class_axis": self.class_axis,
        }


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats over the last axis, with 0 log 0 = 0."""
    return -torch.special.xlogy(probs, probs).sum(-1)


def _some_draws(latent: Latent, noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws of f with their weights; a few at a time where they are independent and all together would be many."""
    count = len(noise)
    if not isinstance(latent, GaussianLatent) or latent.covariance is not None:
        yield latent.draws(noise)
        return
    for rows in noise.split(max(1, DRAWS // max(1, latent.mean.numel()))):
        weights, draws = latent.draws(rows)
        yield weights * (len(rows) / count), draws


def _pairwise(latent: GaussianLatent) -> Tensor:
    """Logits `(B, C)` of 1 / sum_i exp(-(f_k - f_i) / sqrt(1 + pi/8 var(f_k - f_i))), still to be normalised."""
    spread = latent.variance.unsqueeze(-1) + latent.variance.unsqueeze(-2)
    if latent.covariance is not None:
        spread = spread - 2.0 * latent.covariance
    gaps = latent.mean.unsqueeze(-1) - latent.mean.unsqueeze(-2)
    return -torch.logsumexp(-gaps / torch.sqrt(1.0 + torch.pi / 8.0 * spread.clamp(min=0)), -1)


def _zero_sum(latent: GaussianLatent) -> tuple[Tensor, Tensor]:
    """Moments of the centred logits f - mean(f), where the bridge lives.

    The softmax depends on these alone, so their law is the marginal one. Conditioning on sum_c f_c = 0, as the paper
    does, would let a common shift that is correlated with the differences change the answer.
    """
    classes = latent.mean.shape[-1]
    mean = latent.mean - latent.mean.mean(-1, keepdim=True)
    along = latent.variance if latent.covariance is None else latent.covariance.sum(-1)
    variance = latent.variance - 2.0 / classes * along + along.sum(-1, keepdim=True) / classes**2
    return mean, variance


def _refuse_probabilities(f: Tensor) -> None:
    """Raise for outputs that are a softmax already: taken for logits they make every prediction nearly uniform."""
    some = f.reshape(-1, f.shape[-1])[:PROBED]
    # the first comparison ends it for nearly all logits
    if some.numel() and float(some.min()) >= 0.0 and bool(((some.sum(-1) - 1).abs() < 1e-5).all()):
        raise ArgumentError(
            "the outputs are class probabilities: none is negative and each row sums to 1; the categorical likelihood "
            "takes logits. Remove the final softmax, or let the network end in its logarithm (log_softmax)"
        )
