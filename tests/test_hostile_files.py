"""Every loader, every way to damage what it reads: an error of the library's own, or what was there before.

`tests/test_files.py` goes through posteriors entry by entry; here Hypothesis looks for the rest, in all kinds of files.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import bayesdl as bdl
from bayesdl import tensorfile
from bayesdl.checkpoint import read_checkpoint
from bayesdl.errors import BayesDLError, FileFormatError
from bayesdl.evaluation import Predictions
from bayesdl.priors import CouplingPrior, SplinePrior
from bayesdl.priors.coupling import AffineCoupling, LayerFlow
from bayesdl.samplers import SGHMC, SampleStore
from tests.hostile import FILES, contents, damaged_bytes, damaged_documents, damaged_tensors, sign

X = torch.linspace(-1, 1, 18).view(6, 3).sin()
LABELS, TARGETS = torch.tensor([0, 1, 0, 1, 1, 0]), torch.linspace(0, 1, 12).view(6, 2)
SEARCH = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 2)).eval()


NET = network()
PRIOR = bdl.GaussianPrior(1.0)


def wrapped(method: Any, targets: Any = LABELS, likelihood: Any = "categorical") -> bdl.BayesianModel:
    prior = PRIOR if isinstance(method, (bdl.Laplace, bdl.SubsetGP)) else None
    return bdl.wrap(NET, method, [(X, targets)], likelihood=likelihood, prior=prior, progress=False)


MODELS: dict[str, Callable[[], bdl.BayesianModel]] = {
    **{
        structure: lambda structure=structure: wrapped(bdl.Laplace(structure=structure))  # type: ignore[misc]
        for structure in ("full", "diag", "kron", "ekfac", "lowrank")
    },
    "kron-lowrank": lambda: wrapped(bdl.Laplace(structure="kron", kron_rank=1)),
    "mixed": lambda: wrapped(bdl.Laplace(structure={"0": "diag", "*": "full"})),
    "elements": lambda: wrapped(bdl.Laplace(select=bdl.select.largest_magnitude(0.3), structure="full")),
    "noise": lambda: wrapped(bdl.Laplace(), TARGETS, bdl.Gaussian(noise=0.3)),
    "dual": lambda: wrapped(bdl.SubsetGP(num_points=3)),
    "ensemble": lambda: bdl.wrap([NET, network(1)], "ensemble", likelihood="categorical"),
    "temperature": lambda: bdl.wrap(NET, bdl.Temperature(temperature=2.0), likelihood="categorical"),
    "dropout": lambda: bdl.wrap(NET, "dropout", likelihood="categorical"),
    "last layer": lambda: wrapped("vbll"),
    "student": lambda: wrapped(bdl.StudentT(tuning="evidence"), TARGETS, "gaussian"),
}


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a folder gets one, which file in it is damaged, and what reads it."""

    make: Callable[[Path], None]
    name: str
    load: Callable[[Path], object]


def accumulated(structure: str) -> Kind:
    def fresh() -> bdl.curvature.Accumulator:
        return bdl.curvature.Accumulator(NET, "categorical", structure=structure)

    def make(folder: Path) -> None:
        sums = fresh()
        sums.update((X[:3], LABELS[:3]))
        sums.save(folder / "fit.safetensors")

    def load(folder: Path) -> object:
        return fresh().resume(folder / "fit.safetensors")

    return Kind(make, "fit.safetensors", load)


def chain_of(folder: Path) -> tuple[nn.Module, SGHMC, bdl.Chain]:
    net = copy.deepcopy(NET)
    sampler = SGHMC(net.named_parameters(), 1e-3, 6, generator=torch.Generator().manual_seed(0))
    return net, sampler, bdl.Chain(net, sampler=sampler, store=folder / "chain", max_samples=2)


def make_chain(folder: Path) -> None:
    net, sampler, chain = chain_of(folder)
    for _ in range(4):
        sampler.zero_grad()
        nn.functional.cross_entropy(net(X), LABELS).backward()
        sampler.step()
        chain.step()


def read_chain(folder: Path) -> object:
    store = SampleStore(folder / "chain")
    return store.chain, [store.read(record) for record in store.kept()], store.posterior(NET)


def resume_chain(folder: Path) -> object:
    return chain_of(folder)[2].resume()


def saved(make: Callable[[], bdl.BayesianModel]) -> Kind:
    return Kind(
        lambda folder: make().save(folder / "b.safetensors"),
        "b.safetensors",
        lambda folder: bdl.load(folder / "b.safetensors", NET),
    )


