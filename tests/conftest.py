"""Settings of every test: one thread (tiny tensors gain nothing from more), no network, and the command line as a newcomer would type it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import run_main

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the oracle must not reach for the network
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same weights and inputs whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def python(tmp_path):
    """`python("model.py", "tiny")` runs a program of the project in an empty folder."""

    def run(program: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / program), *argv], cwd=tmp_path, text=True, timeout=120,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)

    return run


@pytest.fixture
def exit_code(monkeypatch):
    """Run a `main` as a program; returns its exit code."""
    def run(main, *argv) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code

    return run
