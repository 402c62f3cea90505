# Every target works in .venv, which it makes when it is missing. `make demo` and `make test` are all
# a newcomer needs; PYTHON=python3.12 chooses another interpreter for a new .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet
# Two workers, each with whole files: fixtures of a module start real servers. PYTEST_ARGS="-n 0"
# runs all in one process, as a debugger wants it.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

NATIVE := $(wildcard kvcodec/native/*.cpp kvcodec/native/*.h kvcodec/native/*.map) \
  kvcodec/native/CMakeLists.txt
SGLANG_ENV := tools/install_sglang.sh \
  $(shell find tools/sglang_cpu -type f -not -path '*/__pycache__/*' 2>/dev/null)

# A stamp is younger than what it was made from: a second run does nothing.
SYSTEM := $(VENV)/stamp-system
PYTHON_ENV := $(VENV)/stamp-python
INSTALLED := $(VENV)/stamp-installed
SGLANG := $(VENV)/stamp-sglang
STORES := $(VENV)/stamp-stores
PEERS := $(VENV)/stamp-peers

.PHONY: help setup sglang stores demo demo-sidecar test check lint types pytest native-test neon-test fuzz-long \
  bench bench-auto bench-controller bench-disk bench-store bench-network bench-sidecar soak-sidecar flood-sidecar fault-runs \
  container container-test compose-test quality peers dist clean distclean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv, build libkvcodec, install kvcodec and the development tools

sglang: $(SGLANG)  ## setup, and SGLang for a machine without a GPU

stores: $(STORES)  ## sglang, and the servers and file systems that the tests store pages in

demo: $(SGLANG)  ## SGLang on this CPU backs pages up through kvcodec and prefetches them again
	$(BIN)/python tools/demo.py

demo-sidecar: $(SGLANG)  ## the same, with a sidecar between the engine and the store
	$(BIN)/python tools/demo.py --backend sidecar

test: $(SGLANG) $(STORES) lint types  ## everything CI checks: lint, types, import contracts, tests
	$(PYTEST) $(PYTEST_ARGS)

check:  ## what CI runs: demo, native-test, test
	.ci/run

lint: $(INSTALLED)  ## ruff
	$(BIN)/ruff check --quiet .

types: $(INSTALLED)  ## mypy, strict, on the four packages
	$(BIN)/mypy

pytest: $(INSTALLED)  ## the tests alone; PYTEST_ARGS="-k layout"
	$(PYTEST) $(PYTEST_ARGS)

native-test: native-test-address native-test-thread  ## libkvcodec under sanitizers, without Python; warnings are errors

native-test-address: build/address/driver
	$< all

native-test-thread: build/thread/driver
	$< threads
	$< compare 30

# Phony, for Ninja knows what is up to date. In MAKEFLAGS it would find jobs that are not its own.
.PHONY: build/address/driver build/thread/driver native-test-address native-test-thread
build/address/driver: SANITIZERS := address,undefined
build/thread/driver: SANITIZERS := thread
build/address/driver build/thread/driver: $(INSTALLED)
	$(BIN)/cmake -S kvcodec/native -B $(@D) -G Ninja -DKVCODEC_SANITIZE=$(SANITIZERS) \
	  -DKVCODEC_WERROR=ON -DKVCODEC_BUILD_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	MAKEFLAGS= $(BIN)/cmake --build $(@D) --target driver

neon-test:  ## the NEON kernels on an emulated processor, against the portable ones
	tests/native/run_neon_qemu.sh

fuzz-long: $(INSTALLED)  ## 10^6 mutants under sanitizers, 20,000 cases of every property: an hour
	PYTHON=$(BIN)/python tests/native/fuzz_sanitized.sh 1000000
	HYPOTHESIS_PROFILE=long $(BIN)/pytest -q -o timeout=0 tests/test_properties.py

bench: $(INSTALLED)  ## codec speed against memcpy, every codec and instruction set: 15 minutes, quiet machine
	mkdir -p docs/measurements
	$(BIN)/kvcodec bench codec --layouts page_first,layer_first,canonical --json > docs/measurements/codec-speed.json
	$(BIN)/python tools/plot_speed.py docs/measurements/codec-speed.json docs/images/codec-speed.svg

bench-controller: $(SGLANG)  ## tokens per second through SGLang's controller, beside its file backend
	mkdir -p docs/measurements build
	$(BIN)/python -W ignore tools/bench_controller.py --directory build \
	  --json docs/measurements/controller.json

bench-disk: $(SGLANG)  ## the same from a disk of 1 GB/s, with the codecs of few bits: five minutes, root
	mkdir -p docs/measurements
	$(BIN)/python -W ignore tools/bench_controller.py --disk-rate 1e9 \
	  --cases file,raw,kv4,ecq-4,ecq-3,ecq-2.5 --json docs/measurements/disk.json

bench-auto: $(INSTALLED)  ## what `auto` foretells and chooses, and what specs really take: three minutes
	mkdir -p docs/measurements
	$(BIN)/python tools/bench_auto.py --json docs/measurements/auto.json \
	  --plot docs/images/auto.svg

bench-store: $(INSTALLED)  ## file:// against the disk's own rate: ten minutes, quiet disk
	mkdir -p docs/measurements build
	$(BIN)/python tools/bench_store.py build \
	  --json docs/measurements/local-store.json --picture docs/images/local-store.svg

bench-network: $(STORES)  ## tokens per second from a store behind 1 and 8 Gbit/s: five minutes, root
	mkdir -p docs/measurements
	$(BIN)/python -W ignore tools/bench_network.py --json docs/measurements/network.json \
	  --plot docs/images/network.svg

fault-runs: $(STORES)  ## break real stores in the middle of hundreds of batches: ten minutes, root
	mkdir -p docs/measurements
	$(BIN)/python tools/fault_runs.py --json docs/measurements/faults.json

bench-sidecar: $(INSTALLED)  ## the sidecar against the store in the same process: five minutes, quiet machine
	mkdir -p docs/measurements
	$(BIN)/python tools/bench_sidecar.py --json docs/measurements/sidecar.json \
	  --plot docs/images/sidecar.svg

soak-sidecar: $(INSTALLED)  ## a day of pages through one sidecar: twenty minutes
	mkdir -p docs/measurements
	$(BIN)/python tools/soak_sidecar.py --json docs/measurements/sidecar-soak.json

flood-sidecar: $(INSTALLED)  ## a hundred thousand streams against one sidecar: three minutes, quiet machine
	mkdir -p docs/measurements
	$(BIN)/python tools/stream_flood.py --json docs/measurements/sidecar-flood.json

container:  ## the sidecar's image, with docker or podman
	docker/build.sh kvcodec

container-test: $(INSTALLED) container  ## run the image, and try what it promises: a minute
	docker/test_container.sh kvcodec

compose-test: $(STORES)  ## start the Compose file, with images of Debian's packages: ten minutes, root
	docker/debian_docker.sh build/docker docker/test_compose.sh

quality: $(INSTALLED)  ## error against size of every preset, on synthetic KV
	mkdir -p docs/measurements
	$(BIN)/python tools/codec_quality.py --json docs/measurements/codec-quality.json \
	  --plot docs/images/codec-quality.svg

peers: $(PEERS)  ## presets beside other codecs, quality and speed: fifteen minutes, quiet machine
	mkdir -p docs/measurements docs/images
	PYTHONPATH=tools OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m peers --packages $(VENV)/peers \
	  --json docs/measurements/peers.json --pictures docs/images \
	  --page docs/quality.md --page docs/peers.md

dist: $(INSTALLED)  ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf kvcodec/native/CMakeFiles kvcodec/native/.cmake
	cd kvcodec/native && rm -f libkvcodec.so CMakeCache.txt CMakeInit.txt cmake_install.cmake \
	  compile_commands.json build.ninja .ninja_deps .ninja_log .skbuild-info.json
	rm -f $(INSTALLED)

distclean: clean  ## and .venv
	rm -rf $(VENV)

$(SYSTEM): tools/system_packages.sh tools/apt_install.sh
	tools/system_packages.sh
	mkdir -p $(VENV)
	touch $@

$(PYTHON_ENV): $(SYSTEM)
	$(PYTHON) -m venv $(VENV)
	touch $@

# Without build isolation CMake and Ninja are those of .venv, so that the build folder of the
# editable install stays valid and a changed source file alone is compiled again.
$(INSTALLED): $(PYTHON_ENV) pyproject.toml constraints-dev.txt $(NATIVE)
	$(PIP_INSTALL) --constraint constraints-dev.txt cmake ninja scikit-build-core
	$(PIP_INSTALL) --constraint constraints-dev.txt --no-build-isolation --editable '.[dev]'
	touch $@

# The script keeps its own pins. They need not be tried again because a C++ file changed: order only.
$(SGLANG): $(SGLANG_ENV) | $(INSTALLED)
	tools/install_sglang.sh $(BIN)/python
	touch $@

# In a folder of their own, and without what they would bring along. Each is used once, because
# quanto compiles itself when it is first used.
$(PEERS): tools/peers/requirements.txt | $(SGLANG)
	rm -rf $(VENV)/peers
	$(PIP_INSTALL) --no-deps --target $(VENV)/peers --requirement tools/peers/requirements.txt
	PYTHONPATH=tools $(BIN)/python -W ignore -m peers --list --packages $(VENV)/peers
	touch $@

$(STORES): tools/install_stores.sh $(wildcard tools/stores/*.sh) | $(SGLANG)
	tools/install_stores.sh $(BIN)/python
	touch $@
