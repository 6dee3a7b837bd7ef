from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NotFittedError, UnsupportedError
from bayesdl.integrations import arviz as bridge
from bayesdl.integrations.arviz import to_arviz
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.diagnostics import ess, quantities, rhat
from bayesdl.samplers.diagnostics.convergence import by_chain

PROBE = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 1])


def run(
    number: int, sampler_class: Any = bdl.samplers.SGLD, draws: int = 12, **own: Any
) -> tuple[nn.Module, bdl.Chain]:
    torch.manual_seed(number)
    net = nn.Linear(2, 3)
    sampler = sampler_class(net.parameters(), 0.1, 20, generator=torch.Generator().manual_seed(number))
    chain = bdl.Chain(net, burn_in=3, sampler=sampler, probe=PROBE, chain_id=number, **own)
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    while len(chain) < draws:
        sampler.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        sampler.step()
        chain.step(loss=loss)
    return net, chain


@pytest.fixture(scope="module")
def arviz() -> Any:
    return pytest.importorskip("arviz", reason="the package that is exported to")


def test_chains(arviz: Any) -> None:
    chains = [run(0)[1], run(1)[1]]
    found = to_arviz(chains, targets=LABELS, likelihood="categorical")
    outputs = torch.stack([chain.probes() for chain in chains])
    np.testing.assert_allclose(found.posterior["output"].values, outputs.softmax(-1).numpy(), rtol=1e-6)
    scores = outputs.log_softmax(-1)[:, :, range(4), LABELS]
    np.testing.assert_allclose(found.log_likelihood["y"].values, scores.numpy(), rtol=1e-5)
    stats = found.sample_stats
    assert stats["step_size"].values == pytest.approx(0.1 / 20) and stats["temperature"].shape == (2, 12)
    assert stats["loss"].values[1, 3] == pytest.approx(chains[1].kept[3].loss)
    assert stats["lp_prior"].values[0, 5] == pytest.approx(chains[0].kept[5].log_prior)
    # and ArviZ says of them what the library says
    values = by_chain(quantities(outputs.flatten(0, 1), bdl.Categorical()), torch.arange(2).repeat_interleave(12))
    np.testing.assert_allclose(arviz.rhat(found)["output"].values.ravel(), rhat(values).numpy(), rtol=1e-5)
    np.testing.assert_allclose(arviz.ess(found)["output"].values.ravel(), ess(values).numpy(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.x under Matplotlib 3.11
def test_what_users_of_arviz_do_with_it(arviz: Any) -> None:
    chains = [run(0, draws=60)[1], run(1, draws=60)[1]]
    found = to_arviz(chains, targets=LABELS, likelihood="categorical")
    tree = int(arviz.__version__.split(".")[0]) >= 1
    assert type(found).__name__ == ("DataTree" if tree else "InferenceData")
    groups = found.children if tree else found.groups()
    assert set(groups) == {"posterior", "log_likelihood", "sample_stats"}
    assert found.posterior["output"].dims[:2] == ("chain", "draw")
    draws = torch.stack([chain.probes() for chain in chains]).softmax(-1).double()
    table = arviz.summary(found, var_names=["output"], round_to="none")
    np.testing.assert_allclose(table["mean"].values, draws.mean((0, 1)).flatten().numpy(), rtol=1e-5)
    np.testing.assert_allclose(table["sd"].values, draws.flatten(0, 1).std(0).flatten().numpy(), rtol=1e-5)
    # leave-one-out lies below the score of all draws: an example makes itself likelier
    scores = torch.log(draws[:, :, range(4), LABELS].mean((0, 1))).sum().item()
    elpd = arviz.loo(found)
    assert -4.0 < (elpd.elpd if tree else elpd.elpd_loo) - scores < 0.0
    arviz.plot_trace(found, var_names=["output"], coords={"output_dim_0": [0]})
    pyplot.close("all")


def test_of_a_model_and_its_chain(arviz: Any) -> None:
    net, chain = run(0)
    model = bdl.BayesianModel(net, chain.posterior(), "categorical")
    first, second = to_arviz(model, PROBE, LABELS), to_arviz(chain, targets=LABELS, likelihood="categorical")
    for group, name in (("posterior", "output"), ("log_likelihood", "y")):
        np.testing.assert_allclose(first[group][name].values, second[group][name].values, rtol=1e-5)


def test_weights_are_refused(arviz: Any) -> None:
    _, even = run(0, bdl.samplers.SASGLD)
    assert to_arviz(even, likelihood="categorical").posterior["output"].shape == (1, 12, 4, 3)
    _, uneven = run(0, bdl.samplers.SASGLD, collect="steps")
    with pytest.raises(UnsupportedError, match='collect="time"'):
        to_arviz(uneven, likelihood="categorical")
    found = to_arviz(uneven, likelihood="categorical", ignore_weights=True)
    assert len(set(found.sample_stats["weight"].values.ravel().tolist())) > 1


def test_the_next_major_version_takes_one_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stand_in = SimpleNamespace(__version__="1.0.0", from_dict=lambda groups: seen.append(groups) or "tree")
    monkeypatch.setattr(bridge, "require", lambda *_, **__: stand_in)
    assert to_arviz(run(0)[1], likelihood="categorical") == "tree"
    assert set(seen[0]) == {"posterior", "sample_stats"} and seen[0]["posterior"]["output"].shape == (1, 12, 4, 3)


def test_regression(arviz: Any) -> None:
    net = nn.Linear(2, 1)
    states: list[dict[str, Tensor]] = [{k: v + i for k, v in net.state_dict().items()} for i in range(5)]
    model = bdl.BayesianModel(net, SamplePosterior.from_states(states), bdl.Gaussian(noise=0.3))
    found = to_arviz(model, PROBE)
    expected = torch.stack([nn.functional.linear(PROBE, s["weight"], s["bias"]) for s in states])
    np.testing.assert_allclose(found.posterior["output"].values[0], expected.detach().numpy(), rtol=1e-5)


def test_refusals(arviz: Any) -> None:
    net, chain = run(0)
    with pytest.raises(ArgumentError, match="likelihood="):
        to_arviz(chain)
    model = bdl.BayesianModel(net, chain.posterior(), "categorical")
    with pytest.raises(ArgumentError, match="inputs"):
        to_arviz(model)
    with pytest.raises(UnsupportedError, match="samples"):
        to_arviz(bdl.wrap(net, "map", likelihood="categorical"), PROBE)
    empty = bdl.Chain(net, probe=PROBE)
    with pytest.raises(NotFittedError, match="no sample"):
        to_arviz(empty, likelihood="categorical")
