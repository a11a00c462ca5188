"""Text to train on: the embedded corpus, three that come over the network, and the user's own files.

The embedded corpus ("local") needs no download. Its three domains are code (the running interpreter's own
standard library, PSF licence, read in place), stories (generated from data/stories.txt) and reasoning (the
tasks of data/tasks.py, written in good and bad habits). Every document goes to training or validation by a
hash of its text (reasoning: of its question; code: of its file's name), so none is ever on both sides.
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
from data.tasks import BOS, EOS, TASKS, document
from data.tokenizer import Tokenizer

VERSION = 1  # of the generated text: raised when it changes, so that cached files are made anew
STORY_FILE = Path(__file__).with_name("stories.txt")
VAL_SHARE = 8  # of 256 hash values
REASONING = (("chain", 62_000), ("countdown", 6_000), ("compare", 6_000))  # documents, a quarter of them drills
STORIES = 13_000  # documents
CODE_CHARS, CODE_DOCUMENT = 3_000_000, 16_000
SKIPPED = {"encodings", "lib2to3", "idle_test", "test", "tests", "site-packages", "dist-packages"}
URLS = {"shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinystories": "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt",
        "fineweb": "https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}.bin"}
LICENCES = {"shakespeare": "public domain", "tinystories": "CDLA-Sharing-1.0", "fineweb": "ODC-By", "stories":
            "generated", "reasoning": "generated", "code": f"PSF-2.0, Python {sys.version.split()[0]}"}

Document = tuple[str, str]  # what its split is decided by, and its text


@dataclass
class Corpus:
    """Token files of every domain, and a description to print."""

    name: str
    domains: list[str]
    train: dict[str, TokenFile]
    val: dict[str, TokenFile]
    description: str


def is_val(key: str) -> bool:
    """Whether a document is for validation: one in 32, by a hash."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()[1] < VAL_SHARE


# ------------------------------------------------------------------ the embedded corpus


def code_documents(root: Path) -> Iterator[Document]:
    """The first 16,000 characters of library files in an order given by a hash of their names, up to 3 MB."""
    names = [path.relative_to(root) for path in root.rglob("*.py") if not SKIPPED & set(path.parts[len(root.parts):])]
    total = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="ignore")[:CODE_DOCUMENT]
        text = text[: text.rfind("\n") + 1]  # whole lines
        if total < CODE_CHARS and text.strip():
            total += len(text)
            yield name.as_posix(), text


def read_plots() -> tuple[dict[str, list[str]], list[list[list[str]]]]:
    """data/stories.txt: lists of words by name, and plots as sentences with alternatives."""
    lines = STORY_FILE.read_text(encoding="utf-8").splitlines()
    blocks = "\n".join(line for line in lines if not line.startswith("#")).strip().split("\n\n")
    words = {name: rest.split(", ") for name, rest in (line.split(": ") for line in blocks[0].splitlines())}
    return words, [[line.split(" | ") for line in block.splitlines()] for block in blocks[1:]]


def story_documents(rng: random.Random, count: int = STORIES) -> Iterator[Document]:
    """Stories of about nine sentences: a plot, a cast, and a choice in every sentence."""
    words, plots = read_plots()
    for _ in range(count):
        cast = {name: rng.choice(options) for name, options in words.items()}
        pronouns = ("she", "her", "her") if rng.random() < 0.5 else ("he", "his", "him")
        pair = (cast["girl"], cast["boy"])
        cast["hero"], cast["friend"] = pair if pronouns[0] == "she" else pair[::-1]
        cast["she"], cast["her"], cast["her2"] = pronouns
        cast["She"], cast["her_"] = pronouns[0].title(), pronouns[1].title()
        for name in ("animal", "thing"):
            cast[name], cast[name + "2"] = rng.sample(words[name], 2)
        text = " ".join(rng.choice(sentence) for sentence in rng.choice(plots)).format_map(cast)
        yield text, text


