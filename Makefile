# `make demo`: an overlay picture and its reasoning from the embedded bundle, with [cpu] alone.
# `make test`: linters, types and all tests. Both make their own virtual environments, once.

PYTHON ?= python3
PYTEST_ARGS ?=
# The CPU build, named exactly: a plain `torch` from a registry brings several GB of CUDA libraries with it.
TORCH ?= torch==2.13.0

DEMO_PICTURE ?= docs/tabletop.png
DEMO_QUESTION ?= dinner is ready to be served, what helps

PACKAGING := setup.py pyproject.toml segzero_rt/__init__.py
SOURCES = $(shell find segzero_rt export training -name '*.py' -o -name '*.cu*' -o -name '*.[ch]pp' -o -path 'segzero_rt/bundles/*' -type f)

.PHONY: demo test test-fast test-arm64 lint clean

demo: .venv-demo/stamp
	mkdir -p demo
	.venv-demo/bin/segzero run "$(DEMO_PICTURE)" "$(DEMO_QUESTION)" --out demo/overlay.png
	@echo "overlay: demo/overlay.png"

test: .venv-test/stamp .venv-py310/stamp .venv-sam2/stamp .venv-arm64/finished lint
	SEGZERO_PYTHON310=$(CURDIR)/.venv-py310/bin/python .venv-test/bin/python -m pytest -m 'not gpu' $(PYTEST_ARGS)

# What a developer runs while writing: no slow tests.
test-fast: .venv-test/stamp lint
	.venv-test/bin/python -m pytest $(PYTEST_ARGS)

# All tests of the runtime that need no PyTorch, on Debian arm64 under qemu-user.
test-arm64: .venv-test/stamp .venv-arm64/finished
	.venv-test/bin/python -m benchmarks.arm64_tests .venv-arm64

lint: .venv-test/stamp
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# Not editable: the demo runs what a user would install, from the wheel.
.venv-demo/stamp: $(PACKAGING) $(SOURCES)
	test -x .venv-demo/bin/python || $(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check '.[cpu]'
	touch $@

.venv-test/stamp: $(PACKAGING)
	test -x .venv-test/bin/python || $(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' -e '.[cpu,export,train,eval,tensorrt-rtx,optimum,dev]'
	touch $@

# The oldest runtime that is supported: what JetPack 6 has (Python 3.10, the last onnxruntime and NumPy for it). Without
# an interpreter of that version the stamp stays empty and the test that uses it says so.
.venv-py310/stamp: $(PACKAGING) .ci/find_python310
	rm -rf .venv-py310
	mkdir -p .venv-py310
	python310="$$(bash .ci/find_python310)" && if [ -n "$$python310" ]; then \
	  "$$python310" -m venv .venv-py310 && \
	  .venv-py310/bin/python -m pip install --quiet --disable-pip-version-check \
	    onnxruntime==1.23.2 numpy==2.2.6 opencv-python-headless Pillow; \
	else echo "no Python 3.10 found: the JetPack 6 test will be skipped"; fi
	touch $@

# SAM 2's own package and timm, which exported graphs are compared with: a folder of their own, since one has a top-level
# `training`, and without its dependencies, of which torchvision has no CPU build that imports beside this torch.
.venv-sam2/stamp: .venv-test/stamp
	rm -rf .venv-sam2
	SAM2_BUILD_CUDA=0 .venv-test/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --target .venv-sam2 sam2==1.1.0 hydra-core omegaconf antlr4-python3-runtime==4.9.3 \
	  iopath portalocker timm
	touch $@

# A Debian arm64 Python that qemu-user runs, unpacked into this folder. Where it cannot be made (no x86-64 Debian, no
# network), this says why, and the tests that use it are skipped.
.venv-arm64/finished: .venv-test/stamp benchmarks/emulated_arm64.py
	-.venv-test/bin/python -m benchmarks.emulated_arm64 .venv-arm64

clean:
	rm -rf .venv-demo .venv-test .venv-py310 .venv-sam2 .venv-arm64 build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
