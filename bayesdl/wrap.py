"""`wrap`: a trained network, a method and data -> a BayesianModel."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bayesdl.agreement import first_decides
from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.clone import unwrap
from bayesdl.data import check_rereadable
from bayesdl.diagnose import Finding
from bayesdl.distributed import for_one_process, resolve_group, same_network, together
from bayesdl.errors import ArgumentError, SelectionError, StaleModelError, UnreachedParameterError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.likelihoods import resolve as resolve_likelihood
from bayesdl.methods import METHODS, VBLL, Method, StudentT, Task
from bayesdl.methods import resolve as resolve_method
from bayesdl.model import BayesianModel, Record
from bayesdl.network import Network, first_inputs
from bayesdl.posteriors import GaussianPosterior
from bayesdl.posteriors.last_layer import LastLayerPosterior
from bayesdl.priors import Prior
from bayesdl.select import Selector, Subnetwork, wants_last_layer
from bayesdl.streaming import GATHER
from bayesdl.tuning.last_layer import is_last_layer_regression

if TYPE_CHECKING:
    from bayesdl.distributed import Processes


def wrap(
    model: nn.Module | Sequence[nn.Module],
    method: str | Method,
    data: Iterable[Any] | None = None,
    *,
    likelihood: str | Likelihood,
    validation: Iterable[Any] | None = None,
    prior: Prior | None = None,
    select: Selector | None = None,
    batch: str | BatchAdapter | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
    distributed: Processes = None,
) -> BayesianModel:
    """Make a trained network Bayesian.

    Args:
        model: trained network, never written to; a list of networks for "ensemble".
        method: name ("map", "temperature", "laplace", "gp", "ella", "valla", "vbll", "swag", "ensemble", "dropout",
            "tfb", "bayesvlm", "nuts", "smc", a sampler such as "sghmc"; `bayesdl.methods.METHODS` has all) or an object
            such as `bdl.Laplace(select="last_layer")`.
        data: loader of `(inputs, target)` batches: training data for "laplace", "swag" and samplers, held-out data for
            "temperature", optional for the others (it chooses an open Gaussian noise).
        likelihood: "categorical", "bernoulli", "gaussian", "heteroscedastic", "poisson" or an object.
        validation: held-out loader. What was left open (Laplace's prior precision, a Gaussian noise, the temperature of
            "temperature" and of a classifier's last layer) is then chosen by its NLL. Without it Laplace
            uses the training data alone (`tune("training")`).
        prior: `bdl.GaussianPrior(precision=...)` is kept as given; `earlier.as_prior()` continues an earlier Laplace
            fit; None lets the method choose.
        select: which parameters are Bayesian; overrides the method's own selection.
        batch: "auto", "huggingface" or a callable `batch -> (inputs, target)`.
        generator: source of all randomness.
        progress: show progress bars.
        distributed: for "laplace" on several processes: True, or a process group of torch. Every process then calls
            `wrap` with its own share of the data and gets the posterior of the whole; the first process's data choose
            what was left open. Processes never wait for each other unaskedly: by default a loader that visibly holds a
            share (a DistributedSampler) is an error; False takes the share for the whole. For chains of samplers every
            process gives all the data and runs some of the chains.

    Returns:
        A `BayesianModel`; `diagnose()` says what was chosen.

    Raises:
        BayesDLError: every error names what was given, what was expected and what to do.
    """
    chosen = resolve_method(method)
    family = resolve_likelihood(likelihood)
    models = _models(model)
    for name, given in (("data", data), ("validation", validation)):
        check_rereadable(name, given)
    if validation is not None and not chosen.trains:
        data = validation  # such methods use data only to choose an open noise or a temperature
    if prior is not None and not isinstance(prior, Prior):
        raise ArgumentError(f"prior={prior!r} was given; pass a bdl.GaussianPrior(precision=...)")
    if len(models) > 1 and chosen.name != "ensemble":
        raise ArgumentError(
            f'{len(models)} networks were given; method "{chosen.label}" takes one (only "ensemble" takes a list)'
        )
    if distributed and not chosen.distributed:
        raise ArgumentError(
            f'method "{chosen.label}" was given distributed=...; several processes together fit "laplace" only, or run '
            "the chains of SG-MCMC. Fit on one process, and load the saved model on the others"
        )
    group = resolve_group(distributed)
    selection = select if select is not None else chosen.select
    if isinstance(selection, Subnetwork) and not chosen.elementwise:
        raise UnsupportedError(
            f'method "{chosen.label}" selects whole parameters, not single elements of them; a subnetwork is for '
            'method "laplace"'
        )
    # a fit needs derivatives in any mode of the user's
    with _private_randomness(generator), torch.inference_mode(False):
        with together(group):
            example = first_inputs(data, resolve_adapter(batch)) if wants_last_layer(selection) else None
        with together(group):
            everything = "all" if selection is None else selection
            axis = family.output_axis
            network = Network(models[0], select=everything, batch=batch, example=example, output_axis=axis)
        if network.sharded:
            _check_streams(chosen)
            network.fingerprint()  # now that all processes are here: one of them may save the model
        if group is not None:
            same_network(group, network)
        start = time.perf_counter()
        held_out = validation is not None
        with network.session() if group is None else nullcontext():
            fitted = chosen.fit(Task(network, models, family, prior, data, generator, progress, distributed, held_out))
        seconds = time.perf_counter() - start
    result = fitted.network or network
    _unchanged(network)
    cost = (
        ("fit_seconds", seconds),
        ("parameters", float(fitted.posterior.num_uncertain(result))),
        ("forward_passes", fitted.posterior.forward_passes),
        *fitted.cost,
    )
    record = Record(chosen.label, cost, fitted.findings)
    kept = data if group is None else for_one_process(data)  # the first process alone reads it below
    bayes = BayesianModel(result, fitted.posterior, fitted.likelihood, record=record, fit_data=kept)
    sharing = chosen.prior_sharing if isinstance(chosen, (VBLL, StudentT)) else "output"
    return first_decides(group, bayes, lambda: _tuned(bayes, family, prior, sharing, validation, generator, progress))


def _tuned(
    bayes: BayesianModel,
    family: Likelihood,
    prior: Prior | None,
    sharing: str,
    validation: Iterable[Any] | None,
    generator: torch.Generator | None,
    progress: bool,
) -> BayesianModel:
    """Choose what the user left open, on held-out data if there are any; what was given explicitly stays as given."""
    over_prior = isinstance(bayes.posterior, GaussianPosterior) and bayes.posterior.predictive == "linearized"
    open_noise = isinstance(family, Gaussian) and family.noise is None
    if is_last_layer_regression(bayes):
        if validation is None or (prior is not None and not open_noise):
            return bayes
        keep = sharing if prior is None else "keep"
        return bayes.tune("heldout", validation, prior=keep, noise=open_noise, progress=progress)
    if validation is None:
        return _on_training_data(bayes, generator, progress) if over_prior and prior is None else bayes
    classifier = isinstance(bayes.posterior, LastLayerPosterior) and family.task in ("classification", "multilabel")
    if (over_prior and prior is None) or (open_noise and not over_prior) or (classifier and prior is None):
        return bayes.tune("heldout", validation, progress=progress)
    return bayes


def _on_training_data(bayes: BayesianModel, generator: torch.Generator | None, progress: bool) -> BayesianModel:
    with _private_randomness(generator):
        try:
            return bayes.tune("training", progress=progress)
        except (UnsupportedError, UnreachedParameterError, SelectionError) as error:  # by what is not selected
            found = Finding(
                "warning",
                f"the prior precision and the noise are those of the evidence, which often misleads: {error}",
                "pass validation=...",
            )
            return bayes.replaced(findings=(found,))


@contextmanager
def _private_randomness(generator: torch.Generator | None) -> Iterator[None]:
    """Iterating a shuffling loader would move the user's global state."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
        yield


def _check_streams(method: Method) -> None:
    if not method.streams:
        able = sorted({made.name for make in METHODS.values() if (made := make()).streams})
        raise UnsupportedError(
            f'the model is sharded over processes (FSDP2), and method "{method.label}" trains or samples whole '
            f"weights; {GATHER}. Sharded models are for {', '.join(able)}"
        )


def _models(model: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    models = (model,) if isinstance(model, nn.Module) else tuple(model) if isinstance(model, (list, tuple)) else ()
    if not models or not all(isinstance(m, nn.Module) for m in models):
        raise ArgumentError(f"a torch.nn.Module, or a list of them, is expected; got {type(model).__name__}")
    if isinstance(model, BayesianModel):
        raise ArgumentError("this model is Bayesian already; wrap the network it was made from")
    return tuple(unwrap(m) for m in models)


def _unchanged(network: Network) -> None:
    try:
        network.check_values()
    except StaleModelError as error:
        raise StaleModelError(
            "the network's parameters changed while it was being wrapped (another thread?)"
        ) from error
