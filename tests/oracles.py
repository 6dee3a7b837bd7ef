"""Brute force in float64, independent of the library's curvature code. Sizes are tiny; nothing here is clever."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# --- networks -----------------------------------------------------------------------------------------------------


def evaluated(net: nn.Module) -> nn.Module:
    """A deep copy in eval mode, so that no test depends on the mode of the network it is given."""
    module = copy.deepcopy(net).eval()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.sparse = False  # jacrev knows no sparse gradients
    return module


def outputs(net: nn.Module, x: Any) -> Tensor:
    """f `(N, C)` in eval mode; `(N,)` becomes `(N, 1)`."""
    with torch.no_grad():
        f = evaluated(net)(*x) if isinstance(x, tuple) else evaluated(net)(x)
    return f.unsqueeze(1) if f.dim() == 1 else f


def jacobian(net: nn.Module, x: Any, names: Sequence[str]) -> Tensor:
    """df/dtheta `(N, C, P)` in the order of `names`, by jacrev through functional_call."""
    module = evaluated(net)
    parameters = dict(module.named_parameters())
    chosen = {name: parameters[name].detach() for name in names}

    def call(values: Mapping[str, Tensor]) -> Tensor:
        f = functional_call(module, dict(values), x if isinstance(x, tuple) else (x,))
        return f.unsqueeze(1) if f.dim() == 1 else f

    if any(isinstance(part, nn.RNNBase) for part in module.modules()):  # packed sequences know no torch.func
        leaves = {name: value.clone().requires_grad_() for name, value in chosen.items()}
        f = call(leaves)
        rows = [torch.autograd.grad(v, list(leaves.values()), retain_graph=True) for v in f.flatten()]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).unflatten(0, f.shape)
    blocks = jacrev(call, chunk_size=1)(chosen)  # a loop, no batching rule needed
    return torch.cat([blocks[name].detach().reshape(*blocks[name].shape[:2], -1) for name in names], -1)


# --- likelihoods: Lambda by its formula, by autograd, and the score -----------------------------------------------


def negative_log_density(likelihood: str, noise: Tensor | float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """-log p(y | f) of one example, f `(C,)`."""

    def categorical(f: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(f, 0) - (f * (torch.arange(f.shape[0]) == y)).sum()

    def bernoulli(f: Tensor, y: Tensor) -> Tensor:
        return (torch.log1p(torch.exp(f)) - y * f).sum()

    def gaussian(f: Tensor, y: Tensor) -> Tensor:
        s = torch.as_tensor(noise, dtype=f.dtype).expand(f.shape)
        return (0.5 * ((y - f) / s) ** 2 + s.log() + 0.5 * math.log(2 * math.pi)).sum()

    def poisson(f: Tensor, y: Tensor) -> Tensor:
        return (torch.exp(f) - y * f + torch.lgamma(y + 1)).sum()

    def heteroscedastic(f: Tensor, y: Tensor) -> Tensor:
        m, s = f.chunk(2)
        return (0.5 * (y - m) ** 2 * torch.exp(-s) + 0.5 * s + 0.5 * math.log(2 * math.pi)).sum()

    return {
        "categorical": categorical,
        "bernoulli": bernoulli,
        "gaussian": gaussian,
        "poisson": poisson,
        "heteroscedastic": heteroscedastic,
    }[likelihood]


def lambda_formula(likelihood: str, f: Tensor, noise: Tensor | float = 1.0) -> Tensor:
    """Fisher information of the outputs `(N, C, C)` from textbook formulas."""
    if likelihood == "categorical":
        p = torch.softmax(f, -1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    if likelihood == "bernoulli":
        p = torch.sigmoid(f)
        return torch.diag_embed(p * (1 - p))
    if likelihood == "gaussian":
        s = torch.as_tensor(noise, dtype=f.dtype).expand(f.shape)
        return torch.diag_embed(1 / s**2)
    if likelihood == "poisson":
        return torch.diag_embed(f.exp())
    if likelihood == "heteroscedastic":
        _, s = f.chunk(2, -1)
        return torch.diag_embed(torch.cat([torch.exp(-s), torch.full_like(s, 0.5)], -1))
    raise ValueError(likelihood)


def lambda_autograd(likelihood: str, f: Tensor, y: Tensor, noise: Tensor | float = 1.0) -> Tensor:
    """Hessian of -log p(y | f) in f, `(N, C, C)`. Free of y for canonical families."""
    return vmap(hessian(negative_log_density(likelihood, noise)))(f, y)


def score(likelihood: str, f: Tensor, y: Tensor, noise: Tensor | float = 1.0) -> Tensor:
    """Gradient of -log p(y | f) in f, `(N, C)`."""
    return vmap(torch.func.grad(negative_log_density(likelihood, noise)))(f, y)


def log_likelihood(likelihood: str, f: Tensor, y: Tensor, noise: Tensor | float = 1.0) -> Tensor:
    """sum_n log p(y_n | f_n)."""
    return -vmap(negative_log_density(likelihood, noise))(f, y).sum()


# --- curvature ----------------------------------------------------------------------------------------------------


def ggn(jac: Tensor, lam: Tensor) -> Tensor:
    """sum_n J_n^T Lambda_n J_n, `(P, P)`."""
    return torch.einsum("ncp,ncd,ndq->pq", jac, lam, jac)


def outer_gradients(jac: Tensor, scores: Tensor) -> Tensor:
    """sum_n g_n g_n^T with g_n = J_n^T score_n: the empirical Fisher, or a Monte Carlo one for sampled targets."""
    gradients = torch.einsum("ncp,nc->np", jac, scores)
    return gradients.T @ gradients


def loss_hessian(
    net: nn.Module, x: Any, y: Tensor, likelihood: str, names: Sequence[str], noise: Tensor | float = 1.0
) -> Tensor:
    """Hessian of sum_n -log p(y_n | f_n(theta)), `(P, P)` in the order of `names`, by a loop of double backward passes.

    Not by torch.func: nested under vmap, torch's rule for layer norm is wrong, and embeddings forget their padding.
    """
    module = evaluated(net)
    values = {name: p.detach() for name, p in module.named_parameters()}
    density, sizes = negative_log_density(likelihood, noise), [values[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(names, flat.split(sizes), strict=True)
        chosen = {name: piece.reshape(values[name].shape) for name, piece in pieces}
        f = functional_call(module, chosen, x if isinstance(x, tuple) else (x,))
        f = f.unsqueeze(1) if f.dim() == 1 else f
        return torch.stack([density(one, target) for one, target in zip(f, y, strict=True)]).sum()

    start = torch.cat([values[name].flatten() for name in names])
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return torch.autograd.functional.hessian(loss, start)  # type: ignore[no-any-return]


def captures(net: nn.Module, layer: str, x: Any, vectors: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Every call of a layer (or of a layer of the same tensors): module, input, output gradients `(K, ...)`."""
    module = evaluated(net)
    target = module.get_submodule(layer)
    owners = {id(p) for p in target.parameters()}
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for other in module.modules():
        if type(other) is type(target) and {id(p) for p in other.parameters()} == owners:
            other.register_forward_hook(lambda m, inputs, output: seen.append((m, inputs[0].detach(), output)))
    f = module(*x) if isinstance(x, tuple) else module(x)
    calls = [output for _, _, output in seen]
    gradients = [torch.autograd.grad(f, calls, v, retain_graph=True) for v in vectors]
    return [(m, a, torch.stack([g[i] for g in gradients])) for i, (m, a, _) in enumerate(seen)]


