"""Export: a fitted model with one forward pass as a plain `nn.Module`, for `torch.export`, ONNX and other run times."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone
from bayesdl.errors import UnsupportedError
from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.features import linear_layer
from bayesdl.last_layer.parameterisation import Covariance, Full, Precision, Shared
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood, NormalGamma
from bayesdl.model import BayesianModel
from bayesdl.network import Network
from bayesdl.outputs import extract_output, outputs_last
from bayesdl.posteriors import GaussianPosterior, LastLayerPosterior, PointPosterior, Posterior, ScaledPosterior
from bayesdl.posteriors.discriminant import Discriminant
from bayesdl.posteriors.last_layer import ConjugateWeights, GaussianWeights

LARGEST = 4096  # weights of a last-layer Laplace posterior, whose covariance is formed here


def export_head(bayes: BayesianModel, *, score: bool = False) -> nn.Module:
    """The model as one module of plain tensor operations, with its own copy of the network.

    Calling it gives two tensors, what `bayes(x)` gives as closed forms: for regression the mean and the variance of y
    (noise included), `(B, C)` each; for classes or labels their probabilities, and the variances of the logits. It can
    be traced, exported and moved as any module; `torch.export` and ONNX take a dynamic batch.

    Args:
        bayes: "vbll" or "student-t" (frozen or trained), a head's posterior, a linearised Laplace posterior of the last
            layer, "temperature" (also over one of those) or "map".
        score: return a third tensor `(B,)` too, higher for stranger inputs, as `bdl.evaluation.ood_score` by default:
            the entropy of these probabilities in nats (summed over labels), or for regression the variance of f, noise
            excluded, averaged over outputs.

    Raises:
        UnsupportedError: a model that needs several passes, draws, or a link without a closed form.
    """
    posterior, temperature = bayes.posterior, 1.0
    if isinstance(bayes.posterior, ScaledPosterior):
        posterior, temperature = bayes.posterior.base, float(bayes.posterior.temperature)
    trunk, layer, belief = _parts(bayes.network, posterior)
    link = _link(bayes.likelihood)
    if score:
        binary = isinstance(bayes.likelihood, Bernoulli)
        entropy = binary or isinstance(bayes.likelihood, Categorical)
        link = _Scored(link, _Entropy(binary) if entropy else _Spread(isinstance(bayes.likelihood, Heteroscedastic)))
    return Exported(trunk, belief, link, bayes.network.output_axis, temperature, layer).eval()


@final
class Exported(nn.Module):
    """Features, belief and link in one forward pass; see `export_head`."""

    def __init__(
        self, trunk: nn.Module, belief: nn.Module, link: nn.Module, axis: Any, temperature: float, layer: str
    ) -> None:
        super().__init__()
        self.trunk, self.belief, self.link = trunk, belief, link
        self.axis, self.temperature, self.layer = axis, temperature, layer

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
        phi = outputs_last(extract_output(self.trunk(*inputs, **keywords)), None, self.axis)
        mean, variance = self.belief(phi)
        return self.link(mean / self.temperature, variance / self.temperature**2)


def _parts(network: Network, posterior: Posterior) -> tuple[nn.Module, str, nn.Module]:
    """The network without its last layer, that layer's name, and the belief that takes its place."""
    network.check_values()
    copy = structural_clone(network.template, _kept, _kept)
    if isinstance(posterior, PointPosterior):
        return copy, "", _Certain()
    if isinstance(posterior, LastLayerPosterior):
        layer = posterior.layer_of(network)
        tensors = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
        for name, value in posterior.trunk.items():
            tensors[name].data = value.detach().clone().to(tensors[name])
        belief = _belief_of(posterior)
    elif isinstance(posterior, GaussianPosterior) and posterior.predictive == "linearized":
        layer, belief = _laplace(network, posterior)
    else:
        raise UnsupportedError(
            f"a {posterior.kind} posterior needs several passes or draws for a prediction; one pass have "
            '"vbll", "student-t", "map", "temperature" and the linearised bdl.Laplace(select="last_layer")'
        )
    parent, _, attribute = layer.rpartition(".")
    if not attribute:
        return nn.Identity(), layer, belief
    setattr(copy.get_submodule(parent), attribute, nn.Identity())
    return copy, layer, belief


def _belief_of(posterior: LastLayerPosterior) -> nn.Module:
    belief = posterior.belief
    if isinstance(belief, ConjugateWeights):
        return _Conjugate(belief.regression)
    if isinstance(belief, GaussianWeights):
        return _Gaussian(belief)
    if isinstance(belief, Discriminant):
        return _Classes(belief)
    raise UnsupportedError(f"a last layer of kind {belief.name!r} has no export")


