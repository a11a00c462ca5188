"""Reasoning tasks: a question, worked traces in several styles, and a verifier that parses.

A task serves twice. In pretraining its `trace`s are text, in a mixture of good and bad habits, as the web is;
in reinforcement learning its `reward` scores what the model says. Your own task is a subclass with `make` and
`work` (see `Compare`), named on the command line as `module:Class`.

Train and test questions are told apart by a hash of the question, so no test question is in any text.
"""

import ast
import hashlib
import importlib
import json
import operator
import random
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data import UserError, nearest

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEST_SHARE = 16  # of 256 hash values
LONGEST = 100_000  # characters; a longer completion is malformed
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Problem:
    """A question and its answer; the rest where a task needs it to judge an answer or to work it out."""

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

    Well-formed is `<think>...</think><answer>...</answer>` and nothing else, each tag once, at most
    LONGEST characters.

    >>> split_completion("<think>2*3=6</think><answer>6</answer>")
    ('2*3=6', '6')
    >>> split_completion("so 6") is None
    True
    """
    text = completion.removesuffix(EOS)
    if len(text) > LONGEST or any(text.count(tag) != 1 for tag in TAGS):
        return None
    thinking, _, tail = text.partition("</think>")
    if not (thinking.startswith("<think>") and tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return thinking[len("<think>"):], tail[len("<answer>"):-len("</answer>")]


def parse_int(text: str) -> int | None:
    """A plain decimal integer of at most 12 ASCII digits, else None."""
    return int(text) if len(text) <= 64 and re.fullmatch(r"\s*-?[0-9]{1,12}\s*", text) else None


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression of integers with + - * / and parentheses, else None.

    Nothing is run: Python's grammar gives a tree, of which only these four operators are computed, exactly.
    At most 80 characters and 4 digits a number.

    >>> parse_expression("(3+5)*2")
    (Fraction(16, 1), [3, 5, 2])
    >>> parse_expression("98**77**65") is None
    True
    """
    if len(text) > 80 or not re.fullmatch(r"[0-9+\-*/() ]+", text) or re.search(r"[0-9]{5}", text):
        return None
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, [int(number) for number in re.findall("[0-9]+", text)]


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant):  # an integer: the signs of anything else were refused
        return Fraction(node.value)
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    if not isinstance(node, ast.BinOp) or type(node.op) not in signs:
        raise ValueError("only integers and + - * / are allowed")
    return OPERATORS[signs[type(node.op)]](_value(node.left), _value(node.right))


