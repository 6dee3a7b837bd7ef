"""What every process of a group checks; `tests/test_distributed.py` starts them. Each function takes (rank, size)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bayesdl as bdl
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.passes import Fit
from bayesdl.curvature.plan import plan
from bayesdl.distributed import resolve_group, share_of, together
from bayesdl.errors import ArgumentError, DistributedError, NonFiniteError, NumericalError
from bayesdl.evaluation import METRICS, ClassificationStream, MetricStream, Predictions, in_order
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests.evaluation.made_up import classes

STRUCTURES: tuple[Any, ...] = ("full", "diag", "kron", "ekfac", "lowrank", {"0": "full", "*": "ekfac"})
COUNT = 13


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def examples(likelihood: str, count: int = COUNT) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, dtype=torch.float64, generator=g)
    if likelihood == "categorical":
        return x, torch.randint(2, (count,), generator=g)
    return x, torch.randn(count, 2, dtype=torch.float64, generator=g)


def in_batches(x: Tensor, y: Tensor, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def sharded(x: Tensor, y: Tensor, rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Uneven on purpose: each process has about twice as much as the one before it."""
    edges = [round(len(x) * (2**i - 1) / (2**size - 1)) for i in range(size + 1)]
    mine = slice(edges[rank], edges[rank + 1])
    return in_batches(x[mine], y[mine])


def padded(x: Tensor, y: Tensor, rank: int, size: int, **options: Any) -> DataLoader:
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size=3, sampler=DistributedSampler(data, size, rank, **options))


def fitted(net: nn.Module, data: Any, likelihood: str, structure: Any = "kron", **options: Any) -> Fit:
    view = Network(net)
    example = next(iter(data))[0]
    with together(resolve_group(options.get("distributed"))):
        layout = plan(view, example)
    return fit_curvature(
        view, layout, data, resolve(likelihood), structure=structure, progress=False, **{"kind": "ggn", **options}
    )


def agree(found: Fit, expected: Fit) -> None:
    assert found.num_data == expected.num_data
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    assert len(found.parts) == len(expected.parts)
    for mine, theirs in zip((found.curvature, *found.parts), (expected.curvature, *expected.parts), strict=True):
        close(mine.to_dense(), theirs.to_dense())
    if expected.squared_error is not None:
        close(found.squared_error, expected.squared_error)


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * max(1.0, float(expected.abs().max())))


def same_everywhere(*tensors: Tensor) -> None:
    """Bit for bit."""
    for tensor in tensors:
        theirs = tensor.detach().clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, tensor)


def curvature_is_that_of_one_process(rank: int, size: int) -> None:
    """Every structure, kind and likelihood, on uneven shares and on evened-out ones."""
    net = network()
    for likelihood in ("categorical", "gaussian"):
        x, y = examples(likelihood)
        for structure in STRUCTURES:
            for kind in ("ggn", "empirical"):
                options = {"structure": structure, "kind": kind}
                alone = fitted(net, in_batches(x, y), likelihood, **options)
                shares: list[Any] = [sharded(x, y, rank, size), padded(x, y, rank, size, shuffle=kind == "ggn")]
                for share in shares:
                    whole = fitted(net, share, likelihood, distributed=True, **options)
                    agree(whole, alone)
                    same_everywhere(*whole.curvature.tensors().values())


def more_processes_than_examples(rank: int, size: int) -> None:
    """A process whose share is padding alone adds nothing."""
    x, y = examples("gaussian", size - 1)
    share = padded(x, y, rank, size, shuffle=False)
    agree(fitted(network(), share, "gaussian", distributed=True), fitted(network(), [(x, y)], "gaussian"))


def groups_of_processes(rank: int, size: int) -> None:
    """A group is a part of the processes; the others may do something else meanwhile."""
    pair = dist.new_group([1, 0] if size == 2 else [1, 3])
    x, y = examples("categorical")
    alone = fitted(network(), in_batches(x, y), "categorical")
    place = dist.get_rank(pair)
    if place < 0:
        with pytest.raises(ArgumentError, match="no member"):
            resolve_group(pair)
        return
    agree(fitted(network(), sharded(x, y, place, 2), "categorical", distributed=pair), alone)


