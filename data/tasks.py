"""Reasoning tasks: a question, worked traces in several styles, and a verifier that parses.

A task serves twice. In pretraining its `trace`s are text, in a mixture of good and bad habits, as the web
is; in reinforcement learning its `reward` scores what the model says. Your own task is a subclass with
`make` and `work` (see `Compare`), named on the command line as `module:Class`.

Train and test questions are told apart by a hash of the question, so no test question is in any text.
"""

import ast
import hashlib
import importlib
import json
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data import UserError, nearest

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEST_SHARE = 16  # of 256 hash values
LONGEST = 100_000  # characters; a longer completion is malformed


@dataclass(frozen=True)
class Problem:
    """A question and its answer; `numbers` and `target` where the answer is an expression."""

    question: str
    answer: str
    numbers: tuple[int, ...] = ()
    target: int = 0


def is_test(question: str) -> bool:
    """Whether a question belongs to the test split: one in sixteen, by its hash."""
    return hashlib.sha256(question.encode()).digest()[0] < TEST_SHARE


def prompt_text(question: str) -> str:
    """What the model sees before it answers."""
    return f"{BOS}{USER}{question}{ASSISTANT}"


def document(problem: Problem, trace: str) -> str:
    """Question and answer as one text for pretraining."""
    return prompt_text(problem.question) + trace + EOS


