"""Posterior over a last layer: features from the network, the rest in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.errors import FileFormatError, SelectionError, check_finite
from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.features import features
from bayesdl.last_layer.parameterisation import Covariance, make
from bayesdl.last_layer.statistics import Statistics
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods import Gaussian, Likelihood, NormalGamma
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, check_positions, standard_normal
from bayesdl.posteriors.belief import Belief, LinearBelief, Map
from bayesdl.posteriors.discriminant import Discriminant
from bayesdl.streaming import whole


@final
@dataclass(frozen=True, eq=False)
class ConjugateWeights(LinearBelief):
    """The exact posterior of a regression."""

    regression: ConjugateRegression

    name: ClassVar[str] = "conjugate"

    def latent(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.regression.latent(phi)

    def cross(self, phi: Tensor, other: Tensor) -> Tensor:
        return self.regression.cross(phi, other)

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        values = self.regression.values
        outputs, width = self.regression.num_outputs, len(values)
        noise = standard_normal((n, outputs, width + 1), values, generator)
        return self.regression.draw(noise[..., :width], noise[..., width])

    def log_evidence(self, likelihood: Likelihood) -> Tensor | None:
        own = self.regression
        if isinstance(likelihood, NormalGamma):
            return own.scale_evidence(*likelihood.parameters(own.noise_variance)).sum()
        if isinstance(likelihood, Gaussian):
            return own.evidence(own.ratio, likelihood.scale(own.noise_variance).square()).sum()
        return None

    def tensors(self) -> dict[str, Tensor]:
        own = self.regression
        kept = {"values": own.values, "vectors": own.vectors, "target": own.target, "ratio": own.ratio}
        kept["noise_variance"] = own.noise_variance
        return kept | {f"statistics.{name}": value for name, value in own.statistics.tensors().items()}

    def config(self) -> dict[str, Any]:
        return {"count": self.regression.statistics.count, "intercept": self.regression.intercept}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        prefix = "statistics."
        moments = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        own = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
        statistics = Statistics(count=int(config["count"]), **moments)
        return cls(ConjugateRegression(statistics=statistics, intercept=str(config["intercept"]), **own))


@final
@dataclass(frozen=True, eq=False)
class GaussianWeights(LinearBelief):
    """q(W) = prod_k N(mu_k, S_k).

    Attributes:
        mean: mu, `(K, d')`.
        covariance: S.
        scale: `(2, K)`; factors of mean and variance of the outputs (logit noise is aleatoric).
        bias: whether the last weight belongs to a constant 1.
        bound: lower bound of log p(data), where the fit ended with one.
    """

    mean: Tensor
    covariance: Covariance
    scale: Tensor
    bias: bool
    bound: float | None = None

    name: ClassVar[str] = "gaussian"

    @classmethod
    def of(cls, mean: Tensor, covariance: Covariance, scale: Tensor, bias: bool, *, bound: float | None = None) -> Self:
        """A detached copy, whole where the head is sharded: training on the head leaves it as it is."""
        held = {name: whole(value.detach()).clone() for name, value in covariance.state_dict().items()}
        covariance = _rebuilt(covariance, held)
        return cls(whole(mean.detach()).clone(), covariance, whole(scale.detach()).clone(), bias, bound)

    def latent(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = self._extended(phi)
        return (phi @ self.mean.mT) * self.scale[0], self.covariance.quad(phi) * self.scale[1]

    def cross(self, phi: Tensor, other: Tensor) -> Tensor:
        between = self._extended(phi) @ self.covariance.dense() @ self._extended(other).mT
        return between * self.scale[1].view(-1, 1, 1)

    def _extended(self, phi: Tensor) -> Tensor:
        phi = phi.to(self.mean.dtype)
        return torch.cat([phi, phi.new_ones(len(phi), 1)], 1) if self.bias else phi

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        noise = standard_normal((n, len(self.mean), self.covariance.width), self.mean, generator)
        weights = self.mean * self.scale[0].unsqueeze(1)
        weights = weights + self.covariance.sample(noise) * self.scale[1].sqrt().unsqueeze(1)
        if self.bias:
            return weights[..., :-1], weights[..., -1]
        return weights, weights.new_zeros(weights.shape[:2])

    def log_evidence(self, likelihood: Likelihood) -> Tensor | None:
        return None if self.bound is None else self.mean.new_tensor(self.bound, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        held = {f"covariance.{name}": value for name, value in self.covariance.state_dict().items()}
        return {"mean": self.mean, "scale": self.scale, **held}

    def config(self) -> dict[str, Any]:
        own = self.covariance
        return {
            "covariance": own.name,
            "rank": own.rank,
            "memory": own.memory,
            "bias": self.bias,
            "bound": self.bound,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        prefix = "covariance."
        held = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        mean = tensors["mean"]
        options = {"rank": int(config["rank"]), "memory": int(config["memory"])}
        with torch.device(mean.device):
            empty = make(str(config["covariance"]), mean.shape[1], mean.shape[0], **options)
        bound = config.get("bound")
        whole = _filled(empty, held)
        return cls(mean, whole, tensors["scale"], bool(config["bias"]), None if bound is None else float(bound))


PROBES = 7  # rows of features on which a restored belief is tried: a number that no size of its own is likely to be
BELIEFS: dict[str, type[Belief]] = {belief.name: belief for belief in (ConjugateWeights, GaussianWeights, Discriminant)}


@final
@dataclass(frozen=True, eq=False)
class LastLayerPosterior(Posterior):
    """A belief over the last layer; the rest of the network is taken as it is.

    Attributes:
        layer: name of the layer, or None for the one `Head` of the network.
        belief: over its weights.
        trunk: tensors by name that replace the network's own, where the network was trained along.
    """

    layer: str | None
    belief: Belief
    trunk: Mapping[str, Tensor] = field(default_factory=dict)

    kind: ClassVar[str] = "last_layer"

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        phi = features(network, self.layer_of(network), inputs, self._cast(network))
        shape = phi.shape[:-1]
        mean, variance = self.belief.latent(phi.flatten(0, -2))
        return GaussianLatent(mean.reshape(*shape, -1), variance.reshape(*shape, -1))

    def covariance(self, network: Network, first: Any, second: Any, state: Any) -> tuple[Tensor, Tensor]:
        """phi S_k phi' for each output k, between which there is none."""
        if not isinstance(self.belief, LinearBelief):
            return super().covariance(network, first, second, state)
        layer, held = self.layer_of(network), self._cast(network)
        phi = features(network, layer, first, held)
        check_positions(phi)
        other = phi if second is None else features(network, layer, second, held)
        between = self.belief.cross(phi, other)
        mean, _ = self.belief.latent(phi)
        return mean, torch.diag_embed(between.movedim(0, -1)).transpose(1, 2)

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        layer, held = self.layer_of(network), self._cast(network)

        def function(chosen: Map) -> Function:
            def outputs(inputs: Any) -> Tensor:
                return chosen(features(network, layer, inputs, held))

            return outputs

        return [function(chosen) for chosen in self.belief.functions(n, generator)]

    def layer_of(self, network: Network) -> str:
        """Name of the layer.

        Raises:
            SelectionError: no name was given, and the network has no Bayesian head, or several.
        """
        from bayesdl.last_layer.head import Head

        if self.layer is not None:
            return self.layer
        found = [name for name, module in network.template.named_modules() if isinstance(module, Head)]
        if len(found) != 1:
            raise SelectionError(
                f"the network has {len(found)} Bayesian heads ({found}); build the posterior with the name of its "
                "layer: head.posterior(layer='...')"
            )
        return found[0]

    @property
    def forward_passes(self) -> float:
        return 1.0

    @property
    def over_weights(self) -> bool:
        return True

    def num_uncertain(self, network: Network) -> int:
        # whatever the rest of the network was selected for, the belief is about one layer
        layer = network.template.get_submodule(self.layer_of(network))
        return sum(parameter.numel() for parameter in layer.parameters())

    def _cast(self, network: Network) -> dict[str, Tensor]:
        # the network may have been moved to half precision, where the trunk is not kept
        own = network.tensors
        return {name: value.to(own[name].dtype) for name, value in self.trunk.items()}

    def check(self, network: Network) -> None:
        """Raise unless the belief answers for one row of features of the layer's width, and the trunk fits."""
        layer = network.template.get_submodule(self.layer_of(network))
        width = getattr(layer, "in_features", None)
        if not isinstance(width, int):
            raise FileFormatError(f"layer {self.layer!r} of this network has no features")
        dtype = network.dtype or torch.float32
        mean, variance = self.belief.latent(torch.zeros(PROBES, width, dtype=dtype, device=network.device))
        if mean.shape != variance.shape or mean.dim() != 2 or len(mean) != PROBES:
            raise FileFormatError(f"the last layer gives {tuple(mean.shape)} means, {tuple(variance.shape)} variances")
        check_finite(mean, "the last layer's mean")
        if not bool((variance >= 0).all()):
            raise FileFormatError("the last layer has a variance that is negative or no number")
        for name, value in self.trunk.items():
            own = network.tensors[name]
            if own.shape != value.shape or own.is_floating_point() != value.is_floating_point():
                raise FileFormatError(f"{name!r} is {tuple(value.shape)}; in the network it is {tuple(own.shape)}")

    def tensors(self) -> dict[str, Tensor]:
        return {**self.belief.tensors(), **{f"trunk.{name}": value for name, value in self.trunk.items()}}

    def config(self) -> dict[str, Any]:
        return {"layer": self.layer, "belief": self.belief.name, **self.belief.config()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        prefix = "trunk."
        trunk = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        own = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
        return cls(config["layer"], BELIEFS[str(config["belief"])].restore(own, config), trunk)


def _rebuilt(covariance: Covariance, tensors: Mapping[str, Tensor]) -> Covariance:
    empty = make(
        covariance.name, covariance.features, covariance.outputs, rank=covariance.rank, memory=covariance.memory
    )
    return _filled(empty, tensors)


def _filled(covariance: Covariance, tensors: Mapping[str, Tensor]) -> Covariance:
    # assign keeps dtype and device of the stored tensors
    covariance.load_state_dict(dict(tensors), assign=True)
    return covariance.requires_grad_(False)
