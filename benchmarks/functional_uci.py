"""Matched weight priors on the UCI regression sets: SGHMC with them, with fixed priors, and deep ensembles.

    python benchmarks/functional_uci.py --data FOLDER [--sets yacht,boston] [--splits 20] [--json FILE] [--quick]

FOLDER holds `uci/*.npz` (x, y, train_idx, test_idx). Networks of two layers of 50 tanh units. Inputs and targets are
standardised by the training rows of each split, and a prior is matched to the training inputs of its split alone. Two
chains of SGHMC with scale adaptation a split sample weights and noise (its variance by Gibbs steps). They start from
the prior; hierarchies from the mode of their variances (`--start prior`: from draws of them, whose heavy tails put some
chains where they stay). The chains of all splits run in one stack of networks, one optimiser for all. The ensemble
keeps a tenth of the training rows to choose when to stop and how much noise there is. RMSE and NLL in the units of the
targets as published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import finish, parser
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.functional import GP, Measurement
from bayesdl.priors import HierarchicalPrior, Prior, ScaleMixturePrior
from bayesdl.priors.mixtures import Scales, inverse_gamma

WIDTH, CHAINS, MEMBERS, BATCH = 50, 2, 5, 128
STEP, MOMENTUM, CAP = 1e-4, 0.95, 0.005  # h; 1 - friction; largest variance that a hierarchy's steps follow
NOISE_SHAPE, NOISE_RATE, NOISE_EVERY = 1.0, 0.005, 100  # inverse gamma of the noise variance, standardised
SHAPE = RATE = 3.0  # of the fixed hierarchy
POINTS, FUNCTIONS = 40, 64  # of a matching step
ROWS = ("fixed Gaussian", "matched Gaussian", "fixed hierarchical", "matched hierarchical")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Splits:
    """Standardised splits of one set: `(S, n, D)` and `(S, n)`; `unit` `(S,)` is one standardised target."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Stacked(ScaleMixturePrior):
    """A hierarchy for a stack of networks: each entry along the first axis has variances of its own."""

    shape: Mapping[str, Tensor]  # (K,) by name
    rate: Mapping[str, Tensor]
    step_cap: float = CAP
    name = "stacked"

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Not needed: the sampler takes Gibbs steps."""
        raise NotImplementedError

    def start(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Scales:
        """v from its prior."""
        return {n: inverse_gamma(self.shape[n], self.rate[n], 1.0, generator) for n in parameters}

    def gibbs(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Scales:
        """v given the weights."""
        found = {}
        for name, value in parameters.items():
            half = 0.5 * fan_in(value) * value.double().square().flatten(1).sum(1)
            count = value[0].numel()
            found[name] = inverse_gamma(self.shape[name] + count / 2, self.rate[name] + half, temperature, generator)
        return found

    def variance(self, parameters: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """v / fan-in."""
        return {n: (scales[n] / fan_in(v)).reshape(-1, *(1,) * (v.dim() - 1)).to(v) for n, v in parameters.items()}


def fan_in(stacked: Tensor) -> int:
    """Of a stack `(K, out, in)` or `(K, out)`."""
    return int(stacked.shape[2]) if stacked.dim() == 3 else 1


def network(inputs: int) -> nn.Sequential:
    """2 x 50 tanh."""
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs `(K, n)` of a stack of networks at inputs `(K, n, D)`."""
    for layer in ("0", "2", "4"):
        x = torch.baddbmm(weights[f"{layer}.bias"].unsqueeze(1), x, weights[f"{layer}.weight"].mT)
        x = torch.tanh(x) if layer != "4" else x
    return x.squeeze(2)


