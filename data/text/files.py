"""Text from outside: the user's own files, examples to fine-tune on, and downloads."""

import http.client
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Iterator

from data.io.cli import UserError

Document = tuple[str, str]  # what its side, training or validation, is decided by; and its text


def folder_files(path: Path) -> list[Path]:
    """The file, or all files below the folder but hidden ones, in order of their names."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files
                  if not any(part.startswith(".") for part in file.relative_to(path).parts))


def folder_documents(path: Path, log: Callable = print) -> Iterator[Document]:
    """Every text file below a folder (or one file), cut at blank lines into some thousand characters.

    Raises UserError when there is no text, or a file cannot be read.
    """
    is_empty, foreign = True, []
    for file in folder_files(path):
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"  # as binary files have
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {error.strerror}") from None
        if "\0" in text:
            foreign.append(file)
            continue
        for part in cut(text, "\n\n", min(8_000, max(500, len(text) // 200))):
            is_empty = False
            yield part, part
    if is_empty:
        reason = f"{foreign[0]} is not UTF-8 text" if foreign else "it is empty"
        raise UserError(f"data: {path} holds no text: {reason}; "
                        "wanted a text file or a folder of them")
    if foreign:
        log(f"data        left out {len(foreign)} files that are not UTF-8 text, such as {foreign[0]}")


def cut(text: str, mark: str, size: int) -> Iterator[str]:
    """Pieces of at least `size` characters (the last: any), cut behind `mark`, or at twice the size.

    >>> list(cut("one. two. three. four.", ". ", 6))
    ['one. two. ', 'three. four.']
    """
    start = 0
    while start < len(text):
        found = text.find(mark, start + size, start + 2 * size)
        end = found + len(mark) if found >= 0 else start + 2 * size
        if text[start:end].strip():
            yield text[start:end]
        start = end


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """(question, answer) pairs of a .jsonl file: `{"question": "4-6=", "answer": "..."}` a line.

    Raises UserError naming the file and the line.
    """
    pairs = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"examples: cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        pair = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if not all(isinstance(text, str) for text in pair):
            raise UserError(f"examples: {path}, line {number}: got {line.strip()[:60]!r}, "
                            'wanted {"question": "...", "answer": "..."}')
        pairs.append(pair)
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
