"""A byte-level BPE run by tiktoken, its trainer, and readers of other tokenizers.

    python -m data.tokenizer my/texts 2048 my/tokenizer      train one on your own text
    python train.py --tokenizer my/tokenizer ...             and use it
"""

import base64
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from typing import Iterable

import regex
import tiktoken

from data import UserError, nearest

# A word with the sign or space before it, one digit, signs, line breaks, spaces: every character is in one.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>",
            "<think>", "</think>", "<answer>", "</answer>", *(f"<｜reserved▁{i}｜>" for i in range(7)))
RANK_FILE = Path(__file__).with_name("plainseek.tiktoken")

# DeepSeek's three splits (digits, CJK runs, words) as one alternation: each class has to treat what the
# earlier splits cut out as a border, or ids differ.
CJK = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
DEEPSEEK_PATTERN = "|".join((
    r"\p{N}{1,3}",
    rf"[{CJK}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{CJK}]?[\p{{L}}\p{{M}}&&[^{CJK}]]+",
    rf" ?[\p{{P}}\p{{S}}&&[^{CJK}]]+[\r\n]*",
    r"\s*[\r\n]+",
    rf"\s+(?![^\s\p{{N}}{CJK}])",
    r"\s+",
    rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]+(?![\p{{L}}\p{{M}}&&[^{CJK}]])",
))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")


