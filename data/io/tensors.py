"""safetensors files that know their checksums, read block by block; FP8 as DeepSeek publishes it."""

import hashlib
import json
import math
from pathlib import Path
from typing import BinaryIO, Iterator

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.io.cli import UserError

BLOCK_BYTES = 32_000_000  # of a file that are in memory at a time
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
          "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16",
          "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}  # the format's names -> torch's
FP8 = torch.float8_e4m3fn
OFFSETS = "DCP_SHARDING_INFO"  # the key of torch.distributed.checkpoint's HuggingFaceStorageReader
SCALE = "_scale_inv"  # behind the name of an FP8 weight: its scales, which multiply in spite of the name


def fingerprint(*parts: bytes | memoryview) -> str:
    """16 hexadecimal digits of a sha256 over all parts, one behind the other.

    >>> fingerprint(b"ab", b"c") == fingerprint(b"abc")
    True
    """
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """sha256 of a file, a megabyte in memory at a time."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:  # hashlib.file_digest wants Python 3.11
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor on the CPU, (bytes,) uint8: the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def checksum(name: str, tensor: Tensor) -> str:
    """The fingerprint of name, dtype, shape and every bit."""
    bits = bits_of(tensor.cpu().contiguous())
    return fingerprint(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), bits.numpy())


# ------------------------------------------------------------------------------------------- files


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict, one_of: str = "",
                  offsets: dict[str, list[int]] | None = None) -> None:
    """A safetensors file with the checksum of each tensor and of the notes (JSON) in its metadata.

    one_of: what all files of one set have in common; offsets: where each tensor begins in the whole one of
    which it is a shard, noted as torch.distributed.checkpoint reads it.
    """
    own, memory = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in memory:  # safetensors wants no two names for one memory
            tensor = tensor.clone()
        memory.add(tensor.data_ptr())
        own[name] = tensor
    sums = {name: checksum(name, tensor) for name, tensor in own.items()}
    metadata = {"notes": json.dumps(notes), "set": one_of}
    if offsets is not None:
        metadata[OFFSETS] = json.dumps({name: {"saved_offsets": offsets[name]} for name in own})
    sums["notes"] = fingerprint(*(text.encode() for text in metadata.values()))
    metadata = {"format": "pt", **metadata, "checksums": json.dumps(sums)}
    save_file(own, path, metadata=metadata)
    with open(path, "rb+") as file:  # safetensors writes metadata in any order: the same run, the same file
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = metadata
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


class TensorFile:
    """A safetensors file, ours or another's: `notes`, and tensors that are checked as they are read.

    Another's has no checksums: `sums` is None, and its tensors are taken as they are. Tensors are
    read exactly and block by block. A mapped file would be simpler to read and costs more: the
    system reads ahead of what a single expert wants, and maps what may be larger than the memory.
    Raises UserError for a file that is damaged.
    """

    def __init__(self, path: str | Path, is_ours: bool = False):
        self.path = Path(path)
        try:
            self.file = open(path, "rb", buffering=0)
            self.start, self.entries, metadata = _read_header(self.file)
            self.sums = json.loads(metadata["checksums"]) if is_ours or "checksums" in metadata else None
            told = [metadata[key] for key in ("notes", "set", OFFSETS) if key in metadata]
            self.notes, self.one_of = json.loads(metadata.get("notes", "{}")), metadata.get("set", "")
            self.offsets = json.loads(metadata.get(OFFSETS, "{}"))
            is_whole = not self.sums or self.sums["notes"] == fingerprint(*(text.encode() for text in told))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__} {error}): "
                            "the file is damaged or foreign") from None
        if not is_whole:
            raise UserError(f"{path}: its notes are damaged (checksum)")

    def keys(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        return self.entries[name]["shape"]

    def begin(self, name: str) -> list[int]:
        """Where it begins in the whole tensor of which it is a shard (see `write_tensors`)."""
        return self.offsets[name]["saved_offsets"]

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""
        return getattr(torch, DTYPES[self.entries[name]["dtype"]])

    def nbytes(self, name: str) -> int:
        """Its size in the file."""
        begin, end = self.entries[name]["data_offsets"]
        return end - begin

    def place(self, name: str) -> int:
        """The byte of the file where it begins: tensors are best read in this order."""
        return self.start + self.entries[name]["data_offsets"][0]

    def read_into(self, name: str, out: Tensor, skip: int = 0) -> None:
        """Fill `out` (bytes,) uint8 with the bytes of a tensor from byte `skip` on, unchecked.

        Raises UserError when the disk does not give them.
        """
        begin, end = self.entries[name]["data_offsets"]
        wanted, left = f"{self.path}: {name} cannot be read", memoryview(out.numpy())
        if begin + skip + len(left) > end:
            raise UserError(f"{wanted}: {len(left)} bytes from {skip} on are asked for, it has {end - begin}")
        try:
            self.file.seek(self.start + begin + skip)
            while left:  # a system reads 2 GB at most at a time
                count = self.file.readinto(left)
                if not count:
                    raise OSError("the file has become shorter")
                left = left[count:]
        except (OSError, ValueError) as error:
            raise UserError(f"{wanted}: {error}") from None

    def blocks(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a tensor, a multiple of `multiple` at a time, and what they hold, until the next ones.

        Raises UserError, at the end, when the bits are not those that were written.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        rows, row_bytes = (shape[0], self.nbytes(name) // max(1, shape[0])) if shape else (1, self.nbytes(name))
        step = max(1, BLOCK_BYTES // max(1, multiple * row_bytes)) * multiple
        buffer = torch.empty(min(step, rows) * row_bytes, dtype=torch.uint8)
        hasher = hashlib.sha256(f"{name} {dtype} {tuple(shape)}".encode())
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            bits = buffer[: (end - begin) * row_bytes]
            self.read_into(name, bits, begin * row_bytes)
            if self.sums is not None:
                hasher.update(bits.numpy())
            yield slice(begin, end), bits.view(dtype).view(end - begin, *shape[1:])
        if self.sums is not None:
            self._check(name, hasher.hexdigest()[:16])

    def fill(self, name: str, out: Tensor) -> None:
        """Read a tensor into a contiguous one of its dtype and shape, without a buffer between.

        Raises UserError when the bits are not those that were written.
        """
        self.read_into(name, bits_of(out))
        if self.sums is not None:
            self._check(name, checksum(name, out))

    def get(self, name: str) -> Tensor:
        """A tensor. Raises UserError when its bits are not those that were written."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.fill(name, tensor)
        return tensor

    def _check(self, name: str, digest: str) -> None:
        if self.sums.get(name) != digest:
            raise UserError(f"{self.path}: {name} is damaged (checksum): take another copy of this file")


