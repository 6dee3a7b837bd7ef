"""Gaussian posterior over the selected weights: N(theta_MAP, P^-1), P = (H / noise^2 + diag(prior precision)) / T."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.batch import batch_size, flatten_tensors, index_batch
from bayesdl.curvature.chunking import chunk_size
from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.registry import empty
from bayesdl.curvature.structure import Structure, weighted_curvature
from bayesdl.errors import ArgumentError, UnsupportedError, check_finite
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, check_positions, frozen, standard_normal
from bayesdl.posteriors.checks import check_gaussian
from bayesdl.posteriors.linear import Jacobians, restored, tangent
from bayesdl.priors.posterior import PosteriorPrior

# beyond this many outputs only marginal variances are computed, unless asked for
JOINT_OUTPUTS = 128
DEFAULT_SAMPLES = 32


@final
@dataclass(frozen=True, eq=False)
class GaussianPosterior(Posterior):
    """A Laplace posterior.

    Attributes:
        curvature: H; at unit noise where `noise` is set.
        parts: curvature of each output alone at unit noise, where several noise scales are open; else empty.
        precision: prior precision: scalar, per block, or per parameter.
        prior_mean: scalar, or flat `(P,)`.
        noise: standard deviations `(C,)` that still scale H; None where H contains the likelihood's noise.
        temperature: T of the posterior p^(1/T), which multiplies the covariance by T; 1 is Bayes.
        num_data, log_likelihood, squared_error: what the evidence needs (see `Fit`).
        fisher: "ggn", "mc", "empirical" or "hessian".
        predictive: "linearized" (f_MAP + J (theta - theta_MAP)) or "samples" (weights drawn, network run).
        memory: bytes that may live at once while predicting; None: chosen.
        earlier: curvature of earlier fits whose posterior is the prior, at their noise; None without one.
    """

    curvature: Structure
    parts: tuple[Structure, ...]
    precision: Tensor
    prior_mean: Tensor
    noise: Tensor | None
    temperature: float
    num_data: int
    log_likelihood: float
    squared_error: Tensor | None
    fisher: str
    predictive: str
    memory: int | None = None
    earlier: Structure | None = None

    kind: ClassVar[str] = "gaussian"

    @property
    def layout(self) -> Layout:
        """Blocks of the selection."""
        return self.curvature.layout

    @cached_property
    def structure(self) -> Structure:
        """H at the present ratio of the outputs' noise scales."""
        return self.structure_at(self.noise)

    @property
    def scale(self) -> Tensor:
        """What multiplies `structure` in the posterior precision."""
        return self.scale_at(self.noise)

    @property
    def shift(self) -> Tensor:
        """What is added to the diagonal of the posterior precision: the tempered prior precision."""
        return self.precision / self.temperature

    @property
    def noise_power(self) -> int:
        """H scales with the common noise to minus this power."""
        return 4 if self.fisher == "empirical" else 2  # the empirical score carries the noise variance twice

    def structure_at(self, noise: Tensor | None) -> Structure:
        """H for other noise scales `(C,)`."""
        if self.earlier is not None:  # only where nothing is left open
            return self.curvature + self.earlier
        if not self.parts or noise is None:
            return self.curvature
        return weighted_curvature(self.parts, noise.expand(len(self.parts)).square().reciprocal())

    def scale_at(self, noise: Tensor | None) -> Tensor:
        """The scale for other noise scales."""
        heat = self.precision.new_tensor(1.0 / self.temperature)
        if noise is None or self.parts:
            return heat
        return heat * noise.reshape(-1)[0].to(heat) ** -self.noise_power

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Any:
        if self.predictive == "linearized":
            return None
        return self._weights(network, num_samples or DEFAULT_SAMPLES, generator)

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        if self.predictive == "samples":
            call = network.prepare(inputs)
            outputs = torch.stack([network(call, weights) for weights in state])
            return SampleLatent(outputs, outputs.new_full((len(outputs),), 1.0 / len(outputs)))
        pieces = list(self._linearized(network, inputs))
        return GaussianLatent.cat(pieces) if len(pieces) > 1 else pieces[0]

    def linearize(self, network: Network, inputs: Any) -> tuple[Tensor, list[Factor]]:
        """Outputs `(B, C)` and the Jacobian's factors, in at least float32; nothing that a prior changes.

        Both are differentiable in inputs that require it.
        """
        network.check_fresh()
        if self.layout.positions:
            raise UnsupportedError(
                "a joint covariance over several inputs is for outputs of shape (B, C), and these have positions; "
                "bayes(x) gives the covariance at each of them"
            )
        graph = wants_gradient(inputs)
        output, factors = layer_factors(network, self.layout, inputs, identity_cotangents, self._dtype, graph)
        return output.to(self._dtype), factors

    def jacobians(self, network: Network, inputs: Any) -> Jacobians:
        """The outputs' Jacobians, positions as examples of their own, in at least float32."""
        network.check_fresh()
        graph = wants_gradient(inputs)
        return Jacobians(network, self.curvature, self._dtype, JOINT_OUTPUTS, self.memory, graph)

    def covariance(self, network: Network, first: Any, second: Any, state: Any) -> tuple[Tensor, Tensor]:
        """J P^-1 J'^T between all examples, in pieces: no Jacobian of a whole batch is formed."""
        if self.predictive == "samples":
            return super().covariance(network, first, second, state)
        rows = self._pieces(network, first)
        columns = rows if second is None else self._pieces(network, second)
        with torch.set_grad_enabled(any(wants_gradient(piece) for piece in (*rows, *columns))):
            means, strips = [], []
            for i, piece in enumerate(rows):
                mean, factors = self.linearize(network, piece)
                check_positions(mean)
                means.append(mean)
                strip = []
                for j, other in enumerate(columns[: i + 1] if second is None else columns):
                    # factors of other pieces are had again: together they would not fit
                    theirs = factors if second is None and i == j else self.linearize(network, other)[1]
                    strip.append(self.structure.cross(factors, theirs, self.scale, self.shift))
                strips.append(strip)
            found = _symmetric(strips) if second is None else torch.cat([torch.cat(s, 2) for s in strips])
        check_finite(found, "the posterior covariances of the outputs")
        return torch.cat(means), found

    def _pieces(self, network: Network, inputs: Any) -> list[Any]:
        """Prepared inputs, few enough at a time for their factors to fit."""
        call = network.prepare(inputs)
        size = max(1, batch_size(call)) if flatten_tensors(call)[0] else 1
        step = self.chunk_size(network)
        if step >= size:
            return [call]
        return [index_batch(call, slice(start, min(start + step, size))) for start in range(0, size, step)]

    def _linearized(self, network: Network, inputs: Any) -> Iterator[GaussianLatent]:
        """Beliefs over the outputs, a few examples at a time."""
        call = network.prepare(inputs)
        tensors, _ = flatten_tensors(call)
        jacobians = self.jacobians(network, call)
        size = max(1, batch_size(call)) if tensors else 1  # an empty batch goes on, to the network's own error
        start, step = 0, self.chunk_size(network)
        while start < size:
            piece = index_batch(call, slice(start, min(start + step, size))) if start or step < size else call
            start += step
            with torch.set_grad_enabled(jacobians.graph):
                latent, shared = self._of_piece(jacobians, piece)
            yield latent
            if shared and self.layout.outputs > JOINT_OUTPUTS:
                step = self.chunk_size(network, 1)

    def _of_piece(self, jacobians: Jacobians, inputs: Any) -> tuple[GaussianLatent, bool]:
        """Belief over the outputs of examples that go through the network together; whether they share cotangents."""
        parts, found, shared = [], [], True
        for part in jacobians.narrow_parts(inputs):
            prepared = self.structure.prepared(part.factors)
            if part.columns is None:
                latent = self.latent(part.mean, prepared, self.scale, self.shift)
            else:
                variance = self.structure.marginal_prepared(prepared, self.scale, self.shift)
                check_finite(variance, "the posterior variances of the outputs")
                latent = GaussianLatent(part.mean[:, part.columns], variance)
            shared &= all(isinstance(f, LinearFactor) and (f.shared or f.unit) for f in part.factors)
            parts.append(replace(part, factors=[]))
            found.append(latent)
        covariances = [latent.covariance for latent in found if latent.covariance is not None]
        whole = GaussianLatent(
            restored([latent.mean for latent in found], parts),
            restored([latent.variance for latent in found], parts),
            restored(covariances, parts) if covariances else None,
        )
        return whole, shared

    def chunk_size(self, network: Network, width: int | None = None) -> int:
        """Examples that are predicted at once."""
        structure, memory = self.curvature, self.memory
        return chunk_size(self.layout, structure, self._dtype, width=width, memory=memory, device=network.device)

    def latent(self, mean: Tensor, prepared: Sequence[Factor], scale: Tensor, shift: Tensor) -> GaussianLatent:
        """Belief over outputs `(B, C)` from `structure.prepared` factors of their Jacobian."""
        if mean.shape[-1] > JOINT_OUTPUTS:
            variance = self.structure.marginal_prepared(prepared, scale, shift)
            check_finite(variance, "the posterior variances of the outputs")
            return GaussianLatent(mean, variance)
        return _belief(mean, self.structure.quad_prepared(prepared, scale, shift))

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        """Functions of weights drawn from the posterior: linearised at the mode, or the network itself."""
        offsets = self._offsets(n, generator)
        if self.predictive == "samples":
            return [frozen(network, self._shifted(network, offset)) for offset in offsets]
        return [self._tangent(network, offset) for offset in offsets]

    def _tangent(self, network: Network, offset: Tensor) -> Function:
        """x -> f(x) + J(x) delta: one Jacobian-vector product a call.

        Where the network holds an operation without forward mode (fused attention), the product is taken from the
        layer factors, at the cost of a predictive covariance.
        """
        flat = offset.clone()
        forward_mode = True

        def function(inputs: Any) -> Tensor:
            nonlocal forward_mode
            if forward_mode:
                try:
                    return tangent(network, self.layout.to_dict(flat), inputs)
                except RuntimeError:  # whatever is wrong with the inputs is raised again below
                    pass
            parts, found = [], []
            for part in self.jacobians(network, inputs).parts(inputs):
                offsets = self.layout.split(flat.to(part.mean))
                slopes = [f.dot(d) for f, d in zip(part.factors, offsets, strict=True)]
                found.append(part.mean + torch.stack(slopes).sum(0))
                parts.append(replace(part, factors=[]))
            forward_mode = False
            return restored(found, parts)

        return function

    @property
    def forward_passes(self) -> float:
        if self.predictive == "samples":
            return float(DEFAULT_SAMPLES)
        # behind the last layer there is nothing to propagate back through
        return 1.0 if self.layout.activations <= self.layout.outputs else 1.0 + self.layout.outputs

    @property
    def over_weights(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        named = {f"curvature.{k}": v for k, v in self.curvature.tensors().items()} if not self.parts else {}
        for c, part in enumerate(self.parts):
            named |= {f"parts.{c}.{k}": v for k, v in part.tensors().items()}
        named |= {"precision": self.precision, "prior_mean": self.prior_mean}
        if self.noise is not None:
            named["noise"] = self.noise
        if self.earlier is not None:
            named |= {f"earlier.{k}": v for k, v in self.earlier.tensors().items()}
        if self.squared_error is not None:
            named["squared_error"] = self.squared_error
        return named

    def config(self) -> dict[str, Any]:
        recipe = self.curvature.recipe  # patterns as pairs: their order counts, and JSON objects promise none
        return {
            "structure": recipe if isinstance(recipe, str) else [list(pair) for pair in recipe.items()],
            "options": self.curvature.options,
            "layout": self.layout.to_json(),
            "parts": len(self.parts),
            "temperature": self.temperature,
            "num_data": self.num_data,
            "log_likelihood": self.log_likelihood,
            "fisher": self.fisher,
            "predictive": self.predictive,
            "memory": self.memory,
            "earlier": self.earlier is not None,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        layout = Layout.from_json(config["layout"])
        recipe = config["structure"] if isinstance(config["structure"], str) else dict(config["structure"])

        def structure(prefix: str) -> Structure:
            inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            shell = empty(recipe, layout, torch.float32, torch.device("meta"))
            return shell.with_options(config.get("options", {})).with_tensors(inner)  # absent from older files

        parts = tuple(structure(f"parts.{c}.") for c in range(int(config["parts"])))
        total = structure("curvature.") if not parts else _sum(parts)
        return cls(
            total,
            parts,
            tensors["precision"],
            tensors["prior_mean"],
            tensors.get("noise"),
            float(config["temperature"]),
            int(config["num_data"]),
            float(config["log_likelihood"]),
            tensors.get("squared_error"),
            str(config["fisher"]),
            str(config["predictive"]),
            config.get("memory"),  # absent from older files
            structure("earlier.") if config.get("earlier") else None,
        )

    def check(self, network: Network) -> None:
        check_gaussian(self, network)

    def as_prior(self, network: Network) -> PosteriorPrior:
        """This posterior as the prior of another fit, around the network's weights."""
        values = {name: value.detach() for name, value in network.parameters.items()}
        mean = self.layout.flatten(values).to(self.precision)
        return PosteriorPrior(self.structure.scaled(self.scale), self.shift, mean)

    def with_prior(self, precision: Tensor, noise: Tensor | None = None) -> GaussianPosterior:
        """The same curvature under another prior precision and noise.

        Raises:
            UnsupportedError: the prior is an earlier posterior, which stays as it is.
        """
        if self.earlier is not None:
            raise UnsupportedError(
                "the prior of this model is the posterior of an earlier fit, which no rule may change; tune the model "
                "of the first fit instead"
            )
        return replace(self, precision=precision.detach(), noise=self.noise if noise is None else noise.detach())

    @property
    def _dtype(self) -> torch.dtype:
        return next(v.dtype for k, v in self.curvature.tensors().items() if not k.startswith("rows"))

    def _offsets(self, n: int, generator: torch.Generator | None) -> Tensor:
        if n < 1:
            raise ArgumentError(f"{n} draws were asked for; expected at least 1")
        noise = standard_normal((n, self.layout.numel), self.precision.to(self._dtype), generator)
        return self.layout.without_padding(self.structure.sample(noise, self.scale, self.shift))

    def _weights(self, network: Network, n: int, generator: torch.Generator | None) -> list[dict[str, Tensor]]:
        return [self._shifted(network, offset) for offset in self._offsets(n, generator)]

    def _shifted(self, network: Network, offset: Tensor) -> dict[str, Tensor]:
        delta = self.layout.to_dict(offset)
        return {name: value + delta[name].to(value) for name, value in network.parameters.items()}


def wants_gradient(inputs: Any) -> bool:
    """Whether derivatives towards the inputs are recorded."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flatten_tensors(inputs)[0])


def _symmetric(strips: Sequence[Sequence[Tensor]]) -> Tensor:
    """A symmetric `(B, C, B, C)` from the blocks of its lower triangle."""
    full = [
        [strips[i][j] if j <= i else strips[j][i].permute(2, 3, 0, 1) for j in range(len(strips))]
        for i in range(len(strips))
    ]
    whole = torch.cat([torch.cat(row, 2) for row in full])
    return 0.5 * (whole + whole.permute(2, 3, 0, 1))


def _belief(mean: Tensor, covariance: Tensor) -> GaussianLatent:
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    check_finite(variance, "the posterior variances of the outputs")
    return GaussianLatent(mean, variance, covariance)


def _sum(parts: tuple[Structure, ...]) -> Structure:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
