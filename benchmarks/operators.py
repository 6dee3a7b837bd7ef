"""Products with the GGN and the Hessian of three networks, against one forward and backward pass and curvlinops.

    python benchmarks/operators.py [--device cuda] [--quick] [--json benchmarks/results/operators.json]

Equality with curvlinops' GGNLinearOperator and HessianLinearOperator is checked first, in float64; the script fails
above 1e-8 relative. Costs are multiples of one forward and backward pass over the same data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import alternate, finish, parser
from defaults import LeNet, ResNet20
from torch import Tensor, nn

from bayesdl.curvature import CurvatureOperator, operator

CLASSES, COLUMNS, TOLERANCE = 10, 8, 1e-8
KINDS = ("ggn", "hessian")


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP": (mlp, (784,), 1000),
    "LeNet": (LeNet, (1, 28, 28), 64),
    "ResNet-20": (ResNet20, (3, 32, 32), 8),
}


class Problem:
    """One network with data, our operators and the peer's."""

    def __init__(self, name: str, options: Any, dtype: torch.dtype) -> None:
        make, shape, points = CASES[name]
        torch.manual_seed(0)
        points = max(8, points // 8) if options.quick or dtype is torch.float64 else points
        self.net = make().to(options.device, dtype).eval()
        self.x = torch.randn(points, *shape).to(options.device, dtype)
        self.y = torch.randint(0, CLASSES, (points,)).to(options.device)
        self.peers: dict[str, Any] = {}
        self.ours = {kind: self._ours(kind) for kind in KINDS}
        size = self.ours["ggn"].shape[0]
        self.v = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(options.device, dtype)
        self.many = torch.randn(size, COLUMNS, generator=torch.Generator().manual_seed(2)).to(options.device, dtype)
        if not options.no_peer:
            self.peers = {kind: self._peer(kind) for kind in KINDS}

    def _ours(self, kind: str) -> CurvatureOperator:
        return operator(self.net, [(self.x, self.y)], "categorical", kind=kind)

    def _peer(self, kind: str) -> Any:
        from curvlinops import GGNLinearOperator, HessianLinearOperator

        make = {"ggn": GGNLinearOperator, "hessian": HessianLinearOperator}[kind]
        loss, parameters = nn.CrossEntropyLoss(reduction="sum"), list(self.net.parameters())
        return make(self.net, loss, parameters, [(self.x, self.y)], check_deterministic=False)

    def forward_backward(self) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(self.net(self.x), self.y, reduction="sum")
        return torch.autograd.grad(loss, list(self.net.parameters()))


def differences(name: str, options: Any) -> dict[str, float]:
    """Largest relative difference of the products in float64, by kind."""
    problem = Problem(name, options, torch.float64)
    found = {}
    for kind, peer in problem.peers.items():
        ours, theirs = problem.ours[kind] @ problem.many, peer @ problem.many
        found[kind] = float((ours - theirs).abs().max() / theirs.abs().max())
        single = float((problem.ours[kind] @ problem.v - peer @ problem.v).abs().max() / theirs.abs().max())
        found[kind] = max(found[kind], single)
        if not found[kind] <= TOLERANCE:
            raise SystemExit(f"{name}, {kind}: products differ from curvlinops' by {found[kind]:.2g}")
    return found


def measured(name: str, options: Any) -> dict[str, Any]:
    """Costs of one network."""
    found: dict[str, Any] = {"largest difference": differences(name, options)}
    problem = Problem(name, options, torch.float32)
    work: dict[str, Callable[[], Any]] = {"forward + backward": problem.forward_backward}
    for kind in KINDS:
        for label, group in (("", problem.ours), (" (curvlinops)", problem.peers)):
            if kind in group:
                matrix = group[kind]
                work[f"{kind}, one direction{label}"] = lambda matrix=matrix: matrix @ problem.v
                work[f"{kind}, {COLUMNS} directions{label}"] = lambda matrix=matrix: matrix @ problem.many
    seconds = alternate(work, 3 if options.quick else options.repeats, options.device)
    unit = seconds.pop("forward + backward")
    found["points"], found["parameters"] = len(problem.x), problem.ours["ggn"].shape[0]
    found["times forward + backward"] = {key: round(value / unit, 2) for key, value in seconds.items()}
    if problem.peers:
        pairs = [key for key in seconds if "curvlinops" not in key]
        found["curvlinops / ours"] = {key: round(seconds[f"{key} (curvlinops)"] / seconds[key], 2) for key in pairs}
    return found


def main() -> None:
    """Measure and write."""
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--quick", action="store_true", help="few points and repeats")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    finish({name: measured(name, options) for name in CASES}, options)


if __name__ == "__main__":
    main()