def reasoning_documents(rng: random.Random, shares=REASONING) -> Iterator[Document]:
    """Traces and drills of the tasks, in random order."""
    names = [name for name, count in shares for _ in range(count)]
    rng.shuffle(names)
    tasks = {name: TASKS[name]() for name, _ in shares}
    for name in names:
        task = tasks[name]
        drill = task.drill(rng) if rng.random() < 0.25 else None
        if drill:
            yield drill, drill
        else:
            problem = task.problem(rng)
            text = document(problem, task.trace(problem, rng))
            yield problem.question, text.removeprefix(BOS).removesuffix(EOS)


def local_documents(seed: int, log: Callable = print) -> dict[str, Iterator[Document]]:
    """The documents of the embedded corpus by domain; without a readable library, the generated ones alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    domains = {"reasoning": reasoning_documents(random.Random(f"reasoning {seed}")),
               "stories": story_documents(random.Random(f"stories {seed}"))}
    if next(root.glob("*.py"), None):
        return domains | {"code": code_documents(root)}
    log(f"no source files in {root}: this Python brings its library compiled, so the corpus is generated text alone")
    return domains


# ------------------------------------------------------------------------------------- files of the user


def folder_documents(path: Path, log: Callable = print) -> Iterator[Document]:
    """Every text file below a folder (or one file), cut at blank lines into documents of some thousand characters.

    Raises UserError when there is no text.
    """
    is_empty, foreign = True, []
    for file in folder_files(path):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = "\0"
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
        log(f"data: left out {len(foreign)} files that are not UTF-8 text, such as {foreign[0]}")


def folder_files(path: Path) -> list[Path]:
    """The file, or all files below the folder but hidden ones, in order of their names."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()
                  and not any(part.startswith(".") for part in file.relative_to(path).parts))


def cut(text: str, mark: str, size: int) -> Iterator[str]:
    """Pieces of at least `size` characters (the last may be shorter), each ending at `mark`."""
    start = 0
    while start < len(text):
        end = text.find(mark, start + size)
        end = len(text) if end < 0 else end + len(mark)
        if text[start:end].strip():
            yield text[start:end]
        start = end


# ------------------------------------------------------------------------------------------- the network


def download(url: str, path: Path, limit: int | None = None, log: Callable = print, patience: float = 1.0) -> Path:
    """The file at `url`, or its first `limit` bytes: goes on where an earlier try ended, whole or not at all.

    Raises UserError after three tries in a row that brought nothing; what has arrived stays for the next time.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, fails = path.with_name(path.name + ".part"), 0
    log(f"downloading {url} to {path}")
    while fails < 3:
        before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_part(url, part, before, limit):
                part.replace(path)
                return path
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason, is_final = f"HTTP {error.code} {error.reason}", error.code in (401, 403, 404, 410)
            if error.code == 416:  # what we have is longer than the file: start over
                part.unlink()
            fails += 3 if is_final else 0
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error))
        has_grown = part.exists() and part.stat().st_size > before
        fails = 0 if has_grown else fails + 1
        time.sleep(patience * fails if 0 < fails < 3 else 0)
    raise UserError(f"cannot download {path.name} from {url}: {reason}; --data local needs no network")


def fetch_part(url: str, part: Path, start: int, limit: int | None) -> bool:
    """Append what the server sends from byte `start` on; True when the length is the announced one (or `limit`)."""
    if limit and start >= limit:
        return True
    wanted = f"bytes={start}-{limit - 1 if limit else ''}"
    request = urllib.request.Request(url, headers={"Range": wanted, "User-Agent": "plainseek"})
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


def shakespeare_documents(cache: Path, log: Callable) -> Iterator[Document]:
    """Tiny Shakespeare in pieces of some scenes' length."""
    path = download(URLS["shakespeare"], cache / "shakespeare.txt", None, log)
    yield from folder_documents(path, log)


