"""The private clone: the same function and memory, but nothing of the user's object is ever written."""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import bayesdl as bdl
from bayesdl.clone import independent_copy, unwrap
from bayesdl.errors import UnsupportedError
from bayesdl.network import Network
from tests.untouched import untouched

X = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3))
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net


def reference(net: nn.Module, *args: Any) -> Tensor:
    modes = [m.training for m in net.modules()]
    net.eval()
    with torch.no_grad():
        out = net(*args)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    return out


def test_train_mode_network_answers_as_in_eval_mode_and_stays_in_train_mode() -> None:
    net = mlp().train()
    expected = reference(net, X)
    with untouched(net):
        network = Network(net)
        assert torch.equal(network(X), expected)
        assert torch.equal(network(X[:1]), expected[:1])  # batch norm on one row: running statistics
    assert net.training


def test_memory_of_parameters_is_shared_and_buffers_are_owned() -> None:
    net = mlp()
    network = Network(net)
    for name, parameter in net.named_parameters():
        assert network.tensors[name].data_ptr() == parameter.data_ptr()
    for name, buffer in net.named_buffers():
        assert network.tensors[name].data_ptr() != buffer.data_ptr()
    clone = network.module()
    assert clone is not net and clone[0] is not net[0]
    assert clone._modules is not net._modules and clone[0]._parameters is not net[0]._parameters
    assert clone[0]._forward_hooks is not net[0]._forward_hooks


def test_training_statistics_of_the_users_network_do_not_reach_the_clone() -> None:
    net = mlp().train()
    network = Network(net)
    before = network(X)
    net(torch.randn(50, 4) * 10)  # moves the running statistics, not the parameters
    assert torch.equal(network(X), before)


def test_one_clone_per_thread() -> None:
    network = Network(mlp())
    mine = network.module()
    assert network.module() is mine
    theirs: list[nn.Module] = []
    answers: list[Tensor] = []

    def work() -> None:
        theirs.append(network.module())
        answers.append(network(X))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(m) for m in [mine, *theirs]}) == 3
    assert all(torch.equal(answer, network(X)) for answer in answers)


def test_swapping_parameters_in_one_thread_is_invisible_to_another() -> None:
    network = Network(mlp())
    expected = network(X)
    zeros = {name: torch.zeros_like(value) for name, value in network.parameters.items()}
    failures: list[int] = []

    def swap() -> None:
        for _ in range(50):
            if float(network(X, zeros).abs().max()) != 0.0:
                failures.append(0)

    thread = threading.Thread(target=swap)
    thread.start()
    for _ in range(50):
        if not torch.equal(network(X), expected):
            failures.append(1)
    thread.join()
    assert not failures


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


def test_ties_are_kept() -> None:
    net = Tied()
    network = Network(net)
    assert network.names == ("embed.weight",)
    module = network.module()
    assert module.head.weight is module.embed.weight
    tokens = torch.tensor([[0, 1], [2, 3]])
    doubled = network(tokens, {"embed.weight": 2 * net.embed.weight.detach()})
    assert torch.allclose(doubled, 4 * reference(net, tokens))


def test_recurrent_weights_can_be_replaced() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1]

    net = Recurrent()
    network = Network(net)
    x = X.reshape(5, 2, 2).repeat(1, 1, 2)
    with torch.no_grad():  # torch's own kernel
        assert torch.equal(network(x), reference(net, x))
    torch.testing.assert_close(network(x), reference(net, x), rtol=1e-6, atol=1e-6)
    zeros = {name: torch.zeros_like(value) for name, value in network.parameters.items()}
    assert float(network(x, zeros).abs().max()) == 0.0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", ["old weight_norm", "weight_norm", "spectral_norm", "old spectral_norm", "orthogonal", "pruned"]
)
def test_reparametrised_layers(kind: str) -> None:
    net = mlp().train()
    if kind == "old weight_norm":
        nn.utils.weight_norm(net[0])
    elif kind == "pruned":
        prune.l1_unstructured(net[0], "weight", amount=0.5)
    elif kind == "old spectral_norm":
        nn.utils.spectral_norm(net[0])
    else:
        getattr(parametrizations, kind)(net[0])
    expected = reference(net, X)
    with untouched(net):
        network = Network(net)
        assert torch.allclose(network(X), expected)
        moved = {name: 2 * value for name, value in network.parameters.items()}
        assert not torch.allclose(network(X, moved), expected)
    assert torch.allclose(network(X), expected)


