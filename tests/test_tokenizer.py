"""Tokenizer: nothing lost, nothing forged, the trainer is BPE, and ids equal Hugging Face's."""

import json
import random
import time
from types import SimpleNamespace

import pytest
import regex
import tiktoken

from data.io.checkpoint import save_weights
from data.io.cli import UserError
from data.text.bpe import teller
from data.text.files import row_text
from data.text.foreign import DEEPSEEK_PATTERN, byte_letters
from data.text.tokenizer import (PATTERN, SHOWN, SPECIALS, Tokenizer, check_belongs, load_tokenizer, main, train_bpe,
                                 with_specials)
from tests.conftest import refused

POOLS = ("abcdefghij ", "  \n\t\r", "0123456789", "漢字かなカナ한", "éüßñ\u0301\u0308",
         "!?.,;:<>|▁｜/\\", "\u200b\u3000\xa0\ufeff", "😀👩‍👩‍👧", "שלוםہिथ", "ⅣⅫ²³٣", "\x00\x07\ue000")
WORDS = ("abc", "ing", " the", "tion", "ed", "er", "self", ".", "_", " in", "re", "\n    ", "return",
         "((", "))", "==", "3")


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    mixed = ["".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randrange(60))) for _ in range(count)]
    return mixed + ["".join(rng.choices(WORDS, k=30)) for _ in range(count)]


TEXTS = ["", "a" * 3000, " " * 500, "Hello <think>x</think>", "".join(SPECIALS), *random_texts(400)]


@pytest.mark.parametrize("name", ["plainseek:272", "plainseek:1024", "plainseek"])
def test_every_text_comes_back(name):
    tokenizer = load_tokenizer(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS, trusted=True) == [tokenizer.encode_trusted(text) for text in TEXTS]


def test_user_text_never_forges_a_special():
    tokenizer = load_tokenizer("plainseek:1024")
    special = set(tokenizer.specials.values())
    assert sorted(special) == list(range(1008, 1024)) and tokenizer.vocab_size == 1024
    for text in TEXTS:
        assert not special & set(tokenizer.encode(text)), text
    assert tokenizer.encode_trusted("".join(SPECIALS)) == list(range(1008, 1024))
    assert tokenizer.bos_id == 1008 and tokenizer.eos_id == 1009


def test_smaller_sizes_are_prefixes_and_digits_are_single():
    large, small = load_tokenizer("plainseek"), load_tokenizer("plainseek:1024")
    assert all(large.ranks[token] == rank for token, rank in small.ranks.items())
    assert len(small.ranks) == 1008 and len(large.ranks) == 4080
    assert small.encode("4-6+3=17") == [ord(sign) for sign in "4-6+3=17"]
    texts = [token.decode("utf-8", "ignore") for token in large.ranks if len(token) > 1]
    assert not any(regex.search(r"\p{N}", text) for text in texts)


def test_bytes_stream_through_a_broken_character_and_unknown_ids():
    tokenizer = load_tokenizer("plainseek:272")
    ids = tokenizer.encode("ü")
    assert len(ids) == 2
    assert tokenizer.decode_bytes(ids[:1]) + tokenizer.decode_bytes(ids[1:]) == "ü".encode()
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode([*ids, 5000]) == "ü"  # an id of a padded vocabulary has no text


