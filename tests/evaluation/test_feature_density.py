"""Scores from features: their laws, invariances, definitions written out, and what each must detect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, NotFittedError
from bayesdl.evaluation.feature_density import FeatureDensity
from bayesdl.evaluation.feature_statistics import FeatureStatistics
from bayesdl.evaluation.ood import auroc, p_value
from tests.untouched import untouched

KINDS = ("mahalanobis", "relative", "single", "density", "knn", "vim")
Batches = list[tuple[Tensor, Tensor]]


def head(d: int, classes: int = 3, *, seed: int = 0) -> nn.Module:
    """A network whose features are its inputs, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Identity(), nn.Linear(d, classes)).double()


def blobs(n: int, d: int = 4, *, seed: int = 0, far: float = 0.0) -> Batches:
    """Three classes, unit covariance, `far` away along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    x[torch.arange(n), y] += 6.0
    x[:, -1] += far
    return list(zip(x.split(37), y.split(37), strict=True))


FAR = blobs(200, seed=2, far=8.0)


def whole(data: Batches) -> tuple[Tensor, Tensor]:
    """All inputs and labels."""
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("kind", KINDS)
def test_detects_and_leaves_the_network_alone(kind: Any) -> None:
    net = head(4)
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(3, 4))  # type: ignore[index]
    with untouched(net):
        fitted = FeatureDensity(kind=kind).fit(net, blobs(400), progress=False)
        # Where all training features vary alike, relative distances see nothing: between the classes they do.
        outside = fitted.scores([(x * 0.2, y) for x, y in blobs(200, seed=2)] if kind == "relative" else FAR)
        inside = fitted.scores(blobs(200, seed=1))
    assert inside.shape == (200,) and inside.dtype == torch.float64
    assert auroc(inside, outside) > 0.95
    # One batch or many.
    assert fitted.score(whole(blobs(200, seed=1))[0]).tolist() == pytest.approx(inside.tolist(), rel=1e-9)


def test_definitions_written_out() -> None:
    data, net = blobs(300), head(4)
    z, y = whole(data)
    x = whole(blobs(20, seed=3, far=2.0))[0]
    means = torch.stack([z[y == c].mean(0) for c in range(3)])
    within = sum((z[y == c] - means[c]).T @ (z[y == c] - means[c]) for c in range(3)) / (300 - 3)
    within = 0.9 * within + 0.1 * within.diagonal().mean() * torch.eye(4).double()  # type: ignore[union-attr]
    overall = torch.cov(z.T)
    overall = 0.9 * overall + 0.1 * overall.diagonal().mean() * torch.eye(4).double()

    def squared(mean: Tensor, covariance: Tensor) -> Tensor:
        return ((x - mean) @ covariance.inverse() * (x - mean)).sum(1)

    each = torch.stack([squared(m, within) for m in means], 1)
    shares = torch.stack([(y == c).double().mean() for c in range(3)])
    laws = [torch.distributions.MultivariateNormal(m, within) for m in means]
    unit = z / z.norm(dim=1, keepdim=True)
    nearest = torch.cdist(x / x.norm(dim=1, keepdim=True), unit).sort(1).values
    expected = {
        "mahalanobis": each.amin(1),
        "single": squared(z.mean(0), overall),
        "relative": each.amin(1) - squared(z.mean(0), overall),
        "density": -torch.stack([s.log() + law.log_prob(x) for s, law in zip(shares, laws, strict=True)]).logsumexp(0),
        "knn": nearest[:, 6],
    }
    for kind, value in expected.items():
        fitted = FeatureDensity(kind=kind, shrinkage=0.1, k=7).fit(net, data, progress=False)  # type: ignore[arg-type]
        assert fitted.score(x).tolist() == pytest.approx(value.tolist(), rel=1e-7), kind


def test_vim_written_out() -> None:
    data, net = blobs(300, d=6), head(6)
    z, _ = whole(data)
    x = whole(blobs(20, d=6, seed=3))[0]
    weight, bias = net[1].weight.detach(), net[1].bias.detach()  # type: ignore[index, union-attr]
    origin = -torch.linalg.pinv(weight) @ bias
    rest = torch.linalg.svd(z - origin).Vh[2:].T
    alpha = (z @ weight.T + bias).amax(1).sum() / ((z - origin) @ rest).norm(dim=1).sum()
    expected = alpha * ((x - origin) @ rest).norm(dim=1) - (x @ weight.T + bias).logsumexp(1)
    fitted = FeatureDensity(kind="vim", dimension=2).fit(net, data, progress=False)
    assert fitted.score(x).tolist() == pytest.approx(expected.tolist(), rel=1e-8)


def test_distances_follow_the_f_law_and_not_chi_square() -> None:
    # n fitted Gaussian features, a fresh one: D^2 n (n - d) / (d (n^2 - 1)) ~ F(d, n - d). 4000 repeats;
    # Kolmogorov-Smirnov at p = 1e-3: one seed in a thousand fails. Chi-square(d) is rejected at p < 1e-50.
    from scipy import stats

    n, d = 12, 3
    generator = torch.Generator().manual_seed(0)
    net, values = head(d), []
    spec = FeatureDensity(kind="single", shrinkage=0.0)
    z = torch.randn(4000, n + 1, d, dtype=torch.float64, generator=generator)
    for sample in z:
        s = FeatureStatistics.of(sample[:n], None)
        off = sample[n] - s.centre
        values.append(float(off @ s.covariance(shared=False, shrinkage=0.0).inverse() @ off))
    fitted = spec.fit(net, [(z[0, :n], torch.zeros(n, dtype=torch.int64))], progress=False)
    assert float(fitted.score(z[0, n:])[0]) == pytest.approx(values[0], rel=1e-9)
    scaled = torch.tensor(values, dtype=torch.float64) * n * (n - d) / (d * (n**2 - 1))
    assert stats.kstest(scaled.numpy(), stats.f(d, n - d).cdf).pvalue > 1e-3
    assert stats.kstest(values, stats.chi2(d).cdf).pvalue < 1e-50


@pytest.mark.parametrize("kind", ["mahalanobis", "relative", "single"])
def test_invariant_to_affine_maps(kind: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    turn, shift = torch.randn(4, 4, dtype=torch.float64, generator=generator), torch.randn(4, generator=generator)
    data, x = blobs(300), whole(blobs(30, seed=1, far=3.0))[0]
    moved = [(z @ turn.T + shift, y) for z, y in data]
    one = FeatureDensity(kind=kind, shrinkage=0.0).fit(head(4), data, progress=False)
    two = FeatureDensity(kind=kind, shrinkage=0.0).fit(head(4), moved, progress=False)
    assert two.score(x @ turn.T + shift).tolist() == pytest.approx(one.score(x).tolist(), rel=1e-6)


def test_statistics_of_any_split_are_one_shot() -> None:
    z, y = whole(blobs(200))
    z = z + 1e4  # far from the origin, where sums of squares would lose everything
    y[:50] = 0
    once = FeatureStatistics.of(z, y, 3)
    parts = [FeatureStatistics.of(a, b, int(b.max()) + 1) for a, b in zip(z.split(23), y.split(23), strict=True)]
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        assert merged.count.equal(once.count)
        assert torch.allclose(merged.mean, once.mean, rtol=1e-12)
        assert torch.allclose(merged.within, once.within, rtol=1e-9, atol=1e-6)
    assert torch.allclose(once.scatter_about(once.centre) / 199, torch.cov(z.T), rtol=1e-9)


def test_p_values_keep_the_false_alarm_rate() -> None:
    reference = [3.0, 1.0, 2.0, 2.0]
    assert p_value([0.0, 2.0, 2.5, 9.0], reference).tolist() == pytest.approx([1.0, 0.8, 0.4, 0.2])
    fitted = FeatureDensity(kind="single").fit(head(4), blobs(300), calibration=blobs(99, seed=1), progress=False)
    x = whole(blobs(4000, seed=2))[0]
    flagged = fitted.p_value(x) <= 0.1
    # Given the calibration scores the rate is Beta(10, 90): above 0.2 with probability 0.001.
    assert float(flagged.double().mean()) < 0.2
    assert flagged.equal(fitted.score(x) > fitted.threshold(0.1))
    assert fitted.threshold(0.001) == math.inf


def test_pooled_layers_and_bayesian_models() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 3))
    x, y = torch.randn(60, 1, 6, 6), torch.arange(60) % 3
    bayes = bdl.wrap(net, "map", [(x, y)], likelihood="categorical", progress=False)
    fitted = FeatureDensity(layer="1", kind="single").fit(bayes, [(x, y)], progress=False)
    assert fitted.state["centre"].tolist() == pytest.approx(net[:2](x).mean((0, 2, 3)).tolist(), abs=1e-6)
    deep = FeatureDensity(kind="mahalanobis").fit(bayes, [(x, y)], progress=False)
    assert deep.state["means"].shape == (3, 80)


def test_clear_refusals() -> None:
    net, data = head(4), blobs(100)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"kind": "odin"}, "kind="),
        ({"shrinkage": 2.0}, "shrinkage="),
        ({"k": 0}, "k="),
        ({"layer": "nowhere"}, "no layer of the network"),
        ({"kind": "vim", "dimension": 4}, "no residual"),
        ({"kind": "vim", "layer": "0"}, "leave layer"),
        ({"kind": "knn", "k": 101}, "101-th"),
    ]
    for options, text in bad:
        with pytest.raises(ArgumentError, match=text):
            FeatureDensity(**options).fit(net, data, progress=False)
    with pytest.raises(ArgumentError, match="singular"):
        FeatureDensity(shrinkage=0.0).fit(net, blobs(5), progress=False)
    with pytest.raises(LabelError, match="class indices"):
        FeatureDensity().fit(net, [(x, y.double()) for x, y in data], progress=False)
    with pytest.raises(NotFittedError, match="calibration="):
        FeatureDensity().fit(net, data, progress=False).p_value(data[0][0])
