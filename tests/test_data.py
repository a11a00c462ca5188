"""Corpora and the loader: every sequence once an epoch, every document on one side, downloads whole or not at all."""

import http.server
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch

import data.corpus as corpus
from data import UserError, plot
from data.corpus import download, folder_documents, is_val, prepare, story_documents, tinystories_documents
from data.loader import Loader, TokenFile, eval_batches, write_tokens
from data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("plainseek:512")


def quiet(*words):
    """Where a test does not look at what is said."""


def token_file(path, count: int, first: int = 0, vocab_size: int = 1024) -> TokenFile:
    write_tokens(path, [np.arange(first, first + count)], vocab_size, {"tokenizer": "t", "corpus": "c"})
    return TokenFile(path)


@pytest.fixture
def files(tmp_path):
    """Two files of 100 and 57 tokens whose ids are their places: 9 + 5 sequences of 10."""
    return {"a": token_file(tmp_path / "a.bin", 100), "b": token_file(tmp_path / "b.bin", 57, first=500)}


# ------------------------------------------------------------------------------------------------- loader


def test_an_epoch_shows_every_sequence_once_and_targets_follow(files):
    loader = Loader(files, 10, seed=3)
    tokens, targets = loader.next_batch(14)
    starts = [*range(0, 90, 10), *range(500, 550, 10)]
    assert sorted(tokens[:, 0].tolist()) == starts and loader.position == loader.windows
    assert torch.equal(targets, tokens + 1)  # of files whose ids count up
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
    for other in (Loader(files, 9, seed=1), Loader(files, 10, seed=2), Loader({"a": files["a"]}, 10, seed=1)):
        with pytest.raises(UserError, match="cannot continue"):
            other.load_state_dict(state)


def test_evaluation_is_always_the_same_sequences(files):
    one, two = (torch.cat([tokens for tokens, _ in eval_batches(files["a"], 10, 4, 7)]) for _ in range(2))
    assert torch.equal(one, two) and one[:, 0].tolist() == list(range(0, 70, 10))


def test_token_files_say_what_they_are(tmp_path):
    wide = token_file(tmp_path / "wide.bin", 10, first=70_000, vocab_size=100_000)
    assert wide.header["dtype"] == "uint32" and wide.window(0, 4).tolist() == [70_000 + i for i in range(5)]
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


def test_a_write_that_fails_leaves_no_file(tmp_path):
    def chunks():
        yield np.arange(5)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_tokens(tmp_path / "x.bin", chunks(), 512, {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ corpora


def test_the_split_is_a_matter_of_the_document_and_about_one_in_32():
    keys = [f"document {i}" for i in range(4000)]
    share = sum(map(is_val, keys)) / len(keys)
    assert 0.02 < share < 0.045 and [is_val(key) for key in keys] == [is_val(key) for key in keys]


def test_no_document_is_on_both_sides(tmp_path):
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
    before = (tmp_path / "cache").stat().st_mtime_ns, [f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.bin")]
    prepare(tmp_path / "text", TOKENIZER, tmp_path / "cache", log=quiet)
    assert before[1] == [f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.bin")]  # found, not made again


def test_the_embedded_corpus_has_three_domains_and_is_described(tmp_path, monkeypatch):
    for name, value in (("REASONING", {"chain": 300, "compare": 60}), ("STORIES", 120), ("CODE_CHARS", 60_000)):
        monkeypatch.setattr(corpus, name, value)
    made = prepare("local", TOKENIZER, tmp_path, log=quiet)
    assert made.domains == ["reasoning", "stories", "code"]
    for word in ("reasoning", "stories", "code", "PSF-2.0", "generated", "sha256"):
        assert word in made.description
    ids = set(np.array(made.train["reasoning"].tokens).tolist())
    assert TOKENIZER.specials["<think>"] in ids  # our own text has its specials
    assert TOKENIZER.specials["<think>"] not in set(np.array(made.train["code"].tokens).tolist())


def test_stories_are_whole_sentences_with_every_name_filled_in():
    for _, text in story_documents(random.Random(0), 300):
        assert "{" not in text and "|" not in text and text[-1] in '.!"?' and len(text.split()) > 20


def test_text_of_the_user_that_is_none_is_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "nothing").mkdir()
    for name, words in (("empty.txt", "empty"), ("binary.txt", "not UTF-8"), ("nothing", "empty")):
        with pytest.raises(UserError, match=words):
            list(folder_documents(tmp_path / name))
    with pytest.raises(UserError, match="did you mean 'local'"):
        prepare("locl", TOKENIZER, tmp_path)
    (tmp_path / "good.txt").write_text("A line of text. " * 100)
    said = []
    assert list(folder_documents(tmp_path, said.append)) and "left out 1 files" in said[0]


# ------------------------------------------------------------------------------- downloads, from loopback


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
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(self.content)}")
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


def test_fineweb_shards_are_checked_and_their_marks_become_ours(tmp_path):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 6
    path = tmp_path / "shard.bin"
    path.write_bytes(header.tobytes() + np.array([50256, 5, 6, 50256, 7, 8], np.uint16).tobytes())
    assert np.concatenate(list(corpus.fineweb_chunks(path, None, 60_000))).tolist() == [60_000, 5, 6, 60_000, 7, 8]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="wanted 6"):
        list(corpus.fineweb_chunks(path, None, 60_000))
    with pytest.raises(UserError, match="wanted gpt2"):
        prepare("fineweb", TOKENIZER, tmp_path)


# ---------------------------------------------------------------------------------------------- pictures


def test_runs_are_compared_with_the_first_of_their_seed(tmp_path, capsys, exit_code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.json").write_text('{"seed": 0}')
    (tmp_path / "e" / "log.csv").write_text("step,ce\n0,\n")
    for name, seed, factor, steps in (("a", 0, 1, 100), ("b", 1, 1, 90), ("c", 1, 1.01, 80), ("d", 0, 0.98, 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(f'{{"seed": {seed}}}')
        losses = [f"{step},{factor * (5 - step / 50 + seed)}" for step in range(1, steps + 1)]
        (tmp_path / name / "log.csv").write_text("\n".join(["step,ce", "0,", *losses]))
    assert exit_code(plot.main, *"abcd") == 0
    told = capsys.readouterr().out.splitlines()
    assert told == ["c against b: +1.00 % over all steps, +1.00 % over the last fifth",
                    "d against a: -2.00 % over all steps, -2.00 % over the last fifth", "compare.png"]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    for wrong, said in (("ab", "no two runs of one seed"), ("af", "f: no run"), ("", "wanted: python -m data.plot"),
                        ("ae", "e: its log holds no step yet")):
        assert exit_code(plot.main, *wrong) == 2
        assert said in capsys.readouterr().err
