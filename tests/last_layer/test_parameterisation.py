"""Every covariance against its materialised matrix."""

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError
from bayesdl.last_layer import parameterisation
from bayesdl.last_layer.parameterisation import COVARIANCES, make

K, D, B = 3, 5, 7


def randomised(name, seed=0, **options):
    covariance = make(name, D, K, rank=2, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in covariance.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return covariance, torch.randn(B, D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_quad_trace_logdet_diagonal(name):
    covariance, phi = randomised(name)
    dense = covariance.dense()
    assert bool((torch.linalg.eigvalsh(dense) > 0).all())
    assert torch.allclose(covariance.quad(phi), torch.einsum("bi,kij,bj->bk", phi, dense, phi))
    assert torch.allclose(covariance.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert torch.allclose(covariance.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    assert torch.allclose(covariance.logdet(), torch.logdet(dense))


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_chunks_change_nothing_and_single_precision_agrees(name):
    covariance, phi = randomised(name)
    tight, _ = randomised(name, memory=1)
    assert torch.allclose(tight.quad(phi), covariance.quad(phi), rtol=1e-12)
    single = covariance.quad(phi)
    assert torch.allclose(covariance.float().quad(phi.float()).double(), single, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_gradients(name):
    covariance, phi = randomised(name)
    names = [n for n, _ in covariance.named_parameters()]

    def value(phi, *tensors):
        held = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(_Sum(covariance), {f"inner.{n}": t for n, t in held.items()}, (phi,))

    tensors = [p.detach().clone().requires_grad_() for p in covariance.parameters()]
    assert torch.autograd.gradcheck(value, (phi.requires_grad_(), *tensors))


class _Sum(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, phi):
        return self.inner.quad(phi).sum() + self.inner.trace().sum() + self.inner.logdet().sum()


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_samples_have_the_covariance(name):
    covariance, _ = randomised(name)
    generator = torch.Generator().manual_seed(3)
    count = 60_000
    noise = torch.randn(count, K, covariance.width, generator=generator, dtype=torch.float64)
    draws = covariance.sample(noise)
    dense = covariance.dense()
    found = torch.einsum("ski,skj->kij", draws, draws) / count
    spread = dense.diagonal(dim1=-2, dim2=-1)
    error = ((spread.unsqueeze(-1) * spread.unsqueeze(-2) + dense.square()) / count).sqrt()
    # 75 entries at five standard errors: fails by chance less than once in 20,000 seeds
    assert bool(((found - dense).abs() < 5 * error).all())


@pytest.mark.parametrize("name", sorted(COVARIANCES))
def test_start(name):
    covariance = make(name, D, K, scale=0.2)
    assert torch.allclose(covariance.diagonal(), torch.full((K, D), 0.04), rtol=1e-2)
    again = make(name, D, K, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(covariance.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["full", "precision"])
def test_set_precision_is_exact_for_dense_families(name):
    _, phi = randomised(name)
    precision = torch.einsum("bi,bj,bk->kij", phi, phi, phi[:, :K].square()) + torch.eye(D, dtype=torch.float64)
    covariance = make(name, D, K).double()
    covariance.set_precision(precision)
    assert torch.allclose(covariance.dense(), torch.linalg.inv(precision), rtol=1e-9)


def divergence(covariance, precision):
    """KL(N(0, S) || N(0, P^-1)) summed over outputs, up to a constant."""
    return 0.5 * (torch.einsum("kij,kji->k", precision, covariance.dense()) - covariance.logdet()).sum()


@pytest.mark.parametrize("name", ["diag", "shared"])
def test_set_precision_projects_in_relative_entropy(name):
    _, phi = randomised(name)
    precision = torch.einsum("bi,bj,bk->kij", phi, phi, phi[:, :K].square()) + torch.eye(D, dtype=torch.float64)
    covariance = make(name, D, K).double()
    covariance.set_precision(precision)
    divergence(covariance, precision).backward()
    assert all(
        float(p.grad.tril().abs().max() if p.dim() > 1 else p.grad.abs().max()) < 1e-7 for p in covariance.parameters()
    )


def test_set_precision_of_low_rank_keeps_the_marginal_variances_and_full_rank_is_exact():
    _, phi = randomised("lowrank")
    precision = torch.einsum("bi,bj,bk->kij", phi, phi, phi[:, :K].square()) + torch.eye(D, dtype=torch.float64)
    wanted = torch.linalg.inv(precision)
    covariance = make("lowrank", D, K, rank=2).double()
    covariance.set_precision(precision)
    assert torch.allclose(covariance.diagonal(), wanted.diagonal(dim1=-2, dim2=-1), rtol=1e-9)
    whole = make("lowrank", D, K, rank=D).double()
    whole.set_precision(precision)
    assert torch.allclose(whole.dense(), wanted, rtol=1e-6, atol=1e-9)


def test_refusals():
    with pytest.raises(UnknownNameError, match="choose one of"):
        make("dense", D, K)
    with pytest.raises(ArgumentError, match=r"GiB.*shared"):
        make("full", 2048, 1000)
    assert make("shared", 512, 1000).factor().shape == (512, 512)
    with pytest.raises(ArgumentError, match="positive"):
        make("diag", D, K, scale=0.0)
    with pytest.raises(ShapeError, match="expected"):
        make("full", D, K).set_precision(torch.eye(D))
    assert parameterisation.LARGEST == 1 << 26


@pytest.mark.parametrize("width", [1, 64, 191, 192, 300])
@pytest.mark.parametrize("name", ["full", "shared"])
def test_blocks_equal_the_whole_factor(name, width):
    torch.manual_seed(0)
    covariance = make(name, width, 3).double()
    with torch.no_grad():
        covariance.lower.normal_()  # entries above the diagonal must not count
        covariance.log_diagonal.normal_()
    phi = torch.randn(7, width, dtype=torch.float64)
    whole = covariance.quad(phi)
    assert whole.requires_grad
    with torch.no_grad():
        blocks = covariance.quad(phi)
    torch.testing.assert_close(blocks, whole.detach())
    torch.testing.assert_close(blocks, torch.einsum("bi,kij,bj->bk", phi, covariance.dense().detach(), phi))
