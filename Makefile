# Headwater's chores; `make` alone lists them. Needs Python 3.11 and nothing else:
# the rest goes into $(VENV). Written for GNU make 3.81, which macOS ships.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
SEED   ?= 1
PEERS  ?= torch ray tensorflow

BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet
PACKAGES := client examples protos server worker

# What is installed is remembered by these files, and done again only when
# pyproject.toml changes.
CREATED := $(VENV)/.created
PRODUCT := $(VENV)/.product
DEV     := $(VENV)/.dev
BENCH   := $(VENV)/.bench

.DEFAULT_GOAL := help
.PHONY: help run test soak lint format protos bench bench-peers bench-consistency clean

help: ## list these targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12] [VENV=.venv]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: $(PRODUCT) ## train on handwritten digits here: one server, two workers (ARGS: options of `headwater run`)
	@$(BIN)/headwater run --task headwater.examples.mnist --workers 2 $(ARGS)

test: $(DEV) ## run the whole test suite, on all cores (ARGS: options of pytest)
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

soak: $(DEV) ## ten minutes of faults, at both levels of durability (SEED: the storm's, to repeat one)
	@cd tests && for level in snapshot log; do \
	  $(abspath $(BIN))/python -m kit.storm --seconds 300 --durability $$level --seed $(SEED) || exit 1; \
	done

lint: $(DEV) ## check format, style, types, and that the generated code is current
	@$(BIN)/ruff format --check --quiet --diff .
	@$(BIN)/ruff check --quiet .
	@$(call link-tree)
	@$(BIN)/mypy --no-error-summary build/lint/headwater benchmarks
	@$(call generate,build/protos)
	@for file in parameter_server_pb2.py parameter_server_pb2.pyi; do \
	  diff -u "protos/$$file" "build/protos/headwater/protos/$$file" \
	  || { echo "protos/$$file is not what the .proto gives: run make protos" >&2; exit 1; }; \
	done

format: $(DEV) ## put the code in its standard format, and fix what can be fixed safely
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

protos: $(DEV) ## generate the Python code of protos/parameter_server.proto
	@$(call generate,build/protos)
	@cp build/protos/headwater/protos/parameter_server_pb2.py* protos/

bench: $(BENCH) ## measure speed on this machine (ARGS: options of benchmarks/run.py, and parts by name)
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench-peers: $(DEV) $(PEERS:%=build/peers/%/.installed) ## the same work by PyTorch RPC, Ray, TensorFlow (PEERS: which)
	@$(BIN)/python -m benchmarks.peers.run --folder build/peers $(PEERS) $(ARGS)

bench-consistency: $(BENCH) ## measure what staleness does, an hour (ARGS: options of benchmarks/consistency.py)
	@$(BIN)/python -m benchmarks.consistency --plot build/consistency.png $(ARGS)

clean: ## remove the environment and everything else that was made, but not runs/
	@rm -rf $(VENV) build dist headwater.egg-info .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Headwater needs Python 3.11 or newer, which $(PYTHON) is not: name one, as in make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv), or name another Python with PYTHON=" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(PRODUCT): $(CREATED) pyproject.toml
	@echo "Installing Headwater into $(VENV); this takes a minute or two, once."
	@$(PIP) install --editable '.[examples]'
	@touch $@

$(DEV): $(CREATED) pyproject.toml
	@echo "Installing Headwater and its development tools into $(VENV); this takes a minute or two, once."
	@$(PIP) install --editable '.[dev,examples]'
	@touch $(PRODUCT) $@

$(BENCH): $(DEV)
	@$(PIP) install --editable '.[bench]'
	@touch $@

# Each in an environment of its own, to be thrown away.
build/peers/%/.installed: benchmarks/peers/%.txt
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@echo "Installing $* into $(@D), once; it may be large."
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

build/examples/%/.installed: examples/%.txt pyproject.toml
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@echo "Installing $* into $(@D), once; it may be large."
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

# Type checkers don't see an editable install, so show them the package as links.
define link-tree
rm -rf build/lint && mkdir -p build/lint/headwater && \
for folder in $(PACKAGES); do \
  ln -s "../../../$$folder" "build/lint/headwater/$$folder" || exit 1; \
done && \
for file in src/headwater/*.py*; do \
  ln -s "../../../$$file" build/lint/headwater/ || exit 1; \
done
endef

# $(call generate,FOLDER). The mapping names the file as the package does, so
# that the generated import is of headwater.protos.
define generate
rm -rf $(1) && mkdir -p $(1) && \
$(BIN)/python -m grpc_tools.protoc -Iheadwater/protos=protos --python_out=$(1) --pyi_out=$(1) \
  headwater/protos/parameter_server.proto
endef
