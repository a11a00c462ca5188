"""A byte-level BPE run by tiktoken, and readers of other tokenizers; bpe.py trains one.

    python -m data.text.tokenizer my/texts 2048 my/tokenizer     train one on your own text
    python train.py --tokenizer my/tokenizer ...                 and use it
"""

import base64
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Iterable

import tiktoken

from data.io.checkpoint import BESIDE, fingerprint, note_of, written_aside
from data.io.cli import UserError, nearest, run_main
from data.tasks.task import ASSISTANT, BOS, EOS, TAGS, USER
from data.text.bpe import PATTERN, teller, train_bpe
from data.text.files import folder_documents

SPECIALS = (BOS, EOS, "<｜▁pad▁｜>", USER, ASSISTANT, *TAGS,
            *(f"<｜reserved▁{i}｜>" for i in range(7)))
SHOWN = {USER, ASSISTANT, *TAGS}  # of them what a reader sees: not special to Hugging Face
HIGHEST_ID = (1 << 24) - 1  # a higher one is damage, and would want an embedding of its size
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

    (In DeepSeek's files also before.) `source` holds the files that it was read from, if any: names
    and bytes of tokenizer.json and of what lay beside it.

    >>> tokenizer = load_tokenizer("plainseek:1024")
    >>> tokenizer.decode(tokenizer.encode("12+30"))
    '12+30'
    >>> len(tokenizer.encode("12+30")), len(tokenizer.encode("<think>")) > 1
    (5, True)
    """

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int],
                 source: dict[str, bytes] | None = None):
        self.name, self.ranks, self.pattern = name, ranks, pattern
        self.specials, self.source = specials, source or {}
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

    def files(self, context: int | None = None) -> dict[str, bytes]:
        """Names and contents of what transformers.AutoTokenizer and generate read; it gives equal ids.

        `context` is the model's longest sequence. What the tokenizer was read from goes on unchanged.
        """
        pad = SPECIALS[2] if SPECIALS[2] in self.specials else EOS
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
                  "clean_up_tokenization_spaces": False, "bos_token": BOS, "eos_token": EOS,
                  "pad_token": pad, "chat_template": CHAT_TEMPLATE}
        if context:
            config["model_max_length"] = context
        generation = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id,
                      "pad_token_id": self.specials[pad], "do_sample": True, "temperature": 0.8}
        made = {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1),
                "generation_config.json": json.dumps(generation, indent=1)}
        if not self.source:
            made["tokenizer.json"] = json.dumps(self._to_json(), ensure_ascii=False)
        return {name: text.encode() for name, text in made.items()} | self.source

    def save(self, directory: str | Path, context: int | None = None) -> None:
        """Write `files`: all are complete on disk before the first one takes its place.

        Files of another tokenizer's that lay there go. Raises UserError when it cannot write.
        """
        files = self.files(context)
        with ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(written_aside(Path(directory) / name)).write_bytes(content)
        for name in set(BESIDE) - set(files):
            (Path(directory) / name).unlink(missing_ok=True)

    def _to_json(self) -> dict:
        ranks, letters = self.ranks, byte_letters()
        spelled = {rank: "".join(letters[byte] for byte in token) for token, rank in ranks.items()}
        merges = []  # tiktoken joins any two parts that make a known token: each split is a merge
        for token in sorted(ranks, key=ranks.get):
            for i in range(1, len(token)):
                left, right = ranks.get(token[:i]), ranks.get(token[i:])
                if left is not None and right is not None:
                    merges.append([spelled[left], spelled[right]])
        added = [{"id": i, "content": token, "special": token not in SHOWN, "single_word": False,
                  "lstrip": False, "rstrip": False, "normalized": False}
                 for token, i in self.specials.items()]
        begin, first, second = ({kind: {"id": name, "type_id": 0}} for kind, name in
                                (("SpecialToken", BOS), ("Sequence", "A"), ("Sequence", "B")))
        template = {"type": "TemplateProcessing", "single": [begin, first],
                    "pair": [begin, first, begin, second],
                    "special_tokens": {BOS: {"id": BOS, "ids": [self.bos_id], "tokens": [BOS]}}}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        vocab = {text: rank for rank, text in spelled.items()}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
                "post_processor": template, "decoder": level,
                "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}}


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name or place.

    `plainseek` (4096 ids) or `plainseek:1024` (the first merges of the same file, 16 specials at
    the end), `gpt2`, `cl100k` (tiktoken downloads these once), or a directory or file with a
    tokenizer.json. Raises UserError when there is none or it is of a kind that is not known.
    """
    name, _, size = str(source).partition(":")
    path = Path(source)
    try:
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists():
            beside = [path.with_name(name) for name in BESIDE] if path.name == "tokenizer.json" else []
            files = {"tokenizer.json": path.read_bytes()}
            noted = note_of(path.parent, "tokenizer") if beside else None
            if noted not in (None, fingerprint(files["tokenizer.json"])):
                raise UserError(f"{path}: is not the tokenizer that the weights beside it were saved with")
            files |= {file.name: file.read_bytes() for file in beside if file.exists()}
            return _from_json(files, str(source))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"tokenizer {path}: cannot be used ({repr(error)[:200]}), "
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
    if not size.isdecimal() or len(size) > 4 or not least <= int(size) <= 4096:
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


def _from_json(files: dict[str, bytes], name: str) -> Tokenizer:
    values, *others = (json.loads(text.decode("utf-8")) for file, text in files.items()
                       if file.endswith(".json"))
    if not all(isinstance(value, dict) for value in others):
        raise ValueError("what lies beside it is no JSON object")
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
    check_ids(ranks, specials, set(order))
    return Tokenizer(name, ranks, pattern, specials, files)


def check_ids(ranks: dict[bytes, int], specials: dict[str, int], merged: set[int]) -> None:
    """Raises ValueError for what tiktoken would end the program for, or what damage has left."""
    seen = set()
    for token, i in (ranks | specials).items():
        if type(i) is not int or not 0 <= i <= HIGHEST_ID or not token:
            raise ValueError(f"the id of {token!r} is {i!r}, wanted 0 to {HIGHEST_ID}")
        if i in seen:
            raise ValueError(f"two tokens have the id {i}")
        if len(token) > 1 and token not in specials and i not in merged:
            raise ValueError(f"no merge makes {token!r}")
        seen.add(i)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"it lacks the byte {missing[0]}")


