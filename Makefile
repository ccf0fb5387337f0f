# Everything happens in .venv inside the checkout. Needs git, Python 3.11 or later, and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# One place holds every exact version. torch goes in first and alone, so that no dependency can bring a newer one.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# What images with torch for a GPU mostly lack, and the Python that they have.
WHEELS ?= diffusers torchao platformdirs ftfy wcwidth torchmetrics lightning_utilities psutil typer nvidia-ml-py requests urllib3 \
	certifi idna charset-normalizer importlib_metadata zipp jinja2 markupsafe rich
WHEELS_FOR ?= 3.12
# Two processes share the tests, file by file, in the order of tests/conftest.py: most of them leave a core idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The suites beside the engine's, by target; all of them together share imports and ranks, and leave no core idle.
USE := tests/drop_in tests/measuring
OPTIONS := tests/quantize tests/rewrites tests/options
ATTENTION := tests/kernels tests/sparse
ON_RAY := tests/batch tests/ray_serve
REST := $(USE) $(ON_RAY) $(OPTIONS) $(ATTENTION) tests/caches tests/memory tests/vae tests/planning tests/support
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-use test-caches test-options test-attention test-memory test-vae test-planning serve-ci soak test-rest test-whole vae bench-vae bench-plan caches options sparse rewrites support support-ci format guidance drop-in bench bench-caches bench-gpu wheels bench-scaling losses clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "parafuse needs Python 3.11 or later: make PYTHON=python3.11 setup")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# Its samplers alone: the package asks for wandb, CLIP, kornia and more, which they do not use.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt k-diffusion torchdiffeq
	@touch $@

demo: setup ## Paint four prompts on 1 and on 2 ranks and compare: out/demo.png
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/demo.py --out out/demo.png

check: setup ## Lint, format, types, import floors, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/check_docs.py

test: setup ## Run the tests of the engine (eight minutes); fewer than tests/collected_floors.json says is a failure
	$(PYTEST) tests/unit tests/dist tests/gpu tests/quality --hold-floors

test-rest: setup ## Run all other tests: those of the targets below, and support-ci, at once
	$(PYTEST) $(REST) --hold-floors

test-whole: setup ## Run all cases of all tests, where the others run one in a few of long sweeps (two hours)
	$(PYTEST) tests --whole

test-use: setup ## Run what users run: members, adapters and guides of diffusers; bench, prove, verify
	$(PYTEST) $(USE) --hold-floors

test-caches: setup ## Run the tests of caches, and hold a part of docs/cache-support.md
	$(PYTEST) tests/caches --hold-floors

test-options: setup ## Run the tests of quantization, compile and rewrites, and hold a part of docs/options-support.md
	$(PYTEST) $(OPTIONS) --hold-floors

test-attention: setup ## Run the tests of attention's kernels and of sparse attention
	$(PYTEST) $(ATTENTION) --hold-floors

test-memory: setup ## Run the tests of loading, text encoders, placement, offload and prediction of memory
	$(PYTEST) tests/memory --hold-floors

test-vae: setup ## Run the tests of autoencoders on several ranks
	$(PYTEST) tests/vae --hold-floors

test-planning: setup ## Run the tests of the planner
	$(PYTEST) tests/planning --hold-floors

serve-ci: setup ## Run the tests of the server, and half a minute of it while its processes are killed (eight minutes)
	$(PYTEST) tests/serve --hold-floors
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.serve.soak --minutes 0.5 --every 8 --seed 38

soak: setup ## Load a server for 40 minutes while its processes are killed and stopped, and 5,000 requests from its description
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.serve.soak --minutes 30 --every 60 --record docs/notes/soak.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.serve.soak --minutes 10 --every 60 --batch 4 --record docs/notes/soak-batch.json
	PARAFUSE_TESTS_CASES=150 $(BIN)/python -m pytest -rP tests/serve/http/test_openapi.py

bench-plan: setup ## Is the planner right? On 2 CPU cores, and against published times: docs/planner.md (a quarter of an hour)
	$(BIN)/python -m benchmarks.plan_published --page docs/planner.md
	$(BIN)/python -m benchmarks.plan_cpu --page docs/planner.md --out docs/planner-cpu.json

vae: setup ## Put every autoencoder class on 2, 3 and 4 ranks: docs/vae-support.md (a quarter of an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.vae

bench-vae: setup ## Measure a decode on 2 ranks against 1 on this machine's CPU
	$(BIN)/python -m benchmarks.vae_cpu

sparse: setup ## Put sparse attention on every transformer class: docs/sparse-support.md (ten minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sparse

options: setup ## Try quantization, compile, rewrites and attention beside everything else: docs/options-support.md (an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.options

rewrites: setup ## Put the rewrite text on every class that takes a mask: the table of docs/rewrites.md (a minute)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.rewrites

caches: setup ## Put caches on every model in every layout: docs/cache-support.md (a quarter of an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.caches
	$(BIN)/python -m tests.caches.table

support: setup ## Measure every transformer class in every layout: docs/support.md (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support

support-ci: setup ## Measure a part of it; a cell that is worse than docs/support.json is a failure
	$(PYTEST) tests/support --hold-floors

format: setup ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

guidance: setup ## Measure every pipeline with guidance in every layout: docs/guidance.md (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.guided

bench: setup ## Time every option on emoji, 1 and 2 ranks, and its first pictures: benchmarks/results, out/bench (ten minutes)
	$(BIN)/parafuse bench --case emoji --ranks 2 --starts $(BENCH)
	$(BIN)/parafuse bench --case emoji-batch --ranks 2 $(BENCH)
	$(BIN)/parafuse bench report benchmarks/results/*.json --out out/bench

bench-caches: setup ## Time caches on emoji against the exact pictures of 64 prompts: docs/caches.md (an hour)
	for case in emoji-caches emoji-forecasts; do \
	$(BIN)/parafuse bench --case $$case $(BENCH) && newest=$$(ls -t benchmarks/results/$${case}_*.json | head -1) && \
	$(BIN)/parafuse bench report $$newest --out out/bench && $(BIN)/parafuse bench report $$newest --page docs/caches.md \
	|| exit 1; done

bench-gpu: ## Time FLUX.1-dev and HunyuanVideo on one GPU, random weights, with the interpreter at hand (nine minutes)
	$(PYTHON) tools/bench_gpu.py $(BENCH)

wheels: setup ## Fetch what bench-gpu needs on a machine without a network: wheels/
	rm -rf wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest wheels --python-version $(WHEELS_FOR) \
		--constraint constraints.txt $(WHEELS) $(WHEELS_MORE)

drop-in: setup ## Use every member of the pipelines on one rank and on two: docs/drop-in.md (three minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PARAFUSE_CACHE= $(BIN)/python -m tests.drop_in

losses: setup ## Measure every lossy option on emoji: what the help quotes (half an hour; LOSSES=cache: one of them)
	$(BIN)/python tools/losses.py $(LOSSES)

bench-scaling: setup ## Measure 2 ranks against 1 on this machine's CPU: one sequence, two branches
	$(BIN)/python -m benchmarks.scaling_cpu
	$(BIN)/python -m benchmarks.guidance_cpu

clean: ## Remove .venv, outputs and caches
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
