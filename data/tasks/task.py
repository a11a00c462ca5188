"""What a task is: a question, worked traces in several styles, and a verifier that parses.

A task serves twice. In pretraining its `trace`s are text, in a mixture of good and bad habits, as
the web is; in reinforcement learning its `reward` scores what the model says. Your own task is a
subclass with `make` and `work` (see `Compare` in data/tasks/games.py), named on the command line
as `module:Class`.

Train and test questions are told apart by a hash of the question, so no test question is in any
text.
"""

import hashlib
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from data.io.cli import UserError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MARK = "<｜"  # the beginning of every special token but the tags
TEST_SHARE = 16  # of 256 hash values

# Characters, some 2,500 tokens: a longer completion is malformed, and nobody reads beyond. Reward,
# style and readability of the worst text of this length take 2.5 ms on one slow core, so that an
# answer of any length is judged within 10 ms on a machine that is four times slower still.
LONGEST = 8_000
REWARDS = ("accuracy", "format", "language")  # that a verifier may give; accuracy it must


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

    Well-formed is `<think>...</think><answer>...</answer>`, and one EOS behind it or none; nothing
    before, between or after, not even a space; at most LONGEST characters. Thinking and answer may
    be empty and hold anything (line breaks, control characters, any script) but special tokens: a
    second tag, BOS, EOS, a role, padding, and so a whole turn of a dialogue, make it malformed.

    >>> split_completion("<think>2*3=6</think><answer>6</answer>")
    ('2*3=6', '6')
    >>> split_completion("so 6") is None
    True
    >>> split_completion("<think><｜User｜>2*3=</think><answer>6</answer>") is None
    True
    """
    if len(completion) > LONGEST:
        return None
    text = completion.removesuffix(EOS)
    if MARK in text or any(text.count(tag) != 1 for tag in TAGS):
        return None
    thinking, _, tail = text.partition("</think>")
    if not thinking.startswith("<think>"):
        return None
    if not (tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return thinking[len("<think>") :], tail[len("<answer>") : -len("</answer>")]


def parse_int(text: str) -> int | None:
    """A plain decimal integer, else None: `0`, or ASCII digits that do not begin with 0.

    A minus may stand before all but 0. At most 12 digits. Plain spaces around it count for nothing
    (at most 64 characters in all); any other white space, a plus sign, a leading zero, `-0`,
    `1,000`, `1.0` and digits of another script are refused.

    >>> [parse_int(text) for text in ("120", " -7 ", "0", "-0", "007", "+7", "1.0", "7\\n")]
    [120, -7, 0, None, None, None, None, None]
    """
    is_plain = len(text) <= 64 and re.fullmatch(" *(0|-?[1-9][0-9]{0,11}) *", text)
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
        """Whether the text between the answer tags solves the problem: the integer of `parse_int`.

        The text is the policy's, so that any string may come: yours must return False for what it
        does not understand, within milliseconds, and never run it.
        """
        return parse_int(answer) == int(problem.answer)

    def reward(self, problem: Problem, completion: str) -> dict[str, float]:
        """`accuracy` and `format`, 0 or 1 each; right counts in the right format only (R1 2.2.2).

        Yours may give accuracy alone, and shares of 1: right is an answer with accuracy 1.
        """
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
    return parts["accuracy"] + 0.1 * parts.get("format", 0.0) + 0.1 * parts.get("language", 0.0)


def judge(task: Task, problem: Problem, text: str) -> tuple[dict[str, float], Exception | None]:
    """The REWARDS of a completion with their "total", and what the verifier raised, or None.

    An answer on which the verifier raises, or gives anything but finite numbers with an accuracy,
    scores 0 in every part: no answer of a policy stops a run. See `is_at_fault`.
    """
    try:
        given = task.reward(problem, text)
        parts = {name: float(given.get(name, 0)) for name in REWARDS}
        parts["total"] = float(reward_total(given))
        if not all(map(math.isfinite, parts.values())):
            raise ValueError(f"wanted finite rewards, got {given}")
        return parts, None
    except Exception as error:  # whatever a user's verifier may raise
        return dict.fromkeys((*REWARDS, "total"), 0.0), error


def is_at_fault(task: Task, problem: Problem) -> bool:
    """Whether the verifier raises on the problem's own answer too: then the task is to blame."""
    text = f"<think></think><answer>{problem.answer}</answer>"
    return judge(task, problem, text)[1] is not None


def slip(rng: random.Random, step: str, right: int, wrong: int) -> tuple[str, int]:
    """A step that fails in 30 of 100 cases, of which 60 are noticed: its text, the value after it.

    The value that goes on is the right one unless the mistake stays unnoticed.
    """
    if rng.random() >= 0.3:
        return f"{step}={right}", right
    if rng.random() < 0.6:
        return f"{step}={wrong}wait {step}={right}", right
    return f"{step}={wrong}", wrong
