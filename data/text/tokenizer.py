"""A byte-level BPE run by tiktoken, and readers of other tokenizers; bpe.py trains one.

    python -m data.text.tokenizer my/texts 2048 my/tokenizer     train one on your own text
    python train.py --tokenizer my/tokenizer ...                 and use it
"""

import json
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Iterable

import regex
import tiktoken

from data.io.checkpoint import BESIDE, VOCABULARIES, fingerprint, note_of, read_json, written_aside
from data.io.cli import UserError, nearest, run_main
from data.tasks.task import ASSISTANT, BOS, EOS, TAGS, USER
from data.text.bpe import PATTERN, teller, train_bpe
from data.text.files import folder_documents
from data.text.foreign import Parts, byte_letters, read_parts, read_ranks

SPECIALS = (BOS, EOS, "<｜▁pad▁｜>", USER, ASSISTANT, *TAGS,
            *(f"<｜reserved▁{i}｜>" for i in range(7)))
SHOWN = {USER, ASSISTANT, *TAGS}  # of them what a reader sees: not special to Hugging Face
RANK_FILE = Path(__file__).with_name("plainseek.tiktoken")  # train_bpe's, on "local", code twice

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"
    "{% if thinking is defined %}{{ '<think>' if thinking else '<think></think>' }}{% endif %}"
    "{% endif %}")

RESPONSE_TEMPLATE = {  # by which transformers 5 tells thinking and answer apart; text is what is neither
    "version": 1, "defaults": {"role": "assistant"}, "start_anchor": ASSISTANT,
    "fields": {"thinking": {"open": TAGS[0], "close": [TAGS[1], EOS]},
               "content": {"open": TAGS[2], "close": [TAGS[3], EOS]}, "text": {"close": EOS}}}
V32_TEMPLATE = (  # V3.2 publishes Python (encoding_dsv32.py) and no template: V3.1's form
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜></think>"
    "{{ m.content.split('</think>', 1)[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}")


class Tokenizer:
    """Text to ids and back: rank = id = order of merging; the ids of `specials` come after.

    (In DeepSeek's files also before.) `source` holds the files that it was read from, if any: names
    and bytes of the vocabulary and of what lay beside it.

    >>> tokenizer = load_tokenizer("plainseek:1024")
    >>> tokenizer.decode(tokenizer.encode("12+30"))
    '12+30'
    >>> len(tokenizer.encode("12+30")), len(tokenizer.encode("<think>")) > 1
    (5, True)
    """

    def __init__(self, name: str, parts: Parts, source: dict[str, bytes] | None = None):
        self.name, self.source, self.ranks, self.specials = name, source or {}, parts.ranks, parts.specials
        self.pattern = parts.steps or parts.pattern  # what ids depend on besides ranks and specials
        self.encoding = tiktoken.Encoding(name, pat_str=parts.pattern, mergeable_ranks=self.ranks,
                                          special_tokens=self.specials)
        self.vocab_size = self.encoding.n_vocab
        self.begin, self.end = parts.begin, parts.end  # how their special tokens are spelled
        self.bos_id, self.eos_id = self.specials.get(parts.begin), self.specials[parts.end]
        self.stop_ids = parts.stop_ids
        self._split, self._ids_of = parts.split, lru_cache(1 << 16)(self.encoding.encode_ordinary)
        self._special = regex.compile("|".join(sorted(map(regex.escape, self.specials), key=len, reverse=True)))
        self._known = {*self.ranks.values(), *self.specials.values()}

    @property
    def opening(self) -> list[int]:
        """The ids in front of a document: the begin token, where there is one."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: text that spells a special token does not become one."""
        if self._split is None:
            return self.encoding.encode_ordinary(text)
        return [i for piece in self._split(text) for i in self._ids_of(piece)]

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that we wrote ourselves, special tokens recognised."""
        if self._split is None:
            return self.encoding.encode(text, allowed_special="all")
        ids = ([self.specials[part]] if part in self.specials else self.encode(part) for part in self.spelled(text))
        return [i for some in ids for i in some]

    def spelled(self, text: str) -> list[str]:
        """A text cut into special tokens, as they are spelled, and the texts between them."""
        parts, end = [], 0
        for match in self._special.finditer(text):
            parts += [text[end : match.start()], match[0]]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part]

    def encode_batch(self, texts: list[str], trusted: bool = False) -> list[list[int]]:
        """Many texts at once, on several threads where tiktoken splits them."""
        if self._split is not None:
            return [self.encode_trusted(text) if trusted else self.encode(text) for text in texts]
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

    @property
    def chat_template(self) -> str | None:
        """How messages become one text, in jinja: the source's own, else ours where it has the tokens.

        Raises UserError for a template that is no text.
        """
        config = json.loads(self.source.get("tokenizer_config.json", b"{}"))
        given = self.source.get("chat_template.jinja", b"").decode("utf-8", "replace") or config.get("chat_template")
        if isinstance(given, list):  # several, each with a name
            given = {row.get("name"): row.get("template") for row in given if isinstance(row, dict)}.get("default")
        if given is None and {USER, ASSISTANT} <= set(self.specials):
            return V32_TEMPLATE if self.source else CHAT_TEMPLATE
        if not isinstance(given, str | None):
            raise UserError(f"tokenizer {self.name}: its chat_template is a {type(given).__name__}, wanted a text")
        return given

    def files(self, context: int | None = None) -> dict[str, bytes]:
        """Names and contents of what transformers.AutoTokenizer and generate read; it gives equal ids.

        `context` is the model's longest sequence. What the tokenizer was read from goes on unchanged.
        """
        pad = SPECIALS[2] if SPECIALS[2] in self.specials else self.end
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.begin is not None,
                  "clean_up_tokenization_spaces": False, "bos_token": self.begin, "eos_token": self.end,
                  "pad_token": pad}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if not self.source:
            config["response_template"] = RESPONSE_TEMPLATE
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
        for name in {*BESIDE, *VOCABULARIES} - set(files):
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
    tokenizer.json or tiktoken.model. Raises UserError when there is none or it is of a kind that is
    not known.
    """
    name, _, size = str(source).partition(":")
    path = Path(source)
    try:
        if path.is_dir():
            there = [path / vocabulary for vocabulary in VOCABULARIES if (path / vocabulary).exists()]
            path = there[0] if there else path / VOCABULARIES[0]
        if path.exists():
            return _from_file(path, str(source))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError, regex.error) as error:
        raise UserError(f"tokenizer {path}: cannot be used ({repr(error)[:200]}), "
                        "wanted a byte-level BPE") from None
    if name == "plainseek":
        return _plainseek(size or "4096")
    if str(source) in ("gpt2", "cl100k"):
        return _from_tiktoken(name)
    known = ("plainseek", "plainseek:SIZE", "gpt2", "cl100k")
    raise UserError(f"tokenizer: got {str(source)!r}, wanted {', '.join(known)} "
                    f"or a place with a tokenizer.json{nearest(name, known)}")


