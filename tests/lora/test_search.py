"""The search for a scale on curves of known crossing, and on a network with its loss computed again by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, UnknownNameError, UnsupportedError
from bayesdl.lora.anchors import gather
from bayesdl.lora.losses import Losses
from bayesdl.lora.search import Curve, Level, largest_passing, least
from bayesdl.posteriors.lora import AdapterPosterior
from tests.lora.networks import adapted, batch
from tests.untouched import untouched

pytest.importorskip("peft")
BOUNDS = (1e-4, 1e-1)


def pilots(curve: Curve | None, *more: Curve) -> list[Level]:
    return [] if curve is None else [Level(curve), *map(Level, more)]


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("true", [2e-4, 5.5e-4, 0.013, 0.09])
@pytest.mark.parametrize("pilot", [None, 0.3, 1.0, 5.0])
def test_the_largest_passing_scale(power: int, true: float, pilot: float | None) -> None:
    def curve(sigma: float) -> float:
        return 0.003 * (sigma / true) ** power

    guide = None if pilot is None else lambda sigma: pilot * curve(sigma)
    found = largest_passing(Level(curve), 0.003, BOUNDS, 0.02, pilots(guide))
    assert found.status == "found" and found.monotone
    assert true / (1.02 * (1 + 1e-9)) <= found.sigma <= true  # never one that fails
    assert found.change == curve(found.sigma) <= 0.003
    assert [probe.sigma for probe in found.curve] == sorted({probe.sigma for probe in found.curve})
    assert all(probe.passed is (curve(probe.sigma) <= 0.003) for probe in found.curve)
    failing = [probe.sigma for probe in found.curve if not probe.passed]
    assert min(failing) / found.sigma <= 1.02 * (1 + 1e-9)


@pytest.mark.parametrize("true", [2e-4, 0.013, 0.09])
@pytest.mark.parametrize("wrong", [0.5, 0.9, 1.0, 1.3, 4.0, math.inf])
def test_a_forecast_costs_nothing_and_is_not_believed(true: float, wrong: float) -> None:
    probed = []

    def curve(sigma: float) -> float:
        probed.append(sigma)
        return 0.003 * (sigma / true) ** 1.7

    level = Level(curve, lambda sigma: wrong * 0.003 * (sigma / true) ** 1.7)
    found = largest_passing(level, 0.003, BOUNDS, 0.02)
    assert true / (1.02 * (1 + 1e-9)) <= found.sigma <= true
    assert sorted(probed) == [probe.sigma for probe in found.curve]  # each scale once
    if wrong == 1.0:  # the start, the crossing, and its other side; then the guards
        assert len(found.curve) <= 3 + 3


@pytest.mark.parametrize("error", [0.85, 0.99, 1.01, 1.15])
def test_pilots_leave_three_probes(error: float) -> None:
    # forecasts as exact as those of a network are after two runs, and within 3% after one, whatever the pilots' error
    calls = []

    def curve(sigma: float) -> float:
        return 0.003 * (sigma / 0.008) ** 1.7

    def counted(sigma: float) -> float:
        calls.append(sigma)
        return curve(sigma)

    def forecast(sigma: float) -> float:
        return curve(sigma) * (1.0 if len(calls) > 1 else 1.03)

    def guide(sigma: float) -> float:
        return curve(sigma * error)

    found = largest_passing(Level(counted, forecast), 0.003, BOUNDS, 0.02, pilots(guide, guide))
    assert found.status == "found" and 0.008 / 1.0201 <= found.sigma <= 0.008 and len(calls) <= 3


@pytest.mark.parametrize("pilot", [None, lambda sigma: 0.1, lambda sigma: sigma])
def test_cap_and_floor(pilot: Callable[[float], float] | None) -> None:
    cap = largest_passing(Level(lambda sigma: 1e-3 * sigma), 0.003, BOUNDS, 0.02, pilots(pilot))
    assert (cap.sigma, cap.status) == (0.1, "cap")
    floor = largest_passing(Level(lambda sigma: 1.0), 0.003, BOUNDS, 0.02, pilots(pilot))
    assert (floor.sigma, floor.status) == (0.0, "floor")
    flat = largest_passing(Level(lambda sigma: 0.0), 0.0, BOUNDS, 0.02, pilots(pilot))
    assert flat.status == "cap"


def test_steps_need_no_slope() -> None:
    found = largest_passing(Level(lambda sigma: float(sigma > 0.0123)), 0.01, BOUNDS, 0.02)
    assert 0.0123 / 1.02 <= found.sigma <= 0.0123


def test_the_guard_finds_the_lower_crossing() -> None:
    def bumped(sigma: float) -> float:  # fails in [0.004, 0.008], passes to 0.02, fails behind
        return 1.0 if 0.004 <= sigma <= 0.008 or sigma > 0.02 else 0.0

    found = largest_passing(Level(bumped), 0.5, BOUNDS, 0.02)
    assert 0.004 / 1.02 <= found.sigma < 0.004 and not found.monotone


def test_arguments() -> None:
    for bounds, tolerance, resolution in (((0.0, 1.0), 1.0, 0.1), ((1.0, 0.5), 1.0, 0.1), (BOUNDS, -1.0, 0.1)):
        with pytest.raises(ArgumentError, match="expected 0 < low < high"):
            largest_passing(Level(lambda s: s), tolerance, bounds, resolution)
    with pytest.raises(ArgumentError, match="resolution=0"):
        largest_passing(Level(lambda s: s), 1.0, BOUNDS, 0)


def test_golden_section() -> None:
    seen = least(lambda sigma: (math.log(max(sigma, 1e-9)) - math.log(0.01)) ** 2, BOUNDS, 0.02)
    assert min(seen, key=seen.__getitem__) == pytest.approx(0.01, rel=0.02)
    assert {0.0, *BOUNDS} <= set(seen)


def test_the_least_loss_by_a_forecast() -> None:
    probed = []

    def loss(sigma: float) -> float:
        probed.append(sigma)
        return true(sigma)

    def true(sigma: float) -> float:
        return (math.log(max(sigma, 1e-9)) - math.log(0.01)) ** 2

    seen = least(loss, BOUNDS, 0.02, true)
    assert min(seen, key=seen.__getitem__) == pytest.approx(0.01, rel=0.02)
    assert sorted(probed) == sorted(seen) and 0.0 in seen and len(seen) <= 3
    probed.clear()
    seen = least(loss, BOUNDS, 0.02, lambda sigma: abs(math.log(sigma / BOUNDS[0]) - 0.3 * len(probed)))  # wanders
    assert min(seen, key=seen.__getitem__) == pytest.approx(0.01, rel=0.02)  # the golden section then
    for end in BOUNDS:
        seen = least(lambda sigma, end=end: abs(math.log(max(sigma, 1e-9) / end)), BOUNDS, 0.02, lambda s: s)
        assert set(seen) > {0.0}


DATA = [batch(16, seed=seed) for seed in range(10)]


def searched(model: Any, data: Any = DATA, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"num_samples": 4, "anchors": 160, **options})
    return bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False)


def loss(bayes: bdl.BayesianModel, batches: list[dict[str, Tensor]], metric: str = "nll") -> tuple[float, float]:
    """The mean loss of the model and of its network alone at the network's own answers, in float64, one by one."""
    noisy, plain = [], []
    for inputs in batches:
        own = bayes.network(inputs).double().log_softmax(-1)
        target = own.argmax(-1, keepdim=True)
        draws = torch.stack([f(inputs).double().log_softmax(-1) for f in bayes.draw(4)])
        if metric == "flip":
            noisy += (draws.exp().mean(0).argmax(-1) != target[:, 0]).double().tolist()
            plain += [0.0] * len(target)
        else:
            chosen = draws.gather(-1, target.expand(4, -1, -1))[..., 0]
            noisy += (-chosen.mean(0) if metric == "gibbs" else -chosen.exp().mean(0).log()).tolist()
            plain += (-own.gather(-1, target)[:, 0]).tolist()
    return sum(noisy) / len(noisy), sum(plain) / len(plain)