def test_compiled_networks_and_compiled_parts_are_unwrapped() -> None:
    net = mlp().eval()
    expected = reference(net, X)
    whole = torch.compile(net, backend="eager")
    assert unwrap(whole) is net
    assert torch.equal(Network(whole)(X), expected)
    part = nn.Sequential(torch.compile(net[0], backend="eager"), *list(net)[1:])
    network = Network(part, select="requires_grad")
    assert torch.equal(network(X), expected)
    assert network.names == tuple(name for name, _ in net.named_parameters())
    copy = independent_copy(part)
    assert tuple(name for name, _ in copy.named_parameters()) == network.names


def test_network_compiled_in_place_is_not_run_through_the_users_module() -> None:
    net = mlp().train()
    expected = reference(net, X)
    net.compile(backend="eager")
    with untouched(net):
        network = Network(net)
        assert network.module()._compiled_call_impl is None  # hooks of the library never fire in a compiled call
        assert torch.equal(network(X), expected)
        zeros = {name: torch.zeros_like(value) for name, value in network.parameters.items()}
        assert float(network(X, zeros).abs().max()) == 0.0


def test_data_parallel_wrappers() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Tensor:
            raise AssertionError("the wrapper's forward would synchronise processes")

    net = mlp()
    expected = reference(net, X)
    for wrapped in (nn.DataParallel(net), DistributedDataParallel(net), DistributedDataParallel(nn.DataParallel(net))):
        network = Network(wrapped)
        assert torch.equal(network(X), expected)
        assert network.names == tuple(name for name, _ in net.named_parameters())


@pytest.mark.dist
def test_real_distributed_data_parallel(tmp_path: Any) -> None:
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = mlp()
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert torch.equal(Network(wrapped)(X), reference(net, X))
    finally:
        distributed.destroy_process_group()


def test_user_hooks_run_in_the_clone_and_stay_on_the_users_network() -> None:
    net = mlp()
    seen: list[int] = []
    net[0].register_forward_hook(lambda _m, _i, out: seen.append(1))
    net[4].register_forward_hook(lambda _m, _i, out: out + 1.0)  # hooks may be part of the function
    expected = reference(net, X)
    seen.clear()
    network = Network(net)
    assert not seen  # wrapping runs nothing
    assert torch.equal(network(X), expected)
    assert len(seen) == 1
    assert len(net[0]._forward_hooks) == 1
    network.module()[0].register_forward_hook(lambda *_: None)
    assert len(net[0]._forward_hooks) == 1


def _patched(kind: str) -> nn.Sequential:
    net = mlp().train()
    original = net.forward
    if kind == "closure over the bound method":
        net.forward = lambda x: original(x) * 2
    elif kind == "closure over the network":
        net.forward = lambda x: nn.Sequential.forward(net, x) * 2
    elif kind == "bound method":
        net.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x) * 2, net)
    elif kind == "partial":
        net.forward = functools.partial(lambda module, x: nn.Sequential.forward(module, x) * 2, net)
    else:

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return original(*args, **kwargs) * 2

        net.forward = forward
    return net


@pytest.mark.parametrize(
    "kind", ["closure over the bound method", "closure over the network", "bound method", "partial", "decorator"]
)
def test_patched_forward_runs_on_the_clone(kind: str) -> None:
    net = _patched(kind)
    expected = reference(net, X)
    with untouched(net):
        network = Network(net)
        assert torch.equal(network(X), expected)
        zeros = {name: torch.zeros_like(value) for name, value in network.parameters.items()}
        assert float(network(X, zeros).abs().max()) == 0.0
        trained = independent_copy(net)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.zero_()
        assert float(reference(trained, X).abs().max()) == 0.0


