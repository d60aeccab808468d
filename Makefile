# The environment is .venv beside this file; PYTHON chooses what it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-slow lint docs docs-serve clean

help:
	@echo "make demo   train a small GPT-2 on Python's own documentation, then sample from it"
	@echo "make test   run the tests and the parity proofs, all but the slowest"
	@echo "make test-slow   run the slowest"
	@echo "make lint   check style and types"
	@echo "make docs   build the documentation's site into site/; every link must lead somewhere"
	@echo "make docs-serve   show it at http://127.0.0.1:8000 while you write"
	@echo "make clean  remove .venv, site/ and caches; data/ and runs/ stay"

demo: .venv/installed
	$(BIN)/python scripts/train.py --config configs/demo.py --overwrite
	$(BIN)/python scripts/generate.py --source runs/demo --prompt "The following" \
		--max_new_tokens 80 --temperature 0.8

# tests/ asks what must hold, not how fast or how close: there LLVM need not optimise what it
# compiles, which takes a third of the time. The proofs run what users run.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: .venv/installed
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" \
		$(BIN)/python -m pytest tests $(PARALLEL) -m "not slow"
	$(BIN)/python -m pytest parity $(PARALLEL) -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest tests parity $(PARALLEL) -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Or each build ends with what the authors of Material for MkDocs have to say of MkDocs 2.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: .venv/installed
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: .venv/installed
	$(BIN)/mkdocs serve --strict

# Installed anew whenever what is to be installed changes.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv build site *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
