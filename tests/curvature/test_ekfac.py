"""EKFAC against its definition, beside kron, and with loaders that do not repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.ekfac import EKFAC
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests import oracles
from tests.cases import BY_NAME, CASES, Case, mlp, real, targets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def truth(net: nn.Module, x: Any, names: tuple[str, ...]) -> Tensor:
    lam = oracles.lambda_formula("categorical", oracles.outputs(net, x))
    return oracles.ggn(oracles.jacobian(net, x, names), lam)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_the_nearest_diagonal_in_the_bases_of_kron(case: Case) -> None:
    net, x, y = case.network(), case.data(), targets("categorical")
    options: dict[str, Any] = {"select": case.select, "progress": False}
    kron = estimate(net, [(x, y)], "categorical", structure="kron", **options)
    found = estimate(net, [(x, y)], "categorical", structure="ekfac", **options)
    assert isinstance(found, EKFAC)
    matrix, size = truth(net, x, found.layout.names), found.layout.numel
    # the definition: U diag(U^T H U) U^T, U column by column from the blocks' bases
    units = [unit.unsqueeze(0) for unit in torch.eye(size, dtype=torch.float64)]
    basis = torch.cat([_turned(found, unit) for unit in units])  # rows are eigenvectors
    close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
    moments = torch.einsum("ip,pq,iq->i", basis, matrix, basis)
    close(found.to_dense(), basis.T @ torch.diag(moments) @ basis)
    errors = [float((h.to_dense() - matrix).norm()) for h in (found, kron)]
    assert errors[0] <= errors[1] + 1e-10 * float(matrix.norm())
    close(found.to_dense().trace(), matrix.trace())


def _turned(found: EKFAC, unit: Tensor) -> Tensor:
    return found.layout.join([e.back(v) for e, v in zip(found.eigen, found.layout.split(unit), strict=True)])


def test_is_strictly_better_than_kron_where_inputs_and_gradients_depend() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    matrix = truth(net, x, tuple(n for n, _ in net.named_parameters()))
    errors = {}
    for name in ("kron", "ekfac"):
        found = estimate(net, [(x, y)], "categorical", structure=name, progress=False)
        errors[name] = float((found.to_dense() - matrix).norm())
    assert errors["ekfac"] < 0.99 * errors["kron"]


def test_both_passes_of_the_monte_carlo_fisher_draw_the_same_targets() -> None:
    # the trace is exact only if the eigenvalues belong to the draws that the plain diagonal is made from
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    for make in (lambda: None, lambda: torch.Generator().manual_seed(4)):
        traces = [
            estimate(net, [(x, y)], "categorical", structure=s, kind="mc", generator=make(), progress=False)
            .to_dense()
            .trace()
            for s in ("ekfac", "diag")
        ]
        close(traces[0], traces[1])


def test_outputs_with_open_noise_share_one_basis() -> None:
    torch.manual_seed(0)
    net = mlp(outputs=4).double()
    x, y = real(4)(torch.Generator().manual_seed(1)), targets("gaussian", 4)
    network = Network(net)
    fit = fit_curvature(
        network, plan(network, x), [(x, y)], resolve("gaussian"), structure="ekfac", kind="ggn", progress=False
    )
    jac = oracles.jacobian(net, x, network.names)
    assert len(fit.parts) == 4
    assert isinstance(fit.curvature, EKFAC)
    units = torch.eye(fit.curvature.layout.numel, dtype=torch.float64)
    basis = torch.cat([_turned(fit.curvature, unit.unsqueeze(0)) for unit in units])
    for c, part in enumerate(fit.parts):
        moments = (jac[:, c] @ basis.T).square().sum(0)
        close(part.to_dense(), basis.T @ torch.diag(moments) @ basis)


def test_a_float32_fit_keeps_orthonormal_bases() -> None:
    torch.manual_seed(0)
    net = mlp()
    x, y = real(4)(torch.Generator().manual_seed(1)).float(), targets("categorical")
    found = estimate(net, [(x, y)], "categorical", structure="ekfac", progress=False).to_dense()
    exact = estimate(net.double(), [(x.double(), y)], "categorical", structure="ekfac", progress=False).to_dense()
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 1e-4


# --- loaders whose passes differ ---


class Noisy:
    """A loader that augments: other inputs in every pass."""

    def __init__(self, x: Tensor, y: Tensor, width: float) -> None:
        self.x, self.y, self.width, self.generator = x, y, width, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        noise = torch.randn(self.x.shape, generator=self.generator, dtype=self.x.dtype)
        yield self.x + self.width * noise, self.y


class Growing:
    """A loader that yields one example more in every pass."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.count = x, y, 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.count += 1
        yield self.x[: self.count], self.y[: self.count]


def test_an_augmenting_loader_is_an_error_that_names_both_passes() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    with pytest.raises(ArgumentError, match=r"8 examples with log-likelihood -.*then 8 with -.*augmentation"):
        estimate(net, Noisy(x, y, 0.05), "categorical", structure="ekfac", progress=False)
    # one pass has nothing to compare with
    estimate(net, Noisy(x, y, 0.05), "categorical", structure="kron", progress=False)


def test_a_loader_of_another_length_is_an_error_that_names_both_counts() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    loader = Growing(x, y)
    with pytest.raises(ArgumentError, match="two passes of the loader differ") as caught:
        estimate(net, loader, "categorical", structure="ekfac", progress=False)
    assert f"{loader.count - 1} examples" in str(caught.value)
    assert f"then {loader.count} with" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shuffling_loader_is_accepted(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = mlp().to(dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, generator=g, dtype=dtype)
    y = torch.randint(3, (200,), generator=g)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=33, shuffle=True, generator=g)
    found = estimate(net, loader, "categorical", structure="ekfac", progress=False).to_dense()
    fixed = estimate(net, [(x, y)], "categorical", structure="ekfac", progress=False).to_dense()
    assert float((found - fixed).norm() / fixed.norm()) < (1e-10 if dtype == torch.float64 else 1e-4)


# --- sums, files ---


def test_bases_of_other_data_are_not_added() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    first, second = (
        estimate(net, [(x[s], y[s])], "categorical", structure="ekfac", progress=False)
        for s in (slice(0, 4), slice(4, 8))
    )
    with pytest.raises(UnsupportedError, match="different bases.*kron"):
        first + second
    copied = first.map(torch.clone)
    close((first + copied).to_dense(), 2.0 * first.to_dense())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_save_and_load(likelihood: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mlp()
    x, y = real(4)(torch.Generator().manual_seed(1)).float(), targets(likelihood)
    y = y.float() if likelihood == "gaussian" else y
    bayes = bdl.wrap(net, bdl.Laplace(structure="ekfac"), [(x, y)], likelihood=likelihood, progress=False)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert isinstance(again.posterior, GaussianPosterior)
    assert isinstance(again.posterior.curvature, EKFAC)
    assert len(again.posterior.parts) == (3 if likelihood == "gaussian" else 0)
    assert torch.equal(again(x).variance, bayes(x).variance)
    assert torch.equal(again.log_evidence(), bayes.log_evidence())
