# Everything sets itself up: a virtual environment in .venv with the CPU build of torch, and this package, editable.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
OLDEST := .venv-oldest
PYTEST := -m pytest -n 2 --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all test-oldest test-gpu bench-gpu kill lint clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m specformer.scripts.demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m "not slow and not gpu"

test-all: lint test-oldest
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m "not gpu"

# The oldest transformers that is supported.
test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow and not gpu and not real"

test-gpu: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m gpu -rs

# Kills distillation and training, ten times each, and compares with runs that are left alone.
kill: $(VENV)/ready
	$(VENV)/bin/python tests/kill.py --kills 10 --output benchmarks/results/kills.json

# All GPU tables, with the Python and the CUDA build of torch that are installed: make bench-gpu PROMPTS=prompts.jsonl.
# May be stopped: benchmarks go on where they were.
BENCH := $(PYTHON) -m specformer.scripts.benchmark --prompts $(PROMPTS) --dtype bfloat16
COST := $(PYTHON) -m specformer.scripts.cost_model --batch-sizes 1 8 32 128
RESULTS := benchmarks/results
bench-gpu:
	$(BENCH) --batch-sizes 1 8 32 128 2 4 16 64 --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu.json \
		--contenders "default, " "always right, k" "always wrong, auto"
	$(BENCH) --batch-sizes 1 32 --decoding sampling --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_sampling.json
	$(BENCH) --batch-sizes 1 32 --prompt-tokens 2048 8000 --output $(RESULTS)/benchmark_gpu_long.json
	$(BENCH) --batch-sizes 1 32 --num-assistant-tokens auto 0 1 2 3 4 5 6 7 8 --contenders "default, " \
		--max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_lengths.json
	$(BENCH) --batch-sizes 32 --same-prompt --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_same_prompt.json
	$(PYTHON) -m specformer.scripts.loop_overhead --prompts $(PROMPTS) --dtype bfloat16 --batch-sizes 1 32 128 \
		--output $(RESULTS)/loop_overhead_gpu.json
	$(COST) --shape Qwen3-8B --output $(RESULTS)/cost_qwen3_8b.json
	$(COST) --shape Llama-3.1-8B --output $(RESULTS)/cost_llama3_8b.json
	$(COST) --shape Qwen3-8B --cuda-graphs --output $(RESULTS)/cost_qwen3_8b_graphs.json

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .ruff_cache

# Plain "torch" would bring gigabytes of CUDA where there is no GPU, so the CPU build is asked for first.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version`. Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(1)
	@echo "Installing torch $(TORCH) (CPU build) ..."
	@$(1)/bin/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
		$(1)/bin/pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)" 2>/dev/null || \
		$(1)/bin/pip install --quiet "torch==$(TORCH)"
	@echo "Installing the package and its tools ..."
	$(1)/bin/pip install --quiet -e ".[scripts,test]" $(2)
	@touch $(1)/ready
endef

$(VENV)/ready: setup.cfg pyproject.toml
	$(call install,$(VENV),transformers)

$(OLDEST)/ready: setup.cfg pyproject.toml
	$(call install,$(OLDEST),transformers==5.17.0)
