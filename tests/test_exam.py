"""What answers are worth: pass@k, majority@k, errors, readability; and examples to fine-tune on."""

import itertools
import json
import random

import pytest
import torch

from data.io.cli import UserError
from data.tasks import __main__ as traces
from data.tasks import load_task
from data.tasks.exam import (clean_forms, clean_style, examine, forms_of, is_readable, majority_at_k, mean_error,
                             pass_at_k, report, side_by_side, table)
from data.tasks.task import Problem, Task, is_test, prompt_text, split_completion
from data.text.files import read_examples
from data.text.loader import IGNORE, Examples
from data.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("plainseek:1024")


class Silent(Task):
    """A task without `work`."""

    name = "silent"

    def make(self, rng):
        return Problem(f"say {rng.randrange(100_000)}", "g")


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = [[1, 0, 0, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]]
    right = torch.tensor(right, dtype=torch.bool)  # (Q, n)
    for k in range(1, 7):
        subsets = [list(itertools.combinations(row, k)) for row in right.tolist()]
        brute = [sum(map(any, each)) / len(each) for each in subsets]
        assert pass_at_k(right, k).tolist() == pytest.approx(brute, abs=1e-12)


def test_majority_at_k_is_the_mean_over_all_orders():
    votes = [["7", "7", "3", None, "3"], ["1", "2", "3", "4", "5"], [None] * 5, ["8", "8", "8", "2", None]]
    answers = "7 4 1 8".split()
    right = torch.tensor([[text == good for text in texts] for texts, good in zip(votes, answers)])
    for k in range(1, 5):
        brute = []
        for texts, good in zip(votes, answers):
            orders, wins = list(itertools.permutations(texts, k)), 0
            for order in orders:
                cast = [text for text in order if text is not None]
                ranked = max(cast, key=lambda text: (cast.count(text), -cast.index(text)), default=None)
                wins += ranked == good
            brute.append(wins / len(orders))
        found = majority_at_k(votes, right, k, draws=4000)
        assert found.tolist() == pytest.approx(brute, abs=0.04)
    assert majority_at_k(votes, right, 5).tolist() == [1, 0, 0, 1]


def test_errors_are_over_questions():
    mean, error = mean_error(torch.tensor([0.0, 1.0, 0.5, 0.5]))
    assert mean == 0.5 and error == pytest.approx((1 / 6) ** 0.5 / 2)
    mean, error = mean_error(torch.tensor([0.25]))
    assert mean == 0.25 and error != error  # one question has no spread: nan


def test_readable_is_written_as_clean_work():
    chain, languages = (clean_forms(load_task(name)) for name in ("chain", "languages"))
    good = "<think>4-6=8;8+3=1</think><answer>1</answer>"
    assert is_readable(good, chain)
    for bad in ("4-6=8;8+3=1 so 1", good + "x", good.replace(";", " wait "),
                good.replace("4-6=8;", "4-6+1=9;"), good.replace("=8;", "=8;the "),
                "<think></think><answer>1</answer>"):
        assert not is_readable(bad, chain), bad
    english = "<think>four minus six is eight</think><answer>8</answer>"
    assert is_readable(english, languages)
    assert not is_readable(english.replace("four", "vier"), languages)
    assert clean_forms(Silent()) is None  # well-formed is all there is to ask
    assert is_readable(good.replace(";", " wait "), None) and not is_readable("so 1", None)


def test_the_clean_style_is_full_work_in_one_language():
    styles = {name: clean_style(load_task(name)) for name in ("chain", "countdown", "languages")}
    assert styles == {"chain": "full", "countdown": "search", "languages": "english"}
    odd = Silent()
    odd.styles = {"proof": 1.0}
    assert clean_style(odd) == "proof"


def test_forms_are_steps_without_their_numbers_and_words():
    assert forms_of("12-4=8 no;7*2=14") == {"0-0=0 w", "0*0=0", "no"}
    assert forms_of("vier ist 4") == {"w w 0", "vier", "ist"}


