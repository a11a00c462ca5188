"""Text, tokenizer, tasks and the loader; and what makes a program: `run_main` and the error that it shows as a line."""

import ctypes
import difflib
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NoReturn


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


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: memory that comes from the system anew is paid for page by page.

    In training that is 6 % of a step of `tiny`, and a quarter of one with 256 experts.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own, which would go back at once
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` as a program: a UserError becomes one line on stderr and exit code 2."""
    keep_freed_memory()
    code = 0
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
