"""Token files, and what cuts them into batches: exact about epochs, ranks and resuming."""

import hashlib
import json
import random
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.io.checkpoint import fingerprint, written_aside
from data.io.cli import UserError
from data.tasks.task import ASSISTANT, EOS, prompt_text

HEADER_BYTES = 1024
MAGIC = "plainseek tokens 1"
IGNORE = -100  # a target that carries no loss, as in torch's cross_entropy


def write_tokens(path: Path, chunks: Iterable[np.ndarray], vocab_size: int,
                 notes: Callable[[], dict]) -> None:
    """Write ids as uint16 (uint32 above 65,536 ids) behind a JSON header, whole or not at all.

    `notes()`, asked behind the last chunk, says what more stands in the header; a text there keeps
    its last 40 characters. Raises UserError when the file cannot be written.
    """
    dtype, count = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32"), 0
    content = hashlib.sha256()
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(b" " * HEADER_BYTES)
        for chunk in chunks:
            ids = np.asarray(chunk, dtype).tobytes()
            file.write(ids)
            content.update(ids)
            count += len(chunk)
        header = {"magic": MAGIC, "count": count, "dtype": dtype.name, "vocab_size": vocab_size}
        header |= {name: value[-40:] if isinstance(value, str) else value
                   for name, value in notes().items()}
        file.seek(0)
        file.write(sealed(header | {"content": content.hexdigest()[:32]}))


def sealed(header: dict) -> bytes:
    """The first bytes of a token file: the header with a checksum over itself and what it says."""
    fields = {name: value for name, value in header.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]
    return json.dumps(fields | {"checksum": checksum}).encode().ljust(HEADER_BYTES)


