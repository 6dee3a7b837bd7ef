"""Predictions: read from a Predictive, viewed, stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.errors import BayesDLError, FileFormatError, UnsupportedError
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.validation import UndefinedError
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Categorical


@dataclass
class Belief:
    """A stand-in for a latent."""

    mean: Tensor
    samples: Tensor | None = None
    weights: Tensor | None = None


@dataclass
class Answer:
    """A stand-in for a Predictive: only the attributes that the library documents."""

    task: str
    latent: Belief
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    probs: Tensor | None = None
    mean: Tensor | None = None
    components: tuple[Tensor, Tensor, Tensor] | None = None
    density: Tensor = field(default_factory=lambda: torch.zeros(0))

    def log_prob(self, y: Tensor) -> Tensor:
        return self.density


def ensemble(task: str = "classification", members: int = 3, n: int = 5, classes: int = 4, link: float = 1.0) -> Answer:
    """S members whose mean is the answer, unless `link` bends it."""
    f = torch.randn(members, n, classes, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(1.0, members + 1) / torch.arange(1.0, members + 1).sum()
    squash = (lambda v: v.softmax(-1)) if task == "classification" else torch.sigmoid
    probs = torch.einsum("s,snc->nc", weights, squash(f * link))
    parts = {"total": torch.full((n,), 0.6), "aleatoric": torch.full((n,), 0.4), "epistemic": torch.full((n,), 0.2)}
    return Answer(task, Belief(f.mean(0), f, weights), probs=probs, density=torch.full((n,), -1.5), **parts)


def test_an_ensemble_keeps_its_members_and_its_own_split() -> None:
    answer = ensemble()
    found = Predictions.from_predictive(answer, torch.arange(5) % 4, name="test", meta={"seed": 1})
    assert (found.num_members, len(found), found.num_outputs) == (3, 5, 4)
    assert answer.probs is not None and torch.allclose(found.probs.float(), answer.probs, atol=1e-6)
    assert found.total is not None and torch.equal(found.total, answer.total)
    assert found.epistemic is not None and torch.equal(found.epistemic, answer.epistemic)
    assert found.log_prob is not None and found.log_prob.tolist() == [-1.5] * 5
    assert found.max_logit is not None and answer.latent.samples is not None and answer.latent.weights is not None
    expected = -(answer.latent.weights[:, None] * answer.latent.samples.amax(-1)).sum(0)
    assert torch.allclose(found.max_logit.float(), expected, atol=1e-6)
    assert (found.name, found.meta) == ("test", {"seed": 1})


def test_a_link_leaves_the_mean_alone() -> None:
    answer = ensemble(link=0.5)
    found = Predictions.from_predictive(answer)
    assert found.num_members == 1 and found.targets is None and found.log_prob is None
    assert answer.probs is not None and torch.allclose(found.probs.float(), answer.probs, atol=1e-6)


def test_a_gaussian_latent_has_scores_of_its_mean() -> None:
    answer = ensemble()
    answer.latent = Belief(torch.tensor([[1.0, 3.0]]))
    answer.probs = torch.tensor([[0.2, 0.8]])
    for part in ("total", "aleatoric", "epistemic"):
        setattr(answer, part, torch.tensor([0.1]))
    found = Predictions.from_predictive(answer)
    assert found.max_logit is not None and found.energy is not None
    assert float(found.max_logit) == -3.0
    assert float(found.energy) == pytest.approx(-math.log(math.exp(1) + math.exp(3)), rel=1e-6)


def test_certain_outputs_keep_log_probabilities_that_round_to_zero() -> None:
    # exp(-300) is 0 in single precision; the loss of a sure and wrong network is 300 nats all the same.
    mean, y = torch.tensor([[0.0, -300.0], [2.0, 0.0]]), torch.tensor([1, 0])
    latent = GaussianLatent(mean, torch.zeros_like(mean))
    found = Predictions.from_predictive(Categorical().predictive(latent, torch.zeros(1, 2)), y)
    losses = -found.log_mean_probs.gather(1, y[:, None])[:, 0]
    assert losses.tolist() == pytest.approx([300.0, math.log1p(math.exp(-2.0))], rel=1e-6)


def test_one_bernoulli_output_is_two_classes() -> None:
    answer = ensemble("multilabel", classes=1)
    for targets in (torch.tensor([0, 1, 1, 0, 1]), torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]])):
        found = Predictions.from_predictive(answer, targets)
        assert found.task == "classification" and found.num_outputs == 2 and found.num_members == 3
        assert found.targets is not None and found.targets.tolist() == [0, 1, 1, 0, 1]
        assert answer.probs is not None and torch.allclose(found.probs[:, 1:].float(), answer.probs, atol=1e-6)
        assert torch.allclose(found.probs.sum(1), torch.ones(5).double())
        assert found.max_logit is not None and found.total is not None and found.total.shape == (5,)


def test_several_labels() -> None:
    targets = torch.randint(0, 2, (5, 4), generator=torch.Generator().manual_seed(0)).float()
    found = Predictions.from_predictive(ensemble("multilabel"), targets)
    assert found.task == "multilabel" and found.targets is not None and found.targets.dtype == torch.int64
    with pytest.raises(UnsupportedError, match="multilabel"):
        _ = found.confidence


def regression(task: str = "regression", variance: float = 0.5) -> Answer:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 3, 1, generator=generator)
    weights, variances = torch.tensor([0.25, 0.75]), torch.full_like(means, variance)
    mean = torch.einsum("s,snd->nd", weights, means)
    epistemic = torch.einsum("s,snd->nd", weights, (means - mean).square())
    return Answer(
        task, Belief(mean), epistemic + variance, torch.full((3, 1), variance), epistemic,
        mean=mean, components=(weights, means, variances), density=torch.zeros(3),
    )  # fmt: skip


def test_regression_keeps_its_components() -> None:
    answer = regression()
    found = Predictions.from_predictive(answer, torch.zeros(3))
    assert found.targets is not None and found.targets.shape == (3, 1)
    assert answer.mean is not None and torch.allclose(found.mean.float(), answer.mean)
    assert torch.allclose(found.variance, found.mixture.variance, atol=1e-6)
    low, high = found.interval(0.9)
    assert found.interval(0.9)[0] is low and bool((low < high).all())
    with pytest.raises(UnsupportedError, match="no class probabilities"):
        _ = found.probs


def test_counts_of_rate_zero_have_no_components() -> None:
    found = Predictions.from_predictive(regression("count", variance=0.0), torch.zeros(3))
    answer = regression("count", variance=0.0)
    assert found.variances is None and answer.mean is not None
    assert torch.allclose(found.mean.float(), answer.mean)
    with pytest.raises(UndefinedError) as caught:
        _ = found.mixture
    assert caught.value.reason == "no components"
    assert Predictions.from_predictive(regression("count"), torch.zeros(3)).mixture.means.shape == (2, 3, 1)


def test_it_reads_the_librarys_own_predictive() -> None:
    likelihoods = pytest.importorskip("bayesdl.likelihoods")
    latent = pytest.importorskip("bayesdl.latent")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 3, generator=generator)
    f = torch.randn(4, 6, 3, generator=generator)
    samples = latent.SampleLatent(f, torch.full((4,), 0.25))
    gaussian = latent.GaussianLatent(f[0], torch.rand(6, 3, generator=generator))
    for belief in (samples, gaussian):
        for name, y in (
            ("categorical", torch.arange(6) % 3),
            ("bernoulli", torch.ones(6, 3)),
            ("poisson", torch.ones(6, 3)),
        ):
            predictive = likelihoods.resolve(name).predictive(belief, noise)
            found = Predictions.from_predictive(predictive, y)
            assert found.task == predictive.task and len(found) == 6
            assert found.log_prob is not None and torch.allclose(found.log_prob, predictive.log_prob(y))
            if name == "poisson":
                assert torch.allclose(found.mean.float(), predictive.mean, atol=1e-5)
            else:
                assert torch.allclose(found.probs.float(), predictive.probs, atol=1e-6)
                assert found.num_members == (4 if belief is samples else 1)
        predictive = likelihoods.Gaussian(noise=0.5).predictive(belief, noise)
        found = Predictions.from_predictive(predictive, torch.zeros(6, 3))
        assert torch.allclose(found.variance.float(), predictive.variance, atol=1e-5)
        assert torch.allclose(found.interval(0.9)[0].float(), predictive.interval(0.9)[..., 0], atol=1e-4)


def test_views_of_plain_forecasts() -> None:
    found = Predictions.from_probs([[0.5, 0.5], [0.2, 0.8]], [0, 0])
    assert found.predicted.tolist() == [0, 1] and found.correct.tolist() == [True, False]
    assert found.confidence.tolist() == pytest.approx([0.5, 0.8]) and found.num_tied == 1
    assert found.total is not None and float(found.total[0]) == pytest.approx(math.log(2))
    column = Predictions.from_probs([0.3], [1])
    assert column.probs[0].tolist() == pytest.approx([0.7, 0.3])
    members = Predictions.from_logits(torch.zeros(3, 2, 4))
    assert members.num_members == 3 and len(members) == 2 and len(Predictions.from_logits(torch.zeros(2, 4))) == 2
    half = Predictions.from_probs(torch.tensor([[0.3, 0.7], [0.1, 0.9]], dtype=torch.bfloat16))
    assert half.probs.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_subset_map_and_unlabelled() -> None:
    found = Predictions.from_predictive(ensemble(), torch.arange(5) % 4, group=[1, 1, 2, 2, 3])
    part = found.subset(torch.tensor([True, False, False, True, True]))
    assert len(part) == 3 and part.targets is not None and part.targets.tolist() == [0, 3, 0]
    assert part.group is not None and part.group.tolist() == [1, 2, 3]
    assert torch.equal(part.probs, found.probs[[0, 3, 4]])
    assert torch.equal(found.subset(torch.tensor([4, 0])).probs, found.probs[[4, 0]])
    assert torch.equal(found.map(lambda t: t.clone()).probs, found.probs)
    bare = found.without_targets()
    assert bare.targets is None and bare.log_prob is None
    with pytest.raises(UndefinedError) as caught:
        bare.labelled()
    assert caught.value.reason == "no targets"


CASES = {
    "ensemble": lambda: Predictions.from_predictive(ensemble(), torch.arange(5) % 4, group=[1, 1, 2, 2, 3], name="x"),
    "labels": lambda: Predictions.from_predictive(ensemble("multilabel")),
    "regression": lambda: Predictions.from_predictive(regression(), torch.zeros(3), meta={"note": 'a "b"', "n": 3}),
    "count": lambda: Predictions.from_predictive(regression("count", 0.0), torch.zeros(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_files_hold_everything(case: str, tmp_path: Path) -> None:
    found = CASES[case]()
    found.save(tmp_path / "preds.npz")
    again = Predictions.load(tmp_path / "preds.npz")
    assert (again.task, again.name, dict(again.meta)) == (found.task, found.name, dict(found.meta))
    before, after = found._tensors(), again._tensors()
    assert set(before) == set(after)
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
    assert [path.name for path in tmp_path.iterdir()] == ["preds.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "preds.npz"
    Predictions.from_probs([[0.5, 0.5]]).save(path)
    old = path.read_bytes()

    def broken(file: Any, **arrays: Any) -> None:
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        Predictions.from_probs([[0.1, 0.9]]).save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["preds.npz"]


@pytest.mark.parametrize("key", ["logits", "probs", "log_probs"])
def test_files_made_by_hand(key: str, tmp_path: Path) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    value = {"logits": logits, "probs": logits.softmax(-1), "log_probs": logits.log_softmax(-1)}[key]
    np.savez(tmp_path / "a.npz", **{key: value.numpy(), "targets": np.array([0, 1, 2, 0])})
    found = Predictions.load(tmp_path / "a.npz")
    assert torch.allclose(found.probs.float(), logits.softmax(-1), atol=1e-6)
    assert found.targets is not None and found.targets.tolist() == [0, 1, 2, 0]


def test_regression_file_made_by_hand(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mean=np.zeros(4), variance=np.ones(4), targets=np.ones(4))
    found = Predictions.load(tmp_path / "a.npz")
    assert found.task == "regression" and found.targets is not None and found.targets.shape == (4, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": np.zeros((2, 3)), "probs": np.zeros((2, 3))}, "logits, probs"),
        ({"mean": np.zeros(2)}, "exactly mean and variance"),
        ({"targets": np.zeros(2)}, "expected one of"),
        ({"probs": np.ones((2, 3))}, "did you pass logits"),
        ({"probs": np.array([object()])}, "plain arrays"),
        ({"header": np.array("{}"), "log_probs": np.zeros((1, 1, 1))}, "format None"),
    ],
)
def test_wrong_files(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FileFormatError, match=f"a.npz.*{message}|{message}.*a.npz"):
        Predictions.load(tmp_path / "a.npz")


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("text.npz", "empty.npz", "single.npy"):
        with pytest.raises(FileFormatError, match="npz archive"):
            Predictions.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "guess", "log_probs": torch.zeros(1, 2, 1)},
        {"task": "classification"},
        {"task": "regression", "means": torch.zeros(1, 2, 1)},
        {"task": "classification", "log_probs": torch.full((1, 2, 2), math.log(0.5)), "targets": torch.tensor([0])},
        {"task": "classification", "log_probs": torch.full((1, 2, 2), math.log(0.5)), "targets": torch.tensor([0, 2])},
        {"task": "classification", "log_probs": torch.full((1, 2, 2), math.log(0.5)), "total": torch.zeros(2)},
        {"task": "classification", "log_probs": torch.full((1, 2, 2), math.log(0.5)), "group": torch.zeros(3)},
        {
            "task": "classification",
            "log_probs": torch.full((1, 2, 2), math.log(0.5)),
            "log_prob": torch.tensor([0.0, math.nan]),
        },
        {
            "task": "regression",
            "means": torch.zeros(1, 2, 1),
            "variances": torch.ones(1, 2, 1),
            "targets": torch.zeros(2),
        },
        {"task": "count", "means": torch.zeros(1, 2, 1)},
    ],
)
def test_arrays_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(BayesDLError):
        Predictions(**fields)
