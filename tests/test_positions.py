"""Networks with outputs at every position, end to end: as good as the flattened problem, by every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, ShapeError
from bayesdl.posteriors import GaussianPosterior
from bayesdl.posteriors.linear import Jacobians
from tests import oracles
from tests.curvature.test_contributions import dense_ggn, flat_jacobian
from tests.position_networks import CASES, CLASSES, ClassesFirst, segmenter, tagger
from tests.untouched import untouched

PRIOR = bdl.GaussianPrior(precision=0.7)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    return CASES[request.param]()


def wrap(net: nn.Module, method: Any, data: Any, likelihood: Any = "categorical", **options: Any) -> bdl.BayesianModel:
    return bdl.wrap(net, method, data, likelihood=likelihood, progress=False, **options)


# --- a network that treats its positions alone is the same network on the flattened data ---


class Pointwise(nn.Module):
    """`(..., 4)` -> `(..., C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))


def pointwise(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Network, inputs `(8, 5, 4)`, targets `(8, 5)` with ignored ones, and the mask of those that count."""
    torch.manual_seed(seed)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, 4, dtype=torch.float64, generator=source)
    y = torch.randint(0, CLASSES, (8, 5), generator=source)
    y[0, 3:], y[5] = -100, -100
    return Pointwise().double(), x, y, y != -100


METHODS = {
    "map": "map",
    "temperature": "temperature",
    "full": bdl.Laplace(structure="full"),
    "diag": bdl.Laplace(structure="diag"),
    "lowrank": bdl.Laplace(structure="lowrank", rank=4),
    "last kron": bdl.Laplace(select="last_layer"),
    "last diag": bdl.Laplace(select="last_layer", structure="diag"),
    "last full": bdl.Laplace(select="last_layer", structure="full"),
    "mixed": bdl.Laplace(structure={"head": "full", "*": "diag"}),
    "samples": bdl.Laplace(structure="diag", predictive="samples"),
}


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("prior", [PRIOR, None])
def test_positions_are_examples_of_their_own(name: str, prior: Any) -> None:
    net, x, y, counted = pointwise()
    flat = (x[counted], y[counted])
    options: dict[str, Any] = {} if name in ("map", "temperature") else {"prior": prior}
    model = wrap(net, METHODS[name], [(x[:3], y[:3]), (x[3:], y[3:])], **options)
    other = wrap(net, METHODS[name], [flat], **options)
    found, expected = model(x), other(x.flatten(0, 1))
    tolerance = {"rtol": 1e-5, "atol": 1e-7}  # the optima of tuning agree to their own accuracy
    assert found.mean.shape == (8, 5, CLASSES)
    for part in ("mean", "variance", "entropy", "total", "epistemic", "aleatoric"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        torch.testing.assert_close(mine, theirs.view(mine.shape), **tolerance)
    log_prob = found.log_prob(y)
    torch.testing.assert_close(log_prob[counted], other(flat[0]).log_prob(flat[1]), **tolerance)
    assert bool((log_prob[~counted] == 0).all())
    assert found.sample(3).shape == (3, 8, 5)
    if isinstance(model.posterior, GaussianPosterior):
        torch.testing.assert_close(model.log_evidence(), other.log_evidence(), rtol=1e-6, atol=1e-6)
        assert model.posterior.num_data == int(counted.sum())


@pytest.mark.parametrize("name", ["map", "full", "last kron"])
def test_evaluation_leaves_out_what_is_ignored(name: str) -> None:
    net, x, y, counted = pointwise()
    options: dict[str, Any] = {} if name == "map" else {"prior": PRIOR}
    model = wrap(net, METHODS[name], [(x, y)], **options)
    other = wrap(net, METHODS[name], [(x[counted], y[counted])], **options)
    found = bdl.evaluate(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    expected = bdl.evaluate(other, [(x[counted], y[counted])])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("rule", ["heldout", "loo", "training", "evidence"])
def test_tuning_leaves_out_what_is_ignored(rule: str) -> None:
    net, x, y, counted = pointwise()
    data, flat = [(x[:3], y[:3]), (x[3:], y[3:])], [(x[counted], y[counted])]
    arguments = () if rule == "evidence" else (data,)
    model = wrap(net, METHODS["full"], data, prior=PRIOR).tune(rule, *arguments)
    other = wrap(net, METHODS["full"], flat, prior=PRIOR).tune(rule, *(() if rule == "evidence" else (flat,)))
    assert isinstance(model.posterior, GaussianPosterior) and isinstance(other.posterior, GaussianPosterior)
    torch.testing.assert_close(model.posterior.precision, other.posterior.precision, rtol=1e-5, atol=0.0)


def test_training_methods_take_the_mean_over_what_counts() -> None:
    net, x, y, counted = pointwise()
    swag = bdl.SWAG(epochs=2, num_samples=2, lr=0.1)
    model, other = wrap(net, swag, [(x, y)]), wrap(net, swag, [(x[counted], y[counted])])
    torch.testing.assert_close(model(x).mean.flatten(0, 1), other(x.flatten(0, 1)).mean)


def test_ensembles_and_dropout() -> None:
    (net, x, y, _), second = pointwise(), pointwise(1)[0]
    members = bdl.wrap([net, second], "ensemble", likelihood="categorical", progress=False)
    expected = torch.stack([torch.softmax(n(x), -1) for n in (net, second)]).mean(0)
    torch.testing.assert_close(members(x).mean, expected.detach())
    net.drop.p = 0.5
    masked = wrap(net, bdl.MCDropout(num_samples=3), None)(x)
    assert masked.mean.shape == (8, 5, CLASSES)
    assert bool((masked.epistemic > 0).any())
    assert bdl.evaluate(members, [(x, y)])["nll"] > 0


# --- networks that mix their positions, against the dense GGN of the flattened outputs ---


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("select", ["all", "head"])
def test_covariance_of_every_position(case: tuple[nn.Module, Tensor, Tensor], select: str, memory: int | None) -> None:
    net, x, y = case
    names = ["head.weight", "head.bias"] if select == "head" else None
    jac, f = flat_jacobian(net, x, names)
    precision = dense_ggn(net, x, y, names)
    precision = precision + 0.7 * torch.eye(len(precision), dtype=precision.dtype)
    expected = oracles.linearized_covariance(jac.flatten(0, 1), precision)
    with untouched(net):
        model = wrap(net, bdl.Laplace(select=select, structure="full", memory=memory), [(x, y)], prior=PRIOR)
        latent = model(x).latent
    assert latent.mean.shape == (*y.shape, CLASSES)
    torch.testing.assert_close(latent.mean.flatten(0, -2), f.flatten(0, 1))
    torch.testing.assert_close(latent.covariance.flatten(0, -3), expected, rtol=1e-6, atol=1e-9)
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(latent.variance.flatten(0, -2), diagonal, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("select", ["all", "head"])
def test_many_classes_have_variances_alone(
    case: tuple[nn.Module, Tensor, Tensor], structure: str, select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = case
    model = wrap(net, bdl.Laplace(select=select, structure=structure), [(x, y)], prior=PRIOR)
    joint = model(x).latent
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    latent = model(x).latent
    assert latent.covariance is None
    torch.testing.assert_close(latent.variance, joint.variance)
    torch.testing.assert_close(latent.mean, joint.mean)


def test_draws_are_functions_of_every_position(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    model = wrap(net, bdl.Laplace(structure="full"), [(x, y)], prior=PRIOR)
    functions = model.draw(400, generator=torch.Generator().manual_seed(0))
    values = torch.stack([function(x) for function in functions])
    latent = model(x).latent
    assert values.shape[1:] == latent.mean.shape
    # variance of 400 draws: relative error 7%, five sigma of the worst of < 100 outputs (p < 1e-4; fixed seed)
    torch.testing.assert_close(values.var(0), latent.variance, rtol=0.4, atol=0.0)


def test_a_prediction_does_not_depend_on_its_batch(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    model = wrap(net, bdl.Laplace(structure="kron"), [(x, y)], prior=PRIOR)
    whole, parts = model(x), model.predict([(x[:1], y[:1]), (x[1:], y[1:])])
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.epistemic, parts.epistemic)


def test_sequences_of_several_lengths() -> None:
    net, x, y = tagger()
    data = [(x, y), (x[:, :2], y[:, :2])]
    model = wrap(net, bdl.Laplace(structure="diag"), data, prior=PRIOR)
    expected = dense_ggn(net, x, y).diagonal() + dense_ggn(net, x[:, :2], y[:, :2]).diagonal()
    assert isinstance(model.posterior, GaussianPosterior)
    torch.testing.assert_close(model.posterior.curvature.to_dense().diagonal(), expected)
    prediction, targets = model.predict_with_targets(data)
    assert prediction.mean.shape == (30, CLASSES)
    assert targets is not None and targets.shape == (30,)
    torch.testing.assert_close(prediction.mean[:20], model(x).mean.flatten(0, 1))
    assert bdl.evaluate(model, data)["nll"] == pytest.approx(
        float(-torch.cat([model(a).log_prob(b)[b != -100] for a, b in data]).mean()), rel=1e-6
    )


def test_comparison_with_padded_data_of_another_kind(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    model = wrap(net, "map", None)
    strange = torch.where(y == -100, -100, 17)  # labels of other classes
    report = bdl.compare({"map": model}, [(x, y)], ood={"other": [(x, strange)]}, cost=False, progress=False)
    assert 0 < report["map"]["nll"] < 10


def test_files_keep_the_meaning_of_the_axes(tmp_path: Path) -> None:
    net, x, y = tagger()
    swapped = ClassesFirst(net)
    likelihood = bdl.Categorical(class_axis=1, ignore_index=2)
    model = wrap(swapped, bdl.Laplace(structure="diag", memory=5_000), [(x, y.clamp(min=0))], likelihood, prior=PRIOR)
    model.save(tmp_path / "model.safetensors")
    again = bdl.load(tmp_path / "model.safetensors", swapped)
    assert again.likelihood == likelihood
    assert isinstance(again.posterior, GaussianPosterior) and again.posterior.memory == 5_000
    torch.testing.assert_close(again(x).mean, model(x).mean, rtol=0.0, atol=0.0)
    assert model(x).mean.shape == (5, 4, CLASSES)


# --- what is asked for at once follows the budget ---


def test_the_budget_bounds_the_cotangents_of_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = segmenter()
    model = wrap(net, bdl.Laplace(structure="diag"), [(x, y)], prior=PRIOR)
    assert isinstance(model.posterior, GaussianPosterior)
    layout = model.posterior.layout
    example = 3 * layout.activations * 8  # bytes per example and cotangent
    seen: list[int] = []
    factors = Jacobians._factors

    def counted(self: Jacobians, inputs: Tensor, cotangents: Any) -> Any:
        def some(f: Tensor) -> Tensor:
            vectors = cotangents(f)
            seen.append(len(f) * len(vectors))
            return vectors

        return factors(self, inputs, some)

    monkeypatch.setattr(Jacobians, "_factors", counted)
    expected = model(x).latent.variance
    for budget in (3, 6, 12, 48):
        seen.clear()
        again = model.replaced(posterior=replace(model.posterior, memory=budget * example))
        torch.testing.assert_close(again(x).latent.variance, expected)
        assert max(seen) <= budget
        assert sum(seen) == 3 * 8 * CLASSES  # every cotangent of every example, once


# --- refusals ---


def test_an_ambiguous_axis_is_refused() -> None:
    net, x, y = tagger()
    square = (x[:, :CLASSES], y[:, :CLASSES])
    with pytest.raises(ShapeError, match=r"ambiguous.*class_axis=-1"):
        wrap(net, "laplace", [square])
    explicit = wrap(net, "laplace", [square], bdl.Categorical(class_axis=-1), prior=PRIOR)
    assert explicit(square[0]).mean.shape == (5, CLASSES, CLASSES)
    with pytest.raises(ShapeError, match=r"expects class indices of shape \(5, 3\).*class_axis=1"):
        wrap(ClassesFirst(net), "laplace", [(x, y)])
    with pytest.raises(ShapeError, match="class_axis=4 is none of it"):
        wrap(net, "map", None, bdl.Categorical(class_axis=4))(x)
    with pytest.raises(ArgumentError, match="class_axis=0"):
        bdl.Categorical(class_axis=0)


def test_other_likelihoods_say_what_to_do() -> None:
    net, x, _ = tagger()
    with pytest.raises(ShapeError, match="pool them"):
        wrap(net, "map", None, bdl.Gaussian(noise=1.0))(x)


def test_nothing_to_evaluate() -> None:
    net, x, y = tagger()
    with pytest.raises(LabelError, match="ignored"):
        bdl.evaluate(wrap(net, "map", None), [(x, torch.full_like(y, -100))])


def test_masks_of_bytes() -> None:
    net, x, y = segmenter()
    mask = torch.where(y == -100, 255, y).to(torch.uint8)
    expected = wrap(net, "map", None)(x).log_prob(y)
    found = wrap(net, "map", None, bdl.Categorical(ignore_index=255))(x).log_prob(mask)
    torch.testing.assert_close(found, expected)
    with pytest.raises(LabelError, match=r"target 255 at index \(0, 0, 0\)"):
        wrap(net, "map", None)(x).log_prob(mask)
