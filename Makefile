# The two commands of a new user: `make demo` and `make test`. Each builds .venv once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest/bin
LOWEST_READY := .venv-lowest/.ready
# Where the environment forbids cached bytecode, every process compiles torch and lightning anew: 20 s instead of 9.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-lowest test-slow test-gpu gpu coverage notebooks test-notebooks lint format typecheck check clean

demo: $(READY)
	$(BIN)/python examples/compare_heads.py --resume $(ARGS)

# two processes: the tests themselves compute on one thread each
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The quick tests with the lowest versions of pyproject.toml. Old packages use what newer ones call deprecated, also in
# the pytest that a test starts.
test-lowest: $(LOWEST_READY)
	PYTEST_ADDOPTS="-W ignore::DeprecationWarning -W ignore::FutureWarning" $(LOWEST)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# On a machine with a GPU, in at most nine minutes; any Python with torch and Lightning will do.
DEVICE ?= cuda
OUT ?= examples/benchmarks/results/gpu
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) examples/benchmarks/gpu.py --out $(OUT) --device $(DEVICE) $(if $(QUICK),--quick) $(if $(IMAGES),--images $(IMAGES)) $(ARGS)

# Runs the scripts of examples/notebooks and stores them as notebooks with their output.
notebooks: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[notebooks]'
	$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 examples/notebooks/*.py
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False examples/notebooks/*.ipynb

test-notebooks: $(READY)
	$(BIN)/python -m pytest -m slow tests/examples/test_notebooks.py $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=moe_heads --cov-report=term $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.py' '*.md' '*.toml' '*.yaml' '*.html' | xargs $(BIN)/codespell
	$(BIN)/python tests/support/words.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)
	$(BIN)/mypy -p moe_heads
	$(BIN)/mypy examples tests

check: lint typecheck test

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(LOWEST_READY): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct --constraint constraints-lowest.txt --editable '.[dev]'
	touch $(LOWEST_READY)

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
