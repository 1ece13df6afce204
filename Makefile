# `make` lists the targets. Each makes what it needs, and is fast once that is there.
#
# Where $(PYTHON) has a CUDA torch (2.11 or later), that interpreter is used as it is: nothing is
# downloaded, the extension is built in place, and the checkout goes on PYTHONPATH. Elsewhere `.venv` is
# made with pinned packages.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
ARGS ?=
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v c++ || echo c++)
endif
export CXX
export LIVREC_REQUIRE_NATIVE := 1

CUDA := $(shell $(PYTHON) scripts/cuda_torch.py || echo failed)
ifeq ($(CUDA),failed)
$(error PYTHON=$(PYTHON) cannot be used; name one with `make PYTHON=...`)
endif

VENV := .venv
ifeq ($(CUDA),)
PY := $(VENV)/bin/python
TOOLS := $(VENV)/.packages
PACKAGE := $(VENV)/.editable
else
PY := $(PYTHON)
TOOLS :=
PACKAGE :=
export PYTHONPATH := $(CURDIR)$(if $(WHEELS),:$(CURDIR)/build/site)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
RUN := $(PY) -m
CLANG_FORMAT := $(if $(CUDA),,$(VENV)/bin/)clang-format
PIP := $(RUN) pip --disable-pip-version-check install --quiet
NATIVE := build/native-$(if $(CUDA),cuda,cpu)

.PHONY: help demo test bench gpu lint format native clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'ARGS="..." goes to the command beneath: make test ARGS="-k residual"'

demo: native  ## see the ops work on real data; writes out/demo/report.html
	$(RUN) livrec_fast demo $(ARGS)

test: native  ## run the tests
	$(RUN) pytest $(ARGS)

bench: native  ## time the ops against their peers; writes benches/results/<device>.json, out/bench/
	$(RUN) livrec_fast bench $(ARGS)
	$(PY) benches/report.py

gpu:  ## on a GPU machine: build, test and time all, 25 minutes at most (WHEELS=folder: with its wheels)
	@$(if $(CUDA),,echo "$(PYTHON) has no CUDA torch (2.11 or later) to use" && exit 1;) \
	$(PYTHON) scripts/gpu.py $(if $(WHEELS),--wheels "$(WHEELS)") $(ARGS)

lint: $(TOOLS)  ## check style and types: ruff, clang-format, mypy
	@failed=0; \
	for check in "$(RUN) ruff check" "$(RUN) ruff format --check" \
	    "$(CLANG_FORMAT) --dry-run --Werror $(wildcard csrc/*)" "$(RUN) mypy"; do \
	  echo "$$check"; $$check || failed=1; \
	done; exit $$failed

format: $(TOOLS)  ## put the sources into the style that lint asks for
	-$(RUN) ruff check --fix-only
	$(RUN) ruff format
	$(CLANG_FORMAT) -i $(wildcard csrc/*)

native: $(NATIVE)  ## build the compiled extension in place

clean:  ## remove what was built (not .venv)
	rm -rf build dist out *.egg-info livrec_fast/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.editable

# torch on its own and first: a package that needs it would fetch whichever it likes.
$(VENV)/.torch: requirements/torch.txt requirements/constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/torch.txt -c requirements/constraints.txt
	@touch $@

$(VENV)/.packages: $(VENV)/.torch requirements/dev.txt requirements/peers.txt
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/peers.txt
	@touch $@

$(NATIVE): setup.py pyproject.toml $(wildcard csrc/*) $(TOOLS) | $(PACKAGE)
	@mkdir -p build && rm -f build/native-*
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# compat: the checkout itself goes on sys.path. The import hook of other modes also gives its modules
# to any other copy of the package that lacks one, such as the copies without a library in the tests.
$(VENV)/.editable: pyproject.toml $(VENV)/.packages
	$(PIP) --no-build-isolation --no-deps --config-settings editable_mode=compat --editable .
	@touch $@
