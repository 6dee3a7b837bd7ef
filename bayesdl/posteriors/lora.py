"""Adapter posterior: isotropic noise in the column space of each low-rank update of a peft model."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, FileFormatError, SelectionError, StaleAdapterError, UnsupportedError
from bayesdl.latent import Latent, SampleLatent
from bayesdl.lora.adapters import AdaptedLayer, fingerprint
from bayesdl.lora.draws import Draws, base_noise
from bayesdl.lora.hooks import Injection
from bayesdl.lora.prefix import Prefix, agrees, find_prefix
from bayesdl.lora.report import SearchReport
from bayesdl.lora.tile import Rows, Sharing, run
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

log = logging.getLogger(__name__)

Span = tuple[int, int, int]  # seed, first draw, behind the last one


@final
@dataclass(frozen=True)
class Running:
    """How draws are run.

    Attributes:
        tile: several draws in one forward pass.
        max_rows: bound on its rows; None leaves a bound on tokens.
        share_prefix: "auto", True or False: blocks in front of all noise run once.
        blocks: path of the list of blocks, where it must be named.
    """

    tile: bool = True
    max_rows: int | None = None
    share_prefix: bool | str = "auto"
    blocks: str | None = None


@final
class _Cache:
    """What is derived from the network the posterior is used with; made on first use, for one network at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._draws: tuple[Network, Draws] | None = None
        self.sharing: tuple[Network, Prefix | None] | None = None

    def draws(
        self,
        network: Network,
        layers: tuple[AdaptedLayer, ...],
        stored: tuple[int, Mapping[str, Tensor]] | None = None,
    ) -> Draws:
        with self._lock:
            if self._draws is None or self._draws[0] is not network:
                self._draws = (network, Draws(network.template, layers, stored))
            return self._draws[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cache:
        return _Cache()


@final
@dataclass(frozen=True, eq=False)
class AdapterPosterior(Posterior):
    """Delta W of every layer is s B A + s sigma P Z, P an orthonormal basis of B's columns, Z standard normal.

    Attributes:
        sigma: scale of the noise, common to all layers.
        seed: of the draws.
        layers: those with noise.
        num_samples: draws a prediction by default.
        fingerprint: of all A and B.
        spectra: singular values of each B, `(r,)`, by layer key.
        running: how draws are run.
        report: how sigma was chosen.
        search: what a repeated search takes over, JSON-ready.
        stored: the first draws of this seed, Z `(n, r, in)` by layer key, where a file holds them; otherwise they are
            made again from the seed.
    """

    sigma: float
    seed: int
    layers: tuple[AdaptedLayer, ...]
    num_samples: int
    fingerprint: str
    spectra: Mapping[str, Tensor]
    running: Running = field(default_factory=Running)
    report: SearchReport | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    cache: _Cache = field(default_factory=_Cache, repr=False)

    kind: ClassVar[str] = "adapters"

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and self.sigma < float("inf")):
            raise ArgumentError(f"sigma={self.sigma}; expected a finite number from zero")
        if self.num_samples < 1:
            raise ArgumentError(f"num_samples={self.num_samples}; expected at least 1")
        if self.running.max_rows is not None and self.running.max_rows < 1:
            raise ArgumentError(f"max_rows={self.running.max_rows}; expected at least 1")

    @classmethod
    def of(cls, network: Network, layers: tuple[AdaptedLayer, ...], sigma: float, **rest: Any) -> Self:
        """For the adapters as they are in a network."""
        cache = _Cache()
        roots = cache.draws(network, layers).roots
        spectra = {key: value.spectrum.float() for key, value in roots.items()}
        print_ = fingerprint(network.template, layers)
        return cls(sigma, layers=layers, fingerprint=print_, spectra=spectra, cache=cache, **rest)

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Span:
        return self.reseeded(generator), 0, num_samples or self.num_samples

    def reseeded(self, generator: torch.Generator | None) -> int:
        """The stored seed, or one number of a generator."""
        if generator is None:
            return self.seed
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def push(self, network: Network, inputs: Any, state: Span) -> Latent:
        outputs = self.outputs(network, inputs, state)
        return SampleLatent(outputs, outputs.new_full((len(outputs),), 1.0 / len(outputs)))

    def outputs(self, network: Network, inputs: Any, span: Span, *, form: str = "auto") -> Tensor:
        """Outputs `(S, B, C)` of some draws; `form` as in `bayesdl.lora.hooks.Injection`."""
        network.check_fresh()
        seed, start, stop = span
        call = network.prepare(inputs)
        sharing = self._sharing(network, call, seed)
        return self._run(network, call, (seed, start, stop), sharing, form)

    def injection(self, network: Network, seed: int, form: str = "auto") -> Injection:
        """The noise of this posterior, for passes through a network's clone."""
        return Injection(self.layers, self.draws(network), self.sigma, seed, form)

    def draws(self, network: Network) -> Draws:
        """Noise of all layers of a network, made once."""
        return self.cache.draws(network, self.layers, (self.seed, self.stored) if self.stored else None)

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        seed = self.reseeded(generator)

        def fixed(index: int) -> Function:
            return lambda inputs: self.outputs(network, inputs, (seed, index, index + 1))[0]

        return [fixed(index) for index in range(n)]

    def with_sigma(self, sigma: float, report: SearchReport | None = None) -> AdapterPosterior:
        """The same draws at another scale."""
        return dataclasses.replace(self, sigma=sigma, report=report or self.report)

    def with_seed(self, seed: int) -> AdapterPosterior:
        """Other draws at the same scale."""
        return self if seed == self.seed else dataclasses.replace(self, seed=seed, stored={})

    def with_draws(self) -> AdapterPosterior:
        """The same with the draws of its predictions as tensors of its own, whatever later versions make of a seed."""
        made = {
            layer.key: torch.stack([base_noise(self.seed, layer, n) for n in range(self.num_samples)])
            for layer in self.layers
        }
        return dataclasses.replace(self, stored=made | dict(self.stored))

    @property
    def forward_passes(self) -> float:
        return float(self.num_samples)

    @property
    def over_weights(self) -> bool:
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that are random: A of every layer."""
        return tuple(layer.weights[0] for layer in self.layers)

    def check(self, network: Network) -> None:
        """Raise unless every layer is an adapter of the network's, with as many singular values as its B has."""
        roots = self.cache.draws(network, self.layers).roots
        expected = {key: value.spectrum.shape for key, value in roots.items()}
        if not expected or expected != {key: value.shape for key, value in self.spectra.items()}:
            raise FileFormatError("the singular values are not those of the network's adapters")
        if not 0 <= self.seed < 1 << 63:
            raise FileFormatError(f"seed {self.seed}; expected a whole number of 63 bits")

    def tensors(self) -> dict[str, Tensor]:
        spectra = {f"spectrum.{key}": value for key, value in self.spectra.items()}
        return spectra | {f"noise.{key}": value for key, value in self.stored.items()}

    def config(self) -> dict[str, Any]:
        return {
            "sigma": self.sigma,
            "seed": self.seed,
            "layers": [layer.to_json() for layer in self.layers],
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "running": dataclasses.asdict(self.running),
            "report": None if self.report is None else self.report.to_json(),
            "search": dict(self.search),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        return cls(
            sigma=float(config["sigma"]),
            seed=int(config["seed"]),
            layers=tuple(map(AdaptedLayer.from_json, config["layers"])),
            num_samples=int(config["num_samples"]),
            fingerprint=str(config["fingerprint"]),
            spectra=under("spectrum."),
            stored=under("noise."),
            running=Running(**config["running"]),
            report=None if config["report"] is None else SearchReport.from_json(config["report"]),
            search=dict(config["search"]),
        )

    @classmethod
    def check_network(cls, network: Network, config: Mapping[str, Any]) -> None:
        """Raise `StaleAdapterError` where the adapters are not those of the fit."""
        layers = tuple(map(AdaptedLayer.from_json, config["layers"]))
        present = {name for name, _ in network.template.named_parameters(remove_duplicate=False)}
        absent = [layer for layer in layers if not set(layer.weights) <= present]
        if absent:
            raise StaleAdapterError(
                f"the model has no adapter {absent[0].adapter!r} in {absent[0].name!r}, which the posterior is over; "
                "load the adapter that was wrapped"
            )
        if fingerprint(network.template, layers) != config["fingerprint"]:
            raise StaleAdapterError(
                "the adapter's weights are not those that the posterior was made for (trained on, or another "
                "adapter?); wrap the model again"
            )

    @classmethod
    def concerns(cls, config: Mapping[str, Any]) -> Callable[[str], bool]:
        """All but the tensors of other adapters, which may come and go."""
        mine = {str(layer["adapter"]) for layer in config["layers"]}

        def function(name: str) -> bool:
            parts = name.split(".")
            owners = [b for a, b in pairwise(parts) if a.startswith("lora_") or a == "modules_to_save"]
            return not owners or bool(mine & set(owners))

        return function

    def _run(self, network: Network, call: Any, span: Span, sharing: Sharing | None, form: str = "auto") -> Tensor:
        seed, start, stop = span
        how = self.running
        injection = self.injection(network, seed, form)
        rows = how.max_rows
        return run(network, call, injection, start, stop, max_rows=rows, tile=how.tile, sharing=sharing)

    def _sharing(self, network: Network, call: Any, seed: int) -> Sharing | None:
        """Sharing of the prefix, after one comparison with plain tiling on the first batch."""
        if self.sigma == 0:
            return None
        held = self.cache.sharing
        if held is None and Rows.of(call).ambiguous(2):
            return None  # the comparison would compare plain tiling with itself: leave it to the next batch
        if held is None or held[0] is not network:
            held = self.cache.sharing = (network, self._checked_prefix(network, call, seed))
        return None if held[1] is None else held[1].shared

    def _checked_prefix(self, network: Network, call: Any, seed: int) -> Prefix | None:
        if self.running.share_prefix is False or not self.running.tile:
            return None
        prefix = find_prefix(network.template, self.layers, self.running.blocks)
        if prefix is None:
            if self.running.share_prefix is True:
                raise SelectionError(
                    'share_prefix=True, and no block lies in front of all noise; choose layers="last-k", and name the '
                    "list with blocks= where there are several"
                )
            return None
        span = (seed, 0, 2)
        with torch.no_grad():
            plain = self._run(network, call, span, None)
            try:
                shared = self._run(network, call, span, prefix.shared)
            except (RuntimeError, ValueError, KeyError) as error:  # blocks that are called in another way
                log.info("prefix sharing is off: %s", error)
                return None
        if not agrees(shared, plain):
            log.info("prefix sharing is off: it differs from plain tiling on the first batch")
            return None
        return prefix


def adapter_posterior(model: BayesianModel) -> AdapterPosterior:
    """The adapter posterior of a model.

    Raises:
        UnsupportedError: it has another.
    """
    if not isinstance(model.posterior, AdapterPosterior):
        raise UnsupportedError(
            f"method {model.method_name!r} has no posterior over adapters; fit one: bdl.wrap(peft_model, bdl.TFB(), "
            "loader, likelihood=...)"
        )
    return model.posterior
