# `make demo` and `make test` do all set-up themselves; they need Python >= 3.11 and nothing else.
PYTHON ?= python3

.PHONY: coverage demo docs mutants soak test test-oldest test-pythons

demo: .venv/ready
	.venv/bin/iddc demo

docs: .venv/ready
	.venv/bin/python -m sphinx -W --keep-going -n docs docs/_build

test: .venv/ready
	VIRTUAL_ENV="$(CURDIR)/.venv" scripts/check

# The long tests: kills at every moment, 20,000 images. They write docs/soak.md.
soak: .venv/ready
	.venv/bin/python scripts/soak

# Fails below 95 % of the branches of src. Not in CI: it takes twice as long as the tests.
coverage: .venv/ready
	.venv/bin/python -m pytest -n 2 --cov --cov-report=term-missing

# Changes src in 400 places, one at a time, and runs the tests that reach the place; writes
# docs/mutants.md. It takes hours, and goes on where it was when it is given again.
mutants: .venv/ready
	.venv/bin/python scripts/mutants --sample 400

# The tests with the oldest version of everything that pyproject.toml allows. Needs uv.
test-oldest:
	uv venv --quiet --clear --python 3.11 .venv-oldest
	uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable . --group dev
	.venv-oldest/bin/python -m pytest -n 2 -W ignore::DeprecationWarning

# The fast tests with other versions of Python, where torch has wheels for them. Needs uv.
PYTHONS ?= 3.12 3.13 3.14
FAST = tests/test_paper.py tests/test_losses.py tests/test_metrics.py tests/test_windows.py \
	tests/test_recipes.py tests/test_runs.py tests/test_schedules.py tests/test_streams.py tests/test_cli.py
test-pythons:
	@for version in $(PYTHONS); do \
	  echo "Python $$version"; \
	  uv venv --quiet --clear --python $$version .venv-$$version \
	  && uv pip install --quiet --python .venv-$$version --editable . --group dev \
	  && .venv-$$version/bin/python -m pytest -n 2 -m "not slow and not soak" $(FAST) \
	  || exit 1; \
	done

# Done again only when pyproject.toml changes. With uv where it works, otherwise with pip,
# which knows dependency groups since 25.1.
.venv/ready: pyproject.toml
	@echo "Setting up .venv (PyTorch included: several GB, some minutes)."
	@{ uv venv --quiet --allow-existing --python '>=3.11' .venv \
	   && uv pip install --quiet --python .venv --editable . --group dev; } 2>/dev/null \
	|| { $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: iddc needs Python >= 3.11, found %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])' \
	   && $(PYTHON) -m venv .venv \
	   && .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' \
	   && .venv/bin/python -m pip install --quiet --editable . --group dev; }
	@touch $@