def _laplace(network: Network, posterior: GaussianPosterior) -> tuple[str, nn.Module]:
    """Per-output covariances of the one linear layer that was selected, `(K, d', d')`."""
    layers = {name.rpartition(".")[0] for name in network.names}
    if len(layers) != 1 or network.elements is not None:
        raise UnsupportedError(
            f"the posterior is over {sorted(layers)}: only one over the whole last layer has a closed form of its "
            'features; fit bdl.Laplace(select="last_layer")'
        )
    layer = layers.pop()
    linear = linear_layer(network, layer)
    outputs, width = linear.weight.shape
    total = network.num_parameters
    if total > LARGEST:
        raise UnsupportedError(
            f"the last layer has {total} weights; the export forms their covariance up to {LARGEST}. Use "
            'method "vbll", whose export holds one factor'
        )
    eye = torch.eye(total, dtype=torch.float64, device=network.device)
    covariance = posterior.structure.map(torch.Tensor.double).solve(
        eye, posterior.scale.double(), posterior.shift.double()
    )
    order = torch.arange(total, device=network.device)
    sizes = {name: parameter.numel() for name, parameter in network.parameters.items()}
    parts = dict(zip(sizes, order.split(list(sizes.values())), strict=True))
    columns, means = [], []
    tensors = network.tensors
    for name, value in (("weight", (outputs, width)), ("bias", (outputs, 1))):
        full = f"{layer}.{name}"
        if full in parts:
            columns.append(parts[full].reshape(value))
            means.append(tensors[full].detach().reshape(value))
    index = torch.cat(columns, 1)
    blocks = torch.stack([covariance[rows][:, rows] for rows in index])
    certain = None if linear.bias is None or f"{layer}.bias" in parts else linear.bias.detach()
    if f"{layer}.weight" not in parts:
        raise UnsupportedError("the weight of the last layer is not part of the posterior; select the whole layer")
    return layer, _Blocks(torch.cat(means, 1), blocks, f"{layer}.bias" in parts, certain)


def _kept(tensor: Tensor) -> Any:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


