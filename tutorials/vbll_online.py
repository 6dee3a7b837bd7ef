# %% [markdown]
# # A last layer that learns while it is in use
#
# The posterior of a last-layer regression is a set of sums over the data. New data are added to the sums: the result is
# the same as a fit on everything at once, in any order, and costs no pass over the old data.

# %%
from itertools import pairwise

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import bayesdl as bdl

# %% [markdown]
# ## Start with little data

# %%
x, y = (torch.as_tensor(array).float() for array in load_diabetes(return_X_y=True))
x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
x, y = x[order], y[order]
first, later, test = slice(0, 60), slice(60, 300), slice(300, None)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    (net(x[first]) - y[first]).square().mean().backward()
    optimizer.step()
bayes = bdl.wrap(net, "vbll", [(x[first], y[first])], likelihood="gaussian", progress=False)

# %% [markdown]
# ## Update
#
# `update` returns a new model. Prior and noise stay as they are; the network is not touched.

# %%
stream = list(zip(x[later].split(40), y[later].split(40), strict=True))
models = [bayes]
for batch in stream:
    models.append(models[-1].update([batch]))
errors = [float((model(x[test]).mean - y[test]).square().mean()) for model in models]
doubts = [float(model(x[test]).epistemic.mean()) for model in models]
print("squared error:", [round(e, 3) for e in errors])
print("epistemic variance:", [round(d, 4) for d in doubts])
assert errors[-1] < errors[0]
assert all(b < a for a, b in pairwise(doubts))  # more data, less doubt

# %% [markdown]
# ## The same as all at once

# %%
together = bayes.update(stream[::-1])
torch.testing.assert_close(models[-1](x[test]).mean, together(x[test]).mean, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(models[-1](x[test]).variance, together(x[test]).variance, rtol=1e-4, atol=1e-6)

# %% [markdown]
# ## One point at a time, and forgetting
#
# The recursion costs d^2 a point. With `forgetting` below one the past fades, and the head follows a world that
# changes: from here on the targets have the opposite sign.

# %%
with torch.no_grad():
    features = net[:2](x)
world = torch.where(torch.arange(len(x)).unsqueeze(1) < 180, y, -y)
regression = bayes.posterior.belief.regression
recursions = {
    "lasting": bdl.last_layer.RecursiveRegression.of(regression),
    "fading": bdl.last_layer.RecursiveRegression.of(regression, forgetting=0.97),
}
errors = dict.fromkeys(recursions, 0.0)
for n in range(60, 300):
    row, target = features[n : n + 1].double(), world[n : n + 1].double()
    for name, recursion in recursions.items():
        errors[name] += float((recursion.latent(row)[0] - target).square().mean()) * (n >= 220) / 80
        recursions[name], _ = recursion.observe(row, target)
print("squared error well after the change:", errors)
assert errors["fading"] < errors["lasting"]
