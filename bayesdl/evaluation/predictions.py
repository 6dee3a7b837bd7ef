"""The cached input of every report: what a method predicted for N examples, with or without their targets."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, BayesDLError, FileFormatError, UnsupportedError
from bayesdl.evaluation import dropping, fields, validation
from bayesdl.evaluation.archive import read_archive, which_forecast, write_archive
from bayesdl.evaluation.decomposition import Split, log_complement, split_bernoulli, split_categorical, split_moments
from bayesdl.evaluation.draws import Draws, checked_samples
from bayesdl.evaluation.members import class_fields, log_of, moment_fields, raw_scores
from bayesdl.evaluation.regression import Mixture, interval_of
from bayesdl.predictive import Predictive
from bayesdl.tensorfile import DAMAGE

Task = Literal["classification", "multilabel", "regression", "count"]
FORMAT = "bayesdl-predictions-1"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What one method predicts for N examples: S members (S = 1: one network or a closed form), C classes or D outputs.

    Attributes:
        task: "classification" (C classes, binary always as two columns), "multilabel", "regression" or "count".
        targets: classification (N,) int64; multilabel (N, C) of 0 and 1; regression and count (N, D). None: unlabelled,
            which is enough for an out-of-distribution set.
        log_probs: (S, N, C), normalised log-probabilities in nats; multilabel: log P(label c is 1).
        means, variances: (S, N, D), moments of the Gaussian components of y, noise included.
        samples: (S, N, D), draws of y where nothing else is known of a regression's predictive; see `from_samples`.
        member_weights: (S,) float64 summing to 1; None means equal.
        total, aleatoric, epistemic: nats (N,) for classification and multilabel, variances (N, D) else. Draws of y
            have a total alone.
        log_prob: (N,), the predictive's own log-density of the targets, where it was built from a `Predictive`.
        max_logit, energy: (N,), OOD scores (higher is more OOD) of the raw outputs, where those are known.
        group: (N,) int64 cluster or subject of each example. name: of the data set. meta: JSON-serialisable notes.

    Raises:
        ShapeError, LabelError, NonFiniteError, ArgumentError: the arrays do not fit the task or each other.
    """

    task: Task
    targets: Tensor | None = None
    log_probs: Tensor | None = None
    means: Tensor | None = None
    variances: Tensor | None = None
    samples: Tensor | None = None
    member_weights: Tensor | None = None
    total: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    log_prob: Tensor | None = None
    max_logit: Tensor | None = None
    energy: Tensor | None = None
    group: Tensor | None = None
    name: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in fields.EXAMPLE_AXIS}
        for name, value in fields.check_predictions(self.task, given).items():
            object.__setattr__(self, name, value)
        if self.total is None:
            split = self._split()
            for part in ("total", "aleatoric", "epistemic"):
                object.__setattr__(self, part, getattr(split, part))

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_predictive(
        cls,
        predictive: Any,
        targets: Any = None,
        *,
        group: Any = None,
        name: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """Read a `Predictive` through its public attributes; `targets` (N, ...) as its likelihood takes them, or None.

        Positions (tokens, pixels) become examples of their own; those whose target is ignored are left out.

        A Bernoulli with one output becomes two-class classification, so that every classification metric applies to it.
        The members are kept where the latent's samples are the members of the predictive (an ensemble), and their
        mean alone where a link lies in between.
        """
        task = predictive.task
        if targets is not None:
            targets = validation.tensor(targets, "targets")
        if isinstance(predictive, Predictive) and task == "classification":
            if targets is None:
                predictive = predictive.flat()
            else:
                group = None if group is None else validation.tensor(group, "group")
                predictive, targets, group = predictive.observed(targets, group)
        fields_: dict[str, Any] = {
            "total": predictive.total,
            "aleatoric": predictive.aleatoric,
            "epistemic": predictive.epistemic,
            "log_prob": None if targets is None else predictive.log_prob(targets),
            "group": group,
            "name": name,
            "meta": dict(meta or {}),
        }
        if task in fields.CLASS_TASKS:
            fields_ |= class_fields(predictive)
            if task == "multilabel" and fields_["log_probs"].shape[-1] == 1:
                task = "classification"
                log_prob = fields_["log_probs"]
                fields_["log_probs"] = torch.cat([log_complement(log_prob), log_prob], -1)
                targets = None if targets is None else targets.reshape(-1).to(torch.int64)
        else:
            fields_ |= moment_fields(predictive, task)
            if targets is not None and targets.dim() == 1 and fields_["means"].shape[-1] == 1:
                targets = targets[:, None]
        return cls(task=task, targets=targets, **fields_)

    @classmethod
    def from_logits(cls, logits: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Classification from raw outputs (N, C), or (S, N, C) for S members; `rest` are further fields."""
        logits = validation.logits(logits)
        logits = logits[None] if logits.dim() == 2 else logits
        raw = raw_scores(logits, validation.member_weights(rest.get("member_weights"), len(logits)))
        return cls(task="classification", targets=targets, log_probs=logits.log_softmax(-1), **(raw | rest))

    @classmethod
    def from_probs(cls, probs: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Classification from probabilities (N, C) or (S, N, C); (N,) is the probability of label 1 of two."""
        coarse = getattr(probs, "dtype", None) in (*validation.HALF, np.float16)
        probs = validation.probabilities(probs)
        if probs.dim() == 1:
            probs = torch.stack([1 - probs, probs], -1)
        log_probs = log_of(probs[None] if probs.dim() == 2 else probs, coarse)
        return cls(task="classification", targets=targets, log_probs=log_probs, **rest)

    @classmethod
    def from_gaussian(cls, mean: Any, variance: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Regression from Gaussian moments (N,), (N, D) or, for a mixture of S, (S, N, D), noise included."""
        flat = validation.tensor(mean, "mean").dim() == 1
        means, variances = validation.moments(mean, variance)
        if flat and targets is not None:
            targets = validation.real_targets(targets, tuple(means.shape[1:2]))[:, None]
        return cls(task="regression", targets=targets, means=means, variances=variances, **rest)

    @classmethod
    def from_samples(cls, samples: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Regression from draws of y (S, N) or (S, N, D), S >= 2, noise included; `rest` are further fields.

        Scores are then fair estimators; nothing that needs a density or the epistemic part is defined.
        """
        flat = validation.tensor(samples, "samples").dim() == 2
        draws = checked_samples(samples)
        if len(draws) < 2:
            raise validation.UndefinedError(
                "samples holds one draw, which has no spread; give at least two", "one draw"
            )
        law = Draws(validation.wide(draws))
        if flat and targets is not None:
            targets = validation.real_targets(targets, tuple(draws.shape[1:2]))[:, None]
        own: dict[str, Any] = {"samples": draws, "means": law.mean[None], "total": law.variance}
        return cls(task="regression", targets=targets, **(own | rest))

    # -- views -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of examples N."""
        return self._members.shape[1]

    @property
    def num_members(self) -> int:
        """S."""
        return self._members.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._members.device

    @property
    def num_outputs(self) -> int:
        """C or D."""
        return self._members.shape[2]

    @cached_property
    def log_mean_probs(self) -> Tensor:
        """(N, C) float64, log of the members' mean probability."""
        if self.log_probs is None:
            raise UnsupportedError(f"predictions of a {self.task} task have no class probabilities; use .mean")
        members = validation.wide(self.log_probs)
        if self.num_members == 1:
            return members[0]
        if self.member_weights is None:
            return members.logsumexp(0) - math.log(self.num_members)
        return (members + self.member_weights.log().to(members.device)[:, None, None]).logsumexp(0)

    @cached_property
    def probs(self) -> Tensor:
        """(N, C) float64, mean probability."""
        return self.log_mean_probs.exp()

    @cached_property
    def confidence(self) -> Tensor:
        """(N,) float64, maximal mean probability; classification only."""
        self._need("classification", "a confidence")
        return self.probs.amax(-1).clamp_max(1.0)

    @cached_property
    def predicted(self) -> Tensor:
        """(N,) int64, lowest index among the maximal mean probabilities; classification only."""
        self._need("classification", "a predicted class")
        return self.probs.argmax(-1)

    @cached_property
    def correct(self) -> Tensor:
        """(N,) bool, predicted == targets; classification only."""
        return self.predicted == self.labelled()

    @property
    def num_tied(self) -> int:
        """Number of rows in which several classes share the maximal mean probability."""
        self._need("classification", "a predicted class")
        return int(((self.probs == self.probs.amax(-1, keepdim=True)).sum(-1) > 1).sum())

    @cached_property
    def mixture(self) -> Mixture:
        """Gaussian mixture of y, noise included; regression, and count where the components are known."""
        if self.means is None:
            raise UnsupportedError(f"predictions of a {self.task} task have no Gaussian components")
        if self.variances is None:
            raise validation.UndefinedError("these predictions hold no Gaussian components of y", "no components")
        return Mixture.of(self.means, self.variances, self.member_weights)

    @cached_property
    def law(self) -> Mixture | Draws:
        """What is known of y, noise included: its Gaussian mixture, or draws. Errors as of `mixture`."""
        return self.mixture if self.samples is None else Draws(validation.wide(self.samples))

    @cached_property
    def mean(self) -> Tensor:
        """(N, D) float64, mean of y; regression and count."""
        if self.means is None:
            raise UnsupportedError(
                f"predictions of a {self.task} task have probabilities instead of a mean; use .probs"
            )
        return Mixture.of(self.means, torch.ones_like(self.means), self.member_weights).mean

    @property
    def variance(self) -> Tensor:
        """(N, D) float64, variance of y, noise included; regression and count."""
        if self.means is None or self.total is None:
            raise UnsupportedError(f"predictions of a {self.task} task have no variance; use .total")
        return validation.wide(self.total)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower (N, D), upper (N, D)); computed once per level."""
        level = validation.fraction(level, "level")
        if level not in self._intervals:
            self._intervals[level] = interval_of(self.law, level)
        return self._intervals[level]

    def labelled(self) -> Tensor:
        """The targets.

        Raises:
            UndefinedError: there are none.
        """
        if self.targets is None:
            raise validation.UndefinedError(f"predictions {self.name!r} have no targets", "no targets")
        return self.targets

    def __repr__(self) -> str:
        members = f"{self.num_members} members, " if self.num_members > 1 else ""
        labels = "labelled" if self.targets is not None else "unlabelled"
        return f"Predictions({self.task}, {members}{len(self)} examples, {self.num_outputs} outputs, {labels})"

    # -- values ------------------------------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> Predictions:
        """Apply `fn` to every tensor, for instance ``lambda t: t.cpu()``."""
        mapped: dict[str, Any] = {key: fn(value) for key, value in self._tensors().items()}
        return replace(self, **mapped)

    def subset(self, index: Tensor) -> Predictions:
        """The examples chosen by a boolean mask (N,) or by positions."""
        index = validation.tensor(index, "index")
        where = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        axes = fields.EXAMPLE_AXIS
        chosen: dict[str, Any] = {
            key: value.index_select(axis, where.to(value.device))
            for key, value in self._tensors().items()
            if (axis := axes[key]) is not None
        }
        # what was dropped is numbered in the whole data set, of which this is a part
        return replace(self, meta={k: v for k, v in self.meta.items() if k != dropping.DROPPED}, **chosen)

    def without_targets(self) -> Predictions:
        """The same forecasts unlabelled, as an OOD set whose labels mean nothing here."""
        return replace(self, targets=None, log_prob=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `.npz`, atomically (temporary file, fsync, rename); the name is kept as given."""
        header = {"format": FORMAT, "task": self.task, "name": self.name, "meta": dict(self.meta)}
        write_archive(path, header, {key: value.cpu().numpy() for key, value in self._tensors().items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, nan: str = "raise") -> Predictions:
        """Read what `save` wrote, or a hand-made `.npz` with `logits|log_probs|probs`, with `mean` and `variance`,
        or with `samples`, plus `targets` and `group` where known. Pickled content is refused.

        With `nan="drop"`, examples that are not finite are left out and numbered in `meta["dropped"]`.

        Raises:
            FileFormatError: the file is no such archive; the message names the key that is wrong.
        """
        dropping.check_choice(nan)
        arrays = read_archive(path)
        try:
            if "header" not in arrays:
                return cls._from_arrays(arrays, nan)
            header = json.loads(str(arrays.pop("header")))
            if header.get("format") != FORMAT:
                raise FileFormatError(f"format {header.get('format')!r}, expected {FORMAT!r}")
            if unknown := sorted(set(arrays) - set(fields.EXAMPLE_AXIS)):
                raise FileFormatError(f"unknown keys {', '.join(unknown)}")
            name, meta = header["name"], header["meta"]
            if not isinstance(name, str) or not isinstance(meta, dict):
                raise FileFormatError("its name or its notes are damaged")
            return cls(task=header["task"], name=name, meta=meta, **arrays)
        except (BayesDLError, *DAMAGE) as error:
            raise FileFormatError(f"{path}: {error}") from error

    # -- inside ------------------------------------------------------------------------------------------------------

    @classmethod
    def _from_arrays(cls, arrays: dict[str, Any], nan: str) -> Predictions:
        if nan == "drop":
            kept, out = dropping.finite_arrays(arrays)
            made = cls._from_arrays(kept, "raise")
            return replace(made, meta={dropping.DROPPED: out}) if out else made
        key, rest = which_forecast(arrays), {k: arrays[k] for k in ("targets", "group") if k in arrays}
        if key == "mean":
            return cls.from_gaussian(arrays["mean"], arrays["variance"], **rest)
        if key == "log_probs":
            log_probs = validation.tensor(arrays[key], "log_probs")
            log_probs = log_probs[None] if log_probs.dim() == 2 else log_probs
            return cls(task="classification", log_probs=log_probs, **rest)
        make: dict[str, Any] = {"logits": cls.from_logits, "probs": cls.from_probs, "samples": cls.from_samples}
        return make[key](arrays[key], **rest)

    @property
    def _members(self) -> Tensor:
        members = self.means if self.log_probs is None else self.log_probs
        if members is None:
            raise UnsupportedError("predictions without members")
        return members

    @cached_property
    def _intervals(self) -> dict[float, tuple[Tensor, Tensor]]:
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return {key: value for key in fields.EXAMPLE_AXIS if (value := getattr(self, key)) is not None}

    def _need(self, task: str, what: str) -> None:
        if self.task != task:
            raise UnsupportedError(f"predictions of a {self.task} task have no {what}")

    def _split(self) -> Split:
        if self.task == "classification":
            return split_categorical(self._members, self.member_weights)
        if self.task == "multilabel":
            return split_bernoulli(self._members, self.member_weights)
        if self.variances is None:
            raise ArgumentError("predictions of counts without components need total, aleatoric and epistemic")
        return split_moments(self._members, self.variances, self.member_weights)
