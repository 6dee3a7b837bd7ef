# %% [markdown]
# # A Bayesian last layer for a network that is trained already
#
# The last layer of a regression network is linear: its exact posterior needs one pass over the data and no gradient
# step. The catch is the features. A network that has learned its noisy targets by heart has features that have seen the
# noise, and a last layer that trusts them says it knows what it does not know. Here is how that is avoided.

# %%
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl

# %% [markdown]
# ## A network that was trained for too long

# %%
x, y = (torch.as_tensor(array).float() for array in load_diabetes(return_X_y=True))
x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, held_out, test = (
    DataLoader(TensorDataset(x[rows], y[rows]), batch_size=50) for rows in (order[:250], order[250:330], order[330:])
)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(200):
    for inputs, targets in train:
        optimizer.zero_grad()
        (net(inputs) - targets).square().mean().backward()
        optimizer.step()


def mse(loader: DataLoader) -> float:
    with torch.no_grad():
        return float(torch.cat([(net(a) - b).square() for a, b in loader]).mean())


print(f"mean squared error: {mse(train):.3f} in training, {mse(test):.3f} on new data")
assert mse(test) > 10 * mse(train)

# %% [markdown]
# ## One call
#
# Prior and noise are chosen by the residuals that the *whole* network would have without each training point, from its
# linear model in function space. The diagnosis warns that these are far larger than the training residuals.

# %%
bayes = bdl.wrap(net, "vbll", train, likelihood="gaussian", progress=False)
print(bayes.diagnose())
assert any("left-out residuals" in finding.text for finding in bayes.diagnose().warnings)

# %% [markdown]
# ## What the evidence would have said
#
# Empirical Bayes on the same features believes the training residuals. So does leave-one-out of the last layer alone.

# %%


def nll(model: bdl.BayesianModel) -> float:
    with torch.no_grad():
        return -float(torch.cat([model(a).log_prob(b) for a, b in test]).mean())


scores = {"training (the default)": nll(bayes)}
for rule in ("evidence", "loo"):
    scores[rule] = nll(bayes.tune(rule))
print(scores)
assert scores["training (the default)"] + 1 < min(scores["evidence"], scores["loo"])

# %% [markdown]
# ## Data that the network has never seen settle it
#
# `validation=` chooses prior and noise by the score on held-out data. The plain network, with a noise from the same
# held-out data, is the baseline that has to be met.

# %%
tuned = bdl.wrap(net, "vbll", train, likelihood="gaussian", validation=held_out, progress=False)
plain = bdl.wrap(net, "map", held_out, likelihood="gaussian", progress=False)
print(f"held-out: last layer {nll(tuned):.3f}, plain network {nll(plain):.3f}")
assert nll(tuned) < nll(plain) + 0.02
assert nll(tuned) < scores["training (the default)"] + 0.1

# %% [markdown]
# ## Heavier tails where data are few
#
# With an unknown noise the predictive is a Student-t, in closed form too.

# %%
heavy = bdl.wrap(net, bdl.VBLL(noise="gamma"), train, likelihood="gaussian", progress=False)
inputs, _ = next(iter(test))
prediction = heavy(inputs)
print(prediction.distribution)
torch.testing.assert_close(prediction.total, prediction.aleatoric + prediction.epistemic)
torch.testing.assert_close(prediction.mean, bayes(inputs).mean)
assert bool((heavy(10 * inputs).epistemic > prediction.epistemic).all())
