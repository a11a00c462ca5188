"""Text to train on: the embedded corpus, three over the network, and the user's own files.

The embedded corpus ("local") needs no download. Its domains are reasoning (the tasks of
data/tasks, written in good and bad habits), stories (generated from stories.txt) and code (the
running interpreter's own standard library, read in place). Every document goes to training or
validation by a hash of its text (reasoning: of its question; code: of its file's name), so none is
ever on both sides.
"""

import hashlib
import itertools
import random
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from data.io.cli import UserError, nearest
from data.tasks import load_task
from data.tasks.task import BOS, prompt_text
from data.text.files import Document, Trusted, download, folder_documents, is_place
from data.text.loader import TokenFile, write_tokens
from data.text.origin import folder_name
from data.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
VAL_SHARE = 8  # of 256 hash values
REASONING = {"chain": 110_000, "countdown": 3_000, "compare": 3_000}  # documents
DRILLS = 0.10  # share of documents that are drills, for tasks that have them
STORIES = 7_000  # documents
CODE_CHARS, CODE_DOCUMENT = 1_500_000, 16_000
SKIPPED = {"encodings", "lib2to3", "idle_test", "test", "tests", "site-packages", "dist-packages"}
RAW = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co/datasets"
URLS = {
    "shakespeare": RAW + "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": HUB + "/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt",
    "fineweb": HUB + "/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}.bin",
}
LICENCES = {
    "code": f"PSF-2.0, Python {sys.version.split()[0]}", "stories": "generated",
    "reasoning": "generated", "shakespeare": "public domain",
    "tinystories": "CDLA-Sharing-1.0", "fineweb": "ODC-By",
}
NAMES = ("local", "local:TASK", "shakespeare", "tinystories", "tinystories:MB", "fineweb",
         "fineweb:SHARDS")


Pair = tuple[TokenFile, TokenFile]  # to train and to validate


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


# ----------------------------------------------------------------------------- the embedded corpus