def splits_of(folder: Path, name: str, count: int) -> Splits:
    """The first `count` published splits."""
    with np.load(folder / "uci" / f"{name}.npz") as archive:
        x, y = archive["x"], archive["y"]
        trains, tests = archive["train_idx"][:count], archive["test_idx"][:count]
    parts: list[list[Any]] = [[], [], [], [], []]
    for train, test in zip(trains, tests, strict=True):
        centre, spread = x[train].mean(0), x[train].std(0)
        z = (x - centre) / np.where(spread < 1e-8, 1.0, spread)
        unit = y[train].std()
        t = (y - y[train].mean()) / unit
        for part, value in zip(parts, (z[train], t[train], z[test], t[test], unit), strict=True):
            part.append(torch.as_tensor(value).float())
    return Splits(*(torch.stack(part) for part in parts))


def priors(data: Splits, family: str, matched: bool, steps: int) -> list[Prior]:
    """One prior for each split."""
    net = network(data.x.shape[2])
    if not matched:
        if family == "hierarchical":
            return [HierarchicalPrior(SHAPE, RATE, fan_in=True)] * len(data.x)
        precision = {n: float(p.shape[1] if p.dim() > 1 else 1) for n, p in net.named_parameters()}
        return [bdl.GaussianPrior(precision=precision)] * len(data.x)
    target = GP.default(data.x.shape[2])
    return [
        bdl.functional.match(
            net,
            target,
            x,
            family=family,
            distance="energy",
            steps=steps,
            measurement=Measurement(x, num_points=POINTS),
            num_functions=FUNCTIONS,
            generator=torch.Generator().manual_seed(number),
            progress=False,
        )
        for number, x in enumerate(data.x)
    ]


def stacked_prior(found: list[Prior], shapes: Mapping[str, Tensor]) -> Prior:
    """The priors of all splits as one of the whole stack, split by split, `CHAINS` entries each."""
    if isinstance(found[0], HierarchicalPrior):
        pairs = {n: torch.tensor([p.hyper(n) for p in found]).double().repeat_interleave(CHAINS, 0) for n in shapes}
        return Stacked({n: v[:, 0] for n, v in pairs.items()}, {n: v[:, 1] for n, v in pairs.items()})
    pieces = []
    for name, value in shapes.items():
        each = torch.tensor([p.precision[name] for p in found]).double().repeat_interleave(CHAINS)
        pieces.append(each.unsqueeze(1).expand(-1, value.numel()).flatten())
    return bdl.GaussianPrior(precision=torch.cat(pieces))


def typical(prior: Prior, shapes: Mapping[str, Tensor]) -> Prior:
    """A hierarchy with its variances at their mode; other priors as they are."""
    if not isinstance(prior, HierarchicalPrior):
        return prior
    modes = {n: torch.tensor(prior.hyper(n)[1] / (prior.hyper(n)[0] + 1.0)) for n in shapes}
    return bdl.GaussianPrior(precision={n: float(1.0 / v.mean()) for n, v in prior.variance(shapes, modes).items()})


