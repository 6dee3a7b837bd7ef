# %% [markdown]
# # Active learning: which labels are worth their price
#
# Labels cost money, images do not. Ask for the labels that teach the network most, and compare with asking at random.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesdl as bdl

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x = x.float() / 16
test, pool = slice(0, 797), slice(797, None)
pool_x, pool_y = x[pool], y[pool]


def trained(rows: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pool_x[rows]), pool_y[rows]).backward()
        optimizer.step()
    return net


# %% [markdown]
# ## Three ways to choose the next twenty
#
# At random. By BALD, the mutual information of a label and the network: what it is unsure of and could learn (not
# what is ambiguous for ever). By LCMD on the gradient kernel, which spreads a batch over what the network has not
# seen; it takes the plain network.


# %%
def at_random(net: nn.Module, labelled: torch.Tensor, left: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(left), generator=source)[:20]


def by_bald(net: nn.Module, labelled: torch.Tensor, left: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    data = [(pool_x[labelled], pool_y[labelled])]
    prior = bdl.GaussianPrior(1.0)
    bayes = bdl.wrap(net, "laplace", data, likelihood="categorical", prior=prior, progress=False)
    return bdl.decisions.bald(bayes(pool_x[left])).topk(20).indices


def by_lcmd(net: nn.Module, labelled: torch.Tensor, left: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return bdl.decisions.select(net, [pool_x[left]], 20, train=[pool_x[labelled]])


# %% [markdown]
# ## From 20 labels to 100
#
# The network is trained anew after every twenty.


# %%
def curve(rule, seed: int) -> list[float]:
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool_x), generator=source)
    labelled, left = order[:20], order[20:]
    accuracies = []
    while True:
        net = trained(labelled)
        with torch.no_grad():
            accuracies.append(float((net(x[test]).argmax(1) == y[test]).float().mean()))
        if len(labelled) == 100:
            return accuracies
        chosen = rule(net, labelled, left, source)
        labelled = torch.cat([labelled, left[chosen]])
        left = left[~torch.isin(torch.arange(len(left)), chosen)]


rules = {"random": at_random, "BALD": by_bald, "LCMD": by_lcmd}
curves = {name: torch.tensor([curve(rule, seed) for seed in range(2)]) for name, rule in rules.items()}

# %%
figure, axes = plt.subplots(figsize=(5, 3.2))
for name, found in curves.items():
    axes.plot(range(20, 101, 20), found.mean(0), marker="o", markersize=3, label=name)
axes.set(xlabel="labels", ylabel="accuracy, mean of two starts")
axes.legend(frameon=False)
figure.tight_layout()

final = {name: float(found[:, -2:].mean()) for name, found in curves.items()}
print("accuracy with 80 to 100 labels:", {name: round(value, 3) for name, value in final.items()})
assert final["LCMD"] > final["random"] + 0.01 and final["LCMD"] > final["BALD"] + 0.01

# %% [markdown]
# The twenty images that BALD likes best are much the same image twenty times: a score of single inputs is for asking
# one at a time. A batch has to be chosen as a batch, and then a hundred labels are enough.
