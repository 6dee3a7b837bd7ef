"""Tuning on the training data alone, so that it does no harm: neither held-out data nor the evidence is needed.

Open Gaussian noise: the residuals that the network would have without each point (`leftout`) stand for held-out data,
and prior precision and noise minimise their NLL together. Anything else: the widest posterior that costs the training
points next to nothing against the plain network, because a trained classifier's own probabilities are the best that its
training data can say, and the posterior adds what it does not know; or a wider one still, where mixtures of training
inputs show that the network knows its labels by heart (`mixing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.batch import batch_size, index_batch
from bayesdl.curvature.chunking import chunk_size, chunks
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.gram import gram, joined
from bayesdl.curvature.plan import plan
from bayesdl.data import batches, check_loader, in_batch
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network, first_inputs
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.grid import (
    Passes,
    choose,
    grid_of,
    losses,
    passes,
    pick,
    pieces,
    relative_noise,
    training_source,
)
from bayesdl.tuning.heldout import profiled_losses
from bayesdl.tuning.leftout import left_out
from bayesdl.tuning.mixing import SHARE, mixed

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

# least bound on the nats per training example that the posterior may cost; chosen with benchmarks/defaults.py
HARM = 0.002
# training examples times outputs: the kernel of the linear model is decomposed whole
LIMIT = 1500
# tasks whose labels an input keeps when a smaller part of another is mixed into it
MIXED = ("classification", "multilabel")


def tune_training(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    grid: Sequence[float] | None = None,
    limit: int = LIMIT,
    harm: float | None = None,
    mix: float | None = None,
    progress: bool = False,
) -> BayesianModel:
    """Choose the scalar prior precision, and an open Gaussian noise, from the training data.

    Args:
        model: with a linearised Gaussian posterior.
        data: the training loader; default the one that the model was fitted on in this process.
        grid: prior precisions to try; default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.
        limit: training examples (times outputs, for open noise) to use, the first of the loader.
        harm: mean nats per training example that the posterior may cost; not used for open noise. Default the largest
            of 0.002, of log(N) / 2N, what it costs to describe one number, the prior precision, to the accuracy that N
            examples support (Schwarz 1978), and of the standard error of the network's own mean NLL.
        mix: for classifiers of floating inputs: the precision that is best for mixtures of two training inputs, this
            share of the one whose label they keep, is taken where it is smaller. Default 0.8, and 1, no mixtures, where
            `harm` is given.

    Raises:
        ArgumentError: no data, fewer than two examples, a limit or harm that is not positive, or a share that is not
            above a half and at most one.
        UnsupportedError: another kind of posterior.
    """
    posterior, source = training_source(model, data, "training")
    if limit < 2 or (harm is not None and not harm > 0):
        raise ArgumentError(f"limit={limit} and harm={harm} were given; expected at least 2, and a positive number")
    share = (SHARE if harm is None else 1.0) if mix is None else mix
    if not 0.5 < share <= 1.0:
        raise ArgumentError(f"mix={mix} was given; expected a share above 0.5 and at most 1")
    candidates = grid_of(grid).sort().values
    if isinstance(model.likelihood, Gaussian) and posterior.noise is not None:
        count = max(2, limit // posterior.layout.outputs)
        kept = first_batches(model.network, source, count)
        residual = left_out_residuals(model, posterior, kept, count)
        table, factors = profiled_losses(posterior, candidates, _as_held_out(model, posterior, kept, residual))
        how = "by residuals of left-out training points"
        return choose(model, posterior, candidates, pick(candidates, table), factors, how)
    kept = first_batches(model.network, source, limit)
    rows = passes(model, posterior, kept, "training", progress, limit, len(candidates))
    cost, plain = _cost(model, posterior, candidates, rows)
    bound = harm_of(plain, posterior.num_data) if harm is None else harm
    how, best = f"so as to cost the training data at most {bound:.2g} nats", _widest(cost, bound)
    if share < 1.0 and model.likelihood.task in MIXED and not posterior.layout.positions:
        between = _best_between(model, posterior, candidates, mixed(model.network, kept, limit, share))
        if between is not None and between < best:
            how, best = "by mixtures of training inputs, of which the network is too sure", between
    return choose(model, posterior, candidates, best, None, how, widest=True)


def left_out_residuals(model: BayesianModel, posterior: GaussianPosterior, data: Iterable[Any], count: int) -> Tensor:
    """Residuals y - f of the first `count` examples, each without itself, `(N, C)` float64.

    Scaled up to all training points where the posterior knows their squared residuals. See `network_residuals`.
    """
    level = relative_noise(posterior)
    found, own = network_residuals(
        model.network, model.likelihood, data, count, level=level, prior_mean=posterior.prior_mean
    )
    return found * _representative(posterior, own)


def network_residuals(
    network: Network, likelihood: Likelihood, data: Iterable[Any], count: int, *, level: Tensor, prior_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Residuals y - f of the first `count` examples, each without itself, and as they are: two `(N, C)` float64.

    All layers of the network take part, whatever is Bayesian: the last layer alone would be fitted to features that
    have seen the point.

    Args:
        network: trained on the data.
        likelihood: checks the targets.
        data: training batches.
        count: examples used, the first of the batches.
        level: noise of the outputs up to a common factor, a scalar or `(C,)`.
        prior_mean: of the parameters, a scalar or one entry each.

    Raises:
        UnsupportedError: a layer without Jacobian, or a prior mean that names the selected parameters only.
        ArgumentError: fewer than two examples.
    """
    network = network.reselect("all")
    layout = plan(network, first_inputs(data, network.batch))
    if prior_mean.dim() and len(prior_mean) != layout.numel:
        raise UnsupportedError(
            "left-out residuals need a prior mean that is a number, or one for all of the network's parameters"
        )
    kind = torch.promote_types(network.dtype or torch.float32, torch.float32)
    flat = layout.flatten({name: value.detach() for name, value in network.parameters.items()}).double()
    offset = layout.split((flat - prior_mean.to(flat)).to(kind))
    step = chunk_size(layout, "kron", kind, device=network.device)
    outputs, goals, slopes = [], [], []
    parts: list[list[Factor]] = [[] for _ in layout.blocks]
    seen = 0
    for number, inputs, target in batches(network, data, progress=False):
        for rows, labels in chunks(inputs, target, step):
            left = count - seen
            if left <= 0:
                break
            size = len(labels)
            if size > left:
                rows, labels = index_batch(rows, slice(0, left)), labels[:left]
            with in_batch(number):
                output, factors = layer_factors(network, layout, rows, identity_cotangents, kind)
                goals.append(likelihood.check_targets(output, torch.as_tensor(labels)))
            outputs.append(output)
            slopes.append(torch.stack([f.dot(d) for f, d in zip(factors, offset, strict=True)]).sum(0))
            for kept, factor in zip(parts, factors, strict=True):
                kept.append(factor)
            seen += len(output)
    if seen < 2:
        raise ArgumentError("one training example was given; leaving one out needs at least 2")
    own = (torch.cat(goals) - torch.cat(outputs)).double()
    level = level.to(own).expand(layout.outputs)
    every = level.repeat(seen)
    kernel = gram([joined(kept) for kept in parts]) / every / every.unsqueeze(-1)
    return level * left_out(kernel, own / level, torch.cat(slopes).double() / level), own


