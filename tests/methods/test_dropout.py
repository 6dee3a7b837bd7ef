"""MC dropout: one mask is one function; the mean over masks has a closed form where dropout is linear."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.network import Network
from bayesdl.posteriors import MaskPosterior
from tests.untouched import untouched

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def functions(net: nn.Module, n: int, rate: float | None = None) -> list:
    method = bdl.MCDropout(num_samples=n, rate=rate)
    bayes = bdl.wrap(net, method, likelihood=bdl.Gaussian(1.0))
    return bayes.draw(n, generator=torch.Generator().manual_seed(1))


def test_masks_are_shared_by_all_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4, bias=False))
    nn.init.eye_(net[1].weight)
    for f in functions(net, 20):
        out = f(torch.ones(5, 4))
        assert torch.equal(out, out[:1].expand(5, 4))  # the same mask in every row
        assert set(out.unique().tolist()) <= {0.0, 2.0}  # inverted dropout: kept values are divided by 1 - p
        rows = torch.cat([f(X[:2]), f(X[2:3]), f(X[3:])])
        assert torch.equal(f(X), rows)
        assert torch.allclose(f(X), X * f(torch.ones(1, 4)))


def test_mean_over_masks_of_a_linear_network() -> None:
    # dropout is unbiased: the expectation is the network without dropout; the variance is p/(1-p) sum (w x)^2.
    # 4000 masks: means within 5 standard errors, 6 numbers; variances within 20% (kurtosis below 3: error 2.2%)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))
    bayes = bdl.wrap(net, bdl.MCDropout(num_samples=4000), likelihood=bdl.Gaussian(1.0))
    pred = bayes(X)
    expected = net.eval()(X).detach()
    variance = 0.3 / 0.7 * (X * net[1].weight.detach()).square().sum(1, keepdim=True)
    assert bool(((pred.mean - expected).abs() < 5 * (variance / 4000).sqrt()).all())
    assert torch.allclose(pred.epistemic, variance, rtol=0.2)


def test_expectation_over_all_masks_by_enumeration() -> None:
    # two units behind a tanh: 4 masks with known probabilities. 4000 draws, 5 standard errors
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.25), nn.Tanh(), nn.Linear(2, 1))
    hidden = net[0](X)
    exact = torch.zeros(6, 1)
    square = torch.zeros(6, 1)
    for mask in itertools.product((0.0, 1.0), repeat=2):
        share = torch.tensor([0.25 if m == 0 else 0.75 for m in mask]).prod()
        out = net[3](torch.tanh(hidden * torch.tensor(mask) / 0.75))
        exact, square = exact + share * out, square + share * out.square()
    deviation = (square - exact.square()).clamp(min=0).sqrt().detach()
    pred = bdl.wrap(net, bdl.MCDropout(num_samples=4000), likelihood=bdl.Gaussian(1.0))(X)
    assert bool(((pred.mean - exact.detach()).abs() < 5 * deviation / 4000**0.5 + 1e-6).all())


def test_rate_override() -> None:
    net = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4, bias=False))
    nn.init.eye_(net[1].weight)
    kept = torch.stack([f(torch.ones(1, 4)) for f in functions(net, 500, rate=0.8)])
    assert kept.unique().tolist() == pytest.approx([0.0, 5.0])
    # 2000 Bernoulli(0.2) masks: standard deviation 0.009, five of them
    assert abs(float((kept > 0).double().mean()) - 0.2) < 0.045
    assert net[0].p == 0.1


def test_a_rate_revives_layers_that_were_switched_off() -> None:
    net = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 1))
    with pytest.raises(UnsupportedError, match="no dropout layer with a rate above zero"):
        bdl.wrap(net, "dropout", likelihood=bdl.Gaussian(1.0))
    pred = bdl.wrap(net, bdl.MCDropout(rate=0.5), likelihood=bdl.Gaussian(1.0))(X)
    assert float(pred.epistemic.min()) > 0


def test_channels_are_dropped_whole() -> None:
    net = nn.Sequential(nn.Dropout2d(0.5), nn.Flatten())
    net.one = nn.Parameter(torch.ones(()))
    x = torch.ones(3, 8, 2, 2)
    for f in functions(net, 10):
        out = f(x).reshape(3, 8, 4)
        assert torch.equal(out, out[:1, :, :1].expand(3, 8, 4))
    fractions = torch.stack([(f(x).reshape(3, 8, 4)[0, :, 0] == 0).double().mean() for f in functions(net, 200)])
    assert abs(float(fractions.mean()) - 0.5) < 5 * 0.5 / 1600**0.5  # 1600 masks


def test_layers_and_calls_have_masks_of_their_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.other = nn.Dropout(0.5), nn.Dropout(0.5)
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([*(self.drop(x) for _ in range(150)), self.other(x)], 1) * self.one

    out = functions(Recurrent(), 1)[0](torch.ones(1, 64)).reshape(151, 64)
    assert len({tuple(row.tolist()) for row in out}) == 151


def test_transformer_layers_do_not_skip_their_dropout() -> None:
    # torch fuses an encoder layer in eval mode, past its dropout modules, unless hooks tell it not to
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    net = nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 1))
    with untouched(net):
        pred = bdl.wrap(net, "dropout", likelihood=bdl.Gaussian(1.0))(X)
    assert float(pred.epistemic.min()) > 1e-6


def test_hooks_are_removed() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    network = Network(net)
    posterior = MaskPosterior(("0",), 3)
    posterior.push(network, X, posterior.prepare(network, None, None))
    assert not network.module()[0]._forward_hooks
    with pytest.raises(RuntimeError):
        posterior.push(network, torch.ones(2, 7), [1])
    assert not network.module()[0]._forward_hooks


def test_errors() -> None:
    plain = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(UnsupportedError, match=r'functional dropout cannot be seen\); use "laplace"'):
        bdl.wrap(plain, "dropout", likelihood=bdl.Gaussian(1.0))
    alpha = nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(4, 1))
    with pytest.raises(UnsupportedError, match="layer '0' is an alpha dropout"):
        bdl.wrap(alpha, "dropout", likelihood=bdl.Gaussian(1.0))
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    with pytest.raises(ArgumentError, match="num_samples=0"):
        bdl.wrap(net, bdl.MCDropout(num_samples=0), likelihood=bdl.Gaussian(1.0))
    for rate in (-0.1, 1.0):
        with pytest.raises(ArgumentError, match=rf"rate={rate}; expected a probability in \[0, 1\)"):
            bdl.wrap(net, bdl.MCDropout(rate=rate), likelihood=bdl.Gaussian(1.0))
