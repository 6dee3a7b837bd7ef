"""A whole training step of each sampler in units of plain SGD's, and beside the library posteriors.

A multilayer perceptron 784-256-256-10 (269,322 parameters), batch 128: forward, backward, update. Checked first: with
T = 0 SGLD ends bit for bit where SGD with the weight decay prior_precision / N does.

    python benchmarks/sampler_steps.py [--quick] [--device cuda] [--json benchmarks/results/sampler_steps.json]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import alternate, finish, parser
from torch import nn

import bayesdl as bdl

BATCH, DATA, CLASSES, STEPS = 128, 60_000, 10, 20
LR, PRECISION = 1e-5, 1.0
SAMPLERS = {
    "SGLD": bdl.samplers.SGLD,
    "SGHMC": bdl.samplers.SGHMC,
    "BAOAB": bdl.samplers.BAOAB,
    "SGNHT": bdl.samplers.SGNHT,
    "SA-SGLD": bdl.samplers.SASGLD,
    "pSGLD": partial(bdl.samplers.PSGLD, freeze_after=10**9),
    "Entropy-MCMC": bdl.samplers.EntropyMCMC,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def training(net: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, steps: int) -> Callable[[], None]:
    """`steps` plain training steps."""

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    return run


def same_as_sgd(x: torch.Tensor, y: torch.Tensor, device: str) -> bool:
    """Whether SGLD at T = 0 and SGD with weight decay agree bit for bit."""
    ends = []
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=PRECISION / DATA),
        lambda p: bdl.samplers.SGLD(p, lr=0.1, num_data=DATA, prior_precision=PRECISION, temperature=0.0),
    ):
        net = network().to(device)
        training(net, make(net.parameters()), x, y, 5)()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    return torch.equal(*ends)


def peer(name: str, x: torch.Tensor, y: torch.Tensor, device: str, steps: int) -> Callable[[], None]:
    """Steps of posteriors on the same loss."""
    import posteriors

    net = network().to(device)
    params = {key: value.detach() for key, value in net.named_parameters()}

    def log_posterior(p: Any, batch: Any) -> Any:
        f = torch.func.functional_call(net, p, (batch[0],))
        prior = -0.5 * PRECISION / DATA * sum(v.square().sum() for v in p.values())
        return prior - nn.functional.cross_entropy(f, batch[1]), f

    build = getattr(posteriors.sgmcmc, name).build
    transform = build(log_posterior, lr=LR, temperature=1 / DATA)
    state = [transform.init(params)]

    def run() -> None:
        for _ in range(steps):
            state[0] = transform.update(state[0], (x, y), inplace=True)[0]

    return run


def main() -> None:
    """Check, measure, print."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = 2 if options.quick else STEPS
    repeats = 3 if options.quick else max(options.repeats, 15)
    x, y = torch.rand(BATCH, 784, device=options.device), torch.randint(CLASSES, (BATCH,), device=options.device)
    assert same_as_sgd(x, y, options.device), "SGLD at T = 0 differs from SGD"
    work: dict[str, Callable[[], Any]] = {}
    plain = network().to(options.device)
    work["SGD"] = training(plain, torch.optim.SGD(plain.parameters(), lr=LR), x, y, steps)
    decayed = network().to(options.device)
    sgd = torch.optim.SGD(decayed.parameters(), lr=LR, weight_decay=PRECISION / DATA, momentum=0.9)
    work["SGD, momentum and weight decay"] = training(decayed, sgd, x, y, steps)
    adam = network().to(options.device)
    work["Adam"] = training(adam, torch.optim.Adam(adam.parameters(), lr=LR), x, y, steps)
    noisy = network().to(options.device)
    flat = torch.empty(sum(p.numel() for p in noisy.parameters()), device=options.device)
    fill = torch.Generator(options.device)
    work["Tensor.normal_ alone"] = lambda: [flat.normal_(generator=fill) for _ in range(steps)]
    stream = bdl.samplers.noise.NoiseStream()
    work["our noise alone"] = lambda: [stream.draw([flat]) for _ in range(steps)]
    for name, make in SAMPLERS.items():
        net = network().to(options.device)
        sampler = make(net.parameters(), LR, DATA, prior_precision=PRECISION)
        sampler.register_pre_update_hook(lambda s: None)
        work[name] = training(net, sampler, x, y, steps)
    names = ("sgld", "sghmc") if importlib.util.find_spec("posteriors") and not options.no_peer else ()
    for name in names:
        work[f"posteriors {name}"] = peer(name, x, y, options.device, steps)
    seconds = alternate(work, repeats, options.device)
    figures: dict[str, Any] = {
        "SGLD at T = 0 equals SGD bit for bit": True,
        "milliseconds per step": {key: round(1e3 * value / steps, 3) for key, value in seconds.items()},
        "step / SGD step": {key: round(value / seconds["SGD"], 2) for key, value in seconds.items()},
    }
    finish(figures, options)


if __name__ == "__main__":
    main()