def shares_that_do_not_add_up(rank: int, size: int) -> None:
    x, y = examples("categorical")
    net = network()
    left_out = padded(x, y, rank, size, drop_last=True)
    with pytest.raises(ArgumentError, match=f"saw {COUNT - COUNT % size} examples.*holds {COUNT}.*drop_last=False"):
        fitted(net, left_out, "categorical", distributed=True)
    partial = fitted(net, left_out, "categorical", distributed=True, allow_partial=True)
    assert partial.num_data == COUNT - COUNT % size
    with pytest.raises(ArgumentError, match="one of .* shares.*distributed=True"):
        fitted(net, padded(x, y, rank, size), "categorical")
    assert fitted(net, padded(x, y, rank, size), "categorical", distributed=False).num_data == -(-COUNT // size)
    with pytest.raises(ArgumentError, match="share 0 of 7"):
        fitted(net, padded(x, y, 0, 7), "categorical", distributed=True)


class Repeating(DistributedSampler):
    """Yields every example of its share twice."""

    def __iter__(self) -> Any:
        return iter([index for index in super().__iter__() for _ in range(2)])

    def __len__(self) -> int:
        return 2 * super().__len__()


def samplers_of_others(rank: int, size: int) -> None:
    x, y = examples("categorical", 12)
    data = TensorDataset(x, y)
    repeating = DataLoader(data, batch_size=3, sampler=Repeating(data, size, rank))
    with pytest.raises(ArgumentError, match="saw 24 examples.*holds 12.*repeats"):
        fitted(network(), repeating, "categorical", distributed=True)


def accelerated(rank: int, size: int) -> None:
    """Loaders that accelerate prepared: what their even batches repeat is left out, except where that is not known."""
    loaders = pytest.importorskip("accelerate.data_loader")
    for count, batch in ((COUNT, 4), (COUNT, 8), (8, 4), (2, 4), (1, 4), (29, 4)):
        x, y = examples("categorical", count)
        plain = DataLoader(TensorDataset(x, y), batch_size=batch)
        alone = fitted(network(), [(x, y)], "categorical")
        for even, split in ((True, False), (False, False), (True, True), (False, True)):
            options = {"num_processes": size, "process_index": rank, "even_batches": even, "split_batches": split}
            if count < batch * size and not even:
                continue  # a process might have no batch at all
            shared = loaders.prepare_data_loader(plain, **options)
            agree(fitted(network(), shared, "categorical", distributed=True), alone)
    x, y = examples("categorical")

    class Short(torch.utils.data.BatchSampler):
        """Of a kind that nobody knows."""

    drawn = Short(torch.utils.data.SequentialSampler(range(COUNT)), 2, False)
    own = DataLoader(TensorDataset(x, y), batch_sampler=drawn)
    with pytest.raises(ArgumentError, match="saw .* examples.*holds 13.*even_batches=False"):
        shared = loaders.prepare_data_loader(own, num_processes=size, process_index=rank)
        fitted(network(), shared, "categorical", distributed=True)

    class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Any:
            return iter(zip(x, y, strict=True))

    plain = DataLoader(Stream(), 2)
    streamed = loaders.prepare_data_loader(plain, num_processes=size, process_index=rank, dispatch_batches=False)
    with pytest.raises(ArgumentError, match="one of . shares.*IterableDatasetShard.*distributed=True"):
        share_of(streamed, None, None)
    with pytest.raises(ArgumentError, match="nobody knows how many"):
        share_of(streamed, True, resolve_group(True))


def an_error_on_one_process_is_one_on_all(rank: int, size: int) -> None:
    x, y = examples("categorical")
    net = network()
    share = sharded(x.clone(), y, rank, size)
    if rank == 1:
        share[-1][0][0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="NaN"):
            fitted(net, share, "categorical", structure="diag", distributed=True)
    else:
        with pytest.raises(DistributedError, match=f"process 1 of {size} raised"):
            fitted(net, share, "categorical", structure="diag", distributed=True)
    share = sharded(x, y, rank, size)
    for call in (bdl.curvature.estimate, lambda *a, **k: bdl.wrap(a[0], "laplace", a[1], likelihood=a[2], **k)):
        with pytest.raises(ArgumentError if rank == 0 else DistributedError, match="no batch" if rank == 0 else "0"):
            call(net, [] if rank == 0 else share, "categorical", distributed=True, progress=False)
    with pytest.raises(NumericalError, match="exactly zero"):  # decided on the sum: all of them see it
        fitted(_saturated(), in_batches(x, 0 * y), "categorical", distributed=True)
    # and everything still works
    assert fitted(net, share, "categorical", distributed=True).num_data == COUNT


def _saturated() -> nn.Module:
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.bias.copy_(torch.tensor([1e4, -1e4]))
    return net


def networks_that_differ(rank: int, size: int) -> None:
    x, y = examples("categorical")
    share = sharded(x, y, rank, size)
    with pytest.raises(ArgumentError, match="different weights"):
        bdl.curvature.estimate(network(rank), share, "categorical", distributed=True, progress=False)
    net = network()
    net[1].running_mean.add_(rank)  # as after data-parallel training
    found = bdl.curvature.estimate(net, share, "categorical", distributed=True, progress=False)
    close(found.to_dense(), fitted(network(), in_batches(x, y), "categorical").curvature.to_dense())
    assert float(net[1].running_mean[0]) == rank


def wrapped_models_agree(rank: int, size: int) -> None:
    """Whatever is chosen, and on whose data: the same posterior on every process."""
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    for likelihood in ("categorical", "gaussian"):
        x, y = examples(likelihood)
        share = padded(x, y, rank, size)
        net = network()
        for select, form in (("all", net), ("last_layer", DistributedDataParallel(net))):
            prior = bdl.GaussianPrior(precision=2.0)
            given: dict[str, Any] = {"likelihood": likelihood, "select": select, "progress": False}
            options = {**given, "distributed": True}
            alone = bdl.wrap(net, "laplace", in_batches(x, y), prior=prior, **given)
            whole = bdl.wrap(form, "laplace", share, prior=prior, **options)
            close(whole.log_evidence(), alone.log_evidence())
            a, b = whole(inputs), alone(inputs)
            close(a.latent.covariance, b.latent.covariance)
            same_everywhere(a.mean, a.variance)
            held_out = examples(likelihood, 5 + rank)
            for tuned in (
                bdl.wrap(form, "laplace", share, **options),
                bdl.wrap(form, "laplace", share, validation=[held_out], **options),
                whole.tune("evidence"),
                whole.tune("loo", distributed=True),
                whole.tune("heldout", [held_out], distributed=True),
            ):
                assert isinstance(tuned.posterior, GaussianPosterior)
                same_everywhere(tuned.posterior.precision, tuned(inputs).mean, tuned(inputs).variance)
                topics = [finding.topic for finding in tuned.record.findings if finding.severity == "info"]
                assert topics.count("prior") == 1
        with pytest.raises(
            ArgumentError if rank == 0 else DistributedError, match="not trained on" if rank == 0 else "0 of"
        ):
            whole.tune("heldout", None, distributed=True)
    plain = bdl.wrap(net, "map", [(inputs, inputs[:, :2])], likelihood="gaussian", progress=False)
    chosen = plain.tune("heldout", [examples("gaussian", 5 + rank)], distributed=True)
    assert not torch.equal(chosen.likelihood.noise, plain.likelihood.noise)
    same_everywhere(chosen.likelihood.noise, chosen(inputs).variance)
    with pytest.raises(ArgumentError, match='method "map".*"laplace" only'):
        bdl.wrap(net, "map", likelihood="categorical", distributed=True)


def draws_of_targets_differ_between_processes(rank: int, size: int) -> None:
    """Monte Carlo: every process draws for its own share; many draws reach the exact curvature."""
    x, y = examples("categorical")
    share = [(x[:1], y[:1])]
    drawn = fitted(network(), share, "categorical", "diag", kind="mc", distributed=True).curvature.to_dense()
    alone = fitted(network(), share, "categorical", "diag", kind="mc").curvature.to_dense()
    again = fitted(network(), share, "categorical", "diag", kind="mc", distributed=True).curvature.to_dense()
    assert torch.equal(drawn, again)
    if size > 2:  # with one seed for all of them, the sum would be a multiple
        assert not torch.allclose(drawn, size * alone)
    fit = fitted(network(), share, "categorical", "diag", kind="mc", samples=4000, distributed=True)
    exact = fitted(network(), share, "categorical", "diag").curvature.to_dense() * size
    # a binary outcome: the relative error has standard deviation below 1 / sqrt(8000) times a few
    torch.testing.assert_close(fit.curvature.to_dense(), exact, rtol=0.2, atol=1e-3 * float(exact.abs().max()))


def tensors_of_all_kinds_travel(rank: int, size: int) -> None:
    """Small ones packed, large ones alone, transposed ones, several dtypes, empty ones; and bytes."""
    group = resolve_group(True)
    assert group is not None and (group.rank, group.size) == (rank, size)

    def mine(scale: int) -> list[Tensor]:
        base = [
            torch.arange(6.0).reshape(2, 3).T,
            torch.arange(40, dtype=torch.int64),
            torch.ones((), dtype=torch.float64) / 3,
            torch.zeros(0),
            torch.arange(5.0),
            torch.full((9,), 2**60, dtype=torch.int64) // size,
        ]
        return [value * scale for value in base]

    for limit in (1, 64, 1 << 20):  # bytes of a bucket
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayesdl.distributed.BUCKET", limit)
            added, spread = mine(rank + 1), mine(rank + 1)
            group.add(added)
            group.spread(spread)
        for found, expected in zip(added, mine(size * (size + 1) // 2), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-15, atol=0.0)
        for found, expected in zip(spread, mine(1), strict=True):
            assert torch.equal(found, expected)
    assert group.largest([rank, -rank, 7]) == [size - 1, 0, 7]
    for text in (b"", b"\x00\xff" * 1000):
        assert group.message(text if rank == 0 else b"other") == text


def metrics_of_all_processes(rank: int, size: int) -> None:
    """States that are summed over processes, and predictions put in the order of the data, are those of one process."""
    whole = classes(90, sharpness=1.4)
    rows = list(DistributedSampler(TensorDataset(torch.arange(90)), size, rank, shuffle=True))  # pads where it must
    mine = list(range(rank, 90, size))
    names = ("nll", "accuracy", "ece", "mce")
    for make in (ClassificationStream, lambda: MetricStream(names)):
        stream, expected = make(), make()
        for share, into in ((whole.subset(torch.tensor(mine)), stream), (whole, expected)):
            if isinstance(into, MetricStream):
                into.update(share)
            else:
                into.update(share.labelled(), probs=share.probs)
        state = stream.state()
        for value in state.values():
            dist.all_reduce(value)
        total = make()
        total.load(state)
        assert total.compute() == pytest.approx(expected.compute(), rel=1e-12)
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, (rows, whole.subset(torch.tensor(rows)).log_probs, whole.labelled()[rows]))
    made = [Predictions(task="classification", log_probs=log_probs, targets=y) for _, log_probs, y in parts]
    joined = in_order(made, [index for index, _, _ in parts], 90)
    assert torch.equal(joined.probs, whole.probs) and torch.equal(joined.labelled(), whole.labelled())
    for name in ("aurc", "smece", "error_auroc"):  # what needs all scores
        assert METRICS[name].fn(joined) == METRICS[name].fn(whole)


ALL: tuple[Callable[[int, int], None], ...] = (
    tensors_of_all_kinds_travel,
    curvature_is_that_of_one_process,
    more_processes_than_examples,
    groups_of_processes,
    shares_that_do_not_add_up,
    samplers_of_others,
    accelerated,
    an_error_on_one_process_is_one_on_all,
    networks_that_differ,
    wrapped_models_agree,
    draws_of_targets_differ_between_processes,
    metrics_of_all_processes,
)


def everything(rank: int, size: int) -> None:
    for check in ALL:
        try:
            check(rank, size)
        except BaseException as error:
            error.add_note(f"in {check.__name__}, process {rank} of {size}")
            raise
        dist.barrier()


def a_little(rank: int, size: int) -> None:
    """The checks that the default suite can afford."""
    tensors_of_all_kinds_travel(rank, size)
    x, y = examples("gaussian")
    for share in (sharded(x, y, rank, size), padded(x, y, rank, size)):
        assert share_of(share, True, resolve_group(True)).total in (None, COUNT)
        agree(
            fitted(network(), share, "gaussian", "ekfac", distributed=True),
            fitted(network(), in_batches(x, y), "gaussian", "ekfac"),
        )
    an_error_on_one_process_is_one_on_all(rank, size)
