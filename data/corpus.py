"""Text to train on: the embedded corpus, three that come over the network, and the user's own files.

The embedded corpus ("local") needs no download. Its domains are reasoning (the tasks of data/tasks.py, written
in good and bad habits), stories (generated from data/stories.txt) and code (the running interpreter's own
standard library, read in place). Every document goes to training or validation by a hash of its text
(reasoning: of its question; code: of its file's name), so none is ever on both sides.
"""

import hashlib
import http.client
import itertools
import random
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from data import UserError, nearest
from data.loader import TokenFile, write_tokens
from data.tasks import BOS, load_task, prompt_text
from data.tokenizer import Tokenizer

HERE = Path(__file__).parent
VAL_SHARE = 8  # of 256 hash values
REASONING = {"chain": 110_000, "countdown": 3_000, "compare": 3_000}  # documents
DRILLS = 0.10  # share of documents that are drills, for tasks that have them
STORIES = 7_000  # documents
CODE_CHARS, CODE_DOCUMENT = 1_500_000, 16_000
SKIPPED = {"encodings", "lib2to3", "idle_test", "test", "tests", "site-packages", "dist-packages"}
HUB = "https://huggingface.co/datasets"
URLS = {"shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinystories": HUB + "/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt",
        "fineweb": HUB + "/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}.bin"}
LICENCES = {"code": f"PSF-2.0, Python {sys.version.split()[0]}", "stories": "generated", "reasoning": "generated",
            "shakespeare": "public domain", "tinystories": "CDLA-Sharing-1.0", "fineweb": "ODC-By"}

Document = tuple[str, str]  # what its side is decided by, and its text


@dataclass
class Corpus:
    """Token files of every domain, and a description to print."""

    domains: list[str]
    train: dict[str, TokenFile]
    val: dict[str, TokenFile]
    description: str


def is_val(key: str) -> bool:
    """Whether a document is for validation: one in 32, by a hash."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()[1] < VAL_SHARE


# ------------------------------------------------------------------------------------ the embedded corpus


def code_documents(root: Path) -> Iterator[Document]:
    """The first 16,000 characters of library files, in an order given by a hash of their names, up to 1.5 MB."""
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not SKIPPED & set(name.parts)]
    total = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="ignore")[:CODE_DOCUMENT]
        text = text[: text.rfind("\n") + 1]  # whole lines
        if total < CODE_CHARS and text.strip():
            total += len(text)
            yield name, text


def read_plots() -> tuple[dict[str, list[str]], list[list[list[str]]]]:
    """data/stories.txt: lists of words by name, and plots as sentences with alternatives."""
    lines = (HERE / "stories.txt").read_text(encoding="utf-8").splitlines()
    blocks = "\n".join(line for line in lines if not line.startswith("#")).strip().split("\n\n")
    words = {name: rest.split(", ") for name, rest in (line.split(": ") for line in blocks[0].splitlines())}
    return words, [[line.split(" | ") for line in block.splitlines()] for block in blocks[1:]]


def story_documents(rng: random.Random, count: int = STORIES) -> Iterator[Document]:
    """Stories of about ten sentences: a plot, a cast, and a choice in every sentence."""
    words, plots = read_plots()
    for _ in range(count):
        cast = {name: rng.choice(options) for name, options in words.items()}
        is_girl = rng.random() < 0.5
        cast["hero"], cast["friend"] = (cast["girl"], cast["boy"])[:: 1 if is_girl else -1]
        for name, word in zip(("she", "her", "her2"), ("she", "her", "her") if is_girl else ("he", "his", "him")):
            cast |= {name: word, name.title(): word.title()}
        for name in ("animal", "thing"):
            cast[name], cast[name + "2"] = rng.sample(words[name], 2)
        text = " ".join(rng.choice(sentence) for sentence in rng.choice(plots)).format_map(cast)
        yield text, text


def reasoning_documents(rng: random.Random, counts: dict[str, int]) -> Iterator[Document]:
    """Traces and drills of the tasks in random order; questions of the training split only."""
    names = [name for name, count in counts.items() for _ in range(count)]
    rng.shuffle(names)
    tasks = {name: load_task(name) for name in counts}
    for name in names:
        task = tasks[name]
        drill = task.drill(rng) if rng.random() < DRILLS else None
        if drill:
            yield drill, drill
        else:
            problem = task.problem(rng)
            text = prompt_text(problem.question).removeprefix(BOS)  # its marks come with the token files
            yield problem.question, text + task.trace(problem, rng)


def local_documents(task: str, seed: int, log: Callable = print) -> dict[str, Iterator[Document]]:
    """The embedded corpus by domain; without a readable library, its generated part alone."""
    counts = {task: sum(REASONING.values()) // 2} if task else REASONING  # one task's traces are longer than a chain's
    domains = {"reasoning": reasoning_documents(random.Random(f"reasoning {seed}"), counts),
               "stories": story_documents(random.Random(f"stories {seed}"))}
    root = Path(sysconfig.get_paths()["stdlib"])
    if next(root.glob("*.py"), None):
        return domains | {"code": code_documents(root)}
    log(f"data        no source files in {root} (a compiled library): the corpus is its generated part alone")
    return domains


# ------------------------------------------------------------------------------------- files of the user


def folder_files(path: Path) -> list[Path]:
    """The file, or all files below the folder but hidden ones, in order of their names."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()
                  and not any(part.startswith(".") for part in file.relative_to(path).parts))


