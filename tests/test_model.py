"""BayesianModel as an nn.Module and a value: copies, threads, nesting."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.model import BayesianModel, Record
from bayesdl.network import Network
from bayesdl.posteriors import PointPosterior, SamplePosterior
from tests.conformance.methods import VARIANTS, fit, inputs, problem, same
from tests.untouched import untouched

X = inputs("classification")
LABELS = sorted(set(VARIANTS) - {"student-t"})  # which is for regression alone


@pytest.mark.parametrize("label", LABELS)
def test_many_threads_give_one_answer(label: str) -> None:
    bayes = fit("classification", label)
    expected = bayes(X)
    answers: list[bool] = []

    def work() -> None:
        answers.extend(same(bayes(X), expected) for _ in range(4))

    with untouched(*problem("classification").networks):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [True] * 16


@pytest.mark.parametrize("label", LABELS)
def test_deep_copies_are_independent(label: str) -> None:
    bayes = fit("classification", label)
    expected = bayes(X)
    twin = copy.deepcopy(bayes)
    twin.double()
    assert same(bayes(X), expected)
    assert torch.allclose(twin(X).mean.float(), expected.mean, atol=1e-4)


def test_a_part_of_a_larger_module_moves_with_it() -> None:
    bayes = fit("classification", "laplace")
    outer = nn.Sequential(nn.Linear(2, 2), bayes)
    assert outer.double()[1] is bayes and bayes(X).mean.dtype is torch.float64
    assert {name for name, _ in outer.named_parameters()} == {"0.weight", "0.bias"}


def test_training_mode_changes_nothing() -> None:
    bayes = fit("classification", "swag")
    expected = bayes(X)
    bayes.train()
    assert same(bayes(X), expected)
    bayes.requires_grad_(True)
    assert same(bayes(X), expected)


def test_models_made_by_hand() -> None:
    net = problem("classification").networks[0]
    expected = fit("classification", "map")(X)
    for made in (net, Network(net)):
        bayes = BayesianModel(made, PointPosterior(), "categorical")
        assert same(bayes(X), expected)
        assert bayes.method_name == "custom" and bayes.cost == {}
    with pytest.raises(UnknownNameError, match="likelihood 'softmax' is not known"):
        BayesianModel(net, PointPosterior(), "softmax")
    with pytest.raises(ArgumentError, match="posterior is NoneType"):
        BayesianModel(net, None, "categorical")  # type: ignore[arg-type]


def test_samples_of_some_parameters_leave_the_others() -> None:
    net = problem("classification").networks[0]
    weight = net[6].weight.detach()
    posterior = SamplePosterior.from_states([{"6.weight": weight * k} for k in (0.5, 1.0, 1.5)])
    bayes = BayesianModel(net, posterior, "categorical")
    hidden = nn.Sequential(*list(copy.deepcopy(net).eval())[:6])(X).detach()
    logits = torch.stack([hidden @ weight.T * k + net[6].bias.detach() for k in (0.5, 1.0, 1.5)])
    assert torch.allclose(bayes(X).probs, torch.softmax(logits, -1).mean(0), atol=1e-6)


def test_records() -> None:
    bayes = fit("classification", "laplace")
    assert bayes.method_name == "laplace"
    assert bayes.cost["fit_seconds"] > 0
    exchanged = bayes.replaced(likelihood=bdl.Categorical(link="mc"))
    assert exchanged.likelihood == bdl.Categorical(link="mc") and bayes.likelihood == bdl.Categorical()
    assert exchanged.record == bayes.record
    assert Record() == Record("custom", (), ())


def test_posteriors_share_no_memory_with_members() -> None:
    nets = [copy.deepcopy(net) for net in problem("classification").networks]
    bayes = bdl.wrap(nets, "ensemble", likelihood="categorical")
    assert isinstance(bayes.posterior, SamplePosterior)
    held = {value.data_ptr() for value in bayes.posterior.tensors().values()}
    assert not held & {p.data_ptr() for net in nets for p in net.parameters()}


class Callback:
    """What hooks of a profiler or a logger do: count."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("label", ["map", "laplace", "swag", "dropout"])
def test_hooks_of_the_user_stay_and_are_not_multiplied(label: str) -> None:
    net = copy.deepcopy(problem("classification").networks[0])
    callback = Callback()
    net[0].register_forward_hook(callback)
    bayes = bdl.wrap(net, VARIANTS[label], problem("classification").train, likelihood="categorical", progress=False)
    assert len(net[0]._forward_hooks) == 1
    passes = 4 if label == "dropout" else 3 if label == "swag" else 1
    for _ in range(2):
        before = callback.calls
        bayes(X)
        assert callback.calls - before <= passes
    before = callback.calls
    net.eval()(X)
    assert callback.calls == before + 1


def test_predictions_need_no_gradient_by_themselves() -> None:
    for label in LABELS:
        mean: Tensor = fit("classification", label)(X).mean
        assert not mean.requires_grad


def test_a_tensor_of_inputs_is_predicted_in_batches() -> None:
    bayes, x = fit("classification", "laplace"), torch.cat([X] * 200)
    assert torch.allclose(bayes.predict(x).mean, bayes(x).mean, atol=1e-6)
    assert torch.allclose(bayes.predict(x).epistemic, bayes(x).epistemic, atol=1e-6)


def test_a_description_names_the_parts() -> None:
    text = repr(fit("classification", "laplace"))
    assert "method='laplace', likelihood='categorical', posterior=GaussianPosterior, selected=" in text
