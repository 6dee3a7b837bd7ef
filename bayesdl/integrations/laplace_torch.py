"""Fitted posteriors from laplace-torch and back, with equal covariances.

Its posterior precision is H / (noise^2 T) + prior precision, the library's (H / noise^2 + prior precision) / T: a prior
precision is multiplied by T on the way in and divided on the way out. Its Kronecker factors keep weight and bias in
blocks of their own (`bias="separate"` here).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.curvature.diag import Diag
from bayesdl.curvature.full import Full
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Block, Layout
from bayesdl.curvature.plan import plan
from bayesdl.curvature.structure import Structure
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, StaleModelError, UnsupportedError, require
from bayesdl.likelihoods import Categorical, Gaussian, Likelihood
from bayesdl.model import BayesianModel, Record
from bayesdl.network import Network, first_inputs
from bayesdl.posteriors import GaussianPosterior

__all__ = ["from_laplace", "to_laplace"]


def from_laplace(la: Any, data: Iterable[Any]) -> BayesianModel:
    """A `BayesianModel` with the curvature, prior, noise and temperature of a fitted laplace-torch object.

    Args:
        la: `FullLaplace`, `KronLaplace` or `DiagLaplace` over all weights (those that require a gradient), or their
            last-layer kinds; for classification or regression. It is read, never written to.
        data: the training loader. Its first batch shows how the network's layers are connected; rules such as
            `tune("loo")` read the rest.

    Returns:
        A model over the network that `la` holds, whose outputs have the same means and covariances. Evidences agree at
        temperature one; at others laplace-torch leaves the prior out of the tempering.

    Raises:
        MissingDependencyError: laplace-torch is not installed.
        UnsupportedError: another kind of object, damping, or a layer whose factors have no counterpart.
        ArgumentError: not fitted yet.
        StaleModelError: the network's weights are not those of the fit any more.
    """
    kinds = require("laplace.baselaplace", extra="laplace")
    structures = {"full": kinds.FullLaplace, "kron": kinds.KronLaplace, "diag": kinds.DiagLaplace}
    kind = next((name for name, cls in structures.items() if isinstance(la, cls)), None)
    if kind is None or type(la).__name__.startswith("Subnet") or la.likelihood not in ("classification", "regression"):
        raise UnsupportedError(
            f"{type(la).__name__} for {getattr(la, 'likelihood', None)!r} was given; Full, Kron and Diag Laplace over "
            "all weights or the last layer, for classification or regression, can be imported"
        )
    if not la.n_data:
        raise ArgumentError(f"this {type(la).__name__} is not fitted: call its fit(loader) first")
    if getattr(la, "damping", False):
        raise UnsupportedError("damping has no counterpart here: fit with damping=False")
    module, names = _selected(la)
    network = Network(module, select=names)
    with torch.random.fork_rng(devices=[]):  # a loader's iterator draws a seed
        example = first_inputs(data, network.batch)
    layout = plan(network, example, "separate" if kind == "kron" else "joint")
    _check_weights(la, network, names)
    empirical = "EF" in la._backend_cls.__name__
    regression = la.likelihood == "regression"
    curvature, noise, count = _imported(kind, la, layout, names), None, int(la.n_outputs)
    log_likelihood, error = -float(la.loss), None
    likelihood: Likelihood = Categorical()
    if regression:
        sigma = la.sigma_noise.detach().double().expand(count).clone()
        likelihood = Gaussian(sigma)
        # squared residuals: the peer keeps their sum over the outputs alone, and one noise for all of them
        error = torch.full_like(sigma, 2.0 * float(la.loss) / count)
        log_likelihood -= la.n_data * count * 0.5 * math.log(2.0 * math.pi)
        if empirical:  # the peer divides by the noise variance once; kept as it is
            curvature = curvature.scaled(sigma[0] ** -2)
            log_likelihood = float(_log_likelihood(error, sigma, la.n_data))
        else:
            noise = sigma
    posterior = GaussianPosterior(
        curvature=curvature,
        parts=(),
        precision=_prior_precision(la, kind, layout, names) * float(la.temperature),
        prior_mean=_flat(la.prior_mean, layout, names),
        noise=noise,
        temperature=float(la.temperature),
        num_data=int(la.n_data),
        log_likelihood=log_likelihood,
        squared_error=error,
        fisher="empirical" if empirical else "mc" if la._backend_kwargs.get("stochastic") else "ggn",
        predictive="linearized",
    )
    found = Finding("info", f"curvature, prior and noise come from laplace-torch ({type(la).__name__})")
    cost = (("parameters", float(network.num_parameters)), ("forward_passes", posterior.forward_passes))
    record = Record("laplace", cost, (found,))
    return BayesianModel(network, posterior, likelihood, record=record, fit_data=data)


def to_laplace(bayes: BayesianModel) -> Any:
    """A fitted laplace-torch object with the same outputs' covariances.

    Args:
        bayes: with a linearised Laplace posterior of structure "full", "diag" or "kron" (fitted with
            `bias="separate"`), and a categorical or Gaussian likelihood with one noise for all outputs.

    Returns:
        `FullLaplace`, `DiagLaplace` or `KronLaplace` over a copy of the network in which the selected parameters alone
        require a gradient, which is how laplace-torch selects. It may write to that copy.

    Raises:
        MissingDependencyError: laplace-torch is not installed.
        UnsupportedError: what laplace-torch has no counterpart for.
    """
    laplace = require("laplace", extra="laplace")
    posterior, layout = bayes.posterior, getattr(bayes.posterior, "layout", None)
    if not isinstance(posterior, GaussianPosterior) or layout is None or posterior.predictive != "linearized":
        raise UnsupportedError("a linearised Laplace posterior can be exported; draws and other methods cannot")
    structure = posterior.structure
    if not isinstance(structure, Full | Diag | Kron) or layout.picked:
        raise UnsupportedError(
            f"structure {structure.recipe!r} has no counterpart in laplace-torch; fit whole parameters with "
            'structure="full", "diag" or "kron"'
        )
    task, sigma = _task(bayes.likelihood)
    model = copy.deepcopy(bayes.network.module())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in layout.names)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    like = next(iter(bayes.network.parameters.values()))
    heat = posterior.temperature
    options = {"sigma_noise": float(sigma)} if task == "regression" else {}
    la = laplace.Laplace(
        model,
        task,
        subset_of_weights="all",
        hessian_structure=structure.name,
        prior_precision=_exported_precision(posterior, names).to(like) / heat,
        prior_mean=_reordered(posterior.prior_mean, layout, names).to(like),
        temperature=heat,
        **options,
    )
    unit = structure.scaled(posterior.scale * heat * sigma**2)
    la.H = _exported(unit, layout, names, la, like)
    la.mean = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    error = posterior.squared_error
    la.loss = like.new_tensor(-posterior.log_likelihood if error is None else 0.5 * float(error.sum()))
    la.n_data, la.n_outputs = posterior.num_data, layout.outputs
    model.output_size = layout.outputs
    return la


def _selected(la: Any) -> tuple[nn.Module, list[str]]:
    """The network, and the names of the parameters under the posterior in the peer's order."""
    if type(la).__name__.endswith("LLLaplace"):
        extractor = la.model
        prefix = extractor._last_layer_name
        module = copy.deepcopy(extractor.model)  # without the hook by which the peer reads the last layer's inputs
        hooks = module.get_submodule(prefix)._forward_hooks
        for key in [k for k, hook in hooks.items() if "FeatureExtractor" in getattr(hook, "__qualname__", "")]:
            del hooks[key]
        return module, [f"{prefix}.{name}" for name, _ in extractor.last_layer.named_parameters()]
    return la.model, [name for name, parameter in la.model.named_parameters() if parameter.requires_grad]


