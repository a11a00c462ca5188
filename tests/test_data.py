"""Corpora and the loader: every sequence once an epoch, every document on one side, downloads whole
or not at all; and the pictures and figures of a run."""

import http.server
import json
import os
import random
import re
import sys
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

import data.text.corpus as corpus
import kernels
from data.io import plot
from data.io.cli import UserError
from data.io.portrait import cache_numbers, parameter_counts, portrait
from data.text import origin
from data.text.corpus import is_val, prepare, story_documents, tinystories_documents
from data.text.files import Trusted, cut, download, folder_documents, read_examples
from data.text.loader import IGNORE, Examples, Loader, TokenFile, eval_batches, write_tokens
from data.text.tokenizer import load_tokenizer
from tests.conftest import refused

TOKENIZER = load_tokenizer("plainseek:512")


def quiet(*words):
    """Where a test does not look at what is said."""


def token_file(path, count: int, first: int = 0, vocab_size: int = 1024) -> TokenFile:
    notes = {"tokenizer": "t", "corpus": "c"}
    write_tokens(path, [np.arange(first, first + count)], vocab_size, lambda: notes)
    return TokenFile(path)


@pytest.fixture
def files(tmp_path):
    """Two files of 100 and 57 tokens whose ids are their places: 9 + 5 sequences of 10."""
    return {"a": token_file(tmp_path / "a.bin", 100), "b": token_file(tmp_path / "b.bin", 57, first=500)}


def test_an_epoch_shows_every_sequence_once_and_targets_follow(files):
    loader = Loader(files, 10, seed=3)
    tokens, targets = loader.next_batch(14)
    starts = [*range(0, 90, 10), *range(500, 550, 10)]
    assert sorted(tokens[:, 0].tolist()) == starts and loader.position == loader.windows
    assert torch.equal(targets, tokens + 1)  # of files whose ids count up
    assert IGNORE == kernels.IGNORE  # to loader and loss
    again = loader.next_batch(14)[0]
    assert sorted(again[:, 0].tolist()) == starts
    assert not torch.equal(again, tokens)  # in another order


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_what_one_process_would_draw(files, world_size):
    alone = Loader(files, 10, seed=3)
    ranks = [Loader(files, 10, rank=rank, world_size=world_size, seed=3) for rank in range(world_size)]
    for sequences in (8, 4, 12):  # over the end of an epoch
        whole = alone.next_batch(sequences)[0][:, 0].tolist()
        parts = [loader.next_batch(sequences)[0] for loader in ranks]
        assert all(len(part) == sequences // world_size for part in parts)
        assert sorted(torch.cat(parts)[:, 0].tolist()) == sorted(whole)
    with pytest.raises(UserError, match="do not divide"):
        Loader(files, 10, world_size=3).next_batch(4)


def test_a_saved_position_continues_exactly(files):
    loader = Loader(files, 10, seed=1)
    loader.next_batch(9)
    state, expected = loader.state_dict(), loader.next_batch(9)
    fresh = Loader(files, 10, seed=1)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.next_batch(9), expected))
    others = [Loader(files, 9, seed=1), Loader(files, 10, seed=2), Loader({"a": files["a"]}, 10, seed=1)]
    for other in others:
        with pytest.raises(UserError, match="cannot continue"):
            other.load_state_dict(state)
    for position in (-1, "3", None, True, 2.0):
        with pytest.raises(UserError, match="saved at position"):
            fresh.load_state_dict(state | {"position": position})


def test_a_run_goes_on_with_the_same_text_only_not_with_text_as_long(files, tmp_path):
    edited = files | {"b": token_file(tmp_path / "c.bin", 57, first=501)}
    one, two = (Loader(each, 10) for each in (files, edited))
    assert one.state_dict()["windows"] == two.state_dict()["windows"]
    with pytest.raises(UserError, match="saved with corpus [0-9a-f]{16}, now it is [0-9a-f]{16}"):
        two.load_state_dict(one.state_dict())
    one, two = (Examples([("4-6=", answer)], TOKENIZER, 32, plain=one) for answer in "89")
    with pytest.raises(UserError, match="saved with corpus"):
        two.load_state_dict(one.state_dict())
    for state in (one.state_dict() | {"plain": None}, None, []):
        with pytest.raises(UserError, match="cannot continue"):
            one.load_state_dict(state)


