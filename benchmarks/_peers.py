"""Kronecker factors of the exact GGN from other libraries: first whether they are the same matrix, then CPU time.

Each peer fits the weights of the same linear and convolutional layers on the same batch as the library does, norm
layers left out, and multiplies one random direction by what it fitted; the products are compared. A peer that cannot
run the network is reported with its own message, one whose product differs with the difference.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import alternate, peak_bytes
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.plan import plan
from bayesdl.network import Network

TOLERANCE = 1e-3  # of float32 products against the largest entry
EXACT = 1e-4  # of covariances in float64
BATCHES = (1, 4, 16)  # of laplace-torch; per point a larger one takes it longer
Pairs = list[tuple[Tensor, Tensor]]  # per layer `(out, out)` and `(in, in)`


def layers(net: nn.Module) -> list[nn.Module]:
    """Those that every peer knows."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def as_sequential(net: nn.Module) -> nn.Module:
    """LeNet as a chain of modules, which BackPACK needs; any other network as it is."""
    if not hasattr(net, "fc2"):
        return net
    pool = [nn.ReLU(), nn.MaxPool2d(2)]
    chain = [net.conv1, *pool, net.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), net.fc1, nn.ReLU(), net.fc2]
    return nn.Sequential(*chain)


def fit_curvlinops(net: nn.Module, x: Tensor, y: Tensor) -> Pairs:
    """KFAC of type 2, which is the exact GGN, weight and bias apart as the other peers have them."""
    from curvlinops import KFACLinearOperator

    weights = [p for module in layers(net) for p in module.parameters()]
    loss = nn.CrossEntropyLoss(reduction="sum")
    fitted = KFACLinearOperator(net, loss, weights, [(x, y)], fisher_type="type-2", check_deterministic=False)
    fitted.compute_kronecker_factors()
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [(fitted._gradient_covariances[name], fitted._input_covariances[name]) for name in names]


def fit_asdl(net: nn.Module, x: Tensor, y: Tensor) -> Pairs:
    """ASDL through laplace-torch, which scales its factors to sums over the data."""
    from laplace.curvature import AsdlGGN

    found = AsdlGGN(net, "classification").kron(x, y, N=len(x))[1].kfacs
    return [(pair[0], pair[1]) for pair in found if len(pair) == 2]


def fit_backpack(net: nn.Module, x: Tensor, y: Tensor) -> Pairs:
    """KFLR."""
    from backpack import backpack, extend
    from backpack.extensions import KFLR

    chain = extend(as_sequential(net))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))(chain(x), y)
    with backpack(KFLR()):
        loss.backward()
    return [(module.weight.kflr[0], module.weight.kflr[1]) for module in layers(chain)]


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Pairs]] = {
    "curvlinops": fit_curvlinops,
    "asdl": fit_asdl,
    "backpack": fit_backpack,
}