def _check_weights(la: Any, network: Network, names: list[str]) -> None:
    flat = torch.cat([network.parameters[name].detach().reshape(-1) for name in names])
    if not torch.equal(flat, torch.as_tensor(la.mean).detach().to(flat)):
        raise StaleModelError("the network's weights are not those that laplace-torch was fitted at; fit it again")


def _order(layout: Layout, names: list[str]) -> Tensor:
    """For every entry of the library's flat vector its place in the peer's."""
    sizes = [math.prod(layout.shapes[layout.names.index(name)]) for name in names]
    places = torch.arange(sum(sizes)).split(sizes)
    return layout.flatten(dict(zip(names, places, strict=True)))


def _flat(value: Any, layout: Layout, names: list[str]) -> Tensor:
    """A number, or the peer's flat vector, in the library's order."""
    wide = torch.as_tensor(value).detach().double()
    return wide.reshape(()) if wide.numel() == 1 else wide[_order(layout, names).to(wide.device)]


def _reordered(value: Tensor, layout: Layout, names: list[str]) -> Tensor:
    """The inverse of `_flat`."""
    return value if value.numel() == 1 else value[_order(layout, names).argsort().to(value.device)]


def _prior_precision(la: Any, kind: str, layout: Layout, names: list[str]) -> Tensor:
    value = torch.as_tensor(la.prior_precision).detach().double()
    if value.numel() == 1:
        return value.reshape(())
    if kind == "kron":  # one per tensor, which is a block of its own
        return torch.stack([value[names.index(block.parameters[0])] for block in layout.blocks])
    return _flat(la.prior_precision_diag, layout, names)


