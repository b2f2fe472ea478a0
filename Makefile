# Each command sets up all it needs, in .venv. PYTHON names the interpreter; TORCH_INDEX_URL a package index to take
# torch from, e.g. https://download.pytorch.org/whl/cpu where there is no GPU.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench test test-all lint format proto proto-check proto-release docs clean

demo: $(READY)
	$(BIN)/lorasrv demo

# On a CPU: every target of speed, measured, met or not, in some ten minutes. OPTIONS=--quick sees whether it runs.
bench: $(READY)
	mkdir -p build
	$(BIN)/python -m lorasrv_bench.cpu --out build/bench.json $(OPTIONS)

# A test's module stays in one process; more of them than cores gain nothing.
PYTEST := $(BIN)/pytest -q -n auto --maxprocesses 4 --dist loadfile

test: lint proto-check
	$(PYTEST)

test-all: lint proto-check
	$(PYTEST) -m "not gpu" --hypothesis-profile=new_examples

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The native CPU code is compiled when the package is installed.
NATIVE := hatch_build.py $(wildcard kernels/lorasrv_kernels/native/*.py kernels/lorasrv_kernels/native/*.h \
	kernels/lorasrv_kernels/native/*.cpp)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "lorasrv needs Python >= 3.11; $(PYTHON) is %d.%d. Name another with PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) --editable ".[server,dev]"
	touch $@

GENERATE = $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	$(wildcard proto/lorasrv/v1/*.proto)

proto: $(READY)
	$(call GENERATE,.)

proto-check: $(READY)
	rm -rf build/proto && mkdir -p build/proto
	$(call GENERATE,build/proto)
	diff -r -x __init__.py -x __pycache__ build/proto/lorasrv/v1 lorasrv/v1 || { echo "Generated code is stale: run make proto"; exit 1; }
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against $(wildcard proto/released/*.binpb)

# The contract of the last release is kept as a file, so that a checkout without tags or network can be held to it.
# Run this in the commit that is tagged.
proto-release: $(READY)
	rm -f proto/released/*.binpb
	$(BIN)/buf build proto --exclude-source-info -o proto/released/v$$($(BIN)/python -c 'import lorasrv; print(lorasrv.__version__)').binpb

docs: $(READY)
	$(BIN)/python docs/generate_api.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