def _read_header(file: BinaryIO) -> tuple[int, dict[str, dict], dict[str, str]]:
    """Where the data begin, name -> dtype, shape and data_offsets, and the metadata.

    Raises ValueError, KeyError or TypeError when file and header do not fit together.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    entries = json.loads(file.read(length))
    metadata, end = entries.pop("__metadata__", {}), 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        itemsize = getattr(torch, DTYPES[entry["dtype"]]).itemsize
        if begin != end or stop - begin != math.prod(entry["shape"]) * itemsize or min([0, *entry["shape"]]) < 0:
            raise ValueError(f"{name} does not fit its place")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"tensors of {end} bytes in a file of {size}")
    return 8 + length, entries, metadata


# --------------------------------------------------------------------------------------------- FP8


def expand_e4m3(codes: Tensor) -> Tensor:
    """FP8 codes as bfloat16 numbers 2^-120 times theirs: sign, 4 bits of exponent and 3 of fraction
    move to where bfloat16 has its own, whose exponents are biased by 127 and not 7. Exact also for
    subnormal numbers, and four times as fast as torch's own cast.

    >>> expand_e4m3(torch.tensor([1.5, -448.0, 2**-9]).to(FP8)).float() * 2.0**120
    tensor([ 1.5000e+00, -4.4800e+02,  1.9531e-03])
    """
    wide = codes.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    return wide.bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000).view(torch.bfloat16)


def dequantise(codes: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """`out = codes * scales`, one scale for each `block` (V3 section 3.3, README_WEIGHTS.md).

    codes (M, K) float8_e4m3fn; scales (ceil(M/rows), ceil(K/columns)) float32, at a ragged edge of
    what there is; out (M, K) of any float dtype, rounded once from float32.
    """
    rows, columns = block
    lifted = scales * 2.0**120  # (., .), exact: loading has bounded the scales
    for i, row in enumerate(lifted):
        some = slice(i * rows, (i + 1) * rows)
        each = row.repeat_interleave(columns)[: codes.shape[1]]  # (K,)
        out[some].copy_(expand_e4m3(codes[some]) * each)


def check_codes(name: str, codes: Tensor) -> None:
    """Raises UserError for a NaN, the one code of E4M3 that is no number."""
    if codes.view(torch.int8).amax() == 0x7F or codes.view(torch.uint8).amax() == 0xFF:  # the fast way
        raise UserError(f"{name} holds NaN: the file is damaged")


def read_scales(files: dict[str, TensorFile], name: str, block: tuple[int, int]) -> Tensor:
    """The scales of an FP8 weight, (ceil(M/rows), ceil(K/columns)) float32.

    Raises UserError when there are none, they are of another shape, negative, NaN or too large for scales.
    """
    if name + SCALE not in files:
        raise UserError(f"{name} is FP8 and has no {name + SCALE}: a file of the checkpoint is missing")
    file, shape = files[name + SCALE], files[name].shape(name)
    wanted = [-(-length // size) for length, size in zip(shape, block)]
    if len(shape) != 2 or file.shape(name + SCALE) != wanted:
        raise UserError(f"{file.path}: {name + SCALE} has shape {file.shape(name + SCALE)}, wanted {wanted} for "
                        f"{shape} in blocks of {block[0]} x {block[1]}")
    scales = file.get(name + SCALE).float()
    if not ((scales >= 0) & (scales < 2.0**7)).all():  # 448 of them is the largest weight of its block
        raise UserError(f"{file.path}: {name + SCALE} holds NaN or numbers that are no scales: damaged")
    return scales
