"""Joint log-loss against the product of members written out, the fixed example, and what marginals cannot see."""

from __future__ import annotations

import math

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.evaluation import classification, joint
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.validation import UndefinedError
from tests.evaluation.made_up import classes


def test_fixed_example_g() -> None:
    members = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)[:, None].expand(2, 2, 2)
    found = Predictions.from_probs(members, [0, 0])
    assert joint.joint_nll(found, tau=2) == pytest.approx(0.891598, abs=1e-6)
    assert joint.joint_gain(found, tau=2) == pytest.approx(1.386294 - 0.891598, abs=2e-6)


def test_tau_one_is_the_nll() -> None:
    found = classes(101, sharpness=1.5)
    assert joint.joint_nll(found, tau=1) == pytest.approx(
        classification.nll(found.labelled(), probs=found.probs), abs=1e-12
    )
    assert joint.joint_gain(found, tau=1) == pytest.approx(0.0, abs=1e-12)


def test_blocks_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = -torch.rand(3, 12, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).reshape(3, 4)
    expected = [
        -math.log(sum(float(w) * math.exp(float(row[block].sum())) for w, row in zip(weights, log_p, strict=True)))
        for block in order
    ]
    assert joint.joint_nll(log_p, tau=4, member_weights=weights) == pytest.approx(sum(expected) / 3)


def test_regression_members_are_gaussian_components() -> None:
    means = torch.tensor([0.0, 2.0], dtype=torch.float64)[:, None, None].expand(2, 2, 1)
    found = Predictions.from_gaussian(means, torch.ones_like(means), torch.zeros(2, 1, dtype=torch.float64))
    density = 1 / (2 * math.pi)
    expected = -math.log(0.5 * density + 0.5 * density * math.exp(-4.0))
    assert joint.joint_nll(found, tau=2) == pytest.approx(expected)


def test_coherent_members_gain_and_shuffled_ones_do_not() -> None:
    # Each member is certain of one label for all inputs; the truth agrees with one of them.
    p = torch.tensor([[0.99, 0.01], [0.01, 0.99]], dtype=torch.float64)[:, None].expand(2, 40, 2)
    coherent = Predictions.from_probs(p, torch.zeros(40, dtype=torch.int64))
    assert joint.joint_gain(coherent, tau=10) == pytest.approx(9 * math.log(2) + 10 * math.log(0.99), abs=1e-9)
    swapped = p.clone()
    swapped[:, 1::2] = p.flip(0)[:, 1::2]
    mixed = Predictions.from_probs(swapped, torch.zeros(40, dtype=torch.int64))
    assert joint.joint_gain(mixed, tau=10) < 0.5 * joint.joint_gain(coherent, tau=10)


def test_dyadic_blocks_hold_two_anchors() -> None:
    index = joint._blocks(50, 16, "dyadic", None, None)
    assert index.shape == (50, 16) and all(len(block.unique()) <= 2 for block in index)
    assert sum(len(block.unique()) == 2 for block in index) > 45


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tau": 0}, ArgumentError),
        ({"tau": 200}, ArgumentError),
        ({"tau": 10, "blocks": 99}, ArgumentError),
        ({"sampling": "both"}, ArgumentError),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        joint.joint_nll(classes(100, sharpness=1.0), **options)  # type: ignore[arg-type]


def test_one_member_is_refused() -> None:
    with pytest.raises(UndefinedError, match="hold one"):
        joint.joint_nll(classes(100, sharpness=1.0, members=1))
    with pytest.raises(UndefinedError, match="one was given"):
        joint.joint_nll(torch.zeros(1, 20))
    with pytest.raises(ArgumentError, match="NaN"):
        joint.joint_nll(torch.full((2, 20), torch.nan))


def bayesian_line(n: int = 24) -> tuple[bdl.BayesianModel, torch.Tensor, torch.Tensor]:
    """Exact Bayesian linear regression with two features, and data to score."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    y = x.sum(1, keepdim=True) + 0.5 * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    net = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.solve(x[:6].T @ x[:6] + 0.25 * torch.eye(2), x[:6].T @ y[:6]).T)
    bayes = bdl.wrap(
        net,
        bdl.Laplace(structure="full"),
        [(x[:6], y[:6])],
        likelihood=bdl.Gaussian(noise=0.5),
        prior=bdl.GaussianPrior(precision=1.0),
        progress=False,
    )
    return bayes, x, y


@pytest.mark.parametrize("sampling", ["random", "dyadic"])
def test_a_gaussian_models_joint_loss_is_the_evidence_of_the_blocks(sampling: joint.Sampling) -> None:
    bayes, x, y = bayesian_line()
    precision = x[:6].T @ x[:6] / 0.25 + torch.eye(2)
    mean = torch.linalg.solve(precision, x[:6].T @ y[:6] / 0.25)
    index = joint._blocks(len(x), 4, sampling, 5, torch.Generator().manual_seed(2))
    expected = []
    for rows in index:
        covariance = x[rows] @ torch.linalg.inv(precision) @ x[rows].T + 0.25 * torch.eye(4)
        law = torch.distributions.MultivariateNormal((x[rows] @ mean)[:, 0], covariance)
        expected.append(-float(law.log_prob(y[rows, 0])))
    found = joint.model_joint_nll(
        bayes, x, y, tau=4, sampling=sampling, blocks=5, generator=torch.Generator().manual_seed(2)
    )
    assert found == pytest.approx(sum(expected) / 5, rel=1e-6)
    single = joint.model_joint_nll(bayes, x, y, tau=1)
    assert single == pytest.approx(-float(bayes(x).log_prob(y).mean()), rel=1e-6)


def test_models_of_classes_are_scored_by_drawn_functions() -> None:
    torch.manual_seed(0)
    net, x = torch.nn.Linear(2, 3), torch.randn(30, 2)
    y = torch.randint(0, 3, (30,))
    bayes = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood="categorical", progress=False)
    found = joint.model_joint_nll(bayes, x, y, tau=5, num_samples=8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    index = joint._blocks(30, 5, "random", None, generator)
    with torch.no_grad():
        each = torch.stack([f(x).log_softmax(-1) for f in bayes.draw(8, generator=generator)])
    own = each.gather(2, y[None, :, None].expand(8, -1, 1))[..., 0].double()
    expected = -(own[:, index].sum(-1).logsumexp(0) - math.log(8)).mean()
    assert found == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="one tensor"):
        joint.model_joint_nll(bayes, [x], y)
