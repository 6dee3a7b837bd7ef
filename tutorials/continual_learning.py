# %% [markdown]
# # Continual learning: new tasks without the old data
#
# A network that is trained on one task after another forgets the first. The posterior of each task, as the prior of the
# next, remembers which weights mattered.

# %%
import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesdl as bdl

# %% [markdown]
# ## Three tasks
#
# Digits as they are, then with all pixels shuffled in one way, then in another: the same labels from inputs that have
# nothing in common.

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x, generator = x.float() / 16, torch.Generator().manual_seed(0)
shuffles = [torch.arange(64), *(torch.randperm(64, generator=generator) for _ in range(2))]
order = torch.randperm(len(y), generator=generator)
train_rows, test_rows = order[:1000], order[1000:]
tasks = [(x[train_rows][:, shuffle], y[train_rows]) for shuffle in shuffles]
tests = [(x[test_rows][:, shuffle], y[test_rows]) for shuffle in shuffles]


def accuracies(net: nn.Module) -> list[float]:
    with torch.no_grad():
        return [float((net(inputs).argmax(1) == labels).float().mean()) for inputs, labels in tests]


# %% [markdown]
# ## Training, with a penalty or without
#
# The prior's log density is the penalty: quadratic around the old weights, steep where the old tasks pinned them down.


# %%
def train(net: nn.Module, task: tuple[torch.Tensor, torch.Tensor], prior: bdl.Prior) -> None:
    inputs, labels = task
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        penalty = prior.log_prob(dict(net.named_parameters())) / len(labels)
        (nn.functional.cross_entropy(net(inputs), labels) - penalty).backward()
        optimizer.step()


def sequence(remember: bool) -> list[list[float]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    prior, history = bdl.GaussianPrior(1.0), []
    for task in tasks:
        train(net, task, prior)
        history.append(accuracies(net))
        if remember:
            method = bdl.Laplace(structure="kron")
            bayes = bdl.wrap(copy.deepcopy(net), method, [task], likelihood="categorical", prior=prior, progress=False)
            prior = bayes.as_prior()
    return history


forgetful, mindful = sequence(remember=False), sequence(remember=True)

# %% [markdown]
# ## What is left of the earlier tasks
#
# Accuracy on each of the three after every training. Nothing of the old data is kept: only the weights and the two
# small factors of each layer's curvature.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axes, history, title in zip(panels, (forgetful, mindful), ("plain", "posterior as prior"), strict=True):
    for task in range(3):
        axes.plot(range(task + 1, 4), [after[task] for after in history[task:]], marker="o", label=f"task {task + 1}")
    axes.set(title=title, xlabel="trained on so many tasks", xticks=[1, 2, 3])
panels[0].set_ylabel("accuracy")
panels[0].legend(frameon=False)
figure.tight_layout()

for name, history in (("plain", forgetful), ("posterior as prior", mindful)):
    print(f"{name}: {[round(value, 3) for value in history[-1]]}, mean {sum(history[-1]) / 3:.3f}")
assert sum(mindful[-1]) / 3 > sum(forgetful[-1]) / 3 + 0.1
assert min(mindful[-1]) > 0.6 > 0.4 > min(forgetful[-1])
