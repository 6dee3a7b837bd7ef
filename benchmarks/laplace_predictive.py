"""Curvature fit and linearised Kronecker predictive of an MLP 784-256-256-10, against the floor and laplace-torch.

The floor is what the exact answer cannot avoid, each piece measured alone in this run: one forward, one backward of
the activations with K = 10 batched cotangents, and the matrix products that the structure is defined by.

    python benchmarks/laplace_predictive.py [--device cuda] [--json benchmarks/results/laplace_predictive.json]

Equality with laplace-torch is checked first; the script fails if the covariances differ by more than 1e-4 relative.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from typing import Any

import torch
from _measure import alternate, arguments, finish, peak_bytes
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate_several
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.plan import plan
from bayesdl.network import Network

POINTS, CLASSES = 2000, 10
PEER_BATCHES = (1, 4, 16)
DIAG_BATCHES = (4, 16, 64)
TOLERANCE = 1e-4


def network(device: str) -> nn.Sequential:
    """The MLP, with weights of the size that training leaves."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    return layers.to(device).eval()


def floor_pieces(net: nn.Sequential, x: Tensor) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Work of the floor by name: the passes, then the matrix products on factors made beforehand."""
    first, second, last = net[0], net[2], net[4]
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    h0 = first(x).requires_grad_()
    h1 = second(h0.relu())
    h2 = last(h1.relu())
    nodes = [h0, h1, h2]
    p = h2.detach().softmax(-1)
    root = p.sqrt().T.unsqueeze(-1) * (torch.eye(CLASSES, device=x.device).unsqueeze(1) - p)
    identity = torch.eye(CLASSES, device=x.device).unsqueeze(1).expand(-1, len(x), -1)

    def forward() -> Tensor:
        with torch.no_grad():
            return net(x)

    def backward(cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(h2, nodes, cotangents, is_grads_batched=True, retain_graph=True)

    ones = torch.ones(len(x), 1, device=x.device)
    a = [torch.cat([v, ones], 1) for v in (x, h0.detach().relu(), h1.detach().relu())]
    g = [v.contiguous() for v in backward(root)]
    passes = {
        "forward": forward,
        "backward fit": lambda: backward(root),
        "backward predict": lambda: backward(identity),
    }

    def diag() -> list[Tensor]:
        return [v.square().sum(0).T @ u.square() for u, v in zip(a, g, strict=True)]

    def kron() -> list[Tensor]:
        flat = [v.reshape(-1, v.shape[-1]) for v in g]
        return [u.T @ u for u in a] + [v.T @ v for v in flat]

    bases = [
        (torch.linalg.eigh(u.T @ u)[1], torch.linalg.eigh(v.flatten(0, 1).T @ v.flatten(0, 1))[1])
        for u, v in zip(a, g, strict=True)
    ]
    weights = [torch.rand(v.shape[-1], u.shape[-1], device=x.device) for u, v in zip(a, g, strict=True)]
    jacobian = [v.contiguous() for v in backward(identity)]

    def quad() -> Tensor:
        total = torch.zeros(len(x), CLASSES, CLASSES, device=x.device)
        for u, v, (inner, outer), weight in zip(a, jacobian, bases, weights, strict=True):
            turned = (v.reshape(-1, v.shape[-1]) @ outer).view_as(v).transpose(0, 1)
            spread = (u @ inner).square() @ weight.T
            total += (turned * spread.unsqueeze(1)) @ turned.mT
        return total

    return passes, {"gemm diag": diag, "gemm kron": kron, "gemm predict": quad}, h2.detach()


def peer(net: nn.Sequential, x: Tensor, y: Tensor) -> Any:
    """laplace-torch with its default backend, fitted on the same points."""
    from laplace import Laplace

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=500)
    fitted = Laplace(net, "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=1.0)
    fitted.fit(loader)
    return fitted


def main() -> None:
    """Check equality, measure, print."""
    options = arguments(__doc__.splitlines()[0])
    device = options.device
    net = network(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(POINTS, 784, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (POINTS,), generator=generator).to(device)
    data = [(x, y)]
    prior = bdl.GaussianPrior(precision=1.0)
    figures: dict[str, Any] = {"points": POINTS, "network": "MLP 784-256-256-10"}

    view = Network(net)
    layout = plan(view, x)
    likelihood = bdl.Categorical()

    def fit(structure: str) -> Any:
        return fit_curvature(view, layout, data, likelihood, structure=structure, kind="ggn", progress=False).curvature

    rival = None if options.no_peer else equal_peer(net, x, y, device)
    bayes = bdl.wrap(net, bdl.Laplace(), data, likelihood=likelihood, prior=prior, progress=False)
    posterior = bayes.posterior

    def predict() -> Any:
        return posterior.push(bayes.network, x, None)

    kron = fit("kron")

    def eigen() -> Any:
        return Kron(kron.layout, kron.inner, kron.outer, kron.rows).eigen

    passes, products, _ = floor_pieces(net, x)

    def both() -> Any:
        return estimate_several(view, data, likelihood, ("diag", "kron"), progress=False)

    for one, other in zip(both(), (fit("diag"), kron), strict=True):
        pairs = zip(one.per_block(), other.per_block(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in pairs), "one pass gives another curvature than two"
    whole = {"fit diag": lambda: fit("diag"), "fit kron": lambda: fit("kron"), "fit diag and kron": both}
    whole |= {"predict kron": predict, "eigen": eigen}
    seconds = alternate({**passes, **products, **whole}, options.repeats, device)
    floors = {
        "fit diag": seconds["forward"] + seconds["backward fit"] + seconds["gemm diag"],
        "fit kron": seconds["forward"] + seconds["backward fit"] + seconds["gemm kron"],
        "fit diag and kron": seconds["forward"] + seconds["backward fit"] + seconds["gemm diag"] + seconds["gemm kron"],
        "predict kron": seconds["forward"] + seconds["backward predict"] + seconds["gemm predict"],
    }
    figures["milliseconds"] = {name: round(1e3 * value, 2) for name, value in seconds.items()}
    figures["ratio to floor"] = {name: round(seconds[name] / floor, 2) for name, floor in floors.items()}
    figures["ratio to forward"] = {name: round(seconds[name] / seconds["forward"], 1) for name in floors}
    figures["eigendecomposition / fit kron"] = round(seconds["eigen"] / seconds["fit kron"], 2)

    if rival is not None:
        figures["laplace-torch"] = against_peer(*rival, x, seconds["predict kron"], predict, options)
        figures["laplace-torch, fit diag"] = diag_peer(net, x, y, seconds["fit diag"] / POINTS, options)
    finish(figures, options)


def equal_peer(net: nn.Sequential, x: Tensor, y: Tensor, device: str) -> tuple[Any, float]:
    """The fitted peer, and the largest relative difference between its covariances and ours, which must be small.

    The peer keeps weight and bias in separate blocks, so equality is checked with separate blocks here too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = peer(network(device), x, y)
        mean, covariance = fitted._glm_predictive_distribution(x[: PEER_BATCHES[-1]])
    same = bdl.wrap(
        net,
        bdl.Laplace(bias="separate"),
        [(x, y)],
        likelihood="categorical",
        prior=bdl.GaussianPrior(precision=1.0),
        progress=False,
    )
    latent = same(x[: PEER_BATCHES[-1]]).latent
    difference = float((latent.covariance - covariance).abs().max() / covariance.abs().max())
    assert difference < TOLERANCE, f"covariances differ by {difference:.2e} relative"
    assert torch.allclose(latent.mean, mean, atol=1e-4)
    return fitted, difference


