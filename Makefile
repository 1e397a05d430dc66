# Each target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

.PHONY: help demo test test-report test-mpi test-deepspeed test-precision test-xla test-slow test-hosts test-fuzz lint bench bench-ddp bench-sharded bench-checkpoint gpu docs clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	touch $(STAMP)

demo: $(STAMP)  ## Train on handwritten digits, evaluate, save, show
	$(BIN)/python examples/digits.py

test: $(STAMP)  ## Run the tests
	$(RUN) $(BIN)/python -m pytest -q -n 2 -m "not slow and not timing and not deepspeed and not packages and not xla"
	$(RUN) $(BIN)/python -m pytest -q -m "timing and not slow"

test-slow: $(STAMP)  ## Run the long tests too (kills, faults)
	$(RUN) $(BIN)/python -m pytest -q -m slow

test-hosts: $(STAMP)  ## Run jobs on two hosts in network namespaces: a cut cable, a lost host (needs root)
	LEVIN_TEST_HOSTS=1 $(RUN) $(BIN)/python -m pytest -q -m slow tests/launchers/test_hosts.py

test-report: $(STAMP)  ## Look at reports of runs in a headless browser (Chromium: Debian, needs root)
	command -v chromium || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; }
	$(RUN) $(BIN)/python -m pytest -q tests/report

test-fuzz: $(STAMP)  ## Run a thousand random schedules of what may happen on 2 to 4 ranks
	$(RUN) $(BIN)/python -m pytest -q -m slow tests/loops/test_fuzz.py

# In a folder of its own: Lightning, which tests run beside levin, starts MPI in every process that can import mpi4py.
# The package mpich has an mpirun and libraries, which mpi4py finds in the environment of its own.
test-mpi: $(STAMP) $(VENV)/integrations/mpich/.installed  ## Run the tests that need mpirun (Open MPI: Debian, needs root; and MPICH) and mpi4py
	command -v mpirun || { apt-get update -qq && apt-get install -qq --no-install-recommends openmpi-bin; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade --target $(VENV)/mpi mpi4py
	PYTHONPATH=$(CURDIR)/$(VENV)/mpi $(RUN) $(BIN)/python -m pytest -q tests/launchers/test_clusters.py -k mpi
	PATH=$(CURDIR)/$(VENV)/integrations/mpich/bin:$$PATH $(RUN) python -m pytest -q tests/launchers/test_clusters.py -k mpi

# In a folder of its own, without torch, which is there: nothing that DeepSpeed compiles is needed.
$(VENV)/deepspeed/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --upgrade --target $(@D) --no-deps \
		--no-build-isolation deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops pydantic pydantic-core \
		annotated-types typing-inspection
	touch $@

test-deepspeed: $(VENV)/deepspeed/.installed  ## Run the tests that need DeepSpeed, on two processes of the CPU
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(RUN) $(BIN)/python -m pytest -q -m deepspeed tests/strategies

# In an environment of its own. Packages without a floor are taken as new as they come; setuptools is for the oldest torchmetrics.
OLDEST := $(VENV)-oldest
OLDEST_TESTS := tests/data tests/loops tests/ranks tests/checkpoint tests/callbacks tests/strategies tests/precision tests/utilities

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[cli]' setuptools hypothesis \
		lightning==2.6.6 matplotlib numpy omegaconf psutil pytest pytest-timeout pytest-xdist safetensors \
		tensorboard torchdata
	touch $@

.PHONY: test-oldest
test-oldest: $(OLDEST)/.installed  ## Run tests of data, loops, checkpoints and strategies with the oldest versions that are allowed
	$(RUN) $(OLDEST)/bin/python -m pytest -q -n 2 -m "not slow and not timing and not deepspeed and not packages" $(OLDEST_TESTS)

test-precision: $(STAMP)  ## Run the tests that need torchao and bitsandbytes, on the CPU
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/precision --no-deps torchao==0.18.0 bitsandbytes==0.50.2
	PYTHONPATH=$(CURDIR)/$(VENV)/precision $(RUN) $(BIN)/python -m pytest -q -m packages tests/precision

# In an environment of its own, for which torch_xla has a torch of its own. That one looks for its CUDA libraries when it is
# imported, also where there is no GPU: 3 GB to download.
XLA := $(VENV)/xla
$(XLA)/.installed: pyproject.toml
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install --quiet torch==2.9.0 torch_xla==2.9.0 numpy torchmetrics fsspec rich tqdm PyYAML packaging \
		typing-extensions pytest pytest-timeout
	touch $@

test-xla: $(XLA)/.installed  ## Run the tests that need torch_xla, with processors in the place of TPUs
	PYTHONPATH=$(CURDIR)/src PJRT_DEVICE=CPU $(RUN) $(XLA)/bin/python -m pytest -q -m xla tests/strategies

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP)  ## Measure against the bare PyTorch loop and Lightning
	$(RUN) $(BIN)/python benchmarks/run.py

# Installs nothing: runs with the torch, Lightning and pytest of the machine. PYTHON says which python.
gpu:  ## Test and measure on a CUDA device, with the python that is there
	PYTHON=$(PYTHON) tests/gpu/run.sh
	PYTHONPATH=src PYTHONDONTWRITEBYTECODE=1 $(PYTHON) benchmarks/gpu.py

bench-sharded: $(STAMP)  ## Measure DDP, FSDP and tensor parallel on two processes against bare PyTorch and Lightning
	$(RUN) $(BIN)/python benchmarks/sharded.py

