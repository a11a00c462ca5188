"""Write DeepSeek yourself, one function at a time, and let the test suite judge it.

    python -m tests.exercise                    the exercises in the order of the papers, and what is done
    python -m tests.exercise latents            writes mine/latents.py: what it shall do, and nothing of how
    python -m tests.exercise latents --check    puts yours in place of ours and runs the checks, smallest first
    python -m tests.exercise latents --hint     when it is red: which known mistake looks just like it
    python -m tests.exercise --all              all of yours, each alone and then together
    python -m tests.exercise --train            100 steps of training on your own functions

Signature, docstring and imports of an exercise are read out of the source; the solution is the source. Needs what
requirements-dev.txt lists, for the checks compare with transformers.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator, Sequence

from data.io.checkpoint import written_aside
from data.io.cli import Knobs, UserError, knob, nearest, parse_flags, run_main
from tests.links import line_of

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Exercise:
    """One function, or several methods of one class, to be written by the learner."""

    name: str
    target: str  # "model.Attention.latents"; behind a class, methods with commas between
    what: str
    level: int  # 1 to 3

    @property
    def owner(self) -> str:
        """The module or class that holds it."""
        return self.target.rpartition(".")[0]

    @property
    def functions(self) -> list[str]:
        """Names within the owner."""
        return self.target.rpartition(".")[2].split(",")

    @property
    def file(self) -> Path:
        return ROOT / f"{self.target.partition('.')[0]}.py"

    @cached_property
    def text(self) -> str:
        return self.file.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def holder(self) -> ast.ClassDef | None:
        """The class of a method."""
        kind = self.owner.partition(".")[2]
        return named(self.tree, kind) if kind else None

    @property
    def nodes(self) -> list[ast.FunctionDef]:
        return [named(self.holder or self.tree, name) for name in self.functions]

    def source(self, is_solved: bool = False) -> str:
        """The learner's file: header, imports, signature, docstring, and no body; or ours, for a test."""
        header = (f'"""By hand: {self.what}, `{self.target}`. Is it right?\n\n'
                  f'    python -m tests.exercise {self.name} --check\n\n{legend()}\n"""')
        bodies = [self.function(node, is_solved) for node in self.nodes]
        if self.holder:
            head = self.segment(self.holder, self.holder.body[0])
            made = "\n".join(f"    # {line}".rstrip() for line in self.made_by_init())
            inside = [head, made, *map(self.lines, self.helpers()), *bodies]
            bodies = ["\n\n".join(part for part in inside if part)]
        return header + "\n\n" + "\n\n\n".join([self.imports(), *bodies]) + "\n"

    def function(self, node: ast.FunctionDef, is_solved: bool) -> str:
        """One function of the file, with its decorators."""
        if is_solved:
            return self.lines(node)
        indent = " " * (node.col_offset + 4)
        has_doc = ast.get_docstring(node) is not None
        head = self.segment(node, node.body[0]) if has_doc else self.segment(node)
        return f"{head}\n{indent}raise NotImplementedError"

    def segment(self, node, last=None) -> str:
        """The source from the first decorator to `last`, a statement of the body, or to the signature alone."""
        start = min([node.lineno, *[each.lineno for each in node.decorator_list]])
        end = last.end_lineno if last is not None else node.body[0].lineno - 1
        return "\n".join(self.text.splitlines()[start - 1 : end])

    def lines(self, node) -> str:
        return self.segment(node, node.body[-1])

    def helpers(self) -> list[ast.FunctionDef]:
        """Static methods of the same class that the solution calls: they are given."""
        if not self.holder:
            return []
        called = {each.attr for node in self.nodes for each in ast.walk(node) if isinstance(each, ast.Attribute)}
        return [node for node in self.holder.body if isinstance(node, ast.FunctionDef) and node.name in called
                and node.name not in self.functions and "staticmethod" in map(ast.unparse, node.decorator_list)]

    def made_by_init(self) -> list[str]:
        """What `self` has: the assignments of the class's constructor, its base's first, and operations of kernels.py."""
        bases = [named(self.tree, base.id) for base in self.holder.bases if isinstance(base, ast.Name)]
        found = []
        for kind in [*filter(None, bases), self.holder]:
            init = named(kind, "__init__")
            for node in sorted(ast.walk(init), key=lambda node: getattr(node, "lineno", 0)) if init else ():
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("self."):
                    found.append(f"    {ast.unparse(node)}")
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
                    found.append(f"    self.{node.args[0].value} = {ast.unparse(node.args[1])}")
        used = re.findall(r"self\.ops\.(\w+)", "".join(map(self.lines, self.nodes)))
        kernels = ast.parse((ROOT / "kernels.py").read_text(encoding="utf-8"))
        operations = [f"    self.ops.{name}({ast.unparse(named(kernels, name + '_reference').args)})" for name in used]
        return ["What __init__ made, and what may be called:", "", *found, *operations] if found or operations else []

    def imports(self) -> str:
        """Those lines of the source's imports that the solution needs, and what it needs of the source, explained."""
        nodes = [*self.nodes, *self.helpers(), *(self.holder.bases if self.holder else [])]
        wanted = {each.id for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name)}
        groups, own, told = [[], [], []], [], []
        for node in self.tree.body:
            for alias in getattr(node, "names", []):
                name = alias.asname or alias.name
                if name in wanted:
                    renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                    origin = getattr(node, "module", alias.name).partition(".")[0]
                    place = 0 if origin in sys.stdlib_module_names else 1 if origin == "torch" else 2
                    start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                    groups[place].append(start + renamed)
            names = [node.name] if hasattr(node, "name") else [
                each.id for each in getattr(node, "targets", []) if isinstance(each, ast.Name)]
            for name in wanted.intersection(names) - {*self.functions, getattr(self.holder, "name", "")}:
                own.append(name)
                told += self.explained(node)
        groups[2] += [f"from {self.file.stem} import {', '.join(sorted(own))}"] * bool(own)
        blocks = ["\n".join(lines) for lines in (*groups, [f"# {line}".rstrip() for line in told]) if lines]
        return "\n\n".join(blocks)

    def explained(self, node) -> list[str]:
        """Of something that the file imports: a function's signature and docstring, without examples, or a class's fields."""
        if isinstance(node, ast.FunctionDef):
            doc = (ast.get_docstring(node) or "").partition("\n\n>>>")[0]
            return [f"{node.name}({ast.unparse(node.args)})", *[f"    {line}" for line in doc.splitlines()]]
        fields = [each for each in getattr(node, "body", []) if isinstance(each, ast.AnnAssign)]
        if not fields:
            return []
        return [f"{node.name}: {(ast.get_docstring(node) or '').partition(chr(10))[0]}",
                *self.text.splitlines()[fields[0].lineno - 1 : fields[-1].end_lineno]]

    @property
    def equation(self) -> str:
        """Where it stands in the papers, and the formula, out of the docstrings of the function and its class."""
        docs = [" ".join((ast.get_docstring(node) or "").split()) for node in [*self.nodes, self.holder] if node]
        papers = [found.group(1) for doc in docs if (found := re.search(r"\(([^()]*\b(?:V2|V3|LF|Math) (?:eqs?|section|algorithm|\d)[^()]*)\)", doc))]
        formulas = [each for doc in docs for each in re.findall(r"`([^`]+)`", doc) if len(each) >= 8]
        formulas.sort(key=lambda formula: "=" not in formula)
        return ":  ".join([*papers[:1], *formulas[:1]])

    @property
    def solution_lines(self) -> int:
        """Of the bodies, without docstrings."""
        count = 0
        for node in self.nodes:
            first = node.body[1] if ast.get_docstring(node) is not None else node.body[0]
            count += node.end_lineno - first.lineno + 1
        return count