class Task:
    """What pretraining and reinforcement learning need of a task; `make` and `work` are yours to write.

    `styles` are shares in pretraining text: a base model has seen good and bad habits, half of the time
    inside the tags, and reinforcement learning finds those that pay.
    """

    name = "task"
    styles = {"guess": 0.5, "full": 0.5}
    tagged = 0.5  # share of traces inside <think> and <answer>

    def make(self, rng: random.Random, **difficulty) -> Problem:
        """A random problem."""
        raise NotImplementedError

    def work(self, problem: Problem, style: str, rng: random.Random) -> tuple[list[str], str]:
        """Steps and final answer in any style but "guess", which has no steps and the right answer."""
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

    def trace(self, problem: Problem, rng: random.Random, style: str | None = None,
              tagged: bool | None = None) -> str:
        """One written answer. Style and tags are drawn from the mixture unless given."""
        style = style or rng.choices(list(self.styles), list(self.styles.values()))[0]
        steps, answer = ([], problem.answer) if style == "guess" else self.work(problem, style, rng)
        text = ";".join(steps)
        if tagged if tagged is not None else rng.random() < self.tagged:
            return f"<think>{text}</think><answer>{answer}</answer>"
        return f"{text} so {answer}" if steps else f"I guess {answer}"

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the text between the answer tags solves the problem."""
        return parse_int(answer) == int(problem.answer)

    def reward(self, problem: Problem, completion: str) -> dict[str, float]:
        """`accuracy` and `format`, 0 or 1 each; what is right counts only in the right format (R1 2.2.2)."""
        parts = split_completion(completion)
        is_right = parts is not None and self.is_right(problem, parts[1])
        return {"accuracy": float(is_right), "format": float(parts is not None)}

    def style_of(self, completion: str) -> str:
        """The habit that a completion shows: a key of `styles`, as far as its text alone tells."""
        thinking, mark, _ = completion[:LONGEST].replace(" so ", "</think>").partition("</think>")
        if "wait" in thinking and "correction" in self.styles:
            return "correction"
        return "full" if mark and re.search("[0-9]", thinking) else "guess"


def reward_total(parts: dict[str, float]) -> float:
    """The number that is maximised: accuracy + 0.1 format (+ 0.1 language where a task has it)."""
    return parts["accuracy"] + 0.1 * parts["format"] + 0.1 * parts.get("language", 0.0)


def slip(rng: random.Random, step: str, right: int, wrong: int) -> tuple[str, int]:
    """A step that fails in 30 of 100 cases, of which 60 of 100 are noticed: the text, and the value that goes on."""
    if rng.random() >= 0.3:
        return f"{step}={right}", right
    if rng.random() < 0.6:
        return f"{step}={wrong}wait {step}={right}", right
    return f"{step}={wrong}", wrong


class Chain(Task):
    """A chain from left to right, every result modulo 10: `4-6+3=` is `4-6=8`, `8+3=1`. The default task.

    Each step is one entry of a table of 300, and the whole cannot be guessed.

    >>> Chain().trace(Problem("4-6+3=", "1"), random.Random(0), style="full", tagged=True)
    '<think>4-6=8;8+3=1</think><answer>1</answer>'
    """

    name = "chain"
    styles = {"guess": 0.40, "skip": 0.15, "full": 0.30, "correction": 0.15}

    def make(self, rng, terms: int | None = None):
        digits = [str(rng.randrange(10)) for _ in range(terms or rng.randint(3, 8))]
        text = digits[0] + "".join(rng.choice("+-*") + digit for digit in digits[1:])
        return Problem(text + "=", str(self.run(text)))

    @staticmethod
    def run(text: str) -> int:
        """The value of a chain such as `4-6+3`, from left to right, modulo 10."""
        value = int(text[0])
        for sign, digit in zip(text[1::2], text[2::2]):
            value = OPERATORS[sign](value, int(digit)) % 10
        return value

    def work(self, problem, style, rng):
        value, rest, steps = int(problem.question[0]), problem.question[1:-1], []
        while rest:
            length = 2 * rng.randint(2, 3) if style == "skip" else 2
            if is_test(f"{value}{rest[:length]}="):  # a skipping step is a question too: no test question in text
                length = 2
            step, rest = f"{value}{rest[:length]}", rest[length:]
            value = self.run(step)
            text = f"{step}={value}"
            if style == "correction":
                text, value = slip(rng, step, value, (value + rng.randint(1, 9)) % 10)
            steps.append(text)
        return steps, str(value)

    def drill(self, rng, style: str = "full"):
        if rng.random() < 0.5:  # twelve entries of the table
            steps = [f"{rng.randrange(10)}{rng.choice('+-*')}{rng.randrange(10)}" for _ in range(12)]
            return ";".join(self.spell(f"{step}={self.run(step)}", style, rng) for step in steps)
        problem = self.problem(rng)  # and where the next term stands in the question
        return problem.question + ";".join(self.work(problem, style, rng)[0])

    def spell(self, step: str, style: str, rng: random.Random) -> str:
        """A step such as `4-6=8` as it is written in this style."""
        return step

    def style_of(self, completion):
        is_skip = re.search(r"[0-9][-+*][0-9][-+*][0-9](?:[-+*][0-9])?=", completion[:LONGEST])
        return "skip" if is_skip and "wait" not in completion else super().style_of(completion)


class Countdown(Task):
    """Use every number once to hit the target (TinyZero's game): `make 29: 3 9 2`.

    The trace is a search whose every try ends in a comparison: `3+9=12,12+2=14?29 no;3*9=27,27+2=29?29 yes`.
    """

    name, verb = "countdown", "make"
    styles = {"guess": 0.35, "full": 0.20, "search": 0.45}

    def __init__(self, count: int = 3):
        if not isinstance(count, int) or not 2 <= count <= 6:
            raise UserError(f"task {self.name}: got {count!r} numbers, wanted 2 to 6")
        self.count = count

    def draw(self, rng: random.Random, count: int | None) -> list[int]:
        """The numbers of a question."""
        count = count or self.count
        return [rng.randint(1, 20 if count == 2 else 9) for _ in range(count)]

    def may_use(self, used: list[int], numbers: tuple[int, ...]) -> bool:
        """Whether an answer may use these numbers."""
        return sorted(used) == sorted(numbers)

    def attempt(self, numbers: list[int], rng: random.Random) -> tuple[int, str, str]:
        """Join two random numbers at a time until one is left: its value, the expression, the steps."""
        pool, steps = [(number, str(number)) for number in numbers], []
        while len(pool) > 1:
            (a, left), (b, right) = sorted((pool.pop(rng.randrange(len(pool))) for _ in "ab"), reverse=True)
            sign = rng.choice("+-*") if a * b < 100 else rng.choice("+-")
            value = OPERATORS[sign](a, b)
            steps.append(f"{a}{sign}{b}={value}")
            pool.append((value, f"({left}{sign}{right})"))
        return value, pool[0][1][1:-1], ",".join(steps)

    def make(self, rng, count: int | None = None):
        while True:  # backwards: any expression gives a target
            numbers = self.draw(rng, count)
            target, solution, steps = self.attempt(numbers, rng)
            if 1 <= target <= 99:
                question = f"{self.verb} {target}: {' '.join(map(str, numbers))}"
                return Problem(question, solution, tuple(numbers), target, steps)

    def work(self, problem, style, rng):
        tries = [self.attempt(problem.numbers, rng) for _ in range(rng.randint(1, 5) if style == "search" else 0)]
        wrong = [f"{steps}?{problem.target} no" for value, _, steps in tries if value != problem.target]
        return [*wrong, f"{problem.steps}?{problem.target} yes"], problem.answer

    def drill(self, rng):
        lines = []
        for _ in range(6):
            value, _, steps = self.attempt(self.draw(rng, None), rng)
            target = value if rng.random() < 0.5 else rng.randint(1, 99)
            lines.append(f"{steps}?{target} {'yes' if value == target else 'no'}")
        return ";".join(lines)

    def is_right(self, problem, answer):
        parsed = parse_expression(answer)
        return parsed is not None and parsed[0] == problem.target and self.may_use(parsed[1], problem.numbers)

    def style_of(self, completion):
        tried = completion[:LONGEST].count("?")
        return "guess" if tried == 0 else "full" if tried == 1 else "search"


class FindTwo(Countdown):
    """Two of four to six numbers and one operation that hit the target: persistence pays. `find 14: 3 5 9 6`."""

    name, verb = "findtwo", "find"

    def __init__(self):
        super().__init__()

    def draw(self, rng, count):
        return [rng.randint(1, 9) for _ in range(count or rng.randint(4, 6))]

    def attempt(self, numbers, rng):
        return super().attempt(rng.sample(numbers, 2), rng)

    def may_use(self, used, numbers):
        return len(used) == 2 and all(used.count(number) <= numbers.count(number) for number in used)


class Compare(Task):
    """The larger of two numbers, found digit by digit. Also the example of a task in a few lines."""

    name = "compare"

    def make(self, rng, digits: int = 3):
        left, right = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        return Problem(f"larger: {left} or {right}", str(max(left, right)), (left, right))

    def work(self, problem, style, rng):
        steps = []
        for a, b in zip(*map(str, problem.numbers)):
            steps.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
            if a != b:
                break
        return steps, problem.answer


class Multiply(Task):
    """Two digits times one, with the carry: `47*8=` is `7*8=56;4*8+5=37`, so 376. Single steps are fallible."""

    name = "multiply"
    styles = {"guess": 0.45, "full": 0.25, "correction": 0.30}

    def make(self, rng, digits: int = 2):
        left, right = rng.randrange(10 ** (digits - 1), 10**digits), rng.randint(2, 9)
        return Problem(f"{left}*{right}=", str(left * right), (left, right))

    def work(self, problem, style, rng):
        left, right = problem.numbers
        value, written, steps = 0, "", []
        for place, digit in enumerate(reversed(str(left))):
            step = f"{digit}*{right}" + (f"+{value // 10}" if place else "")
            value = int(digit) * right + value // 10
            text = f"{step}={value}"
            if style == "correction":
                text, value = slip(rng, step, value, abs(value + rng.choice((-10, -1, 1, 10))))
            steps.append(text)
            written = f"{value % 10}{written}"
        return steps, f"{value // 10}{written}".lstrip("0") or "0"

    def drill(self, rng):
        triples = [(rng.randrange(10), rng.randint(2, 9), rng.randrange(9)) for _ in range(8)]
        return ";".join(f"{a}*{b}+{c}={a * b + c}" if c else f"{a}*{b}={a * b}" for a, b, c in triples)


class Sort(Task):
    """Put digits in order by taking the smallest of what is left, again and again."""

    name = "sort"

    def make(self, rng, count: int | None = None):
        digits = rng.choices("0123456789", k=count or rng.randint(3, 6))
        return Problem("sort " + "".join(digits), "".join(sorted(digits)))

    def work(self, problem, style, rng):
        left, steps = problem.question.split()[1], []
        for smallest in problem.answer:
            left = left.replace(smallest, "", 1)
            steps.append(f"{smallest} {left}".strip())
        return steps, problem.answer

    def is_right(self, problem, answer):
        return answer == problem.answer


class Words(Task):
    """Word problems from templates, worked one operation at a time."""

    name = "words"
    people = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna")
    things = ("apples", "books", "balls", "cakes", "stars", "boats")
    templates = (
        ("{who} has {a} {what}, finds {b} and gives {c} to {other}. How many {what} has {who}?", "+-"),
        ("{who} has {a} {what}. {other} has {b} more, and together they buy {c}. How many has {other} then?", "++"),
        ("{who} buys {a} boxes of {b} {what} and loses {c}. How many {what} are left?", "*-"),
        ("{who} buys {a} bags of {b} {what} and already has {c}. How many {what} now?", "*+"),
        ("There are {a} {what} on the table and {b} on the floor. {who} takes {c}. How many {what} stay?", "+-"),
        ("{who} and {other} pick {a} and {b} {what}. Each box holds {c} times as many. How many in a box?", "+*"),
        ("{who} had {a} {what} and broke {b}. {other} brings {c} new ones. How many {what} now?", "-+"),
        ("Of {a} {what} {who} gives away {b}, then {c}. How many {what} are left?", "--"))

    def make(self, rng):
        while True:
            template, signs = rng.choice(self.templates)
            a, b, c = (rng.randint(2, 9) for _ in "abc")
            first = OPERATORS[signs[0]](a, b)
            answer = OPERATORS[signs[1]](first, c)
            if first >= 0 and answer >= 0:
                who, other = rng.sample(self.people, 2)
                question = template.format(who=who, other=other, what=rng.choice(self.things), a=a, b=b, c=c)
                return Problem(question, str(answer), steps=f"{a}{signs[0]}{b}={first};{first}{signs[1]}{c}={answer}")

    def work(self, problem, style, rng):
        return problem.steps.split(";"), problem.answer


class TwoLanguages(Chain):
    """Chains spelled out in a mixture of English and German; the language reward asks for English (R1 2.3.2)."""

    name = "languages"
    styles = {"english": 0.25, "german": 0.25, "mixed": 0.5}
    words = {"english": "zero one two three four five six seven eight nine plus minus times is".split(),
             "german": "null eins zwei drei vier fünf sechs sieben acht neun plus minus mal ist".split()}

    def make(self, rng, terms: int | None = None):
        problem = super().make(rng, terms or rng.randint(2, 4))
        return Problem("say " + problem.question, problem.answer)

    def work(self, problem, style, rng):
        steps, answer = super().work(Problem(problem.question[4:], problem.answer), "full", rng)
        return [self.spell(step, style, rng) for step in steps], answer

    def spell(self, step, style, rng):
        languages = list(self.words.values()) if style == "mixed" else [self.words[style]]
        return " ".join(rng.choice(languages)["0123456789+-*=".index(sign)] for sign in step)

    def drill(self, rng):
        return super().drill(rng, rng.choice(list(self.words)))

    def reward(self, problem, completion):
        """Also `language`: words of English over all words of the thinking."""
        parts = split_completion(completion)
        words, english = re.findall(r"\w+", parts[0]) if parts else [], set(self.words["english"])
        share = sum(map(english.__contains__, words)) / max(len(words), 1)
        return super().reward(problem, completion) | {"language": share}

    def style_of(self, completion):
        words = set(re.findall(r"\w+", completion[:LONGEST])) - {"plus", "minus"}
        found = [name for name, language in self.words.items() if words & set(language)]
        return "mixed" if len(found) == 2 else found[0] if found else "guess"


class GSM8K(Task):
    """Grade-school problems from the user's own copy of the jsonl file: `--task gsm8k:path/train.jsonl`."""

    name = "gsm8k"

    def __init__(self, path: str = "gsm8k.jsonl"):
        try:
            rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
            pairs = [(row["question"], row["answer"].rsplit("####", 1)) for row in rows]
            self.problems = [Problem(question, str(int(end.replace(",", "")))) for question, (_, end) in pairs]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"task gsm8k: cannot read {path}: {error} (wanted its jsonl, as gsm8k:path)") from None
        self.solutions = {question: text.strip().splitlines() for question, (text, _) in pairs}

    def make(self, rng):
        return rng.choice(self.problems)

    def work(self, problem, style, rng):
        return self.solutions[problem.question], problem.answer


TASKS = {task.name: task for task in
         (Chain, Countdown, FindTwo, Compare, Multiply, Sort, Words, TwoLanguages, GSM8K)}


def load_task(name: str) -> Task:
    """A task by name: `chain`, `countdown:4`, `gsm8k:file.jsonl`, or `module:Class` for your own.

    Raises UserError for a name that is neither.
    """
    head, _, argument = name.partition(":")
    try:
        if head in TASKS:
            return TASKS[head](int(argument) if argument.isdecimal() else argument) if argument else TASKS[head]()
        if argument:
            sys.path += [""] * ("" not in sys.path)  # the user's own folder
            return getattr(importlib.import_module(head), argument)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"task {name}: {error} (wanted a task of data/tasks.py or module:Class)") from None
    raise UserError(f"task: got {name!r}, wanted one of {', '.join(TASKS)} or module:Class{nearest(name, TASKS)}")
