"""Text from outside: the user's own files, examples to fine-tune on, and downloads."""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Iterator

from data.io.cli import UserError
from data.tasks.task import ASSISTANT, EOS, USER

Document = tuple[str, str]  # what its side, training or validation, is decided by; and its text
BORDER = "<|endoftext|>"  # between documents, wherever a text was made for GPT-2
RECORD = 16_000  # characters; what has borders of its own is cut from twice as many on
CUTS = (re.compile(r"\n[^\S\n]*\n"), re.compile(r"\n"), re.compile(r"\s"))  # best first
ROW = '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


class Trusted(str):
    """Text in which special tokens are meant: we wrote it, or the user as messages of a chat."""


def folder_files(path: Path) -> list[Path]:
    """The file, or all files below the folder but hidden ones, in order of their names."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files
                  if not any(part.startswith(".") for part in file.relative_to(path).parts))


def decode_text(data: bytes) -> str:
    """Text of UTF-8, or of UTF-16 with its byte order mark; every line ends with `\\n`.

    Raises UnicodeError naming line and byte (from 0) of what is no text.
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = unix_lines(data[: error.start].decode(encoding, "replace")).count("\n") + 1
        raise UnicodeError(f"line {line}, byte {error.start} (0x{data[error.start]:02x}) is not "
                           f"{encoding.upper()}: save it as UTF-8") from None
    if "\0" in text:
        raise UnicodeError("it is not UTF-8 text: it holds zero bytes, as binary files do")
    return unix_lines(text)


def unix_lines(text: str) -> str:
    """Line ends of Windows (CRLF) and old Macs (CR) as `\\n`, without a byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def folder_documents(path: Path, log: Callable = print) -> Iterator[Document]:
    """The documents of every file below a folder (or of one file): text, .jsonl and .parquet.

    Raises UserError when there is no text, a file cannot be read, or a row is odd.
    """
    is_empty, foreign = True, []
    for file in folder_files(path):
        try:
            for text in file_documents(file):
                is_empty = False
                yield text, text
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {error.strerror or error}") from None
        except UnicodeError as error:
            foreign.append(f"{file}: {error}")
    if is_empty:
        raise UserError(f"data: {path} holds no text: {foreign[0] if foreign else 'it is empty'}; "
                        "wanted a text file, .jsonl, .parquet or a folder of them")
    if foreign:
        log(f"data        left out {len(foreign)} files that are not UTF-8 text, such as {foreign[0]}")


def file_documents(file: Path) -> Iterator[str]:
    """The documents of a file. Raises UnicodeError where it is no text, UserError for an odd row."""
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".parquet"):
        text = decode_text(file.read_bytes())
        is_marked = text.count(BORDER) > 1  # one may as well stand at the end of a book
        yield from records(text, RECORD if is_marked else min(8_000, max(500, len(text) // 200)))
        return
    for where, shown, row in (jsonl_rows if kind == ".jsonl" else parquet_rows)(file):
        if (text := row_text(row)) is None:
            raise UserError(f"data: {file}, {where}: got {shown}, wanted {ROW}")
        yield from [text] if isinstance(text, Trusted) else records(text, RECORD)


def records(text: str, size: int) -> Iterator[str]:
    """What stands between borders, each by itself cut into pieces of `size`."""
    for part in map(str.strip, text.split(BORDER)) if BORDER in text else [text]:
        yield from cut(part, size)


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of `size` to twice as many characters (the last: any), cut behind a blank line.

    Where there is none, behind a line, else a space; inside a word only if it alone is longer.

    >>> list(cut("one two\\nthree four five", 6))
    ['one two\\n', 'three four ', 'five']
    """
    start = 0
    while start < len(text):
        low, end = start + size, start + 2 * size
        places = CUTS if end < len(text) else CUTS[:1]  # the rest may stay in one piece
        found = next(filter(None, (place.search(text, low, end) for place in places)), None)
        if found:
            end = found.end()
        elif end < len(text):  # a long word: from its beginning on
            space = max(text.rfind(sign, start, low) for sign in " \t\n")
            end = space + 1 if space > start else end
        if text[start:end].strip():
            yield text[start:end]
        start = end


