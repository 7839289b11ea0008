# Every target sets itself up: in the active virtual environment, otherwise in .venv here.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.pckernels-installed
OUT := out
COMPILED := tests/test_triton_build.py
# test_triton_absent.py runs where there is no Triton, and all others are skipped.
INTERPRETED := $(addprefix tests/test_triton_,absent.py op.py kernels.py rows.py step.py cross_entropy.py max_pool.py chain.py \
  machine.py instructions.py)
INTERPRET = TRITON_INTERPRET=1 $(RUN) -m pytest -n auto $(INTERPRETED)

# The tensors of the demo and of the tests are too small to be worth a second thread each.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

.PHONY: demo test test-triton test-triton-oldest bench bench-check bench-micro lint format clean

demo: $(STAMP)
	$(RUN) -m pckernels train cnn --learner both --epochs 30 --out $(OUT) --overwrite
	$(RUN) -m pckernels train cnn --rule strict --epochs 20 --optimizer adam --lr 0.001 --out $(OUT)/strict --overwrite
	$(RUN) -m pckernels verify cnn resnet lstm --plot $(OUT)/convergence.png --json $(OUT)/verify.json
	@echo "Figures: $$(echo $(OUT)/*.png $(OUT)/strict/*.png)"

# A process for each core; tests that share a compilation stay together (xdist_group). Triton decides when it is imported whether kernels
# are interpreted, so those tests have processes of their own.
test: lint
	$(RUN) -m pytest -n auto --dist loadgroup
	$(INTERPRET)

# The part of it that is Triton's: kernels compiled for GPUs, and interpreted on the CPU.
test-triton: $(STAMP)
	$(RUN) -m pytest $(COMPILED)
	$(INTERPRET)

# The kernels compiled with the oldest Triton that setup.py allows, installed into a folder of its own: some minutes and 650 MB.
test-triton-oldest: $(STAMP)
	$(RUN) tests/oldest_triton.py $(OUT)/triton-oldest

# Minutes; the report is out/bench/report.html.
bench: $(STAMP)
	$(RUN) -m pckernels bench --suite quick --out $(OUT)/bench

# Ratios of the quick suite against the committed ones: fails where one has lost more than a quarter. For a machine with nothing else to do.
bench-check: $(STAMP)
	$(RUN) -m pckernels bench --suite quick --check bench/results/cpu.json --out $(OUT)/bench

# Single kernels and the cost of a call, by pytest-benchmark.
bench-micro: $(STAMP)
	$(RUN) -m pytest bench/micro.py --benchmark-columns=min,median,iqr,rounds

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv build dist $(OUT) *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The tests compile the CUDA kernels by themselves, to hold them against their budgets, and need no module of them.
PCKERNELS_CUDA ?= OFF
export PCKERNELS_CUDA

NATIVE := CMakeLists.txt csrc/bindings.cpp $(wildcard csrc/engine/* csrc/host/*)

# One install for as long as the packaging files and the native sources stay as they are.
$(STAMP): setup.py pyproject.toml constraints.txt $(NATIVE)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
