"""What `import bayesdl` brings, in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bayesdl as bdl

HEAVY = (
    *("arviz", "backpack", "botorch", "laplace", "lightning", "matplotlib", "netcal", "onnx", "pandas", "peft", "pyro"),
    *("rich", "scipy", "sklearn", "skorch", "torchmetrics", "torchvision", "transformers"),
)

BUDGET = 0.5  # seconds that `import bayesdl` may add to `import torch`

PUBLIC = {
    *("Chain", "ELLA", "FSPLaplace", "NUTS", "SMC", "StudentT", "SubsetGP", "VaLLA"),
    *("CauchyPrior", "HierarchicalPrior", "HorseshoePrior", "LaplacePrior", "StudentTPrior"),
    *("BayesianModel", "Bernoulli", "Categorical", "Ensemble", "Gaussian", "GaussianPrior", "Heteroscedastic"),
    *("Laplace", "Likelihood", "MAP", "MCDropout", "Poisson", "Predictive", "Prior", "Report", "SGMCMC", "SWAG", "TFB"),
    "BayesVLM",
    *("EvidenceTrainer", "MinibatchEvidence", "evidence_training", "gathered"),
    *(
        "Temperature",
        "VBLL",
        "__version__",
        "as_module",
        "compare",
        "evaluate",
        "load",
        "load_prior",
        "replace",
        "wrap",
    ),
}

SCRIPT = """
import json, sys
import bayesdl
first = sorted(sys.modules)
import torch
net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(4, 2))
data = [(torch.randn(8, 2), torch.tensor([0, 1] * 4))]
for method in ("map", "temperature", "laplace", "dropout"):
    bayes = bayesdl.wrap(net, method, data, likelihood="categorical", progress=False)
    bayes(data[0][0]).epistemic
bayes.tune("heldout", data)
used = sorted(sys.modules)
from bayesdl.wrap import wrap
print(json.dumps({"first": first, "used": used, "same": bayesdl.wrap is wrap, "dir": dir(bayesdl)}))
"""


@cache
def fresh() -> dict[str, Any]:
    root = Path(bdl.__file__).parents[1]
    run = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("when", ["first", "used"])
def test_heavy_packages_stay_out(when: str) -> None:
    loaded = {name.split(".")[0] for name in fresh()[when]}
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_importing_costs_little_beside_torch() -> None:
    """CPU time, which a busy machine lengthens least, and the best of three; 0.4 is usual on one."""
    script = "import time, torch; start = time.process_time(); import bayesdl; print(time.process_time() - start)"
    root = Path(bdl.__file__).parents[1]
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
        if seconds[-1] < BUDGET:
            return
    raise AssertionError(f"import bayesdl took {min(seconds):.2f} s of CPU time beyond import torch; at most {BUDGET}")


def test_the_module_of_that_name_never_takes_the_place_of_wrap() -> None:
    assert fresh()["same"] is True
    assert callable(bdl.wrap)


def test_public_names() -> None:
    assert set(bdl.__all__) == PUBLIC
    assert len(bdl.__all__) == len(PUBLIC)
    for name in bdl.__all__:
        assert getattr(bdl, name) is not None
    assert set(fresh()["dir"]) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(bdl, name).__doc__ or "").strip()


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'bayesdl' has no attribute 'Lapace'"):
        _ = bdl.Lapace  # type: ignore[attr-defined]


def test_submodules_on_first_use() -> None:
    for name in ("curvature", "errors", "likelihoods", "methods", "posteriors"):
        assert getattr(bdl, name).__name__ == f"bayesdl.{name}"
