"""Tokenizers of other models: any byte-level BPE in tokenizer.json or tiktoken.model, and what ends its answers.

A tokenizer.json splits a text in steps, each of which cuts the pieces of the one before; the pieces
then are tiktoken's. Python files that lie beside a model are never run.
"""

import base64
import json
import unicodedata
from typing import Callable, NamedTuple

import regex

HIGHEST_ID = (1 << 24) - 1  # a higher one is damage, and would want an embedding of its size

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
DEEPSEEK_STEPS = (  # what a tokenizer.json of V3 and later has in place of it
    r"\p{N}{1,3}", f"[{CJK}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# of Moonlight and Kimi, which publish it as Python (tokenization_moonshot.py, tokenization_kimi.py)
HAN, MARKS = r"\p{Han}", r"\p{Lm}\p{Lo}\p{M}"
KIMI_PATTERN = "|".join((
    rf"[{HAN}]+",
    *(rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{MARKS}&&[^{HAN}]]{upper}[\p{{Ll}}{MARKS}&&[^{HAN}]]{lower}"
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for upper, lower in (("*", "+"), ("+", "*"))),
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))
EVERYTHING = r"(?s:.+)"  # for tiktoken, where steps have cut the text already


class Parts(NamedTuple):
    """What a Tokenizer is made of."""

    ranks: dict[bytes, int]
    pattern: str  # for tiktoken
    specials: dict[str, int]
    begin: str | None  # the special in front of a text; some have none
    end: str  # and behind it
    stop_ids: list[int]  # what ends an answer: the end, and what generation_config.json and config.json add
    split: Callable[[str], list[str]] | None = None  # steps before tiktoken
    steps: str = ""  # in words: what the pieces depend on


def read_parts(files: dict[str, bytes], of_model: dict, usual: tuple[str, str]) -> Parts:
    """The parts of the tokenizer in `files` (name -> bytes; the vocabulary and what lies beside it).

    of_model: config.json; usual: begin and end where no file names them. Raises ValueError, or what
    damaged files lead to, when it is no byte-level BPE that is known here.
    """
    beside = {name: json.loads(text.decode("utf-8")) for name, text in files.items() if name.endswith(".json")}
    if not all(isinstance(value, dict) for value in beside.values()):
        raise ValueError("what lies beside it is no JSON object")
    config = beside.get("tokenizer_config.json", {})
    if "tokenizer.json" in beside:
        parts = _read_json(beside["tokenizer.json"])
    else:
        parts = _read_tiktoken(files["tiktoken.model"], config)
    marks = [config, beside.get("special_tokens_map.json", {})]
    begin, end = (_named(key, marks, default, parts.specials)
                  for key, default in zip(("bos_token", "eos_token"), usual))
    ends = [parts.specials[end]] if end else []
    for values in (beside.get("generation_config.json", {}), of_model):
        ids = values.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not ends or not all(type(i) is int and 0 <= i <= HIGHEST_ID for i in ends):
        raise ValueError(f"it ends answers with {ends or 'nothing'}")
    if end is None:
        end = next((token for token, i in parts.specials.items() if i == ends[0]), None)
    if end is None:
        raise ValueError(f"no special token has the id {ends[0]}, which ends a text")
    return parts._replace(begin=begin, end=end, stop_ids=list(dict.fromkeys(ends)))


def _named(key: str, marks: list[dict], usual: str, specials: dict[str, int]) -> str | None:
    """A special token that one of the files names, or the usual one if it is there."""
    for values in marks:
        token = values.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if token not in specials:
                raise ValueError(f"its {key} {token!r} is no special token")
            return token
    return usual if usual in specials else None