def test_two_columns_hold_every_word_and_say_what_is_right():
    long = " ".join(f"word{i}" for i in range(40))
    text = side_by_side(["4-6=", "8+3="], [0, [long, "1"], [0.0, 1.0]], [25, ["8", ""], [1.0, 0.0]], width=20)
    lines = text.splitlines()
    assert lines[0] == f"{'the base':20} │ after 25 steps"
    assert lines[1] == "─" * 20 + "─┼─" + "─" * 20 and lines[2] == "4-6="
    cells = [line.split(" │ ") for line in lines if " │ " in line]
    left, right = (" ".join(cell.strip() for cell in side).split() for side in zip(*cells))
    assert left == ["the", "base", *long.split(), "✗", "1", "✓"]
    assert right == ["after", "25", "steps", "8", "✓", "✗"]
    assert max(map(len, lines)) <= 20 + 3 + 20


def examined(answers: list[list[str]]) -> dict:
    """Two questions of chain, whose right answers are 8 and 1."""
    task, problems = load_task("chain"), [Problem("4-6=", "8"), Problem("8+3=", "1")]
    parts = [[task.reward(problem, text) for text in row] for problem, row in zip(problems, answers)]
    right, form = (torch.tensor([[each[key] for each in row] for row in parts]) for key in ("accuracy", "format"))
    texts = sum(answers, [])
    lengths = torch.arange(1, len(texts) + 1)
    return json.loads(json.dumps(examine([task] * len(texts), texts, lengths, right > 0, form)))


def say(answer: str, thought: str = "4-6=8") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


BASE = [[say("8"), say("8", "4-6+1=9"), say("2", ""), "so 8"], [say("3"), "2?", "3?", say("3")]]
POLICY = [[say("8")] * 4, [say("1")] * 2 + [say("2")] * 2]


def test_an_examination_counts_by_hand():
    found = examined(BASE)
    assert found["accuracy"] == [0.25, pytest.approx(0.25)]  # means 0.5 and 0 of two questions
    assert (found["format"], found["readable"]) == (5 / 8, 3 / 8)
    assert (found["length"], found["tries"]) == (4.5, 2 / 8)
    assert found["styles"] == {"full": [3 / 8, 1 / 3], "guess": [4 / 8, 0], "skip": [1 / 8, 1]}
    assert {k: round(mean, 4) for k, (mean, _) in found["pass"].items()} == {
        "1": 0.25, "2": round((1 - 1 / 6) / 2, 4), "4": 0.5}
    assert found["majority"]["4"][0] == 0.5 and set(found["majority"]) == {"1", "2", "4"}


def test_reports_and_tables_show_every_number_in_its_column():
    before, after = examined(BASE), examined(POLICY)
    lines = {line[:26].strip(): line[26:].split() for line in report(before, after)}
    assert lines["pass@1"] == "25.0 ± 25.0 % 75.0 ± 25.0 %".split()
    assert lines["pass@4"] == "50.0 ± 50.0 % 100.0 ± 0.0 %".split()
    assert lines["format in %"] == ["62.5", "100.0"]
    assert lines["length in tokens"] == ["4.5", "4.5"]
    assert lines["skip: share, right"] == "12 % 100 % 0 % 0 %".split()
    head, one, two = table(["chain"], {"the base": [before], "after RL": [after]})
    assert head.split() == ["pass@1", "chain", "format", "readable", "length"]
    assert one.split() == "the base 25.0 % 62.5 % 37.5 % 4.5".split()
    assert two.split() == "after RL 75.0 % 100.0 % 100.0 % 4.5".split()
    assert len(head) == len(one) == len(two)


def test_examples_mask_the_question_and_the_padding_and_train_the_stop_token():
    answer = "<think>4-6=8</think><answer>8</answer>"
    loader = Examples([("4-6=", answer)], TOKENIZER, 32)
    tokens, targets = loader.next_batch(3)
    assert tokens.shape == targets.shape == (3, 32)
    kept = [token for token in targets[0].tolist() if token != IGNORE]
    assert TOKENIZER.decode(kept) == answer + "<｜end▁of▁sentence｜>"
    where = (targets[0] != IGNORE).nonzero().flatten()
    assert torch.equal(tokens[0, where[1:]], targets[0, where[:-1]])  # the token that follows
    assert TOKENIZER.decode(tokens[0, : where[0] + 1].tolist()) == prompt_text("4-6=")


def test_examples_that_do_not_fit_are_counted_and_some_must():
    size = len(TOKENIZER.encode_trusted(prompt_text("4-6=") + "8")) + 1  # and the stop token
    texts = [("4-6=", "8"), ("4-6=", "88"), ("4-6=", "8" * 100)]
    for seq_len, left_out in ((size - 1, 2), (size, 1), (200, 0)):
        loader = Examples(texts, TOKENIZER, seq_len)
        assert loader.left_out == left_out
        assert all(len(tokens) == seq_len for tokens in loader.next_batch(8)[0])
    with pytest.raises(UserError, match=f"no example fits into {size - 2} tokens, the shortest has "
                                        f"{size - 1}: use a larger --seq_len"):
        Examples(texts, TOKENIZER, size - 2)


