# make demo    distil the shipped icons teacher on a CPU and report (about 10 minutes after the installation)
# make test    the tests            make lint    ruff and mypy            make clean    remove what was made
# make fuzz    feed every reader of data with 20,000 damaged files (half an hour); INPUTS=100000 SEED=7 for others
# make soak    kill a run 30 times at random moments; it must end as if nobody had (a quarter of an hour)
# make gpu     everything a GPU is to be asked, in nine minutes (docs/gpu-day.md); OUT=folder of the results
# make gpu-rehearsal   the same plan on a CPU     make gpu-prepare   what a GPU machine may lack, into build/gpu
# make native  the fused optimizer step for CUDA (optional; needs the CUDA toolkit; ARCH="80 90" are its GPUs)
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
ARCH ?= 80 90
INPUTS ?= 20000
SEED ?= 1
OUT ?= runs/gpu

.PHONY: demo test lint fuzz soak gpu gpu-rehearsal gpu-prepare native clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=24"
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[icons,dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m tbcm.icons.demo --out runs/demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=kernels:. $(RUN) -W ignore tests/fuzzing.py --inputs $(INPUTS) --seed $(SEED)

soak: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) tests/distributed/soak.py --kills 30

gpu:
	$(PYTHON) bench/gpu.py --out $(OUT)

gpu-rehearsal: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) bench/gpu.py --rehearse --out $(OUT)

gpu-prepare: $(VENV)/installed
	$(RUN) bench/gpu.py --prepare build/gpu

native:
	$(PYTHON) csrc/build.py --arch $(ARCH)

clean:
	rm -rf $(VENV) runs build tbcm/runtime/_native *.egg-info .pytest_cache .ruff_cache .mypy_cache