def slow_bpe(texts: list[str], size: int) -> dict[bytes, int]:
    """Count all pairs anew for every merge; ties go to the smaller pair."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in regex.findall(PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        if not pairs:
            break
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


def test_trainer_equals_counting_everything_anew():
    texts = ["the cat sat on the mat; the cats ate aaaa aaaaaaa abababab", "banana bandana cabana. über üben"]
    assert train_bpe(texts, 300) == slow_bpe(texts, 300)
    assert train_bpe(texts, 10_000) == slow_bpe(texts, 10_000)  # ends with nothing left to join
    for text in random_texts(40, seed=2):
        assert train_bpe([text * 3], 330) == slow_bpe([text * 3], 330), repr(text)
    assert len(train_bpe([], 300)) == 256


@pytest.mark.parametrize("letters", ["漢字日本語中国人大小山川水火木金土", "abcdefghijklmnopqrstuvwxyzABCDE"])
def test_a_text_without_spaces_takes_as_long_as_one_with_them(letters):
    text = "".join(random.Random(0).choices(letters, k=64_000))
    started = time.process_time()
    ranks = train_bpe([text], 1000)
    assert time.process_time() - started < 3  # 0.2 s; 15 s where each merge walks through the text
    assert len(ranks) == 1000 and max(map(len, train_bpe(["a" * 64_000], 999))) <= 256


def test_a_long_training_says_how_far_it_is(monkeypatch):
    now, said = iter(range(0, 10_000, 4)), []
    monkeypatch.setattr("data.text.bpe.time.monotonic", lambda: next(now))
    train_bpe(["one two three " * 9] * 9, 270, tell=teller(said.append))
    assert "million characters counted" in said[0] and said[-1].endswith("of 270 ranks")


def test_trained_tokenizer_is_saved_and_read_again(tmp_path):
    ranks = train_bpe(["low lower lowest newest widest " * 5], 280)
    tokenizer = with_specials("mine", ranks, PATTERN, len(ranks), {})
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.ranks == ranks and again.specials == tokenizer.specials
    for text in TEXTS:
        assert again.encode_trusted(text) == tokenizer.encode_trusted(text), repr(text)
    assert not list(tmp_path.glob("*.part"))


def test_training_on_the_users_text_from_the_command_line(tmp_path, exit_code, refuses, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some words, some more words\n\nand words again " * 50)
    assert exit_code(main, text, 290, out) == 0
    assert load_tokenizer(out).vocab_size == 290
    assert "16 specials in" in capsys.readouterr().out
    for argv in ((text, 12, out), (text, "x", out), (text, "9" * 5000, out), (text, 290), ()):
        refuses(main, "wanted: python -m data.text.tokenizer TEXTS SIZE DIRECTORY", *argv)
    refuses(main, "holds no text", tmp_path / "nowhere", 290, out)


def test_a_tokenizer_that_cannot_be_saved_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*tokenizer.*json"):
        load_tokenizer("plainseek:300").save(tmp_path / "file")


@pytest.mark.parametrize("name", ["plainseek:1024", "plainseek"])
def test_transformers_gives_the_same_ids(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(name)
    tokenizer.save(tmp_path, context=64)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')  # as in a checkpoint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    ids = [tokenizer.specials[token] for token in SPECIALS]
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == ids
    assert theirs("4-6=")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("4-6=")]
    assert theirs.model_max_length == 64
    shown = "<｜User｜>4-6=<｜Assistant｜><think>4-6=8</think><answer>8</answer>"
    made = [tokenizer.bos_id, *tokenizer.encode_trusted(shown), tokenizer.eos_id, ids[2]]
    assert theirs.decode(made, skip_special_tokens=True) == shown
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == ids[:3]
    assert generation.temperature == 0.8 and generation.do_sample
    for text in TEXTS:
        trusted = theirs.encode(text, add_special_tokens=False)
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert trusted == tokenizer.encode_trusted(text), repr(text)
        if not any(mark in text for mark in SHOWN):  # which Hugging Face's takes for special nowhere
            assert plain == tokenizer.encode(text), repr(text)
    messages = [{"role": "user", "content": "4-6="}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<｜begin▁of▁sentence｜><｜User｜>4-6=<｜Assistant｜>"
    messages = [{"role": "system", "content": "Short."}, *messages, {"role": "assistant", "content": "8"}]
    chat = theirs.apply_chat_template(messages, tokenize=False)
    assert chat == SPECIALS[0] + row_text({"messages": messages}) + SPECIALS[1]


def test_a_pipeline_of_transformers_tells_thinking_and_answer_apart(base):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    prompt = "<｜User｜>2+2=<｜Assistant｜>"
    for answer, wanted in (("<think>1+1=2</think><answer>4</answer>", {"thinking": "1+1=2", "content": "4"}),
                           ("<think>for ever", {"thinking": "for ever"}), ("so 4", {"text": "so 4"})):
        assert theirs.parse_response(answer + SPECIALS[1], prefix=prompt) == {"role": "assistant"} | wanted
    said = theirs.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False,
                                      thinking=True)
    assert said == SPECIALS[0] + "<｜User｜>x<｜Assistant｜><think>"
    pipe = transformers.pipeline("text-generation", str(base))
    out = pipe([{"role": "user", "content": "4-6="}], max_new_tokens=5)[0]["generated_text"]
    assert [turn["role"] for turn in out] == ["user", "assistant"]


def test_what_lies_beside_a_tokenizer_goes_on_with_it(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    load_tokenizer("plainseek:300").save(one)
    theirs = {"tokenizer_config.json": '{"chat_template": "mine",\r\n "model_max_length": 7}',
              "special_tokens_map.json": "{}", "generation_config.json": '{"eos_token_id": [285, 3]}',
              "chat_template.jinja": "{{ mine }}\n"}
    for name, text in theirs.items():
        (one / name).write_bytes(text.encode())
    load_tokenizer(one).save(two, context=64)
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in two.iterdir()}
    for save in (Tokenizer.save, lambda tokenizer, path: save_weights(path, {}, {}, tokenizer=tokenizer)):
        load_tokenizer(one).save(two)
        save(load_tokenizer("plainseek:300"), two)  # and not with another
        assert {file.name for file in two.iterdir()} - {"config.json", "model.safetensors"} == {
            "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    (one / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be used"):
        load_tokenizer(one)


@pytest.mark.parametrize("vocab_size, bos, eos, words", [
    (299, 284, 285, "got 300 ids, wanted at most vocab_size 299"),
    (1024, 1008, 285, "its begin token has the id 284, wanted bos_token_id 1008"),
    (1024, 284, 1009, "its end token has the id 285, wanted eos_token_id 1009"),
    (1024, 284, [1009, 5], r"wanted eos_token_id \[1009, 5\]"),
    (300, 284, 285, ""), (1024, 284, [3, 285], ""), (300, None, None, "")])
def test_a_tokenizer_beside_a_model_belongs_to_it(vocab_size, bos, eos, words):
    sizes = SimpleNamespace(vocab_size=vocab_size, bos_token_id=bos, eos_token_id=eos)
    arguments = load_tokenizer("plainseek:300"), sizes
    if not words:
        return check_belongs(*arguments)
    with pytest.raises(UserError, match="tokenizer plainseek:300: it belongs to another model: .*" + words):
        check_belongs(*arguments)


def deepseek_shaped(path):
    """A small tokenizer.json in the form of DeepSeek-V3's.

    Ids of specials come first, there are three splits, and merges are in order."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = [text for text in TEXTS if text] + ["hello world, 漢字漢字 12345 " * 20]
    ranks = train_bpe(texts, 400, r"\s?\S+")
    letters = byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)
    order = sorted(ranks, key=ranks.get)
    names = [*SPECIALS[:3], *map(spell, order)]
    vocab, merges = {name: i for i, name in enumerate(names)}, []
    for token in order[256:]:
        merges += [(spell(token[:i]), spell(token[i:])) for i in range(1, len(token))
                   if token[:i] in ranks and token[i:] in ranks]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    cjk = "[一-龥぀-ゟ゠-ヿ]+"
    words = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
             r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
    pre = tokenizers.pre_tokenizers
    splits = [pre.Split(tokenizers.Regex(p), "isolated") for p in (r"\p{N}{1,3}", cjk, words)]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre.Sequence([*splits, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS[:5]))
    made.save(str(path))
    return made


