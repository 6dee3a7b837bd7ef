# %% [markdown]
# # Regression: how far off may this number be?
#
# A network that predicts one number, made Bayesian in one call: how noisy the data are, how little the network knows,
# and intervals that hold what they promise.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import bayesdl as bdl

# %% [markdown]
# ## Data with a gap
#
# A noisy curve, with nothing seen between -1 and 1.

# %%
generator = torch.Generator().manual_seed(0)


def sample(low: float, high: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = low + (high - low) * torch.rand(count, 1, generator=generator)
    return x, torch.sin(2 * x) + 0.4 * x + 0.2 * torch.randn(count, 1, generator=generator)


left, right = sample(-3, -1, 60), sample(1, 3, 60)
x, y = torch.cat([left[0], right[0]]), torch.cat([left[1], right[1]])

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(400):
    optimizer.zero_grad()
    (net(x) - y).square().mean().backward()
    optimizer.step()

# %% [markdown]
# ## One call
#
# Prior precision and noise are chosen from the training data alone. The true noise is 0.2.

# %%
bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="gaussian", progress=False)
print(bayes.diagnose())
noise = float(bayes.likelihood.noise)
assert 0.15 < noise < 0.25

# %% [markdown]
# ## Two kinds of uncertainty
#
# Aleatoric: the noise, which more data would not remove. Epistemic: what the network does not know, which grows where
# there was nothing to learn from.

# %%
grid = torch.linspace(-4, 4, 200).unsqueeze(1)
prediction = bayes(grid)
mean, epistemic, total = (v.detach().flatten() for v in (prediction.mean, prediction.epistemic, prediction.total))

figure, axes = plt.subplots(figsize=(6, 3))
for spread, label in ((total, "with noise"), (epistemic, "of the mean alone")):
    axes.fill_between(grid.flatten(), mean - 2 * spread.sqrt(), mean + 2 * spread.sqrt(), alpha=0.3, label=label)
axes.plot(grid, mean)
axes.plot(x, y, "k.", markersize=3)
axes.set(ylim=(-3, 3), title="two standard deviations")
axes.legend(frameon=False, loc="upper left")
figure.tight_layout()

inside, gap = bayes(x).epistemic.mean(), bayes(torch.zeros(1, 1)).epistemic.mean()
print(f"standard deviation of the mean: {inside**0.5:.2f} at the data, {gap**0.5:.2f} in the gap")
assert gap > 4 * inside

# %% [markdown]
# ## Intervals, quantiles, scores
#
# Of new data from where the network was trained, nine in ten should lie in the 90 % interval.

# %%
new = [torch.cat(pair) for pair in zip(sample(-3, -1, 500), sample(1, 3, 500), strict=True)]
prediction = bayes(new[0])
low, high = prediction.interval(0.9).squeeze(1).unbind(-1)
covered = ((low < new[1].flatten()) & (new[1].flatten() < high)).float().mean()
print(f"coverage of the 90 % interval: {covered:.3f}; median of the first: {prediction.quantile(0.5)[0].item():.2f}")
assert 0.85 < covered < 0.96

# %% [markdown]
# ## Against the plain network
#
# `evaluate` scores the whole distribution. The plain network's noise is that of its training residuals, which is too
# small once it has learned some of them by heart.

# %%
plain = bdl.wrap(net, "map", [(x, y)], likelihood="gaussian", progress=False)
scores = {name: bdl.evaluate(model, [tuple(new)]) for name, model in (("plain", plain), ("laplace", bayes))}
print({name: (round(score["nll"], 3), round(score["crps"], 3)) for name, score in scores.items()})
assert scores["laplace"]["nll"] < scores["plain"]["nll"]
