"""A byte-level BPE run by tiktoken, its trainer, and readers of other tokenizers.

    python -m data.text.tokenizer my/texts 2048 my/tokenizer     train one on your own text
    python train.py --tokenizer my/tokenizer ...                 and use it
"""

import base64
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

import regex
import tiktoken

from data.io.checkpoint import written_aside
from data.io.cli import UserError, nearest, run_main
from data.text.files import folder_documents

# A word with the sign or space before it, one digit, signs, line breaks, spaces: every character is
# in one.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
SPECIALS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<answer>", "</answer>", *(f"<｜reserved▁{i}｜>" for i in range(7)),
)
RANK_FILE = Path(__file__).with_name("plainseek.tiktoken")  # train_bpe's, on "local", code twice

# DeepSeek's three splits (digits, CJK runs, words) as one alternation: each class has to treat what
# the earlier splits cut out as a border, or ids differ.
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
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")


class Tokenizer:
    """Text to ids and back: rank = id = order of merging; the ids of `specials` come after.

    (In DeepSeek's files also before.) `source` is the tokenizer.json that it was read from, if any.

    >>> tokenizer = load_tokenizer("plainseek:1024")
    >>> tokenizer.decode(tokenizer.encode("12+30"))
    '12+30'
    >>> len(tokenizer.encode("12+30")), len(tokenizer.encode("<think>")) > 1
    (5, True)
    """

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int],
                 source: str = ""):
        self.name, self.ranks, self.pattern = name, ranks, pattern
        self.specials, self.source = specials, source
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self.vocab_size = self.encoding.n_vocab
        self.bos_id, self.eos_id = specials[SPECIALS[0]], specials[SPECIALS[1]]
        self._known = {*ranks.values(), *specials.values()}

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
        """Bytes of the ids: a character may end in a later id.

        Ids without a token (of a padded vocabulary) are left out.
        """
        return self.encoding.decode_bytes([i for i in ids if i in self._known])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; broken characters become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them.

        It gives equal ids. Raises UserError when they cannot be written.
        """
        pad = SPECIALS[2] if SPECIALS[2] in self.specials else SPECIALS[1]
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False, "bos_token": SPECIALS[0],
                  "eos_token": SPECIALS[1], "pad_token": pad, "chat_template": CHAT_TEMPLATE}
        text = self.source or json.dumps(self._to_json(), ensure_ascii=False)
        with written_aside(Path(directory) / "tokenizer.json") as aside:
            aside.write_bytes(text.encode())  # bytes: line ends stay as they are
        with written_aside(Path(directory) / "tokenizer_config.json") as aside:
            aside.write_bytes(json.dumps(config, ensure_ascii=False, indent=1).encode())

    def _to_json(self) -> dict:
        ranks, letters = self.ranks, byte_letters()
        spelled = {rank: "".join(letters[byte] for byte in token) for token, rank in ranks.items()}
        merges = []  # tiktoken joins any two parts that make a known token: each split is a merge
        for token in sorted(ranks, key=ranks.get):
            for i in range(1, len(token)):
                left, right = ranks.get(token[:i]), ranks.get(token[i:])
                if left is not None and right is not None:
                    merges.append([spelled[left], spelled[right]])
        added = [{"id": i, "content": token, "special": True, "single_word": False,
                  "lstrip": False, "rstrip": False, "normalized": False}
                 for token, i in self.specials.items()]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        vocab = {text: rank for rank, text in spelled.items()}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
                "post_processor": None, "decoder": level,
                "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}}


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name or place.

    `plainseek` (4096 ids) or `plainseek:1024` (the first merges of the same file, 16 specials at
    the end), `gpt2`, `cl100k` (tiktoken downloads these once), or a directory or file with a
    tokenizer.json. Raises UserError when there is none or it is of a kind that is not known.
    """
    name, _, size = str(source).partition(":")
    path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    if path.exists():
        try:
            return _from_json(path.read_bytes().decode("utf-8"), str(source))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"tokenizer {path}: cannot be used ({error!r}), "
                            "wanted a byte-level BPE") from None
    if name == "plainseek":
        return _plainseek(size or "4096")
    if str(source) in ("gpt2", "cl100k"):
        return _from_tiktoken(name)
    known = ("plainseek", "plainseek:SIZE", "gpt2", "cl100k")
    raise UserError(f"tokenizer: got {str(source)!r}, wanted {', '.join(known)} "
                    f"or a place with a tokenizer.json{nearest(name, known)}")


