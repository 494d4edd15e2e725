# The two commands of a new user: `make demo` and `make test`. Each builds .venv once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# Where the environment forbids cached bytecode, every process compiles torch and lightning anew: 20 s instead of 9.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slow test-gpu lint format typecheck check clean

demo: $(READY)
	$(BIN)/python examples/compare_heads.py --resume $(ARGS)

# two processes: the tests themselves compute on one thread each
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The built wheel is checked, from outside the repository: at its root a checker sees only a part of the package.
typecheck: $(READY)
	rm -rf build
	$(BIN)/python -m build --wheel --installer uv --outdir build/typecheck . >/dev/null
	$(BIN)/python -m zipfile -e build/typecheck/moe_heads-*.whl build/typecheck
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p moe_heads

check: lint typecheck test

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
