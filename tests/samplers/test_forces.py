"""How priors enter a step, and chains whose law they alone decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.samplers import BAOAB, SGHMC, SGLD, Sampler


class Quartic(bdl.Prior):
    """A prior that has a density and nothing else."""

    name: ClassVar[str] = "quartic"

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return -torch.stack([(p**4).sum() for p in parameters.values()]).sum()


def pair() -> list[tuple[str, nn.Parameter]]:
    source = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64)))
        for name, shape in (("one.weight", (3, 4)), ("one.bias", (3,)), ("two.weight", (2, 3)))
    ]


def displacement(prior: bdl.Prior, lr: float = 0.1, n: int = 20) -> dict[str, Tensor]:
    """-(theta' - theta) N / lr after a step without noise and with gradient 1 / N, minus that gradient."""
    params = pair()
    before = {name: p.detach().clone() for name, p in params}
    sampler = SGLD(params, lr, n, prior=prior, temperature=0.0)
    for _, p in params:
        p.grad = torch.ones_like(p) / n
    sampler.step()
    return {name: (before[name] - p.detach()) * n / lr - 1 for name, p in params}


@pytest.mark.parametrize(
    "prior",
    [
        bdl.GaussianPrior(precision=3.0),
        bdl.GaussianPrior(precision=3.0, mean=0.4),
        bdl.GaussianPrior(precision=torch.linspace(1, 2, 21), mean=torch.linspace(-1, 1, 21)),
        bdl.LaplacePrior(0.5),
        bdl.StudentTPrior(0.5, df=4.0, fan_in=True),
        bdl.CauchyPrior(0.3),
        Quartic(),
    ],
    ids=repr,
)
def test_forces_are_gradients_of_the_density(prior: bdl.Prior) -> None:
    leaves = {name: p.detach().requires_grad_() for name, p in pair()}
    expected = torch.autograd.grad(-prior.log_prob(leaves), list(leaves.values()))
    for found, value in zip(displacement(prior).values(), expected, strict=True):
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-11)


def test_one_precision_per_layer() -> None:
    found = displacement(bdl.GaussianPrior(precision=[2.0, 5.0]))
    for name, p in pair():
        assert torch.allclose(found[name], p.detach() * (2.0 if name.startswith("one") else 5.0))
    with pytest.raises(ArgumentError, match="4 precisions for 21 parameters in 2 layers"):
        displacement(bdl.GaussianPrior(precision=[1.0] * 4))


def run(sampler: Sampler, params: list[Tensor], steps: int, thin: int) -> Tensor:
    kept = []
    for p in params:
        p.grad = torch.zeros_like(p)
    for k in range(steps):
        sampler.step()
        if k >= steps // 5 and k % thin == 0:
            kept.append(torch.stack([p.detach().double() for p in params]))
    return torch.stack(kept)


@pytest.mark.parametrize(("kind", "t"), [(SGLD, 0.8), (BAOAB, 1.0)])
def test_gibbs_and_theta_steps_give_the_marginal(kind: type[Sampler], t: float) -> None:
    # 60 independent tensors of 2 weights; without data each is a multivariate t: 2 a degrees of freedom, squared scale
    # b / a; at T the joint density to the power 1/T has a' = (a + n/2 + 1) / T - 1 - n/2, b' = b / T
    shape, rate, n, many = 6.0, 3.0, 2, 60
    params = [nn.Parameter(torch.zeros(n)) for _ in range(many)]
    own: dict[str, Any] = {} if kind is SGLD else {"momentum": 0.7}
    sampler = kind(
        [(str(i), p) for i, p in enumerate(params)], 1.2, 10, prior=bdl.HierarchicalPrior(shape, rate), temperature=t,
        gibbs_every=5, generator=torch.Generator().manual_seed(0), **own,
    )  # fmt: skip
    draws = run(sampler, params, 600, 5)
    tempered = (shape + n / 2 + 1) / t - 1 - n / 2
    # E w^2 = T-th power's E v, with the conditional variance T v of the tempered Gaussian
    expected = t * (rate / t) / (tempered - 1)
    means = draws.square().mean((0, 2))
    error = float(means.std() / many**0.5)
    bias = 0.08 if kind is SGLD else 0.02  # a = 0.12: a / 2 for SGLD, none for BAOAB
    assert error < 0.06 * expected
    assert abs(float(means.mean()) - expected) < 4 * error + bias * expected


def test_momenta_keep_their_velocity_when_the_prior_variance_moves() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    sampler = SGHMC([("w", p)], 1e-3, 10, prior=bdl.HierarchicalPrior(3.0, 0.1), gibbs_every=2,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    p.grad = torch.zeros_like(p)
    sampler.step()
    before = sampler.state_dict()["sampler"]["prior"]["w"]
    theta = p.detach().clone()
    sampler.step()  # the Gibbs update follows this step, whose displacement is the momentum before it
    after = sampler.state_dict()["sampler"]["prior"]["w"]
    assert float(before) != float(after) and max(float(before), float(after)) < 1  # below the cap of the steps
    expected = (p.detach() - theta) * (after / before).sqrt()
    assert torch.allclose(sampler.state[p]["momentum"], expected, rtol=1e-9)


def test_a_horseshoe_chain_shrinks_noise_and_leaves_signals() -> None:
    # y = w + noise of sd 0.1, N = 100 observations of each: signals 3 and noise-only weights
    truth = torch.tensor([3.0, -3.0] + [0.0] * 18)
    w = nn.Parameter(torch.zeros(20))
    sampler = SGLD([("w", w)], 0.05, 100, prior=bdl.HorseshoePrior(1.0, slab=5.0), gibbs_every=2,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
    total = torch.zeros(20)
    for k in range(1500):
        w.grad = (w.detach() - truth) * 0.25
        sampler.step()
        total += w.detach() / 1000 if k >= 500 else 0.0
    assert torch.allclose(total[:2], truth[:2], atol=0.3) and float(total[2:].abs().max()) < 0.25