def test_evaluation_is_always_the_same_sequences(files):
    one, two = (torch.cat([tokens for tokens, _ in eval_batches(files["a"], 10, 4, 7)]) for _ in range(2))
    assert torch.equal(one, two) and one[:, 0].tolist() == list(range(0, 70, 10))


def test_token_files_say_what_they_are(tmp_path):
    wide = token_file(tmp_path / "wide.bin", 10, first=70_000, vocab_size=100_000)
    assert wide.header["dtype"] == "uint32"
    assert wide.window(0, 4).tolist() == [70_000 + i for i in range(5)]
    assert wide.header["tokenizer"] == "t" and wide.header["corpus"] == "c"
    (tmp_path / "foreign.bin").write_bytes(b"\x01\x02" * 900)
    with pytest.raises(UserError, match="not a token file"):
        TokenFile(tmp_path / "foreign.bin")
    whole = (tmp_path / "wide.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match="another number"):
        TokenFile(tmp_path / "short.bin")
    with pytest.raises(UserError, match="smaller --seq_len"):
        Loader({"wide": wide}, 64)
    write_tokens(path := tmp_path / "long.bin", [np.arange(5)], 512, lambda: {"corpus": "数" * 900})
    assert TokenFile(path).tokens.tolist() == [0, 1, 2, 3, 4]  # its name does not reach into the ids


def test_no_damage_of_a_token_file_stays_unseen(tmp_path):
    token_file(tmp_path / "x.bin", 300)
    whole, path, rng = (tmp_path / "x.bin").read_bytes(), tmp_path / "y.bin", random.Random(0)
    damaged = [b"", whole[:500], whole[:-3], whole + b"\0", b"[" * 2000, b"{}".ljust(1624)]
    for _ in range(1500):
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        damaged.append(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    for _ in range(60):
        place, size = rng.randrange(len(whole)), rng.randrange(2, 600)
        damaged.append(whole[:place] + bytes(size) + whole[place + size :])
    for content in damaged:
        path.write_bytes(content)
        with refused("delete it"):
            TokenFile(path)


def test_no_document_is_on_both_sides_and_about_one_in_32_is_for_validation(tmp_path):
    assert 0.02 < sum(is_val(f"document {i}") for i in range(4000)) / 4000 < 0.045
    (tmp_path / "text").mkdir()
    for i in range(150):
        (tmp_path / "text" / f"{i}.txt").write_text(f"This is the tale number {i}, told once.\n")
    made = prepare(tmp_path / "text", TOKENIZER, tmp_path / "cache", log=quiet)
    sides = []
    for split in (made.train, made.val):
        ids = np.array(split["text"].tokens).tolist()
        documents, begin = [], 0
        for place, token in enumerate(ids):
            if token == TOKENIZER.eos_id:
                assert ids[begin] == TOKENIZER.bos_id
                documents.append(TOKENIZER.decode(ids[begin + 1 : place]))
                begin = place + 1
        sides.append(set(documents))
    assert len(sides[0]) + len(sides[1]) == 150 and not sides[0] & sides[1] and sides[1]
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    prepare(tmp_path / "text", TOKENIZER, tmp_path / "cache", log=quiet)  # found, not made again
    found = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    assert stamps == found
    path = next((tmp_path / "cache").rglob("text.train.bin"))
    content, said = path.read_bytes(), []
    path.write_bytes(content[:-1] + b"?")
    prepare(tmp_path / "text", TOKENIZER, tmp_path / "cache", log=said.append)
    assert path.read_bytes() == content and "is damaged, its checksum is another: made anew" in said[0]


@pytest.fixture
def small(monkeypatch):
    """An embedded corpus that is made in a second."""
    for name, value in (("REASONING", {"chain": 300, "compare": 60}), ("STORIES", 120), ("CODE_CHARS", 60_000)):
        monkeypatch.setattr(corpus, name, value)


def test_the_embedded_corpus_has_three_domains_and_is_described(tmp_path, small):
    made = prepare("local", TOKENIZER, tmp_path, log=quiet)
    assert made.domains == ["reasoning", "stories", "code"]
    for word in ("reasoning", "stories", "code", "PSF-2.0", "generated", "sha256"):
        assert word in made.description
    ids = set(np.array(made.train["reasoning"].tokens).tolist())
    assert TOKENIZER.specials["<think>"] in ids  # our own text has its specials
    ids = set(np.array(made.train["code"].tokens).tolist())
    assert TOKENIZER.specials["<think>"] not in ids
    header = made.train["stories"].header
    own = {name: header[name] for name in ("count", "content", "checksum")}
    assert header == made.val["stories"].header | own
    assert (header["corpus"], header["domain"]) == ("local", "stories") and header["bytes"] > 10_000


def test_without_a_library_to_read_the_generated_part_is_left(tmp_path, small, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    said = []
    made = prepare("local", TOKENIZER, tmp_path / "cache", log=said.append)
    assert made.domains == ["reasoning", "stories"] and "generated part alone" in said[0]


def test_the_cache_is_made_anew_when_anything_that_the_text_depends_on_changes(tmp_path, monkeypatch):
    def name(source: str, seed: int = 0, tokenizer=TOKENIZER) -> str:
        return origin.folder_name(source, tokenizer, seed)

    rooms = {file.parent.name for file in origin.own_files()}
    names = {file.name for file in origin.own_files()}
    assert rooms == {"text", "tasks"}
    assert {"games.py", "task.py", "files.py", "tokenizer.py", "stories.txt"} <= names
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    gsm8k = tmp_path / "gsm.jsonl"
    gsm8k.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    module, text = tmp_path / "homemade.py", tmp_path / "text.txt"
    module.write_text("from data.tasks.games import Compare\nfrom helped.words import WORDS\n"
                      "class Mine(Compare):\n    pass\n")
    (tmp_path / "helped").mkdir()
    (tmp_path / "helped" / "words.py").write_text("WORDS = ['one']\n")
    text.write_text("one and one")
    sources = ("local", "local:chain", "local:gsm8k:gsm.jsonl", "local:homemade:Mine", "text.txt")
    first = [name(source) for source in sources]
    assert first == [name(source) for source in sources] and len(set(first)) == len(sources)
    others = [name("local", seed=1), name("local", tokenizer=load_tokenizer("plainseek:300"))]
    assert len({first[0], *others}) == 3
    gsm8k.write_text('{"question": "1+2?", "answer": "#### 3"}\n')
    module.write_text(module.read_text() + "# other traces\n")
    was = text.stat()
    text.write_text("one and two")
    os.utime(text, ns=(was.st_atime_ns, was.st_mtime_ns))  # as long as before, and as old
    after = [name(source) for source in sources]
    assert [a == b for a, b in zip(first, after)] == [True, True, False, False, False]
    before = origin.task_digest("homemade:Mine")
    (tmp_path / "helped" / "words.py").write_text("WORDS = ['two']\n")
    assert name("local:homemade:Mine") != after[3] and origin.task_digest("homemade:Mine") != before
    assert {file.name for file in origin.task_files("homemade:Mine")} == {"homemade.py", "words.py"}
    (tmp_path / "games.py").write_text("# another version\n")
    files = origin.own_files()
    monkeypatch.setattr(origin, "own_files", lambda: [*files[:-1], tmp_path / "games.py"])
    assert name("local") != first[0]


def test_stories_are_whole_sentences_with_every_name_filled_in():
    for _, text in story_documents(random.Random(0), 300):
        assert "{" not in text and "|" not in text and text[-1] in '.!"?'
        assert len(text.split()) > 20


def test_text_of_the_user_that_is_none_is_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "nothing").mkdir()
    for name, words in (("empty.txt", "empty"), ("binary.txt", "not UTF-8"), ("nothing", "empty")):
        with pytest.raises(UserError, match=words):
            list(folder_documents(tmp_path / name))
    for source, near in (("locl", "local"), ("local:chian", "chain")):
        with pytest.raises(UserError, match=f"did you mean '{near}'"):
            prepare(source, TOKENIZER, tmp_path)
    for source in ("tinystories:x", "fineweb:0", "fineweb:-1", "fineweb:" + "9" * 10):
        with pytest.raises(UserError, match=f"data: got '{source}', wanted"):
            prepare(source, TOKENIZER, tmp_path)
    (tmp_path / "good.txt").write_text("A line of text. " * 100)
    said = []
    assert list(folder_documents(tmp_path, said.append)) and "left out 1 files" in said[0]


STORY = "".join(f"Line {i} of a tale, with wörds.\n" + "\n" * (i % 7 == 0) for i in range(900))


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_byte_order_marks_are_no_text(ends, encoding, tmp_path):
    (tmp_path / "text.txt").write_bytes(STORY.replace("\n", ends).encode(encoding))
    documents = [text for _, text in folder_documents(tmp_path)]
    assert "".join(documents) == STORY and len(documents) > 20
    assert all(text.endswith("\n\n") for text in documents[:-1])  # cut at blank lines


def test_cuts_are_at_a_blank_line_else_a_line_else_a_space_else_before_a_long_word():
    words = " ".join(f"word{i}" for i in range(3000))
    for text, end in ((STORY, "\n\n"), (STORY.replace("\n\n", "\n"), "\n"), (words, " "),
                      (words.replace(" ", "\t"), "\t"), (STORY.replace("\n\n", "\n \t\n"), "\n \t\n")):
        parts = list(cut(text, 500))
        assert "".join(parts) == text and all(500 <= len(part) <= 1000 for part in parts[:-1])
        assert all(part.endswith(end) for part in parts[:-1])
    assert list(cut("a few words " + "x" * 900, 500)) == ["a few words " + "x" * 900]
    assert list(map(len, cut("a few words " + "x" * 2100, 500))) == [12, 1000, 1000, 100]
    assert not list(cut(" \n\n" * 500, 100))


def test_borders_between_documents_are_known_and_no_text(tmp_path):
    stories = [f"Tale {i}.\n\n" + "It ends here. " * 60 + "End." for i in range(40)]
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories) + "<|endoftext|>")
    assert [text for _, text in folder_documents(path)] == stories
    path.write_text(STORY + "<|endoftext|>")  # one book, which is cut as without it
    documents = [text for _, text in folder_documents(path)]
    assert "".join(documents) == STORY.strip() and len(documents) > 20


