# `make demo` and `make test` are all a newcomer needs; each installs what is missing, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The TensorRT versions whose Python API the tests compare our calls with: bindings alone, no GPU.
TENSORRT := 10.16.1.11 11.4.0.106
BINDINGS := $(TENSORRT:%=$(VENV)/tensorrt/%)
EXTRAS := train,export,cpu,openvino,triton,dev

.PHONY: demo test lint

demo: $(INSTALLED)
	$(BIN)/vitrine demo

test: lint $(BINDINGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(BINDINGS): $(VENV)/tensorrt/%: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ tensorrt-cu13-bindings==$*