def folder_documents(path: Path, log: Callable = print) -> Iterator[Document]:
    """Every text file below a folder (or one file), cut at blank lines into documents of some thousand characters.

    Raises UserError when there is no text.
    """
    is_empty, foreign = True, []
    for file in folder_files(path):
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"  # as binary files have
        if "\0" in text:
            foreign.append(file)
            continue
        for part in cut(text, "\n\n", min(8_000, max(500, len(text) // 200))):
            is_empty = False
            yield part, part
    if is_empty:
        reason = f"{foreign[0]} is not UTF-8 text" if foreign else "it is empty"
        raise UserError(f"data: {path} holds no text: {reason}; wanted a text file or a folder of them")
    if foreign:
        log(f"data        left out {len(foreign)} files that are not UTF-8 text, such as {foreign[0]}")


def cut(text: str, mark: str, size: int) -> Iterator[str]:
    """Pieces of at least `size` characters (the last may be shorter), each ending at `mark`, or at twice the size."""
    start = 0
    while start < len(text):
        found = text.find(mark, start + size, start + 2 * size)
        end = found + len(mark) if found >= 0 else start + 2 * size
        if text[start:end].strip():
            yield text[start:end]
        start = end


# ------------------------------------------------------------------------------------------- the network


def download(url: str, path: Path, limit: int | None = None, log: Callable = print, patience_s: float = 1.0) -> Path:
    """The file at `url`, or its first `limit` bytes: goes on where an earlier try ended, appears whole or not at all.

    Raises UserError after three tries in a row that brought nothing; what has arrived stays for the next time.
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
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error))
        fails = 0 if part.exists() and part.stat().st_size > before else fails + 1
        time.sleep(patience_s * fails if fails < 3 else 0)
    raise UserError(f"data: cannot download {path.name} from {url}: {reason}; --data local needs no network")


def fetch_part(url: str, part: Path, start: int, limit: int | None) -> bool:
    """Append what the server sends from byte `start` on; True when the announced length (or `limit`) is there."""
    if limit and start >= limit:
        return True
    headers = {"Range": f"bytes={start}-{limit - 1 if limit else ''}", "User-Agent": "plainseek"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        if answer.status == 206:
            total = int(answer.headers["Content-Range"].rpartition("/")[2])
        else:  # the server knows no ranges and sends everything
            start, total = 0, int(answer.headers["Content-Length"])
        end = min(limit or total, total)
        with open(part, "ab" if start else "wb") as file:
            while start < end and (block := answer.read(min(1 << 20, end - start))):
                start += file.write(block)
    return start == end


def tinystories_documents(cache: Path, megabytes: int, log: Callable) -> Iterator[Document]:
    """TinyStories V2: the file meant for validation (22 MB), or the first megabytes of the one for training."""
    url = URLS["tinystories"].format("train" if megabytes else "valid")
    path = download(url, cache / f"tinystories-{megabytes or 'valid'}.txt", megabytes * 1_000_000 or None, log)
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="ignore") as file:
        for line in file:  # what follows the last mark is cut off by the limit, and left out
            if line.strip() != "<|endoftext|>":
                lines.append(line)
            elif text := "".join(lines).strip():
                yield text, text
                lines = []


def fineweb_chunks(path: Path, limit: int | None, bos_id: int) -> Iterator[np.ndarray]:
    """Ids of a shard of GPT-2 tokens (of its first `limit`); the mark before each document becomes `bos_id`."""
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or list(header[:2]) != [20240520, 1]:
        raise UserError(f"data: {path} is not a shard of GPT-2 tokens: delete it")
    tokens = np.memmap(path, np.uint16, "r", 1024)
    if len(tokens) != (limit or header[2]):
        raise UserError(f"data: {path} has {len(tokens):,} tokens, wanted {limit or header[2]:,}: delete it")
    for start in range(0, len(tokens), 1 << 20):
        chunk = tokens[start : start + (1 << 20)].astype(np.uint32)
        yield np.where(chunk == 50256, bos_id, chunk)


def write_fineweb(cache: Path, folder: Path, shards: int, tokenizer: Tokenizer, log: Callable) -> dict[str, tuple]:
    """FineWeb-Edu comes as tokens: shards of 100M for training, the first million of another for validation."""
    if tokenizer.name != "gpt2":
        raise UserError(f"data: fineweb is made of GPT-2 tokens, got --tokenizer {tokenizer.name}, wanted gpt2")
    notes = {"tokenizer": tokenizer.name, "corpus": "fineweb", "domain": "web", "bytes": 0, "sha256": "-"}
    names = {"train": [f"train_{i:06d}" for i in range(1, shards + 1)], "val": ["val_000000"]}
    for split, parts in names.items():
        path, limit = folder / f"web.{split}.bin", 1_000_000 if split == "val" else None
        if not path.exists():
            size = 1024 + 2 * limit if limit else None
            files = [download(URLS["fineweb"].format(name), cache / f"fineweb_{name}.bin", size, log) for name in parts]
            chunks = (fineweb_chunks(file, limit, tokenizer.bos_id) for file in files)
            write_tokens(path, itertools.chain.from_iterable(chunks), tokenizer.vocab_size, notes)
    return {"web": ()}


# -------------------------------------------------------------------------------- from text to token files


def encode_split(documents: Iterable[Document], tokenizer: Tokenizer, trusted: bool, val: list,
                 notes: dict) -> Iterator[np.ndarray]:
    """Ids of the training documents in chunks, each between begin and end mark; those to validate go to `val`."""
    documents, digest, notes["bytes"] = iter(documents), hashlib.sha256(), 0
    while batch := list(itertools.islice(documents, 2_000)):
        raw = "".join(text for _, text in batch).encode("utf-8", "replace")
        digest.update(raw)
        notes |= {"bytes": notes["bytes"] + len(raw), "sha256": digest.hexdigest()[:8]}
        sides: dict[bool, list[int]] = {True: val, False: []}
        for (key, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch], trusted)):
            sides[is_val(key)] += [tokenizer.bos_id, *ids, tokenizer.eos_id]
        yield np.array(sides[False], np.uint32)


def write_domain(folder: Path, domain: str, documents: Iterator[Document], tokenizer: Tokenizer, source: str) -> None:
    """Both token files of a domain, unless they are there."""
    paths = [folder / f"{domain}.{split}.bin" for split in ("train", "val")]
    if not all(path.exists() for path in paths):
        val: list[int] = []
        notes = {"tokenizer": tokenizer.name, "corpus": source, "domain": domain}
        chunks = encode_split(documents, tokenizer, domain == "reasoning", val, notes)
        write_tokens(paths[0], chunks, tokenizer.vocab_size, notes)
        write_tokens(paths[1], [np.array(val, np.uint32)], tokenizer.vocab_size, notes)


def folder_name(source: str, tokenizer: Tokenizer, seed: int) -> str:
    """A name that changes with everything that the token files depend on."""
    what = [source, seed, sys.version, tokenizer.ranks, tokenizer.pattern, tokenizer.specials]
    what += [(HERE / name).read_bytes() for name in ("corpus.py", "tasks.py", "stories.txt")]
    if Path(source).exists():
        what += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in folder_files(Path(source))]
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(source).name)[:40]
    return f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:10]}"


def open_domains(source: str, tokenizer: Tokenizer, cache: Path, folder: Path, seed: int, log: Callable) -> dict:
    """The documents of a source by domain; nothing is read or downloaded before they are iterated (but tokens)."""
    if Path(source).exists():
        return {"text": folder_documents(Path(source), log)}
    kind, _, argument = source.partition(":")
    if kind == "local":
        if argument:
            load_task(argument)  # says what is wrong with it
        return local_documents(argument, seed, log)
    if source == "shakespeare":
        path = cache / "shakespeare.txt"
        return {source: (pair for _ in (0,) for pair in folder_documents(download(URLS[source], path, None, log)))}
    is_number = argument.isdecimal() and int(argument) > 0
    if kind == "tinystories" and (is_number or not argument):
        return {kind: tinystories_documents(cache, int(argument or 0), log)}
    if kind == "fineweb" and (is_number or not argument):
        return write_fineweb(cache, folder, int(argument or 1), tokenizer, log)
    names = ("local", "local:TASK", "shakespeare", "tinystories", "tinystories:MB", "fineweb", "fineweb:SHARDS")
    raise UserError(f"data: got {source!r}, wanted a file or folder that exists, or one of {', '.join(names)}"
                    f"{nearest(source, names)}")


def prepare(source: str | Path, tokenizer: Tokenizer, cache_dir: str | Path, *, seed: int = 0,
            log: Callable = print) -> Corpus:
    """Token files of a corpus: made once, then found in `cache_dir`.

    `source`: "local" (or "local:TASK": its reasoning is that task alone), "shakespeare", "tinystories[:MB]",
    "fineweb[:SHARDS]", or a text file or folder. Raises UserError for text, network or disk that is not there.
    """
    source, cache = str(source), Path(cache_dir)
    folder = cache / folder_name(source, tokenizer, seed)
    try:
        domains = open_domains(source, tokenizer, cache, folder, seed, log)
        for domain, documents in domains.items():
            if documents:
                write_domain(folder, domain, documents, tokenizer, source)
    except OSError as error:
        raise UserError(f"data: cannot prepare {source!r} in {cache}: {error}") from None
    train, val = ({domain: TokenFile(folder / f"{domain}.{split}.bin") for domain in domains}
                  for split in ("train", "val"))
    return Corpus(list(domains), train, val, describe(source, train, val))


def describe(source: str, train: dict[str, TokenFile], val: dict[str, TokenFile]) -> str:
    """One line per domain: size, split, licence, and the first digits of the text's hash."""
    total, lines = max(1, sum(map(len, train.values()))), []
    for domain, file in train.items():
        count, size = len(file) + len(val[domain]), file.header["bytes"]
        licence = LICENCES.get(domain, LICENCES.get(source.partition(":")[0], "your own"))
        text = f"{size / 1e6:.2f} MB, {size / count:.2f} bytes per token, " if size and count else ""
        lines.append(f"data        {domain}: {len(file):,} tokens to train ({len(file) / total:.0%}), "
                     f"{len(val[domain]):,} to validate, {text}{licence}, sha256 {file.header['sha256']}")
    return "\n".join(lines)
