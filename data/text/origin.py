"""What token files depend on: the name of their folder changes with every byte of it."""

import ast
import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Iterator

from data.io.checkpoint import file_digest
from data.tasks import TASKS, load_task
from data.text.files import folder_files, is_place
from data.text.loader import digest

HERE = Path(__file__).resolve().parent
PACKAGES = {"site-packages", "dist-packages"}


def own_files() -> list[Path]:
    """Files of this program that the embedded corpus depends on."""
    rooms = (HERE, HERE.parent / "tasks")
    return [*(file for room in rooms for file in sorted(room.glob("*.py"))), HERE / "stories.txt"]


def imported(name: str, file: Path) -> Iterator[str]:
    """Names that the module mentions in its imports: modules, and what is taken out of them."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def task_files(name: str) -> list[Path]:
    """Files that a task depends on besides our own: the user's modules, and `files` of the task.

    Modules are the task's own and those that they import, as far as neither Python nor a package
    brings them. Raises UserError for a task that is not there.
    """
    task, head = load_task(name), name.partition(":")[0]
    found, python = {}, Path(sysconfig.get_path("stdlib")).resolve()
    waiting = [] if head in TASKS else [head]
    while waiting:
        module = waiting.pop()
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "").resolve()
        is_foreign = PACKAGES & set(file.parts) or any(map(file.is_relative_to, (python, HERE.parent)))
        if module not in found and file.suffix == ".py" and (module == head or not is_foreign):
            found[module] = file
            waiting += imported(module, file)
    return sorted({*found.values(), *task.files})


def task_digest(name: str) -> str:
    """16 hexadecimal digits that change with the files of a task (see `task_files`), ours included."""
    ours = sorted((HERE.parent / "tasks").glob("*.py"))
    return digest([file_digest(file) for file in [*ours, *task_files(name)]])


def folder_name(source: str, tokenizer, seed: int) -> str:
    """A name that changes with everything that the token files depend on."""
    what = [source, seed, sys.version, tokenizer.ranks, tokenizer.pattern, tokenizer.specials]
    files, (kind, _, argument) = own_files(), source.partition(":")
    if is_place(source):
        files += folder_files(Path(source))
        what += [str(file) for file in files]  # documents come in the order of their names
    elif kind == "local" and argument:
        files += task_files(argument)
    what += [file_digest(file) for file in files]
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(source).name)[:40]
    return f"{name}-{digest(what)[:10]}"
