"""What a user's typed code looks like; mypy checks it, strictly, against the installed wheel (tests/installed.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.errors import BayesDLError
from bayesdl.samplers import SGLD


class Counts(bdl.Likelihood):
    """A family of the user's own."""

    def distribution(self, f: Tensor) -> Distribution:
        return torch.distributions.Poisson(f.exp())


def use(net: nn.Module, loader: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> float:
    """Every line has the type that the documentation says."""
    bayes: bdl.BayesianModel = bdl.wrap(net, "laplace", loader, likelihood="categorical", progress=False)
    tuned: bdl.BayesianModel = bayes.tune("heldout", loader)
    pred: bdl.Predictive = tuned(x)
    distribution: Distribution = pred.distribution
    parts: Tensor = pred.aleatoric + pred.epistemic
    functions = tuned.draw(2)
    value: Tensor = functions[0](x)
    report: bdl.Report = bdl.compare({"a": bayes, "b": tuned}, loader)
    scores: dict[str, float] = bdl.evaluate(bayes, loader)
    sampler = SGLD(net.parameters(), lr=1e-2, num_data=100, prior_precision=1.0)
    chain = bdl.Chain(net, burn_in=1, thin=1)
    sampler.step()
    chain.step()
    try:
        bayes.save("file.safetensors")
        again: bdl.BayesianModel = bdl.load("file.safetensors", net, likelihood=Counts())
    except BayesDLError:
        return 0.0
    curvature = estimate(net, loader, "categorical", structure="diag")
    total: Tensor = curvature.logdet(1.0, 1.0) + value.sum() + parts.sum() + distribution.log_prob(y).sum()
    return float(total) + scores["nll"] + report["a"]["nll"] + float(again.log_evidence())
