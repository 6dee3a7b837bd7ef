"""The public interface as data: `python -m tests.public_interface` records it in public_interface.json."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("public_interface.json")
MODULES = (
    *(
        "bayesdl",
        "bayesdl.curvature",
        "bayesdl.decisions",
        "bayesdl.errors",
        "bayesdl.evaluation",
        "bayesdl.functional",
    ),
    *("bayesdl.last_layer", "bayesdl.likelihoods", "bayesdl.lora", "bayesdl.marginal", "bayesdl.methods"),
    *("bayesdl.posteriors", "bayesdl.priors", "bayesdl.samplers", "bayesdl.samplers.diagnostics", "bayesdl.select"),
)
REGISTRIES = {
    "bayesdl.methods": "METHODS",
    "bayesdl.likelihoods": "LIKELIHOODS",
    "bayesdl.posteriors": "POSTERIORS",
    "bayesdl.samplers": "SAMPLERS",
    "bayesdl.functional": "DISTANCES",
    "bayesdl.tuning": "RULES",
    "bayesdl.curvature.registry": "STRUCTURES",
    "bayesdl.evaluation.metrics": "METRICS",
}


def interface() -> dict[str, Any]:
    """Names, parameters with their defaults, and entries of registries."""
    found: dict[str, Any] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if _own(module, n, v)]
        for name in names:
            value = getattr(module, name)
            found[f"{module_name}.{name}"] = parameters(value)
            if inspect.isclass(value):
                for member, function in inspect.getmembers(value, inspect.isfunction):
                    if not member.startswith("_") and function.__module__.startswith("bayesdl"):
                        found[f"{module_name}.{name}.{member}"] = parameters(function)
    for module_name, name in REGISTRIES.items():
        found[f"{module_name}.{name}[]"] = dict.fromkeys(getattr(importlib.import_module(module_name), name), "")
    return found


def _own(module: Any, name: str, value: Any) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def parameters(value: Any) -> dict[str, str]:
    """Names of parameters -> their kind and default; of what cannot be called, nothing."""
    if not callable(value) or inspect.ismodule(value):
        return {}
    try:
        signature = inspect.signature(value)
    except ValueError:  # of a class whose constructor is not Python's
        return {}
    kinds = {inspect.Parameter.POSITIONAL_ONLY: "/", inspect.Parameter.KEYWORD_ONLY: "*"}
    return {
        name: kinds.get(p.kind, "") + ("" if p.default is p.empty else f"={_stable(p.default)}")
        for name, p in signature.parameters.items()
    }


def _stable(default: Any) -> str:
    text = repr(default)
    return type(default).__name__ if " at 0x" in text or "<" in text else text


if __name__ == "__main__":
    RECORD.write_text(json.dumps(interface(), indent=0) + "\n", encoding="utf-8")
