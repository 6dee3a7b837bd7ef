# %% [markdown]
# # From a trained adapter to calibrated answers
#
# A small BERT is fine-tuned with LoRA on the spot, as adapters usually are: too long, on too few examples, some of them
# labelled wrongly. Its answers are then surer than they are right. Ten lines make the adapter Bayesian without training
# it again, and nothing is downloaded: network and sentences are made up here.

# %%
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import bayesdl as bdl

# %% [markdown]
# ## The adapter you have already
#
# Sentences of 12 words out of 60: the first 20 words speak for class 0, the next 20 for class 1, the rest for nothing.

# %%
source = torch.Generator().manual_seed(0)


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of sentences; one label in six is wrong."""
    labels = torch.randint(2, (count,), generator=source)
    words = torch.randint(40, 60, (count, 12), generator=source)
    speaking = torch.rand(count, 12, generator=source) < 0.3
    told = torch.randint(0, 20, (count, 12), generator=source) + 20 * labels.unsqueeze(1)
    words = 3 + torch.where(speaking, told, words)
    wrong = torch.rand(count, generator=source) < 1 / 6
    labels = torch.where(wrong, 1 - labels, labels)
    whole = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    return [{key: value[i : i + 50] for key, value in whole.items()} for i in range(0, count, 50)]


train, anchors, held_out, test = sentences(100), sentences(200), sentences(200), sentences(600)

torch.manual_seed(0)
config = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(BertForSequenceClassification(config), lora)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(80):
    for batch in train:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

# %% [markdown]
# ## Ten lines
#
# `wrap` looks for the largest noise on the adapter that changes the loss on some sentences by no more than a tolerance.
# It needs no labels and changes little on purpose: the answers stay those of the adapter you trust. Where a few hundred
# labelled sentences are at hand, `tune` takes the noise of their lowest loss instead. Nothing of the model is written
# to. (`batch="huggingface"`: batches are dictionaries, as a tokenizer and `DataCollatorWithPadding` make them.)

# %%
before = [parameter.clone() for parameter in model.parameters()]
unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in anchors]
settings = {"likelihood": "categorical", "batch": "huggingface", "progress": False}

plain = bdl.wrap(model, "map", **settings)
bayes = bdl.wrap(model, bdl.TFB(), unlabelled, **settings)
tuned = bayes.tune("heldout", held_out, sigma_range=(0.01, 30.0))
report = bdl.compare({"trained": plain, "bayesian": bayes, "bayesian, tuned": tuned}, test, progress=False)
for name in ("trained", "bayesian", "bayesian, tuned"):
    print(f"{name:16}", *(f"{key} {report[name][key]:.3f}" for key in ("accuracy", "nll", "ece")))

# %%
assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
assert report["bayesian"]["nll"] < report["trained"]["nll"]
assert report["bayesian, tuned"]["nll"] < 0.7 * report["trained"]["nll"]
assert report["bayesian, tuned"]["ece"] < 0.5 * report["trained"]["ece"]
assert report["bayesian, tuned"]["accuracy"] > report["trained"]["accuracy"] - 0.03

# %% [markdown]
# How the noise was chosen: every scale that was tried, and what it changed. "cap" or "floor" instead of "found" means
# that `sigma_range` or `tolerance` does not suit the adapter, and comes with a warning.

# %%
found = bdl.lora.search_report(bayes)
print(found)
print(f"the search cost {found.passes:.0f} forward passes over {found.anchors} sentences; sigma by labels:")
print(f"{bdl.lora.search_report(tuned).sigma:.3f}")
assert found.status == "found" and found.change <= 0.003

# %% [markdown]
# ## What else one can ask
#
# The doubt about an answer splits into noise of the labels (aleatoric) and what more data would settle (epistemic).
# Every draw is one function, the same for all sentences, and a plain model of peft if need be. The posterior is a small
# file that lies beside the adapter's own.

# %%
inputs = {key: value for key, value in test[0].items() if key != "labels"}
prediction = tuned(inputs)
print(f"mean entropy {prediction.total.mean():.3f} nats, of which epistemic {prediction.epistemic.mean():.3f}")
assert bool((prediction.epistemic > 0).all())

member = bdl.lora.merge_sample(tuned, 0)
with torch.no_grad():
    torch.testing.assert_close(member(**inputs).logits, prediction.latent.samples[0], rtol=1e-4, atol=1e-4)

tuned.save("bayesdl.safetensors")
again = bdl.load("bayesdl.safetensors", model)
assert torch.equal(again(inputs).mean, prediction.mean)

# %% [markdown]
# A causal model answers multiple-choice questions with
# `batch=bdl.batch.huggingface(position="last", classes=[ids of "A" to "D"])`; a model that scores options, such as
# `BertForMultipleChoice`, needs no more than the above; `bdl.lora.generate` writes whole texts, one draw each, and
# `bdl.lora.score` says how sure they are. Other ways to the same adapter's uncertainty are a line
# each: `bdl.Laplace(select="lora")` with the training data, `"dropout"`, `"ensemble"` with several trained adapters,
# `"temperature"` with held-out labels; `benchmarks/lora_text.py` and `benchmarks/lora_choices.py` compare them.
