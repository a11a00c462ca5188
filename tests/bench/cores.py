"""What the cores of this CPU are worth to `python train.py`, alone and beside busy programs.

python -m tests.bench.cores [--busy 0 2 6] [--steps 20] [--rounds 3]

Each contestant is a run of its own, in turn: one process of one thread, one of a thread for each core, and a process
for each core, which is the default. A busy program counts in a loop; all are children of this one, so that the system
gives each the same share. "fair" is what the default would take if the cores did nothing but divide what it takes alone;
"inf" is a run that has not done four steps in two minutes.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from data.io.cli import Knobs, knob, parse_flags, run_main
from data.io.cores import cores
from data.io.run import RunFolder

ROOT = Path(__file__).parents[2]
GIVEN_UP = 120.0  # seconds, after which a run is stopped and its steps so far count


@dataclass
class CoresConfig(Knobs):
    """What is measured."""

    busy: list[int] = knob([0, 2, 6], "busy programs beside the run", least=0)
    steps: int = knob(20, "steps of a run", least=4)
    rounds: int = knob(3, "runs of each, in turn, whose median counts", least=1)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many programs that count in a loop."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def seconds_per_step(folder: str, processes: int, threads: int, steps: int) -> float:
    """The median over the steps of a run but the first two."""
    flags = f"--out {folder} --name run --overwrite --steps {steps} --eval_every {steps} --processes {processes} "
    flags += "--eval_tokens 128 --data local:chain"
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags.split()], stdout=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        run.wait(GIVEN_UP)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
    done = [float(row["seconds"]) for row in RunFolder(Path(folder, "run")).rows() if row["seconds"]]
    if len(done) < 4:
        return math.inf
    return statistics.median(b - a for a, b in zip(done[1:], done[2:]))


def main(argv: list[str]) -> None:
    """Print a table of seconds a step."""
    config, n = parse_flags(CoresConfig, argv, __doc__), cores()
    contestants = {"one core": (1, 1), f"{n} threads": (1, n), f"{n} processes": (n, n)}
    alone = None
    print(f"{'busy':>4}{''.join(f'{name:>14}' for name in contestants)}   seconds a step")
    with tempfile.TemporaryDirectory() as folder:
        seconds_per_step(folder, 1, n, 4)  # which prepares the text
        for beside in config.busy:
            with busy(beside):
                found = [[seconds_per_step(folder, *each, config.steps) for each in contestants.values()]
                         for _ in range(config.rounds)]
            medians = [statistics.median(column) for column in zip(*found)]
            alone = alone or medians[-1]
            fair = alone * max(1.0, (beside + n) / n)
            print(f"{beside:4}{''.join(f'{value:14.3f}' for value in medians)}   the default is "
                  f"{medians[0] / medians[-1]:.2f}x as fast as one core, "
                  f"{medians[1] / medians[-1]:.1f}x as threads, and takes {medians[-1] / fair:.2f}x its fair share",
                  flush=True)


if __name__ == "__main__":
    run_main(main)