def test_recursive_closures_end() -> None:
    net = mlp()

    def forward(x: Tensor, depth: int = 0) -> Tensor:
        return forward(x, 1) if depth == 0 else nn.Sequential.forward(net, x)

    net.forward = forward
    assert torch.equal(Network(net)(X), reference(net, X))


def test_state_in_plain_attributes_is_not_written() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.count = torch.zeros(())  # neither parameter nor buffer
            self.seen: list[int] = []
            self.table = {"last": self.layer}

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen.append(len(x))
            assert self.table["last"] is self.layer
            return self.layer(x)

    net = Counting()
    with untouched(net):
        Network(net)(X)
    assert net.seen == [] and float(net.count) == 0.0


def test_traced_graphs_are_cloned() -> None:
    traced = torch.fx.symbolic_trace(mlp().eval())
    assert torch.equal(Network(traced)(X), reference(traced, X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_by_name() -> None:
    for refused in (torch.jit.trace(mlp().eval(), X), torch.jit.script(mlp())):
        with pytest.raises(UnsupportedError, match="TorchScript"):
            Network(refused)
        with pytest.raises(UnsupportedError, match="TorchScript"):
            bdl.wrap(refused, "map", likelihood="categorical")


def test_embedding_that_renormalises_itself_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Flatten(), nn.Linear(2, 1))
    with pytest.raises(UnsupportedError, match=r"embedding '0' has max_norm"):
        Network(net)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="lazy"):
        Network(nn.LazyLinear(2))


class Around(nn.Module):
    """A way around an activation that has overwritten its input by then."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(x) + x)


def test_in_place_activations_compute_what_they_compute_in_the_users_network_and_leave_the_data_alone() -> None:
    torch.manual_seed(0)
    net, x = Around(), torch.randn(5, 4)
    before = x.clone()
    expected = net(x.clone())
    for select in ("all", "last_layer"):
        network = Network(net, select=select, example=x)
        for _ in range(2):
            torch.testing.assert_close(network(x), expected)
            torch.testing.assert_close(network(x, dict(network.parameters)), expected)
        assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(leaf).sum(), leaf)
    inside = torch.where(x > 0, 2.0, 1.0)  # twice the activation: 2 x, or 2 * 0.5 x
    torch.testing.assert_close(slope, inside * net.head.weight.sum(0))


def test_independent_copy_owns_its_memory_and_keeps_ties() -> None:
    net = Tied()
    with untouched(net):
        copy = independent_copy(net)
        assert copy.head.weight is copy.embed.weight
        with torch.no_grad():
            copy.embed.weight.add_(1.0)


def test_a_copy_of_some_parameters_shares_the_others() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight  # one tensor under two names
    net = nn.Sequential(first, nn.BatchNorm1d(4), second, torch.compile(nn.Linear(4, 2)))  # type: ignore[arg-type]
    with untouched(net):
        copy = independent_copy(net, ["0.weight", "3.bias"])
        made, given = dict(copy.named_parameters(remove_duplicate=False)), list(net.parameters())
        addresses = {parameter.data_ptr() for parameter in given}
        own = {name for name, parameter in made.items() if parameter.data_ptr() not in addresses}
        assert own == {"0.weight", "2.weight", "3.bias"} and made["0.weight"] is made["2.weight"]
        assert not {b.data_ptr() for b in copy.buffers()} & {b.data_ptr() for b in net.buffers()}
        for parameter in copy.parameters():
            parameter.requires_grad_(parameter is made["3.bias"])
        with torch.no_grad():
            made["0.weight"].add_(1.0)
            made["3.bias"].add_(1.0)
    with pytest.raises(KeyError):
        independent_copy(net, ["other"])