def tinystories_documents(cache: Path, megabytes: int, log: Callable) -> Iterator[Document]:
    """TinyStories V2: the file meant for validation (22 MB), or the first megabytes of the one for training."""
    url = URLS["tinystories"].format("train" if megabytes else "valid")
    path = download(url, cache / f"tinystories-{megabytes or 'valid'}.txt", megabytes * 1_000_000 or None, log)
    lines = []
    with open(path, encoding="utf-8", errors="ignore") as file:
        for line in file:
            if line.strip() != "<|endoftext|>":
                lines.append(line)
            elif lines:
                yield "".join(lines), "".join(lines).strip()
                lines = []


def fineweb_chunks(cache: Path, name: str, tokenizer: Tokenizer, limit: int | None, log: Callable) -> Iterator[np.ndarray]:
    """Ids of one shard of 100M GPT-2 tokens (or its first `limit` tokens); its document marks become our begin mark."""
    size = 1024 + 2 * limit if limit else None
    path = download(URLS["fineweb"].format(name), cache / f"fineweb_{name}.bin", size, log)
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise UserError(f"{path} is not a shard of GPT-2 tokens: delete it")
    tokens = np.memmap(path, np.uint16, "r", 1024)
    if len(tokens) != (limit or header[2]):
        raise UserError(f"{path} has {len(tokens):,} tokens, wanted {limit or header[2]:,}: delete it")
    for start in range(0, len(tokens), 1 << 20):
        chunk = tokens[start : start + (1 << 20)]
        yield np.where(chunk == 50256, tokenizer.bos_id, chunk)


# -------------------------------------------------------------------------------- from text to token files


def encode_split(documents: Iterable[Document], tokenizer: Tokenizer, trusted: bool, val: list, notes: dict):
    """Ids of the training documents in chunks, each document between begin and end mark; validation goes to `val`."""
    documents, digest, notes["bytes"] = iter(documents), hashlib.sha256(), 0
    while batch := list(itertools.islice(documents, 2_000)):
        texts = [text for _, text in batch]
        for text in texts:
            raw = text.encode("utf-8", "replace")
            digest.update(raw)
            notes["bytes"] += len(raw)
        sides = {True: val, False: []}
        for (key, _), ids in zip(batch, tokenizer.encode_batch(texts, trusted)):
            sides[is_val(key)] += [tokenizer.bos_id, *ids, tokenizer.eos_id]
        yield np.array(sides[False], np.uint32)
        notes["sha256"] = digest.hexdigest()[:8]


def open_domains(source: str, tokenizer: Tokenizer, cache: Path, seed: int, log: Callable) -> dict[str, Iterator]:
    """The documents of a source by domain; nothing is read or downloaded before they are iterated."""
    kind, _, number = source.partition(":")
    if number and (kind not in ("tinystories", "fineweb") or not number.isdecimal() or int(number) < 1):
        raise UserError(f"data: got {source!r}, wanted tinystories:MEGABYTES, fineweb:SHARDS, or a path")
    if kind == "local":
        return local_documents(seed, log)
    if kind == "shakespeare":
        return {kind: shakespeare_documents(cache, log)}
    if kind == "tinystories":
        return {kind: tinystories_documents(cache, int(number or 0), log)}
    if kind == "fineweb" and tokenizer.name != "gpt2":
        raise UserError(f"data: fineweb is made of GPT-2 tokens, got --tokenizer {tokenizer.name}, wanted gpt2")
    raise UserError(f"data: no file or folder {source!r} and no corpus of this name (local, {', '.join(URLS)})"
                    f"{nearest(source, ['local', *URLS])}")


def build_key(source: str, tokenizer: Tokenizer, seed: int) -> str:
    """A folder name that changes with everything that the token files depend on."""
    what = [VERSION, source, seed, sorted(tokenizer.ranks.items()), tokenizer.pattern, sorted(tokenizer.specials.items())]
    if source == "local":
        what += [sys.version, hashlib.sha256(STORY_FILE.read_bytes()).hexdigest()]
    elif Path(source).exists():
        what += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in folder_files(Path(source))]
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(source).name)[:40]
    return f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:10]}"