bench-checkpoint: $(STAMP)  ## Measure what saving a checkpoint costs the training loop
	$(RUN) $(BIN)/python benchmarks/checkpoint.py --large

.PHONY: mutants
mutants: $(STAMP)  ## Change the code at random and see whether the tests notice (PATHS, TESTS, NUMBER, JOBS say what)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt coverage
	$(RUN) $(BIN)/python tests/mutants.py --jobs $(or $(JOBS),1) --number $(or $(NUMBER),300) --paths $(or $(PATHS),src/levin) -- $(TESTS)

.PHONY: test-parity-fuzz
test-parity-fuzz: $(STAMP)  ## Run a thousand random programs on levin and Lightning, one and two processes (SEED, SEEDS say which)
	mkdir -p runs
	LEVIN_PARITY_SEED=$(or $(SEED),0) LEVIN_PARITY_SEEDS=$(or $(SEEDS),9) $(RUN) $(BIN)/python -m pytest -q --show-capture=no \
		tests/parity/test_module_generated_fits.py > runs/parity-fuzz.txt 2>&1; \
		status=$$?; tail -n 100 runs/parity-fuzz.txt; exit $$status

.PHONY: test-downstream
test-downstream: $(STAMP)  ## Run the tests of released packages on Lightning and on levin
	$(RUN) $(BIN)/python tests/downstream/run.py --table docs/downstream.md

bench-ddp: $(STAMP)  ## Measure several processes against bare DistributedDataParallel and Lightning
	$(RUN) $(BIN)/python benchmarks/ddp.py

# Twine in a folder of its own.
.PHONY: wheel-check
wheel-check: $(STAMP)  ## Build the wheel, check it, run the demo from it in an empty environment, and find versions beside other packages
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/twine twine
	PYTHONPATH=$(VENV)/twine $(VENV)/twine/bin/twine check --strict dist/*.whl
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 "$$(echo dist/*.whl)[tensorboard]" \
		scikit-learn matplotlib
	$(RUN) $(VENV)-wheel/bin/python examples/digits.py --out $(VENV)-wheel/runs
	$(VENV)-wheel/bin/python -m pip install --quiet --dry-run torch==2.13.0 dist/*.whl datasets transformers mlflow

docs: $(STAMP)  ## Build the documentation site
	$(BIN)/mkdocs build --strict --quiet

# Against real services and schedulers. Each has an environment of its own, which sees the packages of .venv: torch is there
# once, and nothing that a service needs is ever seen by the other tests.
INTEGRATIONS := $(VENV)/integrations
SITE = lib/python$(shell $(PYTHON) -c 'import sys; print("{}.{}".format(*sys.version_info))')/site-packages
PACKAGES_loggers := wandb mlflow comet-ml trackio tensorboard litlogger litmodels
PACKAGES_slurm := submitit mpich mpi4py
PACKAGES_mpich := mpich mpi4py
PACKAGES_ray := 'ray[train,tune]'
PACKAGES_jobs := optuna optuna-integration hydra-core hydra-joblib-launcher hydra-submitit-launcher
PACKAGES_stores := s3fs 'moto[s3]' flask flask-cors
TEST_INTEGRATION = LEVIN_TEST_INTEGRATIONS=1 $(RUN) $(INTEGRATIONS)/$(1)/bin/python -m pytest -q -s $(2)

$(INTEGRATIONS)/%/.installed: $(STAMP) constraints-integrations.txt
	$(BIN)/python -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$(CURDIR)/$(VENV)/$(SITE)')" > $(@D)/$(SITE)/levin.pth
	$(@D)/bin/python -m pip install --quiet --constraint constraints-integrations.txt $(PACKAGES_$*)
	touch $@

.PHONY: test-loggers test-slurm test-ray test-jobs test-stores test-integrations
test-loggers: $(INTEGRATIONS)/loggers/.installed  ## Run the loggers against the real packages and a real MLflow server
	$(call TEST_INTEGRATION,loggers,$(addprefix tests/integrations/test_,loggers.py logger_faults.py lightning_ai.py own_integrations.py))

test-slurm: $(INTEGRATIONS)/slurm/.installed  ## Run jobs under a real SLURM with two nodes on this machine (Debian; needs root)
	command -v slurmctld munged || { apt-get update -qq && apt-get install -qq --no-install-recommends slurm-wlm munge; }
	$(call TEST_INTEGRATION,slurm,tests/integrations/test_slurm.py)

test-ray: $(INTEGRATIONS)/ray/.installed $(VENV)/deepspeed/.installed  ## Run Ray Train and Ray Tune through the import alias
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(call TEST_INTEGRATION,ray,tests/integrations/test_ray.py tests/integrations/test_ray_faults.py)

test-jobs: $(INTEGRATIONS)/jobs/.installed  ## Run studies of Optuna, jobs of Hydra, and pods with the variables of operators
	$(call TEST_INTEGRATION,jobs,tests/integrations/test_jobs.py)

test-stores: $(INTEGRATIONS)/stores/.installed  ## Keep checkpoints in an object store that speaks S3
	$(call TEST_INTEGRATION,stores,tests/integrations/test_object_stores.py)

test-integrations:  ## Run all tests against real services and schedulers, one by one, and print a table
	$(PYTHON) tests/integrations/run.py

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) $(OLDEST) site dist .mypy_cache .ruff_cache .pytest_cache
