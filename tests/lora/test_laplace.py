"""Laplace over low-rank factors against the dense GGN; ensembles and chains of adapters alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.clone import independent_copy
from bayesdl.errors import SelectionError, UnsupportedError
from bayesdl.network import Network
from tests import oracles
from tests.lora.networks import HIDDEN, adapted, batch, train
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


def jacobian(model: Any, data: dict[str, Tensor], select: str = "lora") -> tuple[Tensor, Tensor]:
    """J `(B, C, P)` in the selected weights by autograd, and the outputs `(B, C)`."""
    network = Network(model, select=select, batch="huggingface")
    inputs = {key: value for key, value in data.items() if key != "labels"}
    names = list(network.parameters)

    def outputs(*values: Tensor) -> Tensor:
        return network(inputs, dict(zip(names, values, strict=True)))

    pieces = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in network.parameters.values()))
    jac = torch.cat([piece.reshape(*piece.shape[:2], -1) for piece in pieces], -1)
    return jac, network(inputs)


def dense(model: Any, data: dict[str, Tensor], select: str = "lora") -> Tensor:
    """Sum over examples of J' Lambda J, float64."""
    jac, logits = jacobian(model, data, select)
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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_head_of_a_decoder_is_its_last_layer(kind: str) -> None:
    # it scores every token, and the score of the last attended one counts
    model, data = adapted(kind, 1).double(), batch(4, 6, labels=True)
    name = "base_model.model.score.modules_to_save.default"
    wanted = dense(model, data, name)
    found = bdl.curvature.estimate(
        model, [data], "categorical", structure="full", select="last_layer", batch="huggingface", progress=False
    ).to_dense()
    assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


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


def test_a_rank_for_the_large_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = adapted("bert", 1, r=2).double(), batch(1, 3, labels=True, padded=False)

    def fit(**options: Any) -> Tensor:
        arguments: dict[str, Any] = {"select": "lora", "batch": "huggingface", "progress": False, **options}
        return bdl.curvature.estimate(model, [data], "categorical", **arguments).to_dense()

    whole = fit(structure="kron")
    # full rank is kron; three tokens and their nine cotangents span few directions of 32: a rank of 12 loses nothing
    torch.testing.assert_close(fit(structure="kron-lowrank", rank=HIDDEN), whole)
    monkeypatch.setattr("bayesdl.curvature.kron_lowrank.OVERSAMPLING", 0)
    torch.testing.assert_close(fit(structure="kron-lowrank", rank=12), whole, rtol=1e-8, atol=1e-10)
    cut = fit(structure="kron-lowrank", rank=2)
    assert float(torch.linalg.eigvalsh(whole - cut).min()) > -1e-9
    assert float((whole - cut).norm()) > 1e-3 * float(whole.norm())


