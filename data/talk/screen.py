"""What a terminal shows of an answer: the thought dimmed while it lasts, then one line; no more colour than it has."""

import os
import shutil
import sys
import unicodedata

DIM, BRIGHT, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def printable(text: str) -> str:
    """A model's text without control characters, which a terminal would obey.

    >>> printable("a\\x1b[2Jb\\tc")
    'a\\ufffd[2Jb\\tc'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


class Screen:
    """Where a conversation is printed; only a terminal gets colours, and lines that are taken back."""

    def __init__(self):
        is_able = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.can_fold, self.has_colour = is_able, is_able and not os.environ.get("NO_COLOR")
        self.rows = self.column = 0  # how far what `fold` takes back reaches

    def write(self, text: str, style: str = "") -> None:
        """Print at once, in a style."""
        text, width = printable(text), shutil.get_terminal_size().columns
        for char in text:
            wide = 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
            wide = 8 - self.column % 8 if char == "\t" else wide
            if char == "\n" or self.column + wide > width:
                self.rows, self.column = self.rows + 1, 0
            self.column += 0 if char == "\n" else wide
        print(f"{style}{text}{PLAIN}" if style and self.has_colour and text else text, end="", flush=True)

    def line(self, text: str, style: str = "") -> None:
        """Print a line, on a line of its own."""
        self.write("\n" * bool(self.column) + text + "\n", style)
        self.rows = self.column = 0

    def fold(self) -> None:
        """Take back what was written since the last `line`, as far as it is still on the screen."""
        if self.can_fold:
            up = min(self.rows, shutil.get_terminal_size().lines - 1)
            print("\r" + f"\x1b[{up}A" * bool(up) + "\x1b[J", end="", flush=True)
            self.rows = self.column = 0
