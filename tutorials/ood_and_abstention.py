# %% [markdown]
# # Strange inputs, and the right to say "I do not know"
#
# A classifier of the digits 0 to 7 meets 8 and 9. Three scores try to tell; then a threshold on confidence is proved
# to keep the error below a bound.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesdl as bdl

# %%
x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
x = x.float() / 16
known = (y < 8).nonzero().squeeze(1)
known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
train, held_out, test = ([(x[rows], y[rows])] for rows in (known[:400], known[400:900], known[900:]))
strange = [(x[y >= 8], y[y >= 8])]

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(train[0][0]), train[0][1]).backward()
    optimizer.step()
bayes = bdl.wrap(net, "laplace", train, likelihood="categorical", validation=held_out, progress=False)

# %% [markdown]
# ## Three scores
#
# Entropy of the prediction; the epistemic part of it; and how far the features are from those of the training data,
# which needs no Bayes at all. AUROC: the probability that a strange input scores higher than a known one.

# %%
density = bdl.evaluation.FeatureDensity(kind="knn").fit(bayes, train, calibration=held_out, progress=False)
report = bdl.compare(
    {"plain": bdl.wrap(net, "map", likelihood="categorical"), "laplace": bayes},
    test,
    ood={"8 and 9": strange},
    scores={"features": density},
    cost=False,
    progress=False,
)
scores = {score: report["laplace"][f"ood/8 and 9/{score}/auroc"] for score in ("entropy", "epistemic", "features")}
print({score: round(value, 3) for score, value in scores.items()})
assert min(scores.values()) > 0.85

# %%
figure, axes = plt.subplots(figsize=(5, 3.5))
report.plot.roc(ax=axes)
figure.tight_layout()

# %% [markdown]
# A conformal p-value turns the distance into a decision with a known rate of false alarms: 5 % of known digits here.

# %%
alarms = [float((density.p_value(inputs) <= 0.05).float().mean()) for inputs in (test[0][0], strange[0][0])]
print(f"alarms: {alarms[0]:.1%} of known digits, {alarms[1]:.1%} of unknown ones")
assert alarms[0] < 0.08 and alarms[1] > 0.3

# %% [markdown]
# ## Abstain, with a guarantee
#
# Of the digits that are accepted, at most 2 % shall be wrong. `certify` finds the threshold on held-out digits
# (others than those that tuned the model would be better still) and proves it, with confidence 95 %.

# %%
inputs, labels = held_out[0]
prediction = bayes(inputs)
confidence, wrong = prediction.probs.amax(1), prediction.probs.argmax(1) != labels
certificate = bdl.decisions.certify(confidence, wrong, risk=0.02)
print(certificate)
assert certificate.certified

inputs, labels = test[0]
prediction = bayes(inputs)
accepted = prediction.probs.amax(1) >= certificate.threshold
error = (prediction.probs.argmax(1) != labels).float()
print(f"new digits: {accepted.float().mean():.1%} accepted, {error[accepted].mean():.2%} of these wrong")
print(f"without abstention {error.mean():.2%} are wrong")
assert error[accepted].mean() <= 0.02 < error.mean()

# %% [markdown]
# The proof is about digits like those held out. Of 8 and 9, fewer are accepted, and all of those are wrong: hence the
# score of the first part.

# %%
accepted_strange = (bayes(strange[0][0]).probs.amax(1) >= certificate.threshold).float().mean()
print(f"{accepted_strange:.1%} of the unknown digits are accepted")
assert accepted_strange < accepted.float().mean() - 0.2
