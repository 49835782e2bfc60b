# The two commands of a newcomer are `make demo` and `make test`; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup browser demo lab notebook presentation deliverables rehearse rehearse-down test run-tests soak lint lint-code lint-playbooks bench lock clean

IMAGES ?= $(FRUITS_IMAGES)
WEIGHTS ?= $(FRUITS_WEIGHTS)
OUTPUT ?= demo-output
export UV_SYSTEM_CERTS ?= 1
# Where this is set, each process compiles what it imports anew: TensorFlow then takes 27 s, not 7.
unexport PYTHONDONTWRITEBYTECODE

# Who has no home, or one that cannot be written to (a container's user), has it here.
ifneq ($(shell [ -d "$$HOME" ] && [ -w "$$HOME" ] && echo yes),yes)
export HOME := $(CURDIR)/.fruits/home
$(shell mkdir -p "$(CURDIR)/.fruits/home")
endif

# Ansible, and Java for names of files, want UTF-8.
ifneq ($(shell locale charmap 2>/dev/null),UTF-8)
export LC_ALL := C.UTF-8
endif

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: ## everything the other commands need, into .venv (they call it themselves)
	@.ci/setup

demo: ## the whole job on this machine: [IMAGES=dir] [WEIGHTS=file] [OUTPUT=dir]
	@.ci/setup demo
	@.venv/bin/fruits demo $(if $(IMAGES),--images "$(IMAGES)") \
		$(if $(WEIGHTS),--weights "$(WEIGHTS)") --output "$(OUTPUT)"

lab: ## the notebooks in JupyterLab, with Spark and S3 on this machine: [IMAGES=dir]
	@.ci/setup demo
	@.venv/bin/fruits lab $(if $(IMAGES),--images "$(IMAGES)")

notebook: setup ## the notebook run on this machine, kept as HTML: [IMAGES=dir] [WEIGHTS=file]
	@.venv/bin/fruits notebook $(if $(IMAGES),--images "$(IMAGES)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

presentation: setup browser ## the slides of a run, HTML and PDF: [OUTPUT=demo-output]
	@.venv/bin/fruits presentation --result "$(OUTPUT)" $(if $(CREDIT),--credit "$(CREDIT)")

deliverables: setup browser ## what the jury gets: NAME=nom_prenom [OUTPUT=s3a://...] [NOTEBOOK=file]
	@.venv/bin/fruits deliverables "$(NAME)" $(if $(filter command line environment,$(origin OUTPUT)),--result "$(OUTPUT)") \
		$(if $(NOTEBOOK),--notebook "$(NOTEBOOK)") $(if $(CREDIT),--credit "$(CREDIT)")

browser: # Chromium, which prints slides and tests pages; .ci/setup says what it takes where it cannot
	@.ci/setup browser

rehearse: setup ## the real playbooks on throw-away hosts, as root: [WORKERS=2] [METRICS=1] [SUITE=trixie] [IMAGES=dir] [WEIGHTS=file] [FRESH=1]
	@.venv/bin/python -m tests.hosts.rehearsal up $(if $(WORKERS),--workers $(WORKERS)) \
		$(if $(METRICS),--metrics) $(if $(SUITE),--suite $(SUITE)) $(if $(FRESH),--fresh) \
		$(if $(IMAGES),--images "$(IMAGES)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

rehearse-down: setup ## the end of the rehearsal: nothing of it is left
	@.venv/bin/python -m tests.hosts.rehearsal down

PYTEST = .venv/bin/python -m pytest $(TESTS) --numprocesses $(or $(JOBS),$(if $(TESTS),0,3))

test: setup browser ## the tests, and lint beside them: [TESTS="tests/unit -k pca"] [JOBS=3]
	@$(MAKE) --no-print-directory --keep-going --jobs 3 lint-code lint-playbooks run-tests || \
		{ echo "make test: failed in what the lines with *** name, here or further up" >&2; exit 1; }

run-tests:
	@$(PYTEST)

soak: setup browser ## tests that take long, and many more examples: [TESTS=tests/unit] [JOBS=2]
	@$(PYTEST) -m "soak or hypothesis" --hypothesis-profile soak

lint: setup ## ruff, mypy, shellcheck, yamllint, ansible-lint
	@$(MAKE) --no-print-directory --jobs 2 lint-code lint-playbooks

lint-code:
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/shellcheck .ci/setup .ci/run

lint-playbooks:
	@git ls-files '*.yml' '*.yaml' | xargs -r .venv/bin/yamllint --strict
	@PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/ansible-lint -q ansible inventory

bench: setup ## the benchmarks: a table, and bench-results.json
	@.venv/bin/python -m tests.benchmarks

COMPILE = .venv/bin/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --no-emit-find-links pyproject.toml

lock: ## resolve every dependency anew into the lock files [UPGRADE=--upgrade]
	$(COMPILE) $(UPGRADE) --extra master --group dev -o dev.lock
	$(COMPILE) --extra master -c dev.lock -o master.lock
	$(COMPILE) -c dev.lock -o worker.lock
	$(subst pyproject.toml,,$(COMPILE)) $(UPGRADE) --group admin -c dev.lock -o admin.lock
	$(subst pyproject.toml,,$(COMPILE)) --group build -c dev.lock -o build.lock
	$(subst pyproject.toml,,$(COMPILE)) --group demo -c dev.lock -o demo.lock
	$(subst pyproject.toml,,$(COMPILE)) --group java -o java.lock
	.venv/bin/python -m pipeline.engine.jars lock

clean: ## remove what the demo and the tests left, kept hosts too; secrets of clusters, and a rehearsal, stay
	[ ! -x .venv/bin/python ] || .venv/bin/python -m tests.hosts.snapshots
	[ ! -d .fruits ] || find .fruits -mindepth 1 -maxdepth 1 ! -name secrets ! -name rehearsal -exec rm -rf {} +
	rm -rf demo-output notebook-output presentation.html presentation.pdf .pytest_cache .mypy_cache .ruff_cache .hypothesis
