"""Worked traces of tasks as examples to fine-tune on.

    python -m data.tasks chain 1000 traces.jsonl
    python -m data.tasks chain,countdown 1000 traces.jsonl --seed 1

The tasks take turns. Each line is a JSON object with a question of the training split and a clean
answer in tags: train.py reads such a file as --data examples:traces.jsonl.
"""

import json
import random
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from data.io.checkpoint import write_text
from data.io.cli import Knobs, UserError, knob, parse_flags, run_main
from data.tasks import load_task
from data.tasks.exam import clean_style
from data.tasks.task import Task


@dataclass
class TraceConfig(Knobs):
    """The knobs of `python -m data.tasks`."""

    tasks: str = knob("chain", "task, or several with commas between", positional=True)
    count: int = knob(1000, "how many traces", positional=True, least=1)
    file: str = knob("", "the .jsonl file to write", positional=True)
    seed: int = knob(0, "seed of questions and answers")

    def rules(self):
        yield "file", "a file to write, such as traces.jsonl", Path(self.file).name != ""


def clean_traces(tasks: list[Task], count: int, seed: int) -> list[tuple[str, str]]:
    """Long, clean answers in tags, as (question, answer): each the longer of two.

    Raises UserError for a task without `work`.
    """
    rng, pairs = random.Random(f"traces {seed}"), []
    for task in islice(cycle(tasks), count):
        two = []
        for problem in (task.problem(rng), task.problem(rng)):
            try:
                answer = task.trace(problem, rng, style=clean_style(task), tagged=True)
            except NotImplementedError:
                raise UserError(f"task {task.name}: it has no `work`, which writes traces") from None
            two.append((problem.question, answer))
        pairs.append(max(two, key=lambda pair: len(pair[1])))
    return pairs


def write_examples(path: str | Path, pairs: list[tuple[str, str]]) -> None:
    """(question, answer) pairs as a .jsonl file. Raises UserError when it cannot be written."""
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(argv: list[str]) -> None:
    """Write the traces, one JSON object a line."""
    config = parse_flags(TraceConfig, argv, __doc__)
    tasks = [load_task(name) for name in config.tasks.split(",")]
    write_examples(config.file, clean_traces(tasks, config.count, config.seed))
    print(f"{config.count} traces of {config.tasks} in {config.file}")


if __name__ == "__main__":
    run_main(main)