def test_examples_are_the_same_for_any_number_of_ranks_and_after_a_resume():
    texts = [(f"{i}+1=", str(i + 1)) for i in range(50)]
    one = Examples(texts, TOKENIZER, 24, seed=5)
    two = [Examples(texts, TOKENIZER, 24, rank=rank, world_size=2, seed=5) for rank in range(2)]
    for _ in range(2):
        whole, parts = one.next_batch(8), [each.next_batch(8) for each in two]
        for rank in range(2):
            assert torch.equal(whole[0][rank::2], parts[rank][0])
            assert torch.equal(whole[1][rank::2], parts[rank][1])
    again = Examples(texts, TOKENIZER, 24, seed=5)
    again.load_state_dict(one.state_dict())
    assert torch.equal(one.next_batch(4)[0], again.next_batch(4)[0])
    others = [Examples(texts, TOKENIZER, 24, seed=6), Examples(texts, TOKENIZER, 25, seed=5),
              Examples(texts[1:], TOKENIZER, 24, seed=5)]
    for other in others:
        with pytest.raises(UserError, match="cannot continue"):
            other.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="7 sequences do not divide among 2 processes"):
        two[0].next_batch(7)


class Plain:
    """A loader of sevens that are followed by eights."""

    position = 0

    def next_batch(self, count):
        self.position += count
        return torch.full((count, 24), 7), torch.full((count, 24), 8)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_plain_text_is_mixed_in_whole_and_resumed():
    loader = Examples([("1+1=", "2")], TOKENIZER, 24, plain=Plain())
    tokens, targets = loader.next_batch(16)
    assert tokens.shape == (16, 24) and (targets == 8).all(1).sum() == 4 and loader.position == 12
    again = Examples([("1+1=", "2")], TOKENIZER, 24, plain=Plain())
    again.load_state_dict(loader.state_dict())
    assert again.plain.position == 4 and again.position == 12


def test_traces_are_clean_long_and_of_the_training_split():
    tasks = [load_task(name) for name in ("chain", "countdown", "languages")]
    pairs, again, other = (traces.clean_traces(tasks, 90, seed) for seed in (0, 0, 1))
    assert pairs == again != other
    clean = [clean_forms(task) for task in tasks]
    for i, (question, answer) in enumerate(pairs):
        assert not is_test(question) and is_readable(answer, clean[i % 3]), answer
    chain, rng = tasks[0], random.Random(0)
    usual = [chain.trace(chain.problem(rng), rng, style="full", tagged=True) for _ in range(600)]
    long = [answer for _, answer in traces.clean_traces([chain], 600, seed=0)]
    assert sum(map(len, long)) > 1.05 * sum(map(len, usual))  # each is the longer of two


def test_the_program_writes_examples_that_the_loader_reads(tmp_path, exit_code, capsys):
    path = tmp_path / "made" / "traces.jsonl"
    assert exit_code(traces.main, "chain,languages", 20, path, "--seed", 3) == 0
    assert "20 traces of chain,languages" in capsys.readouterr().out
    pairs = read_examples(path)
    tasks = [load_task("chain"), load_task("languages")]
    assert pairs == traces.clean_traces(tasks, 20, seed=3)
    assert all(split_completion(answer) for _, answer in pairs)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert list(json.loads(lines[0])) == ["question", "answer"] and len(lines) == 20
    assert Examples(pairs, TOKENIZER, 256).left_out == 0


@pytest.mark.parametrize("argv, words", [(["chain", "0", "x.jsonl"], "count: got 0, wanted at least 1"),
                                         (["chain", "5"], "file: got '', wanted a file to write, such as traces.jsonl"),
                                         (["chain", "5", "."], "file: got '.', wanted a file to write"),
                                         (["chian", "5", "x.jsonl"], "did you mean 'chain'"),
                                         (["tests.test_exam:Silent", "5", "x.jsonl"], "task silent: it has no `work`")])
def test_what_cannot_be_written_is_one_line(argv, words, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(traces.main, words, *argv)
    assert not list(tmp_path.iterdir())
