"""Trained heads: convergence to the exact posterior, bounds, shapes, and the defects of a peer as tests."""

import math

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer import Classification, Regression, parameter_groups
from bayesdl.last_layer.parameterisation import COVARIANCES

N, D = 60, 4
NOISE = torch.tensor([0.1, 1.0, 0.4], dtype=torch.float64)


def data(outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    phi = randn(N, D)
    return phi, phi @ randn(D, outputs) + randn(outputs) + NOISE[:outputs] * randn(N, outputs)


def minimise(head, phi, y, rounds=40):
    """L-BFGS to convergence on the full-batch loss."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = head(phi).loss(y)
        loss.backward()
        return loss

    for _ in range(rounds):
        optimizer.step(closure)
        if max(float(p.grad.abs().max()) for p in parameters) < 1e-10:
            break
    return head


def exact(phi, y, precision, noise):
    design = torch.cat([phi, phi.new_ones(len(phi), 1)], 1)
    covariance = torch.linalg.inv(design.mT @ design / noise**2 + precision * torch.eye(D + 1, dtype=phi.dtype))
    return covariance @ (design.mT @ y) / noise**2, covariance


@pytest.mark.parametrize("outputs", [1, 3])
def test_dense_regression_converges_to_the_exact_posterior(outputs):
    phi, y = data(outputs)
    head = Regression(
        D,
        outputs,
        num_data=N,
        prior_precision=2.0,
        init_noise=NOISE[:outputs],
        fixed_noise=True,
        noise_prior=None,
    ).double()
    with torch.no_grad():
        head.log_noise.copy_(NOISE[:outputs].log())
    minimise(head, phi, y)
    found = head.covariance.dense()
    for k in range(outputs):
        mean, spread = exact(phi, y[:, k], 2.0, NOISE[k])
        assert torch.allclose(head.mean[k], mean, rtol=1e-6, atol=1e-8)
        assert torch.allclose(found[k], spread, rtol=1e-5, atol=1e-5 * float(spread.abs().max()))


def test_the_gamma_noise_converges_to_the_normal_gamma_posterior():
    phi, y = data(1)
    a0, b0, precision = 2.0, 0.5, 2.0
    head = Regression(D, 1, num_data=N, noise="gamma", noise_prior=(a0, b0), prior_precision=precision).double()
    minimise(head, phi, y, rounds=80)
    design = torch.cat([phi, phi.new_ones(N, 1)], 1)
    inner = design.mT @ design + precision * torch.eye(D + 1, dtype=phi.dtype)
    mean = torch.linalg.solve(inner, design.mT @ y[:, 0])
    shape = a0 + N / 2
    rate = b0 + 0.5 * (y[:, 0].square().sum() - mean @ inner @ mean)
    found = head.gamma()
    assert torch.allclose(found[0], torch.tensor([shape], dtype=phi.dtype), rtol=1e-4)
    assert torch.allclose(found[1], rate, rtol=1e-4)
    assert torch.allclose(head.mean[0], mean, rtol=1e-5, atol=1e-7)
    assert torch.allclose(head.covariance.dense()[0], torch.linalg.inv(inner), rtol=1e-3, atol=1e-7)
    predictive = head(phi[:3]).predictive.distribution
    spread = torch.einsum("bi,ij,bj->b", design[:3], torch.linalg.inv(inner), design[:3])
    assert torch.allclose(predictive.df, torch.full((3, 1), 2 * shape, dtype=phi.dtype), rtol=1e-4)
    assert torch.allclose(predictive.scale[:, 0].square(), (1 + spread) * rate / shape, rtol=1e-3)


def test_expected_variance_of_a_gamma_noise_is_not_the_inverse_of_its_mean_precision():
    head = Regression(D, 1, num_data=N, noise="gamma").double()
    with torch.no_grad():  # shape 3, rate 2: E[s^2] = 1, where rate / shape is 2/3
        head.raw_shape.fill_(math.log(math.expm1(2.0)))
        head.raw_rate.fill_(math.log(math.expm1(2.0)))
    assert torch.allclose(head.variance_and_precision()[0], torch.ones(1, dtype=torch.float64))
    phi, _ = data(1)
    assert torch.allclose(head(phi).predictive.aleatoric, torch.ones(N, 1, dtype=torch.float64))


@pytest.mark.parametrize("bound", ["km", "jensen", "km_reduced"])
def test_the_loss_bounds_the_evidence_of_a_classifier(bound):
    """-N loss is below log p(y), which importance sampling from q estimates from below on average too: compare with a
    quadrature over the one-dimensional weight of a two-class problem instead."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    y = (phi[:, 0] + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64) > 0).long()
    head = Classification(
        1,
        2,
        num_data=20,
        bias=False,
        bound=bound,
        noise_prior=None,
        init_noise=0.05,
        fixed_noise=True,
        prior_precision=1.0,
    ).double()
    minimise(head, phi, y, rounds=20)
    scale = 1.0 if bound != "km_reduced" else 0.05
    grid = torch.linspace(-9, 9, 301, dtype=torch.float64) * scale
    density = torch.exp(-0.5 * (grid / scale).square()) / math.sqrt(2 * math.pi) / scale
    logits = grid[:, None, None] * phi[None]
    # log p(y | w0, w1) depends on w0 - w1 alone
    fit = torch.stack(
        [
            nn.functional.logsigmoid((logits[i] - logits) * torch.where(y == 0, 1.0, -1.0).unsqueeze(1)).sum((1, 2))
            for i in range(301)
        ]
    )
    weight = torch.outer(density, density) * (grid[1] - grid[0]) ** 2
    evidence = torch.log((weight * fit.exp()).sum())
    value = -20 * head(phi).loss(y).detach()
    assert value < evidence + 0.05  # the logit noise of sd 0.05 moves the evidence by less than this
    assert value > evidence - (8.0 if bound == "jensen" else 4.0)


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_training_raises_the_bound_for_every_covariance(name):
    phi, y = data()
    head = Classification(D, 3, num_data=N, covariance=name, rank=2)
    labels = y.argmax(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = head(phi.float()).loss(labels)
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in head.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("options", [{}, {"bound": "km_reduced", "noise": "gamma"}, {"bound": "jensen"}])
def test_predictive_is_the_probit_of_all_variances_and_repeats_in_both_modes(options):
    phi, _ = data()
    head = Classification(D, 3, num_data=N, init_scale=1.0, **options).double()
    with torch.no_grad():
        head.mean.copy_(torch.randn(3, D + 1, generator=torch.Generator().manual_seed(0)))
    out = head.train()(phi)
    first = out.predictive.probs
    assert torch.equal(first, head.eval()(phi).predictive.probs)
    noise = head.variance_and_precision()[0]
    latent = out.variance * (noise if head.scaled else 1.0)
    expected = torch.softmax(out.mean / torch.sqrt(1 + math.pi / 8 * (latent + noise)), -1)
    assert torch.allclose(first, expected)
    assert out.ood_score("variance").shape == out.ood_score("max_prob").shape == (N,)


def test_sums_over_outputs_and_means_over_the_batch():
    """vbll averages the likelihood over outputs and sums the trace term: its posterior is wrong for unequal noise."""
    phi, y = data(2)
    head = Regression(D, 2, num_data=N, init_noise=NOISE[:2]).double()
    both = head(phi)
    each = head.expected_log_likelihood(both.mean, both.variance, y)
    parts = []
    for k in range(2):
        s = head.log_noise[k].exp()
        normal = torch.distributions.Normal(both.mean[:, k], s).log_prob(y[:, k])
        parts.append(normal - both.variance[:, k] / (2 * s**2))
    assert torch.allclose(each, parts[0] + parts[1])


def test_token_shapes_masks_weights_and_ignored_labels():
    phi, _ = data()
    tokens = phi.reshape(6, 10, D).float()
    head = Classification(D, 3, num_data=N)
    labels = torch.randint(3, (6, 10), generator=torch.Generator().manual_seed(0))
    flat = head(phi.float()).loss(labels.reshape(-1))
    assert torch.allclose(head(tokens).loss(labels), flat)
    mask = torch.arange(60).reshape(6, 10) % 3 > 0
    ignored = torch.where(mask, labels, -100)
    kept = mask.reshape(-1)
    expected = head(phi.float()[kept]).loss(labels.reshape(-1)[kept])
    assert torch.allclose(head(tokens).loss(labels, mask=mask), expected)
    assert torch.allclose(head(tokens).loss(ignored), expected)
    assert torch.allclose(head(tokens).loss(labels, weight=2.0 * mask), expected)
    soft = nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(head(tokens).loss(soft), flat)
    assert head(tokens).mean.shape == (6, 10, 3)
    assert head(tokens).ood_score("entropy").shape == (6, 10)
    regression = Regression(D, 1, num_data=N)
    y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(regression(tokens).loss(y), regression(tokens).loss(y.unsqueeze(-1)))


@pytest.mark.parametrize("share", [False, True])
def test_replace_copies_and_starts_at_the_old_layer(share):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, 3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    head = Classification(D, 3, num_data=N)
    copy = bdl.replace(net, "3", head, share_trunk=share)
    assert copy[3] is head and isinstance(net[3], nn.Linear)
    assert copy.training and all(m.training for m in copy.modules())
    x = torch.randn(20, 5)
    assert torch.allclose(copy.eval()(x).logits, net.eval()(x), atol=1e-6)
    assert (copy[0].weight is net[0].weight) is share
    net.train()
    optimizer = torch.optim.AdamW(parameter_groups(copy.train(), 0.1), lr=0.1)
    copy(x).loss(torch.randint(3, (20,))).backward()
    optimizer.step()
    same = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert same is not share
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(head.mean)] == 0.0 and decays[id(copy[0].weight)] == 0.1


def test_replace_refuses_what_is_no_such_layer():
    net = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, 3))
    head = Classification(D, 3, num_data=N)
    with pytest.raises(bdl.errors.SelectionError, match=r"linear layers are \['0', '2'\]"):
        bdl.replace(net, "fc", head)
    with pytest.raises(bdl.errors.SelectionError, match="Tanh"):
        bdl.replace(net, "1", head)
    with pytest.raises(ShapeError, match="maps 5 features to 4"):
        bdl.replace(net, "0", head)
    with pytest.raises(ArgumentError, match="head is Linear"):
        bdl.replace(net, "2", nn.Linear(D, 3))


