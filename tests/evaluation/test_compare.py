"""`compare` and `evaluate`: the right numbers in the right cells, honest tests, clear refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

import bayesdl
from bayesdl.errors import ArgumentError, LabelError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.evaluation.bootstrap import Resamples, resample
from bayesdl.evaluation.compare import compare, evaluate
from bayesdl.evaluation.metrics import METRICS, evaluate_metrics
from bayesdl.evaluation.ood import ood_metrics
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report
from bayesdl.evaluation.significance import holm
from bayesdl.latent import GaussianLatent
from tests.evaluation.made_up import classes, numbers

QUIET: dict[str, Any] = {"progress": False}


class StandIn:
    """What `compare` uses of a `BayesianModel`: softmax regression with a fixed weight."""

    method_name = "stand-in"
    device = torch.device("cpu")

    def __init__(self, weight: Tensor, temperature: float = 1.0) -> None:
        self.weight = weight
        self.cost = {"fit_seconds": 1.5, "forward_passes": 1.0, "parameters": float(weight.numel())}
        self.posterior = SimpleNamespace(temperature=torch.tensor(temperature))
        self.calls = 0

    def predict_with_targets(self, loader: Iterable[Any]) -> tuple[Any, Tensor | None]:
        self.calls += 1
        pairs = list(loader)
        mean = torch.cat([x for x, _ in pairs]) @ self.weight
        probs = mean.softmax(-1)
        entropy = -(probs * probs.log()).sum(-1)
        distribution = Categorical(probs=probs)
        predictive = SimpleNamespace(
            task="classification", distribution=distribution, mean=probs, probs=probs, variance=probs * (1 - probs),
            total=entropy, aleatoric=entropy, epistemic=torch.zeros_like(entropy), log_prob=distribution.log_prob,
            latent=GaussianLatent(mean=mean, covariance=None, variance=torch.zeros_like(mean)),
        )  # fmt: skip
        return predictive, torch.cat([y for _, y in pairs])

    def predict(self, loader: Iterable[Any]) -> Any:
        return self.predict_with_targets(loader)[0]


def loader(n: int = 200, *, seed: int = 0, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 50 of a problem on which the identity is a good weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator) * scale
    y = torch.multinomial((2 * x).softmax(-1), 1, generator=generator)[:, 0]
    return list(zip(x.split(50), y.split(50), strict=True))


def test_cells_are_the_metrics_of_the_predictions() -> None:
    methods = {"sharp": classes(300, sharpness=2.0), "right": classes(300, sharpness=1.0)}
    outside = {"sharp": classes(100, sharpness=0.5, seed=1), "right": classes(100, sharpness=0.3, seed=1)}
    rep = compare(methods, ood={"far": outside}, bootstrap=0, **QUIET)
    for row, predictions in methods.items():
        for key, value in evaluate_metrics(predictions).items():
            assert rep[row][key] == value
        for name, value in ood_metrics(predictions, outside[row], "epistemic").items():
            assert rep[row][f"ood/far/epistemic/{name}"] == value
        assert rep[row]["ood/far/auroc"] == rep[row]["ood/far/entropy/auroc"]
    assert rep.rows == ("sharp", "right")
    assert rep.details["sizes"] == {"test": 300, "ood/far": 100}
    with pytest.raises(UnsupportedError, match="no resamples"):
        rep.difference("sharp", "right", "nll")


def test_resamples_are_paired_across_rows_and_columns() -> None:
    sharp, right = classes(200, sharpness=2.0), classes(200, sharpness=1.0)
    generator = torch.Generator().manual_seed(5)
    rep = compare({"a": sharp, "b": right, "again": sharp}, bootstrap=50, generator=generator, **QUIET)
    resamples = Resamples.draw(200, 50, generator=torch.Generator().manual_seed(5))
    for position, predictions in enumerate((sharp, right, sharp)):
        expected = resample(predictions, ["nll", "aurc"], resamples)
        for key in ("nll", "aurc"):
            assert torch.equal(torch.from_numpy(rep.replicates[key][position]), expected[key])
    assert rep.details["seed"] == 5
    same = rep.difference("a", "again", "nll")
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_report_survives_json() -> None:
    methods = {"a": classes(60, sharpness=2.0), "b": classes(60, sharpness=1.0)}
    shift = {"blur": {"1": methods}}
    rep = compare(methods, ood={"far": {"a": classes(30, sharpness=0.2)}}, shift=shift, bootstrap=10, **QUIET)
    assert Report.from_json(rep.to_json()) == rep


def test_the_same_input_gives_the_same_report() -> None:
    methods = {"a": classes(150, sharpness=2.0), "b": classes(150, sharpness=1.0)}
    first, second = (compare(methods, bootstrap=30, **QUIET) for _ in range(2))
    assert first == second
    other = compare(methods, bootstrap=30, generator=torch.Generator().manual_seed(1), **QUIET)
    assert other.interval("a", "nll") != first.interval("a", "nll")


def test_a_clear_winner_is_marked_alone_and_its_rival_has_a_small_p() -> None:
    rep = compare({"good": numbers(400, scale=1.0), "bad": numbers(400, scale=4.0)}, bootstrap=200, **QUIET)
    assert rep.best("nll") == "good"
    assert rep.cell("good", "nll").best and not rep.cell("bad", "nll").best
    difference = rep.difference("bad", "good", "nll")
    # E[NLL(s)] = log s + 1/(2 s^2) + const, so bad - good = log 4 + 1/32 - 1/2 = 0.918 in expectation, sd 0.033
    assert difference.value == pytest.approx(0.918, abs=0.12)
    assert difference.low < 0.918 < difference.high
    assert difference.p == pytest.approx(2 / 201) and difference.adjusted == difference.p
    # the width is never ranked; the coverage aims at 0.9, which the right scale meets
    assert rep.best("mpiw_90") is None and rep.best("picp_90") == "good"


def test_equal_methods_are_both_marked() -> None:
    rep = compare({"one": classes(200, sharpness=1.0), "two": classes(200, sharpness=1.0)}, bootstrap=50, **QUIET)
    assert all(rep.cell(row, key).best for row in rep.rows for key in ("nll", "accuracy", "ece"))
    assert rep.cell("two", "nll").p == 1.0


def test_false_separation_stays_near_its_level() -> None:
    """Two exchangeable methods differ beyond 5 % in about 5 % of data sets.

    80 repeats: more than 12 false findings have probability 2e-4 at a true rate of 5 %.
    """
    found = 0
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randn(100, generator=generator)
        pair = [
            Predictions.from_gaussian(0.5 * torch.randn(100, generator=generator), torch.ones(100), y) for _ in range(2)
        ]
        rep = compare(dict(zip("ab", pair, strict=True)), metrics=["nll"], bootstrap=100, **QUIET)
        found += not all(rep.cell(row, "nll").best for row in "ab")
    assert found <= 12


def test_calibration_error_carries_what_chance_gives() -> None:
    rep = compare({"right": classes(500, sharpness=1.0, members=1), "sharp": classes(500, sharpness=3.0)}, **QUIET)
    right, sharp = rep.cell("right", "ece"), rep.cell("sharp", "ece")
    assert right.expected is not None and right.expected_high is not None and sharp.expected_high is not None
    assert 0 < right.expected < right.expected_high
    assert right.value is not None and right.value <= right.expected_high and right.low == 0.0
    assert sharp.value is not None and sharp.value > sharp.expected_high and sharp.low is not None and sharp.low > 0
    assert rep.details["methods"]["sharp"]["confidence_gap"] > 0.05
    assert any("sharp" in line and "over-confident" in line for line in rep.summary())


def test_too_few_resamples_make_no_test_and_say_so() -> None:
    """The smallest p of R resamples is 2/(R + 1); two methods need 39, three 79."""
    methods = {name: numbers(60, scale=scale) for name, scale in (("a", 1.0), ("b", 3.0), ("c", 9.0))}
    few = compare(methods, bootstrap=78, **QUIET)
    assert all(few.cell(row, "nll").p is None for row in methods)
    assert [few.cell(row, "nll").best for row in methods] == [True, False, False]
    assert any("give bootstrap = 79 or more" in note for note in few.details["notes"])
    assert "No test was made" in few.summary()[0]
    enough = compare(methods, bootstrap=79, **QUIET)
    assert enough.cell("b", "nll").p == pytest.approx(0.05)
    assert not any("No test was made" in note for note in enough.details["notes"])


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 times 3 2 1, made monotone: .03 .04 .04
    assert holm({"a": 0.02, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_shift_is_listed_by_severity_and_averaged() -> None:
    methods = {"a": classes(120, sharpness=1.0), "b": classes(120, sharpness=2.0)}
    worse = [{"a": classes(120, sharpness=s), "b": classes(120, sharpness=2 * s)} for s in (2.0, 3.0)]
    rep = compare(methods, shift={"blur": {"1": worse[0], "5": worse[1]}}, bootstrap=20, **QUIET)
    values = [rep["b"][f"shift/blur/{severity}/nll"] for severity in ("1", "5")]
    assert values == [evaluate_metrics(level["b"], ["nll"])["nll"] for level in worse]
    assert rep["b"]["shift/blur/nll"] == pytest.approx(sum(values) / 2)
    assert rep.details["shift"] == {"blur": ["1", "5"]}
    assert not math.isnan(rep.interval("b", "shift/blur/5/nll")[0])
    assert [c.key for c in rep.headline("shift")] == ["shift/blur/nll", "shift/blur/accuracy", "shift/blur/ece"]
    by_number = compare(methods, shift={"blur": worse}, bootstrap=0, **QUIET)
    assert by_number["a"]["shift/blur/2/ece"] == rep["a"]["shift/blur/5/ece"]


def test_several_shifts_have_means_and_an_error_that_says_it_is_not_normalised() -> None:
    methods = {"a": classes(120, sharpness=1.0), "b": classes(120, sharpness=2.0)}

    def made(shift: float) -> dict[str, Predictions]:
        return {"a": classes(120, sharpness=1.0, shift=shift), "b": classes(120, sharpness=2.0, shift=shift)}

    shift = {"blur": {"1": made(0.2), "5": made(0.7)}, "fog": {"1": made(0.4), "3": made(0.5), "5": made(0.9)}}
    rep = compare(methods, shift=shift, bootstrap=50, **QUIET)
    for row in methods:
        for metric in ("nll", "accuracy", "ece"):
            value = {
                key: rep[row][f"shift/{key}/{metric}"] for key in ("blur", "fog", "blur/1", "fog/1", "all", "all/1")
            }
            assert value["all"] == pytest.approx((value["blur"] + value["fog"]) / 2)
            assert value["all/1"] == pytest.approx((value["blur/1"] + value["fog/1"]) / 2)
        assert rep[row]["shift/all/error"] == 1 - rep[row]["shift/all/accuracy"]
        low, high = rep.interval(row, "shift/all/error")
        assert (1 - high, 1 - low) == pytest.approx(rep.interval(row, "shift/all/accuracy"))
        assert low <= rep[row]["shift/all/error"] <= high
    assert "shift/all/5/nll" in rep.columns and "shift/all/3/nll" not in rep.columns
    column = rep.column("shift/all/error")
    assert column.label == "Mean corruption error (unnormalised)" and column.direction == "min"
    assert rep.best("shift/all/error") == rep.best("shift/all/accuracy")
    difference = rep.difference("b", "a", "shift/all/error")
    assert difference.p == rep.difference("b", "a", "shift/all/accuracy").p
    assert "shift/all/nll" not in compare(methods, shift={"blur": shift["blur"]}, bootstrap=0, **QUIET).columns
    with pytest.raises(ArgumentError, match="'all' names the mean"):
        compare(methods, shift={"all": shift["blur"], "fog": shift["fog"]}, **QUIET)


def test_models_are_run_and_their_cost_is_measured() -> None:
    models = {"eye": StandIn(torch.eye(3), temperature=0.25), "flat": StandIn(0.1 * torch.eye(3))}
    rep = compare(models, loader(), ood={"small": loader(60, seed=1, scale=0.1)}, bootstrap=20, **QUIET)
    expected = evaluate(models["eye"], loader(), ood={"small": loader(60, seed=1, scale=0.1)})
    assert {key: rep["eye"][key] for key in expected} == expected
    assert rep["eye"]["fit_seconds"] == 1.5 and rep["eye"]["parameters"] == 9
    assert rep["eye"]["ms_per_example"] > 0
    assert math.isnan(rep["eye"]["peak_mib"]) or rep["eye"]["peak_mib"] >= 0
    assert rep.details["methods"]["eye"]["temperature"] == 0.25
    assert rep.predictions["eye"]["test"].meta["about"]["method"] == "stand-in"
    assert rep.predictions["eye"]["ood/small"].targets is None
    free = StandIn(torch.eye(3))
    bare = compare({"eye": free}, loader(), bootstrap=0, cost=False, **QUIET)
    assert free.calls == 1 and "ms_per_example" not in bare.columns and bare["eye"]["fit_seconds"] == 1.5


def test_saved_predictions_give_the_same_table(tmp_path: Path) -> None:
    rep = compare({"a/b": StandIn(torch.eye(3)), "A_b": StandIn(torch.ones(3, 3))}, loader(), bootstrap=10, **QUIET)
    paths = rep.save_predictions(tmp_path)
    assert len({path.parent.name.lower() for sets in paths.values() for path in sets.values()}) == 2
    again = compare({row: sets["test"] for row, sets in paths.items()}, bootstrap=10, **QUIET)
    for key in ("nll", "ece", "accuracy", "fit_seconds", "ms_per_example"):
        assert again["a/b"][key] == rep["a/b"][key]
    assert again.interval("a/b", "nll") == rep.interval("a/b", "nll")


def test_a_column_that_is_undefined_says_why() -> None:
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    perfect = Predictions.from_probs(probs, torch.tensor([0, 1, 0]))
    wrong = Predictions.from_probs(probs, torch.tensor([0, 1, 0])).subset(torch.arange(3))
    rep = compare({"perfect": perfect, "too": wrong}, bootstrap=10, **QUIET)
    assert math.isnan(rep["perfect"]["error_auroc"])
    assert rep.cell("perfect", "error_auroc").note == "one class"
    assert "n/a (one class)" in rep.to_markdown()
    impossible = Predictions.from_probs(probs, torch.tensor([0, 0, 0]))
    infinite = compare({"never": impossible}, bootstrap=10, **QUIET)
    assert infinite["never"]["nll"] == math.inf and "∞" in str(infinite)


def test_ood_sets_not_given_for_a_row_are_gaps() -> None:
    methods = {"a": classes(80, sharpness=1.0), "b": classes(80, sharpness=2.0)}
    rep = compare(methods, ood={"far": {"a": classes(50, sharpness=0.2)}}, bootstrap=10, **QUIET)
    assert rep["a"]["ood/far/auroc"] > 0 and rep.cell("b", "ood/far/auroc").note == "not given"


def test_regression_scores_ood_by_the_variance_of_f() -> None:
    y = torch.zeros(40, 1)
    inside = replace(numbers(40, scale=1.0), targets=y, epistemic=torch.full((40, 1), 0.1), aleatoric=torch.ones(40, 1))
    outside = replace(inside, targets=None, epistemic=torch.full((40, 1), 0.9))
    rep = compare({"gp": inside}, ood={"far": {"gp": outside}}, bootstrap=0, **QUIET)
    assert rep.details["score"] == "variance" and rep["gp"]["ood/far/auroc"] == 1.0


def test_evaluate_is_one_row_of_plain_floats() -> None:
    inside, outside = classes(100, sharpness=1.0), classes(60, sharpness=0.2, seed=3)
    values = evaluate(inside, ood={"far": outside}, metrics=["nll", "ece_mass"])
    assert all(type(value) is float for value in values.values())
    assert set(evaluate_metrics(inside, ["nll", "ece_mass"])) < set(values)
    assert (
        values["ood/far/auroc"] == values["ood/far/entropy/auroc"] == ood_metrics(inside, outside, "entropy")["auroc"]
    )
    assert {"ood/far/epistemic/fpr95", "ood/far/energy/ap_out", "ood/far/fpr95"} < set(values)


def test_evaluate_has_keys_that_loggers_take() -> None:
    inside, outside = classes(100, sharpness=1.0), classes(60, sharpness=0.2, seed=3)
    values = evaluate(inside, ood={"8 & 9, größer": outside})
    assert all(re.fullmatch(r"[A-Za-z0-9_./\-]+", key) for key in values)
    assert values["ood/8___9__gr__er/auroc"] == evaluate(inside, ood={"far": outside})["ood/far/auroc"]
    with pytest.raises(ArgumentError, match="two sets would be called 'a_b'"):
        evaluate(inside, ood={"a b": outside, "a_b": outside})


def test_refusals_say_what_to_do() -> None:
    one = classes(50, sharpness=1.0)
    with pytest.raises(ArgumentError, match="at least one name"):
        compare({}, **QUIET)
    with pytest.raises(ShapeError, match="'b' has 40 examples, 'a' has 50"):
        compare({"a": one, "b": classes(40, sharpness=1.0)}, **QUIET)
    swapped = replace(one, targets=one.labelled().roll(1))
    with pytest.raises(LabelError, match=r"differ, first at example \d+; if the loader shuffles"):
        compare({"a": one, "b": swapped}, **QUIET)
    with pytest.raises(ArgumentError, match="about regression, 'a' about classification"):
        compare({"a": one, "b": numbers(50, scale=1.0)}, **QUIET)
    with pytest.raises(ArgumentError, match="a loader is needed to run m"):
        compare({"m": StandIn(torch.eye(3))}, **QUIET)
    with pytest.raises(ArgumentError, match="empty after the first method"):
        compare({"m": StandIn(torch.eye(3))}, iter(loader()), **QUIET)
    with pytest.raises(ArgumentError, match="no loader can be run"):
        compare({"a": one}, ood={"far": loader()}, **QUIET)
    with pytest.raises(ArgumentError, match="cannot name a data set"):
        compare({"a": one}, ood={"a/b": {"a": one}}, **QUIET)
    with pytest.raises(ArgumentError, match="wrap a network first"):
        compare({"net": torch.nn.Linear(2, 2)}, loader(), **QUIET)
    with pytest.raises(LabelError, match="hold no targets"):
        compare({"a": one.without_targets()}, **QUIET)
    with pytest.raises(UnknownNameError, match="'nlll'"):
        compare({"a": one}, None, metrics=["nlll"], **QUIET)
    with pytest.raises(UnknownNameError, match="'entropie'"):
        compare({"a": one}, ood={"far": {"a": one}}, score="entropie", **QUIET)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match="bootstrap"):
            compare({"a": one}, bootstrap=wrong, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="level"):
        compare({"a": one}, level=95.0, **QUIET)


def test_wrapped_networks_are_compared_end_to_end(tmp_path: Path) -> None:
    """The real thing: three methods on one trained network, an OOD set, files, and the network left alone."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batches = [(x, y) for x, y in loader(200)]
    optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(40):
        for x, y in batches:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    models = {
        name: bayesdl.wrap(net, name, batches, likelihood="categorical", progress=False)
        for name in ("map", "temperature", "laplace")
    }
    held_out, far = loader(200, seed=1), loader(80, seed=2, scale=6.0)
    rep = compare(models, held_out, ood={"far": far}, bootstrap=30, **QUIET)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(net(x), y)
    assert rep["map"]["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert rep["temperature"]["accuracy"] == rep["map"]["accuracy"] != rep["laplace"]["nll"]
    assert rep.details["methods"]["temperature"]["temperature"] > 0
    for row in rep.rows:
        assert rep[row]["ms_per_example"] > 0 and rep[row]["fit_seconds"] >= 0 and rep[row]["parameters"] >= 0
        assert 0 <= rep[row]["ood/far/auroc"] <= 1 and not math.isnan(rep[row]["ood/far/epistemic/auroc"])
    assert rep["map"]["ood/far/epistemic/auroc"] == 0.5  # one network has no epistemic part: all ties
    assert evaluate(models["laplace"], held_out)["nll"] == rep["laplace"]["nll"]
    assert rep.to_html(tmp_path / "page.html").stat().st_size > 10_000
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_wrapped_regression_is_compared_end_to_end() -> None:
    torch.manual_seed(0)
    x = torch.rand(80, 1) * 4 - 2
    data = [(x, x.sin() + 0.1 * torch.randn(80, 1))]
    net = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        (net(x) - data[0][1]).square().mean().backward()
        optimiser.step()
    noise = bayesdl.Gaussian(noise=0.1)
    models = {name: bayesdl.wrap(net, name, data, likelihood=noise, progress=False) for name in ("map", "laplace")}
    far = [(x + 8.0, x)]
    rep = compare(models, data, ood={"far": far}, bootstrap=30, **QUIET)
    fitted = net(x).detach()
    normal = torch.distributions.Normal(fitted, 0.1)
    assert rep["map"]["nll"] == pytest.approx(float(-normal.log_prob(data[0][1]).mean()), rel=1e-4)
    assert rep["map"]["rmse"] == pytest.approx(float((fitted - data[0][1]).square().mean().sqrt()), rel=1e-5)
    # tanh features saturate away from the data while the weights stay uncertain: the variance of f is larger there
    assert rep["laplace"]["ood/far/auroc"] > 0.9 and rep["map"]["ood/far/auroc"] == 0.5


def test_untested_values_that_print_alike_are_both_marked() -> None:
    def timed(seconds: float) -> Predictions:
        about = {"about": {"cost": {"fit_seconds": seconds, "forward_passes": 1.0}}}
        return replace(numbers(40, scale=1.0), meta=about)

    rep = compare({"a": timed(0.001), "b": timed(0.0012), "c": timed(2.0)}, bootstrap=0, progress=False)
    column = next(key for key in rep.columns if key.startswith("fit"))
    assert [rep.cell(row, column).best for row in "abc"] == [True, True, False]
    assert not any(rep.cell(row, "nll").best and rep.cell(row, "nll").p is not None for row in "abc")


def test_clusters_are_resampled_whole() -> None:
    # Ten copies of each example: as examples of their own they promise intervals sqrt(10) times too narrow.
    few = classes(60, sharpness=1.5)
    many = few.subset(torch.arange(60).repeat_interleave(10))
    ids = torch.arange(60).repeat_interleave(10)
    reports = {
        name: compare({"a": found}, bootstrap=400, cluster=group, **QUIET)
        for name, found, group in (("few", few, None), ("alone", many, None), ("grouped", many, ids))
    }
    widths = {name: (cell := rep.cell("a", "nll")).high - cell.low for name, rep in reports.items()}  # type: ignore[operator]
    assert widths["grouped"] == pytest.approx(widths["few"], rel=0.15)
    assert widths["alone"] < 0.5 * widths["grouped"]
    with pytest.raises(ShapeError):
        compare({"a": few}, cluster=torch.zeros(3), bootstrap=0, **QUIET)


def test_groups_of_ood_sets_are_plain_means() -> None:
    methods = {"sharp": classes(300, sharpness=2.0), "right": classes(300, sharpness=1.0)}
    ood = {
        name: {row: classes(100, sharpness=0.2 + 0.1 * place, seed=place) for row in methods}
        for place, name in enumerate(("a", "b", "c"))
    }
    rep = compare(methods, ood=ood, ood_groups={"near": ["a"], "far": ["b", "c"]}, bootstrap=100, **QUIET)
    plain = compare(methods, ood=ood, bootstrap=100, **QUIET)
    added = {column for column in rep.columns if column.split("/")[1:2] in (["near"], ["far"])}
    assert set(rep.columns) - added == set(plain.columns)
    assert added == {
        column.replace("/a/", f"/{group}/")
        for column in plain.columns
        for group in ("near", "far")
        if column.startswith("ood/a/")
    }
    for row in methods:
        for rest in ("auroc", "fpr95", "max_prob/auroc", "epistemic/ap_in"):
            assert rep[row][f"ood/near/{rest}"] == rep[row][f"ood/a/{rest}"]
            assert rep[row][f"ood/far/{rest}"] == pytest.approx(
                (rep[row][f"ood/b/{rest}"] + rep[row][f"ood/c/{rest}"]) / 2
            )
    samples = (rep.replicates["ood/b/auroc"] + rep.replicates["ood/c/auroc"]) / 2
    assert rep.replicates["ood/far/auroc"] == pytest.approx(samples)
    low, high = rep.interval("right", "ood/far/auroc")
    assert low < rep["right"]["ood/far/auroc"] < high
    assert rep.column("ood/far/auroc").label == "AUROC, far" and rep.column("ood/far/auroc").n == 200
    assert "Mean over 2 sets." in rep.column("ood/far/auroc").definition
    for wrong in ({"near": ["d"]}, {"near": "a"}, {"near": []}, {"a": ["b"]}, {"x/y": ["a"]}):
        with pytest.raises(ArgumentError, match="ood_groups"):
            compare(methods, ood=ood, ood_groups=wrong, **QUIET)  # type: ignore[arg-type]
    seeds = {row: [found, found.subset(torch.arange(300))] for row, found in methods.items()}
    twice = {name: {row: [one, one] for row, one in found.items()} for name, found in ood.items()}
    rep = compare(seeds, ood=twice, ood_groups={"far": ["b", "c"]}, **QUIET)
    assert rep["right"]["ood/far/auroc"] == pytest.approx(
        plain["right"]["ood/b/auroc"] / 2 + plain["right"]["ood/c/auroc"] / 2
    )


def test_unbiased_calibration_errors_stand_beside_ece() -> None:
    rep = compare({"right": classes(300, sharpness=1.0), "sharp": classes(300, sharpness=3.0)}, **QUIET)
    found = {"ce2_debiased": rep.column("ce2_debiased"), "smece": rep.column("smece")}
    assert not any(column.headline for column in found.values())
    for name in found:
        assert rep["right"][name] == float(METRICS[name].fn(rep.predictions["right"]["test"]))
    assert "smece" not in compare({"right": classes(300, sharpness=1.0)}, metrics=["ece"], **QUIET).columns
