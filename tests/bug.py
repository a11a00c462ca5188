"""Hunt the bug: a known mistake is put into the model, and you see what a practitioner would see.

    python -m tests.bug --random --seed 3       one of them, beside the healthy model on the same seed: curves, balance, a sample
    python -m tests.bug 17                      the one with this number
    python -m tests.bug 17 --code               the broken function, without a comment
    python -m tests.bug 17 --checks             which checks of the test suite notice it
    python -m tests.bug 17 --tell               what it was, and in which kind of code it was met
    python -m tests.bug --table                 all of them, three seeds each: which mistakes does training forgive?

The model is a small one (0.3M parameters), 60 steps of 512 tokens in two micro-batches, every second sequence with targets
in its second part only, an evaluation every ten steps, and halfway it is saved and loaded again, as after a
crash. Afterwards it is sampled from with prompts of unequal length. A mistake that exists only in another
architecture (V2's gating, YaRN, two MTP modules) is trained in that one, beside a healthy one of it.
"""

import ast
import difflib
import inspect
import json
import math
import random
import statistics
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

import sample
import train
from data.io.cli import Knobs, UserError, knob, parse_flags, run_main
from data.io.plot import COLORS, GREY, HEAD_ROOM, picture
from data.text.corpus import story_documents
from data.text.tokenizer import Tokenizer, load_tokenizer
from kernels import IGNORE
from model import Config, Transformer
from tests import mistakes
from tests.mistakes import MISTAKES, Mistake, Patches

SIZES = dict(vocab_size=512, hidden_size=48, intermediate_size=96, moe_intermediate_size=24, num_hidden_layers=3, q_lora_rank=24,
             kv_lora_rank=24, initializer_range=0.07)  # three layers and 16 experts are what some mistakes count on
