# Each target does its own set-up (tools/setup) and is quick when that stands.
# PYTHON=python3.12 make … uses another interpreter; ARGS=… is passed on to the demo, to pytest or to the benchmark.
.PHONY: demo test check bench chaos kernel fuzz docs wheel clean

demo:
	@tools/setup demo .venv/bin/python examples/demo/run.py $(ARGS)

test:
	@tools/setup demo,test .venv/bin/python -m pytest -m "not soak and not chaos and not kernel" $(ARGS)

kernel:
	@tools/setup demo,test,kernel .venv/bin/python -m pytest -m kernel $(ARGS)

bench:
	@tools/setup demo,test,bench env PYTHONPATH=tests .venv/bin/python -m benchmarks $(ARGS)

check:
	@tools/setup demo,test tools/check

docs:
	@tools/setup demo,test .venv/bin/python -m sphinx -W --keep-going -q -d build/docs/doctrees docs build/docs/html
	@echo build/docs/html/index.html

# Faults on purpose (docs/reliability.md). ARGS: --quick, --seed N, --only NAME, --soak SECONDS
FAULTS = tests/test_s2cs_crash.py tests/test_provider_faults.py tests/relay/test_ends.py tests/relay/test_reasons.py \
	tests/relay/test_lease_and_control.py tests/relay/test_splice.py tests/network/test_wan_cut.py \
	tests/network/test_control_failures.py tests/network/test_two_gateways.py
chaos:
	@tools/setup demo,test .venv/bin/python -m pytest tests/chaos $(FAULTS) --results build/chaos/results.json $(ARGS)

# An hour for each of what parses strangers' words: make fuzz SECONDS=60 is shorter. What it finds is in build/fuzz.
fuzz:
	@KEEP=1 nice -n 19 tools/fuzz $(or $(SECONDS),3600)

wheel:
	@tools/setup demo,test .venv/bin/python -m build --wheel --outdir dist

clean:
	rm -rf .venv .setup.lock build dist relay/target *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
