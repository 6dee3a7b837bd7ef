"""Pictures hold the functions that they say they hold."""

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.functional import GP, plots
from tests.untouched import untouched

X = torch.linspace(-2, 2, 9).unsqueeze(1)


def generator():
    return torch.Generator().manual_seed(3)


def test_lines_are_functions_of_the_prior_or_the_target():
    plt = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    net, prior = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2)), bdl.GaussianPrior(2.0)
    with untouched(net):
        axes = plots.draws(prior, X, net, count=3, output=1, generator=generator())
    source, lines = generator(), axes.get_lines()
    assert len(lines) == 3
    for line in lines:
        weights = prior.sample(dict(net.named_parameters()), source)
        expected = torch.func.functional_call(net, weights, (X,))[:, 1].detach()
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()).float(), expected)
        torch.testing.assert_close(torch.as_tensor(line.get_xdata()).float(), X[:, 0])
    same = plots.draws(GP(), X, ax=axes, generator=generator())
    assert same is axes and len(axes.get_lines()) == 3 + 8
    values = GP().sample(X, 8, generator())[..., 0]
    torch.testing.assert_close(torch.as_tensor(axes.get_lines()[3].get_ydata()).double(), values[0])
    plt.close("all")
    with pytest.raises(ArgumentError, match="pass model="):
        plots.draws(prior, X)
    with pytest.raises(ArgumentError, match="functions of one input"):
        plots.draws(GP(), torch.zeros(4, 2))


def test_correlations_are_drawn_by_distance():
    plt = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
    options = {"distance": "moments", "steps": 2, "num_functions": 16, "progress": False}
    report = bdl.functional.match(net, GP(), X, **options).report
    target, own, before = plots.correlation(report).get_lines()
    for line, fit, column in ((target, report.fit, 2), (own, report.fit, 1), (before, report.before, 1)):
        assert list(line.get_xdata()) == [row[0] for row in fit.correlation]
        assert list(line.get_ydata()) == [row[column] for row in fit.correlation]
    alone = bdl.functional.evaluate(net, bdl.GaussianPrior(1.0), GP(), X, num_functions=50)
    assert [line.get_label() for line in plots.correlation(alone).get_lines()] == ["target", "prior"]
    plt.close("all")
    data = torch.randn(8, 4, generator=generator())
    coder = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    report = bdl.functional.match(coder, data, data, **{**options, "distance": "sw"}).report
    with pytest.raises(ArgumentError, match="no places"):
        plots.correlation(report)