def patches(module: nn.Module, value: Tensor) -> Tensor:
    """Rows a `(groups, examples * positions, in)` that the weight meets, read off d output / d weight."""
    weight = {"weight": module.weight.detach()}
    jac = jacrev(lambda w: functional_call(module, w, (value,)))(weight)["weight"]  # (N, out, T.., out, in..)
    groups = getattr(module, "groups", 1)
    axis = 1 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else value.dim() - 1
    jac = jac.movedim(axis, 0)
    jac = jac.flatten(-module.weight.dim() + 1)  # (out, N, T.., out, in)
    step = module.weight.shape[0] // groups
    first = [c * step for c in range(groups)]
    return torch.stack([jac[c].select(-2, c).flatten(0, -2) for c in first])


def linear_kron(calls: Sequence[tuple[nn.Module, Tensor, Tensor]], bias: bool = True) -> list[tuple[Tensor, Tensor]]:
    """KFAC (expand form) of one linear or convolutional layer: per group A = sum a a^T / R and G = sum g g^T.

    Args:
        calls: what `captures` returned; R counts the rows of all of them.
        bias: whether a one is appended to the inputs.
    """
    module = calls[0][0]
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups = getattr(module, "groups", 1)
    rows = torch.cat([patches(m, a) for m, a, _ in calls], 1)
    if bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)
    gradients = [g.movedim(2, -1) if convolution else g for _, _, g in calls]
    flat = torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients])
    result = []
    for group, chunk in zip(range(groups), flat.chunk(groups, -1), strict=True):
        inner = sum(torch.outer(a, a) for a in rows[group]) / rows.shape[1]
        outer = sum(torch.outer(g, g) for g in chunk)
        result.append((inner, outer))
    return result