@pytest.mark.parametrize("metric", ["nll", "gibbs", "flip", "nll-relative"])
def test_the_reported_change_is_that_of_the_anchors(metric: str) -> None:
    model = adapted("llama", blocks=1)
    with untouched(model):
        bayes = searched(model, metric=metric, tolerance=0.01)
    report = bdl.lora.search_report(bayes)
    assert report.status == "found" and report.anchors == 160 and report.labels == "pseudo"
    noisy, plain = loss(bayes, DATA, metric)
    change = abs(noisy - plain) / (max(plain, 0.01) if metric == "nll-relative" else 1.0)
    assert report.change == pytest.approx(change, abs=1e-6) and change <= 0.01
    assert report.sigma == bayes.posterior.sigma > 0  # type: ignore[union-attr]
    above = [probe for probe in report.curve if probe.sigma > report.sigma]
    assert not above[0].passed and above[0].sigma / report.sigma <= 1.0201
    assert report.relative[0][1] > 0 and report.seconds > 0 and report.passes > 4
    assert "sigma" in str(bayes.diagnose()) and "passed" in str(report)


@pytest.mark.parametrize("metric", ["nll", "gibbs", "nll-relative"])
def test_a_forecast_is_that_of_the_outputs(metric: str) -> None:
    # the oracle is the run itself: between and around two scales that were run the outputs follow a parabola
    model = adapted("llama", blocks=2)
    bayes = searched(model, sigma=0.01)
    posterior = bayes.posterior
    assert isinstance(posterior, AdapterPosterior)
    every = gather(bayes.network, bayes.likelihood, DATA, 160, "auto")
    few, some = (Losses(bayes.network, posterior, bayes.likelihood, metric, every.every(n)) for n in (4, 4))
    whole = Losses(bayes.network, posterior, bayes.likelihood, metric, every, below=few)
    alone = Losses(bayes.network, posterior, bayes.likelihood, metric, every)
    few.change(0.02, True), whole.change(0.03, True), alone.change(0.03, True), some.change(0.03, True)
    assert some.change(0.02, True) == few.change(0.02, True)
    forwards = whole.forwards
    assert forwards == 160 * 4
    helped, straight = whole.foreseen_change(0.024, True), alone.foreseen_change(0.024, True)
    assert few.foreseen_change(0.03, True) == pytest.approx(
        some.change(0.03, True), rel=1e-5
    )  # rows of the whole's run
    assert whole.foreseen_change(0.03, True) == pytest.approx(whole.change(0.03, True), rel=1e-5)
    whole.change(0.02, True)
    true = alone.change(0.024, True)
    assert whole.foreseen_change(0.024, True) == pytest.approx(true, rel=0.01)
    assert abs(helped - true) < 0.75 * abs(straight - true)  # the few told the line's error


