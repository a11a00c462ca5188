"""Tasks with questions, worked traces and verifiers (task.py, games.py), and what answers are worth
(exam.py). `python -m data.tasks chain 1000 traces.jsonl` writes worked traces to fine-tune on.
"""

import importlib
import sys

from data.io.cli import UserError, nearest
from data.tasks.games import TASKS
from data.tasks.task import Task


def load_task(name: str) -> Task:
    """A task by name: `chain`, `countdown:4`, `gsm8k:file.jsonl`, or `module:Class` for your own.

    Raises UserError for a name that is neither.
    """
    head, _, argument = name.partition(":")
    try:
        if head in TASKS and argument:
            return TASKS[head](int(argument) if argument.isdecimal() else argument)
        if head in TASKS:
            return TASKS[head]()
        if argument:
            if "" not in sys.path:
                sys.path.append("")  # the user's own folder
            return getattr(importlib.import_module(head), argument)()
    except UserError:
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"task {name}: {error} (wanted a task of data/tasks or module:Class)") from None
    raise UserError(f"task: got {name!r}, wanted one of {', '.join(TASKS)} or module:Class"
                    f"{nearest(name, TASKS)}")
