"""What every test runs under: one thread, a fresh seed, a folder of its own."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)
# The tests may themselves be a job, of a scheduler or of torchrun; what they start is none of it.
_OF_JOBS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PALS_", "LSB_", "JSM_", "MASTER_")
_OF_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
for _name in [name for name in os.environ if name.startswith(_OF_JOBS) or name in _OF_RANKS]:
    del os.environ[_name]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what is to run in the background so; processes that tests start and interrupt would not hear it either.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Know the setting of pytest-timeout where that is not installed, as on a machine that has only what torch needs."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds after which a test is ended; needs pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Let torch 2.6 speak of what it does itself in a sharded save."""
    if Version(torch.__version__) < Version("2.7"):
        config.addinivalue_line("filterwarnings", "ignore:TypedStorage is deprecated:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that change from run to run: processes that share the tests could not agree on them."""
    changing = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if changing:
        raise pytest.UsageError(f"Give these tests ids of their own, theirs hold an address: {changing}")


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    logging.getLogger("levin").setLevel(logging.INFO)
    for name in ("levin.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        if name in sys.modules:
            # A strategy on several ranks sets it for the whole process.
            sys.modules[name].rank_zero_only.rank = 0
    before = dict(os.environ)
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    # Strategies and environments leave addresses and ranks there for the processes that they start.
    os.environ.clear()
    os.environ.update(before)
