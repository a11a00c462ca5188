"""Text, tokenizer, tasks and the loader; and the one error that every program shows as a line."""

import difflib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator


class UserError(ValueError):
    """Something that the user can mend: shown as one line, exit code 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing.

    >>> nearest("tinny", ["tiny", "small"])
    " (did you mean 'tiny'?)"
    """
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; at `path` it appears complete when the block ends, or not at all. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
