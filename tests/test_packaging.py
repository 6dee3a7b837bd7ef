"""What a user's pip and make rely on."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installed import check_contents, check_types, environment, try_out

ROOT = Path(__file__).parents[1]


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def names(lines: str) -> set[str]:
    """Package names of a list of requirements, extras of this package unfolded."""
    found: set[str] = set()
    for line in lines.split("\n"):
        if match := re.fullmatch(r"bayesdl\[(.*)\]", line.strip()):
            extras = settings()["options.extras_require"]
            found |= set().union(*(names(extras[extra]) for extra in match[1].split(",")))
        elif line.strip():
            found.add(re.split(r"[<>=!~ ;\[]", line.strip())[0].lower().replace("_", "-"))
    return found


def test_version_is_a_literal_so_that_building_imports_nothing() -> None:
    tree = ast.parse((ROOT / "bayesdl" / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__version__"]
    ]
    assert len(values) == 1
    assert isinstance(values[0], ast.Constant)
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(values[0].value))


def test_every_folder_with_modules_is_a_package() -> None:
    """`find:` leaves folders without __init__.py out of the wheel, silently."""
    folders = {path.parent for path in (ROOT / "bayesdl").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_constraints_are_exact_with_torch_first() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert len(pinned) == len(pins)
    needed = names(settings()["options"]["install_requires"])
    for extra in settings()["options.extras_require"].values():
        needed |= names(extra)
    assert needed - pinned == set()


def pins_of(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if line[:1] != "#")}


def test_the_lowest_constraints_are_the_lower_bounds() -> None:
    pins = pins_of("constraints-lowest.txt")
    options = settings()
    needed = f"{options['options']['install_requires']}\n{options['options.extras_require']['test']}"
    needed += options["options.extras_require"]["laplace"] + options["options.extras_require"]["llm"]
    bounds = dict(re.findall(r"^([A-Za-z0-9-]+)>=([0-9.]+)$", needed, re.M))
    assert {"torch", "numpy", "scikit-learn", "netcal", "backpack-for-pytorch", "pytest"} <= set(bounds)
    for name, bound in bounds.items():
        pinned = pins[name.lower()]
        assert f"{pinned}.0.0".startswith(f"{bound}."), f"{name}>={bound} is tried as {pinned}"
    assert all(re.fullmatch(r"[A-Za-z0-9.]+", version) for version in pins.values())


def test_the_newest_constraints_are_no_older_than_the_usual_ones() -> None:
    def number(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    usual, newest = pins_of("constraints.txt"), pins_of("constraints-newest.txt")
    assert number(newest["arviz"]) >= [1]
    assert all(number(newest[name]) >= number(usual[name]) for name in set(usual) & set(newest))
    required = names(settings()["options"]["install_requires"])
    for extra in ("all", "test", "laplace", "llm", "lightning", "botorch", "arviz", "onnx"):
        required |= names(settings()["options.extras_require"][extra])
    assert required <= {name.replace("_", "-") for name in newest}


def test_hard_dependencies_stay_few() -> None:
    assert names(settings()["options"]["install_requires"]) == {
        "torch", "numpy", "scikit-learn", "pyro-ppl", "netcal", "safetensors", "tqdm", "matplotlib", "rich",
    }  # fmt: skip


def test_continuous_integration_can_be_executed() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def run_make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # `make test` runs these tests: what it exports must not reach the make under test.
    passed_on = {
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
        "PYTHON",
        "VENV",
        "PIP_FLAGS",
        "ROOT",
        "CONSTRAINTS",
    }
    environment = {key: value for key, value in os.environ.items() if key not in passed_on}
    command = ["make", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_make_alone_lists_the_targets_from_any_folder(tmp_path: Path) -> None:
    done = run_make(cwd=tmp_path)
    assert done.returncode == 0
    assert {
        "demo",
        "test",
        "test-all",
        "test-lowest,",
        "test-newest",
        "dist",
        "tutorials",
        "lint",
        "bench",
        "docs",
        "build",
        "nightly",
        "clean",
    } <= set(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_make_names_a_python_that_is_missing_or_too_old(tmp_path: Path) -> None:
    venv = tmp_path / "a venv"
    done = run_make("demo", "PYTHON=no-such-python", f"VENV={venv}", cwd=tmp_path)
    assert done.returncode != 0
    assert "no-such-python" in done.stderr
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo "Python 3.8.1"; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = run_make("demo", f"PYTHON={old}", f"VENV={venv}", cwd=tmp_path)
    assert done.returncode != 0
    assert "3.11 or newer" in done.stderr
    assert "Python 3.8.1" in done.stderr
    assert not venv.exists()


def test_make_leaves_no_stamp_after_a_failed_installation(tmp_path: Path) -> None:
    """A stand-in for the environment's python fails at the second installation; the next run must start again."""
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    log = tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\ncase "$*" in *"-e ."*) exit 1;; esac\nexit 0\n')
    fake.chmod(0o755)
    for _ in range(2):
        log.write_text("")
        done = run_make("env-core", f"PYTHON={sys.executable}", f"VENV={venv}", cwd=tmp_path)
        assert done.returncode != 0
        installs = [line for line in log.read_text().splitlines() if "pip install" in line]
        assert [line.split("constraints.txt ")[1] for line in installs] == ["torch", "-e ."]
        assert list(venv.glob(".installed-*")) == []


def test_make_installs_once_and_removes_a_torchvision_that_cannot_be_imported(tmp_path: Path) -> None:
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    log = tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\ncase "$*" in *"import torchvision"*) exit 1;; esac\nexit 0\n')
    fake.chmod(0o755)
    for expected in (1, 0):
        log.write_text("")
        done = run_make("env-test", f"PYTHON={sys.executable}", f"VENV={venv}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert log.read_text().count("pip uninstall --quiet --yes torchvision") == expected
        assert log.read_text().count("pip install") == 2 * expected
    fake.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nexit 0\n')
    log.write_text("")
    (venv / ".installed-test").unlink()
    run_make("env-test", f"PYTHON={sys.executable}", f"VENV={venv}", cwd=tmp_path)
    assert "import torchvision" in log.read_text()
    assert "uninstall" not in log.read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source archive of the tracked files, and a wheel built from it; warnings of setuptools are errors."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    script = "import setuptools.build_meta as build, sys; build.build_sdist(sys.argv[1])"
    strict = [sys.executable, "-W", "error:::setuptools", "-c", script, str(folder)]
    subprocess.run(strict, cwd=source, check=True, timeout=300, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(archive)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, archive


@pytest.mark.slow
def test_wheel_and_archive_hold_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    check_contents(*built)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "environment", built[0], borrow=True)
    try_out(python, tmp_path)
    check_types(python, tmp_path)
