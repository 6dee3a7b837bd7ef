"""Adapters of models that are not the usual ones: encoder-decoders, images, replaced forwards, injected adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from tests.lora.networks import HIDDEN, VOCABULARY, adapted, base, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.1, "num_samples": 4, **options})
    return bdl.wrap(model, method, likelihood="categorical", batch="huggingface", progress=False)


def agree(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Draws of one tiled pass, after they were seen to be those of one pass each."""
    with untouched(model):
        alone = wrapped(model, tile=False, **options)(inputs).latent.samples.detach()
        tiled = wrapped(model, **options)(inputs).latent.samples.detach()
    torch.testing.assert_close(tiled, alone, rtol=1e-5, atol=1e-5)
    assert float(alone.std(0).mean()) > 1e-3
    return tiled


def encoder_decoder() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(**settings))
    train(model)
    return model.eval()


def test_encoder_decoders_predict_tokens() -> None:
    answers = torch.randint(3, VOCABULARY, (5, 4), generator=torch.Generator().manual_seed(1))
    assert agree(encoder_decoder(), {**batch(), "decoder_input_ids": answers}).shape == (4, 5, 4, VOCABULARY)


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders_write(beams: int) -> None:
    model, inputs = encoder_decoder(), batch()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with untouched(model):
        tiled = bdl.lora.generate(wrapped(model, sigma=0.5), inputs, **options)
        assert torch.equal(tiled, bdl.lora.generate(wrapped(model, sigma=0.5, tile=False), inputs, **options))
    merged: Any = bdl.lora.merge_sample(wrapped(model, sigma=0.5), 2)
    assert torch.equal(tiled[2], merged.generate(**inputs, **options))
    assert tiled.shape == (4, 5, 7) and not torch.equal(tiled[0], tiled[1])


@pytest.mark.parametrize("layers", ["all", "last-1"])
def test_images(layers: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
        initializer_range=0.2,
    )
    targets = r".*attention.*\.(q_proj|v_proj|query|value)"
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
    model = get_peft_model(ViTForImageClassification(config), lora)
    train(model)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert agree(model, {"pixel_values": pixels}, layers=layers).shape == (4, 5, 3)


def test_modules_whose_forward_was_replaced() -> None:
    # accelerate puts a forward into the instance, which would run the user's own module
    accelerate = pytest.importorskip("accelerate")
    model = adapted("llama", 2)
    for name, part in list(model.named_modules()):
        if name.endswith("q_proj"):
            accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert any("forward" in part.__dict__ for part in model.modules())
    torch.testing.assert_close(agree(model, batch()), agree(adapted("llama", 2), batch()))


@pytest.mark.parametrize("way", ["injected", "of transformers"])
def test_adapters_without_a_peft_model(way: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = base("llama", 2)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if way == "injected":
        inject_adapter_in_model(config, model)
    else:
        model.add_adapter(config)
    train(model)
    agree(model, batch())
    with pytest.raises(UnsupportedError, match="merge=False"):
        bdl.lora.merge_sample(wrapped(model), 1)
    kept: Any = bdl.lora.merge_sample(wrapped(model), 1, merge=False)
    with torch.no_grad():
        wanted = wrapped(model)(batch()).latent.samples[1]
        torch.testing.assert_close(kept(**batch()).logits, wanted, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_and_training_mode() -> None:
    plain = agree(adapted("llama", 2), batch())
    model = adapted("llama", 2).train()
    inner: Any = model.base_model.model
    getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    torch.testing.assert_close(agree(model, batch()), plain)
    assert model.training


def test_adapters_of_another_kind_are_refused() -> None:
    from peft import AdaLoraConfig, get_peft_model

    settings: dict[str, Any] = {"target_modules": ["q_proj"], "total_step": 10, "task_type": "SEQ_CLS"}
    model = get_peft_model(base("llama", 1), AdaLoraConfig(**settings))
    with untouched(model), pytest.raises(UnsupportedError, match=r"q_proj.*\(SVDLinear\)"):
        wrapped(model)