def with_specials(name: str, ranks: dict[bytes, int], pattern: str, first: int,
                  more: dict[str, int]) -> Tokenizer:
    """A tokenizer whose 16 reserved tokens have the ids from `first` on."""
    specials = more | {token: first + i for i, token in enumerate(SPECIALS)}
    return Tokenizer(name, ranks, pattern, specials)


def _plainseek(size: str) -> Tokenizer:
    least = 256 + len(SPECIALS)
    if not size.isdecimal() or not least <= int(size) <= 4096:
        raise UserError(f"tokenizer: plainseek:{size}, wanted a size from {least} to 4096")
    count = int(size) - len(SPECIALS)
    lines = RANK_FILE.read_bytes().splitlines()[:count]  # "token in base64, rank", as tiktoken's
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}
    return with_specials(f"plainseek:{size}", ranks, PATTERN, count, {})


def _from_tiktoken(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("cl100k_base" if name == "cl100k" else name)
    except Exception as error:  # tiktoken lets errors of its own and of its http library through
        raise UserError(f"tokenizer {name}: tiktoken could not download it "
                        f"({type(error).__name__}); offline there is --tokenizer plainseek") from None
    return with_specials(name, encoding._mergeable_ranks, encoding._pat_str, encoding.n_vocab,
                         encoding._special_tokens)


def _from_json(text: str, name: str) -> Tokenizer:
    values = json.loads(text)
    steps = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if len(patterns) == 3 and patterns[0] == r"\p{N}{1,3}":
        pattern = DEEPSEEK_PATTERN
    elif len(patterns) == 1:
        pattern = patterns[0]
    else:
        raise ValueError(f"its {len(patterns)} splitting patterns are not known here")
    vocab = values["model"]["vocab"]
    merges = values["model"]["merges"]  # pairs, or both in one text with a space between
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    order = [vocab[left + right] for left, right in pairs]
    if order != sorted(order):
        raise ValueError("its ids are not in the order of its merges")
    specials = {token["content"]: token["id"] for token in values["added_tokens"]}
    if missing := [token for token in SPECIALS[:2] if token not in specials]:
        raise ValueError(f"it lacks {missing[0]}")
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes(map(bytes_of.get, token)): rank
             for token, rank in vocab.items() if token not in specials}
    return Tokenizer(name, ranks, pattern, specials, text)


def byte_letters() -> dict[int, str]:
    """The printable letter of each byte in Hugging Face's files: itself, or one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def train_bpe(texts: Iterable[str], size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Byte-pair encoding: from 256 bytes on, join the most frequent pair until `size` ranks.

    Distinct words are counted once. A heap holds (-count, pair), an index the words of each pair,
    so a merge touches only the words that contain it; an entry whose count has changed since is put
    back.

    >>> sorted(train_bpe(["low low lower"], 258), key=len)[-1]
    b'low'
    """
    counts = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in counts]
    weights, pair_counts, places = list(counts.values()), Counter(), defaultdict(set)
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
            for before in zip(words[i], words[i][1:]):
                pair_counts[before] -= weights[i]
            words[i] = join(words[i], pair)
            for after in zip(words[i], words[i][1:]):
                pair_counts[after] += weights[i]
                places[after].add(i)
                changed.add(after)
        for after in changed:
            heapq.heappush(heap, (-pair_counts[after], after))
    return ranks


def join(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The word with every occurrence of the pair, from left to right, as one part."""
    out, i = [], 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        out.append(pair[0] + pair[1] if is_pair else word[i])
        i += 2 if is_pair else 1
    return out


def main(argv: list[str]) -> None:
    """Train a tokenizer on a text file or folder and save it."""
    least = 256 + len(SPECIALS)
    if len(argv) != 3 or not argv[1].isdecimal() or int(argv[1]) < least:
        raise UserError("wanted: python -m data.text.tokenizer TEXTS SIZE DIRECTORY, "
                        f"with SIZE at least {least}")
    texts = (text for _, text in folder_documents(Path(argv[0])))
    ranks = train_bpe(texts, int(argv[1]) - len(SPECIALS))
    with_specials(argv[2], ranks, PATTERN, len(ranks), {}).save(argv[2])
    print(f"{len(ranks)} ranks and {len(SPECIALS)} specials in {argv[2]}")


if __name__ == "__main__":
    run_main(main)
