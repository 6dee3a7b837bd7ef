"""Kronecker Laplace of convolutional networks, a grid of priors, and a last layer of 1,000 classes, against the floor.

The floor is what the exact answer cannot avoid, each piece measured alone in this run on plain tensors: one forward,
one backward of the activations with K = 10 cotangents (batched or one after another, whichever is faster), and the
matrix products of the structure: a^T a and g^T g on unfolded inputs for the fit; rotating a and g, forming
sum_t g'_t a'_t^T, weighting and contracting it for the predictive. Norm layers add the sums of g times their input.

    python benchmarks/laplace_conv.py [--device cuda] [--json benchmarks/results/laplace_conv.json]

What is equal is checked before anything is timed: the Kronecker factors with curvlinops, ASDL and BackPACK (reported,
for not all of them compute the same), the covariances with laplace-torch in float64 and the losses of the grid with
predictions at its candidates (the script fails above 1e-4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import alternate, arguments, finish, peak_bytes
from _peers import against_laplace_torch, against_peers
from defaults import LeNet, ResNet20
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.plan import plan
from bayesdl.network import Network
from bayesdl.tuning.grid import losses, passes

CLASSES, CANDIDATES = 10, 100
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet": (LeNet, (1, 28, 28), 128),
    "ResNet-20": (ResNet20, (3, 32, 32), 16),
}
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
TOLERANCE = 1e-4
Pair = tuple[Tensor, Tensor]


class Floor:
    """Plain PyTorch pieces for one network and batch."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net, self.x = net, x
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        self.taps: list[tuple[nn.Module, Tensor, Tensor]] = []
        handles = [m.register_forward_hook(self._tap) for m in net.modules() if isinstance(m, LAYERS)]
        self.output = net(x)
        for handle in handles:
            handle.remove()
        p = self.output.detach().softmax(-1)
        eye = torch.eye(CLASSES, device=x.device).unsqueeze(1)
        self.root = p.sqrt().T.unsqueeze(-1) * (eye - p)
        self.linear: list[Pair] = []  # (B, T, in) and (B, K, out, T), contiguous where products want it
        self.norms: list[Pair] = []
        for (module, value, _), g in zip(self.taps, self.batched(), strict=True):
            g = g.transpose(0, 1)
            if isinstance(module, nn.BatchNorm2d):
                self.norms.append((value.flatten(2).contiguous(), g.flatten(3).contiguous()))
            elif isinstance(module, nn.Conv2d):
                patches = F.unfold(value, module.kernel_size, 1, module.padding, module.stride).mT
                self.linear.append((self._ones(patches, module), g.flatten(3).contiguous()))
            else:
                self.linear.append((self._ones(value.unsqueeze(1), module), g.unsqueeze(-1).contiguous()))
        self.rows = [(u.flatten(0, 1), v.permute(0, 1, 3, 2).reshape(-1, v.shape[2])) for u, v in self.linear]
        self.bases = [
            tuple(torch.linalg.qr(torch.randn(n, n, device=x.device))[0] for n in self._sizes(i))
            for i in range(len(self.linear))
        ]
        self.roots = [
            torch.rand(self._sizes(i)[1], self._sizes(i)[0], device=x.device) for i in range(len(self.linear))
        ]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.net(self.x)

    def batched(self) -> tuple[Tensor, ...]:
        nodes = [node for _, _, node in self.taps]
        return torch.autograd.grad(self.output, nodes, self.root, is_grads_batched=True, retain_graph=True)

    def looped(self) -> list[tuple[Tensor, ...]]:
        nodes = [node for _, _, node in self.taps]
        return [torch.autograd.grad(self.output, nodes, v, retain_graph=True) for v in self.root]

    def moments(self) -> list[Tensor]:
        return [u.T @ u for u, _ in self.rows] + [v.T @ v for _, v in self.rows] + self._norms()

    def quad(self) -> Tensor:
        total = torch.zeros(len(self.x), CLASSES, CLASSES, device=self.x.device)
        for (u, v), (inner, outer), root in zip(self.linear, self.bases, self.roots, strict=True):
            if u.shape[1] == 1:
                spread = (u[:, 0] @ inner).square() @ root.T
                turned = v[..., 0] @ outer
                total += (turned * spread.unsqueeze(1)) @ turned.mT
                continue
            rows = (outer.T @ v).flatten(1, 2) @ (u.flatten(0, 1) @ inner).view_as(u)  # (B, K out, in)
            rows = (rows.view(*v.shape[:3], -1) * root).flatten(2)
            total += rows @ rows.mT
        for rows in self._norms():
            total += rows @ rows.mT
        return total

    def _norms(self) -> list[Tensor]:
        return [
            torch.cat([torch.stack([(k * u).sum(-1) for k in v.unbind(1)], 1), v.sum(-1)], -1) for u, v in self.norms
        ]

    def _sizes(self, index: int) -> tuple[int, int]:
        u, v = self.linear[index]
        return u.shape[-1], v.shape[2]

    @staticmethod
    def _ones(value: Tensor, module: Any) -> Tensor:
        value = value if module.bias is None else torch.cat([value, value.new_ones(*value.shape[:2], 1)], -1)
        return value.contiguous()

    def _tap(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        node = output if output.requires_grad else output.detach().requires_grad_()
        self.taps.append((module, args[0].detach(), node))
        return node.clone()


def convolutional(name: str, options: Any) -> dict[str, Any]:
    """One network: fit, predictive, grid."""
    make, shape, points = CASES[name]
    torch.manual_seed(0)
    net = make().to(options.device).eval()
    x = torch.randn(points, *shape).to(options.device)
    y = torch.randint(0, CLASSES, (points,)).to(options.device)
    data = [(x, y)]
    view, likelihood = Network(net), bdl.Categorical()
    layout = plan(view, x)
    prior = bdl.GaussianPrior(precision=1.0)
    bayes = bdl.wrap(net, bdl.Laplace(), data, likelihood=likelihood, prior=prior, progress=False)
    grid = torch.logspace(-3, 4, CANDIDATES).tolist()

    def fit() -> Any:
        return fit_curvature(view, layout, data, likelihood, structure="kron", kind="ggn", progress=False)

    def predict() -> Any:
        return bayes.posterior.push(bayes.network, x, None)

    peers: dict[str, Any] = {}
    if not options.no_peer:
        peers["kron fit against"] = against_peers(net, x, y, options.repeats, options.device)
        peers["laplace-torch"] = against_laplace_torch(make, x, y, options.device)
    grid_figures = grid_error(bayes, data, grid)
    floor = Floor(net, x)
    work: dict[str, Callable[[], Any]] = {
        "forward": floor.forward,
        "backward batched": floor.batched,
        "backward looped": floor.looped,
        "products fit": floor.moments,
        "products predict": floor.quad,
        "fit": fit,
        "predict": predict,
        "held-out grid": lambda: bayes.tune("heldout", data, grid=grid),
        "held-out grid of 41": lambda: bayes.tune("heldout", data),
        "leave-one-out grid": lambda: bayes.tune("loo", data, grid=grid),
    }
    seconds = alternate(work, options.repeats, options.device)
    passes = seconds["forward"] + min(seconds["backward batched"], seconds["backward looped"])
    figures: dict[str, Any] = {
        "points": points,
        "milliseconds": {key: round(1e3 * value, 2) for key, value in seconds.items()},
        "fit / floor": round(seconds["fit"] / (passes + seconds["products fit"]), 2),
        "predict / floor": round(seconds["predict"] / (passes + seconds["products predict"]), 2),
        f"held-out grid of {CANDIDATES} / predict": round(seconds["held-out grid"] / seconds["predict"], 2),
        "held-out grid of 41 (default) / predict": round(seconds["held-out grid of 41"] / seconds["predict"], 2),
        f"leave-one-out grid of {CANDIDATES} / predict": round(seconds["leave-one-out grid"] / seconds["predict"], 2),
    }
    return figures | grid_figures | peers


def grid_error(bayes: bdl.BayesianModel, data: list[Pair], grid: list[float]) -> dict[str, Any]:
    """Largest difference between the grid's losses and those of predictions at each candidate, which must be small."""
    posterior = bayes.posterior
    candidates = torch.tensor(grid, dtype=torch.float64)
    found = losses(bayes, posterior, candidates, passes(bayes, posterior, data, "", False, candidates=len(grid)))
    worst = 0.0
    for i in range(0, len(grid), 11):
        model = bayes.replaced(posterior=posterior.with_prior(candidates[i].to(posterior.precision)))
        truth = torch.cat([-model(x).log_prob(y) for x, y in data]).double().cpu()
        worst = max(worst, float((found[i] - truth).abs().max()))
    assert worst < TOLERANCE, f"losses differ by {worst:.2e}"
    return {"held-out grid: largest difference of a point's NLL, nats": float(f"{worst:.1g}")}


def last_layer(options: Any) -> dict[str, Any]:
    """Marginal variances of 1,000 points and 1,000 classes on 512 features."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1000)).to(options.device).eval()
    x, y = torch.randn(1000, 64).to(options.device), torch.randint(0, 1000, (1000,)).to(options.device)
    method = bdl.Laplace(select="last_layer", kind="mc")
    prior = bdl.GaussianPrior(precision=1.0)
    bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    eigen = bayes.posterior.structure.eigen[0]
    with torch.no_grad():
        phi = torch.cat([net[:2](x), x.new_ones(len(x), 1)], 1)
    weight, outer, inner = 1.0 / (eigen.values[0] + 1.0), eigen.outer[0].square(), eigen.inner[0]

    def products() -> Tensor:
        return (phi @ inner).square() @ weight.T @ outer.T

    def predict() -> Any:
        return bayes.posterior.push(bayes.network, x, None)

    torch.testing.assert_close(predict().variance, products(), rtol=1e-3, atol=1e-6)
    seconds = alternate({"products": products, "predict": predict}, options.repeats, options.device)
    return {
        "milliseconds": {key: round(1e3 * value, 2) for key, value in seconds.items()},
        "predict / products": round(seconds["predict"] / seconds["products"], 2),
        "peak memory, MiB": round(peak_bytes(predict, options.device) / 2**20, 1),
    }


def main() -> None:
    """Measure, print."""
    options = arguments(__doc__.splitlines()[0])
    figures: dict[str, Any] = {name: convolutional(name, options) for name in CASES}
    figures["last layer 512 -> 1000, 1,000 points"] = last_layer(options)
    finish(figures, options)


if __name__ == "__main__":
    main()