def against_peers(net: nn.Module, x: Tensor, y: Tensor, repeats: int, device: str) -> dict[str, Any]:
    """Difference of the products and ratio of CPU times by peer."""
    net = copy.deepcopy(net).requires_grad_()
    names = {id(p): name for name, p in net.named_parameters()}
    chosen = [names[id(p)] for module in layers(net) for p in module.parameters()]
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(m.weight.shape, generator=generator).to(device) for m in layers(net)]
    view = Network(net, select=chosen)
    layout = plan(view, x, "separate")

    def fit() -> Any:
        return fit_curvature(view, layout, [(x, y)], bdl.Categorical(), structure="kron", kind="ggn", progress=False)

    truth = _ours(fit().curvature, net, direction)
    found: dict[str, Any] = {}
    for name, peer in PEERS.items():
        # peers leave hooks and attributes behind, so each has a network of its own
        own = copy.deepcopy(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pairs = peer(own, x, y)
            except (NotImplementedError, RuntimeError, AttributeError, ValueError, ImportError) as error:
                found[name] = f"cannot run: {str(error).splitlines()[0][:120]}"
                continue
            products = [(g @ v.flatten(1) @ a).reshape(v.shape) for (g, a), v in zip(pairs, direction, strict=True)]
            apart = [float((p - t).abs().max() / t.abs().max()) for p, t in zip(products, truth, strict=True)]
            seconds = alternate({"ours": fit, name: partial(peer, own, x, y)}, repeats, device)
        found[name] = {
            "largest relative difference of a layer's product": float(f"{max(apart):.2g}"),
            "same matrix": max(apart) < TOLERANCE,
            "fit, CPU time ratio": round(seconds[name] / seconds["ours"], 2),
        }
    return found


def against_laplace_torch(make: Callable[[], nn.Module], x: Tensor, y: Tensor, device: str) -> dict[str, Any]:
    """Equality of the covariances, then CPU time of the fit, CPU time and peak memory of the predictive per point.

    Norm layers are frozen for both, because the peer has no Kronecker factors for them.
    """
    from laplace import Laplace

    def network(dtype: torch.dtype, biased: bool = True) -> nn.Module:
        torch.manual_seed(0)
        net = make().to(device, dtype).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
            if isinstance(module, nn.Conv2d) and not biased:
                module.bias = None
        return net

    def theirs(net: nn.Module) -> Any:
        dtype = next(net.parameters()).dtype
        data = torch.utils.data.TensorDataset(x.to(dtype), y)
        fitted = Laplace(net, "classification", "all", "kron", prior_precision=1.0)
        fitted.fit(torch.utils.data.DataLoader(data, batch_size=len(x)))
        return fitted

    def ours(net: nn.Module) -> Any:
        data = [(x.to(next(net.parameters()).dtype), y)]
        select = [name for name, p in net.named_parameters() if p.requires_grad]
        method = bdl.Laplace(select=select, bias="separate")
        prior = bdl.GaussianPrior(precision=1.0)
        return bdl.wrap(net, method, data, likelihood="categorical", prior=prior, progress=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # in float64, where only a wrong number can differ, and without biases of convolutions, whose curvature is exact
        # here and approximated there
        few = x[: BATCHES[1]].double()
        mean, covariance = theirs(network(torch.float64, False))._glm_predictive_distribution(few)
        latent = ours(network(torch.float64, False))(few).latent
        assert torch.allclose(latent.mean, mean)
        difference = float((latent.covariance - covariance).abs().max() / covariance.abs().max())
        assert difference < EXACT, f"covariances differ by {difference:.2e} relative"
        mine, peer = ours(network(torch.float32)), theirs(network(torch.float32))
        predict = lambda: mine.posterior.push(mine.network, x, None)  # noqa: E731
        fits = {
            "ours": lambda: ours(network(torch.float32)),
            "peer": lambda: theirs(network(torch.float32)),
        }
        fitting = alternate(fits, 3, device)
        own_memory = statistics.median([peak_bytes(predict, device) for _ in range(3)]) / len(x)
        per_point, memory = {}, {}
        for batch in BATCHES:
            call = lambda batch=batch: peer._glm_predictive_distribution(x[:batch])  # noqa: E731
            seconds = alternate({"ours": predict, "peer": call}, 3, device)
            per_point[batch] = seconds["peer"] / batch / (seconds["ours"] / len(x))
            memory[batch] = peak_bytes(call, device) / batch / own_memory
    return {
        "covariance difference in float64, relative": float(f"{difference:.2g}"),
        "fit and decomposition, CPU time ratio": round(fitting["peer"] / fitting["ours"], 1),
        "predictive, CPU time per point, ratio by the peer's batch": {b: round(v) for b, v in per_point.items()},
        "predictive, peak memory per point, ratio by the peer's batch": {b: round(v) for b, v in memory.items()},
    }


def _ours(fitted: Kron, net: nn.Module, direction: list[Tensor]) -> list[Tensor]:
    """H v by weight, for a direction without biases."""
    named = {name: torch.zeros_like(net.get_parameter(name)) for name in fitted.layout.names}
    weights = {id(m.weight): v for m, v in zip(layers(net), direction, strict=True)}
    named = {name: weights.get(id(net.get_parameter(name)), zero) for name, zero in named.items()}
    parts = fitted.layout.split(fitted.layout.flatten(named))
    turned = [e.back(e.into(v) * e.values) for e, v in zip(fitted.eigen, parts, strict=True)]
    product = fitted.layout.to_dict(fitted.layout.join(turned))
    return [product[name] for name in named if net.get_parameter(name).dim() > 1]
