"""Command lines: dataclasses of knobs that check themselves, flags, errors of one line, devices."""

import argparse
import ctypes
import difflib
import errno
import math
import operator
import os
import sys
import threading
import types
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from itertools import chain
from typing import Callable, Iterable, Iterator, NoReturn, Sequence
from typing import get_args, get_origin, get_type_hints

import torch
from tqdm import tqdm


class UserError(ValueError):
    """Something that the user can mend: shown as one line, exit code 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing.

    >>> nearest("tinny", ["tiny", "small"])
    " (did you mean 'tiny'?)"
    """
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ------------------------------------------------------------------------------------------- knobs

KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
BOUNDS = {"least": ("at least", operator.ge), "above": ("above", operator.gt),
          "most": ("at most", operator.le), "below": ("below", operator.lt)}
TRUTH = {"true": True, "yes": True, "on": True, "1": True,
         "false": False, "no": False, "off": False, "0": False}


def knob(default, help: str, **meta):
    """A dataclass field with a help text, for `Knobs` and `parse_flags`.

    meta: `choices=(...)`; `positional=True`; the range of a number, or of each number in a list:
    `least` and `most` may be reached, `above` and `below` may not.
    """
    metadata = {"help": help} | meta
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Knobs:
    """Base of every dataclass of knobs, which checks itself: types, ranges and choices, then `rules`.

    Raises UserError for the first value that does not fit.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Sizes(Knobs):
    ...     heads: int = knob(4, "attention heads", least=1)
    >>> Sizes(heads=0)
    Traceback (most recent call last):
    data.io.cli.UserError: heads: got 0, wanted at least 1
    """

    def __post_init__(self):
        for name, wanted, is_met in chain(self._rules_of_fields(), self.rules()):
            if not is_met:
                raise UserError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")

    def rules(self) -> Iterator[tuple[str, str, bool]]:
        """What one field asks of another: (field name, what is wanted, is it met)."""
        yield from ()

    def only(self, where: str, is_there: bool, *names: str) -> Iterator[tuple[str, str, bool]]:
        """The rules of fields that have an effect `where` alone: elsewhere they keep their defaults."""
        defaults = {each.name: _default(each) for each in fields(self)}
        for name in names:
            yield name, where, is_there or getattr(self, name) == defaults[name]

    def _rules_of_fields(self) -> Iterator[tuple[str, str, bool]]:
        hints = get_type_hints(type(self))
        for each in fields(self):
            kind, is_list, allows_none = _parts(hints[each.name])
            meta, value = each.metadata, getattr(self, each.name)
            if allows_none and value is None:
                continue
            items = value if isinstance(value, list) and is_list else [value]
            wanted = "a list, each " * is_list + KINDS[kind] + ", or none" * allows_none
            is_met = isinstance(value, list) == is_list and all(_is_a(kind, x) for x in items)
            yield each.name, wanted, is_met
            bounds = [(*BOUNDS[key], meta[key]) for key in BOUNDS if key in meta]
            wanted = ", ".join(f"{words} {bound}" for words, _, bound in bounds)
            yield each.name, wanted, all(fits(x, bound) for _, fits, bound in bounds for x in items)
            if "choices" in meta:
                wanted = "one of " + ", ".join(map(repr, meta["choices"]))
                wanted += nearest(str(value), map(str, meta["choices"]))
                yield each.name, wanted, all(x in meta["choices"] for x in items)


def _parts(hint) -> tuple[type, bool, bool]:
    """The type of one value, whether the field is a list of them, and whether it may be None."""
    is_list, allows_none = get_origin(hint) is list, types.NoneType in get_args(hint)
    return get_args(hint)[0] if is_list or allows_none else hint, is_list, allows_none


def _is_a(kind: type, value) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and -math.inf < value < math.inf
    return isinstance(value, kind)


def _default(each: Field):
    return each.default if each.default_factory is MISSING else each.default_factory()


