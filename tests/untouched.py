"""A snapshot of everything about a user's network that the library promises to leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("hooks"))


def _frozen(value: Any) -> Any:
    # identity of what is held, and the contents of containers and tensors
    if isinstance(value, Tensor):
        return id(value), value._version, value.detach().clone(), value.requires_grad, value.dtype
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_frozen(item) for item in value]
    return id(value)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Class, mode, dictionaries (hooks among them), tensors with their versions, and gradients, by module name."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found[name] = {"class": type(part), "state": _frozen(dict(part.__dict__))}
        found[name]["grads"] = {k: _frozen(p.grad) for k, p in part._parameters.items() if p is not None}
    return found


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Assert that the networks, the global random state and the default dtype leave the block as they came."""
    before = [snapshot(module) for module in modules]
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    for module, old in zip(modules, before, strict=True):
        new = snapshot(module)
        assert list(new) == list(old)
        for name in old:
            assert new[name]["class"] is old[name]["class"], name
            assert _same(new[name]["grads"], old[name]["grads"]), f"gradients of {name!r}"
            for key in old[name]["state"]:
                assert _same(new[name]["state"].get(key), old[name]["state"][key]), f"{key!r} of {name!r}"
            assert set(new[name]["state"]) == set(old[name]["state"]), name
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    assert torch.get_default_dtype() is dtype