def test_a_search_of_500_anchors_takes_40_passes_or_fewer() -> None:
    data = [batch(50, seed=seed) for seed in range(10)]
    model = adapted("bert", blocks=2)
    report = bdl.lora.search_report(searched(model, data, num_samples=10, anchors=500))
    assert report.status == "found" and len(report.curve) <= 3 and report.passes <= 40


def test_the_search_repeats_itself() -> None:
    model = adapted("llama", blocks=1)
    sigmas = {bdl.lora.search_report(searched(model)).sigma for _ in range(2)}
    assert len(sigmas) == 1
    doubled = [copy for inputs in DATA for copy in (inputs, inputs)]
    twice = bdl.lora.search_report(searched(model, doubled, anchors=320))
    assert twice.sigma == pytest.approx(sigmas.pop(), rel=0.0201)  # the mean, not the sum, over anchors


@pytest.mark.parametrize("metric", ["nll", "gibbs", "nll-relative", "flip"])
def test_the_loss_is_a_mean_over_anchors(metric: str) -> None:
    bayes = searched(adapted("llama", blocks=1), sigma=0.01)
    posterior = bayes.posterior
    assert isinstance(posterior, AdapterPosterior)
    once, twice = (
        Losses(
            bayes.network,
            posterior,
            bayes.likelihood,
            metric,
            gather(bayes.network, bayes.likelihood, data, 999, "auto"),
        )
        for data in (DATA[:4], [*DATA[:4], *DATA[:4]])
    )
    assert twice.anchors.count == 2 * once.anchors.count
    assert once.change(0.0, True) == 0.0
    assert twice.change(0.05, True) == pytest.approx(once.change(0.05, True), rel=1e-9)
    assert once.change(0.05, True) > 0.0
    # whatever pilots a search of more anchors takes, it ends within the resolution of the same crossing
    if metric == "nll":
        found = [bdl.lora.search_report(searched(adapted("llama", blocks=1), data, anchors=999)).sigma
                 for data in (DATA[:4], [*DATA[:4], *DATA[:4]])]  # fmt: skip
        assert found[1] == pytest.approx(found[0], rel=0.021)


def test_anchors_are_the_first_examples() -> None:
    model = adapted("llama", blocks=1)
    some = searched(model, anchors=40)
    assert bdl.lora.search_report(some).anchors == 40
    first = [*DATA[:2], {key: value[:8] for key, value in DATA[2].items()}]
    assert bdl.lora.search_report(searched(model, first)).sigma == bdl.lora.search_report(some).sigma


def test_labels() -> None:
    model = adapted("llama", blocks=1)
    labelled = [batch(16, seed=seed, labels=True) for seed in range(3)]
    assert bdl.lora.search_report(searched(model, labelled)).labels == "given"
    assert bdl.lora.search_report(searched(model, labelled, labels="pseudo")).labels == "pseudo"
    with pytest.raises(ArgumentError, match="holds no labels"):
        searched(model, labels="given")
    with pytest.raises(UnknownNameError, match="labels='none'"):
        searched(model, labels="none")
    with pytest.raises(UnknownNameError, match="metric='luck'"):
        searched(model, metric="luck")


def test_a_metric_of_ones_own() -> None:
    model = adapted("llama", blocks=1)

    def spread(outputs: Tensor, plain: Tensor, y: Tensor) -> Tensor:
        assert outputs.shape[1:] == plain.shape and y.shape == plain.shape[:1]
        return (outputs - plain).square().mean((0, 2)).sqrt()

    report = bdl.lora.search_report(searched(model, metric=spread, tolerance=0.05))
    assert report.status == "found" and report.metric == "custom"
    with pytest.raises(bdl.errors.ShapeError, match="one number per anchor"):
        searched(model, metric=lambda outputs, plain, y: outputs.mean())