def jsonl_rows(path: Path) -> Iterator[tuple[str, str, object]]:
    """Each line's place, its beginning to show, and its JSON value: None where it is none."""
    for number, line in enumerate(decode_text(path.read_bytes()).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"line {number}", repr(line.strip()[:60]), row


def parquet_rows(path: Path) -> Iterator[tuple[str, str, object]]:
    """The same for each row of a .parquet file. Raises UserError without pyarrow, which reads it."""
    try:
        from pyarrow import ArrowException, parquet

        with parquet.ParquetFile(path) as file:
            names = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            batches = file.iter_batches(columns=names or None)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"row {number}", repr(row)[:60], row
    except ImportError:
        raise UserError(f"data: {path} needs pyarrow: pip install pyarrow") from None
    except ArrowException as error:
        raise UserError(f"data: {path} is not a parquet file: {str(error)[:80]!r}") from None


def row_text(row) -> str | None:
    """The text of a row, or its chat with the marks of our template; None where it has neither."""
    marks = {"user": USER + "{}", "assistant": ASSISTANT + "{}" + EOS, "system": "{}", "tool": "{}"}
    try:
        if isinstance(row.get("text"), str):
            return unix_lines(row["text"])
        turns = [marks[turn["role"]].format(unix_lines(turn["content"])) for turn in row["messages"]]
    except (AttributeError, KeyError, TypeError):
        return None
    return Trusted("".join(turns).removesuffix(EOS)) if turns else None  # which every document gets


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """(question, answer) pairs of a .jsonl file: `{"question": "4-6=", "answer": "..."}` a line.

    Raises UserError naming the file and the line.
    """
    pairs = []
    try:
        for where, shown, row in jsonl_rows(Path(path)):
            pair = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (0, 0)
            if not all(isinstance(text, str) for text in pair):
                raise UserError(f"examples: {path}, {where}: got {shown}, "
                                'wanted {"question": "...", "answer": "..."}')
            pairs.append(pair)
    except (OSError, UnicodeError) as error:
        raise UserError(f"examples: cannot read {path}: {error}") from None
    if not pairs:
        raise UserError(f"examples: {path} is empty: python -m data.tasks writes some")
    return pairs


# ------------------------------------------------------------------------------------- the network


def download(url: str, path: Path, limit: int | None = None, log: Callable = print,
             patience_s: float = 1.0) -> Path:
    """The file at `url`, or its first `limit` bytes: whole, or not at all.

    Goes on where an earlier try ended. Raises UserError after three tries in a row that brought
    nothing; what has arrived stays for the next time.
    """
    if path.exists():
        return path
    log(f"data        downloading {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, fails, reason = path.with_name(path.name + ".part"), 0, ""
    while fails < 3:
        before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_part(url, part, before, limit):
                part.replace(path)
                return path
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # what is here is longer than what is there: start over
                part.unlink(missing_ok=True)
            fails += 3 if error.code in (401, 403, 404, 410) else 0
        except (urllib.error.URLError, http.client.HTTPException,
                TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error))
        has_grown = part.exists() and part.stat().st_size > before
        fails = 0 if has_grown else fails + 1
        if fails < 3:
            time.sleep(patience_s * fails)
    raise UserError(f"data: cannot download {path.name} from {url}: {reason}; "
                    "--data local needs no network")


def fetch_part(url: str, part: Path, start: int, limit: int | None) -> bool:
    """Append what the server sends from byte `start` on; True when all (or `limit`) is there."""
    if limit and start >= limit:
        return True
    headers = {"Range": f"bytes={start}-{limit - 1 if limit else ''}", "User-Agent": "plainseek"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status == 206:
            total = int(answer.headers["Content-Range"].rpartition("/")[2])
        else:  # the server knows no ranges and sends everything
            start, total = 0, int(answer.headers["Content-Length"])
        end = min(limit or total, total)
        with open(part, "ab" if start else "wb") as file:
            while start < end and (block := answer.read(min(1 << 20, end - start))):
                start += file.write(block)
    return start == end


def is_place(source: str) -> bool:
    """Whether a source is a file or folder of the user; `local` is the embedded corpus, ./local a folder."""
    return source != "local" and Path(source).exists()
