"""Lower bounds of the Laplace evidence from minibatches, through the kernel of the network's tangents.

With V_n V_n^T = Lambda_n, D = diag(prior precision) and the kernel K of all examples and outputs, blocks
K_nm = V_n^T J_n D^-1 J_m^T V_m, Sylvester's identity turns the evidence into

    log p(D) = sum_n log p(y_n | f_n) - 1/2 |theta - mean|_D^2 - 1/2 log|I + K|.

I + K is positive definite, so Fischer's inequality holds for every partition of its rows: log|I + K| <= sum_b
log|I + K_bb|. Hence for N examples cut into batches of M

    log p(D) >= sum_b { sum_(n in b) log p(y_n | f_n) - 1/2 log|I + K_bb| } - 1/2 |theta - mean|_D^2,

and N / M times the brace for one batch drawn at random is an unbiased estimate of that bound, averaged over partitions,
as its gradient is of the bound's gradient (Immer et al. 2023, "Stochastic marginal likelihood gradients using neural
tangent kernels"). Larger batches give tighter bounds; one batch of everything gives the evidence. Cutting the rows by
output (column of V) as well needs blocks of M instead of M C rows, and loosens the bound further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.gram import gram
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, NumericalError
from bayesdl.likelihoods import Gaussian, Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector

__all__ = ["Kernel", "MinibatchEvidence"]


@final
@dataclass(frozen=True, eq=False)
class Kernel:
    """What one batch of M examples says about the evidence, for any prior precision and noise.

    Attributes:
        layout: blocks of the selection.
        grams: V^T J J^T V of every block, `(L, M K, M K)` float64 with examples slower than outputs; by output
            `(L, K, M, M)`. At unit noise where the noise is open. None where `rows` are kept instead.
        rows: V^T J `(M K, P)`, by output `(K, M, P)`, float64, for one precision per parameter.
        log_likelihood: sum over the batch, at unit noise where the noise is open.
        squared_error: `(C,)` where the noise is open, else None.
        count: M.
        num_data: N.
        squares: (theta - mean)^2 in flat order `(P,)`, float64.
    """

    layout: Layout
    grams: Tensor | None
    rows: Tensor | None
    log_likelihood: Tensor
    squared_error: Tensor | None
    count: int
    num_data: int
    squares: Tensor

    def bound(self, precision: Tensor | float, noise: Tensor | float | None = None) -> Tensor:
        """Estimate of the lower bound of log p(D), float64, differentiable in both.

        Args:
            precision: prior precision: a scalar, one per layer, or one per parameter where the rows were kept.
            noise: standard deviation, scalar or `(C,)`, of a Gaussian likelihood that left it open.
        """
        value = torch.as_tensor(precision, dtype=torch.float64, device=self.squares.device)
        scatter = sum(((s * d).sum() for s, d in self._pairs(value)), value.new_zeros(()))
        return (self.num_data / self.count) * self.part(value, noise) - 0.5 * scatter

    def _pairs(self, precision: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.layout.split(self.squares), self.layout.shifts(precision, self.squares), strict=True))

    def part(self, precision: Tensor, noise: Tensor | float | None = None) -> Tensor:
        """sum_n log p(y_n | f_n) - 1/2 log|I + K_bb| of this batch alone."""
        self.layout.shifts(precision, self.squares)  # refuses another size, or values that are not positive
        level = self._level(noise)
        kernel = self._kernel(precision)
        if level is not None and kernel.dim() == 3:  # one for each output
            kernel = kernel / level.square()[:, None, None]
        elif level is not None:
            spread = level.repeat(self.count)
            kernel = kernel / spread / spread.unsqueeze(1)
        one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        factor, info = torch.linalg.cholesky_ex(one + kernel)
        if bool(info.any()):
            raise NumericalError(
                "I + K is not positive definite: NaN or infinity in the tangents, the prior or the noise"
            )
        logdet = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        return self._likelihood(level) - 0.5 * logdet

    def _kernel(self, precision: Tensor) -> Tensor:
        if self.rows is not None:
            sizes = [(b.groups, b.rows, b.columns) for b in self.layout.blocks]
            shifts = self.layout.shifts(precision, self.squares)
            scaled = torch.cat([s.expand(size).flatten() for s, size in zip(shifts, sizes, strict=True)])
            return (self.rows / scaled) @ self.rows.mT
        if self.grams is None or precision.numel() not in (1, len(self.grams)):
            raise ArgumentError(
                f"{precision.numel()} prior precisions were given; one per parameter needs MinibatchEvidence(rows=True)"
            )
        inverse = 1.0 / precision.reshape(-1)
        return torch.tensordot(inverse.expand(len(self.grams)), self.grams, 1)

    def _level(self, noise: Tensor | float | None) -> Tensor | None:
        if self.squared_error is None:
            if noise is not None:
                raise ArgumentError("noise was given, but this likelihood has none that is open")
            return None
        if noise is None:
            raise ArgumentError("the Gaussian likelihood left its noise open: pass noise=")
        level = torch.as_tensor(noise, dtype=torch.float64, device=self.squares.device)
        return level.expand_as(self.squared_error)

    def _likelihood(self, level: Tensor | None) -> Tensor:
        if level is None or self.squared_error is None:
            return self.log_likelihood
        unit = self.log_likelihood + 0.5 * self.squared_error.sum()
        return unit - 0.5 * (self.squared_error / level.square()).sum() - self.count * level.log().sum()


@final
class MinibatchEvidence:
    """Stochastic evidence of a network at its present weights: one `Kernel` a minibatch, nothing kept between them.

        evidence = bdl.MinibatchEvidence(net, "categorical", example=x, num_data=50_000)
        loss = -evidence.kernel(x, y).bound(log_precision.exp())      # differentiable in the precision and the noise

    Args:
        model: never written to; after training on, make another one.
        likelihood: name or object.
        example: one batch of inputs.
        num_data: N of the whole data set.
        select: Bayesian parameters.
        by_output: cut the kernel by output as well.
        rows: keep V^T J whole, `M K P` numbers, as one prior precision per parameter needs.
        mean: prior mean, a number.
        batch: batch adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        example: Any,
        num_data: int,
        select: Selector = "all",
        by_output: bool = False,
        rows: bool = False,
        mean: float = 0.0,
        batch: str | BatchAdapter | None = None,
    ) -> None:
        if num_data < 1:
            raise ArgumentError(f"num_data={num_data}; expected the number of training examples")
        self.network = Network(model, select=select, batch=batch, example=example)
        self.layout = plan(self.network, example)
        self.num_data, self.by_output, self.rows = num_data, by_output, rows
        family = resolve(likelihood)
        self._open = isinstance(family, Gaussian) and family.noise is None
        self._likelihood = family.with_noise(1.0) if isinstance(family, Gaussian) and self._open else family
        weights = {name: value.detach() for name, value in self.network.parameters.items()}
        self._squares = (self.layout.flatten(weights).double() - mean).square()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the blocks, in the order that a per-layer prior precision follows."""
        return tuple(block.name for block in self.layout.blocks)

    def kernel(self, inputs: Any, target: Any) -> Kernel:
        """The kernel of one batch: a forward pass and a backward pass with K cotangents."""
        seen: dict[str, Tensor] = {}

        def cotangents(f: Tensor) -> Tensor:
            seen["f"] = self._likelihood.check_outputs(f)
            return self._likelihood.hessian_root(seen["f"])

        dtype = torch.promote_types(self.network.dtype or torch.float32, torch.float32)
        _, factors = layer_factors(self.network, self.layout, inputs, cotangents, dtype)
        f = seen["f"]
        y = self._likelihood.check_targets(f, torch.as_tensor(target))
        with torch.no_grad():
            log_likelihood = self._likelihood.log_prob(f, y).double().sum()
            error = (y - f).double().square().sum(0) if self._open else None
            grams = None if self.rows else self._grams(factors)
            rows = self._rows(factors) if self.rows else None
        return Kernel(self.layout, grams, rows, log_likelihood, error, len(f), self.num_data, self._squares)

    def _grams(self, factors: Sequence[Factor]) -> Tensor:
        if not self.by_output:
            return torch.stack([gram([factor]) for factor in factors])
        count = factors[0].g.shape[1]
        return torch.stack([torch.stack([gram([_column(factor, k)]) for k in range(count)]) for factor in factors])

    def _rows(self, factors: Sequence[Factor]) -> Tensor:
        rows = torch.cat([factor.jacobian() for factor in factors], -1).double()  # (M, K, P)
        return rows.transpose(0, 1) if self.by_output else rows.flatten(0, 1)


def _column(factor: Factor, k: int) -> Factor:
    return replace(factor, g=factor.g[:, k : k + 1])
