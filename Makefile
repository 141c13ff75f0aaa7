# Two commands: `make serve` and `make test`. Each sets up what it needs; the rest is for those who work on llep.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/tools
PROMETHEUS := $(TOOLS)/usr/bin/prometheus
DEBS   := prometheus prometheus-alertmanager
BROWSER := chromium fonts-dejavu-core
CHROMIUMS := chromium chromium-browser google-chrome google-chrome-stable
NPMS   := @grafana/schema@13.2.3 typescript@7.0.2

# make serve: another checkpoint or hub name with MODEL=..., other vLLM flags with FLAGS=...; TRAIN=1 first trains a
# small model on this machine's text (5 minutes), whose routing is skewed as real models' is: the default from then on.
TINY   := models/tiny-gpt-oss
# Half of the experts hot, and experts large enough for lending to save time on two CPU cores: as in deploy/.
DEMO   := --hot 0-7 --hot-share 0.85 --hidden 256 --intermediate 1024 --dtype bfloat16
NATURAL := models/natural-gpt-oss
MODEL  ?= $(if $(TRAIN)$(wildcard $(NATURAL)/config.json),$(NATURAL),$(TINY))
FLAGS  ?= --tensor-parallel-size 2 --enable-expert-parallel --enforce-eager
# The prompts of a demo are short: balance batches that a GPU would leave alone. Two ranks of a trained model are never
# far apart: balance them all the same.
serve: export LLEP_IMBALANCE_THRESHOLD ?= 1.05
serve: export LLEP_MIN_BATCH_TOKENS ?= 16
serve: export LLEP_MIN_CHUNK_TOKENS ?= 8
# Short runs: measure the gain often; and leave room to try resident copies (`llep placement`).
serve: export LLEP_PROBE_RATIO ?= 0.05
serve: export LLEP_METRICS_LEVEL ?= layer_rank
serve: export LLEP_REPLICAS ?= suggest
serve: export LLEP_REPLICA_SLOTS_PER_RANK ?= 8

.PHONY: serve dashboard test tools check lint types unit bench soak lock clean

serve: $(READY) $(if $(filter $(TINY) $(NATURAL),$(MODEL)),$(MODEL)/config.json)
	@exec $(BIN)/llep serve $(MODEL) $(FLAGS)

# Beside `make serve`: a Prometheus, and the panels of the Grafana dashboard at http://127.0.0.1:3000, without a Grafana.
dashboard: $(READY) $(if $(shell command -v prometheus),,$(PROMETHEUS))
	@PATH="$$PATH:$(abspath $(dir $(PROMETHEUS)))" exec $(BIN)/llep dashboard

# Tests that mostly wait run two at a time; a vLLM on two ranks wants both cores of a small machine to itself.
test: check tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not vllm" \
	  tests/dist tests/gpu tests/scheduler tests/server tests/page tests/ops
	$(BIN)/python -m pytest -m "vllm or e2e" tests/ops tests/vllm tests/e2e

check: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

# Each adds lines to bench/results: an hour on 2 quiet cores.
bench: $(READY)
	$(BIN)/python -m bench.planning.latency --append
	$(BIN)/python -m bench.planning.lends --append
	$(BIN)/python -m bench.planning.optimum --append
	$(BIN)/python -m bench.simulate speed --append
	$(BIN)/python -m bench.placement --append
	$(BIN)/python -m bench.scheduler.decision --append
	$(BIN)/python -m bench.scheduler.traces --append
	$(BIN)/python -m bench.scheduler.load --append
	$(BIN)/python -m bench.scheduler.memory --append
	$(BIN)/python -m bench.scheduler.latency --append
	$(BIN)/python -m bench.natural.compare --append
	$(BIN)/python -m bench.scrape --append
	$(BIN)/python -m bench.layer --sweep all --append
	$(BIN)/python -m bench.memory --append
	$(BIN)/python -m bench.kernels --append
	$(BIN)/python -m bench.figures
	$(BIN)/python -m bench.serving --append
	$(BIN)/python -m bench.server --append
	$(BIN)/python -m bench.server --scrape --append
	$(BIN)/python -m bench.page --append

# Long runs of what `make test` runs a short share of.
soak: $(READY)
	$(BIN)/python -m bench.planning.fuzz --append
	$(BIN)/python -m bench.http_fuzz --append
	$(BIN)/python -m bench.server_kills --append
	$(BIN)/python -m bench.server --minutes 10 --append
	$(BIN)/python -m bench.soak --append
	$(BIN)/python -m bench.scheduler.faults --append
	$(BIN)/python -m bench.monitoring --append

$(TINY)/config.json: | $(READY)
	$(BIN)/llep model tiny gpt-oss $(TINY) $(DEMO)

$(NATURAL)/config.json: | $(READY)
	$(BIN)/llep model train gpt-oss $(NATURAL)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "llep wants Python 3.11 or newer: name one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock \
	  || { echo "No CPU build of torch? Name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL and try again."; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c 'from llep.planning import warm_up; warm_up()'
	touch $@

# Prometheus and its tools, and Grafana's types, unpacked beside the packages; and a Chromium, which root gets from
# Debian: nothing else is installed on the machine. Tests skip without them.
tools: $(READY)
	@$(MAKE) --no-print-directory $(PROMETHEUS) || echo "Tests that need them are skipped."
	@test -x $(TOOLS)/grafana/node_modules/.bin/tsc \
	  || npm install --silent --no-audit --no-fund --no-save --prefix $(TOOLS)/grafana $(NPMS) \
	  || echo "No npm, or no packages $(NPMS): tests that need them are skipped."
	@for one in $(CHROMIUMS); do command -v $$one > /dev/null && exit; done; \
	  test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && \
	  { apt-get -qq install -y --no-install-recommends $(BROWSER) > /dev/null 2>&1 || \
	  { apt-get -qq update && apt-get -qq install -y --no-install-recommends $(BROWSER) > /dev/null; }; } || \
	  echo "No Chromium ($(CHROMIUMS)), and not root on Debian to install one: tests of the page are skipped."

$(PROMETHEUS):
	@mkdir -p $(TOOLS) && cd $(TOOLS) && \
	  { apt-get -qq download $(DEBS) 2>/dev/null || { apt-get -qq update && apt-get -qq download $(DEBS); }; } && \
	  for package in *.deb; do dpkg-deb --extract $$package .; done && rm *.deb || \
	  { echo "No apt-get, or no Debian packages $(DEBS): put a prometheus of your own into PATH."; exit 1; }

# A new requirements.lock from the ranges in pyproject.toml.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet "torch==2.13.0+cpu" hatchling editables
	build/lock/bin/python -m pip install --quiet --editable ".[cpu]" --group dev
	build/lock/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	head -2 requirements.lock > build/requirements.lock
	build/lock/bin/python -m pip freeze --exclude-editable --exclude pip >> build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf $(VENV) build models .pytest_cache .mypy_cache .ruff_cache .hypothesis
