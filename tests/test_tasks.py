"""Verifiers on hostile answers, and the split of questions: nothing that is asked at the end stands in the text."""

import itertools
import random
import re
import time

import pytest

from data.io.cli import UserError
from data.tasks import TASKS, load_task
from data.tasks.exam import clean_forms, is_readable
from data.tasks.task import (EOS, LONGEST, Problem, Task, is_at_fault, is_test, judge, prompt_text, reward_total,
                             split_completion)
from data.text.corpus import local_documents
from data.text.tokenizer import SPECIALS
from tests.conftest import refused

NAMES = [name for name in TASKS if name != "gsm8k"]
SPACES = "\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u200b\u3000\ufeff\0"  # and their kind


def tagged(answer: str, thinking: str = "4-6=8;8+3=1") -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def in_script(text: str, zero: int) -> str:
    """The text with its ASCII digits as those of another script."""
    return text.translate({ord("0") + i: zero + i for i in range(10)})


def answers(gold: str) -> list[str]:
    """Rules that make something out of the right answer that no strict reader takes, in any task."""
    edits = "0{0}|00{0}|+{0}|-{0}|--{0}|- {0}|~{0}|{0}.|{0}.0|{0}e0|{0}j|0x{0}|{0}_|0_{0}|{0} {0}|" \
            "{0},{0}|{0};{0}|{0}={0}|{0}=|={0}|{0}+0|{0}*1|{0}/1|{0}//1|{0}**1|[{0}][0]|({0},)[0]|" \
            "int({0})|{0}#|'{0}'|${0}$|\\boxed{{{0}}}|{0}if 1else 1|{0} apples|1{0}|{0}0|{0})|" \
            "nan|inf|True|None||9**9**9**9|__import__('os')|()|()()|1/0|\ud800|−{0}|{0}²|{0}\u0301"
    made = [edit.format(gold) for edit in edits.split("|")]
    for zero in (0x660, 0x966, 0xFF10, 0x1D7CE):  # all digits, and all but the first
        made += {in_script(gold, zero), gold[0] + in_script(gold[1:], zero)} - {gold}
    made += [text for space in SPACES for text in (space + gold, gold + space)]
    return made + [" " * 80 + gold, "0" * 7000 + gold, gold * 1000, "(" * 79, "(" * 3000 + gold]


def hostile(name: str, gold: str) -> list[tuple[str, int, int]]:
    """(completion, accuracy, format) of answers to a question whose right answer is `gold`."""
    good, marks = tagged(gold), [*SPECIALS, "<｜User｜>2*3=<｜Assistant｜>6", "<｜fim▁hole｜>"]
    room = LONGEST - len(tagged(gold, ""))
    strange = ["", "\0\x1c\n\t", "\ud800", "<think >", "</ think>", "<THINK>", "<|User|>", "User: 2*3=", "<", ">", "|",
               *((text * room)[:room] for text in ("a1;", "一;", "one ", "1+1=1;", " so ", "?"))]
    malformed = [*(tagged(gold, f"1{mark}2") for mark in marks), *(tagged(gold + mark) for mark in marks),
                 *(text for text in (good + end for end in (" ", "\n", ".", "<", *marks, EOS + EOS, good))
                   if text != good + EOS),
                 *(start + good for start in (" ", "\n", "so ", *marks)), gold, f"so {gold}", "", "\0" * 1000,
                 f"<answer>{gold}</answer><think></think>", f"<think><answer>{gold}</answer></think>",
                 f"<answer>{gold}</answer>", f"<think></think>{gold}", good[:-1], good[1:], good.upper(),
                 good.replace("</think>", "</think> "), "<think>" * 20_000, tagged(gold, "1" * (room + 1)),
                 tagged(gold, "一;" * 49_500), tagged("1;" * 49_500), tagged("1" * 5_000_000)]
    spaced = [f" {gold}", f"{gold} ", f"  {gold}  "]
    return [*((tagged(text), 0, 1) for text in answers(gold)),
            *((tagged(text), int(name != "sort"), 1) for text in spaced),
            *((tagged(gold, text), 1, 1) for text in strange), (good + EOS, 1, 1),
            *((text, 0, 0) for text in malformed)]


EXPRESSIONS = {  # beyond those rules: answer, accuracy
    "countdown": {"(9*3)+2": 1, " 2 + 3 * 9 ": 1, "(" * 30 + "3*9+2" + ")" * 30: 1, "2+3*9/1": 0,
                  "29": 0, "3*9": 0, "27+2": 0, "3*9+2*1": 0, "(3)(9)+2": 0, "3*09+2": 0, "3*9+02": 0,
                  "3*9- -2": 0, "3×9+2": 0, "3*9\n+2": 0, "3 9 2": 0, "3*9+2+00": 0},
    "findtwo": {"(9*3)": 1, "9 * 3": 1, "27": 0, "3*9+2-2": 0, "3*(9)": 1, "3*3*3": 0, "30-3": 0,
                "(3)(9)": 0, "3*09": 0, "3*9*1": 0}}


