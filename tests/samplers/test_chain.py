"""Chains in a user's own loop: which theta is kept, when, and with which weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, NotFittedError, StaleModelError, UnsupportedError
from bayesdl.samplers import SASGLD, SGHMC, SGLD, Cyclical, Decreasing, StochasticForwardWarning, pooled
from bayesdl.samplers.collecting import EqualTimes
from bayesdl.samplers.record import StepRecord
from bayesdl.samplers.retention import Retention
from tests.processes import run as run_processes
from tests.untouched import untouched

N = 40


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(6)] if norm else []
        return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def batch(k: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(k)
    return torch.randn(8, 4, generator=source), torch.randint(3, (8,), generator=source)


def sgld(net: nn.Module, seed: int = 1, **own: Any) -> SGLD:
    return SGLD(net.named_parameters(), **{"lr": 0.05, "num_data": N, "generator": _source(seed), **own})


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backward(net: nn.Module, k: int) -> Tensor:
    net.zero_grad()
    x, y = batch(k)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def assert_equal(posterior: bdl.posteriors.SamplePosterior, expected: list[dict[str, Tensor]]) -> None:
    assert len(posterior) == len(expected)
    for name, values in posterior.snapshots.items():
        assert torch.equal(values, torch.stack([one[name] for one in expected])), name


# --- which theta -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")
def test_samples_are_the_points_that_steps_leave_with_the_buffers_of_their_own_pass() -> None:
    net = network(norm=True)
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=4, thin=3, sampler=sampler)
    left = []
    for k in range(20):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        assert chain.step() is (k in (6, 9, 12, 15, 18))
    posterior = chain.posterior()
    assert_equal(posterior, [left[k] for k in (6, 9, 12, 15, 18)])
    assert set(posterior.snapshots) == {name for name in net.state_dict() if not name.endswith("tracked")}
    assert torch.allclose(posterior.weights, torch.full((5,), 0.2))
    assert posterior.chains is not None and posterior.chains.tolist() == [0] * 5
    assert [record.step for record in chain.records] == [6, 9, 12, 15, 18]
    assert {record.h for record in chain.records} == {0.05 / N} and {r.temperature for r in chain.records} == {1.0}


def test_without_a_sampler_a_sample_is_the_network_as_it_is() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    chain = bdl.Chain(net, burn_in=2, thin=2)
    seen = []
    for k in range(8):
        loss = backward(net, k)
        optimizer.step()
        chain.step(loss=loss)
        seen.append((state(net), float(loss.detach())))
    assert_equal(chain.posterior(), [seen[k][0] for k in (3, 5, 7)])
    assert [record.loss for record in chain.records] == [seen[k][1] for k in (3, 5, 7)]
    assert chain.records[0].lr is None and chain.records[0].log_prior is None


def test_log_prior_and_loss_are_those_of_the_sample() -> None:
    net = network()
    sampler = SGLD(
        [{"params": net[0].parameters(), "prior_precision": 3.0}, {"params": net[2].parameters()}],
        0.05,
        N,
        generator=_source(0),
    )
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(3):
        backward(net, k)
        expected = -sum(
            lam / 2 * float(p.detach().double().square().sum())
            for lam, part in ((3.0, net[0]), (1.0, net[2]))
            for p in part.parameters()
        )
        sampler.step()
        chain.step()
        assert chain.records[-1].log_prior == pytest.approx(expected, rel=1e-6)
    heavy = bdl.StudentTPrior(df=4.0)
    sampler = sgld(net, prior=heavy)
    chain = bdl.Chain(net, sampler=sampler)
    backward(net, 0)
    density = float(heavy.log_prob({name: p.detach() for name, p in net.named_parameters()}))
    sampler.step()
    chain.step()
    assert chain.records[-1].log_prior == pytest.approx(density, rel=1e-6)
    unknown = bdl.HorseshoePrior()  # its scales are drawn: no density in closed form
    sampler = sgld(net, prior=unknown)
    chain = bdl.Chain(net, sampler=sampler)
    backward(net, 0)
    sampler.step()
    chain.step()
    assert chain.records[-1].log_prior is None


def test_half_precision_parameters_are_kept_as_their_float32_copies() -> None:
    net = network().bfloat16()
    sampler = sgld(net, master=True, lr=1e-3)
    chain = bdl.Chain(net, sampler=sampler)
    x, y = batch(0)
    for _ in range(3):
        sampler.zero_grad()
        nn.functional.cross_entropy(net(x.bfloat16()).float(), y).backward()
        sampler.step()
        chain.step()
    weight = chain.posterior().snapshots["0.weight"]
    assert weight.dtype is torch.float32 and not torch.equal(weight[1], weight[2])
    assert not torch.equal(weight[2], weight[2].bfloat16().float())  # more digits than the network has
    bdl.BayesianModel(net, chain.posterior(), "categorical")(x)


# --- when --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False])
def test_burn_in_counts_all_calls_and_thin_those_of_sampling(attached: bool) -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=3, thin=2, sampler=sampler if attached else None)
    pattern = [True, False, False, True, False, True, True, False, False, True, True, True]
    collected = []
    for k, sampling in enumerate(pattern):
        backward(net, k)
        sampler.step()
        if chain.step(sampling):
            collected.append(k)
    # calls 3, 5, 6, 9, 10, 11 are of sampling and behind burn-in: every second of them
    assert collected == [5, 9, 11] and chain.steps == len(pattern)


def test_accumulation_skipped_steps_and_closures_are_counted_right() -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, burn_in=1, thin=2, sampler=sampler)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    left = []
    for k in range(5):
        sampler.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):  # chain.step after each micro-batch, as a careless loop does
            x, y = batch(k)
            scaler.scale(nn.functional.cross_entropy(net(x[part]), y[part]) / 2).backward()
            assert not chain.step()
        if k == 2:  # infinite gradients: the scaler skips this step
            next(net.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        before = sampler.iteration
        at = state(net)
        scaler.step(sampler)
        scaler.update()
        if sampler.iteration > before:
            left.append(at)
        chain.step()
    assert chain.steps == sampler.iteration == 4
    sampler.step(lambda: backward(net, 9))
    assert chain.step()
    assert [record.step for record in chain.records] == [2, 4]
    assert torch.equal(chain.posterior().snapshots["0.weight"][0], left[2]["0.weight"])


def test_of_several_steps_between_two_calls_the_last_counts() -> None:
    net = network()
    sampler = sgld(net)
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(6):
        backward(net, k)
        sampler.step()
        if k % 3 == 2:
            chain.step()
    assert [record.step for record in chain.records] == [2, 5] and chain.steps == 2


def test_equal_times_against_brute_force() -> None:
    weights = (torch.rand(400, generator=_source(3)) ** 3 + 0.01).tolist()
    rule, found = EqualTimes(burn_in=100, thin=2), []
    sampling = [k < 250 or k >= 300 for k in range(400)]
    for k, w in enumerate(weights):
        copies = rule.ahead(StepRecord(k, w, w, 1.0, w, w, 0.0))
        found += [k] * copies * sampling[k]
        rule.call(sampling[k])
    spacing = 2 * sum(weights[:100]) / 100
    assert rule.spacing == pytest.approx(spacing)
    ends, clock = {}, 0.0
    for k in range(100, 400):
        if sampling[k]:
            ends[k] = (clock, clock + weights[k])
            clock += weights[k]
    expected = [k for j in range(1, int(clock / spacing) + 1) for k, (a, b) in ends.items() if a <= j * spacing < b]
    assert found == expected and len(expected) > 80 and len(set(expected)) < len(expected)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_adaptive_steps_are_collected_at_equal_distances_in_their_time(momentum: float) -> None:
    net = network()
    rates = lambda k: 0.01 * (1 + k % 4)  # noqa: E731
    sampler = SASGLD(net.named_parameters(), rates, N, momentum=momentum, generator=_source(0))
    chain = bdl.Chain(net, burn_in=30, thin=1, sampler=sampler)
    assert chain.collect == "time"
    left, weights = [], []
    for k in range(150):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        weights.append(sampler.record.weight)
        chain.step()
    spacing = sum(weights[:30]) / 30
    clock, j, expected = 0.0, 1, []
    for k in range(30, 150):
        clock += weights[k]
        while j * spacing < clock:
            expected.append(k)
            j += 1
    assert [record.step for record in chain.records] == expected
    assert len(set(expected)) < len(expected), "no step was long enough to be collected twice"
    assert_equal(chain.posterior(), [left[k] for k in expected])
    assert torch.allclose(chain.posterior().weights, torch.full((len(expected),), 1 / len(expected)))


def test_steps_of_an_adaptive_sampler_carry_their_weights() -> None:
    net = network()
    sampler = SASGLD(net.named_parameters(), lambda k: 0.01 * (1 + k % 3), N, generator=_source(0))
    chain = bdl.Chain(net, burn_in=5, thin=2, sampler=sampler, collect="steps")
    psi = []
    for k in range(25):
        backward(net, k)
        sampler.step()
        psi.append(sampler.record.psi * sampler.record.lr)
        chain.step()
    kept = torch.tensor([psi[k] for k in range(6, 25, 2)])
    assert torch.allclose(chain.posterior().weights, kept / kept.sum())
    assert kept.max() > 1.2 * kept.min()


def test_decreasing_steps_carry_their_weights() -> None:
    net = network()
    rate = Decreasing(0.1, 1.0, 0.7)
    sampler = sgld(net, lr=rate)
    chain = bdl.Chain(net, sampler=sampler, thin=2)
    for k in range(10):
        backward(net, k)
        sampler.step()
        chain.step()
    expected = torch.tensor([rate(k) for k in range(1, 10, 2)])
    assert torch.allclose(chain.posterior().weights, expected / expected.sum())


@pytest.mark.parametrize("kind", [SGLD, SASGLD])
def test_cycles_weigh_the_same_and_steps_within_them_as_long_as_they_are(kind: Any) -> None:
    net = network()
    sampler = kind(net.named_parameters(), 0.05, N, generator=_source(1))
    schedule = Cyclical(sampler, cycle=10, cycles=3, explore=0.6, lr_min=0.01)
    chain = bdl.Chain(net, sampler=schedule)
    assert chain.collect == "steps"
    weights: list[list[float]] = [[], [], []]
    while not schedule.finished:
        backward(net, schedule.steps)
        sampler.step()
        schedule.step()
        if chain.step(schedule.sampling):
            weights[schedule.index].append(sampler.record.weight)
    assert [len(cycle) for cycle in weights] == [4, 4, 4]
    shares = chain.posterior().weights.view(3, 4)
    assert torch.allclose(shares.sum(1), torch.full((3,), 1 / 3))
    expected = torch.tensor(weights)
    assert torch.allclose(shares, expected / expected.sum(1, keepdim=True) / 3)
    assert [record.cycle for record in chain.records] == [0] * 4 + [1] * 4 + [2] * 4
    assert [record.phase for record in chain.records[:4]] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert {record.temperature for record in chain.records} == {1.0}


def test_interleaved_chains_do_not_influence_each_other() -> None:
    def alone(seed: int) -> bdl.posteriors.SamplePosterior:
        net = network(seed)
        sampler = SGHMC(net.named_parameters(), 0.05, N, generator=_source(seed))
        chain = bdl.Chain(net, 2, 2, sampler=sampler, chain_id=seed)
        for k in range(10):
            backward(net, k)
            sampler.step()
            chain.step()
        return chain.posterior()

    nets = [network(seed) for seed in (0, 1)]
    samplers = [SGHMC(net.named_parameters(), 0.05, N, generator=_source(i)) for i, net in enumerate(nets)]
    chains = [
        bdl.Chain(net, 2, 2, sampler=s, chain_id=i) for i, (net, s) in enumerate(zip(nets, samplers, strict=True))
    ]
    for k in range(10):
        for net, sampler, chain in zip(nets, samplers, chains, strict=True):
            backward(net, k)
            sampler.step()
            chain.step()
    expected = [alone(0), alone(1)]
    for chain, one in zip(chains, expected, strict=True):
        assert all(torch.equal(value, one.snapshots[name]) for name, value in chain.posterior().snapshots.items())
    both = pooled(chains)
    assert both.chains is not None and both.chains.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(both.snapshots["0.weight"], torch.cat([one.snapshots["0.weight"] for one in expected]))


# --- what is kept ------------------------------------------------------------------------------------------------


def run_sgld(net: nn.Module, steps: int, **options: Any) -> tuple[bdl.Chain, list[dict[str, Tensor]]]:
    sampler = sgld(net)
    chain = bdl.Chain(net, sampler=sampler, **options)
    left = []
    for k in range(steps):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        chain.step()
    return chain, left


def test_memory_is_bounded() -> None:
    chain, left = run_sgld(network(), 20, max_samples=3)
    assert_equal(chain.posterior(), left[-3:])
    assert len(chain) == 3 and len(chain.records) == 20
    chain, left = run_sgld(network(), 20, max_samples=3, keep="reservoir")
    steps = [record.step for record in chain.kept]
    assert_equal(chain.posterior(), [left[k] for k in steps])
    assert steps != [17, 18, 19]


def test_reservoir_is_uniform() -> None:
    # 3000 chains, 4 of 12 samples: each is kept with probability 1/3, counts have sd sqrt(3000 * 2/9) = 25.8;
    # a right reservoir is outside of 4 sd for one of 12 numbers in 1,300 seeds, and the seeds are fixed
    counts = torch.zeros(12)
    for chain in range(3000):
        retention, kept = Retention(4, "reservoir", chain), []
        for number in range(12):
            admitted, drops = retention.admit(number, kept)
            kept = [k for k in kept if k not in drops] + [number] * admitted
        counts[kept] += 1
    assert counts.sum() == 12_000 and float((counts - 1000).abs().max()) < 4 * 25.8


def test_differences_in_bfloat16() -> None:
    net = network()
    start = state(net)
    chain, left = run_sgld(net, 12, dtype="bfloat16-delta", burn_in=4)
    for name, values in chain.posterior().snapshots.items():
        exact = torch.stack([one[name] for one in left[4:]])
        delta = exact - start[name]
        assert values.dtype is torch.float32
        # rounding to the nearest of 8 bits (an error of at most 2^-8 of the value), and that of the float32 sum
        assert bool(((values - exact).abs() <= 2.0**-8 * delta.abs() + 1e-7).all())
        assert not torch.equal(values, exact)


def test_subsets_keep_their_own_tensors_alone() -> None:
    net = network(norm=True).eval()
    net[0].requires_grad_(False)
    sampler = SGLD(net[3].named_parameters(), 0.05, N, generator=_source(0))
    chain = bdl.Chain(net, sampler=sampler)
    for k in range(3):
        backward(net, k)
        sampler.step()
        chain.step()
    posterior = chain.posterior()
    assert set(posterior.snapshots) == {"3.weight", "3.bias"}
    x = batch(7)[0]
    probs = torch.stack(
        [
            functional_call(net, {name: v[s] for name, v in posterior.snapshots.items()}, (x,)).softmax(-1)
            for s in range(3)
        ]
    )
    assert torch.allclose(bdl.BayesianModel(net, posterior, "categorical")(x).mean, probs.mean(0), atol=1e-6)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    backward(net, 5)
    with pytest.raises(StaleModelError, match=r"parameter '0.weight' is not sampled and was written to"):
        sampler.step()


def test_names_are_those_of_the_plain_network() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    chain = bdl.Chain(compiled, thin=1)
    for k in range(2):
        backward(net, k)
        optimizer.step()
        chain.step()
    assert set(chain.posterior().snapshots) == {name for name, _ in net.named_parameters()}


def test_tied_parameters_are_kept_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    chain = bdl.Chain(net)
    chain.step()
    chain.step()
    posterior = chain.posterior()
    assert set(posterior.snapshots) == {"0.weight", "0.bias", "2.bias"}
    x = torch.randn(5, 4, generator=_source(0))
    expected = net(x).detach().softmax(-1)
    assert torch.allclose(bdl.BayesianModel(net, posterior, "categorical")(x).mean, expected, atol=1e-6)


def test_probes_are_outputs_at_the_samples() -> None:
    x = batch(3)[0]
    net = network(norm=True).eval()
    chain, left = run_sgld(net, 4, probe=x)
    expected = torch.stack([functional_call(net, one, (x,)) for one in left])
    assert torch.allclose(chain.probes(), expected, atol=1e-6) and chain.probes().shape == (4, 8, 3)
    assert not any(name.startswith(".") for name in chain.posterior().snapshots)
    with pytest.raises(UnsupportedError, match="probe=inputs"):
        bdl.Chain(net).probes()


@pytest.mark.filterwarnings("ignore::bayesdl.samplers.StochasticForwardWarning")
def test_refreshed_statistics_are_those_of_one_pass_at_the_sample() -> None:
    net = network(norm=True)
    data = [batch(k) for k in range(20, 25)]
    chain, left = run_sgld(net, 4, buffers="refresh", data=data, burn_in=2)
    posterior = chain.posterior()
    for row, one in enumerate(left[2:]):
        hidden = [x @ one["0.weight"].T + one["0.bias"] for x, _ in data]
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        variance = torch.stack([h.var(0) for h in hidden]).mean(0)
        assert torch.allclose(posterior.snapshots["1.running_mean"][row], mean, atol=1e-5)
        assert torch.allclose(posterior.snapshots["1.running_var"][row], variance, atol=1e-5)
        assert torch.equal(posterior.snapshots["0.weight"][row], one["0.weight"])


def test_predictions_save_and_load_with_chain_ids(tmp_path: Path) -> None:
    net = network()
    chain, left = run_sgld(net, 6, chain_id=5, thin=2)
    bayes = bdl.BayesianModel(net, chain.posterior(), "categorical")
    x = batch(11)[0]
    probs = torch.stack([functional_call(net, left[k], (x,)).softmax(-1) for k in (1, 3, 5)])
    assert torch.allclose(bayes(x).mean, probs.mean(0), atol=1e-6)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert torch.equal(again(x).mean, bayes(x).mean)
    assert isinstance(again.posterior, bdl.posteriors.SamplePosterior)
    assert again.posterior.chains is not None and again.posterior.chains.tolist() == [5, 5, 5]
    assert again.to(torch.float64).posterior.chains.dtype is torch.int64  # type: ignore[union-attr]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_the_network_and_the_global_random_state_are_left_alone() -> None:
    net = network(norm=True).eval()
    sampler = sgld(net)
    backward(net, 0)
    with untouched(net):
        chain = bdl.Chain(net, max_samples=2, keep="reservoir", probe=batch(0)[0])
        for _ in range(6):
            chain.step()
        chain.posterior()
        attached = bdl.Chain(net, sampler=sampler)
        attached.close()
    sampler.step()
    assert not attached.step() and not attached.records


def test_nothing_and_one_sample_are_errors_that_say_what_to_change() -> None:
    net = network()
    chain = bdl.Chain(net, burn_in=2)
    for number in (0, 0, 0, 1):
        with pytest.raises(NotFittedError, match=rf"{number} sample\(s\).*lower burn_in or thin"):
            chain.posterior()
        chain.step()
    assert len(chain.posterior()) == 2


def test_weights_that_are_not_finite_are_never_kept() -> None:
    net = network()
    chain = bdl.Chain(net)
    chain.step()
    with torch.no_grad():
        net[2].weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter '2.weight' holds NaN"):
        chain.step()
    assert len(chain) == 1 and len(chain.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burn_in": -1}, "burn_in=-1"),
        ({"thin": 0}, "thin=0"),
        ({"thin": 1.5}, "thin=1.5"),
        ({"chain_id": True}, "chain_id=True"),
        ({"keep": "first"}, "keep='first'"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"buffers": "drop"}, "buffers='drop'"),
        ({"buffers": "refresh"}, "belong together"),
        ({"data": []}, "belong together"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"collect": "time"}, "pass sampler="),
        ({"collect": "epochs"}, "collect='epochs'"),
        ({"schedule": 3}, "schedule is int; expected an object with state_dict"),
        ({"also": {"x": 3}}, "also x is int"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bdl.Chain(network(), **options)


def test_networks_and_samplers_that_do_not_belong_together() -> None:
    with pytest.raises(ArgumentError, match="4 of the sampler's 4 parameters are none of this network's"):
        bdl.Chain(network(), sampler=sgld(network()))
    with pytest.raises(ArgumentError, match="running statistics"):
        bdl.Chain(network(norm=True), buffers="shared")
    with pytest.raises(ArgumentError, match="nothing to sample"):
        bdl.Chain(network().requires_grad_(False))
    with pytest.raises(ArgumentError, match=r"a torch.nn.Module is expected, got int"):
        bdl.Chain(3)  # type: ignore[arg-type]


def test_losses_that_are_no_sums_over_the_data_are_noticed_once() -> None:
    for layer, text in (
        (nn.BatchNorm1d(6), "batch norm '1' is in train mode"),
        (nn.Dropout(), "dropout '1' is active"),
    ):
        net = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3))
        sampler = sgld(net)
        bdl.Chain(net, sampler=sampler)
        backward(net, 0)
        with pytest.warns(StochasticForwardWarning, match=text):
            sampler.step()
        sampler.step()


def test_repr_says_what_is_sampled() -> None:
    net = network()
    text = repr(bdl.Chain(net, 3, 2, sampler=sgld(net, prior_precision=25.0, temperature=0.5)))
    for part in ("0 samples", "burn_in=3", "thin=2", "T_eff=0.5", "prior sd 0.2", f"h={0.05 / N:.6g}"):
        assert part in text
    assert math.isfinite(len(text))


# --- several processes -------------------------------------------------------------------------------------------


def _data_parallel(rank: int, size: int) -> None:
    import tempfile

    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    net = network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    sampler = SGLD(net.named_parameters(), 0.05, N, generator=_source(0))
    chain = bdl.Chain(wrapped, thin=2, sampler=sampler, store=folder[0])
    memory = bdl.Chain(net, thin=2, sampler=sampler)
    for k in range(6):
        wrapped.zero_grad()
        x, y = batch(k)
        share = slice(rank * 4, rank * 4 + 4)
        nn.functional.cross_entropy(wrapped(x[share]), y[share]).backward()
        sampler.step()
        assert chain.step() == memory.step()
    torch.distributed.barrier()
    mine, theirs = memory.posterior().snapshots, chain.posterior().snapshots
    assert set(mine) == {name for name, _ in net.named_parameters()}
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])  # rank 0's file, this rank's memory


@pytest.mark.dist
def test_one_rank_of_a_data_parallel_chain_writes() -> None:
    run_processes(_data_parallel, 2)
