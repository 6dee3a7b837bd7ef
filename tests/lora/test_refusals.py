"""What is refused, by name, with the model left alone; files and the adapters they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import (
    ArgumentError,
    FileFormatError,
    NonFiniteError,
    SelectionError,
    ShapeError,
    StaleAdapterError,
    StaleModelError,
    UnsupportedError,
)
from tests.lora.networks import adapted, base, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")


def wrapped(model: Any, data: Any = None, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.05, "num_samples": 3, **options})
    return bdl.wrap(model, method, data, likelihood="categorical", batch="huggingface", progress=False)


def refused(model: nn.Module, error: type[Exception], match: str, data: Any = None, **options: Any) -> None:
    with untouched(model), pytest.raises(error, match=match):
        wrapped(model, data, **options)


def test_models_without_adapters() -> None:
    refused(base("llama", 1), UnsupportedError, "no LoRA layer")


def test_adapter_names() -> None:
    model = adapted("llama", 1)
    refused(model, SelectionError, r"'other' is not in the model; there are \['default'\]", adapter="other")
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    refused(model, SelectionError, "'second' is not active", adapter="second")
    assert len(wrapped(model).posterior.layers) == 2  # type: ignore[union-attr]
    for part in model.modules():
        if hasattr(part, "_active_adapter"):
            part._active_adapter = []
    refused(model, SelectionError, r"no adapter is active; the model has \['default', 'second'\]")


def test_merged_and_disabled_adapters() -> None:
    model = adapted("llama", 1)
    model.merge_adapter()
    refused(model, UnsupportedError, r"merged into .*unmerge_adapter\(\)")
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    refused(model, UnsupportedError, "disabled")
    model.base_model.enable_adapter_layers()
    wrapped(model)


def test_weights() -> None:
    model = adapted("llama", 1, std=0.0)
    refused(model, ArgumentError, "lora_B of 'base_model.*q_proj' is zero: the adapter was never trained")
    train(model)
    parameter = dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight"]
    parameter.data[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="lora_A of 'base_model.*v_proj'"):
        wrapped(model)


def test_layers_that_bypass_a_and_b() -> None:
    model = adapted("llama", 1, target_modules=["q_proj", "embed_tokens"])
    refused(model, UnsupportedError, r"'base_model.model.model.embed_tokens' \(Embedding\).*layers=")
    bayes = wrapped(model, layers="q_proj")
    assert [layer.name for layer in bayes.posterior.layers] == [  # type: ignore[union-attr]
        "base_model.model.model.layers.0.self_attn.q_proj"
    ]


class Experts(nn.Module):
    """Several matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eij->bj", x, self.weight)


class Mixture(nn.Module):
    """A convolution, attention in one piece, and experts, before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.experts, self.head = Experts(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).mT
        return self.head(self.experts(self.attention(x, x, x)[0].mean(1)))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_modules": ["conv", "head"]}, r"conv.*\(Conv2d\)"),
        ({"target_modules": ["attention", "head"]}, r"attention.*\(MultiheadAttention\)"),
        ({"target_modules": ["head"], "target_parameters": ["experts.weight"]}, r"\(ParamWrapper\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*target_parameters")
def test_layers_of_other_kinds(options: dict[str, Any], name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Mixture(), LoraConfig(r=2, **options))
    train(model)
    x = torch.randn(4, 1, 5, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=name):
        bdl.wrap(model, bdl.TFB(sigma=0.1), likelihood="categorical")
    # peft's attention registers its parameters anew whenever modules are listed: values are what can be compared
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    bayes = bdl.wrap(model, bdl.TFB(sigma=0.1, layers="head"), likelihood="categorical")
    assert float(bayes(x).epistemic.min()) > 0


def test_variants() -> None:
    from peft.tuners.lora.variants import ALoraLinearVariant

    model = adapted("llama", 1)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant["default"] = ALoraLinearVariant()
    refused(model, UnsupportedError, "ALoraLinearVariant")


def test_layers() -> None:
    model = adapted("llama", 2)
    refused(model, SelectionError, "has 2 blocks", layers="last-3")
    refused(model, SelectionError, "selects no layer", layers="nothing")
    refused(model, SelectionError, "'x', which is no LoRA layer", layers=["x"])
    refused(model, SelectionError, "no ModuleList", layers="last-1", blocks="x")
    assert len(wrapped(model, layers="last-1").posterior.layers) == 2  # type: ignore[union-attr]
    with pytest.raises(SelectionError, match="no block lies in front of all noise"):
        wrapped(model, share_prefix=True)(batch())


def test_batches_that_name_rows() -> None:
    model = adapted("llama", 1)
    bayes, inputs = wrapped(model), batch()
    with untouched(model):
        with pytest.raises(UnsupportedError, match="'adapter_names'"):
            bayes({**inputs, "adapter_names": ["default"] * 5})
        with pytest.raises(UnsupportedError, match="'past_key_values'"):
            bayes({**inputs, "past_key_values": object()})


def test_rows_that_are_no_longer_aligned() -> None:
    class Routed(nn.Module):
        """Every third row goes to an expert."""

        def __init__(self, expert: nn.Module) -> None:
            super().__init__()
            self.expert = expert

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.expert(x[::3]).mean(0, keepdim=True) + x.sum(-1, keepdim=True)

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Routed(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["expert"]))
    train(model)
    bayes = bdl.wrap(model, bdl.TFB(sigma=0.1), likelihood="categorical", progress=False)
    x = torch.randn(4, 4)
    with untouched(model), pytest.raises(UnsupportedError, match="tile=False"):
        bayes(x)
    alone = bdl.wrap(model, bdl.TFB(sigma=0.1, tile=False), likelihood="categorical", progress=False)
    assert alone(x).mean.shape == (4, 3)


def test_batches_that_change_inside() -> None:
    class Pooled(nn.Module):
        """Two inputs make one output."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).unflatten(0, (-1, 2)).mean(1)

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Pooled(), LoraConfig(r=2, target_modules=["layer"]))
    train(model)
    bayes = bdl.wrap(model, bdl.TFB(sigma=0.1, num_samples=3), likelihood="categorical", progress=False)
    x = torch.randn(4, 4)
    with untouched(model), pytest.raises(ShapeError, match=r"shape \(6, 3\) for 12 rows: the batch changes inside"):
        bayes(x)


