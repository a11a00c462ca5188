"""Group-limited routing bounds how many ranks a token visits (V3 section 2.1.2, node-limited routing).

    python -m tests.claims.visits                  two runs of 60 steps on 4 ranks, and visits.png
    python -m tests.claims.visits --steps 200

V3 has its 256 experts on 8 nodes, a group on each, and lets a token go to 4 of them, so that what crosses
between nodes stays bounded. Here 32 experts live on 4 ranks, 4 of them for each token: in 4 groups of which a
token may use 2, or without groups. What came out: 1.95 ranks with groups, 2.76 without; 4 draws out of
32 experts on 4 ranks give `4 (1 - C(24,4) / C(32,4)) = 2.82`.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.io.cli import Knobs, UserError, knob, parse_flags, run_main
from data.io.plot import COLORS, picture
from data.io.run import RunFolder

RUNS = {"groups": "n_group=4 topk_group=2", "no-groups": "n_group=1 topk_group=1"}
TRAIN = "--steps {steps} --eval_every {steps} --expert_parallel 4 --overwrite"
SIZES = "n_routed_experts=32 num_experts_per_tok=4"


@dataclass
class VisitsConfig(Knobs):
    """The knobs of this study."""

    steps: int = knob(60, "steps of each run", least=2)
    out: str = knob("out/visits", "folder of the runs")


def command(name: str, config: VisitsConfig) -> str:
    """What to type for one of `RUNS`."""
    flags = TRAIN.format(steps=config.steps)
    return (f"torchrun --standalone --nproc_per_node=4 train.py {flags} --out {shlex.quote(config.out)} "
            f"--name {name} --set {SIZES} {RUNS[name]}")


def visits_figure(path: Path, runs: dict[str, list[dict]]) -> None:
    """visits.png: ranks that a token visits in a layer, step by step."""
    with picture(path, "Expert parallel: ranks that a token visits", (8, 4.2)) as figure:
        axis = figure.subplots()
        for (name, rows), color in zip(runs.items(), COLORS):
            seen = [row for row in rows if row["ranks_per_token"]]
            x, y = zip(*[(int(row["step"]), float(row["ranks_per_token"])) for row in seen])
            axis.plot(x, y, color=color, label=f"{name}: {RUNS[name]}")
        axis.axhline(2, color=COLORS[7], linestyle="--", label="topk_group = 2: no more than so many")
        axis.set(xlabel="step", ylabel="ranks out of 4", ylim=(0, 4.6))
        axis.legend(loc="upper right")
        axis.grid(axis="y")


def main(argv: list[str]) -> None:
    """Run both and draw what they logged."""
    config = parse_flags(VisitsConfig, argv, __doc__)
    for name in RUNS:
        line = command(name, config)
        print(f"\n$ {line}", flush=True)
        words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
        if subprocess.run(words).returncode:
            raise UserError(f"visits: the run {name} failed, see above")
    rows = {name: RunFolder(Path(config.out) / name).rows() for name in RUNS}
    visits_figure(Path(config.out) / "visits.png", rows)
    for name, each in rows.items():
        last = each[-1]
        print(f"{name:10} {float(last['ranks_per_token']):.2f} ranks a token, {float(last['mb_sent']):.1f} MB a step")


if __name__ == "__main__":
    run_main(main)
