"""Requests decoded together: they join the running batch between two tokens, and leave when they like.

A request waits in a queue until as many rows are free as it wants answers. One thread admits, steps and looks;
whoever asked hears of each token through a function of its own. The decoder is handed in.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.io.cli import UserError


class Busy(UserError):
    """Too many requests wait already."""


@dataclass(eq=False)
class Request:
    """What is asked of the engine, and who hears of it."""

    prompt: list[int]
    limit: int  # the length at which its rows end
    sampling: tuple  # temperature, top_k, top_p
    noise: Tensor  # (n, steps): the chance of its n rows
    tell: Callable[[int, list[int], bool], None]  # answer, its new tokens, whether it has ended
    fail: Callable[[Exception], None]  # the engine could not go on with it
    rows: list[int] = field(default_factory=list)  # of the decoder, of its answers that are being made

    @property
    def key(self) -> tuple:
        """Requests that agree in it are admitted together."""
        return self.sampling, len(self.noise)


class Engine:
    """A decoder with `rows` rows, and a queue of at most `longest_queue` requests in front of it."""

    def __init__(self, decoder, rows: int, longest_queue: int):
        self.decoder, self.free, self.longest_queue = decoder, list(range(rows)), longest_queue
        self.waiting: deque[Request] = deque()
        self.owners: dict[int, tuple[Request, int]] = {}  # row -> its request, and which answer
        self.gone: set[Request] = set()
        self.is_closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Put a request into the queue. Raises Busy when it is full."""
        with self.changed:
            if len(self.waiting) >= self.longest_queue + len(self.free):  # some only wait for the next step
                raise Busy(f"{len(self.waiting)} requests wait already: try again in a second")
            self.waiting.append(request)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more: its rows are freed before the next token."""
        with self.changed:
            self.gone.add(request)
            self.changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.gone or self.owners or self.is_closing):
                    self.changed.wait()
                if self.is_closing:
                    return
                gone, self.gone = self.gone, set()
                self.waiting = deque(request for request in self.waiting if request not in gone)
            try:
                self._free({row for row, (request, _) in self.owners.items() if request in gone})
                if self.owners:
                    self.decoder.step()
                self._admit()
                if self.owners:
                    self._deliver()
            except Exception as error:  # whatever goes wrong, those who wait hear of it, and others are served
                self._fail(error)

    def _free(self, rows: set[int]) -> None:
        """Rows that nobody waits for leave the batch."""
        if rows:
            self.decoder.drop(rows)
            self._forget(rows)

    def _forget(self, rows: set[int]) -> None:
        for row in rows:
            request, _ = self.owners.pop(row)
            request.rows.remove(row)
            self.free.append(row)

    def _take(self) -> list[Request]:
        """The first that wait and find room, of one kind, in the order of the queue."""
        taken: list[Request] = []
        with self.changed:
            while self.waiting and len(self.waiting[0].noise) <= len(self.free):
                if taken and self.waiting[0].key != taken[0].key:
                    break
                request = self.waiting.popleft()
                request.rows = [self.free.pop() for _ in request.noise]
                self.owners |= {row: (request, i) for i, row in enumerate(request.rows)}
                taken.append(request)
        return taken

    def _admit(self) -> None:
        while taken := self._take():
            rows = [row for request in taken for row in request.rows]
            limits = [request.limit for request in taken for _ in request.rows]
            steps = max(request.noise.shape[1] for request in taken)
            noise = torch.cat([torch.nn.functional.pad(request.noise, (0, steps - request.noise.shape[1]))
                               for request in taken])  # (rows, steps)
            self.decoder.admit([request.prompt for request in taken], rows, limits, noise, *taken[0].sampling)

    def _deliver(self) -> None:
        ended = set()
        for row, tokens, has_ended in self.decoder.look():
            request, answer = self.owners[row]
            if has_ended:
                ended.add(row)
            request.tell(answer, tokens, has_ended)
        self._forget(ended)

    def _fail(self, error: Exception) -> None:
        traceback.print_exception(error)  # who asked hears one line; who serves sees where
        requests = {request for request, _ in self.owners.values()}
        self._forget(set(self.owners))
        self.decoder.batch = None
        for request in requests:
            request.fail(error)
