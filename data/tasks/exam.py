"""What a set of answers is worth: errors over questions, pass@k, majority@k, readability, a table.

Everything here looks at texts and rewards; nothing asks a model.
"""

import math
import random
import re
import textwrap
from collections import Counter
from itertools import zip_longest

import torch
from torch import Tensor

from data.tasks.task import Task, split_completion


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
            winner = Counter(text for text in subset if text is not None).most_common(1)
            hits += bool(winner) and known[winner[0][0]]
        chances.append(hits / len(subsets))
    return torch.tensor(chances, dtype=torch.float64)  # (Q,)


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
    steps = re.sub("[0-9]+", "0", thinking).split(";")
    words = set(re.findall(r"[^\W\d]+", thinking))
    return {re.sub(r"[^\W\d]+", "w", step) for step in steps} | words


def is_readable(text: str, clean: set[str] | None) -> bool:
    """Well-formed, and each step and word is one of `clean_forms`.

    So there is no stray text, no skipped step and no second language.
    """
    parts = split_completion(text)
    return parts is not None and (clean is None or forms_of(parts[0]) <= clean)


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


def examine(tasks: list[Task], texts: list[str], lengths: Tensor, right: Tensor, form: Tensor) -> dict:
    """What is known of n answers to each of Q questions; shares are [mean, standard error].

    tasks, texts (Q*n,) of each answer, and its lengths (Q*n,) in tokens; right (Q, n) bool; form (Q, n).
    Keys: accuracy (pass@1), pass and majority (by k), format, readable, length, tries (marks "?" per
    answer), styles (share and accuracy of each). JSON takes it as it is.
    """
    clean = {task: clean_forms(task) for task in set(tasks)}
    readable = [is_readable(text, clean[task]) for task, text in zip(tasks, texts)]
    styles = [task.style_of(text) for task, text in zip(tasks, texts)]
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


def table(groups: list[str], rows: dict[str, list[dict]]) -> list[str]:
    """Checkpoints one below the other: pass@1 in each group of tasks; form and length in the first."""
    head = [*(f"pass@1 {group}" for group in groups), "format", "readable", "length"]
    lines = [f"{'':24}" + "".join(f"{name:>{len(name) + 3}}" for name in head)]
    for label, found in rows.items():
        shares = [each["accuracy"][0] for each in found] + [found[0]["format"], found[0]["readable"]]
        cells = [*(f"{100 * share:.1f} %" for share in shares), f"{found[0]['length']:.1f}"]
        lines.append(f"{label:24}" + "".join(f"{cell:>{len(name) + 3}}" for cell, name in zip(cells, head)))
    return lines
