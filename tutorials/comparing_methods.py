# %% [markdown]
# # Which method? Compare them on your own network
#
# Five ways to make one classifier Bayesian, in one table with error bars and on one picture. The network was trained
# for too long on few images, as networks are.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesdl as bdl

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train, held_out, test = ([(x[rows], y[rows])] for rows in (order[:200], order[200:500], order[500:]))


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train[0][0]), train[0][1]).backward()
        optimizer.step()
    return net


net = trained(0)

# %% [markdown]
# ## One call each
#
# Held-out images choose whatever a method leaves open. The ensemble costs four more trainings; the others take the
# network as it is.

# %%
options = {"likelihood": "categorical", "progress": False}
methods = {
    "plain": bdl.wrap(net, "map", **options),
    "temperature": bdl.wrap(net, "temperature", held_out, **options),
    "last layer": bdl.wrap(net, "vbll", train, validation=held_out, **options),
    "laplace": bdl.wrap(net, "laplace", train, validation=held_out, **options),
    "ensemble": bdl.wrap([net, *map(trained, range(1, 5))], "ensemble", **options),
}

# %% [markdown]
# ## One table
#
# A star marks what the test images cannot tell from the best of its column. Look at the NLL first: it is a proper
# score, which nothing but honest probabilities wins. ECE alone is easy to please.

# %%
report = bdl.compare(methods, test, reference="plain", cost=False, progress=False)
print(report)
for name in ("temperature", "last layer", "laplace", "ensemble"):
    assert report[name]["nll"] < report["plain"]["nll"]
assert report["ensemble"]["accuracy"] >= report["plain"]["accuracy"]

# %% [markdown]
# ## Is the difference real?
#
# Paired on the same images, with an interval by bootstrap.

# %%
difference = report.difference("laplace", "plain", "nll")
print(difference)

# %% [markdown]
# ## One picture
#
# On the diagonal, confidence is what it says. The network itself is above its accuracy.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6))
for axes, name in zip(panels, ("plain", "laplace"), strict=True):
    report.plot.reliability(name, ax=axes)
    axes.set_title(name)
figure.tight_layout()

# %% [markdown]
# `report.to_html("report.html")` writes everything on one page, `report.to_pandas()` and `report.to_latex()` take it
# elsewhere; `ood={"name": loader}` adds detection of strange inputs, and `shift=` a curve over growing corruption.
