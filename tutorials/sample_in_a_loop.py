# %% [markdown]
# # Four lines that make a training script sample
#
# A script that trains a network becomes one that samples from its posterior: another optimiser, a chain that collects,
# one call in the loop, and a model from what it collected. The loop itself stays as it is. Everything here runs offline
# in under a minute.

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl

# %% [markdown]
# ## The script as it was
#
# Handwritten digits 0 to 7; the digits 8 and 9 are kept back for later. As in much real data some labels are wrong: a
# fifth of the 200 training labels are random. A network of this size learns them by heart.

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x = x.float() / 16
known, unknown = y < 8, y >= 8
order = torch.randperm(int(known.sum()), generator=torch.Generator().manual_seed(0))
inputs, targets = x[known][order], y[known][order]
generator = torch.Generator().manual_seed(1)
noisy = torch.where(
    torch.rand(200, generator=generator) < 0.2, torch.randint(8, (200,), generator=generator), targets[:200]
)
train_set = TensorDataset(inputs[:200], noisy)
test = DataLoader(TensorDataset(inputs[300:], targets[300:]), batch_size=500)
loader = DataLoader(train_set, batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(0))

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 8))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
for _ in range(60):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

trained = copy.deepcopy(net)  # only to compare with, further down

# %% [markdown]
# ## The script that samples
#
# The four lines are marked. A sampler takes the gradient of the *mean* loss, as any optimiser does; `num_data` tells it
# what the mean is over, and `prior_precision` replaces the weight decay. Its representation states what it samples: the
# temperature in force (1 is Bayes), the prior's standard deviation, the step.

# %%
optimizer = bdl.samplers.SGHMC(  # 1: instead of torch.optim.SGD
    net.parameters(), lr=0.04, num_data=len(train_set), prior_precision=3.0, generator=torch.Generator().manual_seed(0)
)
chain = bdl.Chain(
    net, burn_in=1000, thin=100, sampler=optimizer, probe=inputs[300:350]
)  # 2: collects every tenth epoch
print(optimizer)

for _ in range(700):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        chain.step(loss=loss)  # 3: after each step

bayes = bdl.BayesianModel(net, chain.posterior(), "categorical")  # 4: what it collected, as a model

# %% [markdown]
# ## Did it work?
#
# The chain says so itself: R-hat and effective samples of what it predicts at the 50 probe inputs. They are never taken
# of weights, where a network's symmetries make chains that agree look different.

# %%
summary = chain.summary("categorical", targets[300:350])
print(summary)
assert not summary.warnings

# %% [markdown]
# ## Is it better?
#
# The average over the samples is compared with the network that was trained, on data that neither has seen, and on
# digits that were never part of the training. The posterior does not learn wrong labels by heart: its samples agree on
# what the data say and disagree on the rest. (Its calibration error is larger because it expects wrong labels, as in
# training; those of the test are right.)

# %%
unfamiliar = DataLoader(TensorDataset(x[unknown], y[unknown]), batch_size=500)
plain = bdl.wrap(trained, "map", likelihood="categorical")
report = bdl.compare({"trained": plain, "sampled": bayes}, test, ood={"digits 8 and 9": unfamiliar}, progress=False)
print(report)
assert len(chain) == 60
assert report["sampled"]["nll"] < 0.9 * report["trained"]["nll"]
assert report["sampled"]["accuracy"] > report["trained"]["accuracy"] + 0.05

# %% [markdown]
# ## Does it know what it does not know?

# %%
familiar, strange = bayes.predict(test).epistemic.mean(), bayes.predict(unfamiliar).epistemic.mean()
print(f"mutual information: {familiar:.3f} on known digits, {strange:.3f} on unknown ones")
assert strange > 1.4 * familiar

# %% [markdown]
# ## Where to go from here
#
# `bdl.samplers` has SGLD, BAOAB, SGNHT, pSGLD, SA-SGLD and Entropy-MCMC with the same constructor, and `Cyclical` puts
# a schedule around any of them. `bdl.Chain(..., store="folder")` writes every sample as it is collected, and
# `chain.resume()` continues after a crash. Without a loop of your own, `bdl.wrap(net, "sghmc", loader,
# likelihood="categorical")` does all of this in one call.
