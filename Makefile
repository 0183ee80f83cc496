PYTHON ?= python3
VENV ?= .venv
# The CUDA build of torch 2.13 insists on triton 3.7.1, so pip would replace it by 2.11.0, which goes with the pinned
# triton. `make install TORCH=torch==2.11.0` spares that second download where pip offers CUDA builds.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Test processes side by side; whole files go to one, so that what their tests share is made once.
JOBS ?= 2
# The order of the files is that of tests/conftest.py.
WHOLE_FILES := -n $(JOBS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Keeps the repository root off sys.path under `python -m` and `python -c`, where kernels/ would be seen as a package.
export PYTHONSAFEPATH := 1

.PHONY: install demo test lint format wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[train,wandb,peft,qlora,trl,deepspeed,serve,eval,dev]" -c constraints.txt
	touch $@

demo: install
	$(BIN)/sparse-hf demo

# Triton's interpreter is chosen when kernels are imported, hence a process of its own. Those tests share nothing.
test: install
	$(BIN)/pytest $(WHOLE_FILES) -m "not network" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS) tests/kernels/interpreter

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The wheel is built from the source archive, so a stale build/ cannot leak into it.
wheel: install
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache
	find sparse_hf kernels training scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
