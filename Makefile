# Every target makes .venv from requirements.lock first if it is not there (or is older than the lock).
# PYTHON may name an interpreter: make setup PYTHON=python3.12

# The first of these that runs and is Python 3.11 or newer; 3.11 and 3.12 are what is tested.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo test test-all lint parity scale aot lock clean

setup: $(READY)

$(READY): requirements.lock setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or run make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY)
	$(RUN) run.py demo

# Every law at least once, in minutes. Two processes: more gain nothing on two cores, where XLA's compiler is what takes
# the time.
test: $(READY)
	$(RUN) -m pytest -q -n 2 --dist worksteal -m "not slow and not thorough" $(TESTS)

test-all: $(READY)
	$(RUN) -m pytest -q -n 2 --dist worksteal $(TESTS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# What the tests against Hugging Face's transformers need; without it they are skipped. On Linux, PyPI's torch comes with
# several gigabytes of CUDA unless pip finds a CPU build.
parity: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==4.57.6' 'accelerate>=1'

# The tests on Apache Beam, in an environment of its own: Beam takes older versions of protobuf and pyarrow than the lock.
scale: $(READY)
	$(RUN) -m venv $(VENV)-scale
	$(VENV)-scale/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)-scale/bin/python -m pip install --quiet --disable-pip-version-check '.[scale]'
	$(VENV)-scale/bin/python -m pytest -q tests/data/test_engines.py tests/data/test_prepare.py -k beam

# What the TPU compiler makes of the training step, without a TPU, in an environment of its own: with libtpu installed,
# every other command would look for a TPU.
aot: $(READY)
	$(RUN) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)-aot/bin/python -m pip install --quiet --disable-pip-version-check '.[tpu]'
	$(VENV)-aot/bin/python -m pytest -q -n 2 tests/parallel/test_hlo_laws.py tests/training/test_ahead.py \
		tests/parallel/test_compiler.py tests/parallel/test_mesh.py tests/layers/test_attention.py

# Exact versions for Python 3.11 and 3.12 in one file; needs uv (pip install uv).
lock:
	uv pip compile -q setup.cfg --extra test --extra analysis --universal --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" -o requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-scale $(VENV)-aot build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