def test_layers_that_are_never_called() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Half(), LoraConfig(r=2, target_modules=["used", "idle"]))
    train(model)
    bayes = bdl.wrap(model, bdl.TFB(sigma=0.1), likelihood="categorical", progress=False)
    x = torch.randn(4, 4)
    with untouched(model), pytest.raises(UnsupportedError, match="'base_model.model.idle' was not called"):
        bayes(x)


def test_data_and_arguments() -> None:
    model = adapted("llama", 1)
    refused(model, ArgumentError, '"tfb" needs data', sigma=None)
    refused(model, ArgumentError, "yields no batch", [], sigma=None)
    refused(model, ArgumentError, "sigma=-1", sigma=-1.0)
    refused(model, ArgumentError, "num_samples=0", num_samples=0)
    refused(model, ArgumentError, "max_rows=0", max_rows=0)
    refused(model, ArgumentError, "share_prefix=3", share_prefix=3)
    with pytest.raises(ShapeError, match="empty"):
        wrapped(model)({key: value[:0] for key, value in batch().items()})


def test_training_on_makes_the_posterior_stale() -> None:
    model = adapted("llama", 1)
    bayes = wrapped(model)
    train(model, seed=9)
    with pytest.raises(StaleModelError):
        bayes(batch())


def test_files_lie_beside_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model, inputs = adapted("llama", 2), batch()
    model.save_pretrained(tmp_path)
    path = tmp_path / "bayesdl.safetensors"
    bayes = bdl.wrap(
        model, bdl.TFB(num_samples=3), [inputs] * 3, likelihood="categorical", batch="huggingface", progress=False
    )
    with untouched(model):
        bayes.save(path)
    fresh = PeftModel.from_pretrained(base("llama", 2), tmp_path)  # the file is no hindrance to peft
    again = bdl.load(path, fresh, batch="huggingface")
    assert torch.equal(again(inputs).latent.samples, bayes(inputs).latent.samples)
    assert bdl.lora.search_report(again) == bdl.lora.search_report(bayes)
    assert again.network.names == bayes.network.names and again.cost == pytest.approx(bayes.cost)
    twice = tmp_path / "twice.safetensors"
    again.save(twice)
    assert twice.read_bytes() == path.read_bytes()
    assert bdl.lora.search_report(again.tune("tolerance", [inputs] * 3)).sigma == again.posterior.sigma  # type: ignore[union-attr]
    train(fresh, seed=5)
    with pytest.raises(StaleAdapterError, match="trained on"):
        bdl.load(path, fresh)
    with pytest.raises(StaleAdapterError, match="no adapter 'default'"):
        bdl.load(path, base("llama", 2))
    other = adapted("llama", 2)
    other.base_model.model.model.embed_tokens.weight.data += 1.0
    with pytest.raises(FileFormatError, match="saved for a network with other weights"):
        bdl.load(path, other)
