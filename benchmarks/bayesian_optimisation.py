"""Bayesian optimisation of three standard functions: Bayesian networks as surrogates beside a Gaussian process.

Everything but the surrogate is common to all: the first points, the acquisition function (log expected improvement, by
Monte Carlo for ensembles) and its optimiser. Checked first: the surrogate's moments are those of the model.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import finish, parser
from torch import Tensor
from torch.quasirandom import SobolEngine

import bayesdl as bdl
from bayesdl.integrations.sklearn import BayesianRegressor
from bayesdl.methods import Method

# class of botorch.test_functions and its arguments
PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Branin": ("Branin", {}),
    "Hartmann 6": ("Hartmann", {"dim": 6}),
    # off centre, or the middle of the box would be the answer
    "Ackley 5": ("Ackley", {"dim": 5, "bounds": [(-10.0, 15.0)] * 5}),
}
# the last layer's default takes the residuals of left-out points, for which a noise this small leaves no room
METHODS: dict[str, str | Method] = {"laplace": "laplace", "vbll": bdl.VBLL(tuning="evidence"), "ensemble": "ensemble"}


def gaussian_process(x: Tensor, y: Tensor, steps: int) -> Any:
    """BoTorch's default: a Matern or RBF kernel with a length scale per input and its priors."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    del steps
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def network(x: Tensor, y: Tensor, steps: int, method: str | Method) -> Any:
    """A perceptron trained on the evidence, made Bayesian by `method`."""
    from bayesdl.integrations.botorch import Surrogate

    # the functions are exact: with a noise that is open, the evidence of few points prefers noise to structure
    exact = bdl.Gaussian(noise=0.02)
    options = {"likelihood": exact, "hidden": (32, 32), "steps": steps, "lr": 0.03, "members": 3, "standardize": False}
    found = BayesianRegressor(method=method, random_state=len(x), **options)
    surrogate = Surrogate(found.fit(2.0 * x.numpy() - 1.0, y[:, 0].numpy()).bayes_)
    surrogate.input_transform = Centred()
    return surrogate


class Centred(torch.nn.Module):
    """The unit cube as [-1, 1]."""

    transform_on_eval = True

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x - 1.0


def propose(model: Any, best: float, dimensions: int, seed: int) -> Tensor:
    """Where log expected improvement is largest, `(1, d)`."""
    from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
    from botorch.optim import optimize_acqf
    from botorch.sampling.index_sampler import IndexSampler

    from bayesdl.integrations.botorch import Surrogate

    sampled = isinstance(model, Surrogate) and not hasattr(model.posterior(torch.zeros(1, dimensions)), "distribution")
    if sampled:
        sampler = IndexSampler(torch.Size([64]), seed=seed)
        acquisition: Any = qLogExpectedImprovement(model, best_f=best, sampler=sampler)
    else:
        acquisition = LogExpectedImprovement(model, best_f=best)
    box = torch.stack([torch.zeros(dimensions), torch.ones(dimensions)]).double()
    options = {"maxiter": 30, "seed": seed, "batch_limit": 64}
    found, _ = optimize_acqf(acquisition, box, q=1, num_restarts=2, raw_samples=64, options=options)
    return found.detach()


def regret(problem: Any, build: Callable[[Tensor, Tensor, int], Any] | None, seed: int, options: Any) -> list[float]:
    """Optimum less the best value seen, after the first points and after each further one."""
    d, low, high = problem.dim, *problem.bounds
    engine = SobolEngine(d, scramble=True, seed=seed)
    x = engine.draw(options.start).double()
    y = problem(low + (high - low) * x).unsqueeze(1)
    gaps = [problem.optimal_value - float(y.max())]
    for step in range(options.rounds):
        if build is None:
            new = engine.draw(1).double()
        else:
            torch.manual_seed(1000 * seed + step)
            standard = (y - y.mean()) / y.std()
            new = propose(build(x, standard, options.steps), float(standard.max()), d, 1000 * seed + step)
        x, y = torch.cat([x, new]), torch.cat([y, problem(low + (high - low) * new).unsqueeze(1)])
        gaps.append(problem.optimal_value - float(y.max()))
    return gaps


def check() -> float:
    """Largest relative difference between a surrogate's moments and the model's own."""
    from bayesdl.integrations.botorch import Surrogate

    x = torch.rand(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = BayesianRegressor(steps=50, random_state=0).fit(x.numpy(), x.sum(1).numpy()).bayes_
    latent, found = model(x).latent, Surrogate(model).posterior(x.unsqueeze(1))
    pairs = ((found.mean[:, 0], latent.mean), (found.variance[:, 0], latent.variance))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    assert error < 1e-10, error
    return error


def summary(gaps: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard error of the last regret over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, methods in gaps.items():
        found[name] = {}
        for method, runs in methods.items():
            last = [run[-1] for run in runs]
            error = statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else 0.0
            found[name][method] = [round(statistics.mean(last), 4), round(error, 4)]
    return found


def main() -> None:
    own = parser(__doc__ or "")
    own.add_argument("--seeds", type=int, default=3)
    own.add_argument("--go-on", action="store_true", help="add to the seeds that the --json file has, up to --seeds")
    own.add_argument("--rounds", type=int, default=15, help="points chosen, one at a time")
    own.add_argument("--start", type=int, default=10, help="Sobol points before the first")
    own.add_argument("--steps", type=int, default=200, help="of training, for every network anew after every point")
    own.add_argument("--quick", action="store_true", help="one seed, two rounds")
    options = own.parse_args()
    torch.set_num_threads(options.threads)
    options.device = "cpu"  # the networks are small, and rivals run there
    if importlib.util.find_spec("botorch") is None:
        print('needs BoTorch: pip install "bayesdl[botorch]"')
        return
    from botorch import test_functions

    if options.quick:
        options.seeds, options.rounds = 1, 2
    warnings.simplefilter("ignore")
    surrogates: dict[str, Any] = {"Sobol points": None}
    if not options.no_peer:
        surrogates["Gaussian process"] = gaussian_process
    surrogates |= {name: functools.partial(network, method=method) for name, method in METHODS.items()}
    gaps: dict[str, dict[str, list[list[float]]]] = {n: {m: [] for m in surrogates} for n in PROBLEMS}
    seconds = dict.fromkeys(surrogates, 0.0)
    figures: dict[str, Any] = {"moments_relative_error": check()}
    done = 0
    if options.go_on and options.json is not None and options.json.exists():
        earlier = json.loads(options.json.read_text())
        assert all(earlier[name] == getattr(options, name) for name in ("rounds", "start", "steps"))
        gaps, done = earlier["regret"], earlier["seeds"]
    for seed in range(done, options.seeds):
        for name, (kind, arguments) in PROBLEMS.items():
            for method, build in surrogates.items():
                start = time.process_time()
                problem = getattr(test_functions, kind)(negate=True, **arguments)
                gaps[name][method].append(regret(problem, build, seed, options))
                seconds[method] += time.process_time() - start
        base = seconds.get("Gaussian process", 0.0)
        figures |= {
            "seeds": seed + 1,
            "rounds": options.rounds,
            "start": options.start,
            "steps": options.steps,
            "last_regret_mean_and_standard_error": summary(gaps),
            "cpu_time_over_gaussian_process": {m: round(s / base, 2) for m, s in seconds.items() if base},
            "regret": gaps,
        }
        if options.json is not None:  # a long run that is cut short leaves what it has
            options.json.write_text(json.dumps(figures, indent=2) + "\n")
    finish(figures, options)


if __name__ == "__main__":
    main()
