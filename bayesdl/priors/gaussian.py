"""Independent Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, as_numbers
from bayesdl.priors.base import Prior


@final
@dataclass(frozen=True)
class GaussianPrior(Prior):
    """N(mean, diag(1 / precision)).

    Args:
        precision: inverse variance of the weights: a positive number, one per layer (block) in the order of
            `bayes.layers`, one per selected parameter in flat order, or a dictionary from parameter names to numbers.
        mean: a number, a flat vector over the selected parameters, or a dictionary from parameter names to tensors.
        report: how it was found, where `bdl.functional.match` found it.
    """

    precision: float | Sequence[float] | Tensor | Mapping[str, float] = 1.0
    mean: float | Tensor | Mapping[str, Tensor] = 0.0
    report: object = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        named = isinstance(self.precision, Mapping)
        value = as_numbers(
            list(self.precision.values()) if isinstance(self.precision, Mapping) else self.precision, "precision"
        )
        if (
            (named and not value.numel())
            or value.dim() > 1
            or not value.numel()
            or not bool((torch.isfinite(value) & (value > 0)).all())
        ):
            raise ArgumentError(
                f"precision={self.precision!r}; expected a positive finite number, or a vector of them (per layer "
                "or per parameter)"
            )
        means = self.mean if isinstance(self.mean, Mapping) else {"": as_numbers(self.mean, "mean")}
        for key, centre in means.items():
            of = f" of {key!r}" if key else ""
            if not isinstance(centre, Tensor):
                raise ArgumentError(f"the prior's mean{of} is {centre!r}; expected a tensor of the parameter's shape")
            if not bool(torch.isfinite(centre).all()):
                raise ArgumentError(f"the prior's mean{of} holds NaN or infinity")

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in parameters.values()]).double()
        precision = self.per_parameter(parameters).to(flat)
        offset = flat - self.centre(parameters).to(flat)
        log_precision = precision.log().expand_as(flat)
        return 0.5 * (log_precision - precision * offset.square() - torch.log(flat.new_tensor(2 * torch.pi))).sum()

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        sizes = [value.numel() for value in parameters.values()]
        noise = torch.randn(sum(sizes), dtype=torch.float64, generator=generator)
        spread = self.per_parameter(parameters).cpu().rsqrt()
        flat = self.centre(parameters).cpu() + noise * spread
        return {n: d.view(v.shape).to(v) for (n, v), d in zip(parameters.items(), flat.split(sizes), strict=True)}

    def vector(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The precision as a number or a vector, float64: named precisions one per parameter, in the order given.

        Raises:
            ArgumentError: a parameter has no precision by its name.
        """
        if not isinstance(self.precision, Mapping):
            return as_numbers(self.precision, "precision")
        missing = [name for name in parameters if name not in self.precision]
        if missing:
            raise ArgumentError(
                f"the prior names a precision for {sorted(self.precision)} and none for {missing[0]!r}; select the "
                "same parameters that it was made for"
            )
        pieces = [torch.full((value.numel(),), float(self.precision[n])).double() for n, value in parameters.items()]
        return torch.cat(pieces)

    def centre(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The mean as given, a number or flat, or named means as one flat vector in the order given, `(P,)`; float64.

        Raises:
            ArgumentError: a parameter has no mean by its name, or one of another shape.
        """
        if not isinstance(self.mean, Mapping):
            return torch.as_tensor(self.mean, dtype=torch.float64)
        for name, value in parameters.items():
            if name not in self.mean:
                raise ArgumentError(
                    f"the prior names a mean for {sorted(self.mean)} and none for {name!r}; select the same parameters "
                    "that it was made for"
                )
            if self.mean[name].shape != value.shape:
                raise ArgumentError(
                    f"the prior's mean of {name!r} has shape {tuple(self.mean[name].shape)} and the parameter "
                    f"{tuple(value.shape)}"
                )
        return torch.cat([self.mean[name].double().reshape(-1) for name in parameters])

    def per_parameter(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The precision as one number, `(1,)`, or of every weight in the order given, `(P,)`; float64.

        Layers are told apart by the names of `net.named_parameters()`: `encoder.0.weight` and `encoder.0.bias` are one.

        Raises:
            ArgumentError: there are neither one, nor as many as layers, nor as many as weights.
        """
        precision = self.vector(parameters).reshape(-1)
        sizes = torch.tensor([value.numel() for value in parameters.values()])
        if precision.numel() in (1, int(sizes.sum())):
            return precision
        owners = [name.rpartition(".")[0] for name in parameters]
        layers = list(dict.fromkeys(owners))
        if precision.numel() != len(layers):
            raise ArgumentError(
                f"the prior has {precision.numel()} precisions for {int(sizes.sum())} parameters in {len(layers)} "
                "layers; expected one, one per layer or one per parameter (layers are told apart by the names in "
                "net.named_parameters())"
            )
        places = torch.tensor([layers.index(owner) for owner in owners])
        return precision[places.to(precision.device)].repeat_interleave(sizes.to(precision.device))

    def map(self, function: Callable[[Tensor], Tensor]) -> GaussianPrior:
        """Apply `function` to the tensors held."""
        precision = function(self.precision) if isinstance(self.precision, Tensor) else self.precision
        mean: float | Tensor | Mapping[str, Tensor] = self.mean
        if isinstance(mean, Mapping):
            mean = {name: function(value) for name, value in mean.items()}
        elif isinstance(mean, Tensor):
            mean = function(mean)
        return replace(self, precision=precision, mean=mean)
