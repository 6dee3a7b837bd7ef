"""Evidence tuning of ResNet-20 with one prior precision per layer: 100 steps against the fit that they follow.

    python benchmarks/evidence_tuning.py [--device cuda] [--json benchmarks/results/evidence_tuning.json]

First the optimum: both solvers agree, and the value over eigen-coordinates equals the evidence that the structure
itself gives. Then times: of the Kronecker fit per image, of 100 fixed-point steps, and of 100 evaluations of value and
gradient, which is what 100 steps of L-BFGS take at least.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import alternate, finish, parser
from defaults import ResNet20

import bayesdl as bdl
from bayesdl.evidence import log_evidence
from bayesdl.tuning.surface import Surface

STEPS, TOLERANCE = 100, 1e-5


def main() -> None:
    """Measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--images", type=int, default=256, help="of the fit that is measured")
    options.add_argument("--quick", action="store_true", help="few images and repeats")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.images, options.repeats = 32, 1
    torch.manual_seed(0)
    net = ResNet20().to(options.device).eval()
    x = torch.randn(options.images, 3, 32, 32).to(options.device)
    y = torch.randint(0, 10, (options.images,)).to(options.device)
    prior = bdl.GaussianPrior(precision=1.0)

    def fit() -> bdl.BayesianModel:
        return bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", prior=prior, progress=False)

    bayes = fit()
    posterior = bayes.posterior
    surface = Surface.of(posterior, bayes.network, "layer", True)
    start = surface.start()[0].requires_grad_()
    tuned = {solver: bayes.tune("evidence", prior="layer", solver=solver) for solver in ("gradient", "fixed-point")}
    values = {solver: float(model.log_evidence()) for solver, model in tuned.items()}
    assert abs(values["gradient"] - values["fixed-point"]) < TOLERANCE * abs(values["gradient"]), values
    direct = float(log_evidence(posterior, bayes.network, start.detach().exp()))
    assert abs(float(surface.value(start.detach(), None)) - direct) < 1e-8 * abs(direct)

    def evaluations() -> None:
        for _ in range(STEPS):
            torch.autograd.grad(surface.value(start, None), start)

    def fixed_point() -> Any:
        # convergence would end it early: the steps themselves are measured
        for _ in range(STEPS):
            torch.autograd.grad(surface.logdet(start, None), start)

    work = {
        f"{STEPS} evaluations of value and gradient": evaluations,
        f"{STEPS} fixed-point steps": fixed_point,
        "tune, gradient, until it converges": lambda: bayes.tune("evidence", prior="layer"),
        "tune, fixed point, until it converges": lambda: bayes.tune("evidence", prior="layer", solver="fixed-point"),
    }
    seconds = alternate(work, options.repeats, options.device)
    whole = alternate({"fit": fit}, max(1, options.repeats // 3), options.device)["fit"] / options.images
    figures: dict[str, Any] = {
        "parameters": posterior.layout.numel,
        "layers": len(posterior.layout.blocks),
        "images of the fit measured": options.images,
        "evidence gained, nats": round(values["gradient"] - float(bayes.log_evidence()), 1),
        "in images of the fit": {name: round(value / whole, 1) for name, value in seconds.items()},
        "of a fit on 1,000 images, %": {n: round(100 * v / (1e3 * whole), 2) for n, v in seconds.items()},
        "of a fit on 50,000 images, %": {n: round(100 * v / (5e4 * whole), 4) for n, v in seconds.items()},
    }
    finish(figures, options)


if __name__ == "__main__":
    main()
