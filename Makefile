# Everything sets itself up: a virtual environment in .venv with the CPU build of torch, the exact versions of
# constraints.txt, and this package, editable.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
CANARY := .venv-canary
PYTEST := -m pytest -n 2 --dist worksteal
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_BUILDS := https://download.pytorch.org/whl/cpu
comma := ,
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-code docs test test-all test-browser test-oldest test-pages canary test-gpu bench-gpu kill lint clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m specformer demo

demo-code: $(VENV)/ready
	$(VENV)/bin/python -m specformer demo --code

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m "not slow and not gpu"

test-all: lint test-oldest $(VENV)/pages
	$(VENV)/bin/python tests/browser.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m "not gpu"

# The oldest transformers that is supported, without the tests that say the same on any version.
test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow and not gpu and not real and not one_version"

# One visit to the Space in a browser, which is installed if need be. Where none can be had it is skipped, and says so.
test-browser: $(VENV)/browser
	$(VENV)/bin/python tests/browser.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_space.py::test_the_page_in_short

# The Space in a browser, the documentation and the notebook.
test-pages: $(VENV)/pages
	$(VENV)/bin/python tests/browser.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not gpu" tests/test_space.py tests/test_pages.py tests/test_notebook.py

# The documentation as pages, in build/site.
docs: $(VENV)/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# The newest of everything, in an environment that is made anew each time: what the next release elsewhere breaks.
# torch stays the CPU build that was found: a newer one that another package asks for would be a CUDA build.
# tests/canary.py lists what is tested; with ALL=yes everything is.
canary:
	rm -rf $(CANARY)
	$(call environment,$(CANARY))
	@newest=`$(CANARY)/bin/pip index versions torch --extra-index-url $(CPU_BUILDS) 2>/dev/null | \
		grep -o '[0-9.]*+cpu' | head -1 | cut -d+ -f1`; $(call torch,$(CANARY),$${newest:-$(TORCH)},/dev/null)
	@{ $(CANARY)/bin/pip freeze | grep '^torch=='; grep '^triton==' constraints.txt; } > $(CANARY)/constraints.txt
	$(call package,$(CANARY),$(CANARY)/constraints.txt)
	OMP_NUM_THREADS=1 $(CANARY)/bin/python tests/canary.py $(if $(ALL),--all) $(PYTEST) -m "not slow and not gpu" \
		--deselect tests/test_packaging.py::test_every_version_is_pinned

# With the Python and the CUDA build of torch that are installed, and this package: pip install -e ".[scripts,test]".
test-gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { \
		echo "make test-gpu: $(PYTHON) has no torch that finds a CUDA GPU. Nothing was tested. Name one that has: make test-gpu PYTHON=..." >&2; \
		exit 1; }
	$(PYTHON) -m pytest -m gpu -rs

# Kills distillation, generation and training, ten times each, and compares with runs that are left alone.
kill: $(VENV)/ready
	$(VENV)/bin/python tests/kill.py --kills 10 --output benchmarks/results/kills.json

# All GPU tables, with the Python and the CUDA build of torch that are installed: make bench-gpu PROMPTS=prompts.jsonl.
# May be stopped: benchmarks go on where they were.
BENCH := $(PYTHON) -m specformer bench --prompts $(PROMPTS) --dtype bfloat16
COST := $(PYTHON) -m benchmarks.cost_model --batch-sizes 1 8 32 128
RESULTS := benchmarks/results
bench-gpu:
	$(BENCH) --batch-sizes 1 8 32 128 2 4 16 64 --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu.json \
		--contenders "default, " "always right, k" "always wrong, auto"
	$(BENCH) --batch-sizes 1 32 --decoding sampling --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_sampling.json
	$(BENCH) --batch-sizes 1 32 --prompt-tokens 2048 8000 --output $(RESULTS)/benchmark_gpu_long.json
	$(BENCH) --batch-sizes 1 32 --num-assistant-tokens auto 0 1 2 3 4 5 6 7 8 --contenders "default, " \
		--max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_lengths.json
	$(BENCH) --batch-sizes 32 --same-prompt --max-new-tokens 256 --output $(RESULTS)/benchmark_gpu_same_prompt.json
	$(PYTHON) -m benchmarks.loop_overhead --prompts $(PROMPTS) --dtype bfloat16 --batch-sizes 1 32 128 \
		--output $(RESULTS)/loop_overhead_gpu.json
	$(COST) --shape Qwen3-8B --output $(RESULTS)/cost_qwen3_8b.json
	$(COST) --shape Llama-3.1-8B --output $(RESULTS)/cost_llama3_8b.json
	$(COST) --shape Qwen3-8B --cuda-graphs --output $(RESULTS)/cost_qwen3_8b_graphs.json

# mypy finds a package by the name of its folder, and a checkout may have any: it has the right one by a link.
lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@mkdir -p $(VENV)/checkout && ln -sfn ../.. $(VENV)/checkout/specformer
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(OLDEST) $(CANARY) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# environment, folder: a fresh one
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version`. Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(1)
endef

# pip, folder, constraints: these, in place of those that a machine may set for all of its environments
pip = PIP_CONSTRAINT=$(2) PIP_BUILD_CONSTRAINT=$(2) $(1)/bin/pip install --quiet

# torch, folder, version, constraints: plain "torch" would bring gigabytes of CUDA where there is no GPU, so the CPU build
# is asked for first
torch = echo "Installing torch $(2) (CPU build) ..."; \
	$(call pip,$(1),$(3)) "torch==$(2)+cpu" 2>/dev/null || \
	$(call pip,$(1),$(3)) "torch==$(2)+cpu" --extra-index-url $(CPU_BUILDS) 2>/dev/null || \
	$(call pip,$(1),$(3)) "torch==$(2)"

# package, folder, constraints: with what `make test` needs
define package
	@echo "Installing the package and its tools ..."
	@$(call pip,$(1),$(2)) -e ".[scripts,test]"
	@touch $(1)/ready
endef

# extras, their names, file that says they are there: beside what is in $(VENV) already
define extras
	@echo "Installing $(1) ..."
	@$(call pip,$(VENV),"constraints.txt constraints-pages.txt") -e ".[$(1)]"
	@touch $(2)
endef

$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@$(call torch,$(VENV),$(TORCH),constraints.txt)
	$(call package,$(VENV),constraints.txt)

$(OLDEST)/ready: setup.cfg pyproject.toml constraints.txt
	$(call environment,$(OLDEST))
	sed -e 's/^transformers==.*/transformers==5.17.0/' -e 's/^huggingface_hub==.*/huggingface_hub==1.33.0/' \
		constraints.txt > $(OLDEST)/constraints.txt
	@$(call torch,$(OLDEST),$(TORCH),$(OLDEST)/constraints.txt)
	$(call package,$(OLDEST),$(OLDEST)/constraints.txt)

# The page of the Space, and a browser's driver.
$(VENV)/browser: $(VENV)/ready constraints-pages.txt
	$(call extras,space$(comma)test-browser,$@)

# Also the documentation and the notebook.
$(VENV)/pages: $(VENV)/browser
	$(call extras,docs$(comma)test-pages,$@)
