"""`match`: a prior over the weights of an existing network whose functions look like those of a target."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError, UnknownNameError
from bayesdl.functional.critic import DistributionalSliced, Wasserstein
from bayesdl.functional.distances import DISTANCES, Distance
from bayesdl.functional.families import Family, make
from bayesdl.functional.functions import Pushforward, held_norms
from bayesdl.functional.gp import GP, Target
from bayesdl.functional.measurement import Measurement, Places
from bayesdl.functional.reconstruction import RECONSTRUCTED, Data, Reconstructions
from bayesdl.functional.report import FUNCTIONS, Fit, MatchReport, compare, describe, fresh, notes
from bayesdl.network import Network
from bayesdl.priors import CouplingPrior, GaussianPrior, HierarchicalPrior, Prior, SplinePrior
from bayesdl.select import Selector

Push = Pushforward | Reconstructions


def match(
    model: nn.Module | Network,
    target: Target | Tensor,
    inputs: Tensor,
    *,
    family: str = "gaussian",
    distance: str | Wasserstein | DistributionalSliced = "w1",
    measurement: Places | None = None,
    steps: int = 200,
    num_functions: int = 128,
    lr: float = 0.05,
    patience: int | None = None,
    select: Selector = "all",
    extra: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Prior:
    """Learn a prior over the selected weights (Tran, Rossi, Milios and Filippone 2022).

    Args:
        model: any network; its trained values are neither read nor written. Parameters outside the selection keep
            theirs, affine parameters of norm layers are held at (1, 0).
        target: `GP(...)`, or any object with `sample(inputs, n, generator) -> (n, M, C)` and `outputs`. For an
            autoencoder the data themselves, `(N, ...)`: its reconstructions under the prior should be distributed as
            they are (Tran et al. 2021, "Model selection for Bayesian autoencoders"; they use distance="dsw").
        inputs: `(N, ...)`, standardised training inputs; the measurement sets come from these alone.
        family: "gaussian" (one standard deviation a tensor), "located" (and a learned mean for every weight before the
            output layer: closest to a process, at the price of features that are largely settled), "hierarchical"
            (inverse-gamma variances), "spline" (a learned shape) or "coupling" (a learned joint law of each layer, up
            to 10,000 parameters); the last two for samplers and MAP only.
        distance: "w1", "energy", "mmd", "gaussian-w2", "moments", "sw", "dsw", or a configured one.
        measurement: where functions are compared; default 100 points, 70 of them inputs (autoencoders: 32 inputs).
        steps: of the prior.
        num_functions: n, draws a step.
        lr: of RMSprop on the family's parameters.
        patience: stop before `steps` once the mean distance of as many steps is no lower than that of the same number
            before them; None: never. Not for distances with a critic, whose values say how well it was fitted.
        select: which weights have the prior.
        extra: standard deviations for parameters of layers without a fan-in.
        generator: the same state gives the same prior, bit for bit.
        progress: show a bar.

    Returns:
        a `GaussianPrior`, `HierarchicalPrior`, `SplinePrior` or `CouplingPrior` with a `.report`.

    Raises:
        UnknownNameError: no such family or distance.
        ShapeError: target and network differ in outputs.
        NonFiniteError: functions or parameters became NaN; the step is named.
        UnsupportedError, SelectionError: see `bayesdl.functional.functions.Pushforward`.
    """
    if steps < 1 or num_functions < 2:
        raise ArgumentError(f"steps={steps} and num_functions={num_functions}; expected at least 1 and 2")
    if patience is not None and (patience < 1 or not isinstance(distance, str) or not _plain(distance)):
        raise ArgumentError(
            f"patience={patience} with distance={distance!r}; expected at least 1, and a distance without a critic"
        )
    _check_inputs(inputs)
    network = model if isinstance(model, Network) else Network(model, select=select, example=inputs[:1])
    plain = Pushforward(network, extra, inputs[:1])
    push: Push = plain
    source = generator or torch.Generator().manual_seed(0)
    if isinstance(target, Tensor):
        target, push = Data(target), Reconstructions(plain)
        places: Places = measurement or Measurement(inputs, min(RECONSTRUCTED, len(inputs)), 1.0)
    else:
        places = measurement or _default_places(inputs)
    law = make(family, push.slots)
    law.start(source)
    own = fresh(source)
    before = _fit(push, law, target, places, own, num_functions)
    start = time.perf_counter()
    trace = _learn(push, law, target, places, distance, steps, num_functions, lr, patience, source, progress)
    seconds = time.perf_counter() - start
    fit = _fit(push, law, target, places, own, FUNCTIONS)
    found = (*notes(fit, before, law.describe()), *_circumstances(network, push, places))
    name = distance if isinstance(distance, str) else type(distance).__name__
    setting = {
        "family": family,
        "target": describe(target),
        "measurement": describe(places),
        "draws": f"{num_functions} in each of {len(trace)} steps",
    }
    resolution = _resolution(distance, target, places, num_functions, own)
    report = MatchReport(fit, before, name, tuple(trace), law.describe(), seconds, found, setting, resolution)
    return _with_report(law.prior(), report)


def evaluate(
    model: nn.Module | Network,
    prior: Prior,
    target: Target,
    inputs: Tensor,
    *,
    measurement: Places | None = None,
    num_functions: int = FUNCTIONS,
    select: Selector = "all",
    generator: torch.Generator | None = None,
) -> MatchReport:
    """The report of `match` for ANY prior that can be drawn from.

    Args:
        as in `match`. Affine parameters of norm layers for which the prior has no law are held at (1, 0), as there.
    """
    _check_inputs(inputs)
    network = model if isinstance(model, Network) else Network(model, select=select, example=inputs[:1])
    source = generator or torch.Generator().manual_seed(0)
    points = (measurement or _default_places(inputs)).draw(source)
    held = held_norms(network, names_of(prior))
    own = {name: value for name, value in network.parameters.items() if name not in held}
    drawn = [prior.sample(own, source) for _ in range(num_functions)]
    weights = {name: torch.stack([one[name] for one in drawn]) for name in own}
    module, call = network.module(), network.prepare(points)

    def one(tensors: dict[str, Tensor]) -> Tensor:
        return network.forward(module, call, {**held, **tensors})

    with torch.no_grad():
        h = torch.func.vmap(one, chunk_size=64)(weights)
        fit = compare(h.cpu(), target.sample(points, num_functions, source), target, points)
    return MatchReport(fit, notes=notes(fit, None))


def _learn(
    push: Push,
    law: Family,
    target: Target,
    places: Places,
    distance: str | Wasserstein | DistributionalSliced,
    steps: int,
    count: int,
    lr: float,
    patience: int | None,
    source: torch.Generator,
    progress: bool,
) -> list[float]:
    """Gradient steps on the family's parameters; the value of the distance at each."""
    optimizer = torch.optim.RMSprop(law.parameters(), lr=lr)
    trace: list[float] = []
    for step in trange(steps, desc="match", disable=not progress, leave=False):
        points = places.draw(source)
        h = _functions(push, law, points, count, source)
        g = target.sample(points, count, source).to(h)
        if h.shape[1:] != g.shape[1:]:
            raise ShapeError(
                f"the network's functions have shape {tuple(h.shape[1:])} (points, outputs) and the target's "
                f"{tuple(g.shape[1:])}: set outputs= of the target"
            )
        value = _distance(distance, push, law, target, points, count, source, h, g)
        optimizer.zero_grad()
        value.backward()
        if not all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in law.parameters()):
            raise NonFiniteError(f"matching: the gradient of the distance is NaN or infinite at step {step}: lower lr")
        optimizer.step()
        law.check(step)
        trace.append(float(value.detach()))
        if patience is not None and _settled(trace, patience):
            break
    return trace