def sampled(
    data: Splits, found: list[Prior], steps: tuple[int, int, int], seed: int, start: str = "typical"
) -> dict[str, Tensor]:
    """RMSE, NLL `(S,)` and R-hat on predictions of SGHMC with one prior a split."""
    burn_in, thin, kept = steps
    generator = torch.Generator().manual_seed(seed)
    count, size = data.y.shape
    shapes = dict(network(data.x.shape[2]).named_parameters())
    starts = [typical(p, shapes) for p in found] if start == "typical" else found
    drawn = [p.sample(shapes, generator) for p in starts for _ in range(CHAINS)]
    weights = {n: torch.stack([one[n] for one in drawn]).detach().requires_grad_() for n in shapes}
    prior = stacked_prior(found, shapes)
    lr = STEP * size / (CAP if isinstance(prior, Stacked) else 1.0)
    sampler = bdl.samplers.SGHMC(
        list(weights.items()),
        lr,
        size,
        momentum=MOMENTUM,
        adapt=True,
        burn_in=burn_in,
        prior=prior,
        generator=generator,
    )
    owner = torch.arange(count).repeat_interleave(CHAINS)
    variance = torch.full((len(owner), 1), 0.1)
    outputs, noises = [], []
    for step in range(burn_in + thin * kept):
        rows = torch.randint(size, (len(owner), BATCH), generator=generator)
        x, y = data.x[owner.unsqueeze(1), rows], data.y[owner.unsqueeze(1), rows]
        sampler.zero_grad()
        loss = 0.5 * ((forward(weights, x) - y).square() / variance).mean(1).sum()  # each chain's own mean loss
        loss.backward()
        sampler.step()
        if step % NOISE_EVERY == NOISE_EVERY - 1:
            with torch.no_grad():
                error = (forward(weights, data.x[owner]) - data.y[owner]).double().square().sum(1)
            shape = torch.full_like(error, NOISE_SHAPE + size / 2)
            variance = inverse_gamma(shape, NOISE_RATE + error / 2, 1.0, generator).float().unsqueeze(1)
        if step >= burn_in and (step - burn_in) % thin == thin - 1:
            with torch.no_grad():
                outputs.append(forward(weights, data.test_x[owner]))
            noises.append(variance.clone())
    functions = torch.stack(outputs).unflatten(1, (count, CHAINS)).double()  # (kept, S, chains, n)
    noise = torch.stack(noises).unflatten(1, (count, CHAINS)).double()
    rmse, nll = scores(functions, noise, data)
    return {"rmse": rmse, "nll": nll, "r_hat": r_hat(functions)}


def scores(functions: Tensor, noise: Tensor, data: Splits) -> tuple[Tensor, Tensor]:
    """RMSE and NLL `(S,)` of mixtures over `(draws, S, members, n)` with noise variances `(draws, S, members, 1)`."""
    target = data.test_y.double().unsqueeze(1)
    mean = functions.mean((0, 2))
    rmse = data.unit * (mean - data.test_y).square().mean(1).sqrt()
    each = -0.5 * ((functions - target).square() / noise + torch.log(2 * math.pi * noise))
    draws = functions.shape[0] * functions.shape[2]
    mixture = each.transpose(1, 2).flatten(0, 1).logsumexp(0) - math.log(draws)
    return rmse, -mixture.mean(1) + data.unit.log()


def r_hat(functions: Tensor) -> Tensor:
    """Median over test points of the plain R-hat across chains, `(S,)` (Gelman and Rubin 1992)."""
    kept = functions.shape[0]
    within = functions.var(0).mean(1)
    between = functions.mean(0).var(1)
    return (((kept - 1) / kept * within + between) / within).sqrt().median(1).values


def ensemble(data: Splits, steps: int, seed: int) -> dict[str, Tensor]:
    """RMSE and NLL `(S,)` of five networks trained by AdamW; stopping time and noise by a tenth of the rows."""
    generator = torch.Generator().manual_seed(seed)
    count, size = data.y.shape
    held = size // 10
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])
    chosen, unseen = order[:, held:], order[:, :held]
    torch.manual_seed(seed)
    nets = [dict(network(data.x.shape[2]).named_parameters()) for _ in range(count * MEMBERS)]
    weights = {n: torch.stack([net[n] for net in nets]).detach().requires_grad_() for n in nets[0]}
    optimiser = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=1e-4)
    owner = torch.arange(count).repeat_interleave(MEMBERS)
    best = torch.full((count,), math.inf).double()
    outputs = torch.zeros(1, count, MEMBERS, data.test_y.shape[1]).double()
    noise = torch.ones(1, count, MEMBERS, 1).double()
    for step in range(steps):
        rows = chosen[owner].gather(1, torch.randint(size - held, (len(owner), BATCH), generator=generator))
        x, y = data.x[owner.unsqueeze(1), rows], data.y[owner.unsqueeze(1), rows]
        optimiser.zero_grad()
        F.mse_loss(forward(weights, x), y, reduction="none").mean(1).sum().backward()
        optimiser.step()
        if step % 100 == 99:
            with torch.no_grad():
                rows = unseen[owner]
                x, y = data.x[owner.unsqueeze(1), rows], data.y[owner.unsqueeze(1), rows]
                values = forward(weights, x).double().unflatten(0, (count, MEMBERS))
                loss, level = held_out(values, y.double().unflatten(0, (count, MEMBERS))[:, 0])
                better = loss < best
                best = torch.where(better, loss, best)
                now = forward(weights, data.test_x[owner]).double().unflatten(0, (count, MEMBERS))
                outputs[0, better], noise[0, better] = now[better], level[better].view(-1, 1, 1).expand(-1, MEMBERS, 1)
    rmse, nll = scores(outputs, noise, data)
    return {"rmse": rmse, "nll": nll}


