"""The posterior over the projections of a vision-language model, against dense algebra and Monte Carlo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError, NumericalError, ShapeError, UnsupportedError
from bayesdl.lora.contrastive import contrastive_ggn
from bayesdl.methods.bayesvlm import log_evidence
from bayesdl.posteriors import ProjectionPosterior
from tests.untouched import untouched

P, QX, QY, N, C, B = 6, 4, 5, 40, 3, 8


def towers(bias: float | None = None, **options: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(P, QX, generator=g), torch.randn(P, QY, generator=g)
    return bdl.lora.Towers(image.double(), text.double(), options.pop("scale", 5.0), bias, **options)


def features(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 3, generator=g)
    x = torch.cat([common, torch.randn(count, QX - 3, generator=g)], 1)
    y = torch.cat([common, torch.randn(count, QY - 3, generator=g)], 1)
    return x.double(), y.double()


def batches(seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    x, y = features(N, seed)
    return list(zip(x.split(N // 2), y.split(N // 2), strict=True))


def wrapped(net: nn.Module, **options: Any) -> bdl.BayesianModel:
    method = {key: options.pop(key) for key in ("loss", "pseudo_count") if key in options}
    arguments: dict[str, Any] = {"likelihood": "categorical", "progress": False, **options}
    return bdl.wrap(net, bdl.BayesVLM(**method), arguments.pop("data", batches()), **arguments)


def over(bayes: bdl.BayesianModel) -> ProjectionPosterior:
    assert isinstance(bayes.posterior, ProjectionPosterior)
    return bayes.posterior


def dense(net: Any, loss: str, tower: int) -> Tensor:
    """N Abar (x) Bbar in the flat order of a weight (p, q): the outer index is the row."""
    inner, outer, layers = 0.0, 0.0, (net.image, net.text)
    for pair in batches():
        sides = [layer(a).detach() for layer, a in zip(layers, pair, strict=True)]
        inner = inner + pair[tower].T @ pair[tower] / N
        outer = outer + contrastive_ggn(sides[tower], sides[1 - tower], loss, *net.at)[0]
    return torch.kron(torch.as_tensor(outer), torch.as_tensor(inner))


@pytest.mark.parametrize("bias", [None, -2.0])
def test_covariances_of_embeddings_are_those_of_dense_algebra(bias: float | None) -> None:
    net, loss = towers(bias), "siglip" if bias else "infonce"
    with untouched(net):
        bayes = wrapped(net, prior=bdl.GaussianPrior(2.0), pseudo_count=10.0)
    for tower, (a, layer) in enumerate(zip(features(3, 4), (net.image, net.text), strict=True)):
        precision = 10.0 / N * dense(net, loss, tower) + 2.0 * torch.eye(layer.weight.numel()).double()
        covariance = torch.linalg.inv(precision).view(P, a.shape[1], P, a.shape[1])
        wanted = torch.einsum("ni,aibj,mj->nmab", a, covariance, a)
        found = over(bayes).embeddings(bayes.network, tower, a, shared=True)
        assert found.shared is not None
        own = torch.einsum("ai,inm,bi->nmab", found.basis, found.shared, found.basis)
        torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.variance, found.shared.diagonal(dim1=1, dim2=2).T)
        torch.testing.assert_close(found.mean, layer(a).detach())


def test_the_determinant_weighs_each_factor_by_the_size_of_the_other() -> None:
    # logdet(A (x) B) = p logdet A + q logdet B for A (q, q), B (p, p), here of the sizes 6 and 4, and 6 and 5
    net = towers()
    bayes = wrapped(net, prior=bdl.GaussianPrior(0.7))
    curvature, precision = over(bayes).curvature, over(bayes).precision
    for tower, name in enumerate(("image.weight", "text.weight")):
        h = dense(net, "infonce", tower)
        eye, weight = torch.eye(len(h)).double(), net.get_parameter(name).detach().flatten()
        wanted = 0.5 * (torch.logdet(0.7 * eye) - 0.7 * weight @ weight - torch.logdet(h + 0.7 * eye))
        found = log_evidence(curvature, bayes.network, precision, 1.0)[tower]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        a, b = curvature.inner[tower][0] / N, curvature.outer[tower][0]
        full = b[: len(a), : len(a)] + torch.eye(len(a)).double()  # any two positive matrices of unequal sizes
        product = len(a) * torch.logdet(b + eye[:P, :P]) + P * torch.logdet(a)
        torch.testing.assert_close(torch.logdet(torch.kron(b + eye[:P, :P], a)), product)
        assert not torch.allclose(product, len(full) * torch.logdet(a) + P * torch.logdet(b + eye[:P, :P]), rtol=1e-3)


@pytest.mark.parametrize("pseudo", [None, 1.0])
def test_precisions_maximise_the_evidence(pseudo: float | None) -> None:
    bayes = wrapped(towers(), pseudo_count=pseudo)
    posterior, network = over(bayes), bayes.network
    best = log_evidence(posterior.curvature, network, posterior.precision, posterior.scale)
    for factor in (0.99, 1.01, 0.1, 10.0):
        other = log_evidence(posterior.curvature, network, factor * posterior.precision, posterior.scale)
        assert bool((other < best).all())
    assert "prior precisions" in str(bayes.diagnose())
    losses = [0.0, 0.0]
    for pair in batches():
        f = bayes.network.template(*pair).detach()
        for tower, scores in enumerate((f, f.T)):
            losses[tower] += float(nn.functional.cross_entropy(scores, torch.arange(len(f)), reduction="sum"))
    torch.testing.assert_close(posterior.evidence, best - posterior.scale * torch.tensor(losses).double())


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_moments_are_those_of_drawn_projections(noise: float) -> None:
    # 20,000 draws of both projections: standard errors of a standard deviation of 0.5 %, of a covariance of 0.7 % of
    # the product of its standard deviations; the linearisation itself is within 3 %
    g, width = torch.Generator().manual_seed(0), 64
    net = bdl.lora.Towers(torch.randn(width, QX, generator=g), torch.randn(width, QY, generator=g), 4.0, -1.0)
    data = [tuple(part.float() for part in features(N))]
    # noise relative to the length of an embedding, prior alone: sd of an entry over that of its mean
    bayes = wrapped(net, data=data, prior=bdl.GaussianPrior(noise**-2), pseudo_count=1e-6)
    x, y = features(B, 5)[0].float(), features(C, 6)[1].float()
    latent = bayes((x, y)).latent
    posterior, layout = over(bayes), over(bayes).curvature.layout
    offsets = posterior.curvature.sample(torch.randn(20000, layout.numel, generator=g), 1e-6 / N, posterior.precision)
    weights = {k: v + net.get_parameter(k) for k, v in layout.to_dict(offsets).items()}
    units = [nn.functional.normalize(a @ w.mT, dim=-1) for a, w in zip((x, y), weights.values(), strict=True)]
    drawn = (4.0 * units[0] @ units[1].mT - 1.0).detach()
    assert float((latent.variance.sqrt() / drawn.std(0) - 1).abs().max()) < 0.03
    assert float((latent.mean - drawn.mean(0)).abs().max()) < 4.0 * 0.01
    for row in range(B):
        wanted = torch.cov(drawn[:, row].T)
        assert float((latent.covariance[row] - wanted).norm() / wanted.norm()) < 0.07


@pytest.mark.parametrize("bias", [False, True])
def test_several_prompts_for_each_class(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    text = nn.Linear(QY, P, bias=bias).double()
    net = bdl.lora.Towers(torch.randn(P, QX, generator=g).double(), text, 5.0)
    prompts = [torch.randn(count, QY, generator=g).double() for count in (4, 1, 3)]
    found = net.ensembled(prompts)
    wanted = torch.stack([nn.functional.normalize(text(own), dim=-1).mean(0) for own in prompts])
    images = torch.randn(B, QX, generator=g).double()
    cosines = torch.cosine_similarity(net.image(images).unsqueeze(1), wanted.unsqueeze(0), dim=-1)
    torch.testing.assert_close(net(images, found), 5.0 * cosines)
    torch.testing.assert_close(net.ensembled(prompts[0].unsqueeze(0)), found[:1])
    torch.testing.assert_close(net.ensembled([prompts[1]]), prompts[1])
    with pytest.raises(ShapeError, match=r"features \(4, 4\); expected \(K, 5\)"):
        net.ensembled([prompts[0][:, 1:]])
    with pytest.raises(ShapeError, match="no prompts"):
        net.ensembled([])
    if not bias:
        with pytest.raises(ArgumentError, match="length zero"):
            net.ensembled([0 * prompts[0]])


def test_prompt_ensembles_keep_their_moments_under_the_posterior() -> None:
    # against draws of the projection that normalise every prompt anew; 20,000 draws: a standard error of 0.5 %, and
    # weights held at the trained projection cost less than 3 % more at a noise of a tenth of an embedding
    g, width = torch.Generator().manual_seed(0), 64
    net = bdl.lora.Towers(torch.randn(width, QX, generator=g), torch.randn(width, QY, generator=g), 4.0)
    data = [tuple(part.float() for part in features(N))]
    bayes = wrapped(net, data=data, prior=bdl.GaussianPrior(100.0), pseudo_count=1e-6)
    images, common = torch.randn(B, QX, generator=g), torch.randn(C, 1, QY, generator=g)
    prompts = common + 0.5 * torch.randn(C, 5, QY, generator=g)
    latent = bayes((images, net.ensembled(prompts))).latent
    posterior, layout = over(bayes), over(bayes).curvature.layout
    offsets = posterior.curvature.sample(torch.randn(20000, layout.numel, generator=g), 1e-6 / N, posterior.precision)
    image, text = (v + net.get_parameter(k) for k, v in layout.to_dict(offsets).items())
    each = nn.functional.normalize(torch.einsum("spq,ckq->sckp", text, prompts), dim=-1).mean(2)
    seen = nn.functional.normalize(images @ image.mT, dim=-1)
    drawn = 4.0 * (seen @ nn.functional.normalize(each, dim=-1).mT).detach()
    assert float((latent.variance.sqrt() / drawn.std(0) - 1).abs().max()) < 0.05
    assert float((latent.mean - drawn.mean(0)).abs().max()) < 4.0 * 0.01


def test_drawn_functions_have_the_law_of_the_scores() -> None:
    # 400 draws: the standard error of a standard deviation is 3.5 %; of 24 none is off by 16 %, 4.5 of them, by chance
    bayes = wrapped(towers(), prior=bdl.GaussianPrior(200.0))
    x, y = features(B, 5)[0], features(C, 6)[1]
    functions = bayes.draw(400, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([f((x, y)).detach() for f in functions])
    assert float((drawn.std(0) / bayes((x, y)).latent.variance.sqrt() - 1).abs().max()) < 0.16
    assert torch.equal(functions[3]((x, y)), drawn[3])


def test_many_classes_leave_the_covariances_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bayes = wrapped(towers())
    x, y = features(B, 5)[0], features(C, 6)[1]
    joint = bayes((x, y)).latent
    monkeypatch.setattr("bayesdl.posteriors.projections.SCORES", 2 * C**2)  # two images at once
    torch.testing.assert_close(bayes((x, y)).latent.covariance, joint.covariance)
    monkeypatch.setattr("bayesdl.posteriors.projections.JOINT_OUTPUTS", 2)
    alone = bayes((x, y)).latent
    assert alone.covariance is None
    torch.testing.assert_close(alone.variance, joint.variance)
    torch.testing.assert_close(alone.mean, joint.mean)
    torch.testing.assert_close(joint.covariance.diagonal(dim1=1, dim2=2), joint.variance)


def test_no_covariance_is_the_plain_model() -> None:
    net = towers(-2.0)
    x, y = features(B, 5)[0], features(C, 6)[1]
    wanted = net.scale * torch.cosine_similarity(net.image(x).unsqueeze(1), net.text(y).unsqueeze(0), dim=-1) + net.bias
    torch.testing.assert_close(net(x, y), wanted)
    bayes = wrapped(net, prior=bdl.GaussianPrior(1e16))
    torch.testing.assert_close(bayes((x, y)).latent.mean, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bayes((x, y)).mean, wanted.softmax(-1), rtol=1e-6, atol=1e-8)
    assert float(bayes((x, y)).latent.variance.max()) < 1e-12
    # SigLIP's own link sees the bias
    single = wrapped(net, prior=bdl.GaussianPrior(1e16), likelihood="bernoulli")
    torch.testing.assert_close(single((x, y)).mean, wanted.sigmoid(), rtol=1e-6, atol=1e-8)


def test_noise_widens_as_features_leave_the_data() -> None:
    flat, strange = torch.ones(QX).double(), torch.zeros(QX).double()
    flat[-1], strange[-1] = 0.0, 3.0  # a direction that no image of the pairs has
    bayes = wrapped(towers(), data=[(flat * a, b) for a, b in batches()])
    x, y = flat * features(B, 5)[0], features(C, 6)[1]
    near, far = bayes((x, y)), bayes((x + strange, y))
    assert bool((far.latent.variance.mean(1) > near.latent.variance.mean(1)).all())
    assert bool((near.epistemic > 0).all()) and near.mean.shape == (B, C)
    torch.testing.assert_close(near.total, near.aleatoric + near.epistemic)


def test_classes_given_once_files_and_batches(tmp_path: Path) -> None:
    x, y = features(B, 5)[0], features(C, 6)[1]
    net, plain = towers(texts=y), towers()
    with untouched(net):
        bayes = wrapped(net)
    pred = bayes(x)
    torch.testing.assert_close(pred.latent.mean, wrapped(plain)((x, y)).latent.mean)
    labels = torch.arange(B) % C
    split = bayes.predict([(x[:3], labels[:3]), (x[3:], labels[3:])])
    torch.testing.assert_close(split.latent.covariance, pred.latent.covariance)
    assert bdl.evaluate(bayes, [(x, labels)])["nll"] > 0
    path = tmp_path / "towers.safetensors"
    bayes.save(path)
    again = bdl.load(path, towers(texts=y))
    assert torch.equal(again(x).latent.covariance, pred.latent.covariance)
    assert torch.equal(over(again).evidence, over(bayes).evidence)
    for one, other in zip(again.draw(2), bayes.draw(2), strict=True):
        assert torch.equal(one(x), other(x)) and torch.equal(one(x), one(x))
    with pytest.raises(FileFormatError, match="other weights"):
        bdl.load(path, towers(scale=4.0, texts=y))
    cooler = bayes.tune("heldout", [(x, labels)])
    assert cooler(x).mean.shape == (B, C)
    single = bayes.float()
    torch.testing.assert_close(single(x).mean.double(), pred.mean, rtol=1e-3, atol=1e-4)


def clip(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 1}
    vision = {**sizes, "hidden_size": 16 if kind == "siglip" else 20, "image_size": 8, "patch_size": 4}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        return transformers.CLIPModel(config)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_of_transformers(kind: str) -> None:
    model = clip(kind).train()
    g = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(10, 3, 8, 8, generator=g),
        "input_ids": torch.cat([torch.randint(3, 30, (10, 5), generator=g), torch.full((10, 1), 2)], 1),
        "attention_mask": torch.ones(10, 6, dtype=torch.long),
    }
    prompts = {key: value[:C] for key, value in batch.items() if key != "pixel_values"}
    with untouched(model):
        images, texts = bdl.lora.image_features(model, batch), bdl.lora.text_features(model, batch)
        net = bdl.lora.Towers.of(model, bdl.lora.text_features(model, prompts))
        bayes = wrapped(net, data=[(images, texts)], prior=bdl.GaussianPrior(1e12))
        wide = wrapped(net, data=[(images, texts)])
    with torch.no_grad():
        wanted = model.eval()(**prompts, pixel_values=batch["pixel_values"]).logits_per_image
    torch.testing.assert_close(bayes(images).latent.mean, wanted, rtol=1e-4, atol=1e-4)
    assert float(wide(images).latent.variance.min()) > 0
    assert over(wide).curvature.inner[0].shape == (1, 20 if kind == "clip" else 16, 20 if kind == "clip" else 16)
    loss = "siglip" if kind == "siglip" else "infonce"
    assert loss in str(wide.diagnose())


def test_errors() -> None:
    net, (x, y) = towers(), features(N)
    with pytest.raises(ArgumentError, match=r"bdl.lora.Towers\(W_x"):
        wrapped(nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="loss='triplet'"):
        wrapped(net, loss="triplet")
    with pytest.raises(ArgumentError, match="pseudo_count=0"):
        wrapped(net, pseudo_count=0.0)
    with pytest.raises(ArgumentError, match='"bayesvlm" needs data'):
        wrapped(net, data=None)
    with pytest.raises(ShapeError, match="batch 0: features of texts"):
        wrapped(net, data=[(x, x)])
    with pytest.raises(ShapeError, match="39 texts"):
        wrapped(net, data=[(x, y[1:])])
    with pytest.raises(NonFiniteError, match="texts"):
        wrapped(net, data=[(x, y / 0)])
    with pytest.raises(NumericalError, match="one pair only"):
        wrapped(net, data=[(x[:1], y[:1])])
    with pytest.raises(ShapeError, match="expected a scalar, or one per tower"):
        wrapped(net, prior=bdl.GaussianPrior(torch.ones(3)))
    with pytest.raises(ArgumentError, match="mean zero"):
        wrapped(net, prior=bdl.GaussianPrior(1.0, mean=1.0))
    bayes = wrapped(net, prior=bdl.GaussianPrior(torch.tensor([1.0, 2.0])))
    assert over(bayes).precision.tolist() == [1.0, 2.0]
    with pytest.raises(ArgumentError, match="without texts"):
        bayes(x)
    with pytest.raises(ShapeError, match="features of shape"):
        bayes((x[:, 1:], y))
    with pytest.raises(ShapeError, match="empty"):
        bayes((x[:0], y))
    with pytest.raises(ShapeError, match="into one space"):
        bdl.lora.Towers(torch.ones(3, 2), torch.ones(4, 2), 1.0)
    with pytest.raises(ShapeError, match="expected a matrix"):
        bdl.lora.Towers(torch.ones(3), torch.ones(4, 2), 1.0)
    with pytest.raises(ArgumentError, match="scale=0"):
        bdl.lora.Towers(torch.ones(3, 2), torch.ones(3, 2), 0.0)
    with pytest.raises(UnsupportedError, match="neither a CLIP nor a SigLIP"):
        bdl.lora.Towers.of(nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match="no text_model"):
        bdl.lora.text_features(nn.Linear(3, 2), {"input_ids": x})
    with pytest.raises(ArgumentError, match="'pixel_values'"):
        bdl.lora.image_features(clip("clip"), {"input_ids": x})