# ------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse_flags(cls, argv: Sequence[str], description: str, *,
                presets: dict[str, dict[str, dict]] | None = None,
                moved: dict[str, str] | None = None):
    """An instance of the dataclass `cls` from command line flags, one per field.

    Types: int, float, str, bool (`--flag`, `--no-flag`), any of them or None (`--flag none`), and
    list[str] (`--flag a b`, repeatable). `--micro-batch` and `--micro_batch` are the same.
    presets: `{"size": {"big": {"steps": 9}}}` makes steps 9 where size is "big" and no flag says
    otherwise. moved: `{"keep": "--snapshots"}` answers --keep with where it is now.
    Raises UserError for an unknown flag, naming the nearest, and for values of the wrong type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Example:
    ...     micro_batch: int = knob(8, "sequences per forward pass")
    >>> parse_flags(Example, ["--micro-batch", "4"], "example")
    Example(micro_batch=4)
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(cls)
    for each in fields(cls):
        _add_flag(parser, each, hints[each.name])
    found, rest = parser.parse_known_args(_one_spelling(cls, argv, moved or {}))
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            close = nearest(name.replace("-", "_"), ["__" + each.name for each in fields(cls)])
            raise UserError(f"unknown flag {name}{close.replace('__', '--', 1)}; --help lists all")
        raise UserError(f"unexpected argument {word!r}: a text with spaces goes in quotes")
    given, chosen = vars(found), {}
    defaults = {each.name: _default(each) for each in fields(cls)}
    for name, options in (presets or {}).items():
        chosen |= options.get((defaults | given)[name], {})
    return cls(**(chosen | given))


def _one_spelling(cls, argv: Sequence[str], moved: dict[str, str]) -> list[str]:
    """`argv` with flags as the parser knows them: --name, and --no-name for a bool."""
    flags = [f"--{start}{each.name}" for each in fields(cls) for start in ("", "no-")]
    spellings = {flag.replace("-", "_"): flag for flag in flags}
    words = []
    for place, word in enumerate(argv):
        if word == "--":  # what follows is text
            return words + list(argv[place:])
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            folded = flag.replace("-", "_")
            if folded[2:] in moved:
                raise UserError(f"{flag} is now {moved[folded[2:]]}")
            flag = spellings.get(folded, flag)
        words.append(flag + equals + value)
    return words


def _add_flag(parser: argparse.ArgumentParser, each: Field, hint) -> None:
    meta, (kind, is_list, allows_none) = each.metadata, _parts(hint)
    default = _default(each)
    shown = "" if default in (None, [], "") else f" [{default}]"
    options = {"help": (meta.get("help", "") + shown).replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _converter(kind, allows_none)
        options |= {"choices": meta["choices"]} if "choices" in meta else {"metavar": kind.__name__}
    if is_list:
        options |= {"nargs": "+", "action": "extend"}
    if meta.get("positional"):
        parser.add_argument(each.name, nargs="?", **options | {"metavar": each.name})
    else:
        parser.add_argument("--" + each.name, **options)


def _converter(kind: type, allows_none: bool) -> Callable[[str], object]:
    def convert(text: str):
        if text == argparse.SUPPRESS:  # argparse converts the default of a positional, too
            return text
        if allows_none and text.lower() == "none":
            return None
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {kind.__name__}") from None

    return convert


def to_flags(config, names: Iterable[str] | None = None) -> list[str]:
    """The inverse of `parse_flags`: words for the fields (of `names` only) that are no defaults.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Example:
    ...     steps: int = knob(8, "optimizer steps")
    ...     isolate: bool = knob(True, "documents do not see each other")
    >>> to_flags(Example(steps=4, isolate=False))
    ['--steps=4', '--no-isolate']
    """
    words, text, wanted = [], [], None if names is None else set(names)
    for each in fields(config):
        value = getattr(config, each.name)
        if value == _default(each) or (wanted is not None and each.name not in wanted):
            continue
        if each.metadata.get("positional"):
            text = ["--", str(value)]
        elif isinstance(value, bool):
            words.append(f"--{each.name}" if value else f"--no-{each.name}")
        else:
            items = value if isinstance(value, list) else ["none" if value is None else value]
            words += [f"--{each.name}={item}" for item in items]
    return words + text


def set_fields(cls, settings: Iterable[str]) -> dict:
    """`key=value` words as keyword arguments of the dataclass `cls`, which has no lists.

    Raises UserError for an unknown key, naming the nearest, and for a value of the wrong type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Sizes:
    ...     heads: int = 4
    ...     rank: int | None = 8
    >>> set_fields(Sizes, ["heads=2", "rank=none"])
    {'heads': 2, 'rank': None}
    """
    hints, out = get_type_hints(cls), {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in hints:
            raise UserError(f"set: the model's config has no key {key!r}{nearest(key, hints)}")
        kind, _, allows_none = _parts(hints[key])
        try:
            out[key] = _converter(kind, allows_none)(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"set: {key}: {error}") from None
    return out


# ---------------------------------------------------------------------------------------- programs


def pick_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "mps"; "auto" is cuda where there is one, else cpu.

    Raises UserError for a name that is not known or a device that this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "cpu"
    if name not in has:
        raise UserError(f"device: got {name!r}, wanted auto, cpu, cuda or mps{nearest(name, has)}")
    if not has[name]:
        there = ", ".join(kind for kind in has if has[kind])
        raise UserError(f"device: got {name}, this machine has {there} only")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: memory from the system anew is paid for page by page.

    In training that is 6 % of a step of `tiny`, and a quarter of one with 256 experts.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own, which would go back at once
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def progress(**layout) -> tqdm:
    """A bar of tqdm."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill leaves behind
    return tqdm(**layout)


def mute() -> None:
    """Send what is still printed to nobody: the reader of stdout, `head` for one, has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` as a program: a UserError becomes one line on stderr and exit code 2.

    What a terminal cannot show becomes a question mark. A rank other than the first says which it is.
    """
    keep_freed_memory()
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print("error: " if rank == "0" else f"error on rank {rank}: ", error, sep="", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        mute()
        code = 141  # as a program that SIGPIPE ended
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        mute()
        code = 2
    sys.exit(code)


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums that shall be exact: float64, where the device has it (mps has not)."""
    return torch.float32 if device.type == "mps" else torch.float64
