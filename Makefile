# `make demo` and `make test` do everything on a fresh machine with Python >= 3.10: they make .venv and install into it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo docs test test-slow test-all test-oldest fuzz lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# A YOLOv5n on five handwritten digits, a fit to the others, a calibration, shifts: runs/demo/demo.html.
demo: install
	$(BIN)/python tools/demo.py

# What a change is tested with; `make test-slow` runs what it leaves out, `make test-all` both.
test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

test-all: install
	$(BIN)/python -m pytest

# The same suite with the oldest Ultralytics that pyproject.toml admits.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet -e '.[dev]' "$$(sed -n 's/.*"\(ultralytics\)>=\([0-9.]*\),.*/\1==\2/p' pyproject.toml)"
	$(VENV)-oldest/bin/python -m pytest

# Ten thousand cases for each target, in place of a hundred.
fuzz: install
	YOLO_SOS_FUZZ=10000 $(BIN)/python -m pytest tests/faults/test_fuzz.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a dead link or an unknown name is an error. Preview: .venv/bin/mkdocs serve
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest dist build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
