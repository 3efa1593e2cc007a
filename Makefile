# make train    train a progressive GAN on handwritten digits (VARIANT=wgan-gp and ARGS="--kimg 50" change that)
# make docs     the documentation as a site in build/site, with what is generated from the code
# make test     lint, types and tests, under ten minutes on two cores; make test-all adds the slow tests
# make gpu      the first run on a GPU, in pieces (docs/gpu.md); needs no installation; ARGS="--minutes 9"

PYTHON ?= python3
VARIANT ?= pggan
ARGS ?=
BIN := .venv/bin
# Two workers of one thread each: threads of several processes on the same cores slow each other down tenfold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: install train test suite test-all docs gpu lint clean

# DeepSpeed's launcher uses every GPU of this host; it is installed on Linux alone.
install: .venv/installed

train: .venv/installed
	@if [ -x $(BIN)/deepspeed ]; then set -x; $(BIN)/deepspeed fastgan/train.py --variant $(VARIANT) $(ARGS); \
	else set -x; $(BIN)/fastgan train --variant $(VARIANT) $(ARGS); fi

# Both at once: the linters need one core for most of a minute.
test: .venv/installed
	@$(MAKE) --no-print-directory -j 2 lint suite

suite: .venv/installed
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "not gpu" --timeout 3600 --hypothesis-profile random

gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m scripts.commands_page
	$(BIN)/python -m scripts.architecture_picture
	$(BIN)/python -m zensical build --strict --clean
	@echo "open build/site/index.html"

.venv/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastgan needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@echo "compiling the kernels for this machine, where there is a compiler"
	@$(BIN)/python -c 'from fastgan.ops.dispatch import extension; print(extension.cpu() or "compiled")'
	@touch $@

clean:
	rm -rf .venv build .cache *.egg-info
