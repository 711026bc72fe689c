# `make demo` and `make test` do all set-up themselves; they need Python >= 3.11 and nothing else.
PYTHON ?= python3

.PHONY: demo test

demo: .venv/ready
	.venv/bin/iddc demo

test: .venv/ready
	VIRTUAL_ENV="$(CURDIR)/.venv" scripts/check

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