def named(tree, name: str):
    """The definition of that name in a module or class, or None."""
    return next((node for node in tree.body if getattr(node, "name", None) == name), None)


def legend() -> str:
    """The letters of shapes, as model.py has them."""
    doc = ast.get_docstring(ast.parse((ROOT / "model.py").read_text(encoding="utf-8")))
    return "Shapes, " + doc.partition("Shapes,")[2].partition("\n\nIn this order")[0].lstrip()


EXERCISES = {exercise.name: exercise for exercise in (
    Exercise("rms_norm", "kernels.rms_norm_reference", "the norm", 1),
    Exercise("apply_rope", "kernels.apply_rope_reference", "rotary position", 1),
    Exercise("latents", "model.Attention.latents", "what is cached: a latent and a key", 1),
    Exercise("attention", "kernels.causal_attention_reference", "attention to what came before", 2),
    Exercise("expanded", "model.Attention.expanded", "keys and values of every head", 2),
    Exercise("absorbed", "model.Attention.absorbed", "decoding on the latents as they are", 3),
    Exercise("choose", "model.Router.choose", "groups, then experts", 2),
    Exercise("gates", "model.Router.forward", "affinities and gates", 2),
    Exercise("expert_ffn", "kernels.expert_ffn_reference", "the routed experts", 2),
    Exercise("update_bias", "model.Router.update_bias", "balancing without a loss", 1),
    Exercise("balance_loss", "model.balance_loss", "the balance loss of a sequence", 2),
    Exercise("mtp", "model.MTP.forward", "multi-token prediction", 2),
    Exercise("cross_entropy", "kernels._LinearCrossEntropy.forward,backward", "the loss without all logits", 3),
    Exercise("quantise", "kernels.quantise", "FP8 in tiles and blocks", 2),
    Exercise("lr_factor", "train.lr_factor", "the learning rate", 1),
    Exercise("yarn", "model.rope_frequencies", "YaRN: a longer context", 3),
    Exercise("sample_tokens", "sample.sample_tokens", "one draw of one distribution", 2),
    Exercise("group_advantages", "rl.group_advantages", "better than one's own group", 1),
    Exercise("token_weights", "rl.token_weights", "what is averaged first", 2),
    Exercise("policy_loss", "rl.policy_loss", "GRPO's objective and its KL", 3),
)}


