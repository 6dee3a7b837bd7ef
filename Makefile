# Everything runs in a virtual environment of this repository; a fresh machine needs Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEVICE ?= cpu
EXECUTE ?= 0
CONSTRAINTS ?= constraints.txt
export PYTHON VENV PIP_FLAGS PYTEST_FLAGS DEVICE EXECUTE CONSTRAINTS

# The folder of this file, also when make is called from elsewhere with -f. Make splits names at spaces, so that
# paths are only ever touched by the shell, in quotes, and the stamps of the environment are kept by the recipes.
quoted = '$(subst ','\'',$(1))'
export ROOT := $(shell file=$(call quoted,$(MAKEFILE_LIST)); cd "$$(dirname "$${file# }")" && pwd)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The repository's folder becomes the current one, $$bin the environment's programs.
define enter
set -eu; \
cd "$$ROOT"; \
[ -f setup.cfg ] || { echo "make: '$$ROOT' is not the repository; call make inside it" >&2; exit 1; }; \
bin="$$VENV/bin"
endef

# $(call environment,STAMP,REQUIREMENTS): REQUIREMENTS installed under the constraints, once for each state of
# setup.cfg and the constraints. The stamp is written last: an installation that was interrupted starts again.
define environment
@$(enter); \
stamp="$$VENV/.installed-$(1)"; \
state="$$(cat setup.cfg pyproject.toml "$$CONSTRAINTS" | cksum) at $$ROOT"; \
if [ -x "$$bin/python" ] && [ -f "$$stamp" ] && [ "$$(cat "$$stamp")" = "$$state" ]; then exit 0; fi; \
command -v "$$PYTHON" >/dev/null 2>&1 || { echo "make: no program '$$PYTHON'; name one: make PYTHON=python3.12" >&2; exit 1; }; \
"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: bayesdl needs Python 3.11 or newer, '$$PYTHON' is $$("$$PYTHON" --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }; \
if ! "$$bin/python" -m pip --version >/dev/null 2>&1; then \
	"$$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: '$$PYTHON' lacks the modules venv and ensurepip; on Debian: apt install python3-venv" >&2; exit 1; }; \
	echo "creating $$VENV with $$("$$PYTHON" --version)"; \
	"$$PYTHON" -m venv "$$VENV"; \
fi; \
rm -f "$$stamp"; \
echo "installing $(2) in $$VENV"; \
"$$bin/python" -m pip install --quiet $$PIP_FLAGS -c "$$CONSTRAINTS" torch; \
"$$bin/python" -m pip install --quiet $$PIP_FLAGS -c "$$CONSTRAINTS" $(2); \
if "$$bin/python" -m pip show --quiet torchvision 2>/dev/null && ! "$$bin/python" -c 'import torchvision' 2>/dev/null; then \
	echo "removing a torchvision that does not match this torch and cannot be imported"; \
	"$$bin/python" -m pip uninstall --quiet --yes torchvision; \
fi; \
printf '%s' "$$state" > "$$stamp"
endef

comma := ,

.PHONY: help demo test test-all test-lowest test-newest dist tutorials lint bench docs build nightly clean env-core env-test env-all env-docs env-executed-docs env-build
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo 'make demo      train a small network, wrap it in several methods, print and write the comparison'
	@echo 'make test      the tests without the slow and the multi-process ones'
	@echo 'make test-all  every test'
	@echo 'make test-lowest, test-newest  the tests under the lowest and the newest versions, in environments of their own'
	@echo 'make dist      the tests that start several processes'
	@echo 'make tutorials every tutorial as a script; each asserts what it claims'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     the benchmarks, one after the other (DEVICE=cuda for a GPU)'
	@echo 'make docs      the documentation as HTML, in docs/_build/html; EXECUTE=1 runs the tutorials in it'
	@echo 'make build     wheel and source archive, in dist/, installed and tried in an empty environment'
	@echo 'make nightly   all of lint, test-all, docs and build'
	@echo 'make clean     remove what the other targets made, the environment included'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) PIP_FLAGS=$(PIP_FLAGS) PYTEST_FLAGS=$(PYTEST_FLAGS) DEVICE=$(DEVICE) EXECUTE=$(EXECUTE)'
	@echo 'Each target installs what it needs in VENV (relative to the repository) on its first run.'

env-core:
	$(call environment,core,-e .)

env-test:
	$(call environment,test,-e ".[test]")

env-all:
	$(call environment,all,-e ".[test$(comma)all]")

env-docs:
	$(call environment,docs,-e ".[docs]")

env-executed-docs:
	$(call environment,executed-docs,-e ".[docs$(comma)llm$(comma)botorch]")

env-build:
	$(call environment,build,build)

demo: env-core
	@$(enter); "$$bin/bayesdl" demo --device "$$DEVICE"

test: env-test
	@$(enter); OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$$bin/python" -m pytest -m "not slow and not dist" $$PYTEST_FLAGS

test-all: env-test
	@$(enter); OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$$bin/python" -m pytest $$PYTEST_FLAGS

# Python 3.11 or 3.12 for the lowest, 3.12 or newer for the newest.
test-lowest:
	@$(enter); "$(MAKE)" --no-print-directory test VENV="$$VENV-lowest" CONSTRAINTS=constraints-lowest.txt

test-newest:
	@$(enter); \
	"$(MAKE)" --no-print-directory env-all VENV="$$VENV-newest" CONSTRAINTS=constraints-newest.txt; \
	OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$$VENV-newest/bin/python" -m pytest -m "not slow and not dist" $$PYTEST_FLAGS

dist: env-test
	@$(enter); OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$$bin/python" -m pytest -m dist $$PYTEST_FLAGS

tutorials: env-test
	@$(enter); OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$$bin/python" -m pytest tests/test_tutorials.py $$PYTEST_FLAGS

lint: env-test
	@$(enter); "$$bin/python" -m ruff check .; "$$bin/python" -m ruff format --check .; "$$bin/python" -m mypy

bench: env-test
	@$(enter); \
	for script in benchmarks/[a-z]*.py; do \
		[ -f "$$script" ] || { echo "make: there are no benchmarks yet" >&2; exit 1; }; \
		echo "== $$script"; \
		"$$bin/python" "$$script" --device "$$DEVICE"; \
	done

# Tutorials that are run need what they are about.
docs: $(if $(filter 1,$(EXECUTE)),env-executed-docs,env-docs)
	@$(enter); \
	BAYESDL_DOCS_EXECUTE="$$EXECUTE" "$$bin/python" -m sphinx -W --keep-going -q -b html -d docs/_build/trees docs docs/_build/html; \
	echo "docs/_build/html/index.html"

# Warnings of the build are errors: setuptools announces there what it will no longer read. The source archive is built
# first, and the wheel from it; then both are installed and tried.
build: env-build
	@$(enter); \
	rm -rf dist; \
	PYTHONWARNINGS=error::DeprecationWarning:setuptools,error:::setuptools "$$bin/python" -m build --outdir dist .; \
	"$$bin/python" tests/installed.py dist

nightly: lint test-all docs build

# VENV may be anything, so that only a folder that is a virtual environment is removed.
clean:
	@$(enter); \
	rm -rf build dist docs/_build docs/generated ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov; \
	find bayesdl tests -type d -name __pycache__ -prune -exec rm -rf {} +; \
	for folder in "$$VENV" "$$VENV-lowest" "$$VENV-newest"; do \
		if [ -f "$$folder/pyvenv.cfg" ]; then rm -rf "$$folder"; fi; \
	done
