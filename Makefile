# The few verbs of this project. Each sets up what it needs; all are quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BENCH  := benchmarks/.venv
# Whoever changes one of these needs a new build.
RUST   := $(shell find src -name '*.rs') Cargo.toml Cargo.lock pyproject.toml

.PHONY: setup demo chaos chaos-redis test test-rust test-python redis lint format bench docs clean

setup: $(VENV)/.built                       ## a virtual environment with the release build in it

$(VENV)/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet 'maturin>=1.16,<2' --group test --group lint
	touch $@

$(VENV)/.built: $(VENV)/.tools $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet --extras cli
	touch $@

demo: setup                                 ## a hub that is killed twice, three engines, a page: all zeros at the end
	$(BIN)/safe-broadcaster demo $(ARGS)

chaos: setup                                ## kill -9 at random until there is proof; ARGS='--kills 1000 --durability all --seed 7'
	$(BIN)/python -m chaos $(ARGS)

chaos-redis: setup                          ## the same for hubs that share a stream over Redis; ARGS='--seconds 300 --seed 7'
	$(BIN)/python -m chaos.bridge $(ARGS)

test: test-rust test-python                 ## everything that can fail

test-rust: redis
	cargo test --no-default-features --quiet

test-python: setup redis
	$(BIN)/python -m pytest $(ARGS)

# Started by the tests on ports of their own; RUNLEVEL=1 keeps the package from starting its service.
redis:                                      ## redis-server for the tests of the bridge, which are skipped by name without it
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& { apt-get update -qq; RUNLEVEL=1 apt-get install -y -qq redis-server >/dev/null; }; } \
		|| echo "no redis-server, and no right to install it: the tests of the bridge are skipped"

lint: setup                                 ## formatting, lints, types
	cargo fmt --check
	cargo clippy --all-targets --quiet -- -D warnings
	cargo clippy --all-targets --features python --quiet -- -D warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m mypy.stubtest safe_broadcaster._core

docs:                                       ## the Rust API as pages
	cargo doc --no-deps --quiet

format:
	cargo fmt
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(BENCH)/.built                      ## speed beside its peers, in tables; ARGS='--quick' to see that it runs
	cargo build --release --quiet --manifest-path benchmarks/tools/Cargo.toml
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

# Measured is what users install: a wheel, in an environment that has the peers too.
$(BENCH)/.built: $(VENV)/.tools $(RUST) $(shell find python -name '*.py') benchmarks/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	rm -rf dist
	$(BIN)/maturin build --release --quiet -o dist
	$(BENCH)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) dist target benchmarks/out benchmarks/tools/target
