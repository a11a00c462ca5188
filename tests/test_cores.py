"""A process for each core: the numbers of one process, and nothing lost when one of them ends."""

import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from types import FunctionType

import pytest
import torch
from torch.distributed import TCPStore

import rl
import train
from data.io import cores, ranks
from data.io.cli import UserError, parse_flags
from data.io.portrait import check_memory
from data.io.ranks import Dist
from data.io.run import RunFolder
from model import Config
from tests.conftest import ROOT, refused, start
from tests.test_train import QUICK

RUN = ["--steps", "11", "--eval_every", "4", *QUICK]
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


@pytest.fixture
def by_fork(monkeypatch):
    """Processes begin at once, having all imported."""
    monkeypatch.setattr(cores, "METHOD", "fork")


def helpers(run) -> list[int]:
    """The processes that a program started to share its work."""
    found = []
    for child in os.popen(f"pgrep -P {run.pid}").read().split():
        with open(f"/proc/{child}/cmdline") as file:
            found += [int(child)] if "spawn_main" in file.read() else []
    return found


def rows(folder, name: str) -> list[dict]:
    return RunFolder(folder / "out" / name).rows()


def until_logged(run, log, lines: int):
    until = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > lines):
        assert time.monotonic() < until and run.poll() is None, run.communicate()
        time.sleep(0.02)


def same(found: list[dict], wanted: list[dict]):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        for column in ("step", "ce", "mtp", "balance", "grad_norm", "val_text", "train_text", "val_mtp"):
            assert a[column] == b[column] or float(a[column]) == pytest.approx(float(b[column]), rel=1e-5), column