DESCRIBED: dict[str, Kind] = {
    **{f"model, {name}": saved(make) for name, make in MODELS.items()},
    **{f"fit, {structure}": accumulated(structure) for structure in ("kron", "diag", "lowrank")},
    "chain, base, read": Kind(make_chain, "chain/base.safetensors", read_chain),
    "chain, sample, read": Kind(make_chain, "chain/sample-000003.safetensors", read_chain),
    "chain, resume": Kind(make_chain, "chain/resume.safetensors", resume_chain),
    "chain, base, resume": Kind(make_chain, "chain/base.safetensors", resume_chain),
}


def layer_flow() -> CouplingPrior:
    numbers = [torch.linspace(-1, 1, n) for n in (2 * 7, 7 * 2, 7 * 2, 7)]
    shapes = ((2, 7), (7, 2), (7, 2), (7,))
    maps = tuple(AffineCoupling(m, *(v.view(s) for v, s in zip(numbers, shapes, strict=True))) for m in (0, 1))
    return CouplingPrior((LayerFlow(("0.bias", "0.weight"), (1.0, 2.0), maps),))


def matched() -> bdl.Prior:
    options = {"distance": "moments", "steps": 2, "num_functions": 4, "family": "located", "progress": False}
    return bdl.functional.match(NET, bdl.functional.GP(outputs=2), X, **options)


PRIORS: dict[str, Callable[[], bdl.Prior]] = {
    "matched": matched,
    "vector": lambda: bdl.GaussianPrior([1.0, 2.0], torch.ones(3)),
    "hierarchical": lambda: bdl.HierarchicalPrior({"w": 1.0}, {"w": 2.0}, fan_in=True),
    "spline": lambda: SplinePrior({"w": 1.0}, {"w": (0.1,) * 6}),
    "coupling": layer_flow,
    "horseshoe": lambda: bdl.HorseshoePrior(slab=1.0),
}


def kept_prior(make: Callable[[], bdl.Prior]) -> Kind:
    return Kind(
        lambda folder: make().save(folder / "p.safetensors"),
        "p.safetensors",
        lambda folder: bdl.load_prior(folder / "p.safetensors"),
    )


DESCRIBED.update({f"prior, {name}": kept_prior(make) for name, make in PRIORS.items()})


def make_adapter(folder: Path) -> None:
    bayes = bdl.wrap(ADAPTED, bdl.TFB(sigma=0.1), likelihood="categorical", batch="huggingface", progress=False)
    bayes.save(folder / "b.safetensors")


if importlib.util.find_spec("peft") is not None:
    from tests.lora.networks import adapted

    ADAPTED = adapted("bert", 1)
    DESCRIBED["model, adapter"] = Kind(
        make_adapter,
        "b.safetensors",
        lambda folder: bdl.load(folder / "b.safetensors", ADAPTED, batch="huggingface"),
    )


def predictions() -> Predictions:
    return Predictions.from_logits(torch.linspace(-1, 1, 12).view(6, 2), LABELS)


def report() -> bdl.Report:
    models = {"map": bdl.wrap(NET, "map", likelihood="categorical"), "laplace": wrapped(bdl.Laplace())}
    return bdl.compare(models, [(X, LABELS)], bootstrap=20, ood={"far": [(5 * X, LABELS)]}, progress=False)


def read_report(folder: Path) -> object:
    found = bdl.Report.from_json((folder / "r.json").read_text(encoding="utf-8", errors="replace"))
    return str(found), found.to_markdown()


OTHERS: dict[str, Kind] = {
    "predictions": Kind(
        lambda folder: predictions().save(folder / "p.npz"), "p.npz", lambda folder: Predictions.load(folder / "p.npz")
    ),
    "report": Kind(
        lambda folder: (folder / "r.json").write_text(report().to_json(), encoding="utf-8") and None,
        "r.json",
        read_report,
    ),
    "weights, safetensors": Kind(
        lambda folder: tensorfile.write_tensors(folder / "w.safetensors", NET.state_dict(), {}),
        "w.safetensors",
        lambda folder: read_checkpoint(folder / "w.safetensors"),
    ),
    "weights, torch": Kind(
        lambda folder: torch.save(NET.state_dict(), folder / "w.pt"),
        "w.pt",
        lambda folder: read_checkpoint(folder / "w.pt"),
    ),
    "chain, index, read": Kind(make_chain, "chain/index.jsonl", read_chain),
    "chain, index, resume": Kind(make_chain, "chain/index.jsonl", resume_chain),
}


class Case:
    """A sound file of a kind, and a folder in which copies of it are damaged."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.sound, self.work = kind, folder / "sound", folder / "work"
        self.sound.mkdir()
        kind.make(self.sound)
        self.whole = (self.sound / kind.name).read_bytes()
        self.reset()
        kind.load(self.work)

    @property
    def path(self) -> Path:
        return self.work / self.kind.name

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sound, self.work)

    def loads(self) -> bool:
        """Whether the file is taken; no error but the library's own is let through."""
        try:
            self.kind.load(self.work)
        except BayesDLError:
            return False
        return True

    def write(self, data: bytes) -> None:
        self.reset()
        self.path.write_bytes(data)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case({**DESCRIBED, **OTHERS}[name], tmp_path_factory.mktemp("case"))
        return made[name]

    return case


