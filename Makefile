# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow test-gpu engine check format wheel clean

demo: $(INSTALLED)
	$(BIN)/python recipes/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# one script for a GPU, of under 8 minutes: make test-gpu engine; DEVICE=cpu tries the second part without one
DEVICE ?= cuda
engine: $(INSTALLED)
	for how in "" "--precision bf16" "--adapt lora" "--adapt lora --precision bf16"; do \
		timeout 100 $(BIN)/python benchmarks/engine.py --device $(DEVICE) $$how || exit 1; \
	done

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) dist demo-output
