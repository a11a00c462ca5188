"""Which questions are asked, and what a set of answers to them is worth: rewards, errors over
questions, pass@k, majority@k, readability, tables.

Everything here looks at texts and rewards; nothing asks a model. An answer is right when its
accuracy is 1.
"""

import math
import random
import re
import textwrap
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import torch
from torch import Tensor

from data.io.checkpoint import write_json, write_text
from data.io.cli import UserError
from data.io.run import minutes
from data.tasks import task as verifier
from data.tasks.task import Problem, Task, prompt_text, split_completion

# ------------------------------------------------------------------------------ asking and judging


class Question(NamedTuple):
    """One question of a task, and the seed of the answers to it."""

    task: Task
    problem: Problem
    seed: int


class Room(NamedTuple):
    """What a model has room for: prompt and longest answer within its context."""

    encode: Callable[[str], list[int]]
    context: int
    max_new_tokens: int


def draw_questions(tasks: list[Task], split: str, where: str, slots: Iterable[int],
                   room: Room | None = None, **difficulty) -> list[Question]:
    """The questions of the numbered `slots`; what a slot asks depends on `where` and its number.

    A question that leaves no `room` for an answer is drawn again. Raises UserError when a thousand
    draws gave none.
    """
    questions = []
    for slot in slots:
        rng = random.Random(f"{where} {slot}")
        task, shortest = rng.choice(tasks), math.inf
        for _ in range(1000):
            problem = task.problem(rng, split, **difficulty)
            if room is None:
                break
            length = len(room.encode(prompt_text(problem.question)))
            if length + room.max_new_tokens <= room.context:
                break
            shortest = min(shortest, length)
        else:
            left = room.context - shortest
            wanted = f"at most {left}" if left > 0 else "shorter questions"
            raise UserError(f"max_new_tokens: got {room.max_new_tokens}; questions of {task.name} have "
                            f"{shortest} tokens or more and the context {room.context}, wanted {wanted}")
        questions.append(Question(task, problem, rng.getrandbits(62)))
    return questions


def judge(question: Question, text: str, folder: Path) -> dict[str, float]:
    """The rewards of an answer and their "total"; all 0 when the verifier breaks on it.

    The first text that broke it stays in `folder`. Raises UserError when the verifier breaks on the
    problem's own answer too.
    """
    rewards, error = verifier.judge(question.task, question.problem, text)
    path = folder / "broke_the_verifier.txt"
    if error and not path.exists():
        write_text(path, f"{question.problem}\n{text}\n")
    if error and verifier.is_at_fault(question.task, question.problem):
        raise UserError(f"the verifier of task {question.task.name} raised {error!r}; a question and "
                        f"the answer that it was given are in {path}") from error
    return rewards


# -------------------------------------------------------------------------------------- statistics


def known_styles(tasks: list[Task]) -> list[str]:
    """The styles of the tasks, and three that an answer may show whatever the task."""
    known = [style for task in tasks for style in task.styles]
    return list(dict.fromkeys([*known, "correction", "search", "other"]))


def style_of(task: Task, text: str) -> str:
    """The style that the task sees in a text; "other" where a user's task cannot say."""
    try:
        style = task.style_of(text)
    except Exception:  # whatever a user's code may raise: a style is looked at and nothing hangs on it
        return "other"
    return style if isinstance(style, str) else "other"


def style_columns(asked: list[Question], texts: list[str], known: list[str]) -> dict[str, Tensor]:
    """Which of N answers show each of the `known` styles: "style_<name>" -> (N,) bool."""
    styles = [style_of(question.task, text) for question, text in zip(asked, texts)]
    styles = [style if style in known else "other" for style in styles]
    return {f"style_{name}": torch.tensor([style == name for style in styles]) for name in known}


