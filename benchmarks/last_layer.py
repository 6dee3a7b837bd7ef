"""Speed and memory of Bayesian last layers, in units of the matrix products that they need, and beside vbll.

python benchmarks/last_layer.py [--quick] [--no-peer] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import alternate, finish, parser, peak_bytes
from defaults import ResNet20
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.last_layer import Classification

BATCH = 128
SIZES = (("full", 512, 10), ("shared", 512, 10), ("diag", 512, 10), ("lowrank", 512, 10), ("shared", 2048, 1000))


def head_of(covariance: str, width: int, classes: int, device: str) -> Classification:
    """A head as training leaves one: every entry of its factor differs from zero."""
    torch.manual_seed(0)
    head = Classification(width, classes, num_data=50_000, covariance=covariance).to(device)
    with torch.no_grad():
        head.mean.normal_(0.0, 0.05)
        for parameter in head.covariance.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return head


def products(head: Classification, x: Tensor) -> Callable[[], Any]:
    """The bare matrix products of mean and variances, on matrices that lie ready."""
    phi = torch.cat([x, x.new_ones(len(x), 1)], 1)
    weight, width = head.mean.detach().mT.contiguous(), phi.shape[1]
    name, classes = head.covariance.name, head.out_features
    if name == "diag":
        scale = torch.rand(width, classes, device=x.device)
        return lambda: (phi @ weight, phi.square() @ scale)
    if name == "lowrank":
        scale = torch.rand(width, classes, device=x.device)
        factor = torch.rand(width, classes * head.covariance.rank, device=x.device)
        return lambda: (phi @ weight, phi.square() @ scale, phi @ factor)
    square = torch.rand((1 if name == "shared" else classes), width, width, device=x.device)
    return lambda: (phi @ weight, phi @ square)


def error_of(head: Classification, x: Tensor) -> float:
    """Largest relative difference of the variances to the materialised matrices in float64."""
    with torch.no_grad():
        _, variance = head.moments(x)
        phi = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        dense = head.covariance.double().dense()
        exact = torch.einsum("bi,kij,bj->bk", phi, dense, phi)
        head.covariance.float()
    return float(((variance.double() - exact) / exact).abs().max())


@torch.no_grad()
def forward(options: Any) -> dict[str, Any]:
    """Features to class probabilities."""
    rows = {}
    for name, width, classes in SIZES:
        if options.quick and width > 512:
            continue
        device = options.device
        head = head_of(name, width, classes, device)
        x = torch.randn(BATCH, width, device=device)
        small = head_of(name, 32, 5, device)
        error = error_of(small, torch.randn(16, 32, device=device))
        if error > 1e-4:
            raise SystemExit(f"{name}: variances differ from the materialised matrices by {error:.1e}")
        plain = nn.Linear(width, classes).to(device)
        work = {
            "products": products(head, x),
            "predictive": lambda head=head, x=x: head(x).predictive.probs,
            "nn.Linear": lambda plain=plain, x=x: plain(x).softmax(-1),
        }
        seconds = alternate(work, options.repeats, device)
        rows[f"{name}, d = {width}, K = {classes}"] = {
            "difference to the materialised matrix, relative": error,
            "time / matrix products": round(seconds["predictive"] / seconds["products"], 2),
            "time / nn.Linear and softmax": round(seconds["predictive"] / seconds["nn.Linear"], 1),
            "peak memory of a forward pass, MB": round(peak_bytes(work["predictive"], device) / 1e6, 1),
            "parameters, MB": round(sum(p.numel() * p.element_size() for p in head.parameters()) / 1e6, 1),
        }
    return rows


def peer(options: Any) -> dict[str, Any]:
    """The package vbll on the same layer: forward with predictive, and loss with its gradient."""
    import vbll

    width, classes, device = 512, 10, options.device
    x = torch.randn(BATCH, width, device=device)
    y = torch.randint(classes, (BATCH,), device=device)
    head = head_of("full", width, classes, device)
    torch.manual_seed(0)
    theirs = vbll.DiscClassification(width, classes, 1.0 / 50_000, parameterization="dense").to(device)
    # theirs has no bias: compared on the same factor with ours switched off
    bare = Classification(width, classes, num_data=50_000, covariance="full", bias=False).to(device)
    with torch.no_grad():
        theirs.W_offdiag.normal_(0.0, 0.01)
        bare.covariance.lower.copy_(theirs.W_offdiag)
        bare.covariance.log_diagonal.copy_(theirs.W_logdiag)
        ours = bare.moments(x[:8])[1]
        given = theirs.logit_predictive(x[:8]).covariance_diagonal - theirs.noise().covariance_diagonal
    error = float(((ours - given) / given).abs().max())
    if error > 1e-3:
        raise SystemExit(f"variances differ from those of vbll by {error:.1e}")

    def without_gradient(model: nn.Module, read: Callable[[Any], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return read(model(x))

        return run

    def step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(model(x)), [p for p in model.parameters() if p.requires_grad])

    inference = {
        "ours": without_gradient(head, lambda out: out.predictive.probs),
        "vbll": without_gradient(theirs, lambda out: out.predictive.probs),
    }
    training = {
        "ours": step(head, lambda out: out.loss(y)),
        "vbll": step(theirs, lambda out: out.train_loss_fn(y)),
    }
    repeats = min(options.repeats, 3 if options.quick else 5)
    seconds = {name: alternate(work, repeats, device) for name, work in (("f", inference), ("t", training))}
    return {
        "difference of the variances, relative": error,
        "forward with predictive, time ratio": round(seconds["f"]["vbll"] / seconds["f"]["ours"], 1),
        "loss and gradient, time ratio": round(seconds["t"]["vbll"] / seconds["t"]["ours"], 1),
        "forward with predictive, memory ratio": round(
            peak_bytes(inference["vbll"], device) / max(1.0, peak_bytes(inference["ours"], device)), 1
        ),
    }


def training_step(options: Any) -> dict[str, float]:
    """A whole step of ResNet-20 with a full-covariance head, in units of the same with nn.Linear and cross-entropy."""
    batch = 16 if options.quick else BATCH
    x = torch.randn(batch, 3, 32, 32, device=options.device)
    y = torch.randint(10, (batch,), device=options.device)
    torch.manual_seed(0)
    plain = ResNet20().to(options.device)
    rows = {}
    for covariance in ("full", "shared", "diag"):
        head = Classification(64, 10, num_data=50_000, covariance=covariance).to(options.device)
        bayesian = bdl.replace(plain, "linear", head)
        optimisers = [torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9) for net in (plain, bayesian)]

        def step(net: nn.Module, optimiser: torch.optim.Optimizer, loss: Callable[[Any], Tensor]) -> None:
            optimiser.zero_grad()
            loss(net(x)).backward()
            optimiser.step()

        work = {
            "plain": lambda o=optimisers[0]: step(plain, o, lambda out: F.cross_entropy(out, y)),
            "head": lambda o=optimisers[1], net=bayesian: step(net, o, lambda out: out.loss(y)),
        }
        seconds = alternate(work, min(options.repeats, 3 if options.quick else 5), options.device)
        rows[covariance] = round(seconds["head"] / seconds["plain"], 3)
    return rows


def main() -> None:
    """Measure, print, write."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="small sizes")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"forward with predictive, batch 128": forward(options)}
    figures["training step of ResNet-20 / the same with nn.Linear"] = training_step(options)
    if not options.no_peer:
        figures["against vbll, full covariance, d = 512, K = 10, batch 128"] = peer(options)
    finish(figures, options)


if __name__ == "__main__":
    main()