def _settled(trace: list[float], patience: int) -> bool:
    """Whether the last `patience` values are on average no lower than as many before them."""
    return len(trace) >= 2 * patience and sum(trace[-patience:]) >= sum(trace[-2 * patience : -patience])


def _plain(name: str) -> bool:
    """Whether a distance has no critic; what is not known is refused later."""
    return name not in DISTANCES or DISTANCES[name].value is not None


def _distance(
    distance: str | Wasserstein | DistributionalSliced,
    push: Push,
    law: Family,
    target: Target,
    points: Tensor,
    count: int,
    source: torch.Generator,
    h: Tensor,
    g: Tensor,
) -> Tensor:
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise UnknownNameError(f"distance {distance!r} is not known; choose one of {sorted(DISTANCES)}")
        entry = DISTANCES[distance]
        if entry.value is not None:
            return entry.value(h, g, _moments(entry, target, points, h), source)
        distance = Wasserstein() if entry.critic == "w1" else DistributionalSliced()

    def draw() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            values = _functions(push, law, points, count, source)
        return values, target.sample(points, count, source).to(values)

    return distance.value(h, g, draw, source)


def _moments(entry: Distance, target: Target, points: Tensor, like: Tensor) -> Tensor | None:
    """The target's covariance, where it is known, or asked for where it is not."""
    if isinstance(target, GP) and (target.fixed or entry.needs_moments):
        return target.moments(points)[1].to(like.device)
    return None


