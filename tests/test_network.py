"""Network: outputs in a fixed shape, devices and dtypes, staleness, and the last layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, SelectionError, ShapeError, StaleModelError
from bayesdl.network import Network, first_inputs
from bayesdl.outputs import extract_output
from tests.networks import SharedModule, TiedLayers
from tests.test_clone import X, mlp, reference
from tests.untouched import untouched


class Head(nn.Module):
    """A linear layer whose output goes through a function of the test."""

    def __init__(self, outputs: int, after: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.head = nn.Linear(4, outputs)
        self.after = after

    def forward(self, x: Tensor) -> object:
        return self.after(self.head(x))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 3])
def test_squeezed_outputs_keep_their_batch_axis(rows: int, outputs: int) -> None:
    net = Head(outputs, torch.squeeze)
    assert Network(net)(X[:rows]).shape == (rows, outputs)
    assert torch.equal(Network(net)(X[:rows]), net.head(X[:rows]))


@pytest.mark.parametrize("rows", [1, 4])
def test_an_output_without_its_last_axis_gains_it(rows: int) -> None:
    assert Network(Head(1, lambda f: f[:, 0]))(X[:rows]).shape == (rows, 1)


def test_outputs_of_higher_rank_are_refused_with_their_shape() -> None:
    with pytest.raises(ShapeError, match=r"\(5, 3, 1\); expected \(batch, outputs\)"):
        Network(Head(3, lambda f: f.unsqueeze(-1)))(X)


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "after", [Output, lambda f: {"logits": f}, lambda f: (f,), lambda f: [f]], ids=["object", "dict", "tuple", "list"]
)
def test_outputs_in_containers(after: Callable[[Tensor], object]) -> None:
    net = Head(3, after)
    assert torch.equal(Network(net)(X), net.head(X))


@pytest.mark.parametrize("after", [lambda f: (f, f), lambda f: {"scores": f}, lambda f: None])
def test_outputs_that_hold_no_single_tensor_are_refused(after: Callable[[Tensor], object]) -> None:
    with pytest.raises(ShapeError, match="expected a tensor or an object with .logits"):
        Network(Head(3, after))(X)


def test_a_pair_of_mean_and_variance_is_told_what_to_return() -> None:
    with pytest.raises(ShapeError, match=r"variance\.log\(\).*heteroscedastic"):
        extract_output((X, X))


def test_extract_output_prefers_logits_over_order() -> None:
    assert torch.equal(extract_output({"loss": torch.ones(()), "logits": X}), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_take_the_networks_dtype(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    network = Network(net)
    assert network.dtype is dtype
    assert torch.equal(network(X), reference(net, X.to(dtype)))


def test_networks_of_several_dtypes_get_their_inputs_as_they_are() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).double())

    network = Network(Mixed())
    assert network.dtype is None
    assert network(X).dtype is torch.float64


def test_integer_inputs_stay_integers() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    tokens = torch.tensor([[0, 1], [4, 2]])
    assert torch.equal(Network(net)(tokens), reference(net, tokens))


@pytest.mark.parametrize(
    "write",
    [
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, foreach=True).step(),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, foreach=False).step(),
        lambda net: net.load_state_dict(mlp(1).state_dict()),
        lambda net: nn.init.zeros_(net[0].bias),
    ],
    ids=["foreach", "loop", "load_state_dict", "init"],
)
def test_training_on_makes_the_network_stale(write: Callable[[nn.Module], object]) -> None:
    net = mlp().eval()
    network = Network(net)
    net(X).sum().backward()
    network(X)  # gradients alone are no write
    write(net)
    with pytest.raises(StaleModelError, match="parameter '0.*' of the wrapped model was written to"):
        network(X)


@pytest.mark.parametrize(
    "write",
    [
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step(),
        lambda net: [p.data.mul_(0.9) for p in net.parameters()],
    ],
    ids=["fused", "data"],
)
def test_writes_that_leave_no_version_are_noticed_by_value(write: Callable[[nn.Module], object]) -> None:
    net = mlp().eval()
    bayes = bdl.wrap(net, "map", likelihood="categorical")
    bayes.network.check_values()
    net(X).sum().backward()
    write(net)
    for use in (lambda: bayes(X), lambda: bayes.predict([X]), bayes.double, bayes.network.check_values):
        with pytest.raises(StaleModelError, match="written to after the fit"):
            use()


def test_writes_to_other_memory_layouts_are_noticed() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    network = Network(net)
    network.check_values()
    net[0].weight.data.add_(1.0)
    with pytest.raises(StaleModelError):
        network.check_values()


def test_networks_that_hold_nan_are_not_called_stale() -> None:
    net = mlp()
    net[0].bias.data.fill_(torch.nan)
    Network(net).check_values()


@pytest.mark.parametrize("derive", [lambda n: n.map(torch.Tensor.double), lambda n: n.reselect("0"), copy.deepcopy])
def test_staleness_is_not_forgotten_by_moving_or_copying(derive: Callable[[Network], Network]) -> None:
    net = mlp()
    network = Network(net)
    nn.init.zeros_(net[0].bias)
    with pytest.raises(StaleModelError):
        derive(network)


def test_users_dtype_move_leaves_the_network_alone() -> None:
    net = mlp()
    network = Network(net)
    expected = network(X)
    net.to(torch.float64)
    assert torch.equal(network(X), expected)
    assert net[0].weight.dtype is torch.float64


def test_networks_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = mlp()
        expected = reference(net, X)
        network = Network(net)
        network(X)
    x = X.clone().requires_grad_()
    out = network(x)
    out.sum().backward()
    assert torch.equal(out.detach(), expected) and x.grad is not None


def test_assigned_state_leaves_the_network_alone() -> None:
    net = mlp()
    network = Network(net)
    expected = network(X)
    net.load_state_dict(mlp(1).state_dict(), assign=True)  # new tensors; the old ones are untouched
    assert torch.equal(network(X), expected)


def test_own_dtype_move_leaves_the_user_alone() -> None:
    net = mlp()
    network = Network(net)
    with untouched(net):
        wide = network.map(lambda t: t.double() if t.is_floating_point() else t)
        assert wide(X).dtype is torch.float64
        assert torch.allclose(wide(X).float(), network(X), atol=1e-6)
        assert wide.names == network.names and wide.batch is network.batch


def test_deep_copies_own_their_memory() -> None:
    net = mlp()
    twin = copy.deepcopy(Network(net))
    expected = twin(X)
    nn.init.zeros_(net[0].bias)
    assert torch.equal(twin(X), expected)


def test_a_network_sent_elsewhere_makes_clones_of_its_own() -> None:
    """What a process gets is what a copy by state gets: everything but this thread's clone."""
    net = nn.Linear(2, 3)
    network = Network(net)
    x, clone = torch.ones(4, 2), network.module()
    sent = copy.copy(network)
    assert sent.module() is not clone and torch.equal(sent(x), network(x))
    assert sent.names == network.names and sent.fingerprint() == network.fingerprint()
    sent.check_fresh()


