"""Covariances S_k of the weights of K outputs: what a head learns, and the three numbers its bound asks for.

Every class answers `quad` (phi^T S_k phi), `trace` and `logdet`; diagonals of factors are exponentials, so that every
value of the parameters is a covariance. No class ever broadcasts a `(d, d)` factor over the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from bayesdl import linalg
from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError

LARGEST = 1 << 26  # scalars of a (K, d, d) factor that are held without asking
ALTERNATIONS = 100  # of the two halves of a shared covariance; few are needed
DEFAULT_MEMORY = 256 << 20  # bytes of one (K, B, d) product
BLOCK = 128  # columns of a triangular factor multiplied at once


class Covariance(nn.Module, ABC):
    """S_k for k < K, each `(d, d)`.

    Args:
        features: d, the constant of a bias included.
        outputs: K.
        scale: standard deviation of every weight at the start.
        rank: of the low-rank part, where there is one.
        memory: bytes that the largest product may take; more outputs are taken in chunks.
    """

    name: ClassVar[str]

    def __init__(self, features: int, outputs: int, *, scale: float, rank: int, memory: int) -> None:
        super().__init__()
        if features < 1 or outputs < 1:
            raise ArgumentError(f"{features} features and {outputs} outputs; expected at least one of each")
        if not scale > 0:
            raise ArgumentError(f"an initial standard deviation of {scale} was given; expected a positive number")
        self.features, self.outputs, self.rank, self.memory = features, outputs, rank, memory
        self.create(math.log(scale))

    @abstractmethod
    def create(self, log_scale: float) -> None:
        """Make the parameters, with every standard deviation at exp(log_scale)."""

    @abstractmethod
    def quad(self, phi: Tensor) -> Tensor:
        """phi^T S_k phi for `(B, d)`: `(B, K)`."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """`(K,)`."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Marginal variances of the weights, `(K, d)`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`(K, d, d)`; for tests and small problems."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Deviations of the weights `(S, K, d)` from standard normal noise `(S, K, width)`."""

    @abstractmethod
    def set_precision(self, precision: Tensor) -> None:
        """Take S_k = P_k^-1 for `(K, d, d)`, or the closest member of the family."""

    @property
    def width(self) -> int:
        """Base noise per output that `sample` takes."""
        return self.features

    def trace(self) -> Tensor:
        """`(K,)`."""
        return self.diagonal().sum(-1)

    def chunks(self, batch: int) -> int:
        """Outputs whose `(k, batch, d)` product stays within the memory budget."""
        if torch.compiler.is_compiling():  # a graph for any batch has no chunks
            return self.outputs
        return max(1, self.memory // max(1, 4 * batch * self.features))

    def _check(self, precision: Tensor) -> Tensor:
        expected = (self.outputs, self.features, self.features)
        if precision.shape != expected:
            raise ShapeError(f"a precision of shape {tuple(precision.shape)} was given; expected {expected}")
        return precision.double()


@final
class Diagonal(Covariance):
    """S_k = diag(c_k)."""

    name: ClassVar[str] = "diag"

    def create(self, log_scale: float) -> None:
        self.log_deviation = nn.Parameter(torch.full((self.outputs, self.features), log_scale))

    def diagonal(self) -> Tensor:
        return (2.0 * self.log_deviation).exp()

    def quad(self, phi: Tensor) -> Tensor:
        return phi.square() @ self.diagonal().mT

    def logdet(self) -> Tensor:
        return 2.0 * self.log_deviation.sum(-1)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal())

    def sample(self, noise: Tensor) -> Tensor:
        return noise * self.log_deviation.exp()

    @torch.no_grad()
    def set_precision(self, precision: Tensor) -> None:
        """The reciprocal of the diagonal of P: the best factorised Gaussian in KL(q || p)."""
        self.log_deviation.copy_(-0.5 * self._check(precision).diagonal(dim1=-2, dim2=-1).log())


@final
class LowRank(Covariance):
    """S_k = diag(c_k) + F_k F_k^T with F_k `(d, rank)`."""

    name: ClassVar[str] = "lowrank"

    def create(self, log_scale: float) -> None:
        if not 1 <= self.rank:
            raise ArgumentError(f"rank={self.rank}; a low-rank covariance needs at least 1")
        _check_size(self.outputs * self.features * self.rank, self.name)
        self.log_deviation = nn.Parameter(torch.full((self.outputs, self.features), log_scale))
        fixed = torch.Generator().manual_seed(0)  # columns that start equal would stay equal
        start = 1e-3 * torch.randn(self.outputs, self.features, self.rank, generator=fixed)
        self.factor = nn.Parameter(start)

    @property
    def width(self) -> int:
        return self.features + self.rank

    def diagonal(self) -> Tensor:
        return (2.0 * self.log_deviation).exp() + self.factor.square().sum(-1)

    def quad(self, phi: Tensor) -> Tensor:
        # one GEMM for all outputs and columns
        spread = (phi @ self.factor.permute(1, 0, 2).reshape(self.features, -1)).unflatten(-1, (self.outputs, -1))
        return phi.square() @ (2.0 * self.log_deviation).exp().mT + spread.square().sum(-1)

    def logdet(self) -> Tensor:
        scaled = self.factor * (-self.log_deviation).exp().unsqueeze(-1)
        inner = torch.eye(self.rank, dtype=scaled.dtype, device=scaled.device) + scaled.mT @ scaled
        factor = linalg.cholesky(inner, "low-rank covariance")
        return 2.0 * (self.log_deviation.sum(-1) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    def dense(self) -> Tensor:
        return torch.diag_embed((2.0 * self.log_deviation).exp()) + self.factor @ self.factor.mT

    def sample(self, noise: Tensor) -> Tensor:
        own, common = noise[..., : self.features], noise[..., self.features :]
        return own * self.log_deviation.exp() + torch.einsum("kdr,skr->skd", self.factor, common)

    @torch.no_grad()
    def set_precision(self, precision: Tensor) -> None:
        """The leading eigenvectors of P^-1, and the rest of its diagonal."""
        covariance = torch.linalg.inv(self._check(precision))
        values, vectors = torch.linalg.eigh(covariance)
        rank = min(self.rank, self.features)
        middle = (
            values[:, : self.features - rank].mean(-1, keepdim=True) if rank < self.features else 0.0 * values[:, :1]
        )
        factor = vectors[..., -rank:] * (values[:, -rank:] - middle).clamp(min=0).sqrt().unsqueeze(-2)
        rest = covariance.diagonal(dim1=-2, dim2=-1) - factor.square().sum(-1)
        self.log_deviation.copy_(0.5 * rest.clamp(min=1e-12).log())
        self.factor.zero_()
        self.factor[..., :rank] = factor.to(self.factor)


@final
class Full(Covariance):
    """S_k = L_k L_k^T, L_k lower triangular."""

    name: ClassVar[str] = "full"

    def create(self, log_scale: float) -> None:
        _check_size(self.outputs * self.features**2, self.name)
        self.log_diagonal = nn.Parameter(torch.full((self.outputs, self.features), log_scale))
        self.lower = nn.Parameter(torch.zeros(self.outputs, self.features, self.features))

    def factor(self) -> Tensor:
        """L, `(K, d, d)`."""
        return _lower_triangular(self.lower, self.log_diagonal)

    def quad(self, phi: Tensor) -> Tensor:
        step = self.chunks(phi.shape[0])
        parts = zip(self.lower.split(step), self.log_diagonal.split(step), strict=True)
        return torch.cat([_squared_products(phi, *part) for part in parts]).mT

    def diagonal(self) -> Tensor:
        return self.factor().square().sum(-1)

    def logdet(self) -> Tensor:
        return 2.0 * self.log_diagonal.sum(-1)

    def dense(self) -> Tensor:
        factor = self.factor()
        return factor @ factor.mT

    def sample(self, noise: Tensor) -> Tensor:
        return torch.einsum("kij,skj->ski", self.factor(), noise)

    @torch.no_grad()
    def set_precision(self, precision: Tensor) -> None:
        covariance = torch.cholesky_inverse(linalg.cholesky(self._check(precision), "precision of the last layer"))
        factor = linalg.cholesky(covariance, "covariance of the last layer")
        self.log_diagonal.copy_(factor.diagonal(dim1=-2, dim2=-1).log())
        self.lower.copy_(factor.tril(-1))


@final
class Shared(Covariance):
    """S_k = v_k L L^T: one factor for all outputs, one scale each; mean of log v_k is not fixed."""

    name: ClassVar[str] = "shared"

    def create(self, log_scale: float) -> None:
        _check_size(self.features**2, self.name)
        self.log_diagonal = nn.Parameter(torch.full((self.features,), log_scale))
        self.lower = nn.Parameter(torch.zeros(self.features, self.features))
        self.log_variance = nn.Parameter(torch.zeros(self.outputs))

    def factor(self) -> Tensor:
        """L, `(d, d)`."""
        return _lower_triangular(self.lower, self.log_diagonal)

    def quad(self, phi: Tensor) -> Tensor:
        common = _squared_products(phi, self.lower.unsqueeze(0), self.log_diagonal.unsqueeze(0))
        return common.mT * self.log_variance.exp()

    def diagonal(self) -> Tensor:
        return self.log_variance.exp().unsqueeze(-1) * self.factor().square().sum(-1)

    def logdet(self) -> Tensor:
        return self.features * self.log_variance + 2.0 * self.log_diagonal.sum()

    def dense(self) -> Tensor:
        factor = self.factor()
        return self.log_variance.exp()[:, None, None] * (factor @ factor.mT)

    def sample(self, noise: Tensor) -> Tensor:
        return (noise @ self.factor().mT) * (0.5 * self.log_variance).exp().unsqueeze(-1)

    @torch.no_grad()
    def set_precision(self, precision: Tensor) -> None:
        """The member closest in KL(q || N(mu, P_k^-1)), by alternating its two stationary points.

        Given v the best L has (L L^T)^-1 = mean_k v_k P_k, given L the best v_k is d / tr(P_k L L^T).
        """
        wanted = self._check(precision)
        variance = wanted.new_ones(self.outputs)
        for _ in range(ALTERNATIONS):
            mean = torch.einsum("k,kij->ij", variance, wanted) / self.outputs
            covariance = torch.cholesky_inverse(linalg.cholesky(mean, "mean precision of the last layer"))
            before, variance = variance, self.features / torch.einsum("kij,ji->k", wanted, covariance)
            if bool(((variance / before).log().abs() < 1e-9).all()):
                break
        root = linalg.cholesky(covariance, "covariance of the last layer")
        self.log_diagonal.copy_(root.diagonal().log())
        self.lower.copy_(root.tril(-1))
        self.log_variance.copy_(variance.log())


@final
class Precision(Covariance):
    """S_k = (L_k L_k^T)^-1: the natural form for conjugate updates; training in it costs K d^3 more a step."""

    name: ClassVar[str] = "precision"

    def create(self, log_scale: float) -> None:
        _check_size(self.outputs * self.features**2, self.name)
        self.log_diagonal = nn.Parameter(torch.full((self.outputs, self.features), -log_scale))
        self.lower = nn.Parameter(torch.zeros(self.outputs, self.features, self.features))

    def factor(self) -> Tensor:
        """L of the precision, `(K, d, d)`."""
        return _lower_triangular(self.lower, self.log_diagonal)

    def quad(self, phi: Tensor) -> Tensor:
        columns = phi.mT
        pieces = [
            torch.linalg.solve_triangular(part, columns.expand(len(part), -1, -1), upper=False).square().sum(-2)
            for part in self.factor().split(self.chunks(phi.shape[0]))
        ]
        return torch.cat(pieces).mT

    def _inverse_factor(self) -> Tensor:
        eye = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        return torch.linalg.solve_triangular(self.factor(), eye.expand(self.outputs, -1, -1), upper=False)

    def diagonal(self) -> Tensor:
        return self._inverse_factor().square().sum(-2)

    def logdet(self) -> Tensor:
        return -2.0 * self.log_diagonal.sum(-1)

    def dense(self) -> Tensor:
        inverse = self._inverse_factor()
        return inverse.mT @ inverse

    def sample(self, noise: Tensor) -> Tensor:
        upper = self.factor().mT
        return torch.linalg.solve_triangular(upper, noise.permute(1, 2, 0), upper=True).permute(2, 0, 1)

    @torch.no_grad()
    def set_precision(self, precision: Tensor) -> None:
        factor = linalg.cholesky(self._check(precision), "precision of the last layer")
        self.log_diagonal.copy_(factor.diagonal(dim1=-2, dim2=-1).log())
        self.lower.copy_(factor.tril(-1))


COVARIANCES: dict[str, type[Covariance]] = {c.name: c for c in (Diagonal, LowRank, Full, Shared, Precision)}


def make(
    name: str, features: int, outputs: int, *, scale: float = 0.1, rank: int = 8, memory: int = DEFAULT_MEMORY
) -> Covariance:
    """A covariance by name.

    Raises:
        UnknownNameError: no such name.
        ArgumentError: a factor of more than 2^26 scalars; the message holds its size and the alternatives.
    """
    if name not in COVARIANCES:
        raise UnknownNameError(f"covariance {name!r} is not known; choose one of {sorted(COVARIANCES)}")
    return COVARIANCES[name](features, outputs, scale=scale, rank=rank, memory=memory)


def _lower_triangular(lower: Tensor, log_diagonal: Tensor) -> Tensor:
    """L `(..., d, d)` with exp(log_diagonal) on its diagonal; one pass over the entries."""
    factor = lower.tril(-1)
    factor.diagonal(dim1=-2, dim2=-1).copy_(log_diagonal.exp())
    return factor


def _squared_products(phi: Tensor, lower: Tensor, log_diagonal: Tensor) -> Tensor:
    """|phi_b^T L_k|^2 for `(B, d)` and `(K, d, d)`: `(K, B)`.

    Where nothing is learned, blocks of columns leave the zeros above the diagonal out, and the entries below it are
    read where they lie. Gradients of the blocks would each fill a whole factor.
    """
    if torch.is_grad_enabled() and lower.requires_grad:
        return (phi @ _lower_triangular(lower, log_diagonal)).square().sum(-1)
    width = phi.shape[1]
    count = max(1, round(width / BLOCK))
    total: Tensor | None = None
    for block in range(count):
        start, end = block * width // count, (block + 1) * width // count
        corner = _lower_triangular(lower[:, start:end, start:end], log_diagonal[:, start:end])
        product = phi[:, start:end] @ corner
        if end < width:
            product = torch.baddbmm(product, phi[:, end:].expand(len(lower), -1, -1), lower[:, end:, start:end])
        square = product.square().sum(-1)
        total = square if total is None else total + square
    assert total is not None
    return total


def _check_size(scalars: int, name: str) -> None:
    if scalars > LARGEST:
        raise ArgumentError(
            f'covariance "{name}" holds {scalars:,} numbers here ({4 * scalars / 2**30:.1f} GiB, and three times that '
            'while training with Adam); choose "shared", "lowrank" with a small rank, or "diag"'
        )