STRUCTURES: dict[str, dict[str, Any]] = {
    "kron": {"structure": "kron"},
    "diag": {"structure": "diag"},
    "lowrank": {"structure": "lowrank", "rank": 6},
    "kron_rank": {"structure": "kron", "kron_rank": 3},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_posteriors_of_an_adapter(structure: str, kind: str) -> None:
    model = adapted(kind, 1).double()
    data = [batch(6, seed=seed, labels=True) for seed in range(3)]
    method = bdl.Laplace(select="lora", **STRUCTURES[structure])
    options: dict[str, Any] = {"likelihood": "categorical", "batch": "huggingface", "progress": False}
    with untouched(model):
        bayes = bdl.wrap(model, method, data, prior=PRIOR, **options)
        tuned = bayes.tune("evidence")
    assert all("lora_" in name for name in bayes.network.names)
    tolerance = 1e-5 if kind == "llama" else 1e-8  # Llama's norms run in float32
    weights = torch.cat([value.flatten() for value in bayes.network.parameters.values()]).detach()
    jac, logits = jacobian(model, batch(5))
    for found in (bayes, tuned):
        posterior: Any = found.posterior
        level = float(posterior.precision)
        precision = posterior.structure.to_dense() + level * torch.eye(len(weights)).double()
        pred = found(batch(5))
        wanted = oracles.linearized_covariance(jac, precision)
        torch.testing.assert_close(pred.latent.covariance, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(pred.latent.mean, logits, rtol=tolerance, atol=tolerance)
        logs = sum(
            float(
                Network(model, batch="huggingface")({k: v for k, v in d.items() if k != "labels"})
                .log_softmax(-1)[torch.arange(6), d["labels"]]
                .sum()
            )
            for d in data
        )
        evidence = logs - 0.5 * level * weights @ weights
        evidence = evidence - 0.5 * (torch.logdet(precision) - len(weights) * math.log(level))
        torch.testing.assert_close(found.log_evidence(), evidence, rtol=tolerance, atol=tolerance)
    assert float(tuned.log_evidence()) >= float(bayes.log_evidence())


@pytest.mark.parametrize("select", ["lora:last-1", "lora+head"])
def test_parts_of_an_adapter(select: str) -> None:
    model, data = adapted("llama", 2), batch(3, 4, labels=True)
    model.requires_grad_(False)
    method = bdl.Laplace(select=select, structure="diag")
    with untouched(model):
        bayes = bdl.wrap(
            model, method, [data], likelihood="categorical", prior=PRIOR, batch="huggingface", progress=False
        )
    wanted = dense(model, data, select).diagonal()
    found: Any = bayes.posterior
    torch.testing.assert_close(found.structure.to_dense().diagonal(), wanted, rtol=1e-3, atol=1e-5)
    blocks = [name.split(".layers.")[1][0] for name in bayes.network.names if ".layers." in name]
    assert set(blocks) == ({"1"} if select == "lora:last-1" else {"0", "1"})
    assert any("modules_to_save" in name for name in bayes.network.names) == (select == "lora+head")
    assert bayes(batch(5)).mean.shape == (5, 3)


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_chains_of_an_adapter_keep_its_tensors_alone(kind: str, tmp_path: Path) -> None:
    model, data = adapted(kind, 2), [batch(6, seed=seed, labels=True) for seed in range(3)]
    model.requires_grad_(False)
    frozen = {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    below = independent_copy(model, Network(model, select="lora").names)
    assert {p.data_ptr() for name, p in below.named_parameters() if "lora_" not in name} == frozen
    method = bdl.SGMCMC("sghmc", select="lora", num_samples=4, burn_in=6, store=tmp_path / "chain")
    with untouched(model):
        bayes = bdl.wrap(
            model, method, data, likelihood="categorical", prior=PRIOR, batch="huggingface", progress=False
        )
        pred = bayes(batch(5))
    posterior = bayes.posterior
    assert isinstance(posterior, bdl.posteriors.SamplePosterior)
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert set(posterior.snapshots) == names
    size = sum(p.numel() for name, p in model.named_parameters() if name in names)
    files = [path.stat().st_size for path in (tmp_path / "chain").rglob("sample-*.safetensors")]
    assert len(files) == 4 and max(files) < 4 * size + 4000  # bytes of the adapter alone, and a header
    # each draw is the plain model with its adapter replaced
    for number, wanted in enumerate(pred.latent.samples):
        plain = copy.deepcopy(model).eval()
        for name, parameter in plain.named_parameters():
            if name in names:
                parameter.data.copy_(posterior.snapshots[name][number])
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch(5)).logits, wanted, rtol=1e-5, atol=1e-5)
    assert float(pred.epistemic.min()) > 0
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", model, batch="huggingface")
    assert torch.equal(again(batch(5)).mean, pred.mean)


def test_a_vocabulary_takes_a_rank() -> None:
    # B of the head has 40,000 outputs: their Kronecker factor would take 6.4 GB
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(
        vocab_size=40000, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False, **ends
    )
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(GPT2LMHeadModel(config), lora)
    train(model)
    # sequences of one token: factors are then those of the head alone
    data, inputs = [batch(6, 1, seed=seed, labels=True, padded=False) for seed in range(2)], batch(3, 1, padded=False)
    classes = [5, 17, 39999]
    options: dict[str, Any] = {"likelihood": "categorical", "prior": bdl.GaussianPrior(2.0), "progress": False}
    reading = bdl.batch.huggingface(position="last", classes=classes)
    with pytest.raises(UnsupportedError, match="kron_rank=32"):
        bdl.wrap(model, bdl.Laplace(select="lora"), data, batch=reading, **options)
    with untouched(model):
        bayes = bdl.wrap(model, bdl.Laplace(select="lora", kron_rank=4), data, batch=reading, **options)
    found: Any = bayes.posterior
    assert sum(tensor.numel() for tensor in found.curvature.tensors().values()) < 50 * 40000

    class Seen(nn.Module):
        """The three outputs that are ever seen: a network of those alone has the same curvature."""

        def __init__(self, head: Any) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 3, bias=False)
            self.plain = nn.Linear(16, 3, bias=False)
            self.down.weight.data = head.lora_A["default"].weight.data.clone()
            self.up.weight.data = head.lora_B["default"].weight.data[classes]
            self.plain.weight.data = head.base_layer.weight.data[classes]

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.up(self.down(x))

    below = copy.deepcopy(model).get_base_model().eval()
    hidden = [below.transformer(input_ids=tokens["input_ids"]).last_hidden_state[:, 0].detach() for tokens in data]
    pairs = [(x, tokens["labels"]) for x, tokens in zip(hidden, data, strict=True)]
    small = bdl.wrap(Seen(below.lm_head), bdl.Laplace(select=["down", "up"]), pairs, **options)
    wanted = small(below.transformer(input_ids=inputs["input_ids"]).last_hidden_state[:, 0].detach()).latent
    torch.testing.assert_close(bayes(inputs).latent.mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bayes(inputs).latent.covariance, wanted.covariance, rtol=1e-3, atol=1e-4)
    assert float(bayes.tune("evidence").log_evidence()) >= float(bayes.log_evidence())