def search(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    settings(SEARCH, max_examples=examples)(given(strategy)(check))()


def try_bytes(case: Case, examples: int, summed: bool) -> None:
    before = contents(case.sound / case.kind.name) if summed else None

    def check(data: bytes) -> None:
        case.write(data)
        if case.loads() and before is not None:
            # the only bytes that may change unnoticed are JSON's own white space and the padding behind it
            header, tensors = contents(case.path)
            assert header == before[0]
            assert all(torch.equal(tensors[name], value) for name, value in before[1].items())

    search(damaged_bytes(case.whole), check, examples)


def try_headers(case: Case, examples: int) -> None:
    header, tensors = contents(case.sound / case.kind.name)

    def check(forged: Any) -> None:
        case.reset()
        sign(case.path, forged, tensors)
        case.loads()

    search(damaged_documents(header), check, examples)


def try_tensors(case: Case, examples: int) -> None:
    header, tensors = contents(case.sound / case.kind.name)

    def check(forged: dict[str, torch.Tensor]) -> None:
        case.reset()
        sign(case.path, header, forged)
        case.loads()

    search(damaged_tensors(tensors), check, examples)


@pytest.mark.parametrize("name", [*DESCRIBED, *OTHERS])
def test_damaged_bytes(name: str, cases: Callable[[str], Case]) -> None:
    try_bytes(cases(name), 12, name in DESCRIBED)


@pytest.mark.parametrize("name", DESCRIBED)
def test_headers_signed_again(name: str, cases: Callable[[str], Case]) -> None:
    try_headers(cases(name), 20)


@pytest.mark.parametrize("name", DESCRIBED)
def test_tensors_signed_again(name: str, cases: Callable[[str], Case]) -> None:
    try_tensors(cases(name), 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCRIBED)
def test_a_longer_search(name: str, cases: Callable[[str], Case]) -> None:
    try_bytes(cases(name), 60, True)
    try_headers(cases(name), 150)
    try_tensors(cases(name), 40)


@pytest.mark.parametrize("name", [*DESCRIBED, *OTHERS])
def test_files_that_are_something_else(name: str, cases: Callable[[str], Case]) -> None:
    """A pickle that is unpickled raises `tests.hostile.Executed`, which nothing here catches."""
    case = cases(name)
    for data in FILES.values():
        case.write(data)
        assert not case.loads()


def test_a_report_with_any_entry_wrong(cases: Callable[[str], Case]) -> None:
    case = cases("report")

    def check(forged: Any) -> None:
        case.write(json.dumps(forged).encode())
        case.loads()

    search(damaged_documents(json.loads(case.whole)), check, 150)


@pytest.mark.parametrize("name", ["chain, index, read", "chain, index, resume"])
def test_an_index_with_any_entry_wrong(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)

    def check(forged: list[Any]) -> None:
        case.write("".join(json.dumps(line) + "\n" for line in forged).encode())
        case.loads()

    search(damaged_documents([json.loads(line) for line in case.whole.splitlines()]), check, 60)


def test_an_index_cannot_name_files_outside_its_folder(cases: Callable[[str], Case]) -> None:
    """A resumed chain removes samples that were dropped: the names come from the index."""
    case = cases("chain, index, resume")
    case.reset()
    precious = case.work / "precious.safetensors"
    precious.write_bytes(case.whole)
    lines = [json.loads(line) for line in case.whole.splitlines()]
    for name in (
        "../precious.safetensors",
        str(precious.resolve()),
        "sample-000000.safetensors/../../precious.safetensors",
    ):
        lines[0]["file"] = name
        case.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for load in (read_chain, resume_chain):
            with pytest.raises(FileFormatError, match="file of a line of a chain's index"):
                load(case.work)
    assert precious.read_bytes() == case.whole


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as found:
        for name, data in members.items():
            found.writestr(f"{name}.npy", data)
    return file.getvalue()


def array(shape: tuple[int, ...], data: bytes, descr: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(probs=array((10**12, 2), bytes(16))), "claims 16000000000000 bytes"),
        (archive(probs=array((2**40, 2**40), bytes(16))), "claims"),
        (archive(probs=array((-1, 2), bytes(16))), "claims|not a readable"),
        (archive(probs=array((1, 2), bytes(16), "|O")), "pickled objects"),
        (archive(probs=array((12_500_000, 2), bytes(200_000_000))), r"holds 0.2 GB in a file of 0.000 GB"),
    ],
    ids=["huge", "overflow", "negative", "objects", "bomb"],
)
def test_archives_that_would_fill_the_memory(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        Predictions.load(tmp_path / "p.npz")