def _representative(posterior: GaussianPosterior, own: Tensor) -> Tensor:
    """Root mean squared residual of all training points over that of some `(N, C)`, per output `(C,)`.

    A ratio estimate: by how much a left-out residual exceeds the network's own varies less between points than the
    residuals do, and these are known of all points.
    """
    if posterior.squared_error is None or len(own) >= posterior.num_data:
        return own.new_ones(())
    some = own.square().mean(0)
    every = posterior.squared_error.to(own) / posterior.num_data
    return torch.where(some > 0, every / some, torch.ones_like(some)).sqrt()


def first_batches(network: Network, source: Iterable[Any], count: int) -> list[Any]:
    """The batches with the first examples, to be read again: a shuffling loader gives others every time."""
    check_loader(source)
    kept, seen = [], 0
    for number, batch in enumerate(source):
        kept.append(batch)
        with in_batch(number):
            seen += batch_size(network.batch(batch)[0])
        if seen >= count:
            break
    return kept


def _as_held_out(
    model: BayesianModel, posterior: GaussianPosterior, data: Iterable[Any], residual: Tensor
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """The network's outputs with targets at their left-out distance."""
    start = 0
    for mean, _, turned in passes(model, posterior, data, "left out", False, len(residual)):
        yield mean, mean + residual[start : start + len(mean)], turned
        start += len(mean)


def _cost(
    model: BayesianModel, posterior: GaussianPosterior, candidates: Tensor, rows: Passes
) -> tuple[Tensor, Tensor]:
    """Mean NLL of every candidate on the training points, less that of the plain network, and the latter by point."""
    plain: list[Tensor] = []

    def heard() -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
        for mean, target, turned in rows:
            plain.append(-model.likelihood.log_prob(mean, target).double().cpu())
            yield mean, target, turned

    table = losses(model, posterior, candidates, heard())
    alone = torch.cat(plain)
    return (table - alone).mean(1), alone


def harm_of(plain: Tensor, count: int) -> float:
    """What the posterior may cost each of `count` training points, some of whose NLL under the network is `plain`."""
    error = float(plain.std()) / count**0.5 if len(plain) > 1 else 0.0
    return max(HARM, math.log(count) / (2 * count), error)


def _best_between(
    model: BayesianModel, posterior: GaussianPosterior, candidates: Tensor, pair: tuple[Tensor, Tensor] | None
) -> int | None:
    """The candidate with the least NLL of mixtures; None where there are none."""
    if pair is None:
        return None
    table = losses(model, posterior, candidates, pieces(model, posterior, [(0, *pair)], None, len(candidates)))
    return pick(candidates, table)


def _widest(cost: Tensor, harm: float) -> int:
    """The first of the candidates from which on none costs more than `harm`; the last where there is none."""
    bad = (~(cost <= harm)).nonzero()
    return min(int(bad[-1]) + 1 if len(bad) else 0, len(cost) - 1)
