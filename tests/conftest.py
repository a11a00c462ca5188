"""Settings of every test: one thread (tiny tensors gain nothing from more), no network, and the
command line as a newcomer would type it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.io.cli import run_main

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, whose oracle stays at home
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same weights and inputs whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def python(tmp_path):
    """`python("model.py", "tiny")` runs a program of the project in an empty folder."""

    def run(program: str, *argv: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / program), *argv], cwd=cwd, text=True,
                              timeout=120, capture_output=True, encoding="utf-8",
                              env=os.environ | {"OMP_NUM_THREADS": "1"})

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A checkpoint directory with random weights and the real tokenizer, to begin RL from."""
    from data.text.tokenizer import load_tokenizer
    from model import Config, Transformer
    from tests.test_train import SMALL

    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer("plainseek:1024")
    ids = dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
               eos_token_id=tokenizer.eos_id)
    config = Config.preset("tiny", **SMALL | ids | dict(max_position_embeddings=128))
    Transformer(config).save_pretrained(path, tokenizer)
    return path


@pytest.fixture
def exit_code(monkeypatch):
    """Run a `main` as a program; returns its exit code."""
    def run(main, *argv) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code

    return run
