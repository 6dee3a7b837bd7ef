"""Laplace over low-rank factors through the common curvature core, against the dense GGN; ensembles of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import SelectionError
from bayesdl.network import Network
from tests import oracles
from tests.lora.networks import adapted, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "bert": ("bert", {}),
    "rslora": ("bert", {"use_rslora": True}),
    "dora": ("bert", {"use_dora": True}),  # through gradients of every example: A and B are called on a matrix too
}
PRIOR = bdl.GaussianPrior(precision=5.0)


def dense(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Sum over examples of J' Lambda J in A and B, by autograd, float64."""
    network = Network(model, select="lora", batch="huggingface")
    inputs = {key: value for key, value in data.items() if key != "labels"}
    names = list(network.parameters)

    def outputs(*values: Tensor) -> Tensor:
        return network(inputs, dict(zip(names, values, strict=True)))

    pieces = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in network.parameters.values()))
    jac = torch.cat([piece.reshape(*piece.shape[:2], -1) for piece in pieces], -1)
    logits = network(inputs)
    return oracles.ggn(jac, oracles.lambda_formula("categorical", logits))


@pytest.mark.parametrize("case", CASES)
def test_curvature_is_the_dense_ggn(case: str) -> None:
    kind, options = CASES[case]
    model, data = adapted(kind, 1, **options).double(), batch(3, 4, labels=True)
    wanted = dense(model, data)
    tolerance = 1e-6 if kind == "llama" else 1e-10  # Llama's norms run in float32
    for frozen in (False, True):  # adapters that are frozen are selected by name
        model.requires_grad_(not frozen)
        with untouched(model):
            full, diag = (
                bdl.curvature.estimate(
                    model, [data], "categorical", structure=name, select="lora", batch="huggingface", progress=False
                )
                for name in ("full", "diag")
            )
        scale = float(wanted.abs().max())
        assert float((full.to_dense() - wanted).abs().max()) < tolerance * scale
        assert float((diag.to_dense().diagonal() - wanted.diagonal()).abs().max()) < tolerance * scale


def test_kron_is_exact_where_it_must_be_and_does_not_see_batches() -> None:
    model, data = adapted("bert", 1, r=2).double(), batch(4, 1, labels=True, padded=False)
    wanted = dense(model, {key: value[:1] for key, value in data.items()})

    def fit(batches: list[dict[str, Tensor]]) -> Any:
        return bdl.curvature.estimate(
            model, batches, "categorical", structure="kron", select="lora", batch="huggingface", progress=False
        )

    one = fit([{key: value[:1] for key, value in data.items()}]).to_dense()
    # one example of one token: every block is one Kronecker product, and exact
    for start in range(0, len(wanted), 64):
        block = slice(start, start + 64)
        torch.testing.assert_close(one[block, block], wanted[block, block], rtol=1e-8, atol=1e-12)
    whole, pieces = fit([data]), fit([{k: v[a:b] for k, v in data.items()} for a, b in ((0, 1), (1, 4))])
    torch.testing.assert_close(whole.to_dense(), pieces.to_dense(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("structure", ["kron", "diag", "lowrank"])
def test_posteriors_of_an_adapter(structure: str) -> None:
    model = adapted("llama", 2)
    data = [batch(6, seed=seed, labels=True) for seed in range(3)]
    with untouched(model):
        bayes = bdl.wrap(
            model,
            bdl.Laplace(select="lora", structure=structure),
            data,
            likelihood="categorical",
            prior=PRIOR,
            batch="huggingface",
            progress=False,
        )
        tuned = bayes.tune("evidence")
    assert float(tuned.log_evidence()) >= float(bayes.log_evidence()) - 1e-3
    pred = bayes(batch(5))
    assert pred.mean.shape == (5, 3) and bool((pred.latent.variance > 0).all())
    assert all("lora_" in name for name in bayes.network.names)


def test_selections() -> None:
    model = adapted("llama", 3)
    every = Network(model, select="lora").names
    last = Network(model, select="lora:last-1").names
    head = Network(model, select="lora+head").names
    assert len(every) == 12 and set(last) == {name for name in every if ".layers.2." in name}
    assert set(head) - set(every) == {"base_model.model.score.modules_to_save.default.weight"}
    with pytest.raises(SelectionError, match="has 3 blocks"):
        Network(model, select="lora:last-4")
    with pytest.raises(SelectionError, match="matches no floating-point parameter"):
        Network(torch.nn.Linear(2, 2), select="lora:last-1")


def test_ensembles_of_adapters() -> None:
    members, inputs = [adapted("llama", 2) for _ in range(3)], batch()
    for seed, member in enumerate(members):
        train(member, seed=seed)
    with untouched(*members):
        bayes = bdl.wrap(members, "ensemble", likelihood="categorical", batch="huggingface", progress=False)
        pred = bayes(inputs)
    for draw, member in zip(pred.latent.samples, members, strict=True):
        torch.testing.assert_close(draw, member.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
