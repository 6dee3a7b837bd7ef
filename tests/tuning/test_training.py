"""Tuning on the training data alone: it does no harm, and says what it did."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.training import harm_of, left_out_residuals

LAST = bdl.Laplace(select="last_layer", structure="full")


def classifier(rows: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learnt its labels by heart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net, x, y


def regressor() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    y = x[:, :1].sin() + 0.3 * torch.randn(300, 1, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 1))
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(1500):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(x[:60]), y[:60]).backward()
        optimiser.step()
    return net, x, y


def nll(model: bdl.BayesianModel, x: Tensor, y: Tensor) -> float:
    return -float(model(x).log_prob(y).double().mean())


@pytest.mark.parametrize("harm", [0.002, 0.05])
def test_is_the_widest_posterior_that_costs_the_training_points_at_most_harm(harm: float) -> None:
    net, x, y = classifier()
    plain = nn.functional.cross_entropy(net(x), y).item()
    bayes = bdl.wrap(net, LAST, [(x, y)], likelihood="categorical", progress=False)
    grid = [10.0 ** (k / 4) for k in range(-8, 21)]
    tuned = bayes.tune("training", grid=grid, harm=harm)
    assert isinstance(tuned.posterior, GaussianPosterior)
    chosen = min(range(len(grid)), key=lambda k: abs(math.log(grid[k] / float(tuned.posterior.precision))))

    def cost(precision: float) -> float:
        prior = bdl.GaussianPrior(precision=precision)
        fixed = bdl.wrap(net, LAST, [(x, y)], likelihood="categorical", prior=prior, progress=False)
        return nll(fixed, x, y) - plain

    assert 0 < chosen < len(grid) - 1
    assert cost(grid[chosen]) <= harm < cost(grid[chosen - 1])
    assert any(f"at most {harm:g} nats" in f.text for f in tuned.diagnose().findings)


def test_is_what_wrap_does_without_held_out_data_and_does_no_harm_there() -> None:
    net, x, y = classifier()
    bayes = bdl.wrap(net, "laplace", [(x[:40], y[:40])], likelihood="categorical", progress=False)
    assert isinstance(bayes.posterior, GaussianPosterior)
    again = bayes.tune("evidence").tune("training")
    assert torch.equal(again.posterior.precision, bayes.posterior.precision)  # type: ignore[attr-defined]
    plain = nn.functional.cross_entropy(net(x[:40]), y[:40]).item()
    bound = math.log(40) / 80  # more than 0.002
    assert plain + 0.002 < nll(bayes, x[:40], y[:40]) <= plain + bound
    assert any(f"at most {bound:.2g} nats" in f.text for f in bayes.diagnose().findings)
    assert nll(again.tune("training", harm=0.002), x[:40], y[:40]) <= plain + 0.002
    assert nll(bayes.tune("evidence"), x[:40], y[:40]) > plain + 0.05
    assert float(bayes(x).epistemic.mean()) > 1e-3


@pytest.mark.parametrize("select", ["all", "last_layer"])
def test_an_overfitted_regression_is_almost_as_good_as_with_held_out_data(select: str) -> None:
    """Within 0.2 nats of a plain network whose noise fits 120 new points; with its own residuals it is 1 worse."""
    net, x, y = regressor()
    seen, held, new = ((x[p], y[p]) for p in (slice(0, 60), slice(60, 180), slice(180, 300)))
    bayes = bdl.wrap(net, bdl.Laplace(select=select), [seen], likelihood="gaussian", progress=False)
    safe = nll(bdl.wrap(net, "map", [held], likelihood="gaussian", progress=False), *new)
    assert nll(bayes, *new) < safe + 0.2
    assert nll(bdl.wrap(net, "map", [seen], likelihood="gaussian", progress=False), *new) > safe + 1.0


def test_two_outputs_with_noises_of_their_own() -> None:
    """Rescaling an output rescales its noise and nothing else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y = y + torch.tensor([0.1, 0.5]).double() * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    weights = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution.T
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(weights[:, :-1])
        net.bias.copy_(weights[:, -1])
    bayes = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood="gaussian", progress=False)
    assert isinstance(bayes.posterior, GaussianPosterior) and bayes.posterior.noise is not None
    # least squares with 40 - 4 degrees of freedom: a standard deviation of 12%
    torch.testing.assert_close(bayes.posterior.noise, torch.tensor([0.1, 0.5]).double(), rtol=0.4, atol=0.0)


