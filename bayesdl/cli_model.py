"""Somebody's own network and data, named on a command line as `module:attribute` and files of weights."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

from torch import Tensor, nn

from bayesdl.checkpoint import read_checkpoint
from bayesdl.errors import ArgumentError, FileFormatError

_SHOWN = 3  # names that an error message lists before it only counts


@final
@dataclass(frozen=True, eq=False)
class Loaders:
    """Iterables of batches; `train` and `val` may be absent, a method that needs one says so."""

    test: Iterable[Any]
    train: Iterable[Any] | None = None
    val: Iterable[Any] | None = None


@final
@dataclass(frozen=True, eq=False)
class NotFitted:
    """In place of a method that could not be fitted: it fails with that error wherever it is asked to predict."""

    method_name: str
    error: Exception

    def predict_with_targets(self, data: Iterable[Any]) -> NoReturn:
        """Raises the error."""
        raise self.error


def resolve(spec: str, option: str) -> Any:
    """The object that `module:attribute` names; modules of the current directory can be imported.

    Raises:
        ArgumentError: the text has another form, or there is no such module or attribute.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"{option} {spec}: expected module:attribute, such as mynet:build")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, something that it imports is not
        raise ArgumentError(
            f"{option} {spec}: there is no module {error.name!r} in the current directory or the environment"
        ) from error
    for name in attribute.split("."):
        if not hasattr(value, name):
            public = [n for n in vars(value) if not n.startswith("_")] if hasattr(value, "__dict__") else []
            raise ArgumentError(f"{option} {spec}: no attribute {name!r} there, only {_listed(public)}")
        value = getattr(value, name)
    return value


def build_network(spec: str) -> nn.Module:
    """Call the factory that `spec` names.

    Raises:
        ArgumentError: it is not callable, or does not return an `nn.Module`.
    """
    factory = resolve(spec, "--model")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(f"--model {spec}: expected a callable that returns the network, got {_kind(factory)}")
    network = factory()
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"--model {spec}: the factory returned {_kind(network)}, expected a torch.nn.Module")
    return network


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """State dictionary of a file named on a command line; see `bayesdl.checkpoint.read_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it holds no weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(2, "there is no such file", str(path))
    return read_checkpoint(path)


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read the file into the network; every name and shape must fit.

    Raises:
        FileNotFoundError, FileFormatError: see `read_weights`, or the weights belong to another network.
    """
    state = read_weights(path)
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {_listed(names)}"
        for what, names in (("lacks", missing), ("has unknown", unexpected), ("wrong shapes:", shapes))
        if names
    ]
    if problems:
        raise FileFormatError(f"{path}: does not fit the network: {'; '.join(problems)}")
    network.load_state_dict(state)


def load_networks(spec: str, weights: Sequence[str | os.PathLike[str]], device: str) -> list[nn.Module]:
    """One network for each file of weights, on `device` and in evaluation mode."""
    networks = []
    for path in weights:
        network = build_network(spec)
        load_weights(network, path)
        networks.append(network.to(device).eval())
    return networks


def load_data(spec: str) -> Loaders:
    """Call what `spec` names: a mapping with `test`, `train`, `val`, or a tuple (train, val, test) or (train, test).

    Raises:
        ArgumentError: it returns something else.
    """
    value = _called(spec, "--data")
    if isinstance(value, (tuple, list)) and len(value) in (2, 3):
        value = dict(zip(("train", "val", "test") if len(value) == 3 else ("train", "test"), value, strict=True))
    if not isinstance(value, Mapping):
        raise ArgumentError(
            f"--data {spec}: expected a mapping with train, val and test loaders or such a tuple, got {_kind(value)}"
        )
    named = {"val" if name == "validation" else name: loader for name, loader in value.items()}
    if "test" not in named or not set(named) <= {"train", "val", "test"}:
        raise ArgumentError(f"--data {spec}: expected the keys train, val and test, got {_listed(list(value))}")
    return Loaders(**{name: _iterable(loader, f"--data {spec}: {name}") for name, loader in named.items()})


def load_ood(entries: Sequence[str]) -> dict[str, Iterable[Any]]:
    """`name=module:loader` for each set: a loader, or a callable that returns one.

    Raises:
        ArgumentError: an entry has another form, or a name comes twice.
    """
    return _loaders(entries, "--ood")


def load_shift(entries: Sequence[str]) -> dict[str, Iterable[Any]]:
    """`name/severity=module:loader` for each shifted copy of the test data; see `load_ood`."""
    return _loaders(entries, "--shift")


def load_loader(spec: str, option: str) -> Iterable[Any]:
    """A loader, or a callable that returns one.

    Raises:
        ArgumentError: it is neither.
    """
    return _iterable(_called(spec, option), f"{option} {spec}")


def network_for(method: str, networks: Sequence[nn.Module]) -> nn.Module | list[nn.Module]:
    """The first network, or all of them for an ensemble.

    Raises:
        ArgumentError: an ensemble of one.
    """
    if method != "ensemble":
        return networks[0]
    if len(networks) < 2:
        raise ArgumentError("--methods ensemble: expected several files after --weights, one for each member")
    return list(networks)


def data_for(method: str, data: Loaders) -> Iterable[Any] | None:
    """What a method is fitted on: validation data for temperature scaling, training data for all others.

    Raises:
        ArgumentError: temperature scaling without validation data, which would fit it to over-confident outputs.
    """
    if method != "temperature":
        return data.train
    if data.val is None:
        raise ArgumentError("--methods temperature: needs validation data, and --data gives no loader named val")
    return data.val


def named_entries(entries: Sequence[str], option: str, what: str) -> dict[str, str]:
    """`NAME=VALUE` texts as a dictionary, in order.

    Raises:
        ArgumentError: an entry has another form, or a name comes twice.
    """
    named: dict[str, str] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not (name and separator and value):
            raise ArgumentError(f"{option} {entry}: expected NAME={what}")
        if name in named:
            raise ArgumentError(f"{option} {entry}: the name {name!r} was given twice")
        named[name] = value
    return named


def reasons(file: str, values: Mapping[str, float], nan: str = "raise") -> dict[str, str]:
    """Why metrics of predictions in a file have no value, by name."""
    from bayesdl.evaluation.metrics import METRICS, metric_values
    from bayesdl.evaluation.predictions import Predictions

    undefined = [key for key, value in values.items() if math.isnan(value) and key in METRICS]
    found = metric_values(Predictions.load(file, nan=nan), undefined) if undefined else {}
    return {key: value.reason for key, value in found.items()}


def _loaders(entries: Sequence[str], option: str) -> dict[str, Iterable[Any]]:
    named = named_entries(entries, option, "module:loader")
    return {
        name: _iterable(_called(spec, f"{option} {name}="), f"{option} {name}={spec}") for name, spec in named.items()
    }


def _called(spec: str, option: str) -> Any:
    value = resolve(spec, option)
    return value() if callable(value) else value


def _iterable(value: Any, where: str) -> Iterable[Any]:
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__iter__") or hasattr(value, "__next__"):
        raise ArgumentError(f"{where}: expected a loader that can be read several times, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
