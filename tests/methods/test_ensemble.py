"""Ensembles of networks, state dicts and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError, ShapeError
from bayesdl.posteriors import SamplePosterior
from tests.test_clone import Tied, X, mlp, reference

NETS = [mlp(seed) for seed in range(3)]
EXPECTED = torch.stack([torch.softmax(reference(net, X), -1) for net in NETS]).mean(0)


def probs(models: Any, method: Any = "ensemble") -> Tensor:
    return bdl.wrap(models, method, likelihood="categorical")(X).probs


def test_networks_average_their_probabilities() -> None:
    assert torch.allclose(probs(NETS), EXPECTED, atol=1e-6)


def test_wrapped_members() -> None:
    wrapped = [torch.compile(NETS[0], backend="eager"), nn.DataParallel(NETS[1]), NETS[2]]
    assert torch.allclose(probs(wrapped), EXPECTED, atol=1e-6)
    part = nn.Sequential(torch.compile(NETS[1][0], backend="eager"), *list(NETS[1])[1:])
    assert torch.allclose(probs([NETS[0], part, NETS[2]]), EXPECTED, atol=1e-6)


def test_checkpoints_of_every_kind(tmp_path: Path) -> None:
    states = [net.state_dict() for net in NETS]
    save_file(states[0], tmp_path / "a.safetensors")
    torch.save(states[1], tmp_path / "b.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in states[2].items()}}, tmp_path / "c.pt")
    paths = [tmp_path / "a.safetensors", str(tmp_path / "b.pt"), tmp_path / "c.pt"]
    blank = mlp(9)  # gives the architecture alone
    assert torch.allclose(probs(blank, bdl.Ensemble(checkpoints=paths)), EXPECTED, atol=1e-6)
    assert torch.allclose(probs(blank, bdl.Ensemble(checkpoints=states)), EXPECTED, atol=1e-6)
    included = bdl.Ensemble(checkpoints=paths[1:], include=True)
    assert torch.allclose(probs(NETS[0], included), EXPECTED, atol=1e-6)
    compiled = [{f"_orig_mod.{k}": v for k, v in state.items()} for state in states]
    assert torch.allclose(probs(blank, bdl.Ensemble(checkpoints=compiled)), EXPECTED, atol=1e-6)


def test_a_submodule_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = mlp(seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    assert torch.allclose(probs([Holder(seed) for seed in range(3)]), EXPECTED, atol=1e-6)


def test_tied_parameters_under_any_of_their_names(tmp_path: Path) -> None:
    nets = [Tied(), Tied()]
    tokens = torch.tensor([[0, 1], [2, 3]])
    expected = torch.stack([torch.softmax(reference(net, tokens), -1) for net in nets]).mean(0)
    for number, net in enumerate(nets):
        save_model(net, str(tmp_path / f"{number}.safetensors"))  # keeps one name of the two
    files = sorted(tmp_path.iterdir())
    for models, method in ((nets, "ensemble"), (nets[0], bdl.Ensemble(checkpoints=files))):
        bayes = bdl.wrap(models, method, likelihood="categorical")
        assert torch.allclose(bayes(tokens).probs, expected, atol=1e-6)


def test_statistics_of_every_member_are_its_own() -> None:
    nets = [mlp(), mlp()]
    nets[1][1].running_mean.add_(5.0)
    posterior = bdl.wrap(nets, "ensemble", likelihood="categorical").posterior
    assert isinstance(posterior, SamplePosterior)
    means = posterior.snapshots["1.running_mean"]
    assert torch.allclose(means[1], means[0] + 5.0)


def test_files_from_before_the_counters_of_batch_norm() -> None:
    old = [{k: v for k, v in net.state_dict().items() if "num_batches" not in k} for net in NETS]
    assert torch.allclose(probs(mlp(9), bdl.Ensemble(checkpoints=old)), EXPECTED, atol=1e-6)


def test_training_on_another_member_does_not_matter() -> None:
    # members are copied; only the first network is read at prediction time
    nets = [mlp(0), mlp(1), mlp(2)]
    bayes = bdl.wrap(nets, "ensemble", likelihood="categorical")
    nn.init.zeros_(nets[1][0].weight)
    assert torch.allclose(bayes(X).probs, EXPECTED, atol=1e-6)


def wider() -> nn.Module:
    net = mlp()
    net[4] = nn.Linear(6, 4)
    return net


def deeper() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Linear(3, 3))


def shallower() -> nn.Module:
    return nn.Sequential(*list(mlp())[:4])


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (wider, ShapeError, r"member 1: '4.weight' has shape \(4, 6\), expected \(3, 6\)"),
        (deeper, ArgumentError, r"member 1 holds '5.weight', which the first network lacks"),
        (shallower, ArgumentError, r"member 1 lacks tensor '4.weight'"),
    ],
)
def test_members_of_another_architecture(other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bdl.wrap([mlp(), other()], "ensemble", likelihood="categorical")


def test_a_missing_statistic_is_no_detail() -> None:
    state = {k: v for k, v in NETS[1].state_dict().items() if k != "1.running_mean"}
    with pytest.raises(ArgumentError, match=r"member 1 lacks tensor '1.running_mean'"):
        bdl.wrap(NETS[0], bdl.Ensemble(checkpoints=[state], include=True), likelihood="categorical")


def test_too_few_members() -> None:
    for models, method in ((NETS[:1], "ensemble"), (NETS[0], "ensemble")):
        with pytest.raises(ArgumentError, match="an ensemble of 1 member"):
            bdl.wrap(models, method, likelihood="categorical")


def test_members_that_are_not_finite() -> None:
    broken = mlp(1)
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"snapshot '0.weight': 1 of 48 values .* \(1, 0, 0\)"):
        bdl.wrap([mlp(), broken], "ensemble", likelihood="categorical")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    torch.save(mlp(), tmp_path / "module.pt")  # an object: refused, never unpickled
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, message in (
        ("module.pt", "cannot be read"),
        ("list.pt", "holds list; expected a mapping of tensors"),
        ("noise.pt", "cannot be read"),
        ("noise.safetensors", "cannot be read"),
        ("absent.pt", "does not exist"),
    ):
        with pytest.raises(FileFormatError, match=message):
            bdl.wrap(mlp(), bdl.Ensemble(checkpoints=[tmp_path / name] * 2), likelihood="categorical")


def test_draws_are_distinct_members_then_repeat() -> None:
    bayes = bdl.wrap(NETS, "ensemble", likelihood="categorical")
    outputs = [f(X) for f in bayes.draw(3)]
    members = [reference(net, X) for net in NETS]
    for member in members:
        assert sum(torch.allclose(out, member, atol=1e-6) for out in outputs) == 1
    assert len(bayes.draw(7)) == 7


def test_weights_are_respected() -> None:
    states = [dict(net.state_dict()) for net in NETS[:2]]
    posterior = SamplePosterior.from_states(states, torch.tensor([0.9, 0.1]))
    bayes = bdl.BayesianModel(NETS[0], posterior, "categorical")
    each = [torch.softmax(reference(net, X), -1) for net in NETS]
    assert torch.allclose(bayes(X).probs, 0.9 * each[0] + 0.1 * each[1], atol=1e-6)
    # 400 draws at 0.9: mean 360, standard deviation 6; five of them
    firsts = sum(torch.allclose(f(X[:1]), reference(NETS[0], X[:1]), atol=1e-5) for f in bayes.draw(400))
    assert abs(firsts - 360) < 30


def test_samples_that_do_not_agree() -> None:
    a = {"w": torch.ones(2)}
    with pytest.raises(ArgumentError, match="sample 1 differs from sample 0 in tensor 'v'"):
        SamplePosterior.from_states([a, {"w": torch.ones(2), "v": torch.ones(1)}])
    with pytest.raises(ShapeError, match=r"'w' has shape \(3,\) in sample 1 and \(2,\)"):
        SamplePosterior.from_states([a, {"w": torch.ones(3)}])
    with pytest.raises(RuntimeError, match="no sample was collected"):
        SamplePosterior.from_states([])
    with pytest.raises(ShapeError, match="'w' holds 2 samples and there are 3 weights"):
        SamplePosterior({"w": torch.ones(2, 1)}, torch.ones(3) / 3)
