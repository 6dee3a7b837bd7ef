"""Out-of-distribution scores from features: how far an input lies from what the network has seen in training.

fd = FeatureDensity(kind="relative").fit(bayes, train_loader, calibration=val_loader)
fd.score(x)                                 # (B,), higher is more OOD
fd.p_value(x)                               # (B,), conformal: small is OOD
compare(methods, test, ood=..., scores={"relative": fd})
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, LabelError, NotFittedError, ShapeError
from bayesdl.evaluation.feature_statistics import FeatureReader, FeatureStatistics
from bayesdl.evaluation.ood import p_value
from bayesdl.evaluation.validation import wide
from bayesdl.last_layer.features import last_linear, linear_layer
from bayesdl.linalg import cholesky
from bayesdl.model import BayesianModel
from bayesdl.network import Network, first_inputs

Kind = Literal["mahalanobis", "relative", "single", "density", "knn", "vim"]
_LABELLED = ("mahalanobis", "relative", "density")
# Elements of the largest temporary of the nearest-neighbour search.
CHUNK = 1 << 23


@final
@dataclass(frozen=True)
class FeatureDensity:
    """A score from features; higher is more OOD.

    Args:
        kind: "mahalanobis": least squared distance to a class mean under the covariance shared by the classes (Lee et
            al. 2018). "relative": the same minus the distance under one Gaussian of all features (Ren et al. 2021).
            "single": that one Gaussian alone; needs no labels. "density": -log sum_c pi_c N(z; mu_c, Sigma). "knn":
            distance to the k-th nearest training feature, both of unit length (Sun et al. 2022). "vim": virtual logit
            from the residual of the principal subspace, against the logits (Wang et al. 2022).
        layer: name of a layer whose output is the feature; None takes what the last linear layer is given.
        shrinkage: a of Sigma = (1 - a) S + a tr(S) / d I, in [0, 1].
        k: of "knn". dimension: of the principal subspace of "vim"; None takes 1000, 512 or d / 2 by width, as there.
    """

    kind: Kind = "relative"
    layer: str | None = None
    shrinkage: float = 1e-3
    k: int = 10
    dimension: int | None = None

    def fit(
        self,
        model: nn.Module | Network | BayesianModel,
        data: Iterable[Any],
        *,
        calibration: Iterable[Any] | None = None,
        batch: Any = None,
        progress: bool = True,
    ) -> FittedDensity:
        """Read the features of the training data, off a private clone.

        Args:
            data: the training loader; labels (N,) are class indices where the kind needs them.
            calibration: held-out in-distribution data, for p-values and thresholds.
            batch: batch adapter, where `model` is a plain network.

        Raises:
            ArgumentError: an option out of range, too few examples. LabelError: labels that are no classes.
        """
        self._check()
        network = model.network if isinstance(model, BayesianModel) else model
        network = network if isinstance(network, Network) else Network(network, batch=batch)
        reader = self._reader(network, data)
        statistics: FeatureStatistics | None = None
        bank: list[Tensor] = []
        peak = 0.0
        for z, outputs, target in reader.over(data, progress=progress, targets=self.kind in _LABELLED):
            if self.kind == "knn":
                bank.append(_unit(z))
                continue
            labels = _labels(target, len(z)) if self.kind in _LABELLED else None
            classes = 1 if labels is None else int(labels.max()) + 1
            part = FeatureStatistics.of(z, labels, classes)
            statistics = part if statistics is None else statistics.merge(part)
            peak += float(wide(outputs).amax(-1).sum())
        fitted = FittedDensity(self, reader, self._state(reader, statistics, bank))
        if self.kind == "vim" and statistics is not None:
            residuals = [fitted.residual(z).sum() for z, _, _ in reader.over(data, progress=progress)]
            total = float(torch.stack(residuals).sum())
            if total <= 0:
                raise ArgumentError("vim: training features have no residual; give a smaller dimension=")
            fitted.state["alpha"] = torch.tensor(peak / total, dtype=torch.float64)
        if calibration is not None:
            fitted = FittedDensity(self, reader, fitted.state, fitted.scores(calibration, progress=progress).cpu())
        return fitted

    def _check(self) -> None:
        if self.kind not in get_args(Kind):
            raise ArgumentError(f"kind={self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if not 0.0 <= self.shrinkage <= 1.0:
            raise ArgumentError(f"shrinkage={self.shrinkage!r}: expected a number from 0 to 1")
        if self.k < 1:
            raise ArgumentError(f"k={self.k!r}: expected at least 1")

    def _reader(self, network: Network, data: Iterable[Any]) -> FeatureReader:
        if self.layer is not None and self.kind != "vim":
            names = dict(network.template.named_modules())
            if self.layer not in names:
                raise ArgumentError(f"layer={self.layer!r} is no layer of the network; it has {', '.join(names)}")
            return FeatureReader(network, self.layer, inputs=False)
        if self.layer is not None:
            raise ArgumentError("vim reads the features of the last linear layer; leave layer= out")
        return FeatureReader(network, last_linear(network, first_inputs(data, network.batch)), inputs=True)

    def _state(
        self, reader: FeatureReader, statistics: FeatureStatistics | None, bank: list[Tensor]
    ) -> dict[str, Tensor]:
        if statistics is None:
            whole = torch.cat(bank)
            if len(whole) < self.k:
                raise ArgumentError(f"knn: {len(whole)} training examples have no {self.k}-th nearest neighbour")
            return {"bank": whole}
        if self.kind == "vim":
            return self._subspace(reader, statistics)
        state: dict[str, Tensor] = {}
        if self.kind in _LABELLED:
            seen = statistics.count > 0
            state["means"] = statistics.mean[seen]
            state["log_share"] = (wide(statistics.count[seen]) / statistics.total).log()
            covariance = statistics.covariance(shared=True, shrinkage=self.shrinkage)
            state["factor"] = cholesky(covariance, "covariance of the features")
        if self.kind in ("relative", "single"):
            covariance = statistics.covariance(shared=False, shrinkage=self.shrinkage)
            state["background"] = cholesky(covariance, "covariance of the features")
            state["centre"] = statistics.centre
        return state

    def _subspace(self, reader: FeatureReader, statistics: FeatureStatistics) -> dict[str, Tensor]:
        layer = linear_layer(reader.network, reader.layer)
        weight = wide(layer.weight.detach())
        bias = weight.new_zeros(len(weight)) if layer.bias is None else wide(layer.bias.detach())
        d = weight.shape[1]
        size = (1000 if d >= 2048 else 512 if d >= 768 else d // 2) if self.dimension is None else self.dimension
        if not 0 < size < d:
            raise ArgumentError(f"vim: dimension={size} of {d} features leaves no residual")
        # Features relative to the point where all logits vanish, as far as there is one.
        origin = -torch.linalg.pinv(weight) @ bias
        vectors = torch.linalg.eigh(statistics.scatter_about(origin)).eigenvectors
        return {"origin": origin, "rest": vectors[:, : d - size]}


@final
@dataclass(frozen=True, eq=False)
class FittedDensity:
    """What `FeatureDensity.fit` found. `calibration` (n,): scores of held-out in-distribution data, where given."""

    settings: FeatureDensity
    reader: FeatureReader
    state: dict[str, Tensor]
    calibration: Tensor | None = None

    def score(self, x: Any) -> Tensor:
        """(B,) float64 for a batch of inputs, higher is more OOD."""
        return self._of(*self.reader(x))

    def scores(self, data: Iterable[Any], *, progress: bool = False) -> Tensor:
        """(N,) float64 for all batches of a loader."""
        return torch.cat([self._of(z, outputs) for z, outputs, _ in self.reader.over(data, progress=progress)])

    def p_value(self, x: Any) -> Tensor:
        """(B,), conformal p-values: right for exchangeable data whatever the score.

        Raises:
            NotFittedError: no `calibration` data were given to `fit`.
        """
        return p_value(self.score(x), self._held_out())

    def threshold(self, false_alarm: float) -> float:
        """Inputs that score above it have p <= `false_alarm`; infinite where there are too few calibration scores."""
        held = self._held_out()
        if not 0.0 < false_alarm < 1.0:
            raise ArgumentError(f"false_alarm={false_alarm!r}: expected a number strictly between 0 and 1")
        allowed = math.floor(false_alarm * (len(held) + 1) + 1e-9) - 1
        return math.inf if allowed < 0 else float(held.sort(descending=True).values[allowed])

    def residual(self, features: Tensor) -> Tensor:
        """(B,), length of the features outside the principal subspace of "vim"."""
        return ((features - self.state["origin"]) @ self.state["rest"]).norm(dim=1)

    def _held_out(self) -> Tensor:
        if self.calibration is None:
            raise NotFittedError(
                "p-values need held-out data: FeatureDensity(...).fit(model, data, calibration=loader)"
            )
        return self.calibration

    def _of(self, z: Tensor, outputs: Tensor) -> Tensor:
        kind, state = self.settings.kind, self.state
        if kind == "knn":
            return _neighbour(_unit(z), state["bank"], self.settings.k)
        if kind == "vim":
            return state["alpha"].to(z.device) * self.residual(z) - wide(outputs).logsumexp(-1)
        if kind == "single":
            return _distances(z, state["centre"][None], state["background"])[:, 0]
        each = _distances(z, state["means"], state["factor"])
        if kind == "mahalanobis":
            return each.amin(1)
        if kind == "relative":
            return each.amin(1) - _distances(z, state["centre"][None], state["background"])[:, 0]
        constant = state["factor"].diagonal().log().sum() + 0.5 * z.shape[1] * math.log(2 * math.pi)
        return constant - (state["log_share"] - each / 2).logsumexp(1)


def _distances(z: Tensor, means: Tensor, factor: Tensor) -> Tensor:
    """(B, K), squared Mahalanobis distances."""
    white = torch.linalg.solve_triangular(factor, z.T, upper=False).T
    centres = torch.linalg.solve_triangular(factor, means.T, upper=False).T
    return torch.cdist(white, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def _neighbour(z: Tensor, bank: Tensor, k: int) -> Tensor:
    step = max(1, CHUNK // len(bank))
    nearest = []
    for part in z.split(step):
        # Unit vectors: the k-th smallest distance is the k-th largest cosine.
        cosine = (part @ bank.T).topk(k, dim=1).values[:, -1]
        nearest.append((2 - 2 * cosine).clamp_min(0.0).sqrt())
    return torch.cat(nearest)


def _unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)


def _labels(target: Any, size: int) -> Tensor:
    labels = torch.as_tensor(target)
    if labels.shape != (size,):
        raise ShapeError(f"targets have shape {tuple(labels.shape)}; class features need one label each, ({size},)")
    if labels.is_floating_point() or bool((labels < 0).any()):
        raise LabelError('class features need class indices of at least 0; kind="single" or "knn" needs no labels')
    return labels.to(torch.int64)
