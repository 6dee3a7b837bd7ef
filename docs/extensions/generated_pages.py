"""Pages that are made from the code: the reference of all public names, the metrics, the tutorials."""

from __future__ import annotations

import importlib
import inspect
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock

# module -> what its page is called; every public name of each is documented
MODULES = {
    "bayesdl": "bayesdl",
    "bayesdl.methods": "Methods and their registry",
    "bayesdl.likelihoods": "Likelihoods",
    "bayesdl.priors": "Priors",
    "bayesdl.posteriors": "Posteriors",
    "bayesdl.select": "Selections of weights",
    "bayesdl.batch": "Batches",
    "bayesdl.curvature": "Curvature",
    "bayesdl.samplers": "Samplers",
    "bayesdl.samplers.diagnostics": "Diagnostics of chains",
    "bayesdl.last_layer": "Last layers",
    "bayesdl.functional": "Functional priors",
    "bayesdl.lora": "Low-rank adapters",
    "bayesdl.marginal": "Marginal likelihood while training",
    "bayesdl.evaluation": "Evaluation",
    "bayesdl.decisions": "Decisions",
    "bayesdl.errors": "Errors",
}
SHARED = ("__init__", "__pycache__", "collecting", "huggingface_metrics", "huggingface_model")  # parts of other bridges
DIRECTIONS = {"min": "low", "max": "high", "none": "not ranked"}


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or what is defined in the module and does not begin with an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed, key=str.lower)
    own = inspect.getmembers(module, lambda value: getattr(value, "__module__", None) == module.__name__)
    return [name for name, _ in own if not name.startswith("_")]


def reference(name: str, title: str, seen: dict[int, str]) -> str:
    """Page of one module; what an earlier page has described (object -> its name there) is only named."""
    module = importlib.import_module(name)
    lines = [title, "=" * len(title), "", f".. currentmodule:: {name}", ""]
    if (module.__doc__ or "") and name != "bayesdl":
        lines += [f".. automodule:: {name}", "   :no-members:", ""]
    registries: list[str] = []
    elsewhere: list[str] = []
    for public in public_names(module):
        value = getattr(module, public)
        if id(value) in seen:
            elsewhere.append(f":py:obj:`{seen[id(value)]}`")
        elif inspect.isclass(value):
            lines += [f".. autoclass:: {name}.{public}", "   :members:", "   :show-inheritance:", ""]
        elif inspect.isfunction(value):
            lines += [f".. autofunction:: {name}.{public}", ""]
        elif isinstance(value, dict):
            keys = ", ".join(f"``{key}``" for key in value)
            registries += [f".. py:data:: {public}", "", f"   A dictionary with the entries {keys}.", ""]
        elif inspect.ismodule(value):
            registries += [f"``{name}.{public}``: {(value.__doc__ or '').splitlines()[0]}", ""]
        if inspect.isclass(value) or inspect.isfunction(value):
            seen.setdefault(id(value), f"{name}.{public}")
    if elsewhere:
        registries += ["Described elsewhere: " + ", ".join(elsewhere) + ".", ""]
    return "\n".join(lines + registries)


def integration_modules() -> dict[str, str]:
    """The bridges to other libraries, each file a page."""
    import bayesdl.integrations

    folder = Path(bayesdl.integrations.__file__).parent
    names = sorted(path.stem for path in folder.iterdir() if path.stem.isidentifier() and path.stem not in SHARED)
    return {f"bayesdl.integrations.{name}": f"integrations.{name}" for name in names}


def metrics() -> str:
    """How every metric is defined, from the registry that computes them."""
    from bayesdl.evaluation.metrics import METRICS

    lines = []
    tasks = {task: None for metric in METRICS.values() for task in metric.tasks}
    for task in tasks:
        lines += [f"## {task.capitalize()}", "", "| key | name | best | unit | definition |", "|---|---|---|---|---|"]
        for metric in METRICS.values():
            if task in metric.tasks:
                best = DIRECTIONS.get(metric.direction, f"near {metric.target}")
                text = metric.definition.replace("|", "\\|")
                note = " *Proper.*" if metric.proper else ""
                lines.append(f"| `{metric.name}` | {metric.label} | {best} | {metric.unit} | {text}{note} |")
        lines.append("")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Only what has changed is written, so that a second build is quick."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def generate(app: Sphinx) -> None:
    """Write all such pages into docs/generated."""
    import jupytext

    target = Path(app.srcdir) / "generated"
    wanted: dict[Path, str] = {target / "metrics.md": metrics()}
    seen: dict[int, str] = {}
    with mock(app.config.autodoc_mock_imports):
        for name, title in {**MODULES, **integration_modules()}.items():
            wanted[target / "api" / f"{name}.rst"] = reference(name, title, seen)
    for path in sorted((Path(app.srcdir).parent / "tutorials").glob("*.py")):
        book = jupytext.read(path, fmt="py:percent")
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        for number, cell in enumerate(book.cells):
            cell["id"] = f"cell-{number}"
        wanted[target / "tutorials" / f"{path.stem}.ipynb"] = jupytext.writes(book, fmt="ipynb")
    for path, text in wanted.items():
        write(path, text)
    for path in target.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    for left in target.rglob(".ipynb_checkpoints"):
        shutil.rmtree(left)


def setup(app: Sphinx) -> dict[str, Any]:
    """Write before Sphinx looks for sources."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
