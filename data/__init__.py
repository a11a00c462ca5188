"""Text, tokenizer, tasks and the loader; and the one error that every program shows as a line."""

import difflib
from typing import Iterable


class UserError(ValueError):
    """Something that the user can mend: shown as one line, exit code 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing.

    >>> nearest("tinny", ["tiny", "small"])
    " (did you mean 'tiny'?)"
    """
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