def check_belongs(tokenizer: Tokenizer, sizes) -> None:
    """Raises UserError when a tokenizer that lies beside a model is another model's.

    sizes: the model's config, with vocab_size (which may be padded), bos_token_id and eos_token_id,
    None where its config.json has none.
    """
    name = f"tokenizer {tokenizer.name}: it belongs to another model:"
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(f"{name} got {tokenizer.vocab_size} ids, wanted at most vocab_size {sizes.vocab_size}")
    bos, eos = sizes.bos_token_id, sizes.eos_token_id
    pairs = (("begin", tokenizer.bos_id, "bos", bos), ("end", tokenizer.eos_id, "eos", eos))
    for mark, ours, key, theirs in pairs:
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise UserError(f"{name} its {mark} token has the id {ours}, wanted {key}_token_id {theirs}")


def byte_letters() -> dict[int, str]:
    """The printable letter of each byte in Hugging Face's files: itself, or one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def main(argv: list[str]) -> None:
    """Train a tokenizer on a text file or folder and save it."""
    least = 256 + len(SPECIALS)
    if len(argv) != 3 or not argv[1].isdecimal() or len(argv[1]) > 9 or int(argv[1]) < least:
        raise UserError("wanted: python -m data.text.tokenizer TEXTS SIZE DIRECTORY, "
                        f"with SIZE at least {least}")
    texts = (text for _, text in folder_documents(Path(argv[0])))
    ranks = train_bpe(texts, int(argv[1]) - len(SPECIALS), tell=teller(print))
    with_specials(argv[2], ranks, PATTERN, len(ranks), {}).save(argv[2])
    print(f"{len(ranks)} ranks and {len(SPECIALS)} specials in {argv[2]}")


if __name__ == "__main__":
    run_main(main)
