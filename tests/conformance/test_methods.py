"""Every method passes one battery, on a convolutional classifier and on a regression network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import (
    ArgumentError,
    FileFormatError,
    UnknownNameError,
    UnsupportedError,
)
from bayesdl.methods import CHAINS, METHODS
from bayesdl.posteriors import GaussianPosterior
from bayesdl.predictive import Predictive
from tests.conformance.methods import (
    RANDOM_FIT,
    RANDOM_PREDICTION,
    SETTINGS,
    VARIANTS,
    close,
    every,
    fit,
    fitted,
    generator,
    inputs,
    nll,
    problem,
    same,
)
from tests.untouched import untouched


def test_every_method_is_here() -> None:
    assert set(SETTINGS) == set(METHODS) - {"tfb", "bayesvlm"}  # for networks of their own: tests/lora
    assert all(type(method) is type(METHODS[name]()) for name, group in SETTINGS.items() for method in group.values())


@every
def test_users_networks_are_untouched(task: str, label: str, tmp_path: Path) -> None:
    given = problem(task)
    with untouched(*given.networks):
        bayes = fit(task, label)
        bayes(given.held_out[0][0])
        bayes.predict(given.held_out)
        [function(given.held_out[0][0]) for function in bayes.draw(2, generator=generator())]
        bayes.tune("heldout", given.held_out)
        bayes.save(tmp_path / "b.safetensors")
        bdl.load(tmp_path / "b.safetensors", given.networks[0])
        bayes.double()
        str(bayes.diagnose())


@every
def test_wrapping_with_a_shuffling_loader_leaves_the_global_state(task: str, label: str) -> None:
    given = problem(task)
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*given.train, strict=True)))
    loader = DataLoader(data, batch_size=16, shuffle=True)
    for seeded in (None, generator()):
        with untouched(*given.networks):
            bdl.wrap(
                given.models(label),
                VARIANTS[label],
                loader,
                likelihood=given.likelihood,
                generator=seeded,
                progress=False,
            )


@every
def test_seeds(task: str, label: str) -> None:
    x = inputs(task)
    first = fitted(task, label)
    again, other = fit(task, label), fit(task, label, seed=1)
    assert same(first(x, generator=generator()), again(x, generator=generator()))
    assert same(first(x), first(x))  # a fixed seed where none is given
    refitted = not same(first(x, generator=generator()), other(x, generator=generator()))
    # the noise is the residual of the mean over masks, which differ from seed to seed
    assert refitted is (label in RANDOM_FIT or (task, label) == ("regression", "dropout"))
    redrawn = not torch.equal(first(x, generator=generator(0)).mean, first(x, generator=generator(1)).mean)
    assert redrawn is (label in RANDOM_PREDICTION)


@every
def test_no_generator_means_a_fixed_seed(task: str, label: str) -> None:
    x = inputs(task)
    assert same(fit(task, label, generator=None)(x), fit(task, label, generator=None)(x))


@every
def test_batches_and_their_order_do_not_matter(task: str, label: str) -> None:
    bayes, x = fitted(task, label), inputs(task)
    whole = bayes(x, generator=generator())
    order = torch.randperm(len(x), generator=generator())
    pieces = [bayes(chunk, generator=generator()) for chunk in x[order].split([1, 7, 1, 13, len(x) - 22])]
    joined = Predictive.cat(pieces)
    for part in ("mean", "variance", "aleatoric", "epistemic", "entropy"):
        assert torch.allclose(getattr(joined, part), getattr(whole, part)[order], rtol=1e-4, atol=2e-6), part


@every
def test_loaders_give_what_calls_give(task: str, label: str) -> None:
    bayes, given = fitted(task, label), problem(task)
    calls = Predictive.cat([bayes(x, generator=generator(3)) for x, _ in given.held_out])
    pred, targets = bayes.predict_with_targets(given.held_out, generator=generator(3))
    assert same(pred, calls)
    assert targets is not None and torch.equal(targets, torch.cat([y for _, y in given.held_out]))
    alone, none = bayes.predict_with_targets([x for x, _ in given.held_out], generator=generator(3))
    assert same(alone, calls) and none is None
    assert same(bayes.predict(iter(given.held_out), generator=generator(3)), calls)


@every
def test_one_example(task: str, label: str) -> None:
    pred = fitted(task, label)(inputs(task)[:1])
    assert pred.batch_size == 1 and bool(torch.isfinite(pred.total).all())


@every
def test_parts_add_up(task: str, label: str) -> None:
    pred = fitted(task, label)(inputs(task))
    assert torch.equal(pred.total, pred.aleatoric + pred.epistemic)
    assert bool((pred.epistemic >= 0).all())
    certain = label in ("map", "temperature")
    assert (float(pred.epistemic.max()) == 0.0) is certain
    assert pred.mean.shape == ((40, 3) if task == "classification" else (40, 2))
    if task == "classification":
        assert torch.allclose(pred.mean.sum(-1), torch.ones(40), atol=1e-5)
    else:
        assert torch.allclose(pred.total, pred.variance, rtol=1e-4)


@every
def test_number_of_samples(task: str, label: str) -> None:
    bayes, x = fitted(task, label), inputs(task)
    for count in (1, 9):
        pred = bayes(x, num_samples=count)
        assert len(pred.noise) == count
        if label in RANDOM_PREDICTION:
            assert len(pred.components[0] if task == "regression" else pred.latent.draws(pred.noise)[0]) == count
    for wrong in (0, -3):
        with pytest.raises(ArgumentError, match=f"num_samples={wrong}"):
            bayes(x, num_samples=wrong)
        with pytest.raises(ArgumentError, match=f"num_samples={wrong}"):
            bayes.predict([x], num_samples=wrong)


@every
def test_draws_are_fixed_functions(task: str, label: str) -> None:
    bayes, x = fitted(task, label), inputs(task)
    functions = bayes.draw(3, generator=generator())
    outputs = [f(x) for f in functions]
    assert len(functions) == 3 and all(out.shape == (40, 3 if task == "classification" else 2) for out in outputs)
    for function, out in zip(functions, outputs, strict=True):
        assert torch.equal(function(x), out)
        rows = torch.cat([function(x[:1]), function(x[1:])])
        assert torch.allclose(rows, out, rtol=1e-4, atol=1e-5)
    again = [f(x) for f in bayes.draw(3, generator=generator())]
    assert all(map(torch.equal, outputs, again))
    distinct = label not in ("map", "temperature")
    assert (not torch.allclose(outputs[0], outputs[1])) is distinct
    unseeded = [[f(x) for f in bayes.draw(2)] for _ in range(2)]
    assert all(map(torch.equal, *unseeded))
    with pytest.raises(ArgumentError, match="0 draws"):
        bayes.draw(0)


@every
def test_save_and_load(task: str, label: str, tmp_path: Path) -> None:
    bayes, given, x = fitted(task, label), problem(task), inputs(task)
    path = tmp_path / "b.safetensors"
    bayes.save(path)
    again = bdl.load(path, given.networks[0])
    assert same(again(x, generator=generator()), bayes(x, generator=generator()))
    assert again.method_name == bayes.method_name and again.network.names == bayes.network.names
    assert [str(f) for f in again.record.findings] == [str(f) for f in bayes.record.findings]
    assert again.cost == pytest.approx(bayes.cost)
    twice = tmp_path / "again.safetensors"
    again.save(twice)
    assert twice.read_bytes() == path.read_bytes()
    with pytest.raises(FileFormatError, match="saved for a network with other weights"):
        bdl.load(path, given.networks[1])


@every
def test_a_failed_write_leaves_the_old_file(task: str, label: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"the old file")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    for target in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="no space"):
                fitted(task, label).save(path)
        assert path.read_bytes() == b"the old file"
        assert list(tmp_path.iterdir()) == [path]


@every
def test_dtype_and_device_moves(task: str, label: str) -> None:
    given, x = problem(task), inputs(task)
    bayes = fit(task, label)
    before = bayes(x, generator=generator())
    with untouched(*given.networks):
        assert same(bayes.to("cpu")(x, generator=generator()), before)
        wide = bayes.to(torch.float64)(x, generator=generator())
        assert wide.mean.dtype is torch.float64
        assert close(wide, before, 1e-4)
        assert close(bayes.to(torch.float32)(x, generator=generator()), before, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every
def test_moves_to_an_accelerator(task: str, label: str) -> None:
    given, x = problem(task), inputs(task)
    bayes = fit(task, label)
    before = bayes(x, generator=generator())
    with untouched(*given.networks):
        moved = bayes.to("cuda")(x, generator=generator())
        assert moved.mean.device.type == "cuda"
        assert close(moved.map(torch.Tensor.cpu), before, 1e-3)
        assert close(bayes.to("cpu")(x, generator=generator()), before, 1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes(task: str, label: str, dtype: torch.dtype) -> None:
    import copy

    given = problem(task)
    # the noise of a chain differs between dtypes
    method = replace(VARIANTS[label], temperature=0.0) if label in CHAINS else VARIANTS[label]
    cast = replace(given, networks=tuple(copy.deepcopy(n).to(dtype) for n in given.networks))
    with untouched(*cast.networks):
        bayes = bdl.wrap(cast.models(label), method, given.train, likelihood=given.likelihood, progress=False)
        pred = bayes(inputs(task))
    assert pred.mean.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    base = fitted(task, label)
    if label in CHAINS:
        base = bdl.wrap(given.models(label), method, given.train, likelihood=given.likelihood, progress=False)
    reference = base(inputs(task))
    tolerance = 0.35 if dtype is torch.bfloat16 else 0.1
    if label in ("nuts", "smc"):  # in float64; another rounding of the start is another chain of the same law
        tolerance = 2.0
    assert float((pred.mean.double() - reference.mean.double()).abs().max()) < tolerance


@every
def test_half_precision_after_the_fit(task: str, label: str) -> None:
    bayes, x = fit(task, label), inputs(task)
    before = bayes(x)
    after = bayes.to(torch.bfloat16)(x)
    held = bayes.posterior.tensors().values()
    assert all(torch.finfo(t.dtype).bits >= 32 for t in held if t.is_floating_point())
    assert after.mean.dtype is torch.float32
    assert float((after.mean - before.mean).abs().max()) < 0.1


@every
def test_tuning_on_held_out_data_does_not_raise_its_nll(task: str, label: str) -> None:
    bayes, given = fitted(task, label), problem(task)
    before = nll(bayes, given.held_out)
    tuned = bayes.tune("heldout", given.held_out)
    assert tuned is not bayes and nll(bayes, given.held_out) == before
    after = nll(tuned, given.held_out)
    if isinstance(bayes.posterior, GaussianPosterior) and bayes.posterior.predictive == "linearized":
        assert after <= before + 1e-3  # a grid of prior precisions, which need not hold the present one
    else:
        assert after <= before + 1e-6
    assert any("held-out" in finding.text for finding in tuned.record.findings)
    with pytest.raises(ArgumentError, match="needs a loader"):
        bayes.tune("heldout")
    with pytest.raises(ArgumentError, match="no targets|no target"):
        bayes.tune("heldout", [x for x, _ in given.held_out])
    with pytest.raises(UnknownNameError, match=r"'luck' is not known; choose one of \['evidence', 'heldout'"):
        bayes.tune("luck", given.held_out)


@every
def test_evidence_where_there_is_one(task: str, label: str) -> None:
    bayes = fitted(task, label)
    if label.startswith("laplace"):
        assert bayes.log_evidence().shape == ()
    elif label == "student-t" or label == "vbll":
        assert bayes.log_evidence().shape == () and bool(torch.isfinite(bayes.log_evidence()))
        if task == "regression":
            assert bayes.tune("evidence").log_evidence() >= bayes.log_evidence() - 1e-9
    else:
        for ask in (bayes.log_evidence, lambda: bayes.layers):
            with pytest.raises(UnsupportedError, match=rf"method '{bayes.method_name}' has no"):
                ask()
        with pytest.raises(UnsupportedError, match="has no evidence; use tune"):
            bayes.tune("evidence")