def prepare(source: str | Path, tokenizer: Tokenizer, cache_dir: str | Path, *, seed: int = 0,
            log: Callable = print) -> Corpus:
    """Token files of a corpus: made once, then found in `cache_dir`.

    `source`: "local", "shakespeare", "tinystories[:megabytes]", "fineweb[:shards]", or a text file or folder;
    a path that exists goes before a name. Raises UserError for text or network that is not there.
    """
    source, cache = str(source), Path(cache_dir)
    is_path = Path(source).exists()
    try:
        folder = cache / build_key(source, tokenizer, seed)
        if is_path:
            domains = {"text": folder_documents(Path(source), log)}
        elif source.partition(":")[0] == "fineweb" and tokenizer.name == "gpt2":
            domains = prepare_fineweb(cache, folder, int(source.partition(":")[2] or 1), tokenizer, log)
        else:
            domains = open_domains(source, tokenizer, cache, seed, log)
        for domain, documents in domains.items():
            write_domain(folder, domain, documents, tokenizer, source)
    except OSError as error:
        raise UserError(f"data: cannot prepare {source!r} in {cache}: {error}") from None
    train, val = ({domain: TokenFile(folder / f"{domain}.{split}.bin") for domain in domains} for split in ("train", "val"))
    return Corpus(source, list(domains), train, val, describe(source, train, val))


def write_domain(folder: Path, domain: str, documents: Iterator[Document], tokenizer: Tokenizer, source: str) -> None:
    """Both token files of a domain, unless they are there."""
    paths = [folder / f"{domain}.{split}.bin" for split in ("train", "val")]
    if all(path.exists() for path in paths):
        return
    val, notes = [], {"tokenizer": tokenizer.name, "corpus": source, "domain": domain}
    chunks = encode_split(documents, tokenizer, domain == "reasoning", val, notes)
    write_tokens(paths[0], chunks, tokenizer.vocab_size, notes)
    write_tokens(paths[1], [np.array(val, np.uint32)], tokenizer.vocab_size, notes)


def prepare_fineweb(cache: Path, folder: Path, shards: int, tokenizer: Tokenizer, log: Callable) -> dict[str, tuple]:
    """FineWeb-Edu comes as tokens: its training shards, and the first million of its validation shard."""
    notes = {"tokenizer": tokenizer.name, "corpus": "fineweb", "domain": "web", "bytes": 0, "sha256": "-"}
    names = {"train": [f"train_{i:06d}" for i in range(1, shards + 1)], "val": ["val_000000"]}
    for split, parts in names.items():
        path, limit = folder / f"web.{split}.bin", 1_000_000 if split == "val" else None
        if not path.exists():
            chunks = (fineweb_chunks(cache, name, tokenizer, limit, log) for name in parts)
            write_tokens(path, itertools.chain.from_iterable(chunks), tokenizer.vocab_size, notes)
    return {"web": ()}


def describe(source: str, train: dict[str, TokenFile], val: dict[str, TokenFile]) -> str:
    """One line per domain: size, split, licence, and the first digits of the text's hash."""
    total = sum(map(len, train.values()))
    lines = []
    for domain, file in train.items():
        count, size = len(file) + len(val[domain]), file.header["bytes"]
        licence = LICENCES.get(domain, LICENCES.get(source.partition(":")[0], "yours"))
        text = f"{size / 1e6:.2f} MB, {size / count:.2f} bytes per token, " if size and count else ""
        lines.append(f"data        {domain}: {len(file):,} tokens to train ({len(file) / max(total, 1):.0%}), "
                     f"{len(val[domain]):,} to validate, {text}{licence}, sha256 {file.header['sha256']}")
    return "\n".join(lines)
