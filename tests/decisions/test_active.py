"""Acquisition: information by enumeration and in closed form, kernels against autograd, choices against brute force."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.decisions import bald, epig, epig_of, gradient_kernel, select, select_from
from bayesdl.errors import UnsupportedError
from bayesdl.evaluation.predictions import Predictions
from tests.evaluation.made_up import classes
from tests.untouched import untouched


def test_bald_of_classes_and_of_gaussians() -> None:
    members = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)[:, None]
    assert bald(Predictions.from_probs(members)).tolist() == pytest.approx([0.368064], abs=1e-6)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
    found = Predictions.from_gaussian(means, torch.full_like(means, 0.25))
    assert bald(found).tolist() == pytest.approx([0.5 * math.log(1.25 / 0.25)])
    with pytest.raises(UnsupportedError):
        bald(Predictions(task="count", means=means, variances=means.square()))


def test_epig_by_enumeration() -> None:
    first = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)
    for n, value in enumerate(epig_of(first, second)):
        total = 0.0
        for m, c, d in product(range(2), range(4), range(3)):
            both = float((first[:, n, c] * second[:, m, d]).mean())
            total += both * math.log(both / float(first[:, n, c].mean() * second[:, m, d].mean())) / 2
        assert float(value) == pytest.approx(total, rel=1e-9)
    # Members that agree tell nothing; and what a target knows of itself is at most its entropy.
    assert epig_of(first[:1].expand(5, -1, -1), second).tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_epig_of_a_linear_regression_is_minus_half_log_of_one_minus_squared_correlation() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    x = torch.randn(30, 2, dtype=torch.float64)
    bayes = bdl.wrap(
        net,
        bdl.Laplace(structure="full"),
        [(x, x.sum(1, keepdim=True))],
        likelihood=bdl.Gaussian(noise=0.5),
        prior=bdl.GaussianPrior(precision=1.0),
        progress=False,
    )
    pool, targets = torch.randn(6, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    rows = [torch.cat([part, part.new_ones(len(part), 1)], 1) for part in (x, pool, targets)]
    covariance = (rows[0].T @ rows[0] / 0.25 + torch.eye(3)).inverse()
    own, other = ((r @ covariance * r).sum(1) + 0.25 for r in rows[1:])
    correlation = (rows[1] @ covariance @ rows[2].T).square() / own[:, None] / other
    expected = (-0.5 * (1 - correlation).log()).mean(1)
    assert epig(bayes, pool, targets).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_epig_of_classes_is_that_of_the_functions_drawn() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(40, 2), torch.arange(40) % 3
    bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", progress=False)
    drawn = bayes.draw(16, generator=torch.Generator().manual_seed(3))
    expected = epig_of(*(torch.stack([f(part).softmax(-1) for f in drawn]).detach() for part in (x[:5], x[5:12])))
    found = epig(bayes, x[:5], x[5:12], num_samples=16, generator=torch.Generator().manual_seed(3))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6) and float(found.min()) > 0


def test_gradient_kernel_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    x = torch.randn(7, 1, 3, 3, dtype=torch.float64)
    rows = []
    for one in x:
        out = net(one[None])[0]
        grads = [torch.autograd.grad(o, list(net.parameters()), retain_graph=True) for o in out]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
    jacobian = torch.stack(rows)
    expected = torch.einsum("nkp,mkp->nm", jacobian, jacobian)
    with untouched(net):
        found = gradient_kernel(net, [x[:4], x[4:]], batch=lambda b: (b, None))
    assert torch.allclose(found, expected, rtol=1e-9)


def test_lcmd_by_hand() -> None:
    points = torch.tensor([1.0, 2.0, 3.0, 21.0, 26.0, 0.0, 20.0], dtype=torch.float64)
    kernel = points[:, None] * points
    assert points[select_from(kernel, 2, num_pool=5)].tolist() == [26.0, 3.0]
    # No centre yet: the largest norm first. All five in the end, each once.
    assert points[select_from(kernel[:5, :5], 1)].tolist() == [26.0]
    assert sorted(select_from(kernel[:5, :5], 5).tolist()) == [0, 1, 2, 3, 4]
    assert points[select_from(kernel, 1, num_pool=5, rule="farthest")].tolist() == [26.0]


def test_max_det_is_greedy() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    kernel, level = phi @ phi.T, 0.1
    noisy = kernel + level * float(kernel.diagonal().mean()) * torch.eye(12, dtype=torch.float64)
    for size in (12, 9):
        known = list(range(size, 12))
        chosen: list[int] = []
        for _ in range(4):
            rest = [i for i in range(size) if i not in chosen]
            value = {i: float(torch.logdet(noisy[[*known, *chosen, i]][:, [*known, *chosen, i]])) for i in rest}
            chosen.append(max(rest, key=lambda i: value[i]))
        assert select_from(kernel, 4, num_pool=size, rule="max_det", noise=level).tolist() == chosen


def test_simple_rules_and_refusals() -> None:
    kernel = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    assert select_from(kernel, 2, rule="max_diagonal").tolist() == [1, 2]
    assert sorted(select_from(kernel, 3, rule="random").tolist()) == [0, 1, 2]
    for arguments, text in (((kernel, 4), "4 points of 3"), ((kernel[:2], 1), "expected \\(N, N\\)")):
        with pytest.raises(ValueError, match=text):
            select_from(*arguments)
    with pytest.raises(ValueError, match="rule="):
        select_from(kernel, 1, rule="best")  # type: ignore[arg-type]


def test_select_spreads_over_a_network_and_avoids_what_is_known() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    pool = torch.cat([torch.full((50, 1), -2.0), torch.full((50, 1), 2.0), torch.full((5, 1), 6.0)])
    chosen = select(net, [(pool, torch.zeros(105, 1))], 2, train=[(torch.full((10, 1), -2.0), torch.zeros(10, 1))])
    assert sorted(pool[chosen].flatten().tolist()) == [2.0, 6.0]
    assert bald(classes(4, sharpness=1.0)).shape == (4,)
