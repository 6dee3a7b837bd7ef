# %% [markdown]
# # A Bayesian last layer that is trained with the network
#
# Swap the last layer for a head, take the head's loss, train as ever. The loss is a bound on the evidence in closed
# form: no samples are drawn, in training or in prediction.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesdl as bdl

# %% [markdown]
# ## Any network
#
# Digits 0 to 7; 8 and 9 stand for what the network has never seen.

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x = x.float() / 16
known, unknown = y < 8, y >= 8
order = torch.randperm(int(known.sum()), generator=torch.Generator().manual_seed(0))
inputs, targets = x[known][order], y[known][order]
train_x, train_y, test_x, test_y = inputs[:800], targets[:800], inputs[800:], targets[800:]

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 8))

# %% [markdown]
# ## Swap the layer
#
# `replace` returns a copy; `net` keeps its layer. The head starts at the old weights. `num_data` is the number of
# training examples: it weighs the prior against the data.

# %%
head = bdl.last_layer.Classification(32, 8, num_data=len(train_x))
bayesian = bdl.replace(net, "4", head)
with torch.no_grad():
    torch.testing.assert_close(bayesian(train_x[:5]).mean, net(train_x[:5]))

# %% [markdown]
# ## Train it
#
# Weight decay belongs on the trunk alone: the head has a prior.

# %%
groups = bdl.last_layer.parameter_groups(bayesian, weight_decay=1e-4)
optimizer = torch.optim.AdamW(groups, lr=3e-3)
generator = torch.Generator().manual_seed(0)
bounds = []
for _ in range(60):
    for rows in torch.randperm(len(train_x), generator=generator).split(100):
        optimizer.zero_grad()
        loss = bayesian(train_x[rows]).loss(train_y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(bayesian.parameters(), 1.0)
        optimizer.step()
    bounds.append(-float(loss.detach()))
print(f"bound, nats per example: {bounds[0]:.2f} after one epoch, {bounds[-1]:.2f} at the end")
assert bounds[-1] > bounds[0]

# %% [markdown]
# ## Predict
#
# One forward pass gives the distribution. Twice the same input, twice the same numbers.

# %%
bayesian.eval()
with torch.no_grad():
    out = bayesian(test_x)
    prediction = out.predictive
    assert torch.equal(prediction.probs, bayesian(test_x).predictive.probs)
accuracy = float((prediction.probs.argmax(-1) == test_y).float().mean())
print(f"accuracy {accuracy:.3f}, NLL {-float(prediction.log_prob(test_y).mean()):.3f}")
assert accuracy > 0.9

# %% [markdown]
# ## Ask about the unknown
#
# Scores of unfamiliarity come with the same forward pass. The variance of the logits alone misleads here: the features
# of unfamiliar images are small, and a linear map of small features is certain to be small. What the variance does to
# the probabilities is in the entropy.

# %%
with torch.no_grad():
    strange = bayesian(x[unknown])
auroc = {}
for score in ("entropy", "max_prob", "variance"):
    familiar, unfamiliar = out.ood_score(score), strange.ood_score(score)
    auroc[score] = float((unfamiliar.unsqueeze(1) > familiar.unsqueeze(0)).float().mean())
print({name: round(value, 3) for name, value in auroc.items()})
assert auroc["entropy"] > 0.8

# %% [markdown]
# ## As any other Bayesian model
#
# With its posterior the network takes part in comparisons, is saved, is drawn from.

# %%
bayes = bdl.BayesianModel(bayesian, head.posterior(), head.likelihood())
torch.testing.assert_close(bayes(test_x).probs, prediction.probs)
functions = bayes.draw(3, generator=torch.Generator().manual_seed(0))
assert all(function(test_x[:2]).shape == (2, 8) for function in functions)