def diag_peer(net: nn.Sequential, x: Tensor, y: Tensor, ours: float, options: Any) -> dict[str, Any]:
    """The diagonal of the exact GGN by the peer's default backend: equality, then CPU time per point by batch size."""
    from laplace import Laplace

    def fit(batch: int) -> Any:
        # a copy: the peer's Jacobian backend needs parameters that require a gradient
        own = copy.deepcopy(net).requires_grad_()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:batch], y[:batch]), batch_size=batch)
        fitted = Laplace(own, "classification", subset_of_weights="all", hessian_structure="diag")
        fitted.fit(loader)
        return fitted

    per_point = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = DIAG_BATCHES[0]
        data = [(x[:few], y[:few])]
        mine = bdl.curvature.estimate(net, data, "categorical", structure="diag", kind="ggn", progress=False)
        truth = fit(few).H
        difference = float((mine.layout.join(mine.diagonal) - truth).abs().max() / truth.abs().max())
        assert difference < TOLERANCE, f"diagonals differ by {difference:.2e} relative"
        for batch in DIAG_BATCHES:
            seconds = alternate({"peer": lambda batch=batch: fit(batch)}, max(3, options.repeats // 3), options.device)
            per_point[batch] = seconds["peer"] / batch
    return {
        "diagonal difference, relative": float(f"{difference:.2g}"),
        "CPU time per point, ratio by the peer's batch": {b: round(v / ours) for b, v in per_point.items()},
    }


def against_peer(fitted: Any, difference: float, x: Tensor, ours: float, predict: Any, options: Any) -> dict[str, Any]:
    """CPU time and peak memory per point, the peer at the batch size that suits it best."""
    per_point, memory = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in PEER_BATCHES:

            def theirs(batch: int = batch) -> Any:
                return fitted._glm_predictive_distribution(x[:batch])

            repeats = max(3, options.repeats // 3)
            per_point[batch] = alternate({"peer": theirs}, repeats, options.device)["peer"] / batch
            memory[batch] = statistics.median([peak_bytes(theirs, options.device) for _ in range(3)]) / batch
    own_memory = statistics.median([peak_bytes(predict, options.device) for _ in range(3)]) / len(x)
    return {
        "covariance difference, relative": difference,
        "CPU time per point, ratio": round(min(per_point.values()) / (ours / len(x))),
        "peak memory per point, ratio": round(min(memory.values()) / own_memory),
        "ours, ms per point": round(1e3 * ours / len(x), 4),
        "ours, KiB per point": round(own_memory / 1024, 1),
        "ms per point by batch": {batch: round(1e3 * value, 2) for batch, value in per_point.items()},
        "KiB per point by batch": {batch: round(value / 1024) for batch, value in memory.items()},
    }


if __name__ == "__main__":
    main()