def _read_json(values: dict) -> Parts:
    vocab = values["model"]["vocab"]
    merges = values["model"]["merges"]  # pairs, or both in one text with a space between
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    order = [vocab[left + right] for left, right in pairs]
    if order != sorted(order):
        raise ValueError("its ids are not in the order of its merges")
    for token in values["added_tokens"]:
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise ValueError(f"its {token['content']!r} takes spaces or words beside it along")
    specials = {token["content"]: token["id"] for token in values["added_tokens"]}
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes(map(bytes_of.get, token)): rank
             for token, rank in vocab.items() if token not in specials}
    check_ids(ranks, specials, set(order))
    steps, forms = _steps(values["pre_tokenizer"]), _forms(values.get("normalizer"))
    spelled = tuple(step.replace(r"\r", "\r").replace(r"\n", "\n") for step in steps)
    if not forms and spelled == DEEPSEEK_STEPS:
        return Parts(ranks, DEEPSEEK_PATTERN, specials, None, "", [])
    if not forms and len(steps) == 1 and covers(steps[0]):
        return Parts(ranks, steps[0], specials, None, "", [])
    return Parts(ranks, EVERYTHING, specials, None, "", [], splitter(steps, forms), json.dumps([steps, forms]))


def _steps(step: dict) -> list[str]:
    """The patterns that cut a text, one after the other. Raises ValueError for a step of another kind."""
    kind = step["type"]
    if kind == "Sequence":
        return [pattern for each in step["pretokenizers"] for pattern in _steps(each)]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"]
        return [pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])]
    if kind == "Digits":
        return [r"\p{N}" if step["individual_digits"] else r"\p{N}+"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2_PATTERN] if step.get("use_regex", True) else []
    raise ValueError(f"it splits texts by {json.dumps(step)[:80]}, which is not known here")


def _forms(normalizer: dict | None) -> list[str]:
    """The normal forms of Unicode that a text is brought into. Raises ValueError for anything else."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [form for each in normalizer["normalizers"] for form in _forms(each)]
    if normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"its normalizer {normalizer['type']} is not known here")
    return [normalizer["type"]]


def covers(pattern: str) -> bool:
    """Whether a pattern leaves no character out: tiktoken drops what does not match."""
    text = " ".join(map(chr, range(0x3100)))
    return "".join(match[0] for match in regex.finditer(pattern, text, regex.VERSION1)) == text


def splitter(steps: list[str], forms: list[str]) -> Callable[[str], list[str]]:
    """A function that cuts a text into pieces: each step cuts those of the step before at its matches.

    >>> splitter([r"[0-9]", r" ?[a-z]+"], [])("ab1 cd")
    ['ab', '1', ' cd']
    """
    # as Oniguruma has it, which Hugging Face runs: sets may be nested, $ is the end of any line
    patterns = [regex.compile(step, regex.VERSION1 | regex.MULTILINE) for step in steps]

    def split(text: str) -> list[str]:
        for form in forms:
            text = unicodedata.normalize(form, text)
        pieces = [text] if text else []
        for pattern in patterns:
            pieces = [part for piece in pieces for part in _cut(pattern, piece)]
        return pieces

    return split


def _cut(pattern: regex.Pattern, piece: str) -> list[str]:
    """The matches of a pattern and what lies between them."""
    parts, end = [], 0
    for match in pattern.finditer(piece):
        if match.end() > match.start():
            parts += [piece[end : match.start()], match[0]]
            end = match.end()
    return [part for part in (*parts, piece[end:]) if part]


def _read_tiktoken(text: bytes, config: dict) -> Parts:
    """Moonlight's and Kimi's: ranks in a file of tiktoken's form, specials in tokenizer_config.json."""
    ranks = read_ranks(text.splitlines())
    specials = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
    check_ids(ranks, specials, set(ranks.values()))
    return Parts(ranks, KIMI_PATTERN, specials, None, "", [])


def read_ranks(lines: list[bytes]) -> dict[bytes, int]:
    """Token -> rank from lines of tiktoken's form, "token in base64, rank"."""
    pairs = (line.split() for line in lines if line.strip())
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


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


def byte_letters() -> dict[int, str]:
    """The printable letter of each byte in Hugging Face's files: itself, or one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