@pytest.mark.parametrize("name", TASKS)
def test_hostile_answers_are_scored_as_stated_within_ten_milliseconds(name, tmp_path):
    problems = {"chain": Problem("4-4=", "0"), "countdown": Problem("make 29: 3 9 2", "3*9+2", (3, 9, 2), 29),
                "findtwo": Problem("find 27: 3 9 2 5", "3*9", (3, 9, 2, 5), 27), "sort": Problem("sort 503", "035")}
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "2+3?", "answer": "2+3=5 #### 5"}')
    task = load_task(f"gsm8k:{path}" if name == "gsm8k" else name)
    problem = problems.get(name) or task.problem(random.Random(0))
    cases = [*hostile(name, problem.answer),
             *((tagged(text), right, 1) for text, right in EXPRESSIONS.get(name, {}).items())]
    assert len({completion for completion, _, _ in cases}) >= 60
    clean = clean_forms(task)
    for completion, accuracy, form in cases:
        for _ in range(5):  # another process may hold the core
            start = time.perf_counter()
            parts = task.reward(problem, completion)
            assert isinstance(task.style_of(completion), str)
            is_readable(completion, clean)
            took = time.perf_counter() - start
            if took < 0.010:
                break
        assert (parts["accuracy"], parts["format"]) == (accuracy, form), repr(completion[:200])
        assert took < 0.010, repr(completion[:200])
        assert judge(task, problem, completion) == ({"language": 0.0} | parts | {"total": reward_total(parts)}, None)


def test_an_answer_on_which_a_verifier_breaks_scores_nothing_and_the_task_is_told_apart():
    class Odd(Task):
        def reward(self, problem, completion):
            answer = completion.partition("<answer>")[2].removesuffix("</answer>")
            return {"accuracy": 1 / int(answer)} if answer != "none" else None

    problem = Problem("say 1", "1")
    assert judge(Odd(), problem, tagged("2")) == ({"accuracy": 0.5, "format": 0, "language": 0, "total": 0.5}, None)
    for answer, fault in (("0", ZeroDivisionError), ("x", ValueError), ("none", AttributeError)):
        parts, error = judge(Odd(), problem, tagged(answer))
        assert set(parts.values()) == {0} and "total" in parts and type(error) is fault
        assert not is_at_fault(Odd(), problem) and is_at_fault(Odd(), Problem("say", answer))
    for wrong in ({"format": 1.0}, {"accuracy": float("nan")}, {"accuracy": float("inf")}):
        Odd.reward = lambda task, problem, completion, wrong=wrong: wrong
        assert judge(Odd(), problem, "")[0]["total"] == 0 and is_at_fault(Odd(), problem)
    assert not any(is_at_fault(task, task.problem(random.Random(0))) for task in map(load_task, NAMES))


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


def test_language_reward_is_the_share_of_english_words_over_those_of_the_work_at_least():
    task, problem, good = load_task("languages"), Problem("say 4-6=", "8"), "four minus six is eight"
    shares = {good: 1, "vier minus sechs ist acht": 0.2, "": 0, "four minus six ist acht": 0.6,
              "4-6=8": 0, "one": 0.2, "eight is": 0.4, f"{good};{good}": 1, f"{good};vier ist": 5 / 7}
    for thinking, share in shares.items():
        parts = task.reward(problem, tagged("8", thinking))
        assert parts["language"] == pytest.approx(share) and parts["accuracy"] == 1
        assert reward_total(parts) == pytest.approx(1.1 + 0.1 * share)
    assert task.reward(problem, f"{good} so 8")["language"] == 0
    two = Problem("say 4-6+3=", "1")  # two steps, of which one is missing
    assert task.reward(two, tagged("1", good))["language"] == 0.5


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


def test_prompts_and_documents_fit_together():
    assert prompt_text("4-6=").endswith("4-6=<｜Assistant｜>")
    assert split_completion(tagged("1") + "<｜end▁of▁sentence｜>") == ("4-6=8;8+3=1", "1")


@pytest.mark.parametrize("name, words", [
    ("chian", "task: got 'chian', wanted one of chain, .* or module:Class .did you mean 'chain'"),
    ("countdown:9", "task countdown: got 9 numbers, wanted 2 to 6"),
    ("countdown:x", "task countdown: got 'x' numbers, wanted 2 to 6"),
    ("compare:3", "task compare:3: .*wanted a task of data/tasks or module:Class"),
    ("nowhere:Mine", "task nowhere:Mine: No module named 'nowhere'"),
    ("random:Mine", "task random:Mine: .*no attribute 'Mine'"),
    ("gsm8k:nowhere.jsonl", "task gsm8k: cannot read nowhere.jsonl"), ("", "task: got ''")])
def test_a_task_that_is_not_there_is_one_line(name, words):
    with refused(words):
        load_task(name)


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
    for text in ("", "{", '{"question": "x", "answer": "#### y"}', "[]", '{"question": "x"}',
                 '{"question": "x", "answer": "#### 1234567890123"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="task gsm8k: cannot read"):
            load_task(f"gsm8k:{path}")
