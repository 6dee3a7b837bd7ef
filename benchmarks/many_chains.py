"""Steps of several chains: one module after another, or batched through the pure kernel and vmap(grad).

Eight SGHMC chains on an MLP 784-256-10 and on a small convolutional network, at three batch sizes, each chain with a
batch of its own. Checked first: at T = 0 both ways end in the same weights.

    python benchmarks/many_chains.py [--quick] [--device cuda] [--json benchmarks/results/many_chains.json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _measure import alternate, finish, parser
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import bayesdl as bdl
from bayesdl.samplers.sghmc import sghmc

CHAINS, DATA, LR, PRECISION, MOMENTUM, STEPS = 8, 60_000, 1e-3, 1.0, 0.9, 10
BATCHES = (1, 16, 128)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )


def networks(make: Callable[[], nn.Module], device: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make().to(device) for _ in range(CHAINS)]


def sequential(nets: list[nn.Module], x: Tensor, y: Tensor, temperature: float, steps: int) -> Callable[[], None]:
    """Each chain takes a step of its own optimiser."""
    samplers = [
        bdl.samplers.SGHMC(n.parameters(), LR, DATA, prior_precision=PRECISION, temperature=temperature) for n in nets
    ]

    def run() -> None:
        for _ in range(steps):
            for net, sampler, a, b in zip(nets, samplers, x, y, strict=True):
                sampler.zero_grad()
                nn.functional.cross_entropy(net(a), b).backward()
                sampler.step()

    return run


def batched(
    nets: list[nn.Module], x: Tensor, y: Tensor, temperature: float, steps: int
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """All chains take one step of the kernel on tensors with a leading chain axis; those tensors."""
    stacked, _ = stack_module_state(nets)  # type: ignore[arg-type]
    theta = {name: value.detach() for name, value in stacked.items()}
    moving = {name: torch.zeros_like(value) for name, value in theta.items()}
    base = nets[0]

    def loss(params: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(base, params, (a,)), b)

    slope = vmap(grad(loss))

    def run() -> None:
        for _ in range(steps):
            found = slope(theta, x, y)
            for name, value in theta.items():
                force = found[name] + PRECISION / DATA * value
                noise = torch.randn_like(value)
                theta[name], moving[name] = sghmc(
                    value, moving[name], force, noise, LR, 1 - MOMENTUM, temperature / DATA
                )

    return run, theta


def agree(make: Callable[[], nn.Module], x: Tensor, y: Tensor, device: str) -> float:
    """Largest difference of a weight after five steps at T = 0."""
    nets, others = networks(make, device), networks(make, device)
    sequential(nets, x, y, 0.0, 5)()
    run, theta = batched(others, x, y, 0.0, 5)
    run()
    expected, _ = stack_module_state(nets)  # type: ignore[arg-type]
    return max(float((theta[name] - value.detach()).abs().max()) for name, value in expected.items())


def main() -> None:
    """Check, measure, print."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, repeats = (1, 3) if options.quick else (STEPS, options.repeats)
    figures: dict[str, Any] = {"chains": CHAINS, "relative_speed_of_batched": {}, "largest_difference": 0.0}
    for name, make in (("mlp", mlp), ("conv", conv)):
        for size in BATCHES:
            x = torch.rand(CHAINS, size, 1, 28, 28, device=options.device)
            y = torch.randint(10, (CHAINS, size), device=options.device)
            gap = agree(make, x, y, options.device)
            assert gap < 1e-5, f"the two ways differ by {gap}"
            figures["largest_difference"] = max(gap, figures["largest_difference"])
            one = sequential(networks(make, options.device), x, y, 1.0, steps)
            many, _ = batched(networks(make, options.device), x, y, 1.0, steps)
            seconds = alternate({"sequential": one, "batched": many}, repeats, options.device)
            ratio = seconds["sequential"] / seconds["batched"]
            figures["relative_speed_of_batched"][f"{name}, batch {size}"] = ratio
    finish(figures, options)


if __name__ == "__main__":
    main()
