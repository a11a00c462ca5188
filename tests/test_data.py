"""Corpora and the loader: every sequence once an epoch, every document on one side, downloads whole
or not at all; and the pictures and figures of a run."""

import http.server
import json
import random
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
from data.text.corpus import is_val, prepare, story_documents, tinystories_documents
from data.text.files import download, folder_documents, read_examples
from data.text.loader import IGNORE, Loader, TokenFile, eval_batches, write_tokens
from data.text.tokenizer import load_tokenizer
from tests.claims import lab

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
    return {"a": token_file(tmp_path / "a.bin", 100),
            "b": token_file(tmp_path / "b.bin", 57, first=500)}


# ------------------------------------------------------------------------------------------ loader


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
    ranks = [Loader(files, 10, rank=rank, world_size=world_size, seed=3)
             for rank in range(world_size)]
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
    others = [Loader(files, 9, seed=1), Loader(files, 10, seed=2),
              Loader({"a": files["a"]}, 10, seed=1)]
    for other in others:
        with pytest.raises(UserError, match="cannot continue"):
            other.load_state_dict(state)


def test_evaluation_is_always_the_same_sequences(files):
    one, two = (torch.cat([tokens for tokens, _ in eval_batches(files["a"], 10, 4, 7)])
                for _ in range(2))
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


def test_the_notes_of_a_token_file_are_asked_behind_the_last_chunk(tmp_path):
    seen = []

    def chunks():
        for i in range(3):
            seen.append(i)
            yield np.arange(i)

    write_tokens(tmp_path / "x.bin", chunks(), 512, lambda: {"seen": len(seen)})
    assert TokenFile(tmp_path / "x.bin").header["seen"] == 3


def test_a_write_that_fails_leaves_no_file(tmp_path):
    def chunks():
        yield np.arange(5)
        raise OSError("the disk is full")

    with pytest.raises(UserError, match="x.bin: the disk is full"):
        write_tokens(tmp_path / "x.bin", chunks(), 512, dict)
    assert not list(tmp_path.iterdir())


def test_loader_and_loss_ignore_the_same_target():
    assert IGNORE == kernels.IGNORE


# ----------------------------------------------------------------------------------------- corpora


def test_the_split_is_a_matter_of_the_document_and_about_one_in_32():
    keys = [f"document {i}" for i in range(4000)]
    share = sum(map(is_val, keys)) / len(keys)
    assert 0.02 < share < 0.045 and list(map(is_val, keys)) == list(map(is_val, keys))


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
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    prepare(tmp_path / "text", TOKENIZER, tmp_path / "cache", log=quiet)  # found, not made again
    found = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    assert stamps == found


@pytest.fixture
def small(monkeypatch):
    """An embedded corpus that is made in a second."""
    for name, value in (("REASONING", {"chain": 300, "compare": 60}), ("STORIES", 120),
                        ("CODE_CHARS", 60_000)):
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
    assert header == made.val["stories"].header | {"count": header["count"]}
    assert (header["corpus"], header["domain"]) == ("local", "stories") and header["bytes"] > 10_000


def test_without_a_library_to_read_the_generated_part_is_left(tmp_path, small, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    said = []
    made = prepare("local", TOKENIZER, tmp_path / "cache", log=said.append)
    assert made.domains == ["reasoning", "stories"] and "generated part alone" in said[0]


def test_the_cache_is_made_anew_when_anything_that_the_text_depends_on_changes(
        tmp_path, monkeypatch):
    def name(source: str, seed: int = 0, tokenizer=TOKENIZER) -> str:
        return corpus.folder_name(source, tokenizer, seed)

    rooms = {file.parent.name for file in corpus.own_files()}
    names = {file.name for file in corpus.own_files()}
    assert rooms == {"text", "tasks"}
    assert {"games.py", "task.py", "files.py", "tokenizer.py", "stories.txt"} <= names
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    gsm8k = tmp_path / "gsm.jsonl"
    gsm8k.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    module = tmp_path / "homemade.py"
    module.write_text("from data.tasks.games import Compare\nclass Mine(Compare):\n    pass\n")
    sources = ("local", "local:chain", "local:gsm8k:gsm.jsonl", "local:homemade:Mine")
    first = [name(source) for source in sources]
    assert first == [name(source) for source in sources] and len(set(first)) == len(sources)
    others = [name("local", seed=1), name("local", tokenizer=load_tokenizer("plainseek:300"))]
    assert len({first[0], *others}) == 3
    gsm8k.write_text('{"question": "1+2?", "answer": "#### 3"}\n')
    module.write_text(module.read_text() + "# other traces\n")
    after = [name(source) for source in sources]
    assert [a == b for a, b in zip(first, after)] == [True, True, False, False]
    (tmp_path / "games.py").write_text("# another version\n")
    files = corpus.own_files()
    monkeypatch.setattr(corpus, "own_files", lambda: [*files[:-1], tmp_path / "games.py"])
    assert name("local") != first[0]


def test_a_task_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="did you mean 'chain'"):
        prepare("local:chian", TOKENIZER, tmp_path)


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
    with pytest.raises(UserError, match="did you mean 'local'"):
        prepare("locl", TOKENIZER, tmp_path)
    for source in ("tinystories:x", "fineweb:0", "fineweb:-1"):
        with pytest.raises(UserError, match=f"data: got '{source}', wanted"):
            prepare(source, TOKENIZER, tmp_path)
    (tmp_path / "good.txt").write_text("A line of text. " * 100)
    said = []
    assert list(folder_documents(tmp_path, said.append)) and "left out 1 files" in said[0]


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
    for wrong in ('{"question": "x"}', '{"question": 1, "answer": "2"}', "[1]", "{", "null", "text"):
        path.write_text(text + "\n" + wrong + "\n", encoding="utf-8")
        with pytest.raises(UserError) as error:
            read_examples(path)
        assert f"{path}, line 4: got {wrong!r}, wanted" in str(error.value)
        assert "\n" not in str(error.value)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        read_examples(path)
    for broken in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(UserError, match="examples: cannot read"):
            read_examples(broken)


