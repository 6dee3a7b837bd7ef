# %% [markdown]
# # From a trained network to one that says how sure it is
#
# A network that was trained elsewhere is wrapped in one call, tuned on held-out data, compared with itself, and asked
# about images that are no digit it has ever seen. Everything here runs offline in a few seconds.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl

# %% [markdown]
# ## The network you have already
#
# Digits 0 to 7 only. The digits 8 and 9 are kept back: they stand for whatever the world will show the network later.

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x = x.float().reshape(-1, 1, 8, 8) / 16
known, unknown = y < 8, y >= 8
order = torch.randperm(int(known.sum()), generator=torch.Generator().manual_seed(0))
inputs, targets = x[known][order], y[known][order]
train, held_out, test = (
    DataLoader(TensorDataset(inputs[rows], targets[rows]), batch_size=40)
    for rows in (slice(0, 200), slice(200, 500), slice(500, None))
)
unfamiliar = DataLoader(TensorDataset(x[unknown], y[unknown]), batch_size=100)

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(256, 64),
    nn.ReLU(),
    nn.Linear(64, 8),
)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for _ in range(150):
    for images, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

# %% [markdown]
# ## One call
#
# `validation=` lets held-out data choose the prior precision. The network itself is not touched: compare the weights.

# %%
before = [p.clone() for p in net.parameters()]
bayes = bdl.wrap(net, "laplace", train, likelihood="categorical", validation=held_out, progress=False)
assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
print(bayes.diagnose())

# %% [markdown]
# ## What comes back
#
# A distribution for every input, and its uncertainty in two parts. Aleatoric: the image is ambiguous. Epistemic: the
# network has not seen enough of its kind. Their sum is the total.

# %%
images, labels = next(iter(test))
prediction = bayes(images)
print(prediction.probs[0], prediction.aleatoric[0], prediction.epistemic[0])
torch.testing.assert_close(prediction.total, prediction.aleatoric + prediction.epistemic)

# %% [markdown]
# ## Is it better?
#
# The plain network is a little too sure of itself. The posterior costs less than a second and lowers the loss on data
# that neither the network nor the tuning has seen; the marks say which differences these data can tell apart.

# %%
plain = bdl.wrap(net, "map", likelihood="categorical")
report = bdl.compare(
    {"plain": plain, "laplace": bayes},
    test,
    ood={"digits 8 and 9": unfamiliar},
    generator=torch.Generator().manual_seed(0),
    progress=False,
)
print(report)
assert report["laplace"]["nll"] < report["plain"]["nll"]
assert report["laplace"]["accuracy"] > 0.9

# %% [markdown]
# ## Does it know what it does not know?
#
# Epistemic uncertainty is higher on digits that were never part of the training.

# %%
familiar = bayes.predict(test).epistemic.mean()
strange = bayes.predict(unfamiliar).epistemic.mean()
print(f"mutual information: {familiar:.3f} on known digits, {strange:.3f} on unknown ones")
assert strange > 2 * familiar

# %% [markdown]
# ## Keep it
#
# `bayes.save("posterior.safetensors")` writes the posterior alone; `bdl.load("posterior.safetensors", net)` needs the
# same network beside it, and says so if the weights are others.