class _Certain(nn.Module):
    def forward(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return outputs, torch.zeros_like(outputs)


class _Conjugate(nn.Module):
    """`ConjugateRegression.latent` with everything that does not depend on the features worked out."""

    weight: Tensor
    bias: Tensor
    centre: Tensor
    vectors: Tensor
    offset: Tensor
    inverse: Tensor
    free: Tensor

    def __init__(self, regression: ConjugateRegression) -> None:
        super().__init__()
        own = regression
        weight, bias = own.weights()
        flat = own.intercept == "flat"
        centre = own.statistics.feature_mean if flat else torch.zeros_like(own.statistics.feature_mean)
        vectors = own.vectors[:-1] if own.intercept == "proper" else own.vectors
        offset = own.vectors[-1] if own.intercept == "proper" else torch.zeros_like(own.values)
        inverse = own.noise_variance / (own.values.unsqueeze(1) + own.ratio)
        free = own.noise_variance / own.statistics.count if flat else torch.zeros_like(own.noise_variance)
        for name, value in (
            ("weight", weight.mT),
            ("bias", bias),
            ("centre", centre),
            ("vectors", vectors),
            ("offset", offset),
            ("inverse", inverse),
            ("free", free),
        ):
            self.register_buffer(name, value.detach().float().clone())

    def forward(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.to(self.weight.dtype)
        turned = (phi - self.centre) @ self.vectors + self.offset
        return phi @ self.weight + self.bias, turned.square() @ self.inverse + self.free


class _Gaussian(nn.Module):
    """`GaussianWeights.latent`."""

    mean: Tensor
    scale: Tensor

    def __init__(self, belief: GaussianWeights) -> None:
        super().__init__()
        self.quad = _quadratic(belief.covariance)
        self.bias = belief.bias
        self.register_buffer("mean", belief.mean.mT.clone())
        self.register_buffer("scale", belief.scale.clone())

    def forward(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.to(self.mean.dtype)
        wide = torch.cat([phi, torch.ones_like(phi[..., :1])], -1) if self.bias else phi
        variance = self.quad(wide)
        return (wide @ self.mean) * self.scale[0], variance * self.scale[1]


def _quadratic(covariance: Covariance) -> nn.Module:
    if isinstance(covariance, (Full, Precision)):
        root = covariance.factor() if isinstance(covariance, Full) else torch.linalg.inv(covariance.factor()).mT
        return _Roots(root, torch.ones_like(root[:, 0, 0]))
    if isinstance(covariance, Shared):
        return _Roots(covariance.factor().unsqueeze(0), covariance.log_variance.exp())
    return _Plain(covariance)


class _Plain(nn.Module):
    """A covariance whose quadratic form writes nothing in place."""

    def __init__(self, covariance: Covariance) -> None:
        super().__init__()
        self.covariance = covariance

    def forward(self, phi: Tensor) -> Tensor:
        own: Covariance = self.covariance
        return own.quad(phi.flatten(0, -2)).reshape(*phi.shape[:-1], -1)


class _Roots(nn.Module):
    """phi^T R_k R_k^T phi times a level, `(..., K)`; one root `(1, d, d)` may serve all levels."""

    root: Tensor
    level: Tensor

    def __init__(self, root: Tensor, level: Tensor) -> None:
        super().__init__()
        self.count = len(root)
        self.register_buffer("root", root.detach().permute(1, 0, 2).flatten(1).clone())
        self.register_buffer("level", level.detach().clone())

    def forward(self, phi: Tensor) -> Tensor:
        return (phi @ self.root).unflatten(-1, (self.count, -1)).square().sum(-1) * self.level


class _Blocks(nn.Module):
    """A linear layer with one covariance per output."""

    mean: Tensor
    certain: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor, bias: bool, certain: Tensor | None) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # (K, d', d')
        self.bias = bias
        self.quad = _Roots(root.float(), mean.new_ones(len(mean)).float())
        self.register_buffer("mean", mean.mT.float().clone())
        self.register_buffer(
            "certain", mean.new_zeros(len(mean)).float() if certain is None else certain.float().clone()
        )

    def forward(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.to(self.mean.dtype)
        wide = torch.cat([phi, torch.ones_like(phi[..., :1])], -1) if self.bias else phi
        return wide @ self.mean + self.certain, self.quad(wide)


class _Classes(nn.Module):
    """`Discriminant.latent`."""

    mean: Tensor
    noise: Tensor
    doubt: Tensor
    log_prior: Tensor

    def __init__(self, belief: Discriminant) -> None:
        super().__init__()
        self.full = belief.full
        for name, value in belief.tensors().items():
            self.register_buffer(name, value.clone())

    def forward(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        own = Discriminant(self.mean, self.noise, self.doubt, self.log_prior, self.full)
        mean, variance = own.latent(phi.flatten(0, -2))
        return mean.reshape(*phi.shape[:-1], -1), variance.reshape(*phi.shape[:-1], -1)


def _link(likelihood: Likelihood) -> nn.Module:
    if isinstance(likelihood, (Categorical, Bernoulli)):
        if likelihood.link != "probit":
            raise UnsupportedError(
                f'link="{likelihood.link}" is not exported; wrap with bdl.{type(likelihood).__name__}(link="probit")'
            )
        return _Probit(isinstance(likelihood, Bernoulli))
    if isinstance(likelihood, (Gaussian, NormalGamma)):
        return _Noise(likelihood)
    if isinstance(likelihood, Heteroscedastic):
        return _LogNoise()
    raise UnsupportedError(f"the {likelihood.name} likelihood is not exported; mean and variance have no closed form")


class _Probit(nn.Module):
    def __init__(self, binary: bool) -> None:
        super().__init__()
        self.binary = binary

    def forward(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        shrunk = mean / torch.sqrt(1.0 + math.pi / 8.0 * variance)
        return (torch.sigmoid(shrunk) if self.binary else torch.softmax(shrunk, -1)), variance


class _Noise(nn.Module):
    noise: Tensor

    def __init__(self, likelihood: Gaussian | NormalGamma) -> None:
        super().__init__()
        if isinstance(likelihood, Gaussian):
            known = torch.as_tensor(likelihood.noise if likelihood.noise is not None else math.nan)
            if not bool(torch.isfinite(known).all()):
                raise UnsupportedError("the gaussian likelihood has no noise yet; tune it, or pass bdl.Gaussian(noise)")
            noise = known.double().square()
        else:
            shape, rate = (torch.as_tensor(v, dtype=torch.float64) for v in (likelihood.shape, likelihood.rate))
            if not bool((shape > 1).all()):
                raise UnsupportedError("a Student-t of at most 2 degrees of freedom has no variance to export")
            noise = rate / (shape - 1.0)
        self.register_buffer("noise", noise.float().clone())

    def forward(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return mean, variance + self.noise


class _LogNoise(nn.Module):
    def forward(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        centre, log_noise = mean.chunk(2, -1)
        spread, doubt = variance.chunk(2, -1)
        return centre, spread + torch.exp(log_noise + 0.5 * doubt)


class _Scored(nn.Module):
    """A link, and a score of its results and the variances of f."""

    def __init__(self, link: nn.Module, score: nn.Module) -> None:
        super().__init__()
        self.link, self.score = link, score

    def forward(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self.link(mean, variance)
        return first, second, self.score(first, variance)


class _Entropy(nn.Module):
    def __init__(self, binary: bool) -> None:
        super().__init__()
        self.binary = binary

    def forward(self, probs: Tensor, variance: Tensor) -> Tensor:
        tiny = torch.finfo(probs.dtype).tiny  # 0 log 0 = 0
        own = -(probs * probs.clamp(min=tiny).log()).sum(-1)
        if not self.binary:
            return own
        rest = 1.0 - probs
        return own - (rest * rest.clamp(min=tiny).log()).sum(-1)


class _Spread(nn.Module):
    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves = halves  # the second half is of log variances

    def forward(self, mean: Tensor, variance: Tensor) -> Tensor:
        return (variance.chunk(2, -1)[0] if self.halves else variance).mean(-1)
