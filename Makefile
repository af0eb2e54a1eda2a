# `make demo`, `make demo-jax` and `make test` need Python 3.11 or later, and nothing else: each builds its own
# environment in .venv.
PYTHON ?= python3
RUN := .venv/bin/python -m
INSTALL := $(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# Workers take whole files, in their order: what a file has compiled is compiled once, and JAX comes last in each.
WORKERS ?= 2
SPREAD := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-jax test properties lint types docs older-hosts wheel-test clean

demo: .venv/demo
	$(RUN) examples.segment --out demo

# The same in JAX, with the same weights.
demo-jax: .venv/demo-jax
	$(RUN) examples.jax.segment --out demo/jax

test: .venv/dev
	$(RUN) pytest $(SPREAD)

# Thousands of examples for each property; half an hour and more.
properties: .venv/dev
	HYPOTHESIS_PROFILE=thorough $(RUN) pytest $(SPREAD) tests/core tests/torch

lint: .venv/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: .venv/dev
	$(RUN) pyright

docs: .venv/dev
	$(RUN) mkdocs build --strict

# The oldest timm and transformers that pyproject.toml allows. Their environment looks behind itself into .venv for all
# else, so that nothing big is installed twice.
older-hosts: .venv/dev
	rm -rf .venv-older
	$(RUN) venv .venv-older
	set -e; python=.venv-older/bin/python; \
	behind=$$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	own=$$($$python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	echo "import site; site.addsitedir('$$behind')" > $$own/behind.pth; \
	$$python -m pip install --quiet --disable-pip-version-check $(OLDER); \
	TOKENEXIT_HOSTS="$(OLDER)" $$python -m pytest -q $(SPREAD) $(HOST_TESTS)

# The built wheel, without any framework, must pass the core's tests in an environment of its own, away from the source.
wheel-test: .venv/dev
	rm -rf build/wheel .venv-wheel
	$(RUN) pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt build/wheel/tokenexit-*.whl --group test
	set -e; python=$$PWD/.venv-wheel/bin/python; away=$$(mktemp -d); \
	mkdir $$away/tests; cp -r tests/__init__.py tests/conftest.py tests/core $$away/tests; cd $$away; \
	$$python -c "import tokenexit; assert 'site-packages' in tokenexit.__file__, tokenexit.__file__"; \
	$$python -m pytest -q $(SPREAD) --import-mode=importlib -p no:cacheprovider tests; rm -rf $$away

clean:
	rm -rf .venv .venv-wheel build demo site

.venv/pip:
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	touch $@

.venv/demo: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) ".[torch,viz]"
	touch $@

.venv/demo-jax: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) ".[jax,nnx,viz]"
	touch $@

.venv/dev: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) ".[torch,jax,nnx,timm,viz]" --group dev
	touch $@
