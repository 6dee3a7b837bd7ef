"""Kronecker Laplace of convolutional networks, a grid of priors, and a last layer of 1,000 classes, against the floor.

The floor is what the exact answer cannot avoid, each piece measured alone in this run on plain tensors: one forward,
one backward of the activations with K = 10 cotangents (batched or one after another, whichever is faster), and the
matrix products of the structure: a^T a and g^T g on unfolded inputs for the fit; rotating a and g, forming
sum_t g'_t a'_t^T, weighting and contracting it for the predictive. Norm layers add the sums of g times their input.

    python benchmarks/laplace_conv.py [--device cuda] [--json benchmarks/results/laplace_conv.json]

Equality with laplace-torch is checked on LeNet, in float64; the script fails above 1e-4 relative.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import alternate, arguments, finish, peak_bytes
from defaults import LeNet, ResNet20
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.plan import plan
from bayesdl.network import Network

CLASSES, CANDIDATES = 10, 100
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet": (LeNet, (1, 28, 28), 128),
    "ResNet-20": (ResNet20, (3, 32, 32), 16),
}
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
PEER_BATCHES = (1, 4)
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
    if name == "LeNet" and not options.no_peer:
        figures["laplace-torch"] = against_peer(make, x, y, seconds, predict, options)
    return figures


def against_peer(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, ours: dict[str, float], predict: Any, options: Any
) -> dict[str, Any]:
    """Equality of the covariances, then CPU time of the fit, CPU time and memory of the predictive per point."""
    from laplace import Laplace
    from laplace.curvature import AsdlGGN, BackPackGGN

    points = len(x)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def network(dtype: torch.dtype, biased: bool) -> nn.Module:
            torch.manual_seed(0)
            net = make().to(options.device, dtype).eval()
            for module in net.modules():
                if isinstance(module, nn.Conv2d) and not biased:
                    module.bias = None
            return net

        def fitted(backend: Any = None, dtype: torch.dtype = torch.float32, biased: bool = True) -> Any:
            net = network(dtype, biased)
            data = torch.utils.data.TensorDataset(x.to(dtype), y)
            loader = torch.utils.data.DataLoader(data, batch_size=points)
            extra = {} if backend is None else {"backend": backend}
            peer = Laplace(net, "classification", "all", "kron", prior_precision=1.0, **extra)
            peer.fit(loader)
            return peer

        fits = {"default": lambda: fitted(), "backpack": lambda: fitted(BackPackGGN), "asdl": lambda: fitted(AsdlGGN)}
        # in float64, where only a wrong number can differ, and without biases of convolutions, whose curvature is exact
        # here and approximated there
        exact, few = fitted(dtype=torch.float64, biased=False), x[: PEER_BATCHES[-1]].double()
        net = network(torch.float64, False)
        prior = bdl.GaussianPrior(precision=1.0)
        method = bdl.Laplace(bias="separate")
        same = bdl.wrap(net, method, [(x.double(), y)], likelihood="categorical", prior=prior, progress=False)
        mean, covariance = exact._glm_predictive_distribution(few)
        latent = same(few).latent
        assert torch.allclose(latent.mean, mean)
        difference = float((latent.covariance - covariance).abs().max() / covariance.abs().max())
        assert difference < TOLERANCE, f"covariances differ by {difference:.2e} relative"
        found["covariance difference in float64, relative"] = difference
        peer = fits["default"]()
        found["fit, ratio"] = {}
        for name, fit in fits.items():
            try:
                seconds = alternate({name: fit}, 1, options.device)[name]
            except NotImplementedError as error:  # a backend that knows nn.Sequential alone
                found["fit, ratio"][name] = f"fails: {error}"
            else:
                found["fit, ratio"][name] = round(seconds / ours["fit"], 1)
        per_point, memory = [], []
        for batch in PEER_BATCHES:
            call = lambda batch=batch: peer._glm_predictive_distribution(x[:batch])  # noqa: E731
            per_point.append(alternate({"peer": call}, 3, options.device)["peer"] / batch)
            memory.append(peak_bytes(call, options.device) / batch)
    own = statistics.median([peak_bytes(predict, options.device) for _ in range(3)]) / points
    found["predict, CPU time per point, ratio"] = round(min(per_point) / (ours["predict"] / points))
    found["predict, peak memory per point, ratio"] = round(min(memory) / own)
    return found


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
