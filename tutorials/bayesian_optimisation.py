# %% [markdown]
# # Bayesian optimisation with a network
#
# Find the largest value of an expensive function in few evaluations. A Bayesian network says at every point how large
# the value may be; where that is most promising, the function is evaluated next.

# %%
from importlib.util import find_spec

import matplotlib.pyplot as plt
import torch

import bayesdl as bdl
from bayesdl.integrations.sklearn import BayesianRegressor

# %% [markdown]
# ## An expensive function
#
# Two hills, one higher than the other, and five evaluations to begin with.


# %%
def expensive(x: torch.Tensor) -> torch.Tensor:
    low, high = 0.7 * torch.exp(-(((x - 0.2) / 0.14) ** 2)), torch.exp(-(((x - 0.7) / 0.12) ** 2))
    return (low + high).squeeze(-1)


grid = torch.linspace(0, 1, 201, dtype=torch.float64).unsqueeze(1)
x = torch.linspace(0.02, 0.98, 5, dtype=torch.float64).unsqueeze(1)
y = expensive(x)

# %% [markdown]
# ## Thompson sampling
#
# Draw one function from the posterior, evaluate where it is largest, learn from the result, repeat. A function that is
# high where nothing is known gets its chance: that is all the exploration there is.
#
# The function is exact, and the likelihood says so. With an open noise and this few points, noise would explain them
# all.


# %%
def fitted(x: torch.Tensor, y: torch.Tensor) -> bdl.BayesianModel:
    regressor = BayesianRegressor(
        method="ensemble", members=4, likelihood=exact, steps=250, lr=0.03, random_state=len(x)
    )
    return regressor.fit(x.numpy(), y.numpy()).bayes_


exact, generator = bdl.Gaussian(noise=0.02), torch.Generator().manual_seed(0)
models = [fitted(x, y)]
for _ in range(4):
    chosen = bdl.decisions.thompson(models[-1], grid, batch=2, generator=generator)
    x, y = torch.cat([x, grid[chosen]]), torch.cat([y, expensive(grid[chosen])])
    models.append(fitted(x, y))
print(f"best of {len(x)} evaluations: {y.max():.3f}, of the first five {y[:5].max():.3f}")
assert y.max() > 0.97 * expensive(grid).max() > y[:5].max()

# %% [markdown]
# Functions drawn before the first round and after the last: doubt is gone where it matters, and stays elsewhere.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axes, model, count in zip(panels, (models[0], models[-1]), (5, len(x)), strict=True):
    scale, shift = y[:count].std(correction=0), y[:count].mean()  # the model's f is in standard units
    for function in model.draw(12):
        axes.plot(grid, shift + scale * function(grid).detach(), color="tab:blue", alpha=0.3)
    axes.plot(grid, expensive(grid), "k--")
    axes.plot(x[:count], y[:count], "ro")
    axes.set(title=f"{count} evaluations", ylim=(-0.5, 1.5))
figure.tight_layout()

# %% [markdown]
# ## In BoTorch
#
# `Surrogate` makes any Bayesian regression a BoTorch model, for all of its acquisition functions. Posteriors with a
# closed form (here a last layer) are joint over the points of a batch; samples are functions, the same at all points.

# %%
if find_spec("botorch"):
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.optim import optimize_acqf

    from bayesdl.integrations.botorch import Surrogate

    best = (y.max() - y.mean()) / y.std(correction=0)
    acquisition = qLogExpectedImprovement(Surrogate(models[-1]), best_f=best)
    bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    candidates, value = optimize_acqf(acquisition, bounds, q=2, num_restarts=4, raw_samples=32)
    print(f"next, together: {candidates.flatten().tolist()}")
    assert candidates.shape == (2, 1) and bool(torch.isfinite(value))

# %% [markdown]
# Which surrogate serves best differs from problem to problem, and in a few smooth dimensions a Gaussian process is hard
# to beat: `benchmarks/bayesian_optimisation.py` compares them.
