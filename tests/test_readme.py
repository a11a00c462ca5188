"""What the README says exists: names, lines, commands, pictures; the chain of imports; sizes."""

import ast
import importlib.util
import pkgutil
import re
import shlex

import pytest

from data.io.cli import parse_flags
from data.tasks.__main__ import TraceConfig
from rl import RECIPES, VARIANTS, RLConfig
from sample import SampleConfig
from tests.bug import BugConfig
from tests.conftest import ROOT
from tests.exercise import ExerciseConfig
from tests.links import LINK, with_lines
from tests.tour import TourConfig
from train import MOVED, PRESET_KNOBS, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIVE = ["kernels", "model", "sample", "train", "rl"]
DOTTED = re.findall(rf"`((?:{'|'.join(FIVE)}|data|tests)(?:\.\w+)+)`", README)
NAMES = sorted({name for name in DOTTED if not name.endswith((".py", ".md", ".json"))})
LAUNCHER = r"(?:^|`)(?:torchrun --nproc_per_node=2|python) "
COMMANDS = re.findall(LAUNCHER + r"(-m [\w.]+|\w+\.py) *([^`\n#&]*)", README, re.M)
KNOBS = {"train.py": (TrainConfig, {"presets": {"preset": PRESET_KNOBS}, "moved": MOVED}),
         "rl.py": (RLConfig, {"presets": {"variant": VARIANTS, "recipe": RECIPES}}),
         "sample.py": (SampleConfig, {}), "-m data.tasks": (TraceConfig, {}),
         "-m tests.exercise": (ExerciseConfig, {}), "-m tests.bug": (BugConfig, {}), "-m tests.tour": (TourConfig, {})}


def test_there_are_names_and_commands_to_check():
    assert len(NAMES) > 25 and len(LINK.findall(README)) > 25
    assert len([program for program, _ in COMMANDS if program in KNOBS]) > 10


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    pkgutil.resolve_name(name)


def test_links_lead_to_the_lines_of_their_names():
    assert with_lines(README) == README, "python -m tests.links writes the lines anew"


@pytest.mark.parametrize("program, flags", COMMANDS)
def test_every_command_is_understood(program, flags):
    if program not in KNOBS:
        module = program.removeprefix("-m ").removesuffix(".py")
        assert module in ("pytest", "pip") or importlib.util.find_spec(module)
        return
    config, options = KNOBS[program]
    words = ["made.jsonl" if word == "FILE.jsonl" else word for word in shlex.split(flags)]
    parse_flags(config, words, "", **options)


def test_what_readme_takes_from_the_book_of_results_is_what_the_book_says():
    book = (ROOT / "tests/claims/README.md").read_text(encoding="utf-8")
    strip, taken = README.split("\nthe base ")[1].split("```")[0], []
    for title in ("R1 on a laptop", "Fast without Triton"):
        section = README.split(f"## {title}")[1].split("\n## ")[0]
        taken += [line for line in section.splitlines() if line.startswith("| ")]
    taken += [line for line in strip.splitlines()[1:] if "│" in line]
    assert len(taken) >= 16
    assert not [line for line in taken if line not in book.splitlines()]


def test_what_lies_open_is_short():
    opened = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
    assert len([word for word in opened.split() if re.search(r"\w", word)]) < 2200


@pytest.mark.parametrize("fold, count", [("26 concepts", 26), ("eight rows", 8), ("fifteen symptoms", 15)])
def test_a_fold_has_as_many_rows_as_it_says(fold, count):
    inside = README.split(fold)[1].split("</details>")[0]
    rows = re.findall(r"^\| .+\|$", inside, re.M)
    assert len(rows) == 1 + count  # and the head


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 3
    for picture in pictures:
        assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG", picture

CHAIN = ["data.io", "data.tasks", "data.text", "data.talk", *FIVE]  # each imports from what stands left of it
PRODUCT = sorted([*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")])


def place(module: str) -> str:
    """The link of the chain that a module belongs to: "data.io.cli" -> "data.io"."""
    depth = 2 if module.startswith("data.") else 1
    return ".".join(module.split(".")[:depth])


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {place(name) for name in found}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_left(path):
    here = place(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = imported(ast.parse(path.read_text(encoding="utf-8")))
    ours = {name for name in found if name.partition(".")[0] in ("data", "tests", *FIVE)}
    left = CHAIN[: CHAIN.index(here)] if here in CHAIN else []  # data/__init__.py: nothing
    if here == "kernels":  # it stands alone
        left = []
    own = {here} if here.startswith("data.") else set()
    assert ours <= {*left, *own}

SIZES = {  # most lines, most top-level definitions
    "kernels.py": (560, 32),
    "model.py": (740, 22),
    "sample.py": (580, 24),
    "train.py": (560, 22),
    "rl.py": (650, 22),
}
WIDE, WIDEST, SHARE_OF_WIDE = 100, 120, 0.05  # characters of a line; how many lines may be wide


@pytest.mark.parametrize("file", SIZES)
def test_a_file_can_be_read_in_one_sitting(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, (most_lines, most_definitions) = text.splitlines(), SIZES[file]
    kinds = (ast.FunctionDef, ast.ClassDef)
    definitions = [node.name for node in ast.parse(text).body if isinstance(node, kinds)]
    assert len(lines) <= most_lines
    assert len(definitions) <= most_definitions
    assert max(map(len, lines)) <= WIDEST
    assert sum(len(line) > WIDE for line in lines) <= SHARE_OF_WIDE * len(lines)
