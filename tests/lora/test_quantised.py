"""Adapters on quantised weights: a stand-in for the back ends, whose weights are integers with a scale on the object.

bitsandbytes and its kin keep what undoes the quantisation on the parameter itself, and have layer classes of their own
in peft that call A and B as all others do. The classes here follow both interfaces.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import UnsupportedError
from tests.lora.networks import VOCABULARY, adapted, base, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")
# peft says so of every layer that is not one of its own back ends'
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")


class Packed(nn.Parameter):
    """Integers, and on the same object what makes weights of them; lost in plain copies, kept in deep ones."""

    step: Tensor

    @staticmethod
    def of(weight: Tensor) -> Packed:
        step = weight.abs().amax(1, keepdim=True) / 127
        made = Packed((weight / step).round().to(torch.int8), requires_grad=False)
        made.step = step
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        made = Packed(self.data.clone(), requires_grad=False)
        made.step = self.step.clone()
        return made


class Linear8bit(nn.Module):
    """A linear layer over packed weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = Packed.of(layer.weight.data)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        packed: Any = self.weight
        weight = (packed.float() * packed.step).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(kind: str, causal: bool = False) -> Any:
    """A network whose linear layers in the blocks are packed, under a trained adapter."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    class Adapted8bit(nn.Module, LoraLayer):
        def __init__(
            self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **_: Any
        ) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = self.base_layer(x, *args, **kwargs)
            for name in self.active_adapters:
                down, up, drop = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
                result = result + up(down(drop(x))) * self.scaling[name]
            return result

    network = base(kind, 2, causal)
    targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[kind]
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, Linear8bit(layer))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM" if causal else "SEQ_CLS")
    config._register_custom_module({Linear8bit: Adapted8bit})
    model = get_peft_model(network, config)
    train(model)
    return model


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.1, "num_samples": 4, **options})
    return bdl.wrap(model, method, likelihood="categorical", batch="huggingface", progress=False)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_draws_on_quantised_weights(kind: str) -> None:
    model, inputs = quantised(kind), batch()
    layers = [part for part in model.modules() if isinstance(part, Linear8bit)]
    assert len(layers) == 4 and all(part.weight.dtype is torch.int8 for part in layers)
    with untouched(model), torch.no_grad():
        bayes = wrapped(model)
        tiled = bayes(inputs).latent.samples
        alone = wrapped(model, tile=False)(inputs).latent.samples
        off = wrapped(model, sigma=0.0)(inputs).latent.samples
    torch.testing.assert_close(tiled, alone, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(off[0], model.eval()(**inputs).logits)
    # near what the same noise does to weights in full precision
    plain = wrapped(adapted(kind, 2))(inputs).latent.samples
    assert float((tiled - plain).norm()) < 0.2 * float((plain - plain.mean(0)).norm() + plain.norm())
    assert float(tiled.std(0).mean()) > 1e-3


def test_a_draw_stays_beside_quantised_weights() -> None:
    model, inputs = quantised("llama"), batch()
    bayes = wrapped(model)
    with untouched(model), torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"quantised \(Packed\).*merge=False"):
            bdl.lora.merge_sample(bayes, 1)
        kept: Any = bdl.lora.merge_sample(bayes, 1, merge=False)
        wanted = bayes(inputs).latent.samples[1]
        torch.testing.assert_close(kept(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)


def test_text_laplace_and_chains_on_quantised_weights() -> None:
    model = quantised("llama", causal=True)
    prompts = batch(2, 5, padded=False)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with untouched(model):
        tiled = bdl.lora.generate(wrapped(model), prompts, **options)
        assert torch.equal(tiled, bdl.lora.generate(wrapped(model, tile=False), prompts, **options))
    assert tiled.shape == (4, 2, 9) and int(tiled.max()) < VOCABULARY
    model, data = quantised("bert"), [batch(6, labels=True)]
    fits: tuple[Any, ...] = (
        bdl.Laplace(select="lora", structure="kron"),
        bdl.SGMCMC("sgld", select="lora", num_samples=2),
    )
    for method in fits:
        with untouched(model):
            bayes = bdl.wrap(
                model,
                method,
                data,
                likelihood="categorical",
                prior=bdl.GaussianPrior(5.0),
                batch="huggingface",
                progress=False,
            )
            assert float(bayes(batch(3)).epistemic.min()) > 0


def test_moves() -> None:
    model, inputs = quantised("bert"), batch()
    bayes = wrapped(model)
    before = bayes(inputs).mean
    torch.testing.assert_close(bayes.double()(inputs).mean.float(), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedError, match=r"quantised \(Packed\).*before it is wrapped"):
        bayes.to("meta")
