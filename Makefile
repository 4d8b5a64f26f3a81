# Everything runs from .venv, which is rebuilt when the pins have changed.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
SEED ?= 0
DEMO ?= output/demo
RUN := $(DEMO)/seed$(SEED)
QUICK ?= output/quick

.PHONY: demo demo-convert quick test test-slow gpu lint format clean
.DEFAULT_GOAL := test

$(STAMP): requirements.txt requirements-datasets.txt setup.py pretrain/batches/resizing.c
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-datasets.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m detection.install
	touch $@

# Freed memory stays in the process, which saves clearing the pages of the next large tensors: 4 % of the detectors' time
# (docs/benchmarks.md). Results do not depend on it.
demo quick: export GLIBC_TUNABLES = glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=67108864

# The whole protocol on the embedded dataset. Interrupted, it goes on where it was; `make demo SEED=1` adds another
# seed to the same report. What follows pretraining runs two at a time, each with half of the cores; the detector that
# starts from random weights does not wait for the conversion. Their lines begin with their names.
demo: $(STAMP)
	$(BIN)/python pretrain/train.py --config demo_R18 --output $(RUN)/pretrain --resume SEED $(SEED) PROBE.EVERY 5
	$(MAKE) --no-print-directory --jobs 2 \
		$(addprefix demo-, detection-random detection-corinfomax linear-random linear-corinfomax)
	$(BIN)/python detection/report.py $(DEMO)/seed*/*/ --output $(DEMO)/report
	@echo "The report: $(DEMO)/report/report.html and report.md"

demo-convert:
	$(BIN)/python convert/to_d2.py $(RUN)/pretrain/checkpoints/last.pt $(RUN)/encoder.pkl --verify --overwrite

# One of the four, by the name of its folder: the command, with the encoder of CorInfoMax or without. The linear
# evaluations come last, because the detectors take longest: otherwise one would end alone.
demo-detection-random: COMMAND = detection/train_net.py --config shapes_R18_FPN
demo-detection-corinfomax: demo-convert
demo-detection-corinfomax: COMMAND = detection/train_net.py --config shapes_R18_FPN --weights $(RUN)/encoder.pkl
demo-linear-random: demo-detection-random
demo-linear-random: COMMAND = pretrain/linear.py --weights random
demo-linear-corinfomax: demo-detection-corinfomax
demo-linear-corinfomax: COMMAND = pretrain/linear.py --weights $(RUN)/pretrain
demo-%:
	set -o pipefail; OMP_NUM_THREADS=$$((($$(nproc) + 1) / 2)) $(BIN)/python $(COMMAND) \
		--output $(RUN)/$(subst -,_,$*) --resume SEED $(SEED) $(if $(findstring detection,$*),TEST.EVAL_PERIOD 300) \
		2>&1 | sed -u 's/^/$*: /'

# The whole path in its smallest form, about a minute: to see that it works, not how well.
quick: $(STAMP)
	$(BIN)/python -m shapes --root $(QUICK)/shapes --fraction 0.05
	$(BIN)/python pretrain/train.py $(QUICK)/shapes/unlabeled --output $(QUICK)/pretrain --resume --epochs 2
	$(BIN)/python pretrain/linear.py --weights $(QUICK)/pretrain --config shapes_R18 --output $(QUICK)/linear --resume \
		DATA.NAME folder DATA.ROOT $(QUICK)/shapes/objects TRAIN.BATCH_SIZE 40 TRAIN.EPOCHS 5
	$(BIN)/python convert/to_d2.py $(QUICK)/pretrain $(QUICK)/encoder.pkl --verify --overwrite
	$(BIN)/python detection/train_net.py --config shapes_R18_FPN --weights $(QUICK)/encoder.pkl \
		--output $(QUICK)/detection --resume SOLVER.MAX_ITER 10 SOLVER.STEPS "()" TEST.EVAL_PERIOD 0 \
		--train-json $(QUICK)/shapes/scenes/annotations/instances_train.json --train-images $(QUICK)/shapes/scenes/train \
		--test-json $(QUICK)/shapes/scenes/annotations/instances_val.json --test-images $(QUICK)/shapes/scenes/val
	$(BIN)/python detection/report.py $(QUICK)/linear $(QUICK)/detection --output $(QUICK)/report
	@echo "The report: $(QUICK)/report/report.html; for further commands: source .venv/bin/activate"

# A process for each core, and the files in their order.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# What only a GPU can answer, in nine minutes at most; called again it continues. GPU_PYTHON names another environment's
# Python where .venv cannot be made; the project itself need not be installed there. OUT is the folder for gpu.json and
# gpu.md.
gpu: $(if $(GPU_PYTHON),,$(STAMP))
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py --output $(or $(OUT),output/gpu) $(if $(FASHION),--fashion $(FASHION))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs, in output/, stay.
clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
