"""What a task is: a question, worked traces in several styles, and a verifier that parses.

A task serves twice. In pretraining its `trace`s are text, in a mixture of good and bad habits, as
the web is; in reinforcement learning its `reward` scores what the model says. Your own task is a
subclass with `make` and `work` (see `Compare` in data/tasks/games.py), named on the command line
as `module:Class`.

Train and test questions are told apart by a hash of the question, so no test question is in any
text.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from data.io.cli import UserError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEST_SHARE = 16  # of 256 hash values
LONGEST = 100_000  # characters; a longer completion is malformed


@dataclass(frozen=True)
class Problem:
    """A question and its answer; the rest where a task needs it to judge or to work it out."""

    question: str
    answer: str
    numbers: tuple[int, ...] = ()
    target: int = 0
    steps: str = ""


def is_test(question: str) -> bool:
    """Whether a question belongs to the test split: one in sixteen, by its hash."""
    return hashlib.sha256(question.encode()).digest()[0] < TEST_SHARE


def prompt_text(question: str) -> str:
    """What the model sees before it answers."""
    return f"{BOS}{USER}{question}{ASSISTANT}"


def split_completion(completion: str) -> tuple[str, str] | None:
    """Thinking and answer of a well-formed completion, else None.

    Well-formed is `<think>...</think><answer>...</answer>` and nothing else, each tag once, at
    most LONGEST characters.

    >>> split_completion("<think>2*3=6</think><answer>6</answer>")
    ('2*3=6', '6')
    >>> split_completion("so 6") is None
    True
    """
    text = completion.removesuffix(EOS)
    if len(text) > LONGEST or any(text.count(tag) != 1 for tag in TAGS):
        return None
    thinking, _, tail = text.partition("</think>")
    if not thinking.startswith("<think>"):
        return None
    if not (tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return thinking[len("<think>") :], tail[len("<answer>") : -len("</answer>")]


def parse_int(text: str) -> int | None:
    """A plain decimal integer of at most 12 ASCII digits, else None."""
    is_plain = len(text) <= 64 and re.fullmatch(r"\s*-?[0-9]{1,12}\s*", text)
    return int(text) if is_plain else None


class Task:
    """What pretraining and reinforcement learning need of a task; `make` and `work` are yours.

    `styles` are shares in pretraining text: a base model has seen good and bad habits, half of the
    time inside the tags, and reinforcement learning finds those that pay.
    """

    name = "task"
    styles = {"guess": 0.5, "full": 0.5}
    tagged = 0.5  # share of traces inside <think> and <answer>
    files: tuple[Path, ...] = ()  # that the questions are read from

    def make(self, rng: random.Random, **difficulty) -> Problem:
        """A random problem."""
        raise NotImplementedError

    def work(self, problem: Problem, style: str, rng: random.Random) -> tuple[list[str], str]:
        """Steps and final answer in any style but "guess", which has no steps and is right."""
        raise NotImplementedError

    def drill(self, rng: random.Random) -> str | None:
        """A text of single steps, each right: they make full work reliable. None: there is none."""
        return None

    def problem(self, rng: random.Random, split: str = "train", **difficulty) -> Problem:
        """A problem of the split. Raises UserError when a thousand draws gave none."""
        for _ in range(1000):
            problem = self.make(rng, **difficulty)
            if is_test(problem.question) == (split == "test"):
                return problem
        raise UserError(f"task {self.name}: no {split} question in 1,000 draws with {difficulty}: "
                        "widen the range")

    def trace(self, problem: Problem, rng: random.Random, style: str | None = None,
              tagged: bool | None = None) -> str:
        """One written answer. Style and tags are drawn from the mixture unless given."""
        style = style or rng.choices(list(self.styles), list(self.styles.values()))[0]
        if style == "guess":
            steps, answer = [], problem.answer
        else:
            steps, answer = self.work(problem, style, rng)
        text = ";".join(steps)
        if tagged is None:
            tagged = rng.random() < self.tagged
        if tagged:
            return f"<think>{text}</think><answer>{answer}</answer>"
        return f"{text} so {answer}" if steps else f"I guess {answer}"

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the text between the answer tags solves the problem."""
        return parse_int(answer) == int(problem.answer)

    def reward(self, problem: Problem, completion: str) -> dict[str, float]:
        """`accuracy` and `format`, 0 or 1 each; right counts in the right format only (R1 2.2.2)."""
        parts = split_completion(completion)
        is_right = parts is not None and self.is_right(problem, parts[1])
        return {"accuracy": float(is_right), "format": float(parts is not None)}

    def style_of(self, completion: str) -> str:
        """The habit that a completion shows: a key of `styles`, as far as its text alone tells."""
        text = completion[:LONGEST].replace(" so ", "</think>")
        thinking, mark, _ = text.partition("</think>")
        if "wait" in thinking and "correction" in self.styles:
            return "correction"
        return "full" if mark and re.search("[0-9]", thinking) else "guess"


def reward_total(parts: dict[str, float]) -> float:
    """What is maximised: accuracy + 0.1 format (+ 0.1 language where a task has it)."""
    return parts["accuracy"] + 0.1 * parts["format"] + 0.1 * parts.get("language", 0.0)


def slip(rng: random.Random, step: str, right: int, wrong: int) -> tuple[str, int]:
    """A step that fails in 30 of 100 cases, of which 60 are noticed: its text, the value after it.

    The value that goes on is the right one unless the mistake stays unnoticed.
    """
    if rng.random() >= 0.3:
        return f"{step}={right}", right
    if rng.random() < 0.6:
        return f"{step}={wrong}wait {step}={right}", right
    return f"{step}={wrong}", wrong
