# Everything a person does twice. All of it happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
# a pair that fits together; "make TORCH='torch torchvision'" takes the newest
TORCH ?= torch==2.14.1 torchvision==0.29.1
# a release before, under which test-wheel runs what was built against the other
OLD_TORCH ?= torch==2.13.0
DEVICE ?= cpu
# processes that run the tests, each a file at a time
JOBS ?= 2
EXTRAS = train,test,lint,docs

VENV_PYTHON = .venv/bin/python
PIP = $(VENV_PYTHON) -m pip --disable-pip-version-check
CPP = $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/cpp/*.* $(addprefix tests/cuda_on_cpu/*.,h cuh cpp))

.DEFAULT_GOAL := help
.PHONY: help demo test mutate bench docs lint format sanitize triton-report cuda-report wheel test-wheel build clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo 'Variables: PYTHON=$(PYTHON) TORCH="$(TORCH)" DEVICE=$(DEVICE); SSLKERNELS_WERROR=1 makes warnings errors'

demo: build ## train SimCLR on the embedded digits and print the result
	$(VENV_PYTHON) -m sslkernels train simclr --demo
	@echo 'Next: "source .venv/bin/activate", then "sslkernels verify" and "sslkernels bench --quick --op infonce"'

test: build ## run the whole test suite
	$(VENV_PYTHON) -m pytest -n $(JOBS) --dist loadfile

mutate: build ## break every kernel in the ways of tests/mutations.py and see that verify and the tests notice
	$(VENV_PYTHON) tests/mutants.py

bench: build .venv/.bench ## measure against eager, torch.compile and peers: JSON, tables, figures (DEVICE=cuda on a GPU)
	$(VENV_PYTHON) -m sslkernels bench --device $(DEVICE)

docs: build ## build the documentation into build/site; a warning is an error
	$(VENV_PYTHON) -m mkdocs -q build --strict
	@echo 'open build/site/index.html; "$(VENV_PYTHON) -m mkdocs serve" has the search too'

triton-report: build ## compile the Triton kernels ahead of time and rewrite their table of resources
	$(VENV_PYTHON) tests/triton_aot.py

cuda-report: build ## read the CUDA kernels' machine code and rewrite their table of resources
	$(VENV_PYTHON) tests/cuda_aot.py

sanitize: .venv/.installed ## run the C++ tests under AddressSanitizer + UBSan and under ThreadSanitizer
	$(VENV_PYTHON) setup.py -q sanitize

lint: .venv/.installed ## check style and types: ruff, mypy and clang-format
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy --no-error-summary
	.venv/bin/clang-format --dry-run -Werror $(CPP)

format: .venv/.installed ## rewrite the sources in that style
	$(VENV_PYTHON) -m ruff check --fix
	$(VENV_PYTHON) -m ruff format
	.venv/bin/clang-format -i $(CPP)

wheel: .venv/.installed ## build dist/*.whl against the torch of .venv
	@rm -rf build/lib.* # setuptools would pack modules that are long deleted
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

test-wheel: wheel ## use the wheel, and that of the source distribution, under two versions of torch (needs network)
	$(VENV_PYTHON) tests/wheels.py dist $(OLD_TORCH)

build: .venv/.installed ## bring the compiled extension up to date
	@$(VENV_PYTHON) setup.py -q build_ext --inplace

clean: ## remove what was built; .venv stays
	rm -rf build dist sslkernels.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f sslkernels/_C.*.so
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# pip cannot tell a package whose installation was cut off: where .unfinished was left behind, start again
.venv/.installed: pyproject.toml Makefile
	@if [ -e .venv/.unfinished ] || ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then rm -rf .venv/bin .venv; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'sslkernels needs Python 3.10 or later: make PYTHON=python3.12'; exit 1; }
	@echo 'Setting up .venv: some 6 GB of packages, then a few minutes of compiling'
	@mkdir -p .venv && touch .venv/.unfinished
	@[ -x $(VENV_PYTHON) ] || $(PYTHON) -m venv .venv || { echo 'Debian has venv in python3-venv'; exit 1; }
	sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr , ' ' | xargs $(PIP) install $(TORCH)
	$(PIP) install --no-build-isolation -e '.[$(EXTRAS)]'
	@rm .venv/.unfinished
	@touch $@

.venv/.bench: .venv/.installed
	$(PIP) install --no-build-isolation -e '.[$(EXTRAS),bench]'
	@touch $@
