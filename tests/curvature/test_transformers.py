"""A GPT-2 and a BERT of a few hundred weights: every parameter has a closed form, and the curvature is the oracle's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles

transformers = pytest.importorskip("transformers")

CLASSES = 3


class Plain(nn.Module):
    """Logits as a function of two tensors, for the oracles."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.net(input_ids=tokens, attention_mask=mask).logits


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=4,
        n_layer=1,
        n_head=2,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2ForSequenceClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


@cache
def prepared(build: Any) -> tuple[Network, Layout, dict[str, Tensor], Tensor, Tensor]:
    """Network, layout, inputs, and the oracle's outputs and Jacobian."""
    net = build().double().eval()
    g = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    tokens, mask = torch.randint(3, 11, (6, 5), generator=g), torch.ones(6, 5, dtype=torch.long)
    tokens[::2, -2:], mask[::2, -2:] = 0, 0
    x = {"input_ids": tokens, "attention_mask": mask}
    network = Network(net, batch="huggingface")
    names = [f"net.{name}" for name in network.names]
    jac = oracles.jacobian(Plain(net), (tokens, mask), names)
    return network, plan(network, x), x, oracles.outputs(Plain(net), (tokens, mask)), jac


@pytest.mark.parametrize("build", [gpt2, bert])
def test_every_parameter_has_a_closed_form(build: Any) -> None:
    network, layout, *_ = prepared(build)
    assert sum(block.numel for block in layout.blocks) == network.num_parameters
    kinds = {name: block.kind for block in layout.blocks for name in block.parameters}
    for name, kind in kinds.items():
        norm = "LayerNorm" in name or ".ln_" in name
        table = "embeddings.weight" in name or name.endswith(("wte.weight", "wpe.weight"))
        assert kind == ("scale" if norm else "rows" if table else "linear"), name


@pytest.mark.parametrize("build", [gpt2, bert])
def test_diagonal_and_predictive_covariance_equal_the_oracle(build: Any) -> None:
    network, layout, x, f, jac = prepared(build)
    y = torch.randint(CLASSES, (6,), generator=torch.Generator().manual_seed(1))
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    mean, factors = layer_factors(network, layout, x, identity_cotangents, torch.float64)
    torch.testing.assert_close(mean, f)
    for structure in ("diag", "kron"):
        fit = fit_curvature(
            network,
            layout,
            [{**x, "labels": y}],
            resolve("categorical"),
            structure=structure,
            kind="ggn",
            progress=False,
        )
        if structure == "diag":
            torch.testing.assert_close(fit.curvature.to_dense(), torch.diag(truth.diagonal()), rtol=1e-8, atol=1e-11)
        precision = 0.5 * fit.curvature.to_dense() + 2.0 * torch.eye(layout.numel, dtype=torch.float64)
        covariance = oracles.linearized_covariance(jac, precision)
        torch.testing.assert_close(fit.curvature.quad(factors, 0.5, 2.0), covariance, rtol=1e-8, atol=1e-10)