def _exported_precision(posterior: GaussianPosterior, names: list[str]) -> Tensor:
    value, layout = posterior.precision, posterior.layout
    if value.numel() == 1:
        return value.reshape(())
    if posterior.structure.name == "kron":
        first = [block.parameters[0] for block in layout.blocks]
        return torch.stack([value[first.index(name)] for name in names])
    if value.numel() == layout.numel:
        return _reordered(value, layout, names)
    shifts = [
        s.expand(b.groups, b.rows, b.columns) for s, b in zip(layout.shifts(value, value), layout.blocks, strict=True)
    ]
    return _reordered(layout.join(shifts), layout, names)


def _imported(kind: str, la: Any, layout: Layout, names: list[str]) -> Structure:
    if kind == "full":
        order = _order(layout, names).to(la.H.device)
        return Full.of_dense(layout, la.H.detach()[order][:, order], signed=False)
    if kind == "diag":
        return Diag(layout, tuple(layout.split(la.H.detach()[_order(layout, names).to(la.H.device)])))
    inner, outer, rows = [], [], []
    for block in layout.blocks:
        _check_block(block)
        factors = [f if f.ndim > 1 else f.diag() for f in la.H_facs.kfacs[names.index(block.parameters[0])]]
        cotangents = factors[0].detach()
        inner.append((factors[1].detach() if len(factors) > 1 else cotangents.new_ones(1, 1)).unsqueeze(0))
        outer.append(cotangents.unsqueeze(0))
        rows.append(torch.ones((), dtype=torch.float64, device=cotangents.device))
    empty = Kron.empty(layout, outer[0].dtype, outer[0].device)
    for block, old, new in zip(layout.blocks, empty.outer, outer, strict=True):
        if old.shape != new.shape:
            raise UnsupportedError(
                f"the factor of {block.name!r} is {tuple(new.shape)}; {tuple(old.shape)} is kept here"
            )
    return Kron(layout, tuple(inner), tuple(outer), tuple(rows))


def _exported(unit: Structure, layout: Layout, names: list[str], la: Any, like: Tensor) -> Any:
    order = _order(layout, names).argsort()
    if isinstance(unit, Full):
        return unit.to_dense()[order][:, order].to(like)
    if isinstance(unit, Diag):
        return layout.join(unit.diagonal)[order].to(like)
    matrix = require("laplace.utils.matrix", extra="laplace")
    if not isinstance(unit, Kron):
        raise UnsupportedError(f"{type(unit).__name__} cannot be exported")
    factors = {}
    for block, inner, outer, rows in zip(layout.blocks, unit.inner, unit.outer, unit.rows, strict=True):
        _check_block(block)
        if inner.dim() == 0:
            raise UnsupportedError(
                f"of {block.name!r} only a diagonal is kept here, which laplace-torch has no form for"
            )
        pair = [outer[0].to(like)]
        if block.kind == "linear":
            pair.append((inner[0] / rows.to(inner)).to(like))
        factors[block.parameters[0]] = pair
    la.H_facs = matrix.Kron([factors[name] for name in names])
    return la.H_facs.decompose(damping=False)


def _check_block(block: Block) -> None:
    plain = block.groups == 1 and len(block.parameters) == 1 and not block.transposed
    if not plain or block.kind not in ("linear", "shift"):
        raise UnsupportedError(
            f"the Kronecker factors of {block.name!r} have no counterpart in the other library; linear layers and "
            'ungrouped convolutions have, with weight and bias apart (bias="separate")'
        )


def _task(likelihood: Likelihood) -> tuple[str, Tensor]:
    """The peer's name of the likelihood, and the noise, one for classification."""
    if isinstance(likelihood, Categorical):
        return "classification", torch.ones((), dtype=torch.float64)
    if isinstance(likelihood, Gaussian) and likelihood.noise is not None:
        noise = torch.as_tensor(likelihood.noise, dtype=torch.float64).reshape(-1)
        if bool((noise == noise[0]).all()):
            return "regression", noise[0]
        raise UnsupportedError("laplace-torch has one noise for all outputs; this likelihood has several")
    raise UnsupportedError(f"a {likelihood.name} likelihood has no counterpart in laplace-torch")


def _log_likelihood(error: Tensor, sigma: Tensor, count: int) -> Tensor:
    return -0.5 * (error / sigma.square() + count * (2.0 * sigma.log() + math.log(2.0 * math.pi))).sum()
