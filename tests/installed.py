"""Installs a wheel in an environment of its own and tries it there: `python tests/installed.py dist [--borrow]`.

`make build` runs it with dependencies from the package index; the tests run it with `--borrow`, which takes them from
the interpreter at hand, without a network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSUMER = Path(__file__).with_name("consumer.py")


def sources() -> set[str]:
    """Files of the package."""
    found = [*(ROOT / "bayesdl").rglob("*.py"), ROOT / "bayesdl" / "py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in found}


def check_contents(wheel: Path, archive: Path) -> None:
    """The wheel holds the package and nothing else; the source archive all that it is built from."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == sources(), inside ^ sources()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    missing = {*sources(), "LICENSE", "README.md", "pyproject.toml", "setup.cfg"} - names
    assert not missing, missing


def without_paths() -> dict[str, str]:
    """The variables of this process, less those by which another Python would see the repository."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}


def environment(folder: Path, wheel: Path, borrow: bool) -> Path:
    """A fresh virtual environment with the wheel; its python."""
    options = ["--without-pip"] if borrow else []
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    python = folder / "bin" / "python"
    if borrow:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    else:
        install = [python, "-m", "pip", "install", "-c", ROOT / "constraints.txt"]
        subprocess.run([*install, "--quiet", "torch"], check=True, env=without_paths())
    subprocess.run(
        [*install, "--quiet", "--no-index" if borrow else "--no-input", wheel], check=True, env=without_paths()
    )
    return python


def try_out(python: Path, folder: Path) -> None:
    """Import, command line and demonstration, away from the repository."""
    clean = without_paths()

    def run(*command: object) -> str:
        done = subprocess.run([str(c) for c in command], cwd=folder, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(python, "-c", "import bayesdl; print(bayesdl.__file__)").strip()
    assert Path(where).is_relative_to(python.parents[1]), where
    command = python.with_name("bayesdl")
    assert run(command, "--version").startswith("bayesdl ")
    table = run(command, "demo", "--regression", "--bootstrap", "50", "--out", folder / "report")
    assert "laplace" in table
    assert (folder / "report" / "index.html").is_file()


def check_types(python: Path, folder: Path) -> None:
    """mypy of the interpreter at hand on a consumer's file, with the installed package's types."""
    copy = folder / "consumer.py"
    copy.write_text(CONSUMER.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--config-file=", copy]
    clean = without_paths()
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    """Check the one wheel and the one archive of a folder."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--borrow", action="store_true", help="dependencies of this interpreter, no network")
    given = options.parse_args()
    (wheel,), (archive,) = given.folder.glob("*.whl"), given.folder.glob("*.tar.gz")
    check_contents(wheel, archive)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(folder / "environment", wheel.resolve(), given.borrow)
        try_out(python, folder)
    sys.stdout.write(f"{wheel.name} and {archive.name}: installed and tried\n")


if __name__ == "__main__":
    main()