def test_deepseeks_three_splits_in_one_pattern_give_its_ids(tmp_path):
    theirs = deepseek_shaped(tmp_path / "tokenizer.json")
    ours = load_tokenizer(tmp_path)
    assert ours.pattern == DEEPSEEK_PATTERN and ours.bos_id == 0
    assert ours.vocab_size == theirs.get_vocab_size()
    borders = ["a1b22c333 4444漢5字 x漢y,z漢 ．漢", "  12  漢  \n 3"]
    for text in [*TEXTS, *random_texts(1500, seed=1), *borders]:
        assert ours.encode_trusted(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    ours.save(tmp_path / "saved")  # the file goes on unchanged
    files = [(folder / "tokenizer.json").read_bytes() for folder in (tmp_path / "saved", tmp_path)]
    assert files[0] == files[1]


@pytest.mark.parametrize("name, hint", [
    ("plainseak", "did you mean 'plainseek'"), ("plainseek:77", "from 272 to 4096"), ("nowhere/dir", "tokenizer.json"),
    ("plainseek:x", "from 272 to 4096"), ("plainseek:" + "9" * 5000, "cannot be used")])
def test_unknown_names_are_one_line(name, hint):
    with refused(hint):
        load_tokenizer(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a":' * 100_000, '{"pre_tokenizer": null}',
                                  '{"pre_tokenizer": {"type": "Whitespace"}}'])
def test_foreign_tokenizer_files_are_one_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="cannot be used"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place, token, value", [
    ("vocab", "a", -1), ("vocab", "a", 1 << 24), ("vocab", "a", 1 << 70), ("vocab", "a", 98),
    ("vocab", "a", "97"), ("vocab", "a", 97.0), ("vocab", "a", None), ("vocab", "a", True),
    ("vocab", "a", 286), ("vocab", "a", [1]), ("vocab", "zzz", 999), ("vocab", "", 999),
    ("vocab", "a", "gone"), ("added_tokens", "<think>", 97), ("added_tokens", "<think>", -5),
    ("added_tokens", "<think>", 1 << 40), ("added_tokens", "<think>", None), ("merges", "", "reversed")])
def test_damaged_ids_are_one_line(place, token, value, tmp_path):
    load_tokenizer("plainseek:300").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    if place == "vocab":
        values["model"]["vocab"][token] = value
        if value == "gone":
            del values["model"]["vocab"][token]
    elif place == "merges":
        values["model"]["merges"].reverse()
    else:
        next(row for row in values[place] if row["content"] == token)["id"] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot be used") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_a_tokenizer_that_must_be_downloaded_fails_with_an_offline_choice(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="plainseek"):
        load_tokenizer("gpt2")


def test_gpt2_keeps_its_ids_and_gets_our_specials(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    small = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.specials["<|endoftext|>"] == 256
    assert tokenizer.bos_id == 257 and tokenizer.vocab_size == 273
