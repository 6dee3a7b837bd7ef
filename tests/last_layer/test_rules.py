"""Prior of an exact regression by left-out residuals under a given noise, against refits without each point."""

import torch
from torch import nn

import bayesdl as bdl
from bayesdl.last_layer import ConjugateRegression, Statistics
from bayesdl.last_layer.rules import WIDER, held_out, leave_one_out, left_out
from bayesdl.last_layer.search import maximise

NOISE = 0.05


def features(n, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, 1, generator=generator, dtype=torch.float64)
    return phi, phi @ weight + NOISE * torch.randn(n, 1, generator=generator, dtype=torch.float64), generator


def score(regression, phi, y, shifted, ratio):
    """Mean NLL of left-out residuals, each under the variance of a regression refitted without its point."""
    variance, noise = torch.full((1,), NOISE**2).double(), []
    whole = regression.with_hyperparameters(ratio, variance)
    for n in range(len(phi)):
        rest = torch.arange(len(phi)) != n
        refit = ConjugateRegression.decompose(Statistics.of(phi[rest], y[rest]))
        noise.append(refit.with_hyperparameters(ratio, variance).latent(phi[n : n + 1])[1][0] + NOISE**2)
    spread = torch.stack(noise).sqrt()
    return -torch.distributions.Normal(whole.latent(phi)[0], spread).log_prob(shifted).mean()


def test_a_given_noise_scores_left_out_residuals_at_the_spread_of_refits():
    phi, y, generator = features(6)
    shifted = y + 0.6 * torch.randn(6, 1, generator=generator, dtype=torch.float64)
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    variance = torch.full((1,), NOISE**2).double()
    best = left_out(start, phi, shifted, noise_variance=variance)
    assert torch.equal(best.noise_variance, variance)
    least = score(start, phi, y, shifted, best.ratio)
    # the grid has 8.6 steps a decade: a factor of 1.4 crosses at least one of its points
    for factor in (1e-4, 1e-2, 0.1, 0.5, 1 / 1.4, 1.4, 2.0, 10.0, 1e2, 1e4):
        if best.ratio * factor >= maximise(start, noise_variance=variance)[0].ratio / WIDER:
            assert least < score(start, phi, y, shifted, best.ratio * factor) + 1e-3
    wide = held_out(start, phi, shifted, noise_variance=variance)  # bounded by 2 s^2: nothing is too wide
    assert score(start, phi, y, shifted, wide.ratio) > least


def test_a_noise_far_too_small_does_not_make_the_prior_vanish():
    phi, y, generator = features(200)
    away = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    seen = torch.cat([phi, torch.ones(200, 1)], 1)
    # large, and nothing that another weight would explain: all wider priors score alike, a little better each
    shifted = y + 5.0 * (away - seen @ torch.linalg.lstsq(seen, away).solution)
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    variance = torch.full((1,), NOISE**2).double()
    best = left_out(start, phi, shifted, noise_variance=variance)
    evidence = maximise(start, noise_variance=variance)[0].prior_precision
    spread = (phi - phi.mean(0)).square().sum(1).mean() / y.var(0, correction=0)
    assert torch.allclose(best.prior_precision, torch.minimum(evidence, spread) / WIDER, rtol=1e-10)
    assert held_out(start, phi, shifted, noise_variance=variance).prior_precision < best.prior_precision / 100


def test_constant_targets_and_features_leave_a_finite_prior():
    for phi, y in ((torch.randn(6, 2), torch.ones(6, 1)), (torch.ones(6, 2), torch.randn(6, 1))):
        phi, y = phi.double(), y.double()
        start = ConjugateRegression.decompose(Statistics.of(phi, y))
        best = left_out(start, phi, y + 1.0, noise_variance=torch.full((1,), NOISE**2).double())
        assert bool(torch.isfinite(best.prior_precision).all())


def test_an_open_noise_or_a_given_prior_is_the_rule_of_held_out_data():
    phi, y, _ = features(20)
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    one = torch.ones(1).double()
    for given in ({}, {"prior_precision": one}, {"prior_precision": one, "noise_variance": one}):
        assert torch.equal(left_out(start, phi, y + 1, **given).ratio, held_out(start, phi, y + 1, **given).ratio)


