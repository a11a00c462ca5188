"""Verifiers on hostile answers, and the split of questions: nothing that is asked at the end stands
in the text."""

import itertools
import random
import re
import time

import pytest

from data.io.cli import UserError
from data.tasks import TASKS, load_task
from data.tasks.task import Problem, is_test, prompt_text, reward_total, split_completion
from data.text.corpus import local_documents, reasoning_documents

NAMES = [name for name in TASKS if name != "gsm8k"]
CHAIN = load_task("chain"), Problem("4-6+3=", "1")
GAME = load_task("countdown"), Problem("make 29: 3 9 2", "3*9+2", (3, 9, 2), 29)


def tagged(answer: str, thinking: str = "4-6=8;8+3=1") -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


HOSTILE = [  # (task and problem, completion, accuracy, format)
    (CHAIN, tagged("1"), 1, 1), (CHAIN, tagged(" 1\n"), 1, 1), (CHAIN, tagged("01"), 1, 1),
    (CHAIN, tagged("2"), 0, 1), (CHAIN, tagged(""), 0, 1), (CHAIN, tagged("1.0"), 0, 1),
    (CHAIN, tagged("1e0"), 0, 1), (CHAIN, tagged("+1"), 0, 1), (CHAIN, tagged("nan"), 0, 1),
    (CHAIN, tagged("inf"), 0, 1), (CHAIN, tagged("True"), 0, 1), (CHAIN, tagged("0x1"), 0, 1),
    (CHAIN, tagged("١"), 0, 1), (CHAIN, tagged("１"), 0, 1), (CHAIN, tagged("¹"), 0, 1),
    (CHAIN, tagged("1_"), 0, 1), (CHAIN, tagged("1 2"), 0, 1), (CHAIN, tagged("1,2"), 0, 1),
    (CHAIN, tagged("7-6"), 0, 1), (CHAIN, tagged("1" * 90_000), 0, 1),
    (CHAIN, tagged("0" * 90_000 + "1"), 0, 1), (CHAIN, tagged("1" * 5_000_000), 0, 0),
    (CHAIN, tagged("1</answer><answer>2"), 0, 0), (CHAIN, tagged("2</answer><answer>1"), 0, 0),
    (CHAIN, tagged("1") + tagged("1"), 0, 0), (CHAIN, tagged("1") + " or 2", 0, 0),
    (CHAIN, "so " + tagged("1"), 0, 0), (CHAIN, tagged("2", "<answer>1</answer>"), 0, 0),
    (CHAIN, "<think><answer>1</answer></think>", 0, 0), (CHAIN, "<answer>1</answer>", 0, 0),
    (CHAIN, "<think>4-6=8;8+3=1</think>1", 0, 0), (CHAIN, "1", 0, 0), (CHAIN, "", 0, 0),
    (CHAIN, "<answer>1</answer><think></think>", 0, 0), (CHAIN, "<think>1</think><answer>1", 0, 0),
    (CHAIN, tagged("1", ""), 1, 1), (CHAIN, "\0" * 1000, 0, 0), (CHAIN, tagged("\ud800"), 0, 1),
    (CHAIN, "<think>" * 20_000, 0, 0), (GAME, tagged("3*9+2"), 1, 1),
    (GAME, tagged("(9*3)+2"), 1, 1), (GAME, tagged(" 2 + 3 * 9 "), 1, 1),
    (GAME, tagged("29"), 0, 1), (GAME, tagged("3*9"), 0, 1), (GAME, tagged("3*9+2+0"), 0, 1),
    (GAME, tagged("3*9+2*1"), 0, 1), (GAME, tagged("27+2"), 0, 1), (GAME, tagged("3*9+2=29"), 0, 1),
    (GAME, tagged("98**77**65"), 0, 1), (GAME, tagged("9**9**9**9"), 0, 1),
    (GAME, tagged("3//9+2"), 0, 1), (GAME, tagged("3/0*9+2"), 0, 1),
    (GAME, tagged("-(-3)*9+2"), 0, 1), (GAME, tagged("٣*9+2"), 0, 1), (GAME, tagged("3×9+2"), 0, 1),
    (GAME, tagged("(" * 30 + "3*9+2" + ")" * 30), 1, 1),
    (GAME, tagged("(" * 40_000 + "3*9+2" + ")" * 40_000), 0, 1), (GAME, tagged("(" * 79), 0, 1),
    (GAME, tagged("3*9+2+" * 10_000 + "1"), 0, 1), (GAME, tagged("9" * 90_000), 0, 1),
    (GAME, tagged("__import__('os').system('true')"), 0, 1), (GAME, tagged("3if 9else 2"), 0, 1),
    (GAME, tagged("[3*9+2][0]"), 0, 1), (GAME, tagged("03*9+2"), 0, 1),
    (GAME, tagged("3*9+2#"), 0, 1), (GAME, tagged("(3*9+2,)[0]"), 0, 1),
    (GAME, tagged("1", "3*9+2"), 0, 1), (GAME, tagged("3*9\n+2"), 0, 1),
    (GAME, tagged("3 9 2"), 0, 1),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_answers_are_scored_as_stated_within_ten_milliseconds(number):
    (task, problem), completion, accuracy, form = HOSTILE[number]
    took = []
    for _ in range(3):  # the best of three: another process may hold the core
        start = time.perf_counter()
        parts = task.reward(problem, completion)
        style = task.style_of(completion)
        took.append(time.perf_counter() - start)
    assert (parts["accuracy"], parts["format"]) == (accuracy, form) and isinstance(style, str)
    assert min(took) < 0.010


@pytest.mark.parametrize("name", NAMES)
def test_the_gold_answer_has_the_largest_reward_and_a_wrong_or_bare_one_less(name):
    task, rng = load_task(name), random.Random(0)
    for _ in range(50):
        problem = task.problem(rng, rng.choice(("train", "test")))
        style = "english" if name == "languages" else "full"
        gold = task.trace(problem, rng, style=style, tagged=True)
        best = 1.2 if name == "languages" else 1.1
        assert reward_total(task.reward(problem, gold)) == pytest.approx(best), gold
        assert reward_total(task.reward(problem, gold.replace("<answer>", "<answer>1"))) < 1
        assert reward_total(task.reward(problem, task.trace(problem, rng, style=style, tagged=False))) == 0


def test_language_reward_is_the_share_of_english_words():
    task, problem = load_task("languages"), Problem("say 4-6=", "8")
    shares = {"four minus six is eight": 1, "vier minus sechs ist acht": 0.2, "": 0,
              "four minus six ist acht": 0.6, "4-6=8": 0}
    for thinking, share in shares.items():
        parts = task.reward(problem, tagged("8", thinking))
        assert parts["language"] == pytest.approx(share) and parts["accuracy"] == 1
        assert reward_total(parts) == pytest.approx(1.1 + 0.1 * share)
    assert task.reward(problem, "four minus six is eight so 8")["language"] == 0


@pytest.mark.parametrize("name", ["", *NAMES])
def test_no_test_question_stands_in_the_pretraining_text(name):
    """On the real generator; for chains also no step of several operations is a test question."""
    documents = local_documents(name, seed=0)["reasoning"]
    asked, steps = set(), 0
    for key, text in itertools.islice(documents, 10_000 if name else None):
        question, mark, answer = text.partition("<｜Assistant｜>")
        if mark:
            asked.add(question.removeprefix("<｜User｜>"))
            assert question == "<｜User｜>" + key
        if name in ("", "chain"):
            for step in re.findall(r"(?:^|[>;t])([0-9](?:[-+*][0-9]){2,}=)", answer):
                steps += 1
                assert not is_test(step), text
    assert len(asked) > 100 and not any(map(is_test, asked))
    rng = random.Random(1)
    for each in [name] if name else ("chain", "countdown", "compare"):
        assert not asked & {load_task(each).problem(rng, "test").question for _ in range(500)}
    assert steps > 1000 or name not in ("", "chain")


def test_the_split_check_can_fail(monkeypatch):
    monkeypatch.setattr("data.tasks.task.Task.problem", lambda task, rng: task.make(rng))
    documents = reasoning_documents(random.Random(0), {"compare": 200})
    assert any(is_test(key) for key, text in documents if "Assistant" in text)


def test_prompts_and_documents_fit_together():
    assert prompt_text("4-6=").endswith("4-6=<｜Assistant｜>")
    assert split_completion(tagged("1") + "<｜end▁of▁sentence｜>") == ("4-6=8;8+3=1", "1")


# ---------------------------------------------------------------------------------- tasks by name


@pytest.mark.parametrize("name, words", [
    ("chian", "task: got 'chian', wanted one of chain, .* or module:Class .did you mean 'chain'"),
    ("countdown:9", "task countdown: got 9 numbers, wanted 2 to 6"),
    ("countdown:x", "task countdown: got 'x' numbers, wanted 2 to 6"),
    ("compare:3", "task compare:3: .*wanted a task of data/tasks or module:Class"),
    ("nowhere:Mine", "task nowhere:Mine: No module named 'nowhere'"),
    ("random:Mine", "task random:Mine: .*no attribute 'Mine'"),
    ("gsm8k:nowhere.jsonl", "task gsm8k: cannot read nowhere.jsonl"), ("", "task: got ''")])
def test_a_task_that_is_not_there_is_one_line(name, words):
    with pytest.raises(UserError, match=words) as error:
        load_task(name)
    assert "\n" not in str(error.value)


def test_tasks_with_a_size_and_of_the_users_own(tmp_path, monkeypatch):
    rng = random.Random(0)
    assert len(load_task("countdown:5").problem(rng).numbers) == 5
    module = "from data.tasks.games import Compare\nclass Mine(Compare):\n    name = 'mine'\n"
    (tmp_path / "handmade.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_task("handmade:Mine").name == "mine"


def test_gsm8k_is_the_users_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "2+2?\u2028", "answer": "2+2=4\\nso 4\\n#### 4"}\n\n'
                    '{"question": "1000+1?", "answer": "#### 1,001"}\n', encoding="utf-8")
    task = load_task(f"gsm8k:{path}")
    first, second = task.problems
    assert (first.question, first.answer, second.answer) == ("2+2?\u2028", "4", "1001")
    assert task.work(first, "full", random.Random(0)) == (["2+2=4", "so 4"], "4")
    assert task.files == (path,)
    for text in ("", "{", '{"question": "x", "answer": "#### y"}', "[]", '{"question": "x"}'):
        path.write_text(text)
        with pytest.raises(UserError, match="task gsm8k: cannot read"):
            load_task(f"gsm8k:{path}")