def split_completion(completion: str) -> tuple[str, str] | None:
    """Thinking and answer of a well-formed completion, else None.

    Well-formed is `<think>...</think><answer>...</answer>` and nothing else, each tag once, at most
    LONGEST characters.

    >>> split_completion("<think>2*3=6</think><answer>6</answer>")
    ('2*3=6', '6')
    >>> split_completion("so 6") is None
    True
    """
    if len(completion) > LONGEST:
        return None
    text = completion.removesuffix(EOS)
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    thinking, _, tail = text.rpartition("</think>")
    if not (thinking.startswith("<think>") and tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return thinking[len("<think>"):], tail[len("<answer>"):-len("</answer>")]


def parse_int(text: str) -> int | None:
    """A plain decimal integer of at most 12 ASCII digits, else None."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,12})\s*", text[:64])
    return int(found[1]) if found and len(text) <= 64 else None


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression of integers with + - * / and parentheses, else None. Nothing is run.

    >>> parse_expression("(3+5)*2")
    (Fraction(16, 1), [3, 5, 2])
    >>> parse_expression("98**77**65") is None
    True
    """
    if not re.fullmatch(r"[0-9+\-*/() ]{1,80}", text) or re.search(r"[0-9]{5}", text):
        return None
    try:
        numbers = []
        return _value(ast.parse(text.strip(), mode="eval").body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not allowed")
    left, right = _value(node.left, numbers), _value(node.right, numbers)
    if isinstance(node.op, ast.Div):
        return left / right
    return _apply(left, {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}.get(type(node.op)), right)


def _apply(left, operator: str | None, right):
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"operator {operator!r} is not allowed")


class Task:
    """What pretraining and reinforcement learning need of a task; `make` and `work` are yours to write."""

    name = "task"
    styles = {"guess": 0.50, "skip": 0.25, "full": 0.13, "slip": 0.12}  # shares in pretraining text
    tagged = 0.5  # share of traces inside <think> and <answer>

    def make(self, rng: random.Random, **difficulty) -> Problem:
        """A random problem."""
        raise NotImplementedError

    def work(self, problem: Problem, style: str, rng: random.Random) -> tuple[list[str], str]:
        """Steps and final answer in one style; the answer of a slip may be wrong, guesses have no steps."""
        raise NotImplementedError

    def drill(self, rng: random.Random) -> str | None:
        """A text of single steps, each right; they make full work reliable. None where there is none."""
        return None

    def problem(self, rng: random.Random, split: str = "train", **difficulty) -> Problem:
        """A problem of the split. Raises UserError when a thousand draws gave none."""
        for _ in range(1000):
            problem = self.make(rng, **difficulty)
            if is_test(problem.question) == (split == "test"):
                return problem
        raise UserError(f"task {self.name}: no {split} question in 1,000 draws with {difficulty}: widen the range")

    def trace(self, problem: Problem, rng: random.Random, style: str | None = None, tagged: bool | None = None) -> str:
        """One written answer. Style and tags are drawn from the mixture unless given."""
        style = style or rng.choices(list(self.styles), list(self.styles.values()))[0]
        steps, answer = self.work(problem, style, rng)
        text = ";".join(steps)
        if tagged if tagged is not None else rng.random() < self.tagged:
            return f"<think>{text}</think><answer>{answer}</answer>"
        return f"{text} so {answer}" if steps else f"I guess {answer}"

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the text between the answer tags solves the problem."""
        return parse_int(answer) == int(problem.answer)

    def reward(self, problem: Problem, completion: str) -> dict[str, float]:
        """`accuracy` and `format`, 0 or 1 each; what is right counts only in the right format (R1 section 2.2.2)."""
        parts = split_completion(completion)
        is_right = parts is not None and self.is_right(problem, parts[1])
        return {"accuracy": float(is_right), "format": float(parts is not None)}

    def style_of(self, completion: str) -> str:
        """The style that a completion is written in: guess, skip, full, or correction."""
        completion = completion[:LONGEST]
        if "wait" in completion:
            return "correction"
        steps = re.findall(r"[0-9]{1,12}(?:[-+*/][0-9]{1,12})+(?==)", completion)
        if not steps:
            return "guess"
        return "skip" if any(len(re.findall(r"[-+*/]", step)) > 1 for step in steps) else "full"


def reward_total(parts: dict[str, float]) -> float:
    """The number that is maximised: accuracy + 0.1 format (+ 0.1 language where a task has it)."""
    return parts["accuracy"] + 0.1 * parts["format"] + 0.1 * parts.get("language", 0.0)


def slip(rng: random.Random, step: str, right: int, wrong: int) -> tuple[str, int]:
    """A step that fails in 30 of 100 cases, of which 60 of 100 are noticed: the text and the value that goes on."""
    if rng.random() >= 0.3:
        return f"{step}={right}", right
    if rng.random() < 0.6:
        return f"{step}={wrong}wait {step}={right}", right
    return f"{step}={wrong}", wrong


class Chain(Task):
    """A chain from left to right, every result modulo 10: `4-6+3=` is `4-6=8`, `8+3=1`.

    Each step is one entry of a table of 300, and the whole cannot be guessed. The default task.

    >>> Chain().trace(Problem("4-6+3=", "1"), random.Random(0), style="full", tagged=True)
    '<think>4-6=8;8+3=1</think><answer>1</answer>'
    """

    name = "chain"

    def make(self, rng, terms: int | None = None):
        count = terms or rng.randint(3, 8)
        digits = [str(rng.randrange(10)) for _ in range(count)]
        question = digits[0] + "".join(rng.choice("+-*") + digit for digit in digits[1:])
        return Problem(question + "=", str(self.run(int(question[0]), question[1:])))

    @staticmethod
    def run(value: int, rest: str) -> int:
        """Apply a rest such as `-6+3` from left to right, modulo 10."""
        for operator, digit in zip(rest[::2], rest[1::2]):
            value = _apply(value, operator, int(digit)) % 10
        return value

    def work(self, problem, style, rng):
        if style == "guess":
            return [], problem.answer
        value, rest, steps = int(problem.question[0]), problem.question[1:-1], []
        while rest:
            length = 2 * rng.randint(2, 3) if style == "skip" else 2
            part, rest = rest[:length], rest[length:]
            step, right = f"{value}{part}", self.run(value, part)
            if style == "slip":
                text, value = slip(rng, step, right, (right + rng.randint(1, 9)) % 10)
            else:
                text, value = f"{step}={right}", right
            steps.append(text)
        return steps, str(value)

    def drill(self, rng):
        steps = [f"{rng.randrange(10)}{rng.choice('+-*')}{rng.randrange(10)}" for _ in range(12)]
        return ";".join(f"{step}={self.run(int(step[0]), step[1:])}" for step in steps)


class Expression(Task):
    """Tasks whose answer is an expression over given numbers that hits a target; traces are searches."""

    styles = {"guess": 0.35, "full": 0.65}

    def tries(self, problem: Problem, rng: random.Random) -> list[str]:
        """Expressions to try, the last one right."""
        raise NotImplementedError

    def work(self, problem, style, rng):
        tries = self.tries(problem, rng)
        if style == "guess":
            return [], rng.choice(tries)
        return [self.check(text, problem.target) for text in tries], tries[-1]

    def check(self, expression: str, target: int) -> str:
        """An expression worked out and held against the target: `3+5=8? no`."""
        value = parse_expression(expression)[0]
        return f"{expression}={value}{' yes' if value == target else ' no'}"

    def drill(self, rng):
        lines = []
        for _ in range(6):
            problem = self.make(rng)
            lines.append(f"{problem.target}:" + self.check(rng.choice(self.tries(problem, rng)), problem.target))
        return ";".join(lines)

    def is_right(self, problem, answer):
        parsed = parse_expression(answer)
        return parsed is not None and parsed[0] == problem.target and self.may_use(parsed[1], problem)

    def may_use(self, used: list[int], problem: Problem) -> bool:
        """Whether these numbers may be used."""
        return sorted(used) == sorted(problem.numbers)

    def style_of(self, completion):
        tried = completion.count(" no") + completion.count(" yes")
        return "guess" if tried == 0 else "full" if tried == 1 else "search"


class Countdown(Expression):
    """Use every number once to hit the target (TinyZero's game): `make 24: 2 3 9`."""

    name = "countdown"

    def __init__(self, count: int = 3):
        self.count = count

    def random_expression(self, numbers: list[int], rng: random.Random) -> str:
        order = rng.sample(numbers, len(numbers))
        text = str(order[0])
        for number in order[1:]:
            bare = f"({text})" if re.search(r"[-+]", text) else text
            operator = rng.choice("+-*")
            text = f"{bare if operator == '*' else text}{operator}{number}"
        return text

    def make(self, rng, count: int | None = None):
        while True:  # backwards: any expression gives a target
            numbers = [rng.randint(1, 9) for _ in range(count or self.count)]
            solution = self.random_expression(numbers, rng)
            target = int(parse_expression(solution)[0])
            if 1 <= target <= 99:
                question = f"make {target}: {' '.join(map(str, numbers))}"
                return Problem(question, solution, tuple(numbers), target)

    def tries(self, problem, rng):
        wrong = [self.random_expression(list(problem.numbers), rng) for _ in range(rng.randint(0, 3))]
        return [text for text in wrong if parse_expression(text)[0] != problem.target] + [problem.answer]


class FindTwo(Expression):
    """Two of the numbers and one operation that hit the target: persistence pays. `find 14: 3 5 9 6`."""

    name = "findtwo"

    def make(self, rng, count: int | None = None):
        numbers = [rng.randint(1, 9) for _ in range(count or rng.randint(4, 6))]
        left, right = rng.sample(numbers, 2)
        solution = f"{left}{rng.choice('+*')}{right}"
        target = int(parse_expression(solution)[0])
        return Problem(f"find {target}: {' '.join(map(str, numbers))}", solution, tuple(numbers), target)

    def tries(self, problem, rng):
        wrong = []
        for _ in range(rng.randint(0, 5)):
            left, right = rng.sample(problem.numbers, 2)
            wrong.append(f"{left}{rng.choice('+*')}{right}")
        return [text for text in wrong if parse_expression(text)[0] != problem.target] + [problem.answer]

    def may_use(self, used, problem):
        return len(used) == 2 and all(used.count(n) <= problem.numbers.count(n) for n in used)


class Compare(Task):
    """The larger of two numbers, found digit by digit. Also the example of a task in a few lines."""

    name = "compare"
    styles = {"guess": 0.5, "full": 0.5}

    def make(self, rng, digits: int = 3):
        left, right = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        return Problem(f"larger: {left} or {right}", str(max(left, right)))

    def work(self, problem, style, rng):
        if style == "guess":
            return [], problem.answer
        left, right = re.findall(r"[0-9]+", problem.question)
        steps = []
        for a, b in zip(left, right):
            steps.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
            if a != b:
                break
        return steps, problem.answer

    def style_of(self, completion):
        return "full" if re.search(r"[0-9][<=>][0-9]", completion) else "guess"


class Multiply(Task):
    """Two digits times one, with partial products; single steps are fallible, so checking can pay."""

    name = "multiply"

    def make(self, rng, digits: int = 2):
        left, right = rng.randrange(10 ** (digits - 1), 10**digits), rng.randint(2, 9)
        return Problem(f"{left}*{right}=", str(left * right))

    def work(self, problem, style, rng):
        if style == "guess":
            return [], problem.answer
        left, right = map(int, re.findall(r"[0-9]+", problem.question))
        total, steps = 0, []
        for place, digit in enumerate(reversed(str(left))):
            step, part = f"{int(digit) * 10**place}*{right}", int(digit) * 10**place * right
            if style == "slip":
                text, part = slip(rng, step, part, max(0, part + rng.choice((-10, 10, -1, 1))))
            else:
                text = f"{step}={part}"
            steps.append(text)
            if style != "skip" and total:
                steps.append(f"{total}+{part}={total + part}")
            total += part
        return steps, str(total)

    def drill(self, rng):
        parts = [(rng.randint(1, 9) * 10 ** rng.randint(0, 1), rng.randint(2, 9)) for _ in range(5)]
        sums = [(rng.randint(2, 81), 10 * rng.randint(1, 81)) for _ in range(4)]
        return ";".join([f"{a}*{b}={a * b}" for a, b in parts] + [f"{a}+{b}={a + b}" for a, b in sums])


class Sort(Task):
    """Put digits in order by taking the smallest of what is left, again and again."""

    name = "sort"
    styles = {"guess": 0.5, "full": 0.5}

    def make(self, rng, count: int | None = None):
        digits = rng.choices("0123456789", k=count or rng.randint(3, 6))
        return Problem("sort " + "".join(digits), "".join(sorted(digits)))

    def work(self, problem, style, rng):
        if style == "guess":
            return [], problem.answer if rng.random() < 0.5 else "".join(rng.sample(problem.answer, len(problem.answer)))
        left, steps = problem.question.split()[1], []
        while left:
            smallest = min(left)
            left = left.replace(smallest, "", 1)
            steps.append(f"{smallest} {left}".strip())
        return steps, problem.answer

    def is_right(self, problem, answer):
        return answer.strip() == problem.answer

    def style_of(self, completion):
        return "full" if ";" in completion else "guess"


class Words(Task):
    """Small word problems from templates; two steps."""

    name = "words"
    styles = {"guess": 0.5, "full": 0.5}
    people = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna")
    things = ("apples", "books", "balls", "cakes", "stars", "boats")

    def make(self, rng):
        who, what = rng.choice(self.people), rng.choice(self.things)
        has, gets, loses = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
        if loses > has + gets:
            return self.make(rng)
        question = f"{who} has {has} {what}, finds {gets} and gives away {loses}. How many {what}?"
        return Problem(question, str(has + gets - loses), (has, gets, loses))

    def work(self, problem, style, rng):
        has, gets, loses = problem.numbers
        steps = [f"{has}+{gets}={has + gets}", f"{has + gets}-{loses}={problem.answer}"]
        return ([] if style == "guess" else steps), problem.answer


class TwoLanguages(Chain):
    """Chains spelled out in a mixture of English and German; the language reward asks for English (R1 section 2.3.2)."""

    name = "languages"
    styles = {"english": 0.25, "german": 0.25, "mixed": 0.5}
    english = "zero one two three four five six seven eight nine plus minus times is".split()
    german = "null eins zwei drei vier fünf sechs sieben acht neun plus minus mal ist".split()

    def make(self, rng, terms: int | None = None):
        problem = super().make(rng, terms or rng.randint(2, 4))
        return Problem("say " + problem.question, problem.answer)

    def work(self, problem, style, rng):
        steps, answer = super().work(Problem(problem.question[4:], problem.answer), "full", rng)
        return [self.spell(step, style, rng) for step in steps], answer

    def drill(self, rng):
        return ";".join(self.spell(step, "mixed", rng) for step in super().drill(rng).split(";"))

    def spell(self, step: str, style: str, rng: random.Random) -> str:
        language = {"english": self.english, "german": self.german}.get(style) or rng.choice((self.english, self.german))
        return " ".join(language["0123456789+-*=".index(sign)] for sign in step)

    def reward(self, problem, completion):
        parts = split_completion(completion)
        words = re.findall(r"\w+", parts[0]) if parts else []
        known = sum(word in self.english for word in words)
        return super().reward(problem, completion) | {"language": known / len(words) if words else 0.0}

    def style_of(self, completion):
        words = set(re.findall(r"\w+", completion[:LONGEST])) - {"plus", "minus"}
        has = [bool(words & set(language)) for language in (self.english, self.german)]
        return {(True, False): "english", (False, True): "german", (True, True): "mixed"}.get(tuple(has), "guess")


class GSM8K(Task):
    """Grade-school problems from the user's own copy of the jsonl file: `--task gsm8k:path/train.jsonl`."""

    name = "gsm8k"

    def __init__(self, path: str = "gsm8k.jsonl"):
        try:
            rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
            self.rows = [(row["question"], *row["answer"].split("####")) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"task gsm8k: cannot read {path}: {error} (wanted its jsonl, as gsm8k:path)") from None

    def make(self, rng):
        question, trace, answer = rng.choice(self.rows)
        return Problem(question, answer.strip().replace(",", ""))

    def work(self, problem, style, rng):
        text = next(trace for question, trace, _ in self.rows if question == problem.question)
        return text.strip().splitlines(), problem.answer


TASKS = {task.name: task for task in
         (Chain, Countdown, FindTwo, Compare, Multiply, Sort, Words, TwoLanguages, GSM8K)}


def load_task(name: str) -> Task:
    """A task by name: `chain`, `countdown:4`, `gsm8k:file.jsonl`, or `module:Class` for your own.

    Raises UserError for a name that is neither.
    """
    head, _, argument = name.partition(":")
    if head in TASKS:
        try:
            return TASKS[head](int(argument) if argument.isdigit() else argument) if argument else TASKS[head]()
        except TypeError:
            raise UserError(f"task {head} takes no argument, got {argument!r}") from None
    if not argument:
        raise UserError(f"task: got {name!r}, wanted one of {', '.join(TASKS)} or module:Class{nearest(name, TASKS)}")
    try:
        return getattr(importlib.import_module(head), argument)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"task {name}: {error} (wanted module:Class, a Task without arguments)") from None
