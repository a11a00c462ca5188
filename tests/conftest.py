"""Settings of every test: one thread (tiny tensors gain nothing from more), no network, and the
command line as a newcomer would type it."""

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from data.io.cli import UserError, run_main

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, whose oracle stays at home
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same weights and inputs whatever ran before."""
    torch.manual_seed(0)


def start(*command: str, cwd: Path, **environment) -> subprocess.Popen:
    """A Python process, such as start("train.py", "--steps=3", cwd=folder), whose output is read by whoever asks."""
    program, *argv = command
    program = [program] if program.startswith("-") else [str(ROOT / program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, *program, *argv], cwd=cwd, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8", errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_rank(rank: int, ranks: int, port: int, work, argv: tuple):
    from data.io.ranks import setup_distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with setup_distributed("cpu") as world:
        work(world, *argv)


def on_ranks(ranks: int, work, *argv) -> None:
    """work(world, *argv) in so many processes that talk to each other."""
    torch.multiprocessing.start_processes(one_rank, args=(ranks, free_port(), work, argv), nprocs=ranks,
                                          start_method="fork")  # which has torch imported already


@pytest.fixture
def python(tmp_path):
    """`python("model.py", "tiny")` runs a program of the project, in an empty folder if none is named."""

    def run(program: str, *argv: str, cwd: Path = tmp_path, **environment) -> subprocess.CompletedProcess:
        process = start(program, *argv, cwd=cwd, **environment)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """`here(train.main, "--steps", "3", cwd=folder)` is what a program prints that ends well, without a start of its own."""

    def run(main, *argv, cwd: Path) -> str:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        assert main([*map(str, argv)]) is not False
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a text to train on, which no narrow terminal can show: `--data text`."""
    path = tmp_path_factory.mktemp("work")
    tales = [f"Müller {i} — über 3 Boote. " * 30 for i in range(200)]
    (path / "text").write_text("\n\n".join(tales), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A checkpoint directory with random weights and the real tokenizer, to begin RL from."""
    from data.text.tokenizer import load_tokenizer
    from model import Config, Transformer
    from tests.test_train import SMALL

    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer("plainseek:1024")
    ids = dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    config = Config.preset("tiny", **SMALL | ids | dict(max_position_embeddings=128))
    Transformer(config).save_pretrained(path, tokenizer)
    return path


@contextmanager
def refused(words: str):
    """The block ends with a UserError of one line that has these words, or in which this pattern is found."""
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and (words in message or re.search(words, message)), message


@pytest.fixture
def exit_code(monkeypatch):
    """Run a `main` as a program; returns its exit code."""
    def run(main, *argv) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code

    return run


@pytest.fixture
def refuses(exit_code, capsys):
    """Run a `main` as a program: it must end with code 2 and one line that has these words."""
    def run(main, words: str, *argv):
        capsys.readouterr()
        assert exit_code(main, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error

    return run


def pytest_addoption(parser):
    parser.addoption("--rough", type=int, default=1, help="how many times the plain number of rough trials")


@pytest.fixture
def rough(request) -> int:
    return request.config.getoption("--rough")