def jsonl(path, *rows) -> None:
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")


CHAT = [{"role": "system", "content": "Be short.\r\n"}, {"role": "user", "content": "4-6="},
        {"role": "assistant", "content": "<think>less</think>{}"}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}]
CHATTED = ("Be short.\n<｜User｜>4-6=<｜Assistant｜><think>less</think>{}<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>So.")


def test_rows_are_documents_and_a_chat_has_our_marks(tmp_path):
    rows = [{"text": "one\r\ntwo <think>", "id": 1}, {"text": ""}, {"messages": CHAT},
            {"text": "a<|endoftext|>b"}, {"text": "x " * 20_000}]
    jsonl(tmp_path / "rows.jsonl", *rows)
    texts = [text for _, text in folder_documents(tmp_path)]
    assert texts == ["one\ntwo <think>", CHATTED, "a", "b", "x " * 8_001, "x " * 11_999]
    assert [isinstance(text, Trusted) for text in texts] == [False, True] + [False] * 4
    made = prepare(tmp_path, TOKENIZER, tmp_path / ".cache", log=quiet)
    ids = np.concatenate([made.train["text"].tokens, made.val["text"].tokens]).tolist()
    special = TOKENIZER.specials
    assert [ids.count(special[mark]) for mark in ("<｜User｜>", "<｜Assistant｜>", "<think>")] == [2, 2, 1]
    assert ids.count(TOKENIZER.eos_id) == 7  # of six documents, and of one turn