class TokenFile:
    """A file of token ids, mapped and not read: `header` names its corpus, `tokens` are the ids.

    Its checksums are compared when it is opened. Raises UserError for a file that is foreign,
    shorter than its header says, or damaged.
    """

    def __init__(self, path: str | Path):
        try:
            with open(path, "rb") as file:
                head, content = file.read(HEADER_BYTES), hashlib.sha256()
                while block := file.read(1 << 20):
                    content.update(block)
            self.header = json.loads(head)
            if self.header["magic"] != MAGIC:
                raise ValueError("magic")
            count, dtype = self.header["count"], np.dtype(self.header["dtype"])
            size = HEADER_BYTES + count * dtype.itemsize
            is_sound = head == sealed(self.header | {"content": content.hexdigest()[:32]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a token file of this program ({error}): delete it") from None
        if Path(path).stat().st_size != size:
            raise UserError(f"{path}: its header says {count:,} tokens, its size another number: "
                            "delete it")
        if not is_sound:
            raise UserError(f"{path} is damaged, its checksum is another: delete it")
        self.tokens = np.empty(0, dtype)
        if count:
            self.tokens = np.memmap(path, dtype, "r", HEADER_BYTES)  # (count,)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, seq_len: int) -> int:
        """How many sequences fit: each reads one token more, with which the next one begins."""
        return max(0, (len(self) - 1) // seq_len)

    def window(self, index: int, seq_len: int) -> Tensor:
        """Sequence number `index` with its last target: (T + 1,) int64."""
        start = index * seq_len
        return torch.from_numpy(self.tokens[start : start + seq_len + 1].astype(np.int64))


def split_batch(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and the targets one place later, (n, T) each, of n windows (T + 1,)."""
    block = torch.stack(rows)  # (n, T + 1)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def digest(value: list) -> str:
    """16 hexadecimal digits that change with what is in the list."""
    return fingerprint(repr(value).encode())


def rank_share(start: int, sequences: int, rank: int, world_size: int) -> range:
    """This rank's places among the next sequences. Raises UserError when they do not divide."""
    if sequences < 1 or sequences % world_size:
        raise UserError(f"{sequences} sequences do not divide among {world_size} processes")
    return range(start + rank, start + sequences, world_size)


def check_same(saved: dict, now: dict) -> None:
    """Raises UserError when a saved position counts something else than now."""
    position = saved.get("position") if isinstance(saved, dict) else None
    if type(position) is not int or position < 0:
        raise UserError(f"cannot continue: the run was saved at position {position!r}")
    for key, value in now.items():
        was = saved.get(key)
        if key == "plain":  # a state of its own, compared by its loader
            was, value = (type(state).__name__ for state in (was, value))
        if key != "position" and was != value:
            raise UserError(f"cannot continue: the run was saved with {key} {was}, now it is {value}")


class Loader:
    """Sequences of all files, shuffled together anew in every epoch; a domain's share is its size.

    Order is a matter of seed and epoch alone and `position` counts the sequences drawn by all
    ranks, so the ranks' parts of one draw form the same set for any number of ranks, and a saved
    position continues exactly.
    """

    def __init__(self, files: dict[str, TokenFile], seq_len: int, *, rank: int = 0,
                 world_size: int = 1, seed: int = 0):
        self.files, self.seq_len, self.seed = list(files.values()), seq_len, seed
        self.rank, self.world_size, self.position = rank, world_size, 0
        counts = [file.windows(seq_len) for file in self.files]
        self.starts = [0, *accumulate(counts)]  # first window of each file, and the end
        self.windows = self.starts[-1]
        self._shuffled = -1, np.empty(0, np.int64)  # an epoch and its order
        self.corpus = digest([file.header["content"] for file in self.files])
        if not self.windows:
            raise UserError(f"the corpus has {sum(map(len, self.files)):,} tokens in its training "
                            f"part, wanted more than one sequence of {seq_len}: "
                            "use more text or a smaller --seq_len")

    def _window(self, position: int) -> Tensor:
        epoch, place = divmod(position, self.windows)
        if self._shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            self._shuffled = epoch, order
        index = int(self._shuffled[1][place])
        file = bisect_right(self.starts, index) - 1
        return self.files[file].window(index - self.starts[file], self.seq_len)

    def next_batch(self, sequences: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the next sequences: tokens and targets, (n / world_size, T) int64."""
        mine = rank_share(self.position, sequences, self.rank, self.world_size)
        self.position += sequences
        return split_batch([self._window(position) for position in mine])

    def state_dict(self) -> dict:
        """Where the loader stands, and what this number counts."""
        return {"position": self.position, "seed": self.seed, "seq_len": self.seq_len,
                "windows": self.windows, "corpus": self.corpus}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there. Raises UserError when the corpus or its cutting is another one."""
        check_same(state, self.state_dict())
        self.position = state["position"]


class Examples:
    """Questions and answers to fine-tune on: the question carries no loss, the stop token does.

    texts: (question, answer) pairs; `left_out` of them do not fit into `seq_len` tokens. Order is a
    matter of seed and position alone. Every fourth sequence is plain text of another loader, whole.
    Raises UserError when no example fits.
    """

    def __init__(self, texts: list[tuple[str, str]], tokenizer, seq_len: int, *, rank: int = 0,
                 world_size: int = 1, seed: int = 0, plain: Loader | None = None):
        encode = tokenizer.encode_trusted
        pairs = [(encode(prompt_text(question)), encode(answer + EOS)) for question, answer in texts]
        sizes = [len(prompt) + len(answer) - 1 for prompt, answer in pairs]
        self.rows = [pair for pair, size in zip(pairs, sizes) if size <= seq_len]
        if not self.rows:
            raise UserError(f"no example fits into {seq_len} tokens, the shortest has "
                            f"{min(sizes, default=0)}: use a larger --seq_len")
        self.left_out = len(pairs) - len(self.rows)
        self.corpus = digest(self.rows)
        self.seq_len, self.seed, self.plain = seq_len, seed, plain
        self.rank, self.world_size, self.position = rank, world_size, 0

    def next_batch(self, sequences: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets, (n / world_size, T) int64: IGNORE on prompt and padding."""
        plain = sequences // 4 if self.plain else 0
        mine = rank_share(self.position, sequences - plain, self.rank, self.world_size)
        self.position += sequences - plain
        tokens, targets = zip(*(self._row(position) for position in mine))
        batch = torch.stack(tokens), torch.stack(targets)  # (n, T) each
        if not plain:
            return batch
        tokens, targets = self.plain.next_batch(plain)
        return torch.cat([batch[0], tokens]), torch.cat([batch[1], targets])

    def _row(self, position: int) -> tuple[Tensor, Tensor]:
        prompt, answer = random.Random(f"{self.seed} {position}").choice(self.rows)
        padding = self.seq_len + 1 - len(prompt) - len(answer)
        tokens = prompt + answer + [answer[-1]] * padding
        targets = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE] * padding
        return torch.tensor(tokens[:-1]), torch.tensor(targets)  # (T,) each

    def state_dict(self) -> dict:
        """Where the loader stands, and what this number counts."""
        return {"position": self.position, "seed": self.seed, "seq_len": self.seq_len,
                "examples": len(self.rows), "corpus": self.corpus,
                "plain": self.plain and self.plain.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there. Raises UserError when the examples or their length are others."""
        check_same(state, self.state_dict())
        self.position = state["position"]
        if self.plain:
            self.plain.load_state_dict(state["plain"])


def eval_batches(file: TokenFile, seq_len: int, batch: int,
                 limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `limit` sequences of a file, `batch` at a time: always the same ones, (n, T) each."""
    rows = [file.window(i, seq_len) for i in range(min(limit, file.windows(seq_len)))]
    for start in range(0, len(rows), batch):
        yield split_batch(rows[start : start + batch])


def opening(tokens: list[int], tokenizer, length: int = 12) -> list[int]:
    """The beginning of the first document that begins in `tokens`; of a dialogue, the question."""
    start = tokens.index(tokenizer.bos_id) if tokenizer.bos_id in tokens else 0
    head, assistant = tokens[start : start + 64], tokenizer.specials.get(ASSISTANT)
    return head[: head.index(assistant) + 1] if assistant in head else head[:length]