def reduced_kron(
    calls: Sequence[tuple[nn.Module, Tensor, Tensor]], bias: bool = True, first: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """KFAC (reduce form): per group A = sum_n m_n m_n^T / N and G = sum_nk s_nk s_nk^T, where m_n is the mean of the
    inputs and s_nk the sum of the gradients over all positions, and calls, of example n.

    Args:
        calls: what `captures` returned.
        bias: whether a one is appended to the inputs.
        first: whether examples are on the first axis of a linear layer's input, else on the second.
    """
    module = calls[0][0]
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups = getattr(module, "groups", 1)

    def examples(value: Tensor, skip: int) -> Tensor:
        if convolution or first or value.dim() < 3 + skip:
            return value
        return value.transpose(skip, skip + 1)

    count = len(examples(calls[0][1], 0))
    inputs = torch.cat([patches(m, examples(a, 0)).unflatten(1, (count, -1)) for m, a, _ in calls], 2)
    means = inputs.mean(2)  # (groups, N, in)
    if bias:
        means = torch.cat([means, means.new_ones(*means.shape[:-1], 1)], -1)
    gradients = [g.movedim(2, -1) if convolution else examples(g, 1) for _, _, g in calls]
    summed = torch.stack([g.flatten(2, -2).sum(2) if g.dim() > 3 else g for g in gradients]).sum(0)  # (K, N, out)
    flat = summed.flatten(0, 1)
    pairs = zip(means, flat.chunk(groups, -1), strict=True)
    return [(m.T @ m / count, g.T @ g) for m, g in pairs]


def kron_block(factors: Sequence[tuple[Tensor, Tensor]], bias: bool = True) -> Tensor:
    """The block-diagonal G (x) A over groups, in the flat order weight, then bias."""
    matrix = torch.block_diag(*[torch.kron(outer, inner) for inner, outer in factors])
    if not bias:
        return matrix
    width = factors[0][0].shape[0]
    index = torch.arange(len(matrix)).view(-1, width)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return matrix[order][:, order]


# --- Gaussian posteriors ------------------------------------------------------------------------------------------


class BayesianLinearRegression:
    """y_nc ~ N(x_n . w_c, noise_c^2) with w ~ N(prior_mean, diag(1 / precision)): everything in closed form.

    Args:
        features: `(N, D)`, a column of ones included where there is a bias.
        targets: `(N, C)`.
        precision: scalar, or one per weight `(C D,)` with the weights of one output side by side.
        noise: `(C,)` standard deviations.
        prior_mean: `(C D,)` or scalar.
    """

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        precision: Tensor | float,
        noise: Tensor,
        prior_mean: Tensor | float = 0.0,
    ) -> None:
        self.features, self.targets, self.noise = features, targets, noise
        count, size = targets.shape[1], features.shape[1]
        self.precision = torch.as_tensor(precision, dtype=features.dtype).expand(count * size)
        self.prior_mean = torch.as_tensor(prior_mean, dtype=features.dtype).expand(count * size)
        self.design = torch.block_diag(*[features] * count)  # (C N, C D)
        self.level = noise.repeat_interleave(len(features))
        inverse = torch.diag(self.level**-2)
        self.posterior_precision = self.design.T @ inverse @ self.design + torch.diag(self.precision)
        self.covariance = torch.linalg.inv(self.posterior_precision)
        right = self.design.T @ inverse @ targets.T.flatten() + self.precision * self.prior_mean
        self.mean = self.covariance @ right

    def log_evidence(self) -> Tensor:
        """log N(y; X prior_mean, noise^2 + X diag(1 / precision) X^T)."""
        marginal = torch.diag(self.level**2) + self.design @ torch.diag(1 / self.precision) @ self.design.T
        centre = self.design @ self.prior_mean
        return torch.distributions.MultivariateNormal(centre, marginal).log_prob(self.targets.T.flatten())

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `(B, C)`, covariance of f `(B, C, C)`, and the same with noise."""
        count = self.targets.shape[1]
        means, covariances = [], []
        for row in features:
            block = torch.block_diag(*[row.unsqueeze(0)] * count)  # (C, C D)
            means.append(block @ self.mean)
            covariances.append(block @ self.covariance @ block.T)
        covariance = torch.stack(covariances)
        return torch.stack(means), covariance, covariance + torch.diag(self.noise**2)


def linearized_covariance(jac: Tensor, precision: Tensor) -> Tensor:
    """J_n P^-1 J_n^T, `(N, C, C)`, for Jacobians `(N, C, P)` and a dense precision `(P, P)`."""
    inverse = torch.linalg.inv(precision)
    return torch.einsum("ncp,pq,ndq->ncd", jac, inverse, jac)


def log_evidence(
    log_lik: Tensor, curvature: Tensor, shift: Tensor | float, weights: Tensor, prior_mean: Tensor | float = 0.0
) -> Tensor:
    """log p(D | theta) + log p(theta) + P/2 log 2 pi - 1/2 log|H + diag(shift)|, term by term."""
    size = len(weights)
    precision = torch.as_tensor(shift, dtype=curvature.dtype).expand(size)
    offset = weights - prior_mean
    log_prior = 0.5 * (precision.log() - math.log(2 * math.pi) - precision * offset**2).sum()
    posterior = curvature + torch.diag(precision)
    return log_lik + log_prior + 0.5 * size * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(posterior)[1]


# --- linear stochastic recursions ---------------------------------------------------------------------------------


def discrete_lyapunov(a: Tensor, b: Tensor) -> Tensor:
    """Sigma = A Sigma A^T + B B^T, by the linear system over all its entries; A `(n, n)` must be a contraction."""
    assert float(torch.linalg.eigvals(a).abs().max()) < 1, "the recursion is unstable: it has no stationary law"
    n = a.shape[0]
    system = torch.eye(n * n, dtype=a.dtype) - torch.kron(a, a)
    return torch.linalg.solve(system, (b @ b.T).reshape(-1)).reshape(n, n)


def linear_law(step: Callable[[Tensor, Tensor], Tensor], state: int, noise: int) -> tuple[Tensor, Tensor]:
    """A and its stationary covariance for a map `x' = step(x, xi)` that is linear in both; xi standard normal."""
    zero = torch.zeros(noise, dtype=torch.float64)
    a = torch.stack([step(e, zero) for e in torch.eye(state, dtype=torch.float64)], 1)
    origin = torch.zeros(state, dtype=torch.float64)
    b = torch.stack([step(origin, e) for e in torch.eye(noise, dtype=torch.float64)], 1)
    x, xi = torch.linspace(-1, 2, state).double(), torch.linspace(1, -3, noise).double()
    assert torch.allclose(step(x, xi), a @ x + b @ xi, rtol=1e-10), "the map is not linear"
    return a, discrete_lyapunov(a, b)
