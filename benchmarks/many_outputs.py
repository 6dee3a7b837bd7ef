"""A last layer with 50,000 classes and 1,024 features: fit, tuning and class variances in under 2 GB.

    python benchmarks/many_outputs.py [--quick] [--json benchmarks/results/many_outputs.json]

Memory is the peak resident set of the whole process (Python, torch, the data, the network's own 0.2 GB, the
posterior) as the operating system counts it, read after every stage: it never falls. First the numbers: at 500 classes
the variances and the class probabilities equal the formula written out in float64.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch
from _measure import finish, parser
from torch import Tensor, nn

import bayesdl as bdl

FEATURES = 1024
TOLERANCE = 1e-4


def problem(classes: int, examples: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, features, labels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, classes)).to(device)
    return net, torch.randn(examples, FEATURES).to(device), torch.randint(0, classes, (examples,)).to(device)


def check(device: str) -> float:
    """Largest relative difference of the variances and probabilities to the formula in float64, at 500 classes."""
    net, x, y = problem(500, 64, device)
    method = bdl.Laplace(select="last_layer", structure="diag")
    prior = bdl.GaussianPrior(precision=2.0)
    found = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)(x)
    rows = torch.cat([x, x.new_ones(len(x), 1)], -1).double()
    f = net(x).detach().double()
    p = torch.softmax(f, -1)
    variance = rows.square() @ (1.0 / ((p * (1 - p)).T @ rows.square() + 2.0)).T
    probs = torch.softmax(f / torch.sqrt(1 + math.pi / 8 * variance), -1)
    pairs = ((found.latent.variance, variance), (found.mean, probs))
    return max(float(((mine - true) / true).abs().max()) for mine, true in pairs)


def resident() -> float:
    """Peak resident set of this process in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    """Check, measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, default=50_000)
    options.add_argument("--examples", type=int, default=256)
    options.add_argument("--quick", action="store_true", help="few examples")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.examples = 32
    difference = check(options.device)
    assert difference < TOLERANCE, difference
    peaks = {"start": resident()}
    net, x, y = problem(options.classes, options.examples, options.device)
    peaks["network and data"] = resident()
    seconds: dict[str, float] = {}

    def stage(name: str, start: float) -> None:
        seconds[name], peaks[name] = time.process_time() - start, resident()

    start = time.process_time()
    with torch.no_grad():
        net(x)
    stage("one forward pass", start)
    method = bdl.Laplace(select="last_layer", structure="diag")
    start = time.process_time()
    bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", progress=False)
    stage("fit, evidence and tune(training)", start)
    start = time.process_time()
    predictive = bayes(x)
    probs, variance = predictive.mean, predictive.latent.variance
    stage("prediction", start)
    assert probs.shape == variance.shape == (options.examples, options.classes)
    assert bool((variance > 0).all())
    figures: dict[str, Any] = {
        "largest relative difference to the formula, 500 classes": difference,
        "peak resident memory of the process, GB": peaks,
        "CPU time / one forward pass": {k: v / seconds["one forward pass"] for k, v in seconds.items()},
        "one C x C matrix, GB": options.classes**2 * 4 / 1e9,
    }
    figures["shape"] = {"classes": options.classes, "features": FEATURES, "examples": options.examples}
    finish(figures, options)


if __name__ == "__main__":
    main()
