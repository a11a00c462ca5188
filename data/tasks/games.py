"""The tasks: chains, countdown, comparing, multiplying, sorting, word problems, languages, GSM8K."""

import ast
import json
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

from data.io.cli import UserError
from data.tasks.task import LONGEST, Problem, Task, is_test, parse_int, slip, split_completion

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Chain(Task):
    """A chain from left to right, every result modulo 10: `4-6+3=` is `4-6=8`, `8+3=1`.

    The default task. Each step is one entry of a table of 300, and the whole cannot be guessed.

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
            if is_test(f"{value}{rest[:length]}="):
                length = 2  # a skipping step is a question too: no test question in text
            step, rest = f"{value}{rest[:length]}", rest[length:]
            value = self.run(step)
            text = f"{step}={value}"
            if style == "correction":
                text, value = slip(rng, step, value, (value + rng.randint(1, 9)) % 10)
            steps.append(text)
        return steps, str(value)

    def drill(self, rng, style: str = "full"):
        if rng.random() < 0.5:  # twelve entries of the table
            pairs = [f"{rng.randrange(10)}{rng.choice('+-*')}{rng.randrange(10)}" for _ in range(12)]
            return ";".join(self.spell(f"{pair}={self.run(pair)}", style, rng) for pair in pairs)
        problem = self.problem(rng)  # and where the next term stands in the question
        return problem.question + ";".join(self.work(problem, style, rng)[0])

    def spell(self, step: str, style: str, rng: random.Random) -> str:
        """A step such as `4-6=8` as it is written in this style."""
        return step

    def style_of(self, completion):
        text = completion[:LONGEST]
        is_skip = re.search(r"[0-9][-+*][0-9][-+*][0-9](?:[-+*][0-9])?=", text)
        if is_skip and "wait" not in text:
            return "skip"
        return super().style_of(completion)


class Countdown(Task):
    """Use every number once to hit the target (TinyZero's game): `make 29: 3 9 2`.

    The trace is a search whose every try ends in a comparison:
    `3+9=12,12+2=14?29 no;3*9=27,27+2=29?29 yes`.
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
        """Join two random numbers at a time until one is left: value, expression, steps."""
        pool, steps = [(number, str(number)) for number in numbers], []
        while len(pool) > 1:
            two = [pool.pop(rng.randrange(len(pool))) for _ in "ab"]
            (a, left), (b, right) = sorted(two, reverse=True)
            sign = rng.choice("+-*") if a * b < 100 else rng.choice("+-")
            value = OPERATORS[sign](a, b)
            steps.append(f"{a}{sign}{b}={value}")
            pool.append((value, f"({left}{sign}{right})"))
        value, expression = pool[0]
        return value, expression[1:-1], ",".join(steps)

    def make(self, rng, count: int | None = None):
        while True:  # backwards: any expression gives a target
            numbers = self.draw(rng, count)
            target, solution, steps = self.attempt(numbers, rng)
            if 1 <= target <= 99:
                question = f"{self.verb} {target}: {' '.join(map(str, numbers))}"
                return Problem(question, solution, tuple(numbers), target, steps)

    def work(self, problem, style, rng):
        count = rng.randint(1, 5) if style == "search" else 0
        tries = [self.attempt(problem.numbers, rng) for _ in range(count)]
        target = problem.target
        wrong = [f"{steps}?{target} no" for value, _, steps in tries if value != target]
        return [*wrong, f"{problem.steps}?{target} yes"], problem.answer

    def drill(self, rng):
        lines = []
        for _ in range(6):
            value, _, steps = self.attempt(self.draw(rng, None), rng)
            target = value if rng.random() < 0.5 else rng.randint(1, 99)
            lines.append(f"{steps}?{target} {'yes' if value == target else 'no'}")
        return ";".join(lines)

    def is_right(self, problem, answer):
        """An expression (`parse_expression`) of these numbers that has the target's value."""
        parsed = parse_expression(answer)
        if parsed is None:
            return False
        value, used = parsed
        return value == problem.target and self.may_use(used, problem.numbers)

    def style_of(self, completion):
        tried = completion[:LONGEST].count("?")
        return "guess" if tried == 0 else "full" if tried == 1 else "search"


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression of integers with + - * / and parentheses, else None.

    Nothing is run: Python's grammar gives a tree, of which only these four operators are computed,
    exactly. Numbers have no sign, no leading zero and at most 4 digits; plain spaces may stand
    around them, but no other white space. At most 80 characters; no `=`, `//`, `**` or `3(9)`.

    >>> parse_expression("(3+5)*2")
    (Fraction(16, 1), [3, 5, 2])
    >>> [parse_expression(text) for text in ("98**77**65", "-3+5", "03+5", "00+5")]
    [None, None, None, None]
    """
    if len(text) > 80 or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    if re.search(r"[0-9]{5}|(?<![0-9])0[0-9]", text):
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


class FindTwo(Countdown):
    """Two of four to six numbers and one operation that hit the target: `find 14: 3 5 9 6`.

    Persistence pays.
    """

    name, verb = "findtwo", "find"

    def __init__(self):
        super().__init__()

    def draw(self, rng, count):
        return [rng.randint(1, 9) for _ in range(count or rng.randint(4, 6))]

    def attempt(self, numbers, rng):
        return super().attempt(rng.sample(numbers, 2), rng)

    def may_use(self, used, numbers):
        return len(used) == 2 and all(used.count(each) <= numbers.count(each) for each in used)


class Compare(Task):
    """The larger of two numbers, found digit by digit: the example of a task in a few lines."""

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
    """Two digits times one, with the carry: `47*8=` is `7*8=56;4*8+5=37`, so 376.

    Single steps are fallible.
    """

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
                wrong = abs(value + rng.choice((-10, -1, 1, 10)))
                text, value = slip(rng, step, value, wrong)
            steps.append(text)
            written = f"{value % 10}{written}"
        return steps, f"{value // 10}{written}".lstrip("0") or "0"

    def drill(self, rng):
        lines = []
        for _ in range(8):
            a, b, carry = rng.randrange(10), rng.randint(2, 9), rng.randrange(9)
            lines.append(f"{a}*{b}+{carry}={a * b + carry}" if carry else f"{a}*{b}={a * b}")
        return ";".join(lines)


class Sort(Task):
    """Put digits in order by taking the smallest of what is left, again and again.

    Right are exactly these digits, zeros in front among them, and not a space more.
    """

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
        ("{who} has {a} {what}. {other} has {b} more, and together they buy {c}. "
         "How many has {other} then?", "++"),
        ("{who} buys {a} boxes of {b} {what} and loses {c}. How many {what} are left?", "*-"),
        ("{who} buys {a} bags of {b} {what} and already has {c}. How many {what} now?", "*+"),
        ("There are {a} {what} on the table and {b} on the floor. {who} takes {c}. "
         "How many {what} stay?", "+-"),
        ("{who} and {other} pick {a} and {b} {what}. Each box holds {c} times as many. "
         "How many in a box?", "+*"),
        ("{who} had {a} {what} and broke {b}. {other} brings {c} new ones. How many {what} now?", "-+"),
        ("Of {a} {what} {who} gives away {b}, then {c}. How many {what} are left?", "--"),
    )

    def make(self, rng):
        while True:
            template, signs = rng.choice(self.templates)
            a, b, c = (rng.randint(2, 9) for _ in "abc")
            first = OPERATORS[signs[0]](a, b)
            answer = OPERATORS[signs[1]](first, c)
            if first >= 0 and answer >= 0:
                break
        who, other = rng.sample(self.people, 2)
        what = rng.choice(self.things)
        question = template.format(who=who, other=other, what=what, a=a, b=b, c=c)
        steps = f"{a}{signs[0]}{b}={first};{first}{signs[1]}{c}={answer}"
        return Problem(question, str(answer), steps=steps)

    def work(self, problem, style, rng):
        return problem.steps.split(";"), problem.answer


class TwoLanguages(Chain):
    """Chains spelled out in a mixture of English and German.

    The language reward asks for English (R1 2.3.2).
    """

    name = "languages"
    styles = {"english": 0.25, "german": 0.25, "mixed": 0.5}
    words = {
        "english": "zero one two three four five six seven eight nine plus minus times is".split(),
        "german": "null eins zwei drei vier fünf sechs sieben acht neun plus minus mal ist".split(),
    }

    def make(self, rng, terms: int | None = None):
        problem = super().make(rng, terms or rng.randint(2, 4))
        return Problem("say " + problem.question, problem.answer)

    def work(self, problem, style, rng):
        chain = Problem(problem.question.removeprefix("say "), problem.answer)
        steps, answer = super().work(chain, "full", rng)
        return [self.spell(step, style, rng) for step in steps], answer

    def spell(self, step, style, rng):
        languages = list(self.words.values()) if style == "mixed" else [self.words[style]]
        return " ".join(rng.choice(languages)["0123456789+-*=".index(sign)] for sign in step)

    def drill(self, rng):
        return super().drill(rng, rng.choice(list(self.words)))

    def reward(self, problem, completion):
        """Also `language`: words of English over all words of the thinking.

        Over at least as many words as the work has, five a step (`four minus six is eight`): a
        thought of one word earns little. What the words say is not looked at.
        """
        parts = split_completion(completion)
        words = re.findall(r"\w+", parts[0]) if parts else []
        english = set(self.words["english"])
        least = 5 * sum(problem.question.count(sign) for sign in "+-*")
        share = sum(word in english for word in words) / max(len(words), least, 1)
        return super().reward(problem, completion) | {"language": share}

    def style_of(self, completion):
        words = set(re.findall(r"\w+", completion[:LONGEST])) - {"plus", "minus"}
        found = [name for name, language in self.words.items() if words & set(language)]
        if not found:
            return "guess"
        return "mixed" if len(found) == 2 else found[0]


class GSM8K(Task):
    """Grade-school problems from the user's own copy of the jsonl: `--task gsm8k:train.jsonl`."""

    name = "gsm8k"

    def __init__(self, path: str = "gsm8k.jsonl"):
        self.files = (Path(path),)
        self.problems, self.solutions = [], {}
        try:
            for line in Path(path).read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    row = json.loads(line)
                    text, _, end = row["answer"].rpartition("####")
                    answer = str(int(end.replace(",", "")))
                    if parse_int(answer) is None:
                        raise ValueError(f"got the answer {answer}, wanted at most 12 digits")
                    self.problems.append(Problem(row["question"], answer))
                    self.solutions[row["question"]] = text.strip().splitlines()
            if not self.problems:
                raise ValueError("it is empty")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"task gsm8k: cannot read {path}: {error} "
                            "(wanted its jsonl, as gsm8k:path)") from None

    def make(self, rng):
        return rng.choice(self.problems)

    def work(self, problem, style, rng):
        return self.solutions[problem.question], problem.answer


GAMES = (Chain, Countdown, FindTwo, Compare, Multiply, Sort, Words, TwoLanguages, GSM8K)
TASKS = {game.name: game for game in GAMES}
