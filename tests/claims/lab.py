"""What the studies of this folder share: flags, commands, examinations, pictures."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Sequence

import data.tasks.__main__ as traces
import rl
import train
from data.io import plot
from data.io.checkpoint import identity
from data.io.cli import parse_flags, pick_device, to_flags
from data.io.plot import COLORS, HEAD_ROOM, picture
from data.io.run import Commands, RunConfig
from rl import RLConfig

PROGRAMS = {"train.py": train.main, "rl.py": rl.main, "data.tasks": traces.main, "data.io.plot": plot.main}
NOT_OF_A_RUN = {"name", "recipe", "resume", "overwrite", "exam", "write", "count",
                "sft_steps", "sft_lr", "mix", "variant"}  # whose knobs are spelled out


def read_flags(cls, argv: Sequence[str], description: str, **usual):
    """`parse_flags` for a study that has other usual values than the class; a flag still wins."""
    return parse_flags(cls, [*to_flags(cls(**usual)), *argv], description,
                       presets={"variant": rl.VARIANTS} if issubclass(cls, RLConfig) else None)


def rl_command(config: RLConfig, name: str, **changes) -> str:
    """`python rl.py` into the folder `name`, with the knobs of the study but for the `changes`."""
    names = RLConfig.__dataclass_fields__.keys() - NOT_OF_A_RUN
    run = RLConfig(**{each: getattr(config, each) for each in names} | changes)
    return shlex.join(["python", "rl.py", *to_flags(run), "--name", name])


def run_commands(config: RunConfig, commands: list[str]) -> bool:
    """Run them (see data.io.run.Commands); False when a signal ended one early."""
    of = identity(getattr(config, "base", "")) if getattr(config, "base", "") else ""
    is_complete = Commands(config, PROGRAMS, of=of).run(commands)
    if not is_complete:
        print("the study goes on with its own command and --resume")
    return is_complete


def open_policy(config: RLConfig, directory: str | Path) -> rl.Policy:
    """The checkpoint, to be asked with the knobs of the study. Raises UserError without a model."""
    world = train.Dist(device=pick_device(config.device))
    return rl.Policy(replace(config, base=str(directory)), world)


def thinking_figure(path: str | Path, found: dict[str, dict]) -> None:
    """thinking.png: accuracy bought at test time, with a budget of thought and with votes.

    found: name of the model -> its full evaluation, with `budget`, `majority` and `pass` as
    {number: [mean, error]}.
    """
    title = "Test-time compute: accuracy on held-out questions"
    with picture(path, title, (11, 4.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, values), color in zip(found.items(), COLORS[1::-1]):
            curves = ((left, "budget", name, "-"), (right, "majority", f"{name}: majority", "-"),
                      (right, "pass", f"{name}: any right", "--"))
            for axis, key, label, line in curves:
                x = [int(k) for k in values[key]]
                y, error = zip(*values[key].values())
                axis.errorbar(range(len(x)) if axis is left else x, y, error, color=color,
                              label=label, linestyle=line, marker="o", markersize=4, elinewidth=1)
                if axis is left:
                    axis.set_xticks(range(len(x)), x)
        left.set(title="thought cut after so many tokens", xlabel="tokens of thought",
                 ylabel="share right", ylim=(0, HEAD_ROOM))
        left.set_yticks([0, 0.25, 0.5, 0.75, 1])
        right.set(title="so many answers to one question", xlabel="answers", xscale="log")
        right.set_xticks(x, x)
        right.minorticks_off()
        for axis in (left, right):
            axis.legend(loc="upper left", ncols=2)
            axis.grid(axis="y")


def quality_figure(path: str | Path, rows: list[tuple[int, dict, dict]]) -> None:
    """quality.png: accuracy and length of thought after RL against the share of the pretraining run.

    rows: (share in %, evaluation of the base, evaluation after RL).
    """
    shares, before, after = zip(*rows)
    with picture(path, "Reinforcement learning against base quality", (11, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(shares, [found["accuracy"][0] for found in before], color=COLORS[7], label="base")
        left.plot(shares, [found["accuracy"][0] for found in after], "o", color=COLORS[0],
                  label="after RL, each seed")
        right.plot(shares, [found["length"] for found in before], color=COLORS[7], label="base")
        right.plot(shares, [found["length"] for found in after], "o", color=COLORS[0],
                   label="after RL, each seed")
        left.set_title("accuracy on held-out questions")
        right.set_title("length of an answer in tokens")
        for axis in (left, right):
            axis.set(xlabel="% of the pretraining run", ylim=(0, None))
            axis.legend()
            axis.grid(axis="y")