def test_warnings_name_cap_and_floor() -> None:
    model = adapted("llama", blocks=1)
    with pytest.warns(UserWarning, match="never reached"):
        cap = searched(model, sigma_range=(1e-5, 1e-4))
    with pytest.warns(UserWarning, match="sigma is 0"):
        floor = searched(model, sigma_range=(0.3, 0.5))
    assert cap.posterior.sigma == 1e-4 and floor.posterior.sigma == 0.0  # type: ignore[union-attr]
    assert len(cap.diagnose().warnings) == len(floor.diagnose().warnings) == 1
    assert floor(DATA[0]).epistemic.abs().max() < 1e-6


def test_nan_names_scale_and_batch() -> None:
    def broken(outputs: Tensor, plain: Tensor, y: Tensor) -> Tensor:
        return torch.full((len(y),), float("nan"))

    with pytest.raises(NonFiniteError, match="sigma 0, batch 0"):
        searched(adapted("llama", blocks=1), metric=broken)


def test_tuning_returns_new_models() -> None:
    model = adapted("llama", blocks=1)
    bayes = searched(model)
    wider = bayes.tune("tolerance", tolerance=0.02)
    assert bdl.lora.search_report(wider).sigma > bdl.lora.search_report(bayes).sigma
    again = wider.tune("tolerance", DATA, tolerance=0.003)
    assert bdl.lora.search_report(again).sigma == bdl.lora.search_report(bayes).sigma
    with pytest.raises(ArgumentError, match="option 'epochs'"):
        bayes.tune("tolerance", epochs=3)
    labelled = [batch(16, seed=seed, labels=True) for seed in range(3)]

    def nll(candidate: bdl.BayesianModel) -> float:
        pred, targets = candidate.predict_with_targets(labelled)
        assert targets is not None
        return -float(pred.log_prob(targets).mean())

    held_out = bayes.tune("heldout", labelled, sigma_range=(1e-4, 0.1))
    assert held_out is not bayes and bayes.posterior.sigma == bdl.lora.search_report(bayes).sigma  # type: ignore[union-attr]
    assert nll(held_out) <= nll(bayes) + 1e-6
    report = bdl.lora.search_report(held_out)
    assert report.status == "heldout" and min(p.change for p in report.curve) == report.change
    assert report.passes < 1 + 4 * 8  # a handful of probes of four draws
    ended = bayes.tune("heldout", labelled, sigma_range=(1e-5, 1e-4))
    assert ("upper end" in str(ended.diagnose())) == (ended.posterior.sigma > 0.95e-4)  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="no targets"):
        bayes.tune("heldout", DATA)


def test_held_out_data_widen_the_range_of_a_search() -> None:
    labelled = [batch(16, seed=seed, labels=True) for seed in range(3)]
    bayes = searched(adapted("llama", blocks=1))  # whose range ends at 0.1
    free, wide = bayes.tune("heldout", labelled), bayes.tune("heldout", labelled, sigma_range=(1e-4, 1e3))
    targets = torch.cat([part["labels"] for part in labelled])
    losses = [-float(found.predict(labelled).log_prob(targets).mean()) for found in (bayes, free, wide)]
    assert free.posterior.sigma > 0.2 and losses[1] < losses[0] - 1e-3  # type: ignore[union-attr]
    assert losses[1] == pytest.approx(losses[2], abs=2e-3)
    assert "upper end" not in str(free.diagnose())


def test_it_has_neither_prior_nor_evidence() -> None:
    model = adapted("llama", blocks=1)
    with pytest.raises(UnsupportedError, match="no prior"):
        bdl.wrap(model, bdl.TFB(sigma=0.1), likelihood="categorical", prior=bdl.GaussianPrior(1.0))
    bayes = searched(model, sigma=0.1)
    with pytest.raises(UnsupportedError, match="has no log_evidence"):
        bayes.log_evidence()
    with pytest.raises(UnsupportedError, match="no posterior over adapters"):
        bdl.lora.search_report(bdl.wrap(model, "map", likelihood="categorical", batch="huggingface"))


def test_causal_anchors_skip_ignored_positions() -> None:
    model = adapted("llama", blocks=1, causal=True)
    data = [batch(8, seed=1, labels=False)]
    data[0]["labels"] = data[0]["input_ids"].roll(-1, 1).clone()
    data[0]["labels"][:, -1] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bdl.lora.search_report(searched(model, data))
    cut = [{**data[0], "labels": torch.where(data[0]["labels"] == -100, -100, data[0]["labels"])}]
    assert report.sigma == bdl.lora.search_report(searched(model, cut)).sigma
