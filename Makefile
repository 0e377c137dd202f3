# make demo    everything from nothing: environment, install, build, videos
# make test    environment, ruff, mypy, clang-format, tests
# make reliability  everything that attacks the packages, and what it found as docs/reliability.md; its parts:
#   make property   10,000 random batches, for what every op promises of them
#   make fuzz-calls the CPU kernels under AddressSanitizer: bad calls of every compiled entry and public function
#   make fuzz-files damaged media, checkpoints, prompts, paths; make fuzz, both
#   make crashes    saves that are interrupted at every system call
#   make races      the CPU kernels under ThreadSanitizer; make soak, training and kernels for long; make huge, huge tensors: 20 GiB
#   make floors     the lowest versions; make sdist-test, the source distribution
# make sanitize  the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench   the benchmarks; make bench-report also writes their table and plot to docs/benchmarks, make bench-gate fails if a
#              ratio has fallen since
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CSRC := $(shell find csrc tests/simt tests/reliability -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# make checkpoint   the checkpoint that comes with the package, from nothing: VAE, transformer with its text encoder, captioner
# make gallery      contact sheets of every task in docs/gallery; make eval, the figures in docs/eval.json
.PHONY: demo test lint format sanitized sanitize bench bench-report bench-gate checkpoint gallery eval clean
.PHONY: reliability property fuzz fuzz-calls fuzz-files crashes races soak huge floors sdist-test

# Reinstalled when what it is made from changes; ninja recompiles only what has to be.
$(READY): pyproject.toml setup.py constraints.txt $(CSRC)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/sora demo --out outputs/demo --overwrite

# First what runs for real, then GPU kernels one operation or one thread at a time: a process for each core, of one thread unless a
# test asks for more. Files stay whole, as some prepare for minutes what all their tests read. The tests of the GPU driver have
# deadlines and build on all cores, so they run alone.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8
DRIVER_TESTS := tests/test_gpu_driver.py tests/test_gpu_rehearsal.py
test: $(READY) lint
	$(PYTEST) --dist loadfile -m 'not emulated' $(DRIVER_TESTS:%=--ignore=%)
	$(BIN)/python -m pytest $(DRIVER_TESTS)
	$(PYTEST) -m emulated

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# In a copy of the tree, so that the module in use stays as it is. Every tier this processor has. Python itself leaks, and it lacks
# the C++ library whose exceptions AddressSanitizer wants to see from the start.
SANITIZED := build/sanitize
SANITIZED_TESTS := $(addprefix tests/test_,attention.py spatiotemporal_attention.py block_sparse_attention.py rope.py adaln.py norm_gate_residual.py bias_gelu.py \
  patch_embed.py patchify.py attention_edges.py memory.py bad_calls.py)
TIERS = $(shell $(BIN)/python -c 'import torch; from sora_kernels import _cpu; print(*(name for name, has in _cpu.isa_tiers() if has))')
SANITIZER_OPTIONS = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:$(ASAN_LIMITS) UBSAN_OPTIONS=print_stacktrace=1

SANITIZED_FILES = git ls-files -z csrc sora_kernels sora_model tests benchmarks docs setup.py pyproject.toml README.md
sanitized: $(READY)
	mkdir -p $(SANITIZED)
	$(SANITIZED_FILES) | xargs -0 cp -p --parents -t $(SANITIZED)
	cd $(SANITIZED) && SORA_KERNELS_CUDA=0 SORA_KERNELS_SANITIZE=1 $(abspath $(BIN))/python setup.py build_ext --inplace

sanitize: sanitized
	test -n "$(TIERS)"  # a shell loop over nothing is a success
	set -e; cd $(SANITIZED); export $(SANITIZER_OPTIONS); for tier in $(TIERS); do export SORA_KERNELS_ISA=$$tier; echo $$tier; \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -m 'not emulated' -k 'not compiled and not limit and not scratch and not failed' $(SANITIZED_TESTS); done

fuzz: fuzz-calls fuzz-files

# Compiled entries on every tier, so many calls of each over all of them, no two alike, and public functions, on the sanitized kernels; CUDA's
# entries in the harness of tests/simt; DLPack's decoding by libFuzzer, with clang's sanitizers (Debian: clang, libclang-rt-14-dev).
# All of them run, whichever fails. The last words of Triton's library may lack the end of their line.
ENTRY_CALLS := 2000
PUBLIC_CALLS := 5000
fuzz-calls: ASAN_LIMITS = max_allocation_size_mb=4096:quarantine_size_mb=64
fuzz-calls: sanitized
	cd $(SANITIZED); export $(SANITIZER_OPTIONS); status=0; calls=$$(($(ENTRY_CALLS) / $(words $(TIERS)) + 1)); seed=0; \
	for tier in $(TIERS); do \
	  SORA_KERNELS_ISA=$$tier $(abspath $(BIN))/python -m tests.reliability.entries $$calls --seed $$seed || status=1; seed=$$((seed + 1)); \
	done; \
	$(abspath $(BIN))/python -m tests.reliability.calls $(PUBLIC_CALLS) || status=1; echo; \
	unset LD_PRELOAD; cd $(CURDIR); \
	$(BIN)/python -m tests.reliability.entries $(ENTRY_CALLS) --module _cuda || status=1; \
	$(BIN)/python -m tests.reliability.dlpack 300 || status=1; \
	exit $$status

fuzz-files: $(READY)
	export OMP_NUM_THREADS=1; status=0; for check in media documents; do $(BIN)/python -m tests.reliability.$$check 500 || status=1; done; exit $$status

property: $(READY)
	export OMP_NUM_THREADS=1; status=0; $(BIN)/python -m tests.reliability.properties 10000 || status=1; \
	$(BIN)/python -m tests.sweep 20000 || status=1; exit $$status

crashes: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.crashes

# Debian: apt-get install libomp-19-dev. See tests/reliability/races.py.
RACES := build/races
races: $(READY)
	mkdir -p $(RACES)
	$(SANITIZED_FILES) | xargs -0 cp -p --parents -t $(RACES)
	cd $(RACES) && SORA_KERNELS_CUDA=0 SORA_KERNELS_SANITIZE=thread $(abspath $(BIN))/python setup.py build_ext --inplace
	cd $(RACES) && $(abspath $(BIN))/python -m tests.reliability.races 20

SOAK_SECONDS := 7200
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.soak $(SOAK_SECONDS)

huge: $(READY)
	$(BIN)/python -m tests.reliability.huge $$((1 << 31))

# The tests under the lowest versions of pyproject.toml (FLOORS keeps them for the next time), and those of the sdist.
FLOORS := build/floors
floors: $(READY)
	$(BIN)/python -m tests.reliability.floors --all $(FLOORS)

sdist-test: $(READY)
	$(BIN)/python -m tests.reliability.sdist --all

# Takes hours. TARGETS="soak races" runs these alone, and leaves the page's other rows as they are.
TARGETS :=
reliability: $(READY)
	$(BIN)/python -m tests.reliability $(TARGETS)

checkpoint: $(READY)
	$(BIN)/sora train-vae outputs/vae --minutes 40
	$(BIN)/sora train-vae outputs/decoder --start outputs/vae/checkpoint --decoder-only --learning-rate 1e-3 --minutes 50
	$(BIN)/sora train outputs/studio --data world:studio,lessons,large,clips=20000 --vae outputs/decoder/checkpoint --model XS \
	  --per-frame 0.1 --precision bf16 --learning-rate 2e-3 --tokens 4096 --minutes 80
	$(BIN)/sora train-captioner outputs/captioner --checkpoint outputs/studio/checkpoint --minutes 12 --tokens 1024
	$(BIN)/sora train outputs/more --start outputs/studio/checkpoint --data world:studio,lessons,large,clips=12000 --seed 1 \
	  --per-frame 0.1 --precision bf16 --learning-rate 1e-3 --tokens 4096 --minutes 46
	$(BIN)/sora export outputs/more/checkpoint sora_model/pretrained --overwrite

gallery: $(READY)
	$(BIN)/sora gallery --out docs/gallery --overwrite

eval: $(READY)
	$(BIN)/sora eval --out docs/eval.json --overwrite

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-report: $(READY)
	mkdir -p outputs
	if test -f outputs/benchmarks.json; then mv outputs/benchmarks.json outputs/earlier.json; fi
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=outputs/benchmarks.json
	$(BIN)/python -m benchmarks.report outputs/benchmarks.json $$(ls outputs/earlier.json 2>/dev/null) --out docs/benchmarks
	$(BIN)/python -m benchmarks.chart

bench-gate: $(READY)
	$(BIN)/python -m benchmarks.gate docs/benchmarks

clean:
	rm -rf build outputs *.egg-info sora_kernels/*.so $(READY)