# ------------------------------------------------------------------------ downloads, from loopback


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


def test_fineweb_shards_are_checked_and_their_marks_become_ours(tmp_path):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 6
    path = tmp_path / "shard.bin"
    tokens = np.array([50256, 5, 6, 50256, 7, 8], np.uint16)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    found = np.concatenate(list(corpus.fineweb_chunks(path, None, 60_000)))
    assert found.tolist() == [60_000, 5, 6, 60_000, 7, 8]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="wanted 6"):
        list(corpus.fineweb_chunks(path, None, 60_000))
    with pytest.raises(UserError, match="wanted gpt2"):
        prepare("fineweb", TOKENIZER, tmp_path)


def test_fineweb_has_its_own_shards_to_train_and_to_validate(tmp_path, monkeypatch):
    header = np.zeros(256, np.int32)

    def fetch(url, path, limit, log):
        count = (limit - 1024) // 2 if limit else 7
        header[:3] = 20240520, 1, count
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header.tobytes() + np.full(count, 50256, np.uint16).tobytes())
        return path

    monkeypatch.setattr(corpus, "download", fetch)
    monkeypatch.setattr(TOKENIZER, "name", "gpt2")
    made = prepare("fineweb:2", TOKENIZER, tmp_path, log=quiet)
    assert made.domains == ["web"] and len(made.train["web"]) == 14
    assert len(made.val["web"]) == 1_000_000 and "ODC-By" in made.description
    assert set(made.train["web"].tokens.tolist()) == {TOKENIZER.bos_id}


# ------------------------------------------------------------------------------ pictures and costs


def test_runs_are_compared_with_the_first_of_their_seed(tmp_path, capsys, exit_code, monkeypatch):
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
                    "d against a: -2.00 % over all steps, -2.00 % over the last fifth",
                    "compare.png"]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    mistakes = (("ab", "no two runs of one seed"), ("af", "f: no run"),
                ("", "wanted: python -m data.io.plot"), ("ae", "e: its log holds no step yet"))
    for wrong, said in mistakes:
        assert exit_code(plot.main, *wrong) == 2
        assert said in capsys.readouterr().err


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
    rows = [fixed | {"step": i, "entropy": e, "kl": k, "dead": d, "truncated": t}
            for i, (e, k, d, t) in columns]
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


def test_the_pictures_of_the_studies_are_drawn(tmp_path):
    found = {kind: {1: [0.4, 0.01], 4: [0.6, 0.02]} for kind in ("budget", "majority", "pass")}
    lab.thinking_figure(tmp_path / "thinking.png", {"the base": found, "after RL": found})
    base, after = {"accuracy": [0.1, 0.1], "length": 20}, {"accuracy": [0.6, 0.1], "length": 30}
    lab.quality_figure(tmp_path / "quality.png", [(10, base, base), (100, base, after)])
    for name in ("thinking.png", "quality.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


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
              "kv_lora_rank": 16, "qk_rope_head_dim": 4, "first_k_dense_replace": 1,
              "max_position_embeddings": 64}
    shapes = {"model.embed_tokens.weight": (100, 10), "lm_head.weight": (100, 10),
              "model.layers.0.mlp.down_proj.weight": (10, 20),
              "model.layers.1.mlp.experts.down_proj": (4, 10, 5),
              "model.layers.2.mlp.experts.down_proj": (4, 10, 5)}  # MTP
    counts = parameter_counts(shapes, config)
    assert counts == {"main": 2400, "mtp": 200, "total": 2600, "embedding": 1000,
                      "active": 1000 + 200 + 50}
    assert cache_numbers(config) == {"MLA": 40, "GQA, 1 groups": 32, "MHA": 64}
    text = portrait("x", config, shapes, counts, 2.5e11)
    for words in ("x: 2 layers, 4 experts, 1 per token", "(4, 10, 5)", "250 GFLOP", "T = 64",
                  "80 bytes in bf16 with MLA", "41.6 KB"):
        assert words in text, words
