"""A run of a program: its folder with knobs, log and state, its loop, its signals, its progress."""

import csv
import json
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Iterator, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from data.io.checkpoint import write_json, written_aside
from data.io.cli import Knobs, UserError, knob

# ---------------------------------------------------------------------------------- the run folder


@dataclass
class RunConfig(Knobs):
    """The knobs of every run, of pretraining and of reinforcement learning."""

    out: str = knob("out", "folder of all runs")
    name: str = knob("", "folder of this run, within --out")
    resume: bool = knob(False, "go on from the last checkpoint of this run")
    overwrite: bool = knob(False, "start over although the run folder holds a checkpoint")
    seed: int = knob(0, "seed of all chance")
    device: str = knob("auto", "auto, cpu, cuda or mps")
    impl: str = knob("fused", "twins of kernels.py", choices=("fused", "reference"))
    eval_every: int = knob(100, "steps between evaluations; each one saves and redraws the pictures", least=1)
    micro_batch: int = knob(32, "sequences of one forward pass on one rank; the rest is accumulated", least=1)
    clip: float = knob(1.0, "largest norm of the gradient", above=0)
    weight_decay: float = knob(0.1, "AdamW: decay of matrices; norms and biases have none", least=0)

    # what may differ when a run is resumed: where and how it is computed, not what
    FREE_ON_RESUME = frozenset({"resume", "overwrite", "out", "device", "impl", "micro_batch", "recompute",
                                "snapshots"})

    def rules(self):
        is_plain = self.name not in ("", ".", "..") and Path(self.name).name == self.name
        yield "name", "a plain folder name (the place goes into --out)", is_plain

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


