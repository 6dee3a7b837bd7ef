"""Heads in Hugging Face models, by name: their own loss code, pooling behind the head, rewards from preferences."""

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ShapeError
from bayesdl.last_layer import Classification, Regression
from tests.untouched import untouched

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDTH, CLASSES = 16, 3


def bert(task, labels=CLASSES):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        vocab_size=40,
        max_position_embeddings=16,
        num_labels=labels,
    )
    return getattr(transformers, f"BertFor{task}Classification")(config).eval()


def gpt(labels=CLASSES):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=40, n_positions=16, num_labels=labels, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config).eval()


def batch(labels=None, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs if labels is None else inputs | {"labels": labels}


SEQUENCE = torch.arange(6) % CLASSES
TOKENS = (torch.arange(42) % CLASSES).reshape(6, 7)
TOKENS[0, 4:] = -100
CASES = {
    "bert sequences": (lambda: bert("Sequence"), "classifier", SEQUENCE),
    "bert tokens": (lambda: bert("Token"), "classifier", TOKENS),
    "gpt2 sequences": (gpt, "score", SEQUENCE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_wrap_finds_the_head_and_starts_from_it(case, mode):
    made, layer, labels = CASES[case]
    net = made()
    options = {"epochs": 1, "lr": 1e-9} if mode == "full" else {"mean": "keep"}
    with untouched(net):
        bayes = bdl.wrap(
            net,
            bdl.VBLL(mode=mode, **options),
            [batch(labels)] * 2,
            likelihood="categorical",
            batch="huggingface",
            progress=False,
        )
    assert bayes.posterior.layer == layer
    pred = bayes(batch())
    assert pred.mean.shape == (*labels.shape, CLASSES)
    # means are the network's own logits; in full mode less what the logit noise (initially 1) shrinks
    shrink = 1.0 if mode == "frozen" else (1 + torch.pi / 8) ** 0.5
    with torch.no_grad():
        assert torch.allclose(pred.latent.mean * shrink, net(**batch()).logits, atol=1e-4)
    assert float(pred.epistemic.min()) > 0


@pytest.mark.parametrize("case", CASES)
def test_replaced_heads_run_the_models_own_loss_and_train_by_their_bound(case):
    made, layer, labels = CASES[case]
    net = made()
    bias = net.get_submodule(layer).bias is not None
    head = Classification(WIDTH, CLASSES, num_data=60, tensor_output=True, bias=bias)
    copy = bdl.replace(net, layer, head).eval()
    given = batch(labels)
    theirs, ours = net(**given), copy(**given)
    assert torch.allclose(theirs.loss, ours.loss, atol=1e-5) and torch.allclose(theirs.logits, ours.logits, atol=1e-5)
    last = given["attention_mask"].sum(-1) - 1
    out = head.output if layer == "classifier" else head.output.at(last)
    assert torch.allclose(out.mean, ours.logits)
    out.loss(labels).backward()
    assert all(p.grad is not None for p in copy.get_submodule(layer).parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in copy.named_parameters() if layer not in n)
    bayes = bdl.BayesianModel(copy, head.posterior(), head.likelihood())
    assert torch.allclose(bayes(batch()).probs, out.predictive.probs, atol=1e-5)


def test_positions():
    head = Classification(WIDTH, CLASSES, num_data=60)
    phi = torch.randn(4, 5, WIDTH)
    picked = head(phi).at(torch.tensor([0, 4, 2, 1]))
    assert torch.equal(picked.variance[1], head(phi).variance[1, 4]) and picked.features.shape == (4, WIDTH)
    with pytest.raises(ShapeError, match="positions"):
        head(phi).at(torch.tensor([0, 1]))


def test_a_reward_head_is_the_exact_regression_on_the_features_of_the_last_token():
    net = gpt(labels=1)
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(1))
    loader = [batch(rewards, seed=s) for s in range(3)]
    bayes = bdl.wrap(net, bdl.VBLL(tuning="evidence"), loader, likelihood="gaussian", batch="huggingface")
    assert bayes.posterior.layer == "score"
    pred = bayes(batch())
    assert pred.mean.shape == (6, 1) and float(pred.epistemic.min()) > 0
    with torch.no_grad():
        phi = torch.stack([net.transformer(**batch(seed=s)).last_hidden_state[:, -1] for s in range(3)])
        first = [net.transformer(**batch(seed=s)).last_hidden_state[0, 3] for s in range(3)]
    for s in range(3):
        phi[s, 0] = first[s]  # the padded sequence
    from bayesdl.last_layer import ConjugateRegression, Statistics

    own = bayes.posterior.belief.regression
    exact = ConjugateRegression.decompose(Statistics.of(phi.flatten(0, 1), rewards.repeat(3)))
    exact = exact.with_hyperparameters(own.ratio, own.noise_variance)
    assert torch.allclose(exact.latent(phi[0].double())[0].float(), pred.mean, atol=1e-4)
    head = Regression(WIDTH, 1, num_data=18, tensor_output=True, bias=False)
    copy = bdl.replace(net, "score", head)
    copy(**batch())
    loss = head.output.at(batch()["attention_mask"].sum(-1) - 1).loss(rewards)
    loss.backward()
    assert bool(torch.isfinite(loss))


class Preference(nn.Module):
    """Reward of the first answer less that of the second: the logit of preferring it (Bradley and Terry 1952)."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer = scorer

    def forward(self, chosen, rejected):
        return self.scorer(input_ids=chosen).logits - self.scorer(input_ids=rejected).logits


def test_a_reward_head_learns_from_preferences():
    net = Preference(gpt(labels=1))
    ids = [batch(seed=s, rows=20)["input_ids"] for s in range(2)]
    wins = (torch.arange(20) % 2).float()
    method = bdl.VBLL(layer="scorer.score", mean="refit")
    bayes = bdl.wrap(net, method, [((ids[0], ids[1]), wins)], likelihood="bernoulli", progress=False)
    pred = bayes((ids[0], ids[1]))
    swapped = bayes((ids[1], ids[0]))
    assert torch.allclose(pred.probs + swapped.probs, torch.ones(20, 1), atol=1e-5)
    assert pred.log_prob(wins).mean() > -0.69
    assert torch.allclose(pred.latent.variance, swapped.latent.variance, rtol=1e-4)
