"""Findings: recorded choices, and warnings that fire where they should and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

import bayesdl as bdl
from bayesdl.diagnose import Diagnosis, Finding

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=G)
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(60, generator=G)


def line() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.linalg.lstsq(X, Y.unsqueeze(1)).solution.T)
        net[0].bias.zero_()
    return net


def laplace(precision: float | None = None) -> bdl.BayesianModel:
    prior = None if precision is None else bdl.GaussianPrior(precision=precision)
    return bdl.wrap(line(), "laplace", [(X, Y)], likelihood=bdl.Gaussian(0.1), prior=prior, progress=False)


def test_a_sound_model_has_no_warnings() -> None:
    diagnosis = laplace().diagnose()
    assert diagnosis.warnings == ()
    assert any("effective of 4 selected parameters" in f.text for f in diagnosis.findings)
    assert "prior precision" in str(diagnosis)


def test_effective_parameters_of_a_linear_model() -> None:
    # gamma = tr((H + 1)^-1 H) with H = X^T X / noise^2, bias included: nearly all four
    design = torch.cat([X, torch.ones(60, 1)], 1).double()
    hessian = design.T @ design / 0.01
    gamma = float(torch.trace(torch.linalg.solve(hessian + torch.eye(4), hessian)))
    found = laplace(1.0).diagnose().findings
    assert any(f.text.startswith(f"{gamma:.1f} effective of 4") for f in found)


def test_a_prior_that_dominates() -> None:
    (warning,) = laplace(1e12).diagnose().warnings[:1]
    assert "the prior dominates" in warning.text and "lower the prior precision" in warning.action


def test_weights_far_outside_the_prior() -> None:
    # |theta|^2 is about 5.25: times 1e6 it exceeds ten per parameter
    texts = [f.text for f in laplace(1e6).diagnose().warnings]
    assert any("weights lie far outside the prior" in text for text in texts)


def test_records_survive_tuning() -> None:
    net = line()
    bayes = bdl.wrap(net, "map", [(X, Y)], likelihood="gaussian", progress=False)
    assert any("is the residual on the data given" in f.text for f in bayes.diagnose().findings)
    tuned = bayes.tune("heldout", [(X, Y)])
    # the noise was chosen anew: what was said of it before is superseded, and nothing else
    assert not any("is the residual on the data given" in f.text for f in tuned.diagnose().findings)
    assert any("chosen on held-out data" in f.text for f in tuned.diagnose().findings)
    other = bayes.replaced(findings=(Finding("info", "something else"),)).tune("heldout", [(X, Y)])
    assert any(f.text == "something else" for f in other.diagnose().findings)


def test_words() -> None:
    found = Finding("warning", "it is so", "do this")
    assert str(found) == "[warning] it is so -> do this"
    assert str(Finding("info", "it is so")) == "[info] it is so"
    diagnosis = Diagnosis((Finding("info", "a"), found))
    assert diagnosis.warnings == (found,)
    assert str(diagnosis) == "[info] a\n[warning] it is so -> do this"
    assert str(Diagnosis(())) == "nothing to report"


def test_residual_noise_of_each_output() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    targets = torch.stack([Y, 3 * Y], 1)
    bayes = bdl.wrap(
        net, "map", [(X[:50], targets[:50]), (X[50:], targets[50:])], likelihood="gaussian", progress=False
    )
    expected = (net(X).detach() - targets).double().square().mean(0).sqrt()
    assert torch.allclose(torch.as_tensor(bayes.likelihood.config()["noise"]).double(), expected)


def test_left_out_log_variances_may_be_extreme() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), 5.0 * torch.randn(8, 2)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    prior = bdl.GaussianPrior(precision=1e-4)
    bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="heteroscedastic", prior=prior, progress=False)
    assert any("left out" in str(finding) for finding in bayes.diagnose([(x, y)]).findings)