@pytest.mark.parametrize("row", [
    {"txt": "x"}, {"text": 5}, {"text": None}, [1], None, "text", {"messages": []}, {"messages": "x"},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "asistant", "content": "x"}]},
    {"messages": [{"role": ["user"], "content": "x"}]}, {"messages": [{"role": "user", "content": 1}]}])
def test_an_odd_row_is_named(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl(path, {"text": "good"}, {"text": "good"}, row)
    with refused(f"data: {path}, line 3: got {json.dumps(row)[:60]!r}, wanted {{\"text\""):
        list(folder_documents(tmp_path))


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as without, pytest.raises(UserError, match="pip install pyarrow"):
        without.setitem(sys.modules, "pyarrow", None)
        list(folder_documents(tmp_path))
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(UserError, match="rows.parquet is not a parquet file"):
        list(folder_documents(tmp_path))
    for rows, wanted in (([{"text": "one\r\n", "n": 1}, {"text": "two", "n": 2}], ["one\n", "two"]),
                         ([{"messages": CHAT}], [CHATTED])):
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        assert [text for _, text in folder_documents(tmp_path)] == wanted
    parquet.write_table(arrow.table({"n": [1, 2]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet, row 1: got {'n': 1}, wanted"):
        list(folder_documents(tmp_path))


def test_one_byte_of_another_encoding_is_placed_and_leaves_out_its_file_alone(tmp_path):
    text = (b"A line.\r\n" * 12_000) + b"caf\xe9" + b" and so on.\r\n" * 900
    (tmp_path / "café.txt").write_bytes(text)
    where = r"café.txt.*: line 12001, byte 108003 \(0xe9\) is not UTF-8"
    with pytest.raises(UserError, match=where):
        list(folder_documents(tmp_path / "café.txt"))
    (tmp_path / "good.txt").write_text("A line of text.")
    said = []
    assert [text for _, text in folder_documents(tmp_path, said.append)] == ["A line of text."]
    assert len(said) == 1 and re.search("left out 1 files .*" + where, said[0])
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": "x", "answer": "\xe9"}')
    with pytest.raises(UserError, match="cannot read .*line 1, byte 29"):
        read_examples(tmp_path / "rows.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match="cannot read .*text.txt: Permission denied"):
        list(folder_documents(tmp_path))


def test_examples_are_read_line_by_line_and_a_wrong_line_is_named(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [{"question": "4-6=", "answer": "8"}, {"question": "a\u2028b", "answer": "", "more": 1}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    assert read_examples(path) == [("4-6=", "8"), ("a\u2028b", "")]
    for wrong in ('{"question": "x"}', '{"question": 1, "answer": "2"}', "[1]", "{", "null", "text",
                  "[" * 100_000, "9" * 5000):
        path.write_text(text + "\n" + wrong + "\n", encoding="utf-8")
        with refused(f"{path}, line 4: got {wrong[:60]!r}, wanted"):
            read_examples(path)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        read_examples(path)
    for broken in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(UserError, match="examples: cannot read"):
            read_examples(broken)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges; `cut_at` ends an answer early, once."""

    content = b"one story.\n<|endoftext|>\nanother story.\n<|endoftext|>\nhalf a st"
    cut_at: list[int] = []
    asked: list[str] = []

    def do_GET(self):
        Server.asked.append(self.headers["Range"])
        if self.path == "/missing":
            return self.send_error(404)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = self.content[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{end}/{len(self.content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: Server.cut_at.pop()] if Server.cut_at else part)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Server.cut_at, Server.asked = [], []
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_cut_download_goes_on_where_it_ended(server, tmp_path):
    Server.cut_at = [20]
    path = download(server + "/text", tmp_path / "text", log=quiet, patience_s=0)
    assert path.read_bytes() == Server.content
    assert Server.asked == ["bytes=0-", "bytes=20-"]
    download(server + "/text", path, log=quiet)
    assert len(Server.asked) == 2  # it is here already


def test_a_download_that_fails_says_what_where_and_the_offline_choice(server, tmp_path):
    for url in (server + "/missing", "http://127.0.0.1:9/nobody"):
        with pytest.raises(UserError, match="--data local needs no network") as error:
            download(url, tmp_path / "text", log=quiet, patience_s=0)
        assert url in str(error.value) and not (tmp_path / "text").exists()


def test_the_first_megabytes_of_tinystories_are_whole_stories(server, tmp_path, monkeypatch):
    monkeypatch.setitem(corpus.URLS, "tinystories", server + "/{}")
    monkeypatch.setattr(corpus, "download", partial(download, patience_s=0))
    texts = [text for _, text in tinystories_documents(tmp_path, 1, quiet)]
    assert texts == ["one story.", "another story."]


def test_a_corpus_from_the_network_is_fetched_only_once(server, tmp_path, monkeypatch):
    monkeypatch.setitem(corpus.URLS, "shakespeare", server + "/plays")
    for _ in range(2):
        made = prepare("shakespeare", TOKENIZER, tmp_path, log=quiet)
    assert made.domains == ["shakespeare"] and "public domain" in made.description
    assert len(Server.asked) == 1


def write_shard(path, tokens: list[int]) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())


def test_fineweb_shards_are_checked_and_their_marks_become_ours(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, [50256, 5, 6, 50256, 7, 8])
    found = np.concatenate(list(corpus.fineweb_chunks(path, None, 60_000)))
    assert found.tolist() == [60_000, 5, 6, 60_000, 7, 8]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="wanted 6"):
        list(corpus.fineweb_chunks(path, None, 60_000))
    write_shard(path, [50256, 5, 6, 50257, 7, 8])
    with pytest.raises(UserError, match="ids that GPT-2 has not"):
        list(corpus.fineweb_chunks(path, None, 60_000))
    with pytest.raises(UserError, match="wanted gpt2"):
        prepare("fineweb", TOKENIZER, tmp_path)


def test_fineweb_has_its_own_shards_to_train_and_to_validate(tmp_path, monkeypatch):
    def fetch(url, path, limit, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, [50256] * ((limit - 1024) // 2 if limit else 7))
        return path

    monkeypatch.setattr(corpus, "download", fetch)
    monkeypatch.setattr(TOKENIZER, "name", "gpt2")
    made = prepare("fineweb:2", TOKENIZER, tmp_path, log=quiet)
    assert made.domains == ["web"] and len(made.train["web"]) == 14
    assert len(made.val["web"]) == 1_000_000 and "ODC-By" in made.description
    assert set(made.train["web"].tokens.tolist()) == {TOKENIZER.bos_id}


def test_runs_are_compared_with_the_first_of_their_seed(tmp_path, capsys, exit_code, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.json").write_text('{"seed": 0}')
    (tmp_path / "e" / "log.csv").write_text("step,ce\n0,\n")
    runs = (("a", 0, 1, 100), ("b", 1, 1, 90), ("c", 1, 1.01, 80), ("d", 0, 0.98, 100))
    for name, seed, factor, steps in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(f'{{"seed": {seed}}}')
        losses = [f"{step},{factor * (5 - step / 50 + seed)}" for step in range(1, steps + 1)]
        (tmp_path / name / "log.csv").write_text("\n".join(["step,ce", "0,", *losses]))
    assert exit_code(plot.main, *"abcd") == 0
    told = capsys.readouterr().out.splitlines()
    assert told == ["c against b: +1.00 % over all steps, +1.00 % over the last fifth",
                    "d against a: -2.00 % over all steps, -2.00 % over the last fifth", "compare.png"]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    mistakes = (("ab", "no two runs of one seed"), ("af", "f: no run"),
                ("", "wanted: python -m data.io.plot"), ("ae", "e: its log holds no step yet"))
    for wrong, said in mistakes:
        refuses(plot.main, said, *wrong)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn, by the name of its file."""
    drawn, honest = {}, plot.picture

    @contextmanager
    def keep(path, title, size):
        with honest(path, title, size) as figure:
            drawn[path.name] = figure
            yield figure

    monkeypatch.setattr(plot, "picture", keep)
    return drawn


def rl_rows(entropy, kl, dead, truncated) -> list[dict[str, str]]:
    """The rows of a log of RL with these columns and some others."""
    fixed = {"accuracy": 0.5, "format": 0.9, "reward": 0.6, "length": 30, "length_q1": 20,
             "length_q3": 40, "style_guess": 0.4, "style_full": 0.6, "max_vio": 0.2,
             "eval_accuracy": "", "eval_error": ""}
    columns = enumerate(zip(entropy, kl, dead, truncated), 1)
    rows = [fixed | {"step": i, "entropy": e, "kl": k, "dead": d, "truncated": t} for i, (e, k, d, t) in columns]
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("entropy, kl", [(0.9, 0.0), (0.0, 0.0), (0.2, 3.0), (1e-3, 2e-3)])
def test_no_legend_of_the_lower_panels_lies_on_a_curve(tmp_path, figures, entropy, kl):
    flat = [1.0] * 40
    rows = rl_rows([entropy] * 40, [kl] * 40, flat, flat)
    plot.rl_figure(tmp_path / "rl.png", rows, ["guess", "full"])
    assert (tmp_path / "rl.png").read_bytes()[:4] == b"\x89PNG"
    panels = {axis.get_title("left"): axis for axis in figures["rl.png"].axes}
    for title in ("entropy and KL in nats", "groups that teach nothing, answers cut off"):
        axis = panels[title]
        box = axis.get_legend().get_window_extent()
        assert len(axis.lines) == 2
        for line in axis.lines:
            assert axis.transData.transform(line.get_xydata())[:, 1].max() < box.y0 - 2


def test_a_picture_that_cannot_be_written_is_one_line_and_the_one_before_stays(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot.compare_figure(tmp_path / "file" / "x.png", {}, [])
    (tmp_path / "x.png").write_text("the one before")
    with pytest.raises(ZeroDivisionError), plot.picture(tmp_path / "x.png", "", (2, 2)):
        raise ZeroDivisionError
    assert (tmp_path / "x.png").read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 2


def test_costs_by_hand():
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "n_routed_experts": 4,
              "num_experts_per_tok": 1, "num_attention_heads": 2, "qk_nope_head_dim": 8,
              "kv_lora_rank": 16, "qk_rope_head_dim": 4, "first_k_dense_replace": 1, "max_position_embeddings": 64}
    shapes = {"model.embed_tokens.weight": (100, 10), "lm_head.weight": (100, 10),
              "model.layers.0.mlp.down_proj.weight": (10, 20), "model.layers.1.mlp.experts.down_proj": (4, 10, 5),
              "model.layers.2.mlp.experts.down_proj": (4, 10, 5)}  # MTP
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    counts = parameter_counts(state, config)
    assert counts == {"main": 2400, "experts": 200, "mtp": 200, "total": 2600, "embedding": 1000, "active": 1000 + 200 + 50}
    assert cache_numbers(config) == {"MLA": 40, "GQA, 1 groups": 32, "MHA": 64}
    text = portrait("x", config, state, 2.5e11)
    for words in ("x: 2 layers, 4 experts, 1 per token", "(4, 10, 5)", "250 GFLOP", "T = 64",
                  "80 bytes in bf16 with MLA", "41.6 KB", "4.8 KB in bf16  (with --experts disk 4.4 KB"):
        assert words in text, words