def test_a_shuffling_loader_and_an_adapter_of_the_users() -> None:
    net, x, y = regressor()
    pairs = torch.utils.data.TensorDataset(x[:60], y[:60])
    shuffled = torch.utils.data.DataLoader(pairs, batch_size=7, shuffle=True)

    def wrapped(loader: object) -> float:
        bayes = bdl.wrap(net, "laplace", loader, likelihood="gaussian", batch=lambda b: (b[0], b[1]), progress=False)
        assert isinstance(bayes.posterior, GaussianPosterior) and bayes.posterior.noise is not None
        return float(bayes.posterior.noise)

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert math.isclose(wrapped(shuffled), wrapped([(x[:60], y[:60])]), rel_tol=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_falls_back_to_the_evidence_where_a_layer_cannot_be_reached_and_says_so() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).detach())

    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    bayes = bdl.wrap(Cut(), bdl.Laplace(select="head"), [(x, y)], likelihood="gaussian", progress=False)
    assert any("evidence" in f.text and "validation" in f.action for f in bayes.diagnose().warnings)


def test_refuses_what_it_cannot_do(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x, y = classifier(20)
    bayes = bdl.wrap(net, LAST, [(x, y)], likelihood="categorical", progress=False)
    for options in ({"harm": 0.0}, {"harm": math.nan}, {"limit": 1}):
        with pytest.raises(ArgumentError, match="expected at least 2, and a positive number"):
            bayes.tune("training", **options)
    with pytest.raises(UnsupportedError, match="linearised"):
        bdl.wrap(net, "map", likelihood="categorical").tune("training", [(x, y)])
    bayes.save(tmp_path / "b.safetensors")
    with pytest.raises(ArgumentError, match="training data"):
        bdl.load(tmp_path / "b.safetensors", net).tune("training")
    regression, a, b = regressor()
    one = bdl.wrap(regression, "laplace", [(a[:60], b[:60])], likelihood="gaussian", progress=False)
    with pytest.raises(ArgumentError, match="at least 2"):
        one.tune("training", [(a[:1], b[:1])])


def test_some_points_stand_for_all_of_them_by_the_ratio_of_their_residuals() -> None:
    net, x, y = regressor()
    data = [(x[:60], y[:60]), (x[60:], y[60:])]  # the network knows the first by heart, and the others not at all
    bayes = bdl.wrap(net, LAST, data, likelihood="gaussian", prior=bdl.GaussianPrior(1.0), progress=False)
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    residual = (y - net(x)).double().detach()
    own = residual[:60].square().mean().sqrt()
    found = left_out_residuals(bayes, posterior, data, 60)
    alone = bdl.wrap(net, LAST, data[:1], likelihood="gaussian", prior=bdl.GaussianPrior(1.0), progress=False)
    assert isinstance(alone.posterior, GaussianPosterior)
    plain = left_out_residuals(alone, alone.posterior, data[:1], 60)
    torch.testing.assert_close(found, plain * residual.square().mean().sqrt() / own, rtol=1e-5, atol=0.0)


def test_the_default_harm_is_the_largest_of_three() -> None:
    flat = torch.full((50,), 0.3, dtype=torch.float64)
    assert harm_of(flat, 10_000) == 0.002
    assert harm_of(flat, 50) == pytest.approx(math.log(50) / 100)
    noisy = torch.tensor([0.0, 1.0] * 25, dtype=torch.float64)  # standard deviation 0.5 sqrt(50 / 49)
    assert harm_of(noisy, 400) == pytest.approx(0.5 * math.sqrt(50 / 49) / 20)
    assert harm_of(flat[:1], 100) == pytest.approx(math.log(100) / 200)
