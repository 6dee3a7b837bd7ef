from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ShapeError
from bayesdl.likelihoods import Categorical
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.diagnostics import summary
from bayesdl.samplers.records import SampleRecord


def records(chains: int = 2, draws: int = 50) -> list[SampleRecord]:
    generator = torch.Generator().manual_seed(0)
    losses = (1 + 0.1 * torch.randn(chains * draws, generator=generator)).tolist()
    return [
        SampleRecord(
            i, c, step=10 * i, lr=0.1, h=1e-4, temperature=1.0, psi=1.0, time=float(i), loss=losses[c * draws + i]
        )
        for c in range(chains)
        for i in range(draws)
    ]


def outputs(count: int = 100) -> Tensor:
    return torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(1))


def warnings(*arguments: object) -> str:
    return "\n".join(map(str, summary(*arguments).warnings))  # type: ignore[arg-type]


def test_a_good_chain_has_no_warning() -> None:
    found = summary(records(), outputs(), Categorical(), torch.zeros(6, dtype=torch.long))
    assert not found.warnings, str(found)
    assert "100 samples of 2 chains" in str(found) and "T_eff 1" in str(found) and "R-hat" in str(found)


def test_nothing_collected() -> None:
    assert "burn_in" in warnings([])


def test_cold_chain() -> None:
    assert "temperature 0.01" in warnings([replace(r, temperature=0.01) for r in records()])


def test_uneven_weights() -> None:
    uneven = [replace(r, weight=1.0 if r.id == 0 else 1e-3) for r in records()]
    assert 'collect="time"' in warnings(uneven)


def test_loss_that_still_falls() -> None:
    falling = [replace(r, loss=(r.loss or 0.0) - 0.02 * r.id) for r in records()]
    assert "still falls" in warnings(falling) and "burn_in" in warnings(falling)
    rising = [replace(r, loss=(r.loss or 0.0) + 0.02 * r.id) for r in records()]
    assert "still rises" in warnings(rising)


def test_chains_that_disagree() -> None:
    apart = outputs()
    apart[50:, :, 0] += 3
    assert "do not agree in function space" in warnings(records(), apart, Categorical())
    drifting = outputs(50) + torch.linspace(0, 4, 50)[:, None, None] * torch.tensor([1.0, 0.0, 0.0])
    assert "drifts in function space" in warnings(records(1), drifting, Categorical())


def test_few_independent_draws() -> None:
    walk = 0.2 * outputs().cumsum(0)
    assert "independent draws" in warnings(records(), walk, Categorical())
    assert "too few" in warnings(records(2, 3), outputs(6), Categorical())


def test_cycles_of_copies() -> None:
    cyclical = [replace(r, cycle=r.id // 10, phase=0.9) for r in records(1)]
    base = 3 * torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(2))
    copies = base.repeat_interleave(10, 0) + 0.01 * outputs(50)
    assert "nearly copies" in warnings(cyclical, copies, Categorical())
    assert "nearly copies" not in warnings(cyclical, outputs(50), Categorical())


def test_a_step_that_never_adapts() -> None:
    stuck = [replace(r, psi=0.1 + 1e-5 * r.id) for r in records()]
    assert "hardly adapts" in warnings(stuck)
    assert "hardly adapts" not in warnings([replace(r, psi=0.1 + r.id) for r in records()])


def test_refusal() -> None:
    with pytest.raises(ShapeError, match="records"):
        summary(records(), outputs(3))


def test_of_a_chain() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 3)
    sampler = bdl.samplers.SGLD(net.parameters(), lr=0.1, num_data=20, generator=torch.Generator().manual_seed(0))
    probe = torch.randn(5, 2)
    chain = bdl.Chain(net, burn_in=5, thin=2, sampler=sampler, probe=probe)
    assert "no sample" in str(chain.summary("categorical"))
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    for _ in range(45):
        sampler.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        sampler.step()
        chain.step(loss=loss)
    expected = summary(chain.kept, chain.probes(), Categorical(), torch.zeros(5, dtype=torch.long))
    found = chain.summary("categorical", torch.zeros(5, dtype=torch.long))
    assert found == expected and "20 samples" in str(found) and "R-hat" in str(found)
    assert "R-hat" not in str(bdl.Chain(net, sampler=sampler).summary())


def test_diagnose_asks_whether_chains_agree() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 3)
    x = torch.randn(9, 2)
    generator = torch.Generator().manual_seed(0)
    snapshots = {name: torch.randn(40, *p.shape, generator=generator) for name, p in net.named_parameters()}
    chains = torch.arange(2).repeat_interleave(20)
    for gap, verdict in ((0.0, False), (5.0, True)):
        moved = {**snapshots, "bias": snapshots["bias"] + gap * chains[:, None] * torch.tensor([1.0, 0.0, 0.0])}
        posterior = SamplePosterior(moved, torch.full((40,), 1 / 40), chains)
        found = bdl.BayesianModel(net, posterior, "categorical").diagnose([x])
        assert "R-hat" in str(found)
        assert any("do not agree" in finding.text for finding in found.warnings) is verdict
