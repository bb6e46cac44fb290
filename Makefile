# `make` lists the targets. Everything is installed into .venv, at the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: help install demo screen serve pacs stop test test-all check docs bench faults soak fuzz audit lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: .venv/.installed ## make .venv and install everything into it

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv (some minutes, about 3 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# Ray starts many processes; without bytecode every one compiles torch and ray anew. Some files of some packages do not compile.
	@$(BIN)/python -m compileall -qq -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') || true
	@touch $@

demo: .venv/.installed ## run everything on phantoms: training, registry, screening, ledger, pictures in .demo/ (10 minutes)
	@$(BIN)/python -m infra.local.demo

screen: .venv/.installed ## screen your series: make screen ARCHIVE=folder-or-s3-uri LEDGER=folder-or-s3-uri [MODEL=REF]
	@$(BIN)/python -m infra.local.screen "$(ARCHIVE)" "$(LEDGER)" "$(MODEL)"

serve: .venv/.installed ## run S3, MLflow, Ray, the endpoint and the worklist on loopback, until Ctrl-C or make stop
	@$(BIN)/python -m infra.local.serve

pacs: .venv/.installed ## screen a real PACS on loopback: Orthanc filled, two nights, results stored back, in .pacs/ (2 minutes)
	@$(BIN)/python -m infra.pacs.night $(if $(PORT),--port $(PORT))

stop: .venv/.installed ## end a make serve
	@$(BIN)/python -m infra.local.serve --stop

# Unit and integration tests run on two processes. Those of cluster and http share one Ray, so they
# run in one process; http comes last, because the endpoint holds a CPU that screenings would use.
test: .venv/.installed ## run the tests (17 minutes on two cores)
	@$(BIN)/python -m pytest tests/unit tests/integration -n 2
	@$(BIN)/python -m pytest tests/cluster tests/http

test-all: .venv/.installed ## run make test with the slow tests: every network of the paper's tables
	@$(BIN)/python -m pytest tests/unit tests/integration -n 2 -m 'not faults'
	@$(BIN)/python -m pytest tests/cluster tests/http -m 'not faults'

check: .venv/.installed ## run ruff (lint and format), mypy, and biome for the worklist page
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@if test -x $(BIN)/biome; then $(BIN)/biome ci --error-on-warnings covtanet/report/page; \
	else echo "biome has no wheel for this machine: the worklist page is not linted"; fi

docs: .venv/.installed ## write the reference pages that are generated from the code
	@$(BIN)/python -m docs.generate

bench: .venv/.installed ## measure ratios side by side, keep them under benchmarks/: make bench PART=network
	@$(BIN)/python -m benchmarks $(if $(PART),--part $(PART))

FAULTS_training := tests/faults/test_training_faults.py
FAULTS_screening := tests/faults/test_screening_faults.py tests/faults/test_absent_ray.py \
	tests/faults/test_hanging_series.py tests/faults/test_soak.py
FAULTS_serve := tests/faults/test_serving_faults.py tests/faults/test_rollover_faults.py
FAULTS_pacs := tests/faults/test_pacs_faults.py
FAULTS_nodes := tests/faults/test_node_faults.py tests/faults/test_node_serving.py
FAULTS_all := tests/faults

faults: .venv/.installed ## kill real jobs and services: make faults SUITE=screening (or training, serve, pacs, nodes, all)
	@$(BIN)/python -m pytest -m faults $(or $(FAULTS_$(or $(SUITE),all)),$(error SUITE is training, screening, serve, pacs, nodes or all))

soak: .venv/.installed ## screen night after night under random faults, check every ledger: make soak HOURS=1 (as root: disk full too)
	@$(BIN)/python -m benchmarks.soak --hours $(or $(HOURS),1)

fuzz: .venv/.installed ## search bytes that a reader neither reads nor refuses: make fuzz READER=dicom MINUTES=10
	@$(BIN)/python tests/support/fuzz.py $(or $(READER),dicom) --minutes $(or $(MINUTES),10)

audit: .venv/.installed ## list known vulnerabilities of the packages in constraints.txt; needs the network
	@$(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit
	@.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lock: .venv/.installed ## write infra/image/requirements.txt with hashes from constraints.txt; needs the network
	@$(BIN)/python -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv
	@$(BIN)/python infra/image/lock.py --uv .venv/lock/bin/uv

clean: ## remove the files of demo, benchmarks and fuzzing
	rm -rf .demo .bench .fuzz .pacs
