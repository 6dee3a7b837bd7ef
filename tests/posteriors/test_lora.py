"""Files of adapter posteriors: stored draws, and one file for each of several adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import StaleAdapterError, UnsupportedError
from bayesdl.lora import draws
from tests.lora.networks import adapted, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.1, "num_samples": 3, **options})
    return bdl.wrap(model, method, likelihood="categorical", batch="huggingface", progress=False)


def test_stored_draws_outlive_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("llama", 2), batch()
    with untouched(model):
        bayes = wrapped(model)
        wanted = bayes(inputs, num_samples=5).latent.samples
        bayes.save(tmp_path / "plain.safetensors")
        bayes.save(tmp_path / "whole.safetensors", draws=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("plain", "whole")]
    scalars = sum(layer.rank * layer.inputs for layer in bayes.posterior.layers)  # type: ignore[union-attr]
    assert 0 <= sizes[1] - sizes[0] - 4 * 3 * scalars < 2000
    again = bdl.load(tmp_path / "whole.safetensors", model, batch="huggingface")
    again.save(tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    # another version of numpy, whose numbers differ
    monkeypatch.setattr(draws, "base_noise", lambda seed, layer, n: torch.ones(layer.rank, layer.inputs))
    found = again(inputs, num_samples=5).latent.samples
    torch.testing.assert_close(found[:3], wanted[:3], rtol=0, atol=1e-6)
    assert float((found[3:] - wanted[3:]).abs().max()) > 1e-3  # beyond those stored
    torch.testing.assert_close(again.double()(inputs).latent.samples.float(), wanted[:3], rtol=1e-4, atol=1e-5)
    other = bdl.load(tmp_path / "plain.safetensors", model, batch="huggingface")
    assert float((other(inputs).latent.samples - wanted[:3]).abs().max()) > 1e-3
    fresh = again(inputs, generator=torch.Generator().manual_seed(1)).latent.samples
    assert float((fresh - wanted[:3]).abs().max()) > 1e-3  # another seed takes none of them
    with pytest.raises(UnsupportedError, match="no posterior over adapters"):
        bdl.wrap(model, "map", likelihood="categorical", batch="huggingface").save(tmp_path / "x", draws=True)


def test_a_file_for_each_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig

    model, inputs = adapted("llama", 2, causal=True), batch()
    alone = wrapped(model)
    alone.save(tmp_path / "before.safetensors")
    wanted = alone(inputs).latent.samples
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    # an adapter that came later, and is not active, is no hindrance
    again = bdl.load(tmp_path / "before.safetensors", model, batch="huggingface")
    assert torch.equal(again(inputs).latent.samples, wanted)
    model.base_model.set_adapter(["default", "second"])
    train(model, seed=4)
    found = {}
    for name in ("default", "second"):
        with untouched(model):
            bayes = wrapped(model, adapter=name)
            bayes.save(tmp_path / f"{name}.safetensors")
        found[name] = bayes(inputs).latent.samples
        assert {layer.adapter for layer in bayes.posterior.layers} == {name}  # type: ignore[union-attr]
    for name, wanted in found.items():
        again = bdl.load(tmp_path / f"{name}.safetensors", model, batch="huggingface")
        assert torch.equal(again(inputs).latent.samples, wanted)
    # the noise of one is what it is with the other's beside it
    both = wrapped(model).posterior.injection(bayes.network, 0)  # type: ignore[union-attr]
    first = both.layers[0]
    like = torch.zeros(1)
    single = wrapped(model, adapter=first.adapter).posterior.injection(bayes.network, 0)  # type: ignore[union-attr]
    assert torch.equal(both.draws.noise(first, 0, 0, 2, like), single.draws.noise(first, 0, 0, 2, like))
    for name, parameter in model.named_parameters():
        if ".second." in name and "lora_B" in name:
            parameter.data += 1.0
    with pytest.raises(StaleAdapterError, match="trained on"):
        bdl.load(tmp_path / "second.safetensors", model)
