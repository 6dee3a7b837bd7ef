"""Anchors: the examples on which a scale of the noise is judged, and the losses it is judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.batch import flatten_tensors, index_batch
from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.likelihoods import Likelihood
from bayesdl.network import Network

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits (S, B, C), the network's own (B, C), y -> (B,)
METRICS = ("nll", "nll-relative", "gibbs", "flip")
LABELS = ("auto", "pseudo", "given")
RELATIVE_FLOOR = 0.01  # nats, below which a relative change would be one of noise


@final
@dataclass(frozen=True)
class Batch:
    """A batch of anchors on the CPU.

    Attributes:
        number: of the loader's batch.
        inputs: prepared by nobody yet.
        plain: outputs of the network itself, `(B, C)`.
        target: labels, given or its own, as the likelihood takes them.
        rows: which of the loader's batch these are, ascending.
    """

    number: int
    inputs: Any
    plain: Tensor
    target: Tensor
    rows: Tensor

    def every(self, stride: int, offset: int) -> Batch | None:
        """One example of `stride`, or None where the batch has none of them."""
        index = torch.arange(offset, len(self.plain), stride)
        if not len(index):
            return None
        picked = index_batch(self.inputs, index)
        plain, target, rows = self.plain[index], self.target[index], self.rows[index]
        return dataclasses.replace(self, inputs=picked, plain=plain, target=target, rows=rows)


@final
@dataclass(frozen=True)
class Anchors:
    """All of them.

    Attributes:
        batches: in loader order.
        labels: "given" or "pseudo".
        count: examples.
    """

    batches: tuple[Batch, ...]
    labels: str
    count: int

    def every(self, stride: int) -> Anchors:
        """One example of `stride`."""
        if stride == 1:
            return self
        picked, seen = [], 0
        for batch in self.batches:
            part = batch.every(stride, -seen % stride)
            seen += len(batch.plain)
            if part is not None:
                picked.append(part)
        return Anchors(tuple(picked), self.labels, sum(len(batch.plain) for batch in picked))


def gather(
    network: Network, likelihood: Likelihood, data: Iterable[Any], count: int, labels: str, progress: bool = False
) -> Anchors:
    """The first `count` examples of a loader, with the network's own outputs, on the CPU.

    Args:
        labels: "given", "pseudo" (the network's most probable answer, or its mean), or "auto": given where there are.

    Raises:
        ArgumentError: no example, or no labels where they must be given.
        ShapeError: another number of outputs than inputs.
    """
    if labels not in LABELS:
        raise UnknownNameError(f"labels={labels!r} is not known; choose one of {LABELS}")
    if count < 1:
        raise ArgumentError(f"anchors={count}; expected at least 1")
    found: list[Batch] = []
    source, seen = "", 0
    with torch.no_grad():
        for number, inputs, target in batches(network, data, progress=progress, describe="anchors", need_targets=False):
            with in_batch(number):
                inputs, target = _first(inputs, target, count - seen)
                own = "pseudo" if labels == "pseudo" or (labels == "auto" and target is None) else "given"
                if own == "given" and target is None:
                    raise ArgumentError('labels="given", and the batch holds no labels; use labels="pseudo"')
                if source not in ("", own):
                    raise ArgumentError("some batches hold labels and others do not; use labels='pseudo'")
                source = own
                plain = likelihood.check_outputs(network(inputs))
                if len(plain) != batch_size_of(inputs):
                    raise ShapeError(f"outputs {tuple(plain.shape)} for {batch_size_of(inputs)} inputs")
                y = _answers(likelihood, plain) if own == "pseudo" else torch.as_tensor(target)
                y = likelihood.check_targets(plain, y)
            keep = _to_cpu(inputs)
            found.append(Batch(number, keep, plain.cpu(), y.cpu(), torch.arange(len(plain))))
            seen += len(plain)
            if seen >= count:
                break
    return Anchors(tuple(found), source, seen)


def batch_size_of(inputs: Any) -> int:
    """Rows of the leading tensor."""
    return len(flatten_tensors(inputs)[0][0])


def check_metric(metric: str | Metric) -> None:
    """Raise `UnknownNameError` for a name that is none."""
    if not callable(metric) and metric not in METRICS:
        raise UnknownNameError(f"metric={metric!r} is not known; choose one of {METRICS} or pass a callable")


def losses(likelihood: Likelihood, metric: str | Metric, outputs: Tensor, batch: Batch) -> Tensor:
    """Loss of every observation of a batch `(n,)`, float64; masked positions are left out.

    Args:
        metric: "nll", "nll-relative": -log of the mean over draws of p(y); "gibbs": the mean over draws of -log p(y);
            "flip": whether the most probable answer leaves that of the network itself; or a callable.
        outputs: `(S, B, C)`.
    """
    plain, target = batch.plain.to(outputs.device), batch.target.to(outputs.device)
    if callable(metric):
        value = torch.as_tensor(metric(outputs, plain, target))
        if value.shape[:1] != plain.shape[:1]:
            raise ShapeError(
                f"the metric returned {tuple(value.shape)}; expected one number per anchor ({len(plain)},)"
            )
        return value.double().reshape(-1)
    if metric == "flip":
        if likelihood.task != "classification":
            raise UnsupportedError('metric="flip" is for the categorical likelihood; use "nll"')
        mean = outputs.double().softmax(-1).mean(0)
        value = (mean.argmax(-1) != plain.argmax(-1)).double()
    else:
        logs = torch.stack([likelihood.log_prob(draw, target) for draw in outputs.double()])
        value = -logs.mean(0) if metric == "gibbs" else -(torch.logsumexp(logs, 0) - torch.tensor(len(logs)).log())
    counted = likelihood.counted(target)
    return value.reshape(-1) if counted is None else value[counted].reshape(-1)


def mean_loss(
    likelihood: Likelihood,
    metric: str | Metric,
    anchors: Anchors,
    outputs: Callable[[Batch], Tensor],
    what: str,
) -> float:
    """Mean loss over all anchors, of outputs that a function makes batch by batch.

    Raises:
        NonFiniteError: NaN or infinity; `what` and the batch are named.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in anchors.batches:
            made = outputs(batch)
            value = losses(likelihood, metric, made, batch)
            if not (bool(torch.isfinite(made).all()) and bool(torch.isfinite(value).all())):
                raise NonFiniteError(f"{what}, batch {batch.number}: the outputs or the loss hold NaN or infinity")
            total, count = total + float(value.sum()), count + len(value)
    if not count:
        raise ArgumentError("the anchors hold no observation that counts (every label is ignored)")
    return total / count


def _first(inputs: Any, target: Any, count: int) -> tuple[Any, Any]:
    size = batch_size_of(inputs)
    if size <= count:
        return inputs, target
    return index_batch(inputs, slice(0, count)), None if target is None else torch.as_tensor(target)[:count]


def _answers(likelihood: Likelihood, plain: Tensor) -> Tensor:
    if likelihood.task == "classification":
        return plain.argmax(-1)
    if likelihood.task == "multilabel":
        return (plain > 0).to(plain.dtype)
    if likelihood.task == "regression":
        return likelihood.distribution(plain).mean
    raise UnsupportedError(
        f"the {likelihood.name} likelihood has no most probable answer to stand for labels; pass a loader with labels"
    )


def _to_cpu(inputs: Any) -> Any:
    tensors, rebuild = flatten_tensors(inputs)
    return rebuild([tensor.detach().cpu() for tensor in tensors])
