# make demo: set up, build the demo recipe on a real model, print the artifact table.
# make test: set up if missing, then lint, types and the whole test suite.
# make check: lint and types only. CMAKE_ARGS=… adds to how llama.cpp is compiled: docs/install.md
# make clean: remove what these made (not the cache).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# How llama.cpp is compiled is part of it: with other flags, or another compiler, everything is set up again.
READY := $(VENV)/.ready-$(shell CMAKE_ARGS='$(subst ','\'',$(CMAKE_ARGS))' deploy/install-llama-cpp --key)

.PHONY: demo test check setup clean

demo: $(READY)
	$(BIN)/quantize build recipes/smollm2-135m.yaml
	$(BIN)/quantize list artifacts

# A worker for each core, each on that core alone; a file's tests share their fixtures. A worker that crashes ends the
# run: pytest-xdist names the test, but would wait for ever for one that takes its place.
test: check
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --max-worker-restart 0

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)

# torch first and by itself: an unpinned one would bring gigabytes of CUDA packages. llama-cpp-python by itself too, for it
# is compiled with GGML_NATIVE=OFF. pip compiles bytecode on one core only.
$(READY): pyproject.toml constraints.txt deploy/install-llama-cpp
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	deploy/install-llama-cpp $(BIN)/python --quiet --no-compile -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib quantize tests >/dev/null 2>&1 || true
	rm -f $(VENV)/.ready*
	touch $(READY)

clean:
	rm -rf $(VENV) artifacts build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
