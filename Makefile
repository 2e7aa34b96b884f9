# The commands set themselves up: Python 3.11+ and make are all they need; test-slurm installs a SLURM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slurm clean

demo: $(VENV)/installed
	$(BIN)/ldae demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# 69: there can be no SLURM on this machine, which only continuous integration may not pass over.
test-slurm: $(VENV)/installed-test
	@tools/slurm_local.sh with "$$(mktemp -d)" $(BIN)/python -m pytest tests/slurm --numprocesses=3; status=$$?; \
	if [ $$status = 69 ] && [ -z "$$CI" ]; then \
		echo "test-slurm: skipped, for SLURM can not be installed here"; \
	else exit $$status; fi

clean:
	rm -rf $(VENV)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldae needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
