"""Time to thinking: CPU seconds from nothing to a policy that thinks, by two recipes.

    OMP_NUM_THREADS=1 python -m tests.claims.minutes

R1-Zero (R1 section 2.2) in as little time as a core can do it. For each seed a base and
reinforcement learning on it, by the defaults and by the recipe before them, in turn, so that a busy
machine slows both. The seconds are those of the processor (user and system) for a whole command,
preparation included; the examination of 64 questions x 64 answers behind it is not. What came out:
README.md beside this file.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from data.io.cli import Knobs, knob, parse_flags, run_main
from data.tasks import load_task
from rl import RLConfig
from tests.claims import lab
from tests.claims.fitness import fitness

RECIPES = {  # flags of train.py and of rl.py
    "now": ("", ""),
    "before": ("--steps 1000 --tokens_per_step 4096 --lr 2e-3 --micro_batch 32",
               "--steps 100 --lr 1e-4 --constant_until 1"),
}
HEAD = f"{'':14}{'train.py':>10}{'rl.py':>10}{'steps, works, answers of the base':>36}{'policy pass@1':>20}{'length':>8}"


@dataclass
class MinutesConfig(Knobs):
    """Which runs."""

    out: str = knob("out/minutes", "folder of all runs")
    seeds: int = knob(3, "bases, and a policy on each", least=1)
    only: str = knob("", "one of the recipes: now, before", choices=("", *RECIPES))
    questions: int = knob(200, "held-out questions by which a base is judged", least=1)
    train_flags: str = knob("", "more flags of every train.py, in one string")
    rl_flags: str = knob("", "more flags of every rl.py, in one string")


def cpu_seconds(program: str, flags: str) -> float:
    """What a command costs the processor, in this process and in those it starts."""
    before = sum(os.times()[:4])
    print(f"\n$ python {program} {flags}", flush=True)
    lab.PROGRAMS[program](shlex.split(flags))
    return sum(os.times()[:4]) - before


def row(config: MinutesConfig, recipe: str, seed: int) -> str:
    """Run one recipe with one seed; its line of the table."""
    of_train, of_rl = RECIPES[recipe]
    base, policy = f"{recipe}-base-{seed}", f"{recipe}-rl-{seed}"
    place = f"--out {shlex.quote(config.out)} --seed {seed} --overwrite"
    first = cpu_seconds("train.py", f"{place} --name {base} {of_train} {config.train_flags}")
    knobs = f"{of_rl} --eval_every 1000 --eval_samples 8 {config.rl_flags}"
    then = cpu_seconds("rl.py", f"{place} --name {policy} --base {shlex.quote(f'{config.out}/{base}')} {knobs}")
    usual = parse_flags(RLConfig, shlex.split(config.rl_flags), "")
    start = lab.open_policy(usual, Path(config.out, base))
    shares = fitness(start.model, start.tokenizer, load_task(usual.task), config.questions)
    found = lab.open_policy(usual, Path(config.out, policy)).evaluate(usual.eval_samples)
    able = " / ".join(f"{share:.1%}" for share in shares)
    mean, error = (100 * share for share in found["accuracy"])
    return (f"{recipe}, seed {seed}".ljust(14) + f"{first:8.1f} s{then:8.1f} s{able:>36}"
            f"{mean:12.1f} ± {error:.1f} %{found['length']:8.1f}")


def main(argv: list[str]) -> None:
    """All runs one after the other, and the table."""
    config = parse_flags(MinutesConfig, argv, __doc__)
    recipes = [config.only] if config.only else list(RECIPES)
    rows = [row(config, recipe, seed) for seed in range(config.seeds) for recipe in recipes]
    print("\n".join(["", HEAD, *rows]))


if __name__ == "__main__":
    run_main(main)
