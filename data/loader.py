"""Token files, and the loader that cuts them into sequences: exact about epochs, ranks and resuming."""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from data import UserError, whole_file

HEADER_BYTES = 1024
MAGIC = "plainseek tokens 1"


def write_tokens(path: Path, chunks: Iterable[np.ndarray], vocab_size: int, notes: dict) -> None:
    """Write ids as uint16 (uint32 above 65,536 ids) behind a JSON header with `notes`, whole or not at all.

    Whoever yields the chunks may still fill in `notes`. Raises OSError.
    """
    dtype, count = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32"), 0
    with whole_file(path) as file:
        file.write(b" " * HEADER_BYTES)
        for chunk in chunks:
            file.write(np.asarray(chunk, dtype).tobytes())
            count += len(chunk)
        header = {"magic": MAGIC, "count": count, "dtype": dtype.name, "vocab_size": vocab_size} | notes
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))


class TokenFile:
    """A file of token ids, mapped and not read. `header` names its tokenizer and corpus, `tokens` are the ids.

    Raises UserError for a file that is foreign or shorter than its header says.
    """

    def __init__(self, path: str | Path):
        try:
            with open(path, "rb") as file:
                self.header = json.loads(file.read(HEADER_BYTES))
            if self.header["magic"] != MAGIC:
                raise ValueError("magic")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a token file of this program ({error}): delete it") from None
        count, dtype = self.header["count"], np.dtype(self.header["dtype"])
        if Path(path).stat().st_size != HEADER_BYTES + count * dtype.itemsize:
            raise UserError(f"{path}: its header says {count:,} tokens, its size another number: delete it")
        self.tokens = np.memmap(path, dtype, "r", HEADER_BYTES) if count else np.empty(0, dtype)  # (count,)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, seq_len: int) -> int:
        """How many sequences fit: each reads one token more, the last target, which the next one begins with."""
        return max(0, (len(self) - 1) // seq_len)

    def window(self, index: int, seq_len: int) -> Tensor:
        """Sequence number `index` with its last target: (T + 1,) int64."""
        start = index * seq_len
        return torch.from_numpy(self.tokens[start : start + seq_len + 1].astype(np.int64))


def split_batch(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and the targets one place later, (n, T) each, of n windows (T + 1,)."""
    block = torch.stack(rows)  # (n, T + 1)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class Loader:
    """Sequences of all files, shuffled together anew in every epoch; a domain's share is its size.

    Order is a matter of seed and epoch alone and `position` counts the sequences drawn by all ranks, so the
    ranks' parts of one draw form the same set for any number of ranks, and a saved position continues exactly.
    """

    def __init__(self, files: dict[str, TokenFile], seq_len: int, *, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.files, self.seq_len, self.rank, self.world_size = list(files.values()), seq_len, rank, world_size
        self.starts = [0, *accumulate(file.windows(seq_len) for file in self.files)]  # of each file, and the end
        self.windows, self.seed, self.position = self.starts[-1], seed, 0
        self._shuffled = -1, np.empty(0, np.int64)  # an epoch and its order
        if not self.windows:
            raise UserError(f"the corpus has {sum(map(len, self.files)):,} tokens in its training part, wanted more "
                            f"than one sequence of {seq_len}: use more text or a smaller --seq_len")

    def _window(self, position: int) -> Tensor:
        epoch, place = divmod(position, self.windows)
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        index = int(self._shuffled[1][place])
        file = bisect_right(self.starts, index) - 1
        return self.files[file].window(index - self.starts[file], self.seq_len)

    def next_batch(self, global_sequences: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the next sequences: tokens and targets, (n / world_size, T) int64."""
        if global_sequences < 1 or global_sequences % self.world_size:
            raise UserError(f"{global_sequences} sequences do not divide among {self.world_size} processes")
        start, self.position = self.position, self.position + global_sequences
        mine = range(start + self.rank, self.position, self.world_size)
        return split_batch([self._window(position) for position in mine])

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, and what this number counts."""
        return {"position": self.position, "seed": self.seed, "seq_len": self.seq_len, "windows": self.windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there. Raises UserError when the corpus or its cutting is another one."""
        mine = self.state_dict()
        for key in ("seed", "seq_len", "windows"):
            if state[key] != mine[key]:
                raise UserError(f"cannot continue: the run was saved with {key} {state[key]}, now it is {mine[key]}")
        self.position = state["position"]


def eval_batches(file: TokenFile, seq_len: int, batch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `limit` sequences of a file, `batch` at a time: always the same ones, (n, T) each."""
    rows = [file.window(i, seq_len) for i in range(min(limit, file.windows(seq_len)))]
    for start in range(0, len(rows), batch):
        yield split_batch(rows[start : start + batch])