def _from_file(path: Path, name: str) -> Tokenizer:
    """The tokenizer of a vocabulary and of what lies beside it, which goes on with it."""
    is_known = path.name in VOCABULARIES
    main = path.name if is_known else VOCABULARIES[0]
    files = {main: path.read_bytes()}
    beside, config = [], path.with_name("config.json")
    if is_known:
        beside = [*(path.with_name(other) for other in BESIDE), *path.parent.glob("tokenization_*.py")]
        noted = note_of(path.parent, "tokenizer")
        if noted not in (None, fingerprint(files[main])):
            raise UserError(f"{path}: is not the tokenizer that the weights beside it were saved with")
    files |= {file.name: file.read_bytes() for file in beside if file.exists()}
    of_model = read_json(config) if is_known and config.exists() else {}
    return Tokenizer(name, read_parts(files, of_model, (BOS, EOS)), files)


def with_specials(name: str, ranks: dict[bytes, int], pattern: str, first: int,
                  more: dict[str, int]) -> Tokenizer:
    """A tokenizer whose 16 reserved tokens have the ids from `first` on."""
    specials = more | {token: first + i for i, token in enumerate(SPECIALS)}
    return Tokenizer(name, Parts(ranks, pattern, specials, BOS, EOS, [specials[EOS]]))


def _plainseek(size: str) -> Tokenizer:
    least = 256 + len(SPECIALS)
    if not size.isdecimal() or len(size) > 4 or not least <= int(size) <= 4096:
        raise UserError(f"tokenizer: plainseek:{size}, wanted a size from {least} to 4096")
    count = int(size) - len(SPECIALS)
    ranks = read_ranks(RANK_FILE.read_bytes().splitlines()[:count])
    return with_specials(f"plainseek:{size}", ranks, PATTERN, count, {})


def _from_tiktoken(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("cl100k_base" if name == "cl100k" else name)
    except Exception as error:  # tiktoken lets errors of its own and of its http library through
        raise UserError(f"tokenizer {name}: tiktoken could not download it "
                        f"({type(error).__name__}); offline there is --tokenizer plainseek") from None
    return with_specials(name, encoding._mergeable_ranks, encoding._pat_str, encoding.n_vocab,
                         encoding._special_tokens)


def check_belongs(tokenizer: Tokenizer, sizes) -> None:
    """Raises UserError when a tokenizer that lies beside a model is another model's.

    sizes: the model's config, with vocab_size (which may be padded), bos_token_id and eos_token_id,
    None where its config.json has none.
    """
    name = f"tokenizer {tokenizer.name}: it belongs to another model:"
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(f"{name} got {tokenizer.vocab_size} ids, wanted at most vocab_size {sizes.vocab_size}")
    bos, eos = sizes.bos_token_id, sizes.eos_token_id
    if None not in (bos, tokenizer.bos_id) and bos != tokenizer.bos_id:
        raise UserError(f"{name} its begin token has the id {tokenizer.bos_id}, wanted bos_token_id {bos}")
    if eos is not None and not set(tokenizer.stop_ids) & set(eos if isinstance(eos, list) else [eos]):
        raise UserError(f"{name} its end token has the id {tokenizer.eos_id}, wanted eos_token_id {eos}")


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