def code_documents(root: Path) -> Iterator[Document]:
    """The first 16,000 characters of library files, up to 1.5 MB.

    Their order is given by a hash of their names.
    """
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
    """stories.txt: lists of words by name, and plots as sentences with alternatives."""
    lines = (HERE / "stories.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    lists, *plots = [block.splitlines() for block in text.strip().split("\n\n")]
    words = {}
    for line in lists:
        name, rest = line.split(": ")
        words[name] = rest.split(", ")
    return words, [[line.split(" | ") for line in plot] for plot in plots]


def story_documents(rng: random.Random, count: int) -> Iterator[Document]:
    """Stories of about ten sentences: a plot, a cast, and a choice in every sentence."""
    words, plots = read_plots()
    for _ in range(count):
        cast = {name: rng.choice(options) for name, options in words.items()}
        if rng.random() < 0.5:
            hero, friend, pronouns = "girl", "boy", ("she", "her", "her")
        else:
            hero, friend, pronouns = "boy", "girl", ("he", "his", "him")
        cast |= {"hero": cast[hero], "friend": cast[friend]}
        for name, word in zip(("she", "her", "her2"), pronouns):
            cast |= {name: word, name.title(): word.title()}
        for name in ("animal", "thing"):
            cast[name], cast[name + "2"] = rng.sample(words[name], 2)
        plot = rng.choice(plots)
        text = " ".join(rng.choice(sentence) for sentence in plot).format_map(cast)
        yield text, text


def reasoning_documents(rng: random.Random, counts: dict[str, int]) -> Iterator[Document]:
    """Traces and drills of tasks in random order; questions of the training split only."""
    names = [name for name, count in counts.items() for _ in range(count)]
    rng.shuffle(names)
    tasks = {name: load_task(name) for name in counts}
    for name in names:
        task = tasks[name]
        drill = task.drill(rng) if rng.random() < DRILLS else None
        if drill:
            yield drill, Trusted(drill)
        else:
            problem = task.problem(rng)
            prompt = prompt_text(problem.question).removeprefix(BOS)  # files have marks of their own
            yield problem.question, Trusted(prompt + task.trace(problem, rng))


def local_documents(task: str, seed: int, log: Callable = print) -> dict[str, Iterator[Document]]:
    """The embedded corpus by domain; without a readable library, its generated part alone."""
    counts = REASONING
    if task:
        counts = {task: sum(REASONING.values()) // 2}  # its traces are longer than a chain's
    domains = {"reasoning": reasoning_documents(random.Random(f"reasoning {seed}"), counts),
               "stories": story_documents(random.Random(f"stories {seed}"), STORIES)}
    root = Path(sysconfig.get_paths()["stdlib"])
    if next(root.glob("*.py"), None):
        return domains | {"code": code_documents(root)}
    log(f"data        no source files in {root} (a compiled library): "
        "the corpus is its generated part alone")
    return domains


# ------------------------------------------------------------------------------------- the network


def shakespeare_documents(cache: Path, log: Callable) -> Iterator[Document]:
    """Tiny Shakespeare, 1.1 MB."""
    path = download(URLS["shakespeare"], cache / "shakespeare.txt", None, log)
    yield from folder_documents(path)


def tinystories_documents(cache: Path, megabytes: int, log: Callable) -> Iterator[Document]:
    """TinyStories V2: its validation file (22 MB), or the first megabytes of the training file."""
    url = URLS["tinystories"].format("train" if megabytes else "valid")
    path = cache / f"tinystories-{megabytes or 'valid'}.txt"
    download(url, path, megabytes * 1_000_000 or None, log)
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="ignore") as file:
        for line in file:  # what follows the last mark is cut off by the limit, and left out
            if line.strip() != "<|endoftext|>":
                lines.append(line)
            elif text := "".join(lines).strip():
                yield text, text
                lines = []


def fineweb_chunks(path: Path, limit: int | None, bos_id: int) -> Iterator[np.ndarray]:
    """Ids of a shard of GPT-2 tokens (of its first `limit`); each document begins with `bos_id`."""
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or list(header[:2]) != [20240520, 1]:
        raise UserError(f"data: {path} is not a shard of GPT-2 tokens: delete it")
    tokens, wanted = np.memmap(path, np.uint16, "r", 1024), limit or header[2]
    if len(tokens) != wanted:
        raise UserError(f"data: {path} has {len(tokens):,} tokens, wanted {wanted:,}: delete it")
    for start in range(0, len(tokens), 1 << 20):
        chunk = tokens[start : start + (1 << 20)].astype(np.uint32)
        if chunk.max() > 50256:
            raise UserError(f"data: {path} has ids that GPT-2 has not: delete it")
        yield np.where(chunk == 50256, bos_id, chunk)


def write_fineweb(folder: Path, cache: Path, shards: int, tokenizer: Tokenizer,
                  log: Callable) -> Pair:
    """FineWeb-Edu comes as tokens, in shards of 100M: some to train, a million to validate."""
    if tokenizer.name != "gpt2":
        raise UserError(f"data: fineweb is made of GPT-2 tokens, got --tokenizer {tokenizer.name}, "
                        "wanted gpt2")
    notes = {"tokenizer": tokenizer.name, "corpus": "fineweb", "domain": "web", "bytes": 0,
             "sha256": "-"}
    train, made = [f"train_{i:06d}" for i in range(1, shards + 1)], []
    for split, names, limit in (("train", train, None), ("val", ["val_000000"], 1_000_000)):
        path = folder / f"web.{split}.bin"
        file = sound_file(path, log)
        if file is None:
            size = 1024 + 2 * limit if limit else None
            files = [download(URLS["fineweb"].format(name), cache / f"fineweb_{name}.bin", size, log)
                     for name in names]
            chunks = (fineweb_chunks(file, limit, tokenizer.bos_id) for file in files)
            chunks = itertools.chain.from_iterable(chunks)
            write_tokens(path, chunks, tokenizer.vocab_size, lambda: notes)
            file = TokenFile(path)
        made.append(file)
    return made[0], made[1]


# -------------------------------------------------------------------------- from text to token files


class Encoded:
    """Documents as ids: iterating gives those to train on, in chunks.

    Behind the last chunk, `val` holds the ids to validate on and `notes()` describes the text.
    Every document stands between begin and end mark.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer):
        self.documents, self.tokenizer = iter(documents), tokenizer
        self.val: list[int] = []
        self.size, self.digest = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[np.ndarray]:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if bos is None:
            raise UserError(f"tokenizer {self.tokenizer.name}: it has no begin token, which documents begin with")
        while batch := list(itertools.islice(self.documents, 2_000)):
            raw = "".join(text for _, text in batch).encode("utf-8", "replace")
            self.size += len(raw)
            self.digest.update(raw)
            train: list[int] = []
            for trusted, alike in itertools.groupby(batch, lambda pair: isinstance(pair[1], Trusted)):
                keys, texts = zip(*alike)
                for key, ids in zip(keys, self.tokenizer.encode_batch(list(texts), trusted)):
                    side = self.val if is_val(key) else train
                    side += [bos, *ids, eos]
            yield np.array(train, np.uint32)

    def notes(self) -> dict:
        return {"bytes": self.size, "sha256": self.digest.hexdigest()[:8]}


def sound_file(path: Path, log: Callable) -> TokenFile | None:
    """A token file of the cache; None where there is none or it is damaged, and so made anew."""
    try:
        return TokenFile(path) if path.exists() else None
    except UserError as error:
        log(f"data        {str(error).removesuffix(': delete it')}: made anew")
        return None


def write_domain(folder: Path, domain: str, documents: Iterator[Document], tokenizer: Tokenizer,
                 source: str, log: Callable) -> Pair:
    """Both token files of a domain, made unless they are there."""
    paths = [folder / f"{domain}.{split}.bin" for split in ("train", "val")]
    train, val = (sound_file(path, log) for path in paths)
    if train is None or val is None:
        encoded = Encoded(documents, tokenizer)

        def notes() -> dict:
            names = {"tokenizer": tokenizer.name, "corpus": source, "domain": domain}
            return names | encoded.notes()

        write_tokens(paths[0], encoded, tokenizer.vocab_size, notes)
        write_tokens(paths[1], [np.array(encoded.val, np.uint32)], tokenizer.vocab_size, notes)
        train, val = map(TokenFile, paths)
    return train, val


def prepare(source: str | Path, tokenizer: Tokenizer, cache_dir: str | Path, *, seed: int = 0,
            log: Callable = print) -> Corpus:
    """Token files of a corpus: made once, then found in `cache_dir`.

    `source`: "local" (or "local:TASK": its reasoning is that task alone), "shakespeare",
    "tinystories[:MB]", "fineweb[:SHARDS]", or a file or folder of text, .jsonl and .parquet. Files
    of the cache that are damaged are made anew. Raises UserError for text, network or disk that is
    not there.
    """
    source, cache = str(source), Path(cache_dir)
    try:
        folder = cache / folder_name(source, tokenizer, seed)
        if is_kind(source, "fineweb"):
            made = {"web": write_fineweb(folder, cache, amount(source) or 1, tokenizer, log)}
        else:
            documents = open_domains(source, cache, seed, log)
            made = {domain: write_domain(folder, domain, texts, tokenizer, source, log)
                    for domain, texts in documents.items()}
    except OSError as error:
        raise UserError(f"data: cannot prepare {source!r} in {cache}: {error}") from None
    train, val = ({domain: pair[side] for domain, pair in made.items()} for side in (0, 1))
    return Corpus(list(made), train, val, describe(source, train, val))


def open_domains(source: str, cache: Path, seed: int,
                 log: Callable) -> dict[str, Iterator[Document]]:
    """The documents of a source by domain; none is read or downloaded before it is iterated."""
    if is_place(source):
        return {"text": folder_documents(Path(source), log)}
    kind, _, argument = source.partition(":")
    if kind == "local":
        return local_documents(argument, seed, log)
    if source == "shakespeare":
        return {source: shakespeare_documents(cache, log)}
    if is_kind(source, "tinystories"):
        return {kind: tinystories_documents(cache, amount(source), log)}
    raise UserError(f"data: got {source!r}, wanted a file or folder that exists, or one of "
                    f"{', '.join(NAMES)}{nearest(source, NAMES)}")


def is_kind(source: str, kind: str) -> bool:
    """Whether the source is this one, alone or with a number above 0: "fineweb", "fineweb:3"."""
    is_numbered = source.startswith(kind + ":") and amount(source) > 0
    return not is_place(source) and (source == kind or is_numbered)


def amount(source: str) -> int:
    """The number behind the colon, 0 where there is none."""
    argument = source.partition(":")[2]
    return int(argument) if argument.isdecimal() and len(argument) < 10 else 0


def describe(source: str, train: dict[str, TokenFile], val: dict[str, TokenFile]) -> str:
    """One line per domain: size, split, licence, and the first digits of the text's hash."""
    total, lines = max(1, sum(map(len, train.values()))), []
    for domain, file in train.items():
        count, size = len(file) + len(val[domain]), file.header["bytes"]
        licence = LICENCES.get(domain, LICENCES.get(source.partition(":")[0], "your own"))
        text = ""
        if size and count:
            text = f"{size / 1e6:.2f} MB, {size / count:.2f} bytes per token, "
        lines.append(f"data        {domain}: {len(file):,} tokens to train "
                     f"({len(file) / total:.0%}), {len(val[domain]):,} to validate, {text}{licence}, "
                     f"sha256 {file.header['sha256']}")
    return "\n".join(lines)
