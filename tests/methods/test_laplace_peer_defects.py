"""Where laplace-torch 0.3 is wrong: its value, shown by running it, and the right one of ours beside an oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.linalg import eigh
from bayesdl.posteriors import GaussianPosterior
from tests import oracles
from tests.untouched import untouched

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # the peer's own


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    # the peer makes its own tensors in the default dtype
    pytest.importorskip("laplace", exc_type=ImportError)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).eval()


def points(kind: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=g)
    return x, torch.randint(0, 3, (10,), generator=g) if kind == "classification" else torch.randn(10, 3, generator=g)


def loader(kind: str, **options: Any) -> Any:
    return DataLoader(TensorDataset(*points(kind)), batch_size=4, **options)


def theirs(net: nn.Module, kind: str, subset: str, structure: str, data: Any = None, **options: Any) -> Any:
    from laplace import Laplace

    la = Laplace(net, kind, subset, structure, **options)
    la.fit(loader(kind) if data is None else data)
    return la


def ours(net: nn.Module, task: str, likelihood: Any = None, data: Any = None, **options: Any) -> bdl.BayesianModel:
    family = likelihood or ("categorical" if task == "classification" else bdl.Gaussian(0.7))
    data = loader(task) if data is None else data
    prior = bdl.GaussianPrior(1.0)
    return bdl.wrap(net, bdl.Laplace(**options), data, likelihood=family, prior=prior, progress=False)


def dense(model: bdl.BayesianModel) -> Tensor:
    assert isinstance(model.posterior, GaussianPosterior)
    return model.posterior.curvature.to_dense()


def test_empirical_fisher_of_the_last_layer_on_the_diagonal_is_not_zero() -> None:
    from laplace.curvature import CurvlinopsEF

    x, y = points("classification")
    assert not bool(theirs(network(), "classification", "last_layer", "diag", backend=CurvlinopsEF).H.any())
    net = network()
    found = dense(ours(net, "classification", select="last_layer", structure="diag", kind="empirical")).diagonal()
    phi = torch.cat([net[:2](x), torch.ones(10, 1)], 1).detach()
    score = (net(x).softmax(-1) - nn.functional.one_hot(y, 3)).detach()
    squares = torch.einsum("nc,nd->cd", score.square(), phi.square())  # weight and bias of each output
    torch.testing.assert_close(found, torch.cat([squares[:, :-1].flatten(), squares[:, -1]]))


def test_a_generator_decides_the_draws() -> None:
    x = points("classification")[0]
    la = theirs(network(), "classification", "all", "full")

    def their_draw(seed: int, world: int) -> Tensor:
        torch.manual_seed(world)
        return la(x, pred_type="glm", link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(their_draw(0, 3), their_draw(1, 3))  # the generator is dropped
    assert not torch.equal(their_draw(0, 3), their_draw(0, 4))
    bayes = ours(network(), "classification", bdl.Categorical(link="mc"), structure="full")

    def our_draw(seed: int, world: int) -> Tensor:
        torch.manual_seed(world)
        return bayes(x, num_samples=5, generator=torch.Generator().manual_seed(seed)).probs

    assert torch.equal(our_draw(0, 3), our_draw(0, 4))
    assert not torch.equal(our_draw(0, 3), our_draw(1, 3))


def test_a_regression_predicts_observations_with_their_noise() -> None:
    x, net = points("regression")[0], network()
    la = theirs(net, "regression", "all", "full", sigma_noise=0.7)
    outputs = la._glm_predictive_distribution(x)[1]
    torch.testing.assert_close(la(x)[1], outputs)  # called the predictive, but without noise
    predictive = ours(network(), "regression", structure="full")(x)
    truth = outputs.diagonal(dim1=1, dim2=2) + 0.49
    torch.testing.assert_close(predictive.variance, truth)
    torch.testing.assert_close(predictive.aleatoric, torch.full((10, 3), 0.49))


def test_the_users_network_stays_as_it_is() -> None:
    net = network().train()
    theirs(net, "classification", "all", "diag")
    assert not net.training and net.output_size == 3
    mine = network().train()
    with untouched(mine):
        ours(mine, "classification", data=[points("classification")])(points("classification")[0])
    assert mine.training and not hasattr(mine, "output_size")


def test_one_logit_is_refused_as_classes_and_right_as_a_label() -> None:
    x = points("classification")[0]
    zeros = [(x, torch.zeros(10, dtype=torch.long))]
    data = DataLoader(TensorDataset(x, zeros[0][1]), batch_size=4)
    assert not bool(theirs(network(1), "classification", "all", "full", data).H.any())  # softmax of one logit
    with pytest.raises(ShapeError, match="bernoulli"):
        ours(network(1), "classification", data=zeros)
    net, y = network(1), (x[:, :1] > 0).double()
    found = dense(ours(net, "", "bernoulli", data=[(x, y)], structure="full"))
    jacobian = oracles.jacobian(net, x, [name for name, _ in net.named_parameters()])
    p = net(x).sigmoid().detach().squeeze(1)
    torch.testing.assert_close(found, torch.einsum("n,ncp,ncq->pq", p * (1 - p), jacobian, jacobian))


def test_data_that_a_loader_drops_are_not_counted() -> None:
    x, y = points("classification")
    dropping = loader("classification", drop_last=True)
    la = theirs(network(), "classification", "all", "kron", dropping)
    eight = theirs(network(), "classification", "all", "kron", DataLoader(TensorDataset(x[:8], y[:8]), batch_size=4))
    assert la.n_data == 10  # eight were seen
    assert not torch.allclose(la.H_facs.to_matrix(), eight.H_facs.to_matrix(), rtol=0.05)
    with pytest.raises(ArgumentError, match="drop_last"):
        ours(network(), "classification", data=dropping)
    partial = ours(network(), "classification", data=dropping, allow_partial=True)
    assert isinstance(partial.posterior, GaussianPosterior) and partial.posterior.num_data == 8
    torch.testing.assert_close(dense(partial), dense(ours(network(), "classification", data=[(x[:8], y[:8])])))


def test_nothing_is_accepted_and_then_ignored() -> None:
    x = points("classification")[0]
    damped, plain = (theirs(network(), "classification", "all", "kron", damping=d) for d in (True, False))
    assert torch.equal(damped._glm_predictive_distribution(x)[1], plain._glm_predictive_distribution(x)[1])
    with pytest.raises(TypeError, match="damping"):
        bdl.Laplace(damping=True)  # type: ignore[call-arg]


def test_a_matrix_that_cannot_be_decomposed_is_an_error_and_not_the_end_of_the_process() -> None:
    from laplace.utils import symeig

    broken = torch.full((3, 3), torch.nan)
    with pytest.raises(SystemExit):
        symeig(broken)
    with pytest.raises(NonFiniteError, match="input factor"):
        eigh(broken, "input factor of layer 'fc'")


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.mark.parametrize("make", [normed, Embedded, Attending])
def test_kronecker_factors_of_norms_embeddings_and_attention(make: Any) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 7, (1, 1), generator=g) if make is Embedded else torch.randn(1, 4, generator=g)
    x = x.unsqueeze(1) if make is Attending else x
    y = torch.tensor([2])
    net = make().eval()
    with pytest.raises(NotImplementedError, match="un-supported"):
        theirs(net, "classification", "all", "kron", DataLoader(TensorDataset(x, y)))
    # one datum of one position: each block of the product is that of the exact matrix
    found = ours(net, "classification", data=[(x, y)])
    jacobian = oracles.jacobian(net, x, [name for name, _ in net.named_parameters()])
    p = net(x).softmax(-1)[0].detach()
    exact = jacobian[0].mT @ (p.diag() - p.outer(p)) @ jacobian[0]
    assert isinstance(found.posterior, GaussianPosterior)
    layout = found.posterior.layout
    number = [i + torch.arange(b.groups) / b.groups for i, b in enumerate(layout.blocks)]
    sizes = [(b.groups, b.rows, b.columns) for b in layout.blocks]
    block = layout.join([n[:, None, None].expand(size) for n, size in zip(number, sizes, strict=True)])
    torch.testing.assert_close(dense(found), exact * (block.unsqueeze(1) == block), rtol=1e-8, atol=1e-10)