# ------------------------------------------------------------------------------------------- the learner's folder


def state(folder: Path, name: str) -> str:
    """Of one exercise: "", "to do", "green", "red", or "changed" since it was checked."""
    path = folder / f"{name}.py"
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    known = read_verdicts(folder).get(name, {})
    if known.get("of") == fingerprint(text):
        return known["verdict"]
    return "to do" if text == EXERCISES[name].source() else "changed" if known else "not checked"


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_verdicts(folder: Path) -> dict:
    """What was found when, and of which text."""
    try:
        found = json.loads((folder / ".checked.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note_verdict(folder: Path, name: str, verdict: str) -> None:
    text = (folder / f"{name}.py").read_text(encoding="utf-8", errors="replace")
    found = read_verdicts(folder) | {name: {"verdict": verdict, "of": fingerprint(text)}}
    with written_aside(folder / ".checked.json") as aside:
        Path(aside).write_text(json.dumps(found, indent=1), encoding="utf-8")


def show_list(folder: Path) -> None:
    """A line per exercise, as wide as the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    print(f"{'exercise':17} {'what':36} {'lines':>5}  level  {'state':11}  equation")
    for name, exercise in EXERCISES.items():
        line = (f"{name:17} {exercise.what:36} {exercise.solution_lines:5}  {'*' * exercise.level:5}  "
                f"{state(folder, name) or '-':11}  ")
        print((line + exercise.equation)[:width].rstrip())
    done = sum(state(folder, name) == "green" for name in EXERCISES)
    ahead = next((name for name in EXERCISES if state(folder, name) != "green"), "--train")
    print(f"\n{done} of {len(EXERCISES)} are green in {folder}/; the next one: python -m tests.exercise {ahead}")


def begin(folder: Path, name: str) -> None:
    """Write the file of one exercise, unless it is there."""
    path = folder / f"{name}.py"
    if path.exists():
        print(f"{path} is there and stays as it is ({state(folder, name)}); away with it, and this command writes it anew")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            Path(aside).write_text(EXERCISES[name].source(), encoding="utf-8")
        print(f"{path} says what is to be written; when you think it is: python -m tests.exercise {name} --check")


# --------------------------------------------------------------------------------------------------- the judgement


def grade(folder: Path, task: str, names: list[str], bound: float | None = None, flags: Sequence[str] = ()) -> Iterator[dict]:
    """The findings of tests/grading.py, as they come out of a process of its own that ends after `bound` seconds.

    Raises UserError when it ends before it has said all.
    """
    command = [sys.executable, "-m", "tests.grading", str(folder), task, ",".join(names), *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    clock = threading.Timer(bound, process.kill) if bound else None
    if clock:
        clock.start()
    try:
        for line in process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict) and "exercise" in found:
                yield found
            else:
                print(line, end="")  # the learner's own
    finally:
        is_over = bool(clock) and clock.finished.is_set()  # it has rung
        if clock:
            clock.cancel()
        process.kill() if process.poll() is None and sys.exc_info()[0] else process.wait()
    if process.returncode:
        why = f"did not end within {bound:g} seconds" if is_over else "broke off"
        raise UserError(f"{', '.join(names)}: the checks {why}")


def words(name: str) -> str:
    return name.replace("_", " ")


def show(found: dict) -> None:
    """One check in a line, and what differs below it."""
    print(f"  {found['verdict']:7} {words(found['check'])}", flush=True)
    for line in textwrap.wrap(found["what"], max(40, shutil.get_terminal_size((120, 24)).columns - 14)):
        print(f"            {line}", flush=True)


def verdict_of(findings: list[dict]) -> str:
    """Of several checks: the worst."""
    seen = {found["verdict"] for found in findings if "verdict" in found}
    return "red" if "red" in seen else "to do" if "to do" in seen else "green"


def check(folder: Path, name: str, is_hint: bool = False) -> str:
    """Run the checks of one exercise; with `is_hint` say which known mistakes look like it. Returns the verdict."""
    exercise, findings = EXERCISES[name], []
    if not (folder / f"{name}.py").exists():
        raise UserError(f"{folder}/{name}.py is not there: python -m tests.exercise {name} writes it")
    print(f"{name}: {exercise.target}")
    for found in grade(folder, "check", [name], bound=HARD_BOUND):
        findings.append(found)
        if "verdict" in found:
            show(found)
    verdict, alike = verdict_of(findings), findings[-1]["hints"]
    note_verdict(folder, name, verdict)
    if verdict == "green":
        line = line_of(exercise.file, [*exercise.owner.split(".")[1:], exercise.functions[0]])
        print(f"{name} is green. Compare it with ours: {exercise.file.name}, line {line}")
    elif verdict == "to do":
        print(f"{name} is to do: the body in {folder}/{name}.py")
    elif is_hint and alike:
        show_hints(alike)
    elif is_hint:
        print("it looks like none of the known mistakes")
    elif alike:
        print(f"a known mistake looks like this; which one: python -m tests.exercise {name} --hint")
    return verdict


def show_hints(alike: list[list]) -> None:
    """The nearest known mistake, or those that cannot be told apart."""
    best = alike[0][0]
    for distance, text in [pair for pair in alike[:3] if pair[0] <= max(1.5 * best, 0.01)]:
        how = "gives exactly what yours gives" if distance < 0.001 else "comes near to it"
        print(f"hint: {text} ({how})")


def check_all(folder: Path) -> list[str]:
    """Every exercise of the folder alone, then all green ones together: a table. Returns what is green."""
    names = [name for name in EXERCISES if (folder / f"{name}.py").exists()]
    if not names:
        raise UserError(f"{folder}/ has no exercise: python -m tests.exercise {next(iter(EXERCISES))} writes the first")
    findings = {name: [] for name in names}
    print("each alone", flush=True)
    for found in grade(folder, "check", names, bound=HARD_BOUND * len(names)):
        findings[found["exercise"]].append(found)
        if "hints" in found:
            name = found["exercise"]
            verdict, what = verdict_of(findings[name]), [each.get("what") for each in findings[name] if each.get("what")]
            note_verdict(folder, name, verdict)
            print(f"  {verdict:7} {name:17} {(what or [''])[0]}"[: shutil.get_terminal_size((120, 24)).columns], flush=True)
    green = [name for name in names if verdict_of(findings[name]) == "green"]
    if green:
        print(f"together: {len(green)} of {len(EXERCISES)} functions are yours", flush=True)
        together = []
        for found in grade(folder, "together", green, bound=HARD_BOUND):
            together.append(found)
            show(found)
        if verdict_of(together) != "green":
            raise UserError("each is green alone, and together they are not")
    return green


def train_on_own(folder: Path, flags: list[str]) -> None:
    """Train 100 steps on the functions that are green, and draw what was learned."""
    green = [name for name in EXERCISES if state(folder, name) == "green"]
    if not green:
        raise UserError("no function of yours is green yet: python -m tests.exercise --all")
    print(f"training on {len(green)} functions of yours: {', '.join(green)}", flush=True)
    for _ in grade(folder, "train", green, flags=["--steps=100", "--eval_every=20", "--name=mine", "--overwrite", *flags]):
        pass


HARD_BOUND = 120.0  # seconds, for what does not even listen to an alarm


@dataclass
class ExerciseConfig(Knobs):
    """What can be asked for."""

    name: str = knob("", "which exercise", positional=True)
    check: bool = knob(False, "run its checks on what you wrote")
    hint: bool = knob(False, "and say which known mistake looks like it")
    all: bool = knob(False, "check all that you wrote, each alone, then together")
    train: bool = knob(False, "100 steps of training on your own functions")
    folder: str = knob("mine", "where yours are")

    def rules(self):
        is_known = self.name in ("", *EXERCISES)
        yield "name", f"an exercise{nearest(self.name, EXERCISES)}; python -m tests.exercise lists them", is_known
        yield "name", "the exercise to check", bool(self.name) or not (self.check or self.hint)
        yield "name", "no name beside --all or --train", not (self.name and (self.all or self.train))


def main(argv: list[str]) -> None:
    """List, write, check, hint, all, train. Exit code 1 when something is not green."""
    config = parse_flags(ExerciseConfig, argv, __doc__)
    folder = Path(config.folder)
    if config.train:
        train_on_own(folder, [])
    elif config.all:
        green = check_all(folder)
        done = len(green) == len(EXERCISES)
        print("the whole system is yours: python -m tests.exercise --train" if done
              else f"{len(green)} of {len(EXERCISES)} are green")
    elif config.check or config.hint:
        if check(folder, config.name, config.hint) != "green":
            sys.exit(1)
    elif config.name:
        begin(folder, config.name)
    else:
        show_list(folder)


if __name__ == "__main__":
    run_main(main)