def test_fingerprint_follows_values_names_shapes_and_buffers() -> None:
    net = mlp()
    first = Network(net).fingerprint()
    assert Network(net).fingerprint() == first == Network(mlp()).fingerprint()
    assert Network(mlp(1)).fingerprint() != first
    assert Network(mlp().double()).fingerprint() != first
    net[1].running_mean.add_(1.0)
    assert Network(net).fingerprint() != first


def test_outputs_carry_gradients_towards_inputs_only() -> None:
    net = mlp()
    x = X.clone().requires_grad_()
    Network(net)(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a torch.nn.Module is expected, got function; bdl.as_module"):
        Network(lambda x: x)  # type: ignore[arg-type]


def last_layer(net: nn.Module, x: Tensor = X) -> tuple[str, ...]:
    with untouched(net):
        return Network(net, select="last_layer", example=x).names


def test_last_layer_is_the_one_that_makes_the_output() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 3)
            self.body = nn.Linear(4, 6)  # declared after the layer that is used last
            self.auxiliary = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x).relu()
            output = self.classifier(hidden)
            self.auxiliary(hidden)  # runs last, and is not the output
            return output

    assert last_layer(Branching()) == ("classifier.weight", "classifier.bias")


def test_last_layer_of_a_network_that_owns_parameters_itself() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))  # as the position embedding of a transformer
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x + self.shift))

    assert last_layer(Tokens()) == ("head.weight", "head.bias")


def test_last_layer_behind_dropout_identity_and_squeeze() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Dropout(0.3), nn.Identity())
    assert last_layer(net.train()) == ("1.weight", "1.bias")
    assert last_layer(Head(1, torch.squeeze)) == ("head.weight", "head.bias")


def test_last_layer_that_scores_every_token_for_the_score_of_one() -> None:
    class Last(nn.Module):  # as sequence classifiers of decoders do
        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.score(self.body(x))[torch.arange(len(x)), torch.tensor([1, 2, 0])]

    assert last_layer(Last(), torch.randn(3, 3, 4)) == ("score.weight",)


def test_last_layer_with_a_convolution_as_head() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten())
    assert last_layer(net, torch.randn(2, 1, 6, 6)) == ("3.weight", "3.bias")


def test_last_layer_that_is_reparametrised_without_a_bias() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2, bias=False)))
    assert all(name.startswith("1.parametrizations.weight.") for name in last_layer(net))


def test_a_single_layer_is_its_own_last_layer() -> None:
    assert last_layer(nn.Linear(4, 2)) == ("weight", "bias")


def test_last_layer_behind_a_softmax_is_named_in_the_error() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Softmax(-1))
    with pytest.raises(SelectionError, match="softmax .* select='1'"):
        Network(net, select="last_layer", example=X)


def test_last_layer_needs_an_example() -> None:
    with pytest.raises(SelectionError, match="pass data"):
        Network(mlp(), select="last_layer")


def test_first_inputs() -> None:
    assert first_inputs(None, lambda b: b) is None
    assert first_inputs([(1, 2), (3, 4)], lambda b: b) == 1
    with pytest.raises(ArgumentError, match="no batch"):
        first_inputs([], lambda b: b)


@pytest.mark.parametrize("build", [SharedModule, TiedLayers])
def test_other_tensors_reach_every_holder_and_leave_no_trace(build: Callable[[], nn.Module]) -> None:
    # a module under two names, and two modules over one tensor
    net = build().eval()
    network, x = Network(net), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before, weight = network(x), torch.full((4, 4), 0.3)
    other = build().eval()
    other.load_state_dict(net.state_dict() | {"first.weight": weight, "second.weight": weight})
    for _ in range(2):
        torch.testing.assert_close(network(x, {"first.weight": weight}), other(x))
        assert torch.equal(network(x), before)
    with pytest.raises(RuntimeError):
        network(x, {"first.weight": torch.ones(2, 4, 4)})
    assert torch.equal(network(x), before)
