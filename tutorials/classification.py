# %% [markdown]
# # Classification: doubt where there is reason to
#
# A network's softmax is sure of itself everywhere, also far from anything it was trained on. Its Bayesian version is
# less so, and how much less is for the prior to say.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

import bayesdl as bdl

# %% [markdown]
# ## Two moons, a small network

# %%
x, labels = make_moons(200, noise=0.2, random_state=0)
x, labels = torch.as_tensor(x).float(), torch.as_tensor(labels)
test_x, test_labels = (torch.as_tensor(a) for a in make_moons(1000, noise=0.2, random_state=1))
test = [(test_x.float(), test_labels)]

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), labels).backward()
    optimizer.step()

# %% [markdown]
# ## Plain, and Bayesian twice
#
# Left to itself, `wrap` chooses a prior that does no harm near the training data. They say nothing about places far
# away: a wider prior (precision 1, weights of ordinary size) doubts more there, and here it costs nothing at home.

# %%
data = [(x, labels)]
models = {
    "plain": bdl.wrap(net, "map", likelihood="categorical"),
    "laplace": bdl.wrap(net, "laplace", data, likelihood="categorical", progress=False),
    "laplace, wide prior": bdl.wrap(
        net, "laplace", data, likelihood="categorical", prior=bdl.GaussianPrior(1.0), progress=False
    ),
}
report = bdl.compare(models, test, progress=False)
print(report)
assert report["laplace"]["nll"] < report["plain"]["nll"]
assert report["laplace, wide prior"]["nll"] < report["plain"]["nll"]

# %% [markdown]
# ## Where each of them doubts
#
# Dark is certain. The plain network doubts along a thin line that it extends to infinity; the wide posterior opens it
# into a cone.

# %%
side = torch.linspace(-5, 6, 80)
grid = torch.cartesian_prod(side, side)
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
for axes, (name, model) in zip(panels, models.items(), strict=True):
    entropy = model(grid).total.detach().reshape(80, 80).T
    axes.contourf(side, side, entropy, levels=torch.linspace(0, 0.7, 15), cmap="Blues_r")
    axes.scatter(*x.T, c=labels, cmap="coolwarm", s=4)
    axes.set_title(name)
figure.tight_layout()

away = grid[grid.norm(dim=1) > 4]
doubt = {name: float(model(away).total.mean()) for name, model in models.items()}
print("mean entropy far away, in nats:", doubt)
assert doubt["plain"] < doubt["laplace"] < doubt["laplace, wide prior"]

# %% [markdown]
# ## Two kinds of doubt
#
# Between the moons the labels overlap: aleatoric, nats that no amount of data removes. Far away the network has not
# been told anything: epistemic, the mutual information of label and network.

# %%
wide = models["laplace, wide prior"]
for where, points in (("on the test data", test[0][0]), ("far away", away)):
    found = wide(points)
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic)
    print(f"{where}: {found.aleatoric.mean():.3f} aleatoric, {found.epistemic.mean():.3f} epistemic")
share = [float(m.epistemic.mean() / m.total.mean()) for m in (wide(test[0][0]), wide(away))]
assert share[1] > share[0]