class RunFolder:
    """out/<name>/: the checkpoint directory, the knobs, the log, and what is needed to go on.

    `save` writes state.safetensors whole or not at all, so a kill at any moment leaves weights,
    optimizer and notes of one and the same step. Only the process with `is_main` writes.
    """

    def __init__(self, path: str | Path, is_main: bool = True, knobs_file: str = "train.json"):
        self.path, self.is_main = Path(path), is_main
        self.knobs_path, self.log_path = self.path / knobs_file, self.path / "log.csv"
        self.state_path = self.path / "state.safetensors"

    def start(self, knobs: dict, overwrite: bool = False) -> None:
        """Begin a new run. Raises UserError when a checkpoint is in the way."""
        is_taken = (self.path / "model.safetensors").exists() or self.state_path.exists()
        if is_taken and not overwrite:
            raise UserError(f"{self.path} holds a run already: --resume goes on with it, --overwrite "
                            "starts over, --name NAME begins another one")
        if self.is_main:
            write_json(self.knobs_path, knobs)
            self.state_path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)

    def resume(self, knobs: dict, free: Collection[str] = ()) -> tuple[dict[str, Tensor], dict]:
        """Tensors and notes of the last `save`; the log is cut at its step.

        Raises UserError when there is nothing to resume, or when a knob that is not in `free` differs
        from the run's own.
        """
        try:
            was = json.loads(self.knobs_path.read_text(encoding="utf-8"))
            with safe_open(self.state_path, framework="pt") as state:
                tensors = {name: state.get_tensor(name) for name in state.keys()}
                notes = json.loads(state.metadata()["notes"])
            names = sorted((was.keys() | knobs.keys()) - set(free))
        except FileNotFoundError:
            raise UserError(f"nothing to resume in {self.path}: no checkpoint; "
                            "go without --resume") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: state cannot be read ({error}); "
                            "--overwrite starts over") from None
        told = [f"{name} was {was.get(name)!r}, is {knobs.get(name)!r}" for name in names
                if was.get(name) != knobs.get(name)]
        if told:
            raise UserError(f"cannot resume {self.path} with another config: {', '.join(told)}")
        self._cut_log(notes["step"])
        return tensors, notes

    def save(self, modules: nn.Module, optimizer: torch.optim.Optimizer, notes: dict,
             **tensors: Tensor | None) -> None:
        """Replace the state, or the earlier one stays. notes must be JSON and hold "step".

        The file has `modules.state_dict()`, the optimizer's state as "optimizer.<key>.<parameter>",
        and `tensors` (but None) under their own names; `load_state` is the inverse.
        """
        if not self.is_main:
            return
        names = {parameter: name for name, parameter in modules.named_parameters()}
        state = modules.state_dict() | {name: value for name, value in tensors.items() if value is not None}
        for parameter, its_state in optimizer.state.items():
            state |= {f"optimizer.{key}.{names[parameter]}": value for key, value in its_state.items()}
        with written_aside(self.state_path) as aside:
            whole = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            save_file(whole, aside, metadata={"notes": json.dumps(notes)})

    def log(self, values: dict, columns: Sequence[str]) -> None:
        """Append the values to log.csv in the order of `columns`, empty where there is none.

        The first row writes the columns above itself. Raises UserError when the disk is full.
        """
        if not self.is_main:
            return
        cells = [values.get(name, "") for name in columns]
        row = [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells]
        try:
            with open(self.log_path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([row] if file.tell() else [columns, row])
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error}") from None

    def rows(self) -> list[dict[str, str]]:
        """The rows of log.csv, less a last one that a kill cut short."""
        text = self.log_path.read_text(encoding="utf-8") if self.log_path.exists() else ""
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def _cut_log(self, step: int) -> None:
        """Drop what the log holds of steps that are done again."""
        rows = self.rows()
        if self.is_main and rows:
            with written_aside(self.log_path) as aside:
                with open(aside, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(row for row in rows if float(row["step"]) <= step)


def load_state(modules: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put what `RunFolder.save` wrote back into modules and optimizer.

    Raises UserError when the state is not of these modules.
    """
    missing = sorted(modules.state_dict().keys() - tensors.keys())
    if missing:
        raise UserError(f"the state has no {missing[0]}: it is of another model; --overwrite starts over")
    modules.load_state_dict({name: tensors[name] for name in modules.state_dict()})
    parameters = dict(modules.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, its_name = name.split(".", 2)
            parameter = parameters[its_name]
            optimizer.state[parameter][key] = tensor.to(parameter.device)


def newest_run(root: str | Path = "out") -> Path:
    """The checkpoint directory below `root` that was written last. Raises UserError without one."""
    weights = [path for path in Path(root).rglob("model*.safetensors")
               if (path.parent / "config.json").exists()]
    if not weights:
        raise UserError(f"no checkpoint below {root}/: python train.py makes one, "
                        "--checkpoint names another")
    return max(weights, key=lambda path: path.stat().st_mtime_ns).parent


class SavedRun:
    """What the trainers of train.py and rl.py share: a checkpoint for others, and a state to go on from.

    They have model, tokenizer, modules, optimizer, folder, world, `loads` (a list of tensors) and
    NOTES, the names of their attributes that are saved as JSON.
    """

    NOTES: tuple[str, ...] = ("step",)

    def save(self, **more) -> None:
        """First the checkpoint directory, then the state with `more` tensors and notes."""
        if self.world.is_main:
            self.model.save_pretrained(self.folder.path, self.tokenizer)
        notes = {name: getattr(self, name) for name in self.NOTES}
        tensors = {"loads": torch.stack(self.loads)} if self.loads else {}
        for name, value in more.items():
            (tensors if torch.is_tensor(value) else notes)[name] = value
        self.folder.save(self.modules, self.optimizer, notes, **tensors)
        self.world.barrier()

    def restore(self, tensors: dict[str, Tensor], notes: dict) -> None:
        """Take up where `save` left off."""
        load_state(self.modules, self.optimizer, tensors)
        self.loads = list(tensors.get("loads", ()))
        for name in self.NOTES:
            setattr(self, name, notes[name])


# ---------------------------------------------------------------------------------------- the loop


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a stop after the running step; a second acts at once."""

    def __enter__(self):
        self.is_set = False
        kinds = (signal.SIGINT, signal.SIGTERM)
        self.before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def _ask(self, kind, frame):
        self.is_set = True
        self.__exit__()

    def __exit__(self, *exception):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class Loop:
    """The steps of a run, `for step in loop`, from `done` + 1 to `total`, and what is seen of them.

    A signal ends it after the running step; `agree` is asked before each step, and says True on every
    rank when the flag of one is True. However the loop ends, the handlers of signals are back and the
    bar is closed. A terminal has a bar, a file a plain line now and then; only the main process shows.
    """

    def __init__(self, folder: RunFolder, *, done: int, total: int, every: int, label: str = "train",
                 agree: Callable[[bool], bool] = bool):
        self.step, self.total, self.every, self.agree = done, total, every, agree
        self.first, self.label, self.is_main = done, label, folder.is_main
        self.started, is_terminal = time.monotonic(), sys.stderr.isatty()
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix[0]} {elapsed}, {remaining} left"
        self.bar = tqdm(total=total, initial=done, desc=label, disable=not (is_terminal and self.is_main),
                        dynamic_ncols=True, smoothing=0.05, bar_format=layout, postfix=[""])

    def __iter__(self) -> Iterator[int]:
        try:
            with StopSignal() as stop:
                while self.step < self.total and not self.agree(stop.is_set):
                    self.step += 1
                    yield self.step
        finally:
            self.bar.close()

    @property
    def is_due(self) -> bool:
        """At every `every`-th step and at the last one."""
        return self.step % self.every == 0 or self.is_complete

    @property
    def is_complete(self) -> bool:
        return self.step == self.total

    def show(self, text: str) -> None:
        """What there is to say about the running step, once it is done."""
        if not self.bar.disable:
            self.bar.postfix[0] = text
            self.bar.update(1)
        elif self.is_main and (self.step % max(1, self.total // 20) == 0 or self.is_complete):
            pace = (time.monotonic() - self.started) / (self.step - self.first)  # seconds per step
            left = minutes(pace * (self.total - self.step))
            print(f"{self.label} {self.step}/{self.total}  {text}  {left} left", flush=True)

    def note(self, text: str) -> None:
        """A line that stays above the bar."""
        if self.is_main:
            tqdm.write(text)


class Commands:
    """Commands that can be typed, run here one after the other.

    What is finished is noted in out/<name>.json: with `resume` it is passed over, and the command that
    was cut off goes on. programs: "rl.py" -> a main(argv) that says False when a signal ended it early.
    """

    def __init__(self, config: RunConfig, programs: dict[str, Callable[[list[str]], bool]],
                 say: Callable = print, is_main: bool = True):
        self.config, self.programs, self.say, self.is_main = config, programs, say, is_main
        self.notes = Path(f"{config.folder}.json")

    def run(self, commands: list[str]) -> bool:
        """Run them all; False when a signal ended one early."""
        finished = []
        if self.config.resume and self.notes.exists():
            finished = json.loads(self.notes.read_text(encoding="utf-8"))
        for i, command in enumerate(commands):
            if finished[: i + 1] == commands[: i + 1]:
                continue
            self.say(f"\n$ {command}")
            program, *flags = shlex.split(command)[1:]
            if program == "-m":
                program, *flags = flags
            if self.programs[program](flags + self._more(flags)) is False:
                return False
            if self.is_main:
                write_json(self.notes, commands[: i + 1])
        return True

    def _more(self, flags: list[str]) -> list[str]:
        """--resume for a run that was cut off, --overwrite where it is asked for."""
        names = [b if a == "--name" else a.removeprefix("--name=") for a, b in zip(flags, [*flags[1:], ""])
                 if a == "--name" or a.startswith("--name=")]
        if not names:
            return []
        state = Path(self.config.out, names[-1], "state.safetensors")
        if self.config.resume:
            return ["--resume"] if state.exists() else []
        return ["--overwrite"] if self.config.overwrite else []


# ----------------------------------------------------------------------------------------- in words


def minutes(seconds: float) -> str:
    """A duration for people.

    >>> minutes(200), minutes(7300)
    ('3m20s', '2h01m')
    """
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}m{rest:02}s" if whole < 60 else f"{whole // 60}h{whole % 60:02}m"


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of the GPU"
    try:
        import resource
    except ImportError:  # Windows has no such module
        return "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB"