def trained(n, seed):
    """A small network on few points of a smooth function with targets of unit spread, and fresh points."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n + 300, 2, generator=generator) - 1
    y = (3 * x[:, :1]).sin() * (2 * x[:, 1:]).cos() + 0.5 * x[:, 1:]
    y = (y - y[:n].mean()) / y[:n].std() + NOISE * torch.randn(len(y), 1, generator=generator)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        (net(x[:n]) - y[:n]).square().mean().backward()
        optimizer.step()
    return net, (x[:n], y[:n]), (x[n:], y[n:])


def test_few_points_and_a_small_given_noise_leave_a_spread_of_the_order_of_the_targets(monkeypatch):
    options = {"likelihood": bdl.Gaussian(NOISE), "progress": False}
    losses = {"training": [], "evidence": [], "seen": []}
    for seed in range(5):
        net, train, (x, y) = trained(15, seed)
        models = {rule: bdl.wrap(net, bdl.VBLL(tuning=rule), [train], **options) for rule in ("training", "evidence")}
        again = models["evidence"].tune("training", noise=False)
        found = models["training"].posterior.belief.regression.prior_precision
        assert torch.allclose(again.posterior.belief.regression.prior_precision, found)
        far = models["training"](torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]]))
        assert 0.3 < float(far.variance.sqrt().median()) < 10.0
        with monkeypatch.context() as patch:  # residuals at the spread of points that are conditioned on
            patch.setattr("bayesdl.methods.vbll.left_out", held_out)
            models["seen"] = bdl.wrap(net, "vbll", [train], **options)
        assert float(models["seen"](x).variance.sqrt().mean()) > 10.0
        for rule, model in models.items():
            losses[rule].append(-float(model(x).log_prob(y).mean()))
    middle = {rule: float(torch.tensor(values).median()) for rule, values in losses.items()}
    assert middle["training"] < min(middle["evidence"], middle["seen"]) - 1.0


def two_outputs(n=12):
    """Features and targets of two outputs, whose own best precisions differ by far."""
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[3.0, 0.02], [-2.0, 0.01], [4.0, -0.03]], dtype=torch.float64)
    noise = torch.tensor([0.3, 0.2], dtype=torch.float64)
    return phi, phi @ weight + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64), noise.square()


def refits(phi, y, precision, variance):
    """Sum over points and outputs of the NLL under a ridge regression with intercept fitted without the point."""
    total = 0.0
    for n in range(len(phi)):
        rest = torch.arange(len(phi)) != n
        centre, level = phi[rest].mean(0), y[rest].mean(0)
        at, rows = phi[n] - centre, phi[rest] - centre
        for k, s2 in enumerate(variance):
            inner = rows.mT @ rows / s2 + precision * torch.eye(3).double()
            mean = level[k] + at @ torch.linalg.solve(inner, rows.mT @ (y[rest, k] - level[k])) / s2
            spread = s2 + s2 / (len(phi) - 1) + at @ torch.linalg.solve(inner, at)
            total -= torch.distributions.Normal(mean, spread.sqrt()).log_prob(y[n, k])
    return total


def test_a_shared_prior_under_a_given_noise_is_one_precision_that_scores_best_in_refits():
    phi, y, variance = two_outputs()
    start = maximise(ConjugateRegression.decompose(Statistics.of(phi, y)), sharing="shared", noise_variance=variance)[0]
    best = leave_one_out(start, phi, y, noise_variance=variance, shared=True)
    torch.testing.assert_close(best.prior_precision, best.prior_precision[:1].expand(2), rtol=1e-12, atol=0.0)
    found = float(best.prior_precision[0])
    truth = min(float(refits(phi, y, 10.0**e, variance)) for e in torch.arange(-4.0, 6.0, 0.1).tolist())
    assert float(refits(phi, y, found, variance)) <= truth + 0.05  # 8.6 steps a decade
    own = leave_one_out(start, phi, y, noise_variance=variance).prior_precision
    assert own[1] > 20 * own[0]  # what one for each output would be


def test_a_shared_prior_is_shared_by_every_rule_and_no_wider_than_an_output_allows():
    phi, y, variance = two_outputs()
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    shifted = y + torch.tensor([0.4, 0.1])
    for rule in (held_out, left_out, leave_one_out):
        best = rule(start, phi, shifted, noise_variance=variance, shared=True)
        torch.testing.assert_close(best.prior_precision, best.prior_precision[:1].expand(2), rtol=1e-12, atol=0.0)
        assert torch.equal(best.noise_variance, variance)
    far = left_out(start, phi, y + 1e4, noise_variance=variance, shared=True).prior_precision[0]
    evident = maximise(start, sharing="shared", noise_variance=variance)[0].prior_precision
    spread = (phi - phi.mean(0)).square().sum(1).mean() / y.var(0, correction=0)
    assert float(far) >= float(torch.minimum(evident, spread).min() / WIDER) * (1 - 1e-9)


def test_a_shared_prior_on_held_out_data_with_an_open_noise():
    phi, y, _ = two_outputs(40)
    start = ConjugateRegression.decompose(Statistics.of(phi[:20], y[:20]))
    start = maximise(start, sharing="shared")[0]
    best = held_out(start, phi[20:], y[20:], shared=True)
    torch.testing.assert_close(best.prior_precision, best.prior_precision[:1].expand(2), rtol=1e-12, atol=0.0)

    def loss(regression):
        mean, variance = regression.latent(phi[20:])
        spread = (variance + regression.noise_variance).sqrt()
        return -torch.distributions.Normal(mean, spread).log_prob(y[20:]).mean(0).sum()

    least = loss(best)
    assert least <= loss(start)
    for precision in (0.01, 0.1, 0.5, 2.0, 10.0, 100.0):
        for noise in (0.5, 0.8, 1.25, 2.0):
            variance = best.noise_variance * noise
            assert (
                least <= loss(start.with_hyperparameters(best.prior_precision * precision * variance, variance)) + 0.02
            )


def test_wrap_keeps_one_prior_for_all_outputs():
    phi, y, variance = two_outputs(60)
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    data, unseen = [(phi[:40].float(), y[:40].float())], [(phi[40:].float(), y[40:].float())]
    for noise in (None, variance.sqrt().float()):
        for validation in (None, unseen):
            for rule in ("training", "loo", "evidence"):
                method = bdl.VBLL(prior_sharing="shared", tuning=rule)
                likelihood = bdl.Gaussian(noise=noise)
                bayes = bdl.wrap(net, method, data, likelihood=likelihood, validation=validation, progress=False)
                precision = bayes.posterior.belief.regression.prior_precision
                torch.testing.assert_close(precision, precision[:1].expand(2), rtol=1e-9, atol=0.0)
