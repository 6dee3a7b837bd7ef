"""Random networks against the dense oracle: whatever torch's layers are composed to, curvature is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from bayesdl.curvature import estimate
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.architectures import EXAMPLES, FAMILIES, Architecture, architectures
from tests.cases import targets
from tests.untouched import untouched

QUICK = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


def check(drawn: Architecture, kind: str, likelihood: str) -> None:
    net, x = drawn.net, drawn.x
    y = targets(likelihood, count=EXAMPLES)
    family = resolve(likelihood, noise=1.0) if likelihood == "gaussian" else resolve(likelihood)
    options = {"kind": kind, "select": drawn.select, "progress": False}
    names = Network(net, select=drawn.select, example=x).names
    try:
        jac, f = oracles.jacobian(net, x, names), oracles.outputs(net, x)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            reject()  # a network that nobody can train
        raise
    with untouched(net):
        full = estimate(net, [(x[:1], y[:1]), (x[1:], y[1:])], family, structure="full", **options)
        diagonal = estimate(net, [(x, y)], family, structure="diag", **options)
        kron = estimate(net, [(x, y)], family, structure="kron", **options)
    if kind == "ggn":
        truth = oracles.ggn(jac, oracles.lambda_formula(likelihood, f))
    else:
        truth = oracles.outer_gradients(jac, oracles.score(likelihood, f, y))
    if float(truth.abs().max()) < 1e-6:
        reject()  # saturated: diag(p) - p p^T, the oracle's own formula, has cancelled
    close = {"rtol": 1e-7, "atol": 1e-9 * float(truth.abs().max())}
    torch.testing.assert_close(full.to_dense(), truth, **close)
    torch.testing.assert_close(diagonal.to_dense().diagonal(), truth.diagonal(), **close)
    product = kron.to_dense()
    assert bool((torch.linalg.eigvalsh(product) >= -1e-9 * product.abs().max()).all())
    for block, part in zip(kron.layout.blocks, kron.layout.split(torch.arange(len(product))), strict=True):
        if block.kind not in ("linear", "rows"):  # nothing to factorise: exact
            index = part.flatten()
            torch.testing.assert_close(product[index][:, index], truth[index][:, index], **close)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("family", FAMILIES)
def test_random_networks_have_exact_curvature(family: str) -> None:
    @settings(max_examples=12, **QUICK)
    @given(architectures(family), st.sampled_from(["ggn", "empirical"]), st.sampled_from(["categorical", "gaussian"]))
    def run(drawn: Architecture, kind: str, likelihood: str) -> None:
        check(drawn, kind, likelihood)

    run()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_networks_have_exact_curvature(family: str) -> None:
    @settings(max_examples=200, **QUICK)
    @given(
        architectures(family),
        st.sampled_from(["ggn", "empirical"]),
        st.sampled_from(["categorical", "gaussian", "bernoulli", "poisson"]),
    )
    def run(drawn: Architecture, kind: str, likelihood: str) -> None:
        check(drawn, kind, likelihood)

    run()
