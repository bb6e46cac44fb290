# make demo | screen | test | check | bench; everything is installed into .venv at the exact versions of constraints.txt
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: help install demo screen serve stop test test-all check bench faults fuzz audit lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: .venv/.installed ## make .venv and install everything into it

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv (some minutes, about 3 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# Ray starts processes all the time; without bytecode each compiles torch and ray anew. Not every file of every package compiles.
	@$(BIN)/python -m compileall -qq -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') || true
	@touch $@

demo: .venv/.installed ## phantoms -> training -> registry -> screening -> ledger and pictures, in .demo/ (10 minutes)
	@$(BIN)/python infra/local/demo.py

screen: .venv/.installed ## screen your own: make screen ARCHIVE=folder-or-s3-uri LEDGER=folder-or-s3-uri [MODEL=REF]
	@$(BIN)/python infra/local/screen.py "$(ARCHIVE)" "$(LEDGER)" "$(MODEL)"

serve: .venv/.installed ## S3, MLflow, Ray, the endpoint and the worklist on loopback, until Ctrl-C or make stop
	@$(BIN)/python infra/local/endpoint.py

stop: .venv/.installed ## end what make serve started
	@$(BIN)/python infra/local/endpoint.py --stop

test: .venv/.installed ## the test suite (16 minutes on two cores)
	@$(BIN)/python -m pytest tests/unit -n 2
	@$(BIN)/python -m pytest tests/cluster

test-all: .venv/.installed ## make test, and what takes many minutes: every network of the tables
	@$(BIN)/python -m pytest tests/unit -n 2 -m ''
	@$(BIN)/python -m pytest tests/cluster -m ''

check: .venv/.installed ## ruff (lint and format), mypy, and biome for the worklist page
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@if test -x $(BIN)/biome; then $(BIN)/biome ci --error-on-warnings covtanet/report/page; \
	else echo "biome has no wheel for this machine: the worklist page is not linted"; fi

bench: .venv/.installed ## ratios measured side by side, kept under benchmarks/
	@$(BIN)/python benchmarks/bench.py

faults: .venv/.installed ## real kills against real jobs: make faults SUITE=screening (or training, serve, all)
	@$(BIN)/python infra/local/faults.py --suite $(or $(SUITE),all)

fuzz: .venv/.installed ## look for bytes that a reader neither reads nor refuses: make fuzz READER=dicom MINUTES=10
	@$(BIN)/python tests/fuzz.py $(or $(READER),dicom) --minutes $(or $(MINUTES),10)

audit: .venv/.installed ## known holes in what constraints.txt installs, where the network reaches the advisories
	@$(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit
	@.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lock: .venv/.installed ## infra/image/requirements.txt anew from constraints.txt, with hashes, where the network reaches the index
	@$(BIN)/python -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv
	@$(BIN)/python infra/image/lock.py --uv .venv/lock/bin/uv

clean: ## remove what the demo and the benchmark left
	rm -rf .demo .bench .fuzz
