"""Tiling, prefix sharing and the two forms of the noise, against one draw after another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.posteriors.lora import AdapterPosterior
from tests.lora.networks import adapted, batch, train
from tests.untouched import untouched

pytest.importorskip("peft")
KINDS = ["llama", "gpt2", "bert"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True, "bias": "lora_only"},
    "ranks": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


def wrapped(model: Any, **options: Any) -> bdl.BayesianModel:
    method = bdl.TFB(**{"sigma": 0.05, "num_samples": 6, **options})
    return bdl.wrap(model, method, None, likelihood="categorical", batch="huggingface", progress=False)


def outputs(model: bdl.BayesianModel, inputs: Any, **options: Any) -> Tensor:
    return model(inputs, **options).latent.samples


def adapter(model: bdl.BayesianModel) -> AdapterPosterior:
    assert isinstance(model.posterior, AdapterPosterior)
    return model.posterior


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_tiled_is_sequential(kind: str) -> None:
    model, inputs = adapted(kind), batch()
    with untouched(model):
        alone = outputs(wrapped(model, tile=False), inputs)
        for rows in (None, 1, 3, 5, 15, 17, 30):
            assert close(outputs(wrapped(model, max_rows=rows), inputs), alone), rows
        bayes = wrapped(model)
        pieces = [{key: value[a:b] for key, value in inputs.items()} for a, b in ((0, 1), (1, 4), (4, 5))]
        assert close(torch.cat([outputs(bayes, piece) for piece in pieces], 1), alone)
    assert alone.std(0).mean() > 0.01
    assert not close(alone.roll(1, 0), alone, 1e-3)  # the comparison can fail


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    # lora_bias is for layers that have a bias
    model, inputs = adapted("bert" if variant == "bias" else "llama", **VARIANTS[variant]), batch()
    with untouched(model):
        bayes = wrapped(model)
        tiled, alone = outputs(bayes, inputs), outputs(wrapped(model, tile=False), inputs)
    assert close(tiled, alone) and tiled.std(0).mean() > 0.01
    assert torch.equal(outputs(wrapped(model, sigma=0.0), inputs)[2], model.eval()(**inputs).logits)


def test_double_precision() -> None:
    model, inputs = adapted("llama").double(), batch()
    alone = outputs(wrapped(model, tile=False), inputs)
    assert alone.dtype is torch.float64 and close(outputs(wrapped(model), inputs), alone, 1e-12)
    bayes = wrapped(model)
    for form in ("A", "P"):
        assert close(adapter(bayes).outputs(bayes.network, inputs, (0, 0, 6), form=form), alone, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_is_the_network_bit_for_bit(kind: str) -> None:
    model, inputs = adapted(kind), batch()
    plain = copy.deepcopy(model).eval()(**inputs).logits
    with untouched(model):
        silent = outputs(wrapped(model, sigma=0.0), inputs)
        bayes = wrapped(model)
        inside = bayes.network(inputs)
        outputs(bayes, inputs)
        after = bayes.network(inputs)
    assert silent.shape == (6, 5, 3) and all(torch.equal(draw, plain) for draw in silent)
    assert torch.equal(inside, plain) and torch.equal(after, plain)


def test_saved_adapters_are_the_usual_files(tmp_path: Any) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path / "before")
    outputs(wrapped(model), batch())
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [1, 2])
def test_a_shared_prefix_changes_nothing(kind: str, last: int, variant: dict[str, Any]) -> None:
    model, inputs = adapted(kind, **variant), batch()
    with untouched(model):
        bayes = wrapped(model, layers=f"last-{last}", share_prefix=True)
        shared = outputs(bayes, inputs)
        plain = outputs(wrapped(model, layers=f"last-{last}", share_prefix=False), inputs)
    held = adapter(bayes).cache.sharing
    assert held is not None and held[1] is not None and held[1].first == 3 - last
    assert close(shared, plain, 1e-6) and plain.std(0).mean() > 1e-3


def test_a_shared_prefix_runs_its_blocks_on_one_copy() -> None:
    bayes, inputs = wrapped(adapted("bert"), layers="last-1", num_samples=4), batch()
    outputs(bayes, inputs)
    clone, seen = bayes.network.module(), []
    blocks = clone.get_submodule("base_model.model.bert.encoder.layer")
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(len(out))) for b in blocks]  # type: ignore[union-attr]
    outputs(bayes, inputs)
    for handle in handles:
        handle.remove()
    assert seen == [5, 5, 20]


def test_a_batch_whose_length_is_its_rows_is_not_shared_by_mistake() -> None:
    model = adapted("bert")
    inputs = batch(rows=4, length=8, padded=False)  # two draws make eight rows of eight tokens
    shared = outputs(wrapped(model, layers="last-1", num_samples=2), inputs)
    assert close(shared, outputs(wrapped(model, layers="last-1", tile=False, num_samples=2), inputs))


@torch.no_grad()
def test_half_precision_adds_behind_b() -> None:
    # the output's error in units of the noise's size, at a condition number of 1000 (closed form in float64)
    g = torch.Generator().manual_seed(0)
    model, inputs = adapted("llama", blocks=1, r=8), batch(4, 6, padded=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            left, _ = torch.linalg.qr(torch.randn(parameter.shape[0], 8, generator=g))
            right, _ = torch.linalg.qr(torch.randn(8, 8, generator=g))
            parameter.data = 0.05 * left @ torch.diag(torch.logspace(0, -3, 8)) @ right.T
    wide = wrapped(model.double(), sigma=1e-2)
    layer = adapter(wide).layers[0]
    half = copy.deepcopy(model).bfloat16()
    rounded = wrapped(copy.deepcopy(half).double(), sigma=1e-2)  # the weights that bfloat16 holds
    del wide, inputs
    x = torch.randn(6 * 4, 5, 32, generator=g).bfloat16()
    errors = {}
    for form in ("A", "P"):
        results = []
        for bayes, value in ((rounded, x.double()), (wrapped(half, sigma=1e-2), x)):
            module, made = bayes.network.module(), []
            draws = adapter(rounded).cache.draws(rounded.network, adapter(rounded).layers)
            injection = adapter(bayes).injection(bayes.network, 0, form)
            injection.draws, injection.layers = draws, (layer,)
            with injection.attached(module), injection.drawing(0, 6, 24, flats=(5,)):
                down = layer.down(module)(value)
                made.append(layer.up(module)(down))
            results.append(made[0].double())
        quiet = layer.up(rounded.network.module())(layer.down(rounded.network.module())(x.double()))
        plain = layer.up(half)(layer.down(half)(x)).double()
        noise = results[0] - quiet
        errors[form] = float((results[1] - plain - noise).norm() / noise.norm())
    assert errors["P"] < 0.02 and errors["A"] > 0.1


def test_draws_are_fixed_functions_and_those_of_a_prediction() -> None:
    bayes, inputs = wrapped(adapted("llama")), batch()
    pred = outputs(bayes, inputs)
    assert torch.equal(pred, outputs(bayes, inputs))
    for index, function in enumerate(bayes.draw(6)):
        assert close(function(inputs), pred[index])
        assert torch.equal(function(inputs), function(inputs))
    assert torch.equal(outputs(bayes, inputs, num_samples=3), outputs(bayes, inputs, num_samples=3))
    assert close(outputs(bayes, inputs, num_samples=9)[:6], pred)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    other = outputs(bayes, inputs, generator=seeded(1))
    assert torch.equal(other, outputs(bayes, inputs, generator=seeded(1)))
    assert not close(other, outputs(bayes, inputs, generator=seeded(2)), 1e-3) and not close(other, pred, 1e-3)
    function = bayes.draw(2, generator=seeded(1))[1]
    assert close(function(inputs), other[1])


def test_predictions_split_their_uncertainty() -> None:
    bayes, inputs = wrapped(adapted("llama")), batch()
    pred = bayes(inputs)
    mean = pred.latent.samples.softmax(-1).mean(0)
    torch.testing.assert_close(pred.mean, mean)
    entropy = -(pred.latent.samples.softmax(-1) * pred.latent.samples.log_softmax(-1)).sum(-1).mean(0)
    torch.testing.assert_close(pred.aleatoric, entropy)
    assert bool((pred.epistemic > 0).all())


def test_tokens_have_predictions_of_their_own() -> None:
    bayes, inputs = wrapped(adapted("llama", causal=True)), batch()
    pred = bayes(inputs)
    assert pred.mean.shape == (5, 7, 100) and pred.epistemic.shape == (5, 7)


def test_two_adapters_have_independent_noise() -> None:
    from peft import LoraConfig

    model, inputs = adapted("llama", causal=True), batch()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    train(model, seed=4)
    both = wrapped(model)
    assert {layer.adapter for layer in adapter(both).layers} == {"default", "second"}
    first = wrapped(model, adapter="default")
    one, two = outputs(both, inputs), outputs(first, inputs)
    assert close(one, outputs(wrapped(model, tile=False), inputs)) and not close(one, two, 1e-3)
    assert len(adapter(first).layers) == 6 and len(adapter(both).layers) == 9


def test_moves_between_dtypes() -> None:
    bayes, inputs = wrapped(adapted("llama")), batch()
    before = outputs(bayes, inputs)
    assert close(outputs(bayes.double(), inputs).float(), before, 1e-4)
    half = outputs(bayes.bfloat16(), inputs)
    assert half.dtype is torch.float32 and float((half - before).abs().max()) < 0.3
