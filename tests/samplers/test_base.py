"""What every sampler has in common: order of a step, refusals, groups, state, training loops."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError, UnreachedParameterError, UnsupportedError
from bayesdl.samplers import SAMPLERS, SASGLD, SGHMC, SGLD, Decreasing, Sampler

N = 40
OWN: dict[str, dict[str, Any]] = {"psgld": {"freeze_after": 4}, "sghmc": {"adapt": True, "burn_in": 4}}
EVERY = pytest.mark.parametrize("name", list(SAMPLERS))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def build(name: str, net: nn.Module, seed: int = 1, **own: Any) -> Sampler:
    own = {"lr": 0.02, "num_data": N, "generator": torch.Generator().manual_seed(seed), **OWN.get(name, {}), **own}
    sampler = SAMPLERS[name](net.named_parameters(), **own)
    sampler.register_pre_update_hook(lambda s: None)
    return sampler


def batch(k: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(k)
    return torch.randn(8, 4, generator=source), torch.randint(3, (8,), generator=source)


def train(net: nn.Module, sampler: torch.optim.Optimizer, steps: range) -> Tensor:
    for k in steps:
        sampler.zero_grad()
        x, y = batch(k)
        nn.functional.cross_entropy(net(x), y).backward()
        sampler.step()
    return flat(net)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@EVERY
def test_seeds_and_interleaved_chains(name: str) -> None:
    alone = []
    for seed in (1, 2):
        net = network()
        alone.append(train(net, build(name, net, seed), range(12)))
    assert not torch.equal(*alone)
    nets = [network(), network()]
    pair = [build(name, net, seed) for net, seed in zip(nets, (1, 2), strict=True)]
    for k in range(12):
        for net, sampler in zip(nets, pair, strict=True):
            train(net, sampler, range(k, k + 1))
    assert all(torch.equal(flat(net), expected) for net, expected in zip(nets, alone, strict=True))


@EVERY
@pytest.mark.parametrize("prior", [None, bdl.HierarchicalPrior(shape=3.0, rate=2.0), bdl.StudentTPrior()])
def test_states_continue_bit_for_bit(name: str, prior: bdl.Prior | None) -> None:
    shared: dict[str, Any] = {} if prior is None else {"prior": prior, "gibbs_every": 3}
    if name == "entropy-mcmc":
        shared["eta"] = 0.3
    whole_net = network()
    whole = train(whole_net, build(name, whole_net, **shared), range(14))
    for stop in (1, 6):
        net = network()
        sampler = build(name, net, **shared)
        train(net, sampler, range(stop))
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "sampler": sampler.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)  # tensors and numbers alone
        net = network(5)
        sampler = build(name, net, 7, **shared)
        net.load_state_dict(saved["net"])
        sampler.load_state_dict(saved["sampler"])
        assert sampler.iteration == stop
        assert torch.equal(train(net, sampler, range(stop, 14)), whole)


@EVERY
def test_deep_copies_continue_alike(name: str) -> None:
    net = network()
    sampler = build(name, net)
    train(net, sampler, range(3))
    twin_net, twin = copy.deepcopy((net, sampler))
    twin.register_pre_update_hook(lambda s: None)
    assert torch.equal(train(net, sampler, range(3, 9)), train(twin_net, twin, range(3, 9)))


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_touched_when_a_gradient_is_not_finite(name: str, bad: float) -> None:
    net, twin_net = network(), network()
    sampler, twin = build(name, net), build(name, twin_net)
    train(net, sampler, range(3))
    train(twin_net, twin, range(3))
    before = flat(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(iter(net[2].parameters())).grad[1, 2] = bad  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"step 3: 1 of 18 gradients of parameter '2.weight'"):
        sampler.step()
    assert torch.equal(flat(net), before) and sampler.iteration == 3
    assert torch.equal(train(net, sampler, range(3, 6)), train(twin_net, twin, range(3, 6)))


@EVERY
def test_weight_decay_is_refused_with_the_precision_it_stands_for(name: str) -> None:
    net = network()
    with pytest.raises(ArgumentError, match=r"weight_decay=0.0005.*prior_precision=25 \(lam = N wd, prior sd 0.2\)"):
        SAMPLERS[name](net.parameters(), lr=0.1, num_data=50_000, weight_decay=5e-4)
    with pytest.raises(ArgumentError, match="prior_precision=25"):
        SAMPLERS[name]([{"params": net.parameters(), "weight_decay": 5e-4}], lr=0.1, num_data=50_000)
    with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
        SAMPLERS[name](net.parameters(), lr=0.1, num_data=50_000, betas=1)


@EVERY
def test_repr(name: str) -> None:
    text = repr(build(name, network(), lr=0.01, num_data=50_000, prior_precision=25.0, temperature=0.5))
    for part in ("T_eff=0.5", "prior_precision=25 (prior sd 0.2)", "h=2e-07", "lr=0.01", "51 parameters in 4 tensors"):
        assert part in text


@pytest.mark.parametrize("key", ["temperature", "num_data", "prior", "generator"])
def test_what_a_group_cannot_have(key: str) -> None:
    with pytest.raises(ArgumentError, match=f"parameter group 1 has its own {key}"):
        SGLD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], key: 1}], 0.1, 10)


@pytest.mark.parametrize(
    "own",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"num_data": 0},
        {"num_data": 1.5},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"prior_precision": -1.0},
        {"prior_precision": torch.ones(3)},
        {"prior": "gaussian"},
        {"prior": bdl.GaussianPrior(), "prior_precision": 1.0},
        {"gibbs_every": 0},
    ],
)
def test_arguments(own: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        build("sgld", network(), **own)


def test_groups_have_their_own_rates_and_precisions() -> None:
    # two groups in one sampler end where two samplers without noise would
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    sampler = SGLD([{"params": [("a", a)], "lr": 0.3}, {"params": [("b", b)], "prior_precision": 8.0}], 0.1, 10,
                   prior_precision=2.0, temperature=0.0)  # fmt: skip
    for _ in range(2):
        a.grad, b.grad = torch.ones(3), torch.ones(2)
        sampler.step()
    for parameter, lr, lam in ((a, 0.3, 2.0), (b, 0.1, 8.0)):
        value = 1.0
        for _ in range(2):
            value -= lr * (1 + lam / 10 * value)
        assert torch.allclose(parameter, torch.full_like(parameter, value))
    assert [group["param_names"] for group in sampler.param_groups] == [["a"], ["b"]]


@EVERY
def test_groups_without_parameters_change_nothing(name: str) -> None:
    nets = [network(), network()]
    own = {"num_data": N, **OWN.get(name, {})}
    groups = [[{"params": list(net.parameters())}] for net in nets]
    groups[1].insert(0, {"params": []})
    for net, group in zip(nets, groups, strict=True):
        sampler = SAMPLERS[name](group, lr=0.02, generator=torch.Generator().manual_seed(1), **own)
        sampler.register_pre_update_hook(lambda s: None)
        train(net, sampler, range(3))
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_lr_and_temperature_as_functions_and_schedulers() -> None:
    theta = nn.Parameter(torch.zeros(2))
    sampler = SGLD([theta], Decreasing(1.0, 1.0, 1.0), 10, temperature=lambda k: float(k))
    seen = []
    sampler.register_pre_update_hook(lambda s: seen.append((s.record.lr, s.record.temperature, s.record.h, s.time)))
    for _ in range(3):
        theta.grad = torch.zeros(2)
        sampler.step()
    assert [s[0] for s in seen] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [s[1] for s in seen] == [0.0, 1.0, 2.0] and seen[1][2] == 0.05
    assert [s[3] for s in seen] == [0.0, 1.0, 1.5]
    scheduled = SGLD([theta], 0.4, 10)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 1, 0.5)
    theta.grad = torch.zeros(2)
    scheduled.step()
    scheduler.step()
    assert scheduled.param_groups[0]["lr"] == 0.2


def test_hooks_see_the_left_point() -> None:
    theta = nn.Parameter(torch.ones(3))
    sampler = SGLD([theta], 0.1, 10)
    with pytest.raises(ArgumentError, match="no step yet"):
        _ = sampler.record
    seen: list[Tensor] = []
    handle = sampler.register_pre_update_hook(lambda s: seen.append(theta.detach().clone()))
    for _ in range(2):
        left = theta.detach().clone()
        theta.grad = torch.ones(3)
        sampler.step()
        assert torch.equal(seen[-1], left) and not torch.equal(theta, left)
    handle.remove()
    sampler.step()
    assert len(seen) == 2 and sampler.record.step == 2


@EVERY
def test_closures(name: str) -> None:
    nets = [network(), network()]
    first, second = (build(name, net) for net in nets)
    train(nets[0], first, range(3))
    for k in range(3):

        def closure(k: int = k) -> Tensor:
            second.zero_grad()
            x, y = batch(k)
            loss = nn.functional.cross_entropy(nets[1](x), y)
            loss.backward()
            return loss

        assert float(second.step(closure).detach()) > 0
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_gradients_that_are_missing() -> None:
    net = network()
    sampler = build("sgld", net)
    with pytest.raises(UnreachedParameterError, match=r"'0.weight' of shape \(6, 4\) has no gradient at step 0"):
        sampler.step()
    net[0].weight.requires_grad_(False)
    with pytest.raises(UnreachedParameterError, match="and requires_grad=False"):
        sampler.step()
    # on the prior alone: E w^2 = 1 / lam / (1 - a / 2), a = 0.2; 20,000 chains, failure of 4 standard errors 6e-5
    theta = nn.Parameter(torch.zeros(20_000))
    alone = SGLD([theta], 0.2 * 10 / 4, 10, prior_precision=4.0, allow_unused=True,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    for _ in range(60):
        alone.step()
    assert float(theta.detach().square().mean()) == pytest.approx(0.25 / 0.9, rel=0.04)


def test_accumulation_clipping_and_scaling_happen_before_the_step() -> None:
    nets = [network(), network(), network()]
    samplers = [build("sgld", net) for net in nets]
    x, y = batch(0)
    loss = nn.functional.cross_entropy
    loss(nets[0](x), y).backward()
    for part in (slice(0, 4), slice(4, 8)):
        (loss(nets[1](x[part]), y[part]) / 2).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss(nets[2](x), y)).backward()
    scaler.unscale_(samplers[2])
    for net in nets:
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    samplers[0].step()
    samplers[1].step()
    scaler.step(samplers[2])
    scaler.update()
    assert torch.allclose(flat(nets[0]), flat(nets[1]), atol=1e-6)
    assert torch.allclose(flat(nets[0]), flat(nets[2]), atol=1e-6)
    before, state = flat(nets[2]), samplers[2].iteration
    samplers[2].zero_grad()
    scaler.scale(loss(nets[2](x), y) * float("inf")).backward()
    scaler.step(samplers[2])  # skipped: the scaler found infinities
    assert torch.equal(flat(nets[2]), before) and samplers[2].iteration == state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_needs_master_copies(dtype: torch.dtype) -> None:
    theta = nn.Parameter(torch.ones(1000, dtype=dtype))
    with pytest.raises(UnsupportedError, match="master=True"):
        SGHMC([theta], 1e-3, 1000)
    sampler = SGHMC([theta], 1e-3, 1000, master=True, generator=torch.Generator().manual_seed(0))
    twin = nn.Parameter(torch.ones(1000))
    other = SGHMC([twin], 1e-3, 1000, generator=torch.Generator().manual_seed(0))
    for k in range(10):
        theta.grad, twin.grad = torch.ones(1000, dtype=dtype), torch.ones(1000)
        sampler.step()
        other.step()
        if k == 4:
            again = SGHMC([theta], 1e-3, 1000, master=True)
            again.load_state_dict(copy.deepcopy(sampler.state_dict()))
            sampler = again
    assert torch.equal(sampler.state[theta]["master"], twin) and torch.equal(theta, twin.to(dtype))
    assert sampler.state[theta]["momentum"].dtype is torch.float32


def test_parameters_of_other_kinds() -> None:
    with pytest.raises(UnsupportedError, match="complex64"):
        SGLD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], 0.1, 10)
    table = nn.Embedding(5, 2, sparse=True)
    sampler = SGLD(table.named_parameters(), 0.1, 10)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match="'weight' has a sparse gradient"):
        sampler.step()


def test_a_parameter_moves_once_a_step() -> None:
    net = network()
    with pytest.raises(ArgumentError, match="parameter group 0 holds a parameter twice"):
        SGLD([*net.parameters(), next(net.parameters())], 0.1, 10)


def test_states_of_others_are_refused() -> None:
    net = network()
    with pytest.raises(FileFormatError, match="another optimiser"):
        build("sgld", net).load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())
    for other in (build("baoab", net), build("sgld", net, num_data=N + 1)):
        with pytest.raises(FileFormatError, match="expected"):
            build("sgld", net).load_state_dict(other.state_dict())


def test_replicas_must_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ArgumentError, match="one seed on all ranks"):
        SGLD([nn.Parameter(torch.zeros(1))], 0.1, 10)
    SGLD([nn.Parameter(torch.zeros(1))], 0.1, 10, generator=torch.Generator().manual_seed(0))


def test_flat_priors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        SGLD([nn.Parameter(torch.zeros(1))], 0.1, 10, prior_precision=0.0)
    assert "the prior is flat" in caplog.text


def test_names_and_no_names_do_not_mix() -> None:
    with pytest.raises(ArgumentError, match="name all of them or none"):
        SGLD([("a", nn.Parameter(torch.zeros(1))), nn.Parameter(torch.zeros(1))], 0.1, 10)


@pytest.mark.slow
@EVERY
def test_compiled_training_steps(name: str) -> None:
    nets = [network(), network()]
    first, second = (build(name, net) for net in nets)

    def one(net: nn.Module, sampler: Sampler, x: Tensor, y: Tensor) -> None:
        sampler.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sampler.step()

    compiled: Callable[..., None] = torch.compile(one, backend="eager")
    for k in range(3):
        one(nets[0], first, *batch(k))
        compiled(nets[1], second, *batch(k))
    assert torch.allclose(flat(nets[0]), flat(nets[1]), atol=1e-6)


def test_batch_statistics_are_left_to_the_network(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(device)
    sampler = SASGLD(net.parameters(), 0.01, N, smallest=1.0, largest=1.0)
    for k in range(3):
        x, y = (v.to(device) for v in batch(k))
        sampler.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sampler.step()
    assert int(net[1].num_batches_tracked) == 3 and torch.isfinite(flat(net)).all()