def means(columns: dict[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean of each column over the answers of all processes, and the quartiles of "length".

    columns: N values each, of this process; gather: (N, columns) -> the rows of all processes.
    """
    table = gather(torch.stack([each.flatten().double().cpu() for each in columns.values()], 1))
    values = dict(zip(columns, table.mean(0).tolist()))
    lengths = table[:, list(columns).index("length")]
    for name, share in (("length_q1", 0.25), ("length_q3", 0.75)):
        values[name] = int(lengths.quantile(share, interpolation="lower"))
    return values


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean over questions (Q,) and its standard error: answers to one question are not independent.

    The error of a single question is nan.
    """
    if len(values) == 1:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """Chance that one of k answers is right, per question (arXiv 2107.03374 eq 1).

    `1 - C(n - c, k) / C(n, k)` with c right answers of n. right (Q, n) bool -> (Q,) float64.

    >>> pass_at_k(torch.tensor([[True, False, False, False]]), 2)
    tensor([0.5000], dtype=torch.float64)
    """
    n, hits = right.shape[1], right.sum(1).tolist()
    chances = [1 - math.comb(n - c, k) / math.comb(n, k) for c in hits]
    return torch.tensor(chances, dtype=torch.float64)  # (Q,)


def tally(answers: Iterable[str | None]) -> list[tuple[str, int]]:
    """Each answer and how often it was given, the most frequent first; of equals the first seen.

    None, where there is no answer, is no vote.

    >>> tally(["3", "7", None, "7"])
    [('7', 2), ('3', 1)]
    """
    return Counter(answer for answer in answers if answer is not None).most_common()


def majority_at_k(votes: list[list[str | None]], right: Tensor, k: int, draws: int = 16) -> Tensor:
    """Chance that the most frequent of k answers is right, per question (R1's cons@k).

    votes: Q lists of n answers' texts, None where there is none, which is no vote; of equals the
    first seen wins. right (Q, n) bool -> (Q,) float64. Below all n answers it is a mean over
    `draws` random subsets.

    >>> majority_at_k([["7", "3", "7"]], torch.tensor([[True, False, True]]), 3)
    tensor([1.], dtype=torch.float64)
    """
    rng, chances = random.Random(0), []
    for texts, is_right in zip(votes, right.tolist()):
        known = dict(zip(texts, is_right))
        subsets = [texts]
        if k < len(texts):
            subsets = [rng.sample(texts, k) for _ in range(draws)]
        hits = 0
        for subset in subsets:
            winner = tally(subset)[:1]
            hits += bool(winner) and known[winner[0][0]]
        chances.append(hits / len(subsets))
    return torch.tensor(chances, dtype=torch.float64)  # (Q,)


# ------------------------------------------------------------------------------------- readability


def clean_style(task: Task) -> str:
    """The style of full work, in one language where a task has several."""
    for style in ("english", "search", "full"):
        if style in task.styles:
            return style
    return next(iter(task.styles))


def clean_forms(task: Task) -> set[str] | None:
    """Forms of steps and words in 200 clean traces of the task; None: they have no fixed form."""
    rng, forms = random.Random(0), set()
    try:
        for _ in range(200):
            trace = task.trace(task.problem(rng), rng, style=clean_style(task), tagged=True)
            forms |= forms_of(split_completion(trace)[0])
    except NotImplementedError:  # a user's task without `work`
        return None
    return forms if len(forms) < 200 else None


def forms_of(thinking: str) -> set[str]:
    """The words of a thought, and the forms of its steps.

    >>> sorted(forms_of("12-4=8 no;8+1=9"))
    ['0+0=0', '0-0=0 w', 'no']
    """
    steps = re.sub(r"[^\W\d]+", "w", re.sub("[0-9]+", "0", thinking)).split(";")
    return {*steps, *re.findall(r"[^\W\d]+", thinking)}


def is_readable(text: str, clean: set[str] | None) -> bool:
    """Well-formed, and each step and word is one of `clean_forms`.

    So there is no stray text, no skipped step and no second language.
    """
    parts = split_completion(text)
    return parts is not None and (clean is None or forms_of(parts[0]) <= clean)


def good_answers(asked: list[Question], texts: list[str], right: Tensor,
                 clean: dict[Task, set[str] | None]) -> dict[int, tuple[str, str]]:
    """The first right and readable answer to each question that has one: seed -> (question, answer).

    asked, texts, right: of each answer; clean: `clean_forms` of each task.
    """
    good: dict[int, tuple[str, str]] = {}
    for question, text, is_right in zip(asked, texts, right.flatten().tolist()):
        if is_right and is_readable(text, clean[question.task]):
            good.setdefault(question.seed, (question.problem.question, text))
    return good


# ------------------------------------------------------------------------------------ examinations


def examine(tasks: list[Task], texts: list[str], lengths: Tensor, right: Tensor, form: Tensor) -> dict:
    """What is known of n answers to each of Q questions; shares are [mean, standard error].

    tasks, texts (Q*n,) of each answer; its lengths (Q, n) in tokens; right (Q, n) bool; form (Q, n).
    Keys: accuracy (pass@1), pass and majority (by k), format, readable, length, tries (marks "?" per
    answer), styles (share and accuracy of each). JSON takes it as it is.
    """
    clean = {task: clean_forms(task) for task in set(tasks)}
    readable = [is_readable(text, clean[task]) for task, text in zip(tasks, texts)]
    styles = [style_of(task, text) for task, text in zip(tasks, texts)]
    found = {"accuracy": mean_error(right.double().mean(1)), "format": float(form.mean()),
             "readable": sum(readable) / len(texts), "length": float(lengths.double().mean()),
             "tries": sum(text.count("?") for text in texts) / len(texts), "styles": {}}
    for style in sorted(set(styles)):
        hits = [hit for one, hit in zip(styles, right.flatten().tolist()) if one == style]
        found["styles"][style] = [len(hits) / len(texts), sum(hits) / len(hits)]
    n = right.shape[1]
    answers = [parts and parts[1] for parts in map(split_completion, texts)]
    votes = [answers[i : i + n] for i in range(0, len(answers), n)]  # Q lists of n
    powers = [2**i for i in range(n.bit_length())]
    found["pass"] = {str(k): mean_error(pass_at_k(right, k)) for k in powers}
    found["majority"] = {str(k): mean_error(majority_at_k(votes, right, k)) for k in powers}
    return found


# --------------------------------------------------------------------------------- tables and files


def write_lines(path: str | Path, lines: list[str]) -> None:
    """Print the lines, and keep them in a file. Raises UserError when it cannot be written."""
    text = "\n".join(lines)
    print(text)
    write_text(path, text + "\n")


def side_by_side(questions: list[str], before: list, after: list, width: int = 44) -> str:
    """The same questions answered by the base and by the policy, in two columns.

    before, after: [step, text of each answer, whether each is right].
    """
    line = "─" * width
    lines = [f"{'the base':{width}} │ after {after[0]} steps"]
    for i, question in enumerate(questions):
        lines.append(f"{line}─┼─{line}\n{question}")
        sides = []
        for _, texts, right in (before, after):
            text = " ".join(texts[i].split()) + ("  ✓" if right[i] else "  ✗")
            sides.append(textwrap.wrap(text, width, break_on_hyphens=False))
        lines += [f"{one:{width}} │ {two}" for one, two in zip_longest(*sides, fillvalue="")]
    return "\n".join(lines)


def write_answers(path: Path, questions: list[Question], answers: list[list]) -> str:
    """Keep all answers beside the first ones, the base's, in a file; returns the last pair.

    answers: [step, text of each answer, whether each is right] after so many steps of RL.
    """
    asked = [question.problem.question for question in questions]
    pairs = [side_by_side(asked, answers[0], after) for after in answers[1:]]
    write_text(path, "\n\n".join(pairs) + "\n")
    return pairs[-1] if pairs else ""


def report(before: dict, after: dict) -> list[str]:
    """Two examinations side by side, as the lines of a table."""

    def column(found: dict) -> dict[str, str]:
        shares = {"pass@1": found["accuracy"]}
        for kind in ("pass", "majority"):
            shares |= {f"{kind}@{k}": share for k, share in found[kind].items() if k != "1"}
        cells = {name: f"{100 * mean:.1f} ± {100 * error:.1f} %" for name, (mean, error) in shares.items()}
        for name, key, unit in (("format in %", "format", 100), ("readable in %", "readable", 100),
                                ("length in tokens", "length", 1), ("tries (?)", "tries", 1)):
            if before[key] or after[key]:
                cells[name] = f"{unit * found[key]:.1f}  "
        for style in sorted(before["styles"] | after["styles"]):
            share, right = found["styles"].get(style, (0, 0))
            cells[f"{style}: share, right"] = f"{100 * share:.0f} %{100 * right:4.0f} %"
        return cells

    left, right = column(before), column(after)
    rows = [("", "the base", "after RL"), *zip(left, left.values(), right.values())]
    return [f"{name:26}{one:>16}{two:>16}" for name, one, two in rows]


def write_report(folder: Path, rows: list[dict], before: dict, after: dict) -> None:
    """The base beside the policy, printed and in report.txt and .json; and what the time went for.

    rows of log.csv with the columns rollout_s, score_s and update_s.
    """
    parts = ("rollout", "score", "update")
    took = [sum(float(row[f"{part}_s"]) for row in rows) for part in parts]
    shares = [f"{part} {100 * seconds / sum(took):.0f} %" for part, seconds in zip(parts, took)]
    print()
    write_lines(folder / "report.txt", [
        *report(before, after),
        f"time        {minutes(sum(took))}: {', '.join(shares)}; evaluation apart"])
    write_json(folder / "report.json", {"before": before, "after": after})


def table(groups: list[str], rows: dict[str, list[dict]]) -> list[str]:
    """Checkpoints one below the other: pass@1 in each group of tasks; form and length in the first."""
    head = [*(f"pass@1 {group}" for group in groups), "format", "readable", "length"]
    width = max(24, *(len(label) + 1 for label in rows))
    lines = [" " * width + "".join(f"{name:>{len(name) + 3}}" for name in head)]
    for label, found in rows.items():
        shares = [each["accuracy"][0] for each in found] + [found[0]["format"], found[0]["readable"]]
        cells = [*(f"{100 * share:.1f} %" for share in shares), f"{found[0]['length']:.1f}"]
        row = [f"{cell:>{len(name) + 3}}" for cell, name in zip(cells, head)]
        lines.append(f"{label:{width}}" + "".join(row))
    return lines
