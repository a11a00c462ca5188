"""The cores of a CPU: processes of one thread that share every batch, as the ranks of several GPUs do.

The threads of one process wait for each other in every operation, some thousand times a step: beside other programs
one of them is always late, and a step takes many times its share. Processes meet a few times a step.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator

import torch
from torch import distributed as dist

from data.io.cli import UserError, keep_freed_memory, pick_device
from data.io.ranks import Dist, LostRank, is_under_torchrun, joined, setup_distributed
from data.io.run import STOPS, RunConfig

METHOD = "spawn"  # how a process begins: by importing all anew, which every system can do at any time
ONE_THREAD = 200_000_000  # parameters: a model that has fewer is decoded with one thread
PATIENCE = 5.0  # seconds that a process has to end
LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU, and of the time that they are for


def cores() -> int:
    """Cores that this process may use: torch's threads (OMP_NUM_THREADS), within the limit of a container."""
    allowed = torch.get_num_threads()
    try:
        quota, period = LIMIT.read_text().split()
        allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return allowed


def fitting(parts: int, least: int) -> int:
    """As many processes as there are cores, if a batch of so many parts can be shared evenly, `least` to each.

    >>> torch.set_num_threads(1); fitting(32, 4)
    1
    """
    return max(n for n in range(1, cores() + 1) if parts % n == 0 and (n == 1 or parts // n >= least))


def spare_threads(parameters: int, device: torch.device) -> None:
    """Decode with one thread where a model is so small that a second one brings nothing, unless the user chose.

    Alone two threads are as fast as one up to 100M parameters; beside one other program they are a third as fast.
    """
    if device.type == "cpu" and parameters < ONE_THREAD and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextmanager
def together(config: RunConfig, work: Callable[[list[str], Dist], object], argv: list[str],
             world: Dist | None = None) -> Iterator[Dist]:
    """This process among its equals: `world`, those that torchrun started, or on a CPU so many of its own.

    work(argv, world) is what the others do, from the beginning: what the block does here, and picklable. They share
    each batch, nothing else: each holds the whole model. They end with the block, or when this process dies. Raises
    UserError, in the words of a process that failed alone, or when a batch cannot be shared by so many.
    """
    if world:
        yield world
        return
    device, asked = config.device, config.processes
    is_on_cores = pick_device(device).type == "cpu" and not is_under_torchrun()
    if (asked or 1) > 1 and not is_on_cores:
        raise UserError(f"processes: got {asked}, wanted none on a GPU or under torchrun, which starts its own")
    parts, least = config.shares()
    count = (asked or fitting(parts, least)) if is_on_cores else 1
    if parts % count:
        raise UserError(f"processes: got {count}, wanted a divisor of the {parts} parts of a batch, which they share")
    threads = max(1, cores() // count)
    if is_on_cores and cores() > 1:
        print(f"cores       {_words(count, threads, asked)}", flush=True)
    if count == 1:
        with setup_distributed(device) as world:
            yield world
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    helpers, is_over = _started(count, threads, store.port, partial(work, argv)), False
    try:
        with _heard_while_waiting(helpers) as is_stopped:
            for _, pipe in helpers:
                if not _heard(pipe):
                    raise LostRank("another process has not come as far as to join")
            with joined(store, 0, count) as world:
                yield world
        is_over = True
    except LostRank as error:
        if is_stopped.is_set():
            raise KeyboardInterrupt from None
        raise UserError(_reason(helpers) or str(error)) from None
    finally:
        for process, pipe in helpers:
            pipe.close()
            process.join(PATIENCE if is_over else 0)
            process.kill()
            process.join()
        torch.set_num_threads(before)


@contextmanager
def _heard_while_waiting(helpers: list[tuple]) -> Iterator[threading.Event]:
    """At a second signal the other processes are ended, if this one does not hear it for long; at a third at once.

    It hears none while it waits for them in an operation of torch, and they may be caught in a verifier. The event
    says that it came to this.
    """
    is_stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python hears no signal
        yield is_stopped
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen():
        heard = 0
        try:
            while kind := ours.recv(1):  # the number of a signal; nothing: it is over
                heard += kind[0] in STOPS
                if heard > 2:
                    raise TimeoutError
                ours.settimeout(PATIENCE if heard > 1 else None)
        except TimeoutError:
            is_stopped.set()
            for process, _ in helpers:
                process.kill()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield is_stopped
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        listener.join()
        ours.close()


def _started(count: int, threads: int, port: int, work: partial) -> list[tuple]:
    """All processes but the first one, each with the pipe by which it is heard. Ctrl-C is for the first one."""
    context, helpers, program = multiprocessing.get_context(METHOD), [], sys.modules["__main__"]
    is_in_charge = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handler
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_in_charge else None  # which they inherit
    try:
        if work.func.__module__ != "__main__":  # a script that calls it, which they would run once more
            sys.modules["__main__"] = ModuleType("__main__")
        for rank in range(1, count):
            mine, theirs = context.Pipe()
            told = (rank, count, threads, port, theirs, work)
            process = context.Process(target=_help, args=told, daemon=True)
            process.start()
            helpers.append((process, mine))
            theirs.close()
    except pickle.PicklingError:
        raise UserError("processes: a profiler or a like program runs this one, which other processes cannot find: "
                        "wanted --processes 1") from None
    finally:
        sys.modules["__main__"] = program
        if is_in_charge:
            signal.signal(signal.SIGINT, interrupt)
    return helpers


def _heard(pipe: Connection) -> str:
    """What another process says; nothing when it has ended without a word."""
    try:
        return pipe.recv_bytes().decode()
    except EOFError:
        return ""


def _words(count: int, threads: int, asked: int | None) -> str:
    """How the work is shared, and why."""
    shared = f"{count} process{'es' * (count > 1)} of {threads} thread{'s' * (threads > 1)}"
    if asked is not None:
        return f"{shared}, as --processes wants it"
    if count == 1:
        return f"{shared}: the batch is too small, or cannot be shared evenly"
    return f"{shared}: threads would wait for each other in every operation, processes do so a few times a step"


def _help(rank: int, ranks: int, threads: int, port: int, pipe: Connection, work: Callable[[Dist], object]) -> None:
    """Another process: it prints nothing, and tells the first one why it broke off."""
    _end_with_the_first()
    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        pipe.send_bytes(b"here")
        with joined(dist.TCPStore("127.0.0.1", port), rank, ranks) as world:
            work(world)
    except (LostRank, KeyboardInterrupt):  # the first process is the one to say it
        pass
    except BaseException as error:
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        with suppress(BrokenPipeError):  # the first process has gone
            pipe.send_bytes(text.encode())


def _end_with_the_first() -> None:
    """Have this process end when the first one does, whatever it is about: a verifier may never come back."""
    first = multiprocessing.parent_process()
    threading.Thread(target=lambda: (first.join(), os._exit(1)), daemon=True).start()
    with suppress(OSError, AttributeError):  # Linux alone has it; no thread runs while a pattern is matched, say
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _reason(helpers: list[tuple]) -> str:
    """Why a process has gone, or nothing; what it said, if it is more than a line, goes to stderr."""
    for number, (process, pipe) in enumerate(helpers, 2):
        process.join(PATIENCE)
        which, words = f"process {number} of {len(helpers) + 1}", _heard(pipe) if pipe.poll() else ""
        if "\n" in words:
            print(words, file=sys.stderr)
            return f"{which} broke off, see above; --resume goes on from the last save"
        if words:
            return words
        if process.exitcode:
            return (f"{which} was ended (exit code {process.exitcode}; -9 may be want of memory: --processes 1 takes "
                    "least); --resume goes on from the last save")
    return ""