def test_a_head_as_a_posterior_equals_its_own_predictive():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, 3))
    x = torch.randn(20, 5)
    for head in (
        Classification(D, 3, num_data=N, init_scale=1.0),
        Classification(D, 3, num_data=N, bound="km_reduced", noise="gamma"),
        Regression(D, 3, num_data=N),
        Regression(D, 3, num_data=N, noise="gamma"),
    ):
        copy = bdl.replace(net, "2", head).eval()
        bayes = bdl.BayesianModel(copy, head.posterior(), head.likelihood())
        mine, theirs = bayes(x), copy(x).predictive
        assert torch.allclose(mine.mean, theirs.mean, atol=1e-6)
        assert torch.allclose(mine.latent.variance, theirs.latent.variance, rtol=1e-4)
        kept = bayes.posterior.belief.mean.clone()
        with torch.no_grad():
            head.mean.add_(1.0)
        assert torch.equal(bayes.posterior.belief.mean, kept)  # a copy: it does not follow


def test_refusals():
    with pytest.raises(ArgumentError, match="num_data=0"):
        Classification(D, 3, num_data=0)
    with pytest.raises(ArgumentError, match="proper priors"):
        Regression(D, 3, num_data=N, bias_precision=0.0)
    with pytest.raises(ArgumentError, match="km_reduced"):
        Classification(D, 3, num_data=N, noise="gamma")
    with pytest.raises(UnknownNameError, match="noise 'loud'"):
        Regression(D, 3, num_data=N, noise="loud")
    head = Classification(D, 3, num_data=N)
    phi = torch.randn(5, D)
    with pytest.raises(LabelError, match="target 3 at index 1 is outside 0..2"):
        head(phi).loss(torch.tensor([0, 3, 1, 1, 1]))
    with pytest.raises(ShapeError, match=r"targets have shape \(4,\)"):
        head(phi).loss(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ShapeError, match="in_features=4"):
        head(torch.randn(5, D + 1))
    with pytest.raises(NonFiniteError, match="loss of the Bayesian head"):
        head(phi / 0.0).loss(torch.zeros(5, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="no score 'density'"):
        head(phi).ood_score("density")


def test_tensor_output_and_export():
    head = Classification(D, 3, num_data=N, tensor_output=True).eval()
    phi = torch.randn(5, D)
    assert torch.equal(head(phi), head.output.mean)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(_Moments(head), (phi,), dynamic_shapes={"phi": {0: rows}}).module()
    fresh = torch.randn(9, D)
    for a, b in zip(exported(fresh), head.moments(fresh), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class _Moments(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, phi):
        return self.head.moments(phi)


def test_autocast_keeps_single_precision():
    head = Classification(D, 3, num_data=N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(torch.randn(5, D).bfloat16())
        loss = out.loss(torch.zeros(5, dtype=torch.long))
    assert out.mean.dtype is loss.dtype is torch.float32
