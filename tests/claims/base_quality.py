"""Reinforcement learning needs a base that can do it now and then (the premise of R1 section 2.2).

    python train.py --snapshots 0.1 0.2 0.4 0.7
    python -m tests.claims.base_quality --base out/base --steps 40

The same RL from every snapshot at-010 ... of one pretraining run and from its end, three seeds each:
out/quality.txt has the table, out/quality.png the picture. What came out: up to 40 % of the run the
base's work fails and RL learns to guess (18 to 25 % right, 6 tokens); from 70 % on it learns to think
(81 to 90 % right, 32 tokens).
"""

from dataclasses import dataclass
from pathlib import Path

import rl
from data.io.cli import UserError, knob, run_main
from data.tasks import exam
from tests.claims import lab

USUAL = dict(name="quality", steps=60, lr=1e-4, constant_until=1.0, eval_every=60, eval_samples=8)


@dataclass
class QualityConfig(rl.RLConfig):
    """The knobs of rl.py, for each of the runs."""

    seeds: int = knob(3, "runs from each snapshot", least=1)


def snapshots(base: Path) -> dict[int, Path]:
    """Share of the pretraining run in % -> checkpoint. Raises UserError when there is the end only."""
    found = {int(path.name[3:]): path for path in sorted(base.glob("at-*"))}
    if not found:
        raise UserError(f"quality: no at-* in {base}: python train.py --snapshots 0.1 0.2 0.4 0.7 "
                        "leaves them there")
    return found | {100: base}


def evaluate(config: QualityConfig, directory: Path) -> dict:
    """Held-out questions, as rl.py asks them in between."""
    return lab.open_policy(config, directory).evaluate(min(8, config.eval_samples))


def main(argv: list[str]) -> bool:
    """Run RL from all of them, print the table and draw the picture."""
    config = lab.read_flags(QualityConfig, argv, __doc__, **USUAL)
    stages = snapshots(Path(config.base))
    runs = {(share, seed): f"{config.name}-{share:03}-{seed}"
            for share in stages for seed in range(config.seeds)}
    commands = [lab.rl_command(config, name, base=str(stages[share]), seed=seed)
                for (share, seed), name in runs.items()]
    if not lab.run_commands(config, commands):
        return False
    bases = {share: evaluate(config, path) for share, path in stages.items()}
    policies = {place: evaluate(config, Path(config.out) / name) for place, name in runs.items()}
    rows = {}
    for share, seed in runs:
        rows[f"base at {share} %"] = [bases[share]]
        rows[f"  RL, seed {seed}, at {share} %"] = [policies[share, seed]]
    exam.write_lines(f"{config.folder}.txt", exam.table([config.task], rows))
    points = [(share, bases[share], policies[share, seed]) for share, seed in runs]
    lab.quality_figure(f"{config.folder}.png", points)
    print(f"{config.folder}.png")
    return True


if __name__ == "__main__":
    run_main(main)