def held_out(values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Best NLL `(S,)` of the mixture of members over a grid of noise variances, and the variance."""
    grid = torch.logspace(-4, 0.5, 60, dtype=torch.float64)
    error = (values - y.unsqueeze(1)).square().unsqueeze(0)  # (1, S, members, n)
    each = -0.5 * (error / grid[:, None, None, None] + torch.log(2 * math.pi * grid)[:, None, None, None])
    loss = -(each.logsumexp(2) - math.log(MEMBERS)).mean(2)
    found = loss.min(0)
    return found.values, grid[found.indices]


def summary(values: Tensor) -> list[float]:
    """Mean over splits and standard error."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return [round(float(values.mean()), 4), round(error, 4)]


def compared(runs: Mapping[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Figures of one set; differences are paired by split."""
    found: dict[str, Any] = {
        "NLL": {row: summary(run["nll"]) for row, run in runs.items()},
        "RMSE": {row: summary(run["rmse"]) for row, run in runs.items()},
        "R-hat, median": {row: round(float(run["r_hat"].median()), 3) for row, run in runs.items() if "r_hat" in run},
    }
    for first, second in (
        ("matched Gaussian", "fixed Gaussian"),
        ("matched hierarchical", "fixed hierarchical"),
        ("matched Gaussian", "ensemble of five"),
        ("matched hierarchical", "ensemble of five"),
    ):
        pair = {key: summary(runs[first][key] - runs[second][key]) for key in ("nll", "rmse")}
        found[f"{first} less {second}"] = pair
    return found


def main() -> None:
    """Match, sample, score, set by set."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--sets", default="yacht,energy,boston,concrete,wine")
    options_parser.add_argument("--splits", type=int, default=20)
    options_parser.add_argument("--burn-in", type=int, default=6000)
    options_parser.add_argument("--start", choices=("typical", "prior"), default="typical")
    options_parser.add_argument("--thin", type=int, default=100)
    options_parser.add_argument("--samples", type=int, default=20, help="of each chain")
    options_parser.add_argument("--match-steps", type=int, default=75)
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    steps = (60, 20, 4) if options.quick else (options.burn_in, options.thin, options.samples)
    matching, training = (5, 200) if options.quick else (options.match_steps, 3000)
    figures: dict[str, Any] = {
        "burn-in, thin, samples of each chain": steps,
        "splits": 2 if options.quick else options.splits,
        "start": options.start,
        "sets": {},
    }
    for name in options.sets.split(","):
        data = splits_of(options.data, name, figures["splits"])
        runs = {}
        for row in ROWS:
            kind, family = row.split()
            found = priors(data, family.lower(), kind == "matched", matching)
            runs[row] = sampled(data, found, steps, 0, options.start)
            print(name, row, {key: summary(value) for key, value in runs[row].items()}, flush=True)
        runs["ensemble of five"] = ensemble(data, training, seed=0)
        print(name, "ensemble", {key: summary(value) for key, value in runs["ensemble of five"].items()}, flush=True)
        figures["sets"][name] = compared(runs)
        print(name, json.dumps(figures["sets"][name]), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")
    finish(figures, options)


if __name__ == "__main__":
    main()
