# The targets install all they need except Python 3.11+ and make; test-slurm installs a SLURM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-lowest test-slurm lint docs release-check clean

demo: $(VENV)/installed
	$(BIN)/ldae demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest

# Exit status 69: SLURM cannot be installed here. Then only continuous integration (CI) fails.
test-slurm: $(VENV)/installed-test
	@tools/slurm_local.sh with "$$(mktemp -d)" $(BIN)/python -m pytest tests/slurm --numprocesses=3; status=$$?; \
	if [ $$status = 69 ] && [ -z "$$CI" ]; then \
		echo "test-slurm: skipped, because SLURM cannot be installed here"; \
	else exit $$status; fi

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Builds the site into build/site and executes the notebook; a warning fails the build.
docs: $(VENV)/installed-docs
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/python -m mkdocs build --strict

# Builds the wheel and checks it in an environment outside of the checkout. Before a release:
# TAG=v0.1.0 must be of its version, and KEEP=dist keeps what was checked.
release-check:
	$(PYTHON) tools/release_check.py $(if $(TAG),--tag '$(TAG)') $(if $(KEEP),--keep '$(KEEP)')

clean:
	rm -rf $(VENV) $(VENV)-lowest

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldae needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(VENV)-lowest/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) tools/lowest_versions.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet -c $(VENV)-lowest/constraints.txt --editable '.[test]'
	touch $@
