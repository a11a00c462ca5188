"""Routed experts that stay on disk: of a model larger than the memory only those that tokens chose are read.

V3 has 671 billion weights, of which a token meets 37: in each layer 8 of 256 experts. The others
need not be in memory, if the reader is patient. What was read is kept in a cache of a size given, as
it lies in the file, and the expert that was not used for longest makes room.
"""

from collections import Counter, OrderedDict
from decimal import Decimal
from typing import Iterable

import torch
from torch import Tensor, nn

from data.io.cli import UserError
from data.io.portrait import si
from data.io.tensors import FP8, TensorFile, check_codes, dequantise, read_scales

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of an expert: (F, C), (F, C), (C, F), one size in all
STACKS = {"gate_up_proj": (0, 1), "down_proj": (2,)}  # of a layer: which of them, one below the other


class ExpertCache:
    """Experts of a checkpoint, those used last in memory: as many as fit into `size` bytes.

    Its memory is one block, taken once: buffers that come and go would be kept by the C library.
    """

    def __init__(self, size: int):
        self.size = size
        self.place: OrderedDict[tuple[str, int], int] = OrderedDict()  # expert -> slot, the last used one last
        self.scales: dict[int, list[Tensor]] = {}  # slot -> those of its matrices, of FP8
        self.asked, self.missed = Counter(), Counter()  # (prefix of a layer, expert) -> times
        self.bytes_read = 0

    def attach(self, layers: Iterable[tuple[str, nn.Module]], files: dict[str, TensorFile],
               block: tuple[int, int] | None, dtype: torch.dtype, device) -> dict[str, TensorFile]:
        """Let the `experts` of MoE layers, (name, layer) each, take their weights from here.

        block: of FP8 scales; dtype: of what is dequantised. Returns the files of all other tensors.
        Raises UserError when experts are missing or of other sizes, or the cache is smaller than one.
        """
        self.files, self.block, self.device = files, block, device
        self.prefixes = [f"{name}.experts." for name, _ in layers]
        stacks = layers[0][1].experts
        self.E, width, C = stacks.gate_up_proj.shape
        self.shapes = [(width // 2, C), (width // 2, C), (C, width // 2)]
        self.kind = self._check()
        self.part = C * width // 2 * self.kind.itemsize  # bytes of one matrix
        count = min(self.size // (3 * self.part), self.E * len(self.prefixes))
        if count < 1:
            raise UserError(f"expert_cache: got {si(self.size)}B, wanted at least {si(3 * self.part)}B, the size of "
                            "one expert")
        try:  # the system gives pages once they are used
            self.slots = torch.empty(count, 3 * self.part, dtype=torch.uint8)
        except RuntimeError:
            raise UserError(f"expert_cache: this machine does not give {si(count * 3 * self.part)}B: a smaller "
                            "one") from None
        self.free = list(range(count))
        self.buffers = {stack: torch.empty(getattr(stacks, stack).shape[1:], dtype=dtype) for stack in STACKS}
        for prefix, (_, layer) in zip(self.prefixes, layers):
            for stack in STACKS:
                delattr(layer.experts, stack)
                setattr(layer.experts, stack, OnDisk(self, prefix, stack))
        return {name: file for name, file in files.items() if ".mlp.experts." not in name}

    def _check(self) -> torch.dtype:
        """The dtype of all experts in the files."""
        kind = None
        for prefix in self.prefixes:
            for name, shape in ((f"{prefix}{i}.{matrix}.weight", shape) for i in range(self.E)
                                for matrix, shape in zip(MATRICES, self.shapes)):
                if name not in self.files:
                    raise UserError(f"the expert {name} is missing: a file of the checkpoint is not there")
                file = self.files[name]
                kind = kind or file.dtype(name)
                if tuple(file.shape(name)) != shape or file.dtype(name) != kind:
                    raise UserError(f"{file.path}: {name} is {file.dtype(name)} {file.shape(name)}, wanted {kind} "
                                    f"{list(shape)}")
        if kind == FP8 and self.block is None:
            raise UserError("the experts are FP8, and config.json has no quantization_config for it")
        return kind

    def weight(self, prefix: str, expert: int, stack: str) -> Tensor:
        """(2F, C), gate rows first, or (C, F) of one expert: valid until the next one is asked for."""
        slot = self._slot((prefix, expert), is_counted=stack == "gate_up_proj")
        matrices, out = STACKS[stack], self.buffers[stack]
        bits = self.slots[slot, matrices[0] * self.part : (matrices[-1] + 1) * self.part]
        stored = bits.view(self.kind).view(out.shape)
        if self.kind == FP8:
            rows = len(out) // len(matrices)
            for i, matrix in enumerate(matrices):
                some = slice(i * rows, (i + 1) * rows)
                dequantise(stored[some], self.scales[slot][matrix], self.block, out[some])
            stored = out
        return stored.to(self.device)

    def _slot(self, key: tuple[str, int], is_counted: bool) -> int:
        """Where an expert lies, read first if it is not there."""
        self.asked[key] += is_counted
        if key in self.place:
            self.place.move_to_end(key)
            return self.place[key]
        self.missed[key] += is_counted
        slot = self.free.pop() if self.free else self.place.popitem(last=False)[1]
        try:
            self._read(key, slot)
        except UserError:
            self.free.append(slot)
            raise
        self.place[key] = slot
        return slot

    def _read(self, key: tuple[str, int], slot: int) -> None:
        """Fill a slot: one exact read for each matrix, and its scales."""
        prefix, expert = key
        self.scales[slot] = []
        for i, matrix in enumerate(MATRICES):
            name, bits = f"{prefix}{expert}.{matrix}.weight", self.slots[slot, i * self.part : (i + 1) * self.part]
            file, stored = self.files[name], bits.view(self.kind).view(self.shapes[i])
            file.fill(name, stored)
            self.bytes_read += self.part
            if self.kind == FP8:
                check_codes(f"{file.path}: {name}", stored)
                self.scales[slot].append(read_scales(self.files, name, self.block))
                self.bytes_read += self.scales[slot][-1].nbytes

    def report(self, tokens: int) -> str:
        """What a conversation of so many tokens asked of the experts, and found, layer by layer."""
        lines = [f"{'layer':>6}{'experts met':>14}{'found in cache':>17}"]
        for prefix in (*self.prefixes, ""):
            asked, missed = ({key: n for key, n in counter.items() if key[0].startswith(prefix) and n}
                             for counter in (self.asked, self.missed))
            share = 1 - sum(missed.values()) / max(1, sum(asked.values()))
            layer, of = (prefix.split(".")[2], self.E) if prefix else ("all", self.E * len(self.prefixes))
            lines.append(f"{layer:>6}{f'{len(asked)} of {of}':>14}{share:>17.0%}")
        each = si(self.bytes_read / max(1, tokens))
        lines.append(f"{si(self.bytes_read)}B read, {each}B for each of {tokens} tokens; the cache has room for "
                     f"{len(self.slots)} experts of {si(3 * self.part)}B")
        return "\n".join(lines)

    def counts(self) -> Tensor:
        """How often each expert was asked for, (MoE layers, E) int64."""
        return torch.tensor([[self.asked[prefix, i] for i in range(self.E)] for prefix in self.prefixes])


class OnDisk:
    """What kernels.expert_ffn takes for the stacked weights of a layer: `weights[expert]` is read if it has to be."""

    def __init__(self, cache: ExpertCache, prefix: str, stack: str):
        self.cache, self.prefix, self.stack = cache, prefix, stack

    def __getitem__(self, expert: int) -> Tensor:
        return self.cache.weight(self.prefix, expert, self.stack)


def parse_size(text: str) -> int:
    """Bytes from a text such as 8GB. Raises UserError.

    >>> parse_size("8GB"), parse_size("0.5 MB"), parse_size("700")
    (8000000000, 500000, 700)
    """
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :]
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    if unit not in units or not number.strip().replace(".", "", 1).isdecimal():
        raise UserError(f"expert_cache: got {text!r}, wanted a size such as 8GB")
    return int(Decimal(number.strip()) * units[unit])