@linux
def test_two_processes_give_the_losses_of_one_however_often_they_are_stopped(workplace, here):
    """Ctrl-C, then a helper that is killed: the log is that of one process."""
    def begin(lines: int, *more: str):
        run = start("train.py", *RUN, "--name", "two", *more, OMP_NUM_THREADS="2", cwd=workplace)
        until_logged(run, workplace / "out" / "two" / "log.csv", lines)
        (helper,) = helpers(run)
        return run, helper

    run, helper = begin(3, "--processes", "2")
    for each in (helper, run.pid):  # as a terminal does
        os.kill(each, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and "and saved" in out and not err, err
    assert "cores       2 processes of 1 thread" in out and "on 2 x cpu" in out
    run, helper = begin(6, "--resume", "--processes", "2")
    os.kill(helper, signal.SIGKILL)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 2 and err.count("\n") == 1, err
    assert "error: process 2 of 2 was ended (exit code -9" in err and "--resume goes on" in err
    assert "resumed at step" in here(train.main, *RUN, "--name", "two", "--resume", cwd=workplace)
    assert "cores " not in here(train.main, *RUN, "--name", "alone", cwd=workplace)
    same(rows(workplace, "two"), rows(workplace, "alone"))


def test_reinforcement_learning_shares_questions_and_examinations(base, tmp_path, monkeypatch, by_fork):
    """Two processes give the rows and the report of one: which answer is drawn depends on its question alone."""
    monkeypatch.chdir(tmp_path)
    flags = ["--base", base, "--steps", "2", "--questions", "4", "--group_size", "4", "--eval_questions", "6",
             "--eval_samples", "4", "--max_new_tokens", "24", "--eval_every", "2"]
    for name, count in (("one", 1), ("two", 2)):
        assert rl.main([*map(str, flags), "--name", name, "--processes", str(count)])
    one, two = (rows(tmp_path, name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        for column in a.keys() - {"rollout_s", "score_s", "update_s", "seconds", "ratio_gap"}:
            assert a[column] == b[column] or float(a[column]) == pytest.approx(float(b[column]), rel=1e-4), column
    reports = [(tmp_path / "out" / name / "report.txt").read_text().partition("time  ")[0] for name in ("one", "two")]
    assert reports[0] == reports[1] and "pass@4" in reports[0]


# ------------------------------------------------------------------------ what the others are told and tell


def one_sum(world: Dist):
    for count in range(6):  # in their order, whoever computes them
        parts = world.shared(lambda part: [(x, world.rank) for x in part], list(range(count)), 2)
        assert parts == [(x, x % world.world_size) for x in range(count)]
    assert world.all_reduce_sum(torch.ones(2)).tolist() == [world.world_size] * 2


def the_second_refuses(world: Dist):
    if world.rank:
        raise UserError("rank 1 wants another file")
    world.all_reduce_sum(torch.ones(1))


def the_second_breaks(world: Dist):
    if world.rank:
        raise KeyError("a fault")
    world.all_reduce_sum(torch.ones(1))


def the_second_is_caught(world: Dist):
    if world.rank:
        print(os.getpid(), flush=True)
        re.match("(a+)+$", "a" * 40 + "b")  # for years, and no other thread runs
    world.all_reduce_sum(torch.ones(1))


def the_first_is_impatient(world: Dist):
    if world.rank:
        time.sleep(40)
    threading.Timer(0.2, lambda: [(os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1)) for _ in range(3)]).start()
    world.all_reduce_sum(torch.ones(1))


def all_refuse(world: Dist):
    raise UserError("nobody wants it")


def ends_before_it_joins():
    os._exit(3)


class Unloadable:
    """What a process reads before it begins ends it."""

    def __reduce__(self):
        return ends_before_it_joins, ()

    def __call__(self, world):
        pass


def by_itself(argv, world: Dist):
    """Like a program's main, of whose flags the first one is what it does."""
    argv[0](world)


TWO = train.TrainConfig(device="cpu", processes=2)


def run(work):
    with cores.together(TWO, by_itself, [work]) as world:
        work(world)


def test_processes_join_share_and_leave(monkeypatch, by_fork):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of another network")
    threads = torch.get_num_threads()
    run(one_sum)
    assert torch.get_num_threads() == threads and not torch.distributed.is_initialized()


@pytest.mark.parametrize("work,told", [
    (the_second_refuses, "^rank 1 wants another file$"), (all_refuse, "^nobody wants it$"),
    (the_second_breaks, "^process 2 of 2 broke off, see above; --resume goes on from the last save$"),
    (Unloadable(), r"^process 2 of 2 was ended \(exit code 3;")])
def test_a_process_that_fails_says_why(work, told, capfd, request):
    if not isinstance(work, Unloadable):  # which nothing reads in a fork
        request.getfixturevalue("by_fork")
    with refused(told):
        run(work)
    assert ("KeyError: 'a fault'" in capfd.readouterr().err) == (work is the_second_breaks)
    assert not torch.distributed.is_initialized()


def test_ctrl_c_is_heard_while_another_process_is_waited_for(by_fork):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(the_first_is_impatient)
    assert time.monotonic() - began < 30 and not torch.distributed.is_initialized()


@linux
def test_a_script_needs_no_guard_and_a_process_that_is_caught_ends_with_the_first(tmp_path):
    (tmp_path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                        "from tests import test_cores as here; here.run(here.the_second_is_caught)\n")
    run = start(str(tmp_path / "script.py"), cwd=tmp_path, PYTHONUNBUFFERED="1")
    helper = run.stdout.readline()
    assert helper.strip().isdecimal(), run.communicate()
    run.kill()
    run.wait()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{int(helper)}"):
        assert time.monotonic() < until, os.kill(int(helper), signal.SIGKILL)
        time.sleep(0.02)


def test_a_process_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ranks, "IN_STEP", timedelta(seconds=0.3))
    with refused("the 2 processes found no way to each other"):
        ranks.joined(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0, 2)
    assert not torch.distributed.is_initialized()


def test_what_cannot_be_begun_in_another_process_is_refused():
    under_a_profiler = FunctionType(by_itself.__code__, globals(), "by_itself")
    with refused("wanted --processes 1"), cores.together(TWO, under_a_profiler, []):
        pass


@pytest.mark.parametrize("processes", [3, 64])
def test_processes_that_cannot_share_a_batch_are_not_begun(processes):
    with refused(f"processes: got {processes}, wanted a divisor of the 32 parts of a batch"):
        with cores.together(train.TrainConfig(device="cpu", processes=processes), None, []):
            pass


def test_cores_are_those_that_a_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for text, count in ((None, 8), ("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("x", 8)):
        if text:
            (tmp_path / "cpu.max").write_text(text)
        assert cores.cores() == count, text


@pytest.mark.parametrize("threads,config,count", [
    (1, train.TrainConfig(), 1), (2, train.TrainConfig(), 2), (3, train.TrainConfig(), 2), (16, train.TrainConfig(), 8),
    (4, train.TrainConfig(tokens_per_step=384), 1), (4, train.TrainConfig(tokens_per_step=3 * 1024, seq_len=1024), 3),
    (6, rl.RLConfig(), 4), (6, rl.RLConfig(questions=18), 6), (2, rl.RLConfig(questions=9), 1),
    (6, rl.RLConfig(questions=18, recipe="r1"), 2)])  # whose fine-tuning cannot be shared by 3
def test_a_batch_is_shared_evenly(threads, config, count, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert cores.fitting(*config.shares()) == count
    assert parse_flags(train.TrainConfig, shlex.split(rl.SFT), "").shares()[0] == 64


def test_processes_that_hold_more_than_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 20_000_000}.get)
    sizes = asdict(Config.preset("tiny"))  # 5.5 MB of weights
    check_memory(sizes, copies=2)
    with refused("its weights, 8 times, are 44.2 MB, this machine has 20 MB: --processes 1, or a smaller preset"):
        check_memory(sizes, copies=8)


def test_processes_are_not_for_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("processes: got 2, wanted none on a GPU or under torchrun"), cores.together(TWO, print, []):
        pass
