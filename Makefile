# The README's commands. Each sets up what it needs; VENV and PYTHON can be overridden.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
LONG_RUN ?= runs/demo-long
# On a CPU accelerate starts its process with one thread unless told otherwise.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
LAUNCH = $(BIN)/accelerate launch --config_file configs/accelerate/single.yaml \
  --num_cpu_threads_per_process $(THREADS) -m training.train

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo demo-long test test-full memcheck lint bench-cpu bench-gpu report clean

help:
	@echo "make demo       pretrain a small Mamba-2 on this interpreter's library, reload, generate, evaluate"
	@echo "make demo-long  the same for longer, to beat an order-5 n-gram clearly"
	@echo "make test       linters, types and the test suite (what CI runs)"
	@echo "make test-full  the tests marked slow or gpu too (these skip where there is no GPU)"
	@echo "make memcheck   small kernels under compute-sanitizer (needs a GPU)"
	@echo "make bench-cpu  CPU speed beside transformers' torch path"
	@echo "make bench-gpu  operators beside their peers on the GPU, correctness first"
	@echo "make report     docs/performance.md from benchmarks/results"

# A stamp per set of extras: a changed pyproject.toml or constraints.txt installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

demo: $(VENV)/.installed-train,eval
	$(LAUNCH) --config configs/train/demo.yaml --run_dir $(RUN) --resume never
	$(BIN)/python -m eval.run --model $(RUN)/final --suite configs/eval/demo.yaml \
	  --variables.run $(RUN) --output $(RUN)/report

demo-long: $(VENV)/.installed-train,eval
	$(LAUNCH) --config configs/train/demo-long.yaml --run_dir $(LONG_RUN)
	$(BIN)/python -m eval.run --model $(LONG_RUN)/final --suite configs/eval/demo.yaml \
	  --variables.run $(LONG_RUN) --output $(LONG_RUN)/report

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread per worker: the tests' tensors are small, and two thread pools on two cores only wait
# for one another (measured: 33 s in place of 240 s).
# Workers take tests from one another: else one is left with several that compile for minutes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu and not network"

test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not network"

memcheck: $(VENV)/.installed-dev
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(BIN)/python -m tests.ops.memcheck

bench-cpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.cpu

bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m tests.ops.grid
	$(BIN)/python -m benchmarks.ops

report: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) runs