def _resolution(
    distance: str | Wasserstein | DistributionalSliced,
    target: Target,
    places: Places,
    count: int,
    source: torch.Generator,
) -> float | None:
    """The distance between two sets of the target's own draws."""
    entry = DISTANCES[distance] if isinstance(distance, str) else None
    if entry is None or entry.value is None:
        return None
    points = places.draw(source)
    one, other = (target.sample(points, count, source).float() for _ in range(2))
    return float(entry.value(one, other, _moments(entry, target, points, one), source))


def _circumstances(network: Network, push: Push, places: Places) -> tuple[str, ...]:
    """What was done about the network and the inputs, in words."""
    found = []
    if push.held:
        held = sorted(push.held)
        found.append(
            f"held at one and zero: {held}; the prior has no law for them: leave them out of a method's select="
        )
    off = [name for name, m in network.template.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    if off:
        found.append(f"dropout is off in the functions compared: {off}")
    wanted = round(places.real * places.num_points) if isinstance(places, Measurement) else 0
    if isinstance(places, Measurement) and wanted > len(places.inputs):
        found.append(
            f"{len(places.inputs)} inputs where {wanted} points of a measurement should be inputs: the others are "
            "uniform in their box"
        )
    return tuple(found)


def _functions(push: Push, law: Family, points: Any, count: int, source: torch.Generator) -> Tensor:
    return push(law.draw(count, source), points, source)


def _fit(push: Push, law: Family, target: Target, places: Places, source: torch.Generator, count: int) -> Fit:
    points = places.draw(source)
    with torch.no_grad():
        h = _functions(push, law, points, count, source).cpu()
    g = target.sample(points, count, source)
    if h.shape[1:] != g.shape[1:]:
        raise ShapeError(
            f"the network's functions have shape {tuple(h.shape[1:])} (points, outputs) and the target's "
            f"{tuple(g.shape[1:])}: set outputs= of the target"
        )
    return compare(h, g, target, points, isinstance(push, Pushforward))


def _check_inputs(inputs: Tensor) -> None:
    if inputs.dim() < 2:
        raise ShapeError(f"inputs have shape {tuple(inputs.shape)}; expected (N, features) or (N, ...)")


def _default_places(inputs: Tensor) -> Places:
    if inputs.dim() == 2 and inputs.is_floating_point():
        return Measurement(inputs)
    return Measurement(inputs, min(100, len(inputs)), 1.0)  # images and tokens have no box


def names_of(prior: Prior) -> set[str] | None:
    """The parameters that a prior has a law for by name; None where it has one for any."""
    if isinstance(prior, CouplingPrior):
        return {name for layer in prior.layers for name in layer.names}
    laws: object = None
    if isinstance(prior, GaussianPrior):
        laws = prior.precision
    elif isinstance(prior, HierarchicalPrior):
        laws = prior.shape
    elif isinstance(prior, SplinePrior):
        laws = prior.scales
    return set(laws) if isinstance(laws, Mapping) else None


def _with_report(prior: Prior, report: MatchReport) -> Prior:
    if isinstance(prior, GaussianPrior | HierarchicalPrior | SplinePrior | CouplingPrior):
        return replace(prior, report=report)
    return prior
