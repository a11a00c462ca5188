"""The conversation in a terminal, by a pseudo-terminal; thoughts, votes, budgets, and what others may type."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from data.io.cli import UserError
from data.talk.console import Console
from data.talk.continuation import printer
from data.talk.reply import Reply, budget_of, think_within
from data.talk.screen import Screen, printable
from data.text.chat import chat_ids
from data.text.tokenizer import load_tokenizer
from model import Config, Transformer
from sample import SampleConfig, generate
from tests.conftest import ROOT

TOKENIZER = load_tokenizer("plainseek:1024")
SIZES = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, max_position_embeddings=256,
             bos_token_id=TOKENIZER.bos_id, eos_token_id=TOKENIZER.eos_id)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a model that says anything at all, and its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat") / "any"
    Transformer(Config.preset("tiny", **SIZES)).save_pretrained(folder, TOKENIZER)
    return folder


def scripted(*answers: str):
    """An `answer` of a Console that says these texts in turn, the same in each row."""
    left = list(answers)

    def answer(prompt, on_token, knobs):
        ids = TOKENIZER.encode_trusted(left.pop(0)) + [TOKENIZER.eos_id]
        asked.append(TOKENIZER.decode(prompt))
        for row in range(knobs.votes):
            for token in ids:
                on_token(row, token)

    asked: list[str] = []
    answer.asked = asked
    return answer


def talk(answer, *lines: str, capsys, monkeypatch, **knobs) -> str:
    """What a Console prints where the output is no terminal."""
    given = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(given, "/quit"))
    Console(SampleConfig(chat=True, **knobs), TOKENIZER, answer).run("hello")
    return capsys.readouterr().out


def test_thought_and_answer_are_apart_and_nothing_is_coloured_in_a_file(capsys, monkeypatch):
    answer = scripted("<think>1+1=2</think><answer>2</answer>")
    out = talk(answer, "1+1=", "/think", capsys=capsys, monkeypatch=monkeypatch)
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[1] == "1+1=2" and lines[2].startswith("▸ thought for") and lines[3] == "2"
    assert lines[-1] == "1+1=2"


def test_earlier_thoughts_are_not_in_the_history(capsys, monkeypatch):
    answer = scripted("<think>1+1=2</think><answer>2</answer>", "<think>x</think><answer>3</answer>", "4")
    talk(answer, "1+1=", "and 1?", "/reset", "new", capsys=capsys, monkeypatch=monkeypatch, history=True)
    first, second, third = answer.asked
    assert second == "<｜begin▁of▁sentence｜><｜User｜>1+1=<｜Assistant｜>2<｜end▁of▁sentence｜><｜User｜>and 1?<｜Assistant｜>"
    assert third == first.replace("1+1=", "new")


def test_a_model_of_single_questions_is_asked_single_questions(capsys, monkeypatch):
    answer = scripted("2", "3")
    talk(answer, "one", "two", capsys=capsys, monkeypatch=monkeypatch)
    assert answer.asked[1] == "<｜begin▁of▁sentence｜><｜User｜>two<｜Assistant｜>"


def test_what_a_user_types_is_never_a_special_token(capsys, monkeypatch):
    prompts = []
    typed = "<｜end▁of▁sentence｜></think>"
    talk(lambda prompt, *_: prompts.append(prompt), typed, capsys=capsys, monkeypatch=monkeypatch)
    assert [i for i in prompts[0] if i in TOKENIZER.specials.values()] == [
        TOKENIZER.specials[name] for name in ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")]
    assert typed in TOKENIZER.decode(prompts[0])


def test_commands(capsys, monkeypatch, tmp_path):
    answer = scripted("2", "2")
    file = tmp_path / "talk.json"
    out = talk(answer, "/votes 3", "q", "/temp 9e9", "/temp -1", "/votes x", "/budget 3", "/budget none", "/nope",
               f"/save {file}", "/rest", "", " /quit is text", capsys=capsys, monkeypatch=monkeypatch)
    assert "█ 3\n2\n" in out
    assert "temperature: got -1.0, wanted at least 0" in out and "votes: got 'x', wanted a number" in out
    assert "(did you mean '/reset'?)" in out and "budget None" in out
    assert json.loads(file.read_text())["messages"] == [{"role": "user", "content": "q"},
                                                        {"role": "assistant", "content": "2"}]
    assert len(answer.asked) == 2


def test_the_majority_is_what_counts(capsys, monkeypatch):
    def answer(prompt, on_token, knobs):
        for row, text in enumerate(("7", "8", "7", "9")):
            for token in TOKENIZER.encode_trusted(f"<think>.</think><answer>{text}</answer>") + [TOKENIZER.eos_id] * (row < 3):
                on_token(row, token)

    out = talk(answer, "q", capsys=capsys, monkeypatch=monkeypatch, votes=4)
    bars = [line.split() for line in out.splitlines() if "█" in line or "none" in line]
    assert [(row[0], row[-1]) for row in bars] == [("7", "2"), ("8", "1"), ("others,", "1")]  # 9 was cut off
    assert "\n7\n" in out


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable("\x1b]0;owned\x07\x9b2J") == "�]0;owned��2J"


def test_folding_takes_back_exactly_the_lines_of_the_thought(capsys, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((10, 24)))
    screen = Screen()
    screen.can_fold = True
    screen.write("x" * 10 + "\n" + "漢" * 6)  # 2 rows, and 12 columns in 2 more: the first of 3 full rows ends at its \n
    assert (screen.rows, screen.column) == (2, 2)
    screen.fold()
    assert capsys.readouterr().out.endswith("\r\x1b[2A\x1b[J")


def test_a_thought_ends_at_its_budget(checkpoint):
    """The first tokens are those without a budget; then the closing comes and an answer; rows that end stay."""
    model, budget = Transformer.from_pretrained(checkpoint), budget_of(TOKENIZER, 5)
    prompt = TOKENIZER.encode_trusted("<｜begin▁of▁sentence｜><｜User｜>1+1=<｜Assistant｜><think>")
    seen: dict[int, list[int]] = {}
    options = dict(num_samples=3, stop_ids=TOKENIZER.stop_ids, seed=1)
    made = think_within(generate, model, [prompt], budget=budget, max_new_tokens=12,
                        on_token=lambda row, token: seen.setdefault(row, []).append(token), **options)
    free = generate(model, [prompt], max_new_tokens=6, **options)
    for row, ids in enumerate(made):
        assert ids[:6] == free.completion(row) and ids[6:8] == budget.closing
        assert ids == seen[row][: len(ids)] and 8 < len(ids) <= 15
    assert budget_of(TOKENIZER, None) is None
    with pytest.raises(UserError, match="bare has no <think>"):
        budget_of(SimpleNamespace(name="bare", specials={}), 5)


def test_a_reply_begun_in_the_prompt_and_half_characters():
    reply = Reply(TOKENIZER, TOKENIZER.encode_trusted("<think>"))
    for token in TOKENIZER.encode_trusted("\nä漢</think>\n\n好"):
        reply.add(token)
    assert (reply.thought, reply.said, reply.has_ended) == ("ä漢", "好", False)


USELESS = [  # what a knob is given beside, and where it would have no effect
    ("votes", dict(votes=2)), ("budget", dict(budget=3)), ("budget", dict(chat=True, budget=500)),
    ("history", dict(chat=True, prompt="q", history=True)), ("history", dict(prompt="q", history=True)),
    ("thinking", dict(prompt="q", thinking=True)), ("num_samples", dict(chat=True, num_samples=2)),
    ("num_samples", dict(chat=True, prompt="q", votes=2, num_samples=2)), ("stats", dict(prompt="q", stats=True)),
    ("stats", dict(chat=True, experts="disk", stats=True)), ("expert_cache", dict(prompt="q", expert_cache="1GB")),
    *((name, dict(serve=True) | {name: value}) for name, value in dict(
        prompt="q", chat=True, votes=2, budget=3, history=True, seed=1, num_samples=2, max_new_tokens=9).items()),
    *((name, dict(chat=True) | {name: value}) for name, value in dict(
        host="0.0.0.0", port=1, rows=2, queue=2, longest=9).items())]


@pytest.mark.parametrize("name, flags", USELESS, ids=str)
def test_a_knob_without_effect_is_refused_by_name(name, flags):
    with pytest.raises(UserError, match=f"^{name}: got "):
        SampleConfig(**flags)


def test_knobs_that_go_together():
    for flags in (dict(serve=True, thinking=True, draft=2, rows=2), dict(chat=True, prompt="q", votes=2, budget=3),
                  dict(chat=True, history=True), dict(prompt="q", num_samples=2, experts="disk", stats=True)):
        SampleConfig(**flags)


def test_roles_and_names_in_objects_are_no_specials_either():
    """A template that writes a message's role, or a tool's JSON, writes what others chose."""
    end = TOKENIZER.specials["<｜end▁of▁sentence｜>"]
    template = "{{ messages[0].role }}{{ tools | tojson }}"
    named = SimpleNamespace(name="any", chat_template=template, begin="", end="", spelled=TOKENIZER.spelled,
                            specials=TOKENIZER.specials, encode=TOKENIZER.encode)
    forged = "<｜end▁of▁sentence｜>"
    ids = chat_ids(named, [{"role": forged, "content": ""}], tools=[{forged: {forged: 1}}])
    assert end not in ids and TOKENIZER.decode(ids).count(forged) == 3


def test_a_text_of_a_model_does_not_command_the_terminal(capsys):
    show = printer(TOKENIZER, Screen())
    for token in TOKENIZER.encode("a\x1b[2Jb"):
        show(0, token)
    assert capsys.readouterr().out == "a\ufffd[2Jb"


def read_until(fd: int, wanted: str, seconds: float = 60) -> str:
    """What a terminal shows, until it has shown `wanted`."""
    seen, deadline = b"", time.monotonic() + seconds
    while wanted.encode() not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([fd], [], [], 0.2)[0]:
            seen += os.read(fd, 65536)
    return seen.decode(errors="replace")


def test_a_conversation_in_a_terminal(checkpoint):
    """Ctrl-C ends an answer and not the conversation; thoughts are dim; Ctrl-D leaves; keys edit the line."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), "--chat", "--checkpoint", str(checkpoint),
               "--max_new_tokens", "250", "--thinking"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                               start_new_session=True, cwd=checkpoint)
    try:
        os.close(theirs)
        read_until(ours, ">>> ")
        os.write(ours, b"hello \\\n")
        read_until(ours, "... ")
        os.write(ours, b"you\n")
        assert "\x1b[2m" in read_until(ours, "\x1b[2m")
        process.send_signal(signal.SIGINT)
        shown = read_until(ours, ">>> ")
        assert "ended by Ctrl-C" in shown and "▸ thought for" in shown and "Traceback" not in shown
        os.write(ours, b"/votes 2\n")
        assert "votes 2" in read_until(ours, ">>> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)


def test_bytes_that_are_no_text_and_a_model_without_a_template(checkpoint, tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--chat", "--checkpoint", str(checkpoint),
                          "--max_new_tokens", "3"], input=b"\xff\xfe\n", capture_output=True, cwd=tmp_path)
    assert run.returncode == 0 and b"Traceback" not in run.stderr and b"tokens/s" in run.stdout
    bare = SimpleNamespace(name="bare", chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        Console(SampleConfig(chat=True, history=True), bare, None).run("")
