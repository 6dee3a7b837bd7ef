"""What every method refuses, what a caller may do around it, and what the library never does."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesdl as bdl
from bayesdl import files
from bayesdl.errors import (
    ArgumentError,
    BayesDLError,
    LabelError,
    NonFiniteError,
    ShapeError,
    StaleModelError,
    UnknownNameError,
    UnsupportedError,
)
from bayesdl.methods import CHAINS
from bayesdl.model import BayesianModel
from tests.conformance.methods import (
    VARIANTS,
    close,
    every,
    fit,
    fitted,
    inputs,
    problem,
    same,
)

LAST_LAYERS = {"vbll", "vbll-full", "student-t"}  # beliefs about one layer, whatever was selected


@every
def test_broken_data_is_named(task: str, label: str) -> None:
    given = problem(task)
    x, y = given.train[0]

    def attempt(*batches: tuple[Tensor, Any]) -> None:
        bdl.wrap(given.models(label), VARIANTS[label], list(batches), likelihood=given.likelihood, progress=False)

    broken = x.clone()
    broken[3] = torch.nan
    uses_data = not (task == "classification" and label in ("map", "ensemble", "dropout"))
    errors: list[tuple[type[BayesDLError], str, Callable[[], None]]] = [
        (NonFiniteError, "batch 1: the inputs hold NaN", lambda: attempt((x, y), (broken, y))),
        (ShapeError, r"batch 1: targets have shape \(5", lambda: attempt((x, y), (x, y[:5]))),
        (ArgumentError, "no batch", lambda: attempt()),
    ]
    if task == "classification":
        errors.append(
            (LabelError, r"target 7 at index \d+ is outside 0..2", lambda: attempt((x, y), (x, y + 7 - y[0])))
        )
    else:
        bad = y.clone()
        bad[2, 1] = torch.inf
        errors.append((NonFiniteError, r"batch 1: targets: .* \(2, 1\)", lambda: attempt((x, y), (x, bad))))
    for kind, message, action in errors:
        if uses_data:
            # a temperature is fitted on all held-out targets at once, which belong to no batch any more
            text = message.removeprefix("batch 1: ") if label == "temperature" and "targets" in message else message
            text = (
                text.replace(r"targets have shape \(5", r"targets have shape \(21") if label == "temperature" else text
            )
            with pytest.raises(kind, match=text):
                action()
    with pytest.raises(NonFiniteError, match="batch 1: the inputs hold NaN or infinity, the first at index"):
        fitted(task, label).predict([x, broken])
    with pytest.raises(ArgumentError, match="no batch"):
        fitted(task, label).predict([])
    if uses_data:
        with pytest.raises(ArgumentError, match=r"pass \[\(x, y\)\] or a DataLoader"):
            bdl.wrap(given.models(label), VARIANTS[label], x, likelihood=given.likelihood)
    assert same(fitted(task, label).predict(x), fitted(task, label)(x))


@every
def test_data_that_is_no_loader(task: str, label: str) -> None:
    given = problem(task)
    with pytest.raises(ArgumentError, match="can be read once; pass a DataLoader or a list"):
        bdl.wrap(given.models(label), VARIANTS[label], iter(given.train), likelihood=given.likelihood)
    dataset = TensorDataset(*given.train[0])
    for use in (
        lambda: fitted(task, label).predict(dataset),
        lambda: bdl.wrap(given.models(label), VARIANTS[label], dataset, likelihood=given.likelihood),
    ):
        with pytest.raises(ArgumentError, match=r"data set \(TensorDataset\) of single examples"):
            use()


@every
def test_missing_data(task: str, label: str) -> None:
    given = problem(task)
    needs = (
        label in ("temperature", "swag", "vbll", "vbll-full", "student-t", "nuts", "smc", *CHAINS)
        or label.startswith("laplace")
        or task == "regression"
    )
    if needs:
        with pytest.raises(ArgumentError, match="needs data|no data to choose it from"):
            bdl.wrap(given.models(label), VARIANTS[label], likelihood=given.likelihood)
    else:
        pred = bdl.wrap(given.models(label), VARIANTS[label], likelihood=given.likelihood)(inputs(task))
        assert bool(torch.isfinite(pred.mean).all())


@every
def test_given_noise_is_kept(task: str, label: str) -> None:
    if label == "student-t":  # which is there to infer it
        with pytest.raises(ArgumentError, match="infers the noise"):
            fit(task, label, likelihood=bdl.Gaussian(noise=[0.4, 0.7]))
    elif task == "regression":
        bayes = fit(task, label, likelihood=bdl.Gaussian(noise=[0.4, 0.7]))
        assert bayes.likelihood.config() == {"noise": [0.4, 0.7]}
        assert not any("noise" in finding.text for finding in bayes.record.findings)
    else:
        assert fitted(task, label).likelihood == bdl.Categorical()


@every
def test_outputs_that_do_not_fit_the_likelihood(task: str, label: str) -> None:
    given = problem(task)
    one = nn.Sequential(nn.Flatten(), nn.LazyLinear(1), nn.Dropout(0.1))
    one(given.train[0][0])
    networks = [one, one] if label == "ensemble" else one
    error = UnsupportedError if label == "student-t" else ShapeError
    with pytest.raises(error, match='use likelihood="bernoulli"|use likelihood="gaussian", or method "vbll"'):
        wrapped = bdl.wrap(networks, VARIANTS[label], given.train, likelihood="categorical", progress=False)
        wrapped(given.train[0][0])


@every
def test_training_on_makes_the_wrapper_stale(task: str, label: str) -> None:
    import copy

    given = problem(task)
    networks = [copy.deepcopy(n) for n in given.networks]
    models = networks if label == "ensemble" else networks[0]
    bayes = bdl.wrap(models, VARIANTS[label], given.train, likelihood=given.likelihood, progress=False)
    functions = bayes.draw(1)
    with torch.no_grad():
        next(networks[0].parameters()).mul_(0.5)
    x = inputs(task)
    uses: list[Callable[[], Any]] = [
        lambda: bayes(x),
        lambda: bayes.predict([x]),
        lambda: functions[0](x),
        lambda: bayes.draw(1),
        lambda: bayes.to(torch.float64),
        lambda: bayes.tune("heldout", given.held_out),
    ]
    for use in uses:
        with pytest.raises(StaleModelError, match="Wrap the model again, or train a copy"):
            use()


@every
def test_an_empty_batch_says_so(task: str, label: str) -> None:
    with pytest.raises(ShapeError, match="the batch is empty"):
        fitted(task, label)(inputs(task)[:0])


@every
def test_wrong_dimension_of_the_inputs_is_an_error(task: str, label: str) -> None:
    with pytest.raises((RuntimeError, BayesDLError)):
        fitted(task, label)(torch.zeros(4, 5))


@every
def test_the_wrapper_owns_no_parameters_of_the_user(task: str, label: str) -> None:
    bayes = fitted(task, label)
    assert list(bayes.parameters()) == [] and bayes.state_dict() == {}
    assert bayes.cost["fit_seconds"] >= 0
    assert bayes.cost["forward_passes"] == bayes.posterior.forward_passes >= 1
    net = problem(task).networks[0]
    # a belief about a last layer is about its parameters alone
    layer = [m for m in net.modules() if isinstance(m, nn.Linear)][-1] if label in LAST_LAYERS else net
    uncertain = sum(p.numel() for p in layer.parameters())
    assert bayes.cost["parameters"] == (uncertain if bayes.posterior.over_weights else 0)


@every
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_the_caller_do_not_matter(task: str, label: str, mode: Any) -> None:
    given, x = problem(task), inputs(task)
    expected = fit(task, label)
    with mode():  # a new fit, its first prediction, a move and a tuning: all make tensors that are used later
        bayes = fit(task, label)
        assert same(bayes(x), expected(x))
        tuned = bayes.tune("heldout", given.held_out)
        wide = fit(task, label).double()
    assert same(bayes(x), expected(x))
    assert same(tuned(x), expected.tune("heldout", given.held_out)(x))
    assert close(wide(x), expected(x), 1e-4)
    leaf = x.clone().requires_grad_()
    tuned(leaf).mean.square().sum().backward()
    assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) and float(leaf.grad.abs().max()) > 0


FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in Path(files.__file__).parent.rglob("*.py"):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_in_the_library_pickles() -> None:
    loads = 0
    for path, tree in _sources():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                # the one name that reading checkpoints safely needs
                names += [] if [a.name for a in node.names] == ["UnpicklingError"] else [node.module or ""]
            assert not {n.split(".")[0] for n in names} & FORBIDDEN, path
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call in ("torch.load", "torch.save", "np.load", "numpy.load"):
                loads += 1
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}  # type: ignore[union-attr]
                safe = {"torch.load": ("weights_only", "True"), "torch.save": ("", "")}
                name, value = safe.get(call, ("allow_pickle", "False"))
                assert options.get(name) == value, path
    assert loads > 0  # the scan sees what it looks for


def test_what_wrap_refuses() -> None:
    net, data = problem("classification").networks[0], problem("classification").train
    for model, message in ((lambda x: x, "got function"), ([], "got list"), ([net, 3], "got list")):
        with pytest.raises(ArgumentError, match=message):
            bdl.wrap(model, "map", likelihood="categorical")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match='2 networks were given; method "map" takes one'):
        bdl.wrap([net, net], "map", likelihood="categorical")
    with pytest.raises(ArgumentError, match="Bayesian already"):
        bdl.wrap(fitted("classification", "map"), "map", likelihood="categorical")
    with pytest.raises(
        UnknownNameError, match=r"'bayes' is not known; choose one of \['baoab', 'bayesvlm', 'cyclical'"
    ):
        bdl.wrap(net, "bayes", likelihood="categorical")
    with pytest.raises(ArgumentError, match="method=3 was given"):
        bdl.wrap(net, 3, likelihood="categorical")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="prior=1.0 was given; pass a bdl.GaussianPrior"):
        bdl.wrap(net, "laplace", data, likelihood="categorical", prior=1.0)  # type: ignore[arg-type]
    assert bdl.wrap(net, bdl.MAP, likelihood="categorical").method_name == "map"  # type: ignore[arg-type]


def test_an_object_that_is_not_fitted() -> None:
    with pytest.raises(ArgumentError, match="posterior is MAP; expected a fitted posterior. Call bdl.wrap"):
        BayesianModel(problem("classification").networks[0], bdl.MAP(), "categorical")  # type: ignore[arg-type]


def test_targets_in_some_batches_only() -> None:
    (x, y), (x2, _), *_ = problem("classification").train
    with pytest.raises(ArgumentError, match="1 of 2 batches hold a target"):
        fitted("classification", "map").predict([(x, y), x2])
