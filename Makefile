# `make demo`, `make demo-jax` and `make test` need Python 3.11 or later, and nothing else: each builds its own
# environment in .venv.
PYTHON ?= python3
RUN := .venv/bin/python -m
# What is never imported need not be compiled.
PIP := pip install --quiet --disable-pip-version-check --no-compile
INSTALL := $(RUN) $(PIP) --constraint constraints.txt --editable
# Workers take whole files, in their order: what a file has compiled is compiled once, and JAX comes last in each.
WORKERS ?= 2
MINUTES ?= 10
SPREAD := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The lower bounds of pyproject.toml; what is imported must be these.
OLDER := timm==1.0.20 transformers==5.17.0
define IMPORTED
import sys, transformers
from examples.timm_import import import_timm
found = [f"{one.__name__}=={one.__version__}" for one in (import_timm(), transformers)]
bounds = open("pyproject.toml").read()
print("Older hosts:", *found)
assert found == sys.argv[1:], sys.argv[1:]
assert all(one.replace("==", ">=") + '"' in bounds for one in found), "the bounds of pyproject.toml"
endef
export IMPORTED
HOST_TESTS := $(addprefix tests/torch/test_,hosts.py decoding.py wrapping.py semantic.py saving.py)

.PHONY: demo demo-jax test slow properties invariance coverage-study fuzz gpu-report lint types figures docs older-hosts wheel-test browser dist clean

demo: .venv/demo
	$(RUN) examples.segment --out demo

# The same in JAX, with the same weights.
demo-jax: .venv/demo-jax
	$(RUN) examples.jax.segment --out demo/jax

test: .venv/dev
	$(RUN) pytest $(SPREAD)

# Trainings like others that `make test` runs.
slow: .venv/dev
	$(RUN) pytest $(SPREAD) -m slow

# Thousands of examples for each property; half an hour and more.
properties: .venv/dev
	HYPOTHESIS_PROFILE=thorough $(RUN) pytest $(SPREAD) tests/core tests/torch

# Whether an image is alone what it is in any batch: 1,500 trials in PyTorch and 1,500 in JAX.
invariance: .venv/dev
	HYPOTHESIS_PROFILE=invariance $(RUN) pytest $(SPREAD) tests/torch/test_invariance.py tests/jax/test_invariance.py

# Calibrations by the thousand: whether what they promise holds. Some minutes.
coverage-study: .venv/dev
	$(RUN) tests.core.coverage

# More than ten thousand hostile files, and two hundred processes killed at their work.
fuzz: .venv/dev
	HOSTILE_FILES=10500 $(RUN) pytest $(SPREAD) -rA -k hostile_files tests/torch/test_hostile.py tests/jax/test_hostile.py
	$(RUN) tests.torch.kills --kills 200

# On a machine with a GPU: goes on where the last call stopped, and writes gpu-report/tables.md.
gpu-report: .venv/dev
	$(RUN) tests.benchmarks.gpu --device cuda --minutes $(MINUTES) --out gpu-report

lint: .venv/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: .venv/dev
	$(RUN) pyright

# The figures of the site, in both of its colour schemes: the same bytes each time.
figures: .venv/dev
	$(RUN) examples.figures --out docs/images

# Built strictly, then looked at: spelling, alternative texts, links within the site, and whether users find what they ask.
docs: .venv/dev
	$(RUN) mkdocs build --strict
	$(RUN) codespell_lib --ignore-words-list retuned README.md CHANGELOG.md docs --skip '*.svg,*.png'
	$(RUN) pymarkdown --disable-rules '*' --enable-rules md045 scan --recurse README.md docs
	.venv/bin/lychee --offline --no-progress --include-fragments --index-files index.html --root-dir $$PWD/site --exclude-path site/404.html site
	$(RUN) tests.website.reach site --table docs/results/testing.md

# The oldest hosts that pyproject.toml allows, in an environment that looks into .venv for all else: nothing big is
# installed twice. This timm scripts some of its parts by torch.jit when it is imported, which PyTorch advises against.
older-hosts: .venv/dev
	rm -rf .venv-older
	$(RUN) venv .venv-older
	set -e; python=.venv-older/bin/python; where="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	behind=$$(.venv/bin/python -c "$$where"); \
	echo "import site; site.addsitedir('$$behind')" > "$$($$python -c "$$where")/behind.pth"; \
	$$python -m $(PIP) $(OLDER); \
	$$python -W ignore -c "$$IMPORTED" $(OLDER); \
	HYPOTHESIS_PROFILE=again $$python -m pytest -q $(SPREAD) -W 'ignore:`torch.jit:DeprecationWarning' $(HOST_TESTS)

# The built wheel, without any framework, must pass the core's tests in an environment of its own, away from the source.
# On NumPy, for what is tested is the wheel.
wheel-test: .venv/dev
	rm -rf build/wheel .venv-wheel
	$(RUN) pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m $(PIP) --upgrade "pip>=25.1"
	.venv-wheel/bin/python -m $(PIP) --constraint constraints.txt build/wheel/tokenexit-*.whl --group test
	set -e; python=$$PWD/.venv-wheel/bin/python; away=$$(mktemp -d); \
	mkdir $$away/tests; cp -r tests/__init__.py tests/conftest.py tests/core $$away/tests; cd $$away; \
	$$python -c "import tokenexit; assert 'site-packages' in tokenexit.__file__, tokenexit.__file__"; \
	CORE_BACKENDS=numpy HYPOTHESIS_PROFILE=again $$python -m pytest -q $(SPREAD) --import-mode=importlib -p no:cacheprovider tests; \
	rm -rf $$away

# The site, and the page of an assessment, in a headless Chromium: that of the system (`apt-get install chromium`) if there
# is one.
browser: .venv/dev
	$(RUN) pytest -q -rs tests/browser

# What is uploaded: both files built, their metadata checked, and the sdist installed and used away from the source.
dist: .venv/dev
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m $(PIP) build twine
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	rm -rf .venv-dist && $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m $(PIP) --constraint constraints.txt dist/tokenexit-*.tar.gz
	set -e; python=$$PWD/.venv-dist/bin/python; cd "$$(mktemp -d)"; \
	$$python -c "import tokenexit; assert 'site-packages' in tokenexit.__file__, tokenexit.__file__"; \
	$$python -m tokenexit_cli info

clean:
	rm -rf .venv .venv-older .venv-wheel .venv-dist build demo dist site

.venv/pip:
	$(PYTHON) -m venv .venv
	$(RUN) $(PIP) --upgrade "pip>=25.1"
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