STEPS, SEQUENCES, T, HELD_OUT = 60, 8, 64, 32
KNOBS = dict(micro_batch=SEQUENCES // 2, mtp_loss_weight=0.3, aux_loss_alpha=1e-4, bias_update_speed=1e-2)
TEXTS = list(MISTAKES)


@dataclass
class Run:
    """What is seen of one run: a value per step, and what came out."""

    ce: list[float] = field(default_factory=list)  # of training, in nats
    mtp: list[float] = field(default_factory=list)
    max_vio: list[float] = field(default_factory=list)
    val: float = math.nan  # nats per token of text not trained on, in the end
    val_mtp: float = math.nan
    drift: float = math.nan  # nats, largest difference between the sampler's log-probs and those of one pass
    text: str = ""  # what it goes on with
    tokens_per_s: float = 0.0
    error: str = ""  # which ended it


# ------------------------------------------------------------------------------------------------------- one run


@cache
def corpus() -> tuple[Tokenizer, list[list[int]], torch.Tensor]:
    """A tokenizer, stories in its ids, and all of them as windows (n, T + 1)."""
    tokenizer = load_tokenizer(f"plainseek:{SIZES['vocab_size']}")
    stories = [[tokenizer.bos_id, *tokenizer.encode(text)] for _, text in story_documents(random.Random("bug"), 400)]
    ids = [token for story in stories for token in story]
    return tokenizer, stories, torch.tensor(ids[: len(ids) // (T + 1) * (T + 1)]).view(-1, T + 1)


def batch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets; every second sequence has its targets in the second half, as an answer behind a question."""
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].clone()
    targets[::2, : T // 2] = IGNORE
    return tokens, targets


def train_small(mistake: Mistake | None, changes: dict, seed: int) -> Run:
    """One run with the mistake in, or a healthy one. Whatever it raises is part of what is seen."""
    run = Run()
    with Patches() as patches:
        try:
            if mistake:
                mistake.put_in(patches)
            follow(run, changes, seed, STEPS)
        except Exception as error:
            run.error = f"{type(error).__name__} in step {len(run.ce) + 1}: {' '.join(str(error).split())[:100]}"
    return run


def follow(run: Run, changes: dict, seed: int, steps: int) -> None:
    """Train, evaluate, save and load, sample; what is seen goes into `run`."""
    torch.manual_seed(seed)
    tokenizer, stories, rows = corpus()
    rows, validation = rows[HELD_OUT:], [batch(rows[:HELD_OUT])]
    world, order = train.Dist(), torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    model = Transformer(Config.preset("tiny", **SIZES | ids | changes)).train()
    model.isolate = True
    optimizer = train.make_optimizer(model, 0.0)
    started = time.perf_counter()
    for step in range(steps):
        if step == steps // 2:
            model, optimizer = reloaded(model, optimizer)
        tokens, targets = batch(rows[order[step * SEQUENCES : (step + 1) * SEQUENCES]])
        found = train.train_step(model, optimizer, tokens, targets, world, lr=4e-3 * min(1, (step + 1) / 10), **KNOBS)
        run.ce.append(found["ce"])
        run.mtp.append(found["mtp"])
        run.max_vio.append(train.max_violation(found["load"]))
        if step % 10 == 9:
            losses, _ = train.evaluate(model, validation, world)
            run.val, run.val_mtp = losses["ce"], losses["mtp"]
    run.tokens_per_s = steps * SEQUENCES * T / (time.perf_counter() - started)
    run.drift, run.text = sampled(model, tokenizer, stories)


def reloaded(model: Transformer, optimizer) -> tuple:
    """Both as after a restart: the weights out of a checkpoint directory, the optimizer's state with them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = Transformer.from_pretrained(folder).train()
    again.isolate = model.isolate
    fresh = train.make_optimizer(again, 0.0)
    fresh.load_state_dict(optimizer.state_dict())
    return again, fresh


@torch.no_grad()
def sampled(model: Transformer, tokenizer, stories: list[list[int]]) -> tuple[float, str]:
    """How far the sampler's log-probs are from those of one pass over the same text, and a text."""
    prompts = [story[:length] for story, length in zip(stories, (24, 9, 15))]
    out = sample.generate(model, prompts, max_new_tokens=24, temperature=0.7, stop_ids=[tokenizer.bos_id], seed=0)
    model.eval().isolate = False
    logps = (model(out.tokens[:, :-1]) / 0.7).log_softmax(-1).gather(-1, out.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    drift = (logps - out.logps[:, 1:])[out.mask[:, 1:]].abs().max()
    text = tokenizer.decode(prompts[0][1:]) + " │ " + tokenizer.decode(out.completion(0))
    return drift.item(), " ".join(text.split())


# ------------------------------------------------------------------------------------------ one mistake, looked at


def curves(healthy: list[float], broken: list[float], height: int = 11, width: int = 60) -> list[str]:
    """Both as text: o the healthy one, x the broken one, * where they are the same."""
    values = [y for y in healthy + broken if math.isfinite(y)]
    low, high = min(values), max(values)
    grid = [[" "] * width for _ in range(height)]
    for mark, line in (("o", healthy), ("x", broken)):
        for step, y in enumerate(line):
            if math.isfinite(y):
                row = round((high - y) / max(high - low, 1e-9) * (height - 1))
                column = step * width // max(len(healthy), 1)
                grid[row][column] = "*" if grid[row][column] not in (" ", mark) else mark
    labels = {0: f"{high:7.2f}", height - 1: f"{low:7.2f}"}
    lines = [f"{labels.get(i, ''):7} │{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    return [*lines, " " * 8 + "└" + "─" * width, f"{'':8} step 1{len(healthy):>{width - 6}}"]


def bug_figure(path: Path, number: int, healthy: Run, broken: Run) -> None:
    """bug-N.png: the loss, that of MTP, and the balance, beside the healthy run."""
    with picture(path, f"Bug {number}: what do you see?", (12, 4.4)) as figure:
        panels = (("loss in nats per token", "ce"), ("loss of the second next token (MTP)", "mtp"), ("MaxVio", "max_vio"))
        for axis, (title, name) in zip(figure.subplots(1, 3), panels):
            for run, label, color in ((healthy, "healthy", GREY), (broken, "with the bug", COLORS[1])):
                line = getattr(run, name)
                axis.plot(range(1, len(line) + 1), line, color=color, label=label)
            low, high = axis.get_ylim()
            axis.set(title=title, xlabel="step", ylim=(low, low + (high - low) * HEAD_ROOM))
            axis.legend(loc="upper right", ncols=2)
            axis.grid(axis="y")


def show_runs(number: int, seed: int, out: str) -> None:
    """Both runs as a practitioner sees them."""
    mistake = MISTAKES[TEXTS[number - 1]]
    print(f"bug {number}, seed {seed}: {STEPS} steps of {SEQUENCES * T} tokens, healthy and with it", flush=True)
    healthy, broken = (train_small(each, mistake.changes, seed) for each in (None, mistake))
    if broken.ce:
        print("\nloss in nats per token: o healthy, x with the bug, * both")
        print("\n".join(curves(healthy.ce, broken.ce)))
    rows = [("", "healthy", "with the bug"), *[
        (words, *[f"{get(run):{form}}" for run in (healthy, broken)]) for words, form, get in (
            ("loss on other text", ".3f", lambda run: run.val), ("the same of MTP", ".3f", lambda run: run.val_mtp),
            ("MaxVio at the end", ".2f", lambda run: run.max_vio[-1] if run.max_vio else math.nan),
            ("sampler against trainer, nats", ".1e", lambda run: run.drift),
            ("tokens per second", ",.0f", lambda run: run.tokens_per_s))]]
    print("\n" + "\n".join(f"{words:31}{one:>13}{two:>15}" for words, one, two in rows))
    for words, run in (("healthy", healthy), ("with the bug", broken)):
        print(f"\n{words}: {run.error or run.text}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    bug_figure(folder / f"bug-{number}.png", number, healthy, broken)
    print(f"\n{folder / f'bug-{number}.png'}; then: python -m tests.bug {number} --code | --checks | --tell")


def code_of(mistake: Mistake) -> str:
    """The broken function, and what puts it in where that is part of it: no comment, no docstring."""
    mechanism, name = mistake.put_in.func, mistake.place.rpartition(".")[2].strip("_")
    settings = [f"{key} = {value!r}" for key, value in mistake.put_in.keywords.items() if key != "broken"]
    trees = {"": source_of(mistake.broken, f"broken_{name}")}
    if "<locals>" not in mechanism.__qualname__:  # neither `at` nor `twin`, which only replace
        trees[mechanism.__name__] = source_of(mechanism)
    for tree in [*trees.values()]:
        for node in ast.walk(tree):
            helper = getattr(mistakes, node.id, None) if isinstance(node, ast.Name) else None
            if inspect.isfunction(helper) and helper.__module__ == mistakes.__name__ and helper not in (mistakes.at, mistakes.twin):
                trees.setdefault(helper.__name__, source_of(helper))
    return "\n\n".join([f"# in place of {mistake.place}", *settings, *map(ast.unparse, reversed(trees.values()))])


def source_of(function, name: str = "") -> ast.stmt:
    """Its source without decorators, docstrings and comments, under another name; a lambda as an assignment."""
    function = function.func if isinstance(function, partial) else function
    tree, line = ast.parse(Path(inspect.getfile(function)).read_text(encoding="utf-8")), function.__code__.co_firstlineno
    for node in ast.walk(tree):
        decorators = getattr(node, "decorator_list", [])
        is_function = isinstance(node, (ast.FunctionDef, ast.Lambda))
        if is_function and min([node.lineno, *[each.lineno for each in decorators]]) == line:
            break
    if isinstance(node, ast.Lambda):
        return ast.fix_missing_locations(ast.Assign([ast.Name(name, ast.Store())], node))
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef):
            has_doc = ast.get_docstring(each) is not None
            each.decorator_list, each.body = [], each.body[1:] if has_doc else each.body
    node.name = name or node.name
    return node


def show_checks(mistake: Mistake) -> None:
    """Every small check of the test suite with the mistake in: which notice, and what they say."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known, red = dict.fromkeys(each for broken in MISTAKES.values() for each in broken.noticed_by), 0
    for each in known:
        with tempfile.TemporaryDirectory() as folder, Patches() as patches:
            try:
                torch.manual_seed(0)
                mistake.put_in(patches)
                each(Path(folder))
            except Exception as error:
                red += 1
                words = getattr(each, "words", each.__name__.replace("_", " "))
                print(f"  red  {words}\n" + textwrap.fill(
                    " ".join(str(error).split())[:300], 110, initial_indent=" " * 7, subsequent_indent=" " * 7), flush=True)
    print(f"{red} of {len(known)} checks are red")


def tell(number: int) -> None:
    text = TEXTS[number - 1]
    mistake = MISTAKES[text]
    print(f"bug {number}: {text}\nin place of   {mistake.place}\nmet in        {mistake.seen}\nnoticed by    "
          + ", ".join(dict.fromkeys(each.__name__.replace("_", " ") for each in mistake.noticed_by)))


# ------------------------------------------------------------------------------------------------------ the table

SEEDS = (0, 1, 2)
CLEAR = 3.0  # spreads of the healthy seeds: a difference that can be seen,
LEAST = {"loss": 0.02, "MTP": 0.02, "balance": 0.1}  # if it is not smaller than this


def one_run(job: tuple[str, str, int]) -> dict:
    """Of the table, in a process of its own: text of the mistake ("" is healthy), architecture as JSON, seed."""
    text, architecture, seed = job
    torch.set_num_threads(1)
    return {"job": job, "run": asdict(train_small(MISTAKES.get(text), json.loads(architecture), seed))}


def jobs() -> list[tuple[str, str, int]]:
    """Every run of the table: each mistake, and the healthy model of each architecture."""
    architectures = {text: json.dumps(mistake.changes) for text, mistake in MISTAKES.items()}
    healthy = [("", each, seed) for each, seed in product(dict.fromkeys(architectures.values()), SEEDS)]
    return healthy + [(*pair, seed) for pair, seed in product(architectures.items(), SEEDS)]


def read_runs(path: Path) -> dict[tuple, Run]:
    """What an earlier call has written down; a last line that was cut short is left out."""
    found = {}
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[tuple(row["job"])] = Run(**row["run"])
    return found


def measure(out: str) -> dict[tuple, Run]:
    """All runs, on every core; each is written down when it is done, so that a second call goes on."""
    path = Path(out) / "table.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = read_runs(path)
    left = [job for job in jobs() if job not in found]
    text = "".join(json.dumps({"job": job, "run": asdict(run)}) + "\n" for job, run in found.items())
    path.write_text(text, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, get_context("spawn").Pool() as pool:
        for done, row in enumerate(pool.imap_unordered(one_run, left), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            found[tuple(row["job"])] = Run(**row["run"])
            print(f"\r{done} of {len(left)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def row_of(number: int, runs: dict[tuple, Run]) -> list[str]:
    """A line of the table: how far a mistake moves what one looks at, and what of it can be seen."""
    text = TEXTS[number - 1]
    architecture = json.dumps(MISTAKES[text].changes)
    healthy = [runs["", architecture, seed] for seed in SEEDS]
    broken = [runs[text, architecture, seed] for seed in SEEDS]
    if any(run.error for run in broken):
        error = next(run.error for run in broken if run.error).partition(":")[0]
        return [str(number), text, "", "", "", "", "", f"it stops: {error}"]

    looks = {"loss": lambda run: run.val, "MTP": lambda run: run.val_mtp,
             "balance": lambda run: statistics.fmean(run.max_vio[-10:])}
    moves, spreads = ({name: get(look) for name, look in looks.items()} for get in (
        lambda look: statistics.fmean(look(b) - look(a) for a, b in zip(healthy, broken)),
        lambda look: statistics.stdev(map(look, healthy))))
    drift = max(run.drift for run in broken)
    seen = [name for name, moved in moves.items() if abs(moved) > max(CLEAR * spreads[name], LEAST[name])]
    seen += ["sampling"] if drift > 1e-3 else []
    is_same = all(a.ce == b.ce and a.val == b.val for a, b in zip(healthy, broken))
    verdict = ", ".join(seen) or ("nothing: the same bit for bit" if is_same else "nothing")
    return [str(number), text, f"{moves['loss']:+.3f}", f"{abs(moves['loss']) / spreads['loss']:.1f}", f"{moves['MTP']:+.3f}",
            f"{moves['balance']:+.2f}", f"{drift:.0e}", verdict]


def table(runs: dict[tuple, Run]) -> str:
    """Markdown: a row per mistake, and what they come to."""
    rows = [row_of(number, runs) for number in range(1, len(TEXTS) + 1)]
    head = ["#", "mistake", "loss, nats", "in spreads", "MTP", "MaxVio", "sampler", "seen in"]
    plain = [runs["", "{}", seed] for seed in SEEDS]
    of_loss = sum("loss" in row[-1] for row in rows)
    nothing, stops = (sum(row[-1].startswith(word) for row in rows) for word in ("nothing", "it stops"))
    lines = [f"Healthy: loss {statistics.fmean(run.val for run in plain):.3f}, spread over seeds "
             f"{statistics.stdev(run.val for run in plain):.3f} nats. Of {len(rows)} mistakes {of_loss} show in the loss, {stops} stop "
             f"the run, {len(rows) - of_loss - stops - nothing} show elsewhere only, {nothing} do not show at all.", ""]
    return "\n".join([*lines, *[f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]])


# ------------------------------------------------------------------------------------------------------ the program


@dataclass
class BugConfig(Knobs):
    """What can be asked for."""

    bug: str = knob("", "its number, or words of its name", positional=True)
    random: bool = knob(False, "one by chance")
    seed: int = knob(0, "of the choice and of the runs", least=0)
    code: bool = knob(False, "print the broken function")
    checks: bool = knob(False, "which checks notice it")
    tell: bool = knob(False, "what it was")
    table: bool = knob(False, "all of them, three seeds each")
    out: str = knob("out/bugs", "folder of pictures and of the table's runs")


def which(config: BugConfig) -> int:
    """The number that is meant. Raises UserError, naming the nearest."""
    if config.random:
        return random.Random(config.seed).randrange(len(TEXTS)) + 1
    if config.bug.isdecimal() and 1 <= int(config.bug) <= len(TEXTS):
        return int(config.bug)
    close = difflib.get_close_matches(config.bug, TEXTS, n=1, cutoff=0.4)
    hint = f" (did you mean {TEXTS.index(close[0]) + 1}, {close[0]!r}?)" if close and not config.bug.isdecimal() else ""
    raise UserError(f"bug: got {config.bug!r}, wanted a number from 1 to {len(TEXTS)}, or --random{hint}")


def main(argv: list[str]) -> None:
    """Show, or answer what is asked about one mistake; or measure all of them."""
    config = parse_flags(BugConfig, argv, __doc__)
    torch.set_num_threads(1)  # of a model this small a second one gains nothing, and waits beside other programs
    if config.table:
        print(table(measure(config.out)))
        return
    number = which(config)
    mistake = MISTAKES[TEXTS[number - 1]]
    if config.code:
        print(code_of(mistake))
    if config.checks:
        show_checks(mistake)
    if config.tell:
        tell(number)
    if not (config.code or config.checks or config.tell):
        show_runs(number, config.seed, config.out)


if __name__ == "__main__":
    run_main(main)