class Tokenizer:
    """Text to ids and back. Ids below the specials are ranks of the BPE: rank = id = order of merging.

    >>> tokenizer = load_tokenizer("plainseek:1024")
    >>> tokenizer.decode(tokenizer.encode("12+30"))
    '12+30'
    >>> len(tokenizer.encode("12+30")), len(tokenizer.encode("<think>")) > 1
    (5, True)
    """

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int], source: str = ""):
        self.name, self.ranks, self.pattern, self.specials, self.source = name, ranks, pattern, specials, source
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size = self.encoding.n_vocab
        self.bos_id, self.eos_id = (specials.get(name, specials.get("<|endoftext|>")) for name in SPECIALS[:2])

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: text that spells a special token does not become one."""
        return self.encoding.encode_ordinary(text)

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that we wrote ourselves, special tokens recognised."""
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: list[str], trusted: bool = False) -> list[list[int]]:
        """Many texts at once, on several threads."""
        allowed = "all" if trusted else set()
        return self.encoding.encode_batch(texts, allowed_special=allowed, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; a character may end in a later id. Ids without a token are left out."""
        known = self._known
        return self.encoding.decode_bytes([i for i in ids if i in known])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; broken characters become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _known(self) -> set[int]:
        return set(self.ranks.values()) | set(self.specials.values())

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer loads with equal ids."""
        by_id = {i: token for token, i in self.specials.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  "bos_token": by_id[self.bos_id], "eos_token": by_id[self.eos_id],
                  "pad_token": by_id[self.specials.get(SPECIALS[2], self.eos_id)], "chat_template": CHAT_TEMPLATE}
        _write(Path(directory) / "tokenizer.json", self.source or json.dumps(self._to_json(), ensure_ascii=False))
        _write(Path(directory) / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1))

    def _to_json(self) -> dict:
        spell = _byte_letters()
        vocab = {"".join(spell[b] for b in token): rank for token, rank in self.ranks.items()}
        pairs = (_last_merge(token, self.ranks) for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1)
        merges = [["".join(spell[b] for b in part) for part in pair] for pair in pairs]
        added = [{"id": i, "content": token, "special": True, "single_word": False, "lstrip": False,
                  "rstrip": False, "normalized": False} for token, i in self.specials.items()]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]}, "post_processor": None,
                "decoder": letters, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name or place.

    `plainseek` (4096 ids) or `plainseek:1024` (the first merges of the same file, 16 specials at the end),
    `gpt2`, `cl100k` (tiktoken downloads these once), or a directory or file with a tokenizer.json.
    Raises UserError when there is none or it is of a kind that is not known.
    """
    name, _, size = str(source).partition(":")
    if name == "plainseek":
        return _plainseek(size or "4096")
    if name in ("gpt2", "cl100k"):
        return _from_tiktoken(name)
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        known = ("plainseek", "gpt2", "cl100k")
        raise UserError(f"tokenizer: got {str(source)!r}, wanted {', '.join(known)} or a place with a tokenizer.json"
                        f"{nearest(name, known)}")
    try:
        return _from_json(path.read_text(encoding="utf-8"), str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer {path}: cannot be used ({error!r}), wanted a byte-level BPE") from None


def _plainseek(size: str) -> Tokenizer:
    if not size.isdigit() or not 256 + len(SPECIALS) <= int(size) <= 4096:
        raise UserError(f"tokenizer: plainseek:{size}, wanted a size from {256 + len(SPECIALS)} to 4096")
    count = int(size) - len(SPECIALS)
    lines = RANK_FILE.read_bytes().splitlines()[:count]  # "token in base64, rank", as tiktoken's own files
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}
    return Tokenizer(f"plainseek:{size}", ranks, PATTERN, {token: count + i for i, token in enumerate(SPECIALS)})


def _from_tiktoken(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("cl100k_base" if name == "cl100k" else name)
    except Exception as error:  # tiktoken lets errors of its own and of its http library through
        raise UserError(f"tokenizer {name}: tiktoken could not download it ({type(error).__name__}); "
                        "offline there is --tokenizer plainseek") from None
    specials = encoding._special_tokens | {t: encoding.n_vocab + i for i, t in enumerate(SPECIALS)}
    return Tokenizer(name, encoding._mergeable_ranks, encoding._pat_str, specials)


def _from_json(text: str, name: str) -> Tokenizer:
    values = json.loads(text)
    splits = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
    patterns = [split["pattern"]["Regex"] for split in splits if split["type"] == "Split"]
    if len(patterns) == 3 and patterns[0] == r"\p{N}{1,3}":
        pattern = DEEPSEEK_PATTERN
    elif len(patterns) == 1:
        pattern = patterns[0]
    else:
        raise ValueError(f"its {len(patterns)} splitting patterns are not known here")
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    specials = {token["content"]: token["id"] for token in values["added_tokens"]}
    ranks = {bytes(letters[letter] for letter in token): rank
             for token, rank in values["model"]["vocab"].items() if token not in specials}
    return Tokenizer(name, ranks, pattern, specials, text)


def _byte_letters() -> dict[int, str]:
    """The printable letter that Hugging Face's files use for each byte: itself, or one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that the BPE joined last to make this token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def train_bpe(texts: Iterable[str], size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Byte-pair encoding: from 256 bytes on, join the most frequent pair of neighbours until `size` ranks.

    Distinct words are counted once. A heap holds (-count, pair), an index the words of each pair, so a merge
    touches only the words that contain it; an entry whose count has changed since is put back.
    """
    counts = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]
    weights = list(counts.values())
    pair_counts, places = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += weights[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        changed = set()
        for i in places.pop(pair):
            _move_counts(pair_counts, words[i], -weights[i])
            words[i] = _join(words[i], pair)
            _move_counts(pair_counts, words[i], weights[i])
            for new in zip(words[i], words[i][1:]):
                places[new].add(i)
                changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-pair_counts[new], new))
    return ranks


def _move_counts(pair_counts: Counter, word: list[bytes], weight: int) -> None:
    for pair in zip(word, word[1:]):
        pair_counts[pair] += weight


def _join(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out, i = [], 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        out.append(pair[0] + pair[1] if is_pair else word[i])
        i += 2 if is_pair else 1
    return out


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def main(argv: list[str]) -> int:
    """Train a tokenizer on a text file or folder and save it."""
    from data.corpus import read_texts

    try:
        if len(argv) != 3 or not argv[1].isdigit() or int(argv[1]) < 256 + len(SPECIALS):
            raise UserError("wanted: python -m data.tokenizer TEXTS SIZE DIRECTORY, with SIZE at least 272")
        count = int(argv[1]) - len(SPECIALS)
        ranks = train_bpe(read_texts(Path(argv[0])), count)
        specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
        Tokenizer(argv[2], ranks, PATTERN, specials).save(argv[2])
        print(f"{len(ranks)} ranks and {len(SPECIALS)} specials in {argv[2]}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
