# %% [markdown]
# # A prior over functions, not over weights
#
# What does "every weight is a standard normal" say about the functions of a network? Rarely what anyone believes.
# Here the belief is stated as a Gaussian process, a prior over the weights of an ordinary network is matched to it, and
# both are looked at before any data.

# %%
import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import bayesdl as bdl

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
inputs = torch.linspace(-3, 3, 120).unsqueeze(1)

# %% [markdown]
# ## The belief
#
# Smooth functions of unit size that change over a distance of about one.

# %%
belief = bdl.functional.GP(kernel="rbf", lengthscale=1.0, variance=1.0)

# %% [markdown]
# ## The match
#
# One standard deviation for each tensor is learned, by comparing draws of functions. The trained values of the network
# are neither read nor written. (`distance="w1"`, the default, is the critic of the paper; "energy" needs none.)

# %%
prior = bdl.functional.match(
    net, belief, inputs, distance="energy", steps=200, progress=False, generator=torch.Generator().manual_seed(0)
)
report = prior.report
assert report.fit.covariance_error < 0.4 * report.before.covariance_error
assert abs(report.fit.std[0] / report.fit.target_std[0] - 1) < 0.2

# %% [markdown]
# ## Before, after, and the belief itself
#
# Eight functions of each. The standard normal prior over weights believes in large, rough functions.

# %%
source = torch.Generator().manual_seed(1)
plain = bdl.GaussianPrior(precision=1.0)
parameters = dict(net.named_parameters())


def functions(weights_prior):
    with torch.no_grad():
        drawn = [weights_prior.sample(parameters, source) for _ in range(8)]
        return torch.stack([torch.func.functional_call(net, weights, (inputs,))[:, 0] for weights in drawn])


panels = {
    "standard normal weights": functions(plain),
    "matched weights": functions(prior),
    "the Gaussian process": belief.sample(inputs, 8, source)[..., 0],
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharex=True, layout="constrained")
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    axis.plot(inputs[:, 0], values.T, linewidth=1.2, color="#0072b2", alpha=0.7)
    axis.set_title(title)
    axis.set_xlabel("x")
    axis.spines[["top", "right"]].set_visible(False)
for axis in axes[1:]:
    axis.set_ylim(-3.2, 3.2)
axes[0].set_ylabel("f(x)")
folder = Path(tempfile.mkdtemp())
figure.savefig(folder / "functions.png")
assert panels["standard normal weights"].std() > 3 * panels["matched weights"].std()

# %% [markdown]
# ## How far it got
#
# The report has the size of the functions, the error of their covariance, and how alike two values are at a distance.
# What is left at short distances is what one standard deviation for each tensor cannot say: `family="located"` learns a
# mean for every hidden weight too, and comes closer, at the price of features that are largely settled: beyond the
# places of measurement they know nothing. So these reach beyond the inputs.

# %%
wider = bdl.functional.Measurement(inputs, real=0.4, margin=0.2)  # 60 of 100 points from [-4.2, 4.2]
closer = bdl.functional.match(
    net, belief, inputs, family="located", distance="gaussian-w2", measurement=wider, steps=200, progress=False
)
assert closer.report.fit.covariance_error < report.fit.covariance_error
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, (title, found) in zip(axes, {"gaussian": prior, "located": closer}.items(), strict=True):
    bdl.functional.plots.correlation(found.report, ax=axis)
    axis.set_title(title)
figure.savefig(folder / "correlations.png")

# %% [markdown]
# A prior can be kept: the file holds its numbers and its report, no network.

# %%
prior.save(folder / "prior.safetensors")
assert bdl.load_prior(folder / "prior.safetensors").report == report

# %% [markdown]
# ## What it is good for
#
# The result is an ordinary prior: Laplace, samplers and MAP training take it. Here it sets the uncertainty of a Laplace
# approximation in a gap of the data, where nothing but the prior speaks. Training starts at the means of the prior.

# %%
x = torch.cat([torch.linspace(-3, -1, 30), torch.linspace(1, 3, 30)]).unsqueeze(1)
y = torch.sin(2 * x) + 0.1 * torch.randn(x.shape, generator=source)
net2 = copy.deepcopy(net)
with torch.no_grad():
    for name, parameter in net.named_parameters():
        parameter.copy_(closer.mean[name])
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(800):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(net(x), y) * len(x) / (2 * 0.1**2) - closer.log_prob(dict(net.named_parameters()))
    (loss / len(x)).backward()
    optimizer.step()
bayes = bdl.wrap(
    net, bdl.Laplace(structure="full"), [(x, y)], likelihood=bdl.Gaussian(noise=0.1), prior=closer, progress=False
)

# %% [markdown]
# Gaussian-process regression itself, in closed form, says how uncertain the belief leaves one at x = 0. (With one
# standard deviation for each tensor and no means, this network is six times as uncertain as that.)

# %%
places = torch.cat([x, torch.zeros(1, 1)])
covariance = belief.moments(places)[1]
seen = covariance[:-1, :-1] + 0.1**2 * torch.eye(len(x)).double()
exact = (covariance[-1, -1] - covariance[-1, :-1] @ torch.linalg.solve(seen, covariance[:-1, -1])).sqrt()
gap, data = bayes(torch.zeros(1, 1)), bayes(torch.full((1, 1), 2.0))
assert 0.6 < float(gap.epistemic.sqrt() / exact) < 2
assert gap.epistemic.sqrt() > 3 * data.epistemic.sqrt()

# %% [markdown]
# ## Without a law of the weights
#
# `bdl.FSPLaplace` takes the Gaussian process itself as the prior of the Laplace approximation, stated at context points
# that cover the inputs to come. The network is trained with the process's own penalty. What comes out is, between the
# context points too, Gaussian-process regression around the network.

# %%
belief = bdl.functional.GP(kernel="matern52", lengthscale=1.0)
context = torch.linspace(-4, 4, 60).unsqueeze(1)
optimizer = torch.optim.Adam(net2.parameters(), lr=1e-2)
for _ in range(800):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(net2(x), y) / (2 * 0.1**2)
    (loss + bdl.functional.energy(belief, context, net2(context)) / len(x)).backward()
    optimizer.step()
method = bdl.FSPLaplace(belief, context)
inside = bdl.wrap(net2, method, [(x, y)], likelihood=bdl.Gaussian(noise=0.1), progress=False)
assert 0.3 < float(inside(torch.zeros(1, 1)).epistemic.sqrt()) < 1.0
assert float(inside(torch.full((1, 1), 2.0)).epistemic.sqrt()) < 0.1

# %% [markdown]
# Both posteriors, mean and two standard deviations of the function: the second returns to the process's own size.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
places = torch.linspace(-4, 4, 161).unsqueeze(1)
for axis, (title, model) in zip(axes, {"matched weights": bayes, "FSP-Laplace": inside}.items(), strict=True):
    latent = model(places).latent
    mean, spread = latent.mean[:, 0], 2 * latent.variance[:, 0].sqrt()
    axis.fill_between(places[:, 0], mean - spread, mean + spread, color="#0072b2", alpha=0.2, linewidth=0)
    axis.plot(places[:, 0], mean, color="#0072b2")
    axis.scatter(x, y, s=6, color="#1b2430")
    axis.set_title(title)
    axis.set_xlabel("x")
    axis.set_ylim(-4, 4)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(folder / "posteriors.png")
