"""Selections resolve to parameter names in the network's own order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import SelectionError
from bayesdl.network import Network
from bayesdl.select import Selector, describe
from tests.test_clone import Tied


def net() -> nn.Module:
    module = nn.Module()
    module.fc1, module.fc10 = nn.Linear(4, 4), nn.Linear(4, 4)
    module.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module.fc1.weight.requires_grad_(False)
    return module


ALL = tuple(name for name, _ in net().named_parameters())


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("all", ALL),
        ("requires_grad", tuple(n for n in ALL if n != "fc1.weight")),
        ("fc1", ("fc1.weight", "fc1.bias")),  # a module name, not a pattern that also matches fc10
        ("fc1.bias", ("fc1.bias",)),
        ("block", ("block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias")),
        ("block.1", ("block.1.weight", "block.1.bias")),
        ("bias$", ("fc1.bias", "fc10.bias", "block.0.bias", "block.1.bias")),
        (re.compile(r"fc1\d"), ("fc10.weight", "fc10.bias")),
        (["fc10", "fc1.bias"], ("fc1.bias", "fc10.weight", "fc10.bias")),
        (("block.0.bias",), ("block.0.bias",)),
        (lambda name, value: value.dim() == 1 and "block" not in name, ("fc1.bias", "fc10.bias")),
    ],
)
def test_selections(select: Selector, expected: tuple[str, ...]) -> None:
    assert Network(net(), select=select).names == expected
    assert Network(net()).reselect(select).names == expected


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("fc7", r"select='fc7' matches no floating-point parameter; the network has fc1.weight, fc1.bias"),
        (["fc1", "fc7"], r"names 'fc7', which is no parameter or module"),
        ("(", r"no regular expression"),
        ([], "matches no floating-point parameter"),
        (lambda name, value: False, "matches no"),
        (re.compile("zzz"), "matches no"),
    ],
)
def test_selections_that_name_nothing(select: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Network(net(), select=select)


def test_a_network_without_parameters() -> None:
    with pytest.raises(SelectionError, match="no parameters"):
        Network(nn.Sequential(nn.ReLU()))


def test_tied_parameters_count_once() -> None:
    network = Network(Tied())
    assert network.names == ("embed.weight",) and network.num_parameters == 28


@pytest.mark.parametrize("select", ["head", "head.weight", "embed", ["head"], "last_layer", "last"])
def test_a_tied_parameter_is_selected_by_any_of_its_names(select: Selector) -> None:
    network = Network(Tied(), select=select, example=torch.zeros(2, 3, dtype=torch.long))
    assert network.names == ("embed.weight",)


def test_last_is_short_for_the_last_layer_unless_a_layer_has_that_name() -> None:
    x = torch.zeros(2, 4)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    assert Network(plain, select="last", example=x).names == ("1.weight", "1.bias")
    assert Network(plain, select="last_layer", example=x).names == ("1.weight", "1.bias")
    named = nn.Sequential()
    named.add_module("last", nn.Linear(4, 4))
    named.add_module("head", nn.Linear(4, 3))
    assert Network(named, select="last", example=x).names == ("last.weight", "last.bias")


def test_integer_parameters_are_never_selected() -> None:
    module = nn.Linear(2, 2)
    module.codes = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
    assert Network(module).names == ("weight", "bias")


def test_number_of_parameters_is_that_of_the_selection() -> None:
    assert Network(net(), select="fc1").num_parameters == 20


@pytest.mark.parametrize(
    ("select", "text"),
    [
        ("all", "all"),
        (re.compile("a.b"), "regex:a.b"),
        (["x", "y"], "x,y"),
        (lambda n, v: True, "callable:<lambda>"),
    ],
)
def test_descriptions(select: Selector, text: str) -> None:
    assert describe(select) == text


def test_lora() -> None:
    module = nn.Module()
    module.base = nn.Linear(4, 4)
    module.base.lora_A, module.base.lora_B = nn.ModuleDict({"default": nn.Linear(4, 2)}), nn.Linear(2, 4, bias=False)
    module.lora_Bias = nn.Linear(2, 2)
    module.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 4))})
    names = Network(module, select="lora").names
    assert set(names) == {
        "base.lora_A.default.weight",
        "base.lora_A.default.bias",
        "base.lora_B.weight",
        "lora_embedding_A.default",
    }
    with pytest.raises(SelectionError, match="select='lora' matches no"):
        Network(net(), select="lora")


def test_lora_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model = adapted.base_model.model
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    bayes = bdl.wrap(model, bdl.Laplace(select="lora"), [(x, y)], likelihood="categorical", progress=False)
    assert bayes.layers == ("0.lora_A.default", "0.lora_B.default", "2.lora_A.default", "2.lora_B.default")
    assert bool((bayes(x).epistemic > 0).all())
