"""A run of a program: its folder with knobs, log and state, its loop, its signals, its progress."""

import csv
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from data.io.checkpoint import read_json, remove_abandoned, write_json, write_text
from data.io.cli import Knobs, UserError, knob, mute, progress
from data.io.ranks import Dist, is_restarted, is_split, local
from data.io.state import SavedState, load_state, save_state, saved_states, state_of

# ---------------------------------------------------------------------------------- the run folder

MADE = ("state-*", "at-*", "model*.safetensors*", "config.json", "generation_config.json", "tokenizer*.json",
        "special_tokens_map.json", "chat_template.jinja", "tiktoken.model", "tokenization_*.py", "*.png",
        "answers.txt", "report.*", "README.md")  # by a run, in its folder


@dataclass
class RunConfig(Knobs):
    """The knobs of every run, of pretraining and of reinforcement learning."""

    out: str = knob("out", "folder of all runs")
    name: str = knob("", "folder of this run, within --out")
    resume: bool = knob(False, "go on from the last checkpoint of this run")
    overwrite: bool = knob(False, "start over although the run folder holds a checkpoint")
    seed: int = knob(0, "seed of all chance", least=0)
    device: str = knob("auto", "auto, cpu, cuda or mps")
    impl: str = knob("fused", "twins of kernels.py", choices=("fused", "reference"))
    eval_every: int = knob(100, "steps between evaluations; each one saves and redraws the pictures", least=1)
    micro_batch: int = knob(16, "sequences of one forward pass on one rank; the rest is accumulated", least=1)
    clip: float = knob(1.0, "largest norm of the gradient", above=0)
    weight_decay: float = knob(0.1, "AdamW: decay of matrices; norms and biases have none", least=0)
    max_bad_steps: int = knob(5, "steps in a row whose gradient is not finite, and which are left out,"
                                 " before the run gives up", least=1)
    expert_parallel: int = knob(1, "of several processes: so many share the experts of a layer", least=1)
    zero: int | None = knob(None, "what ranks split among them: 3 weights, gradients and moments, 2 the same but for"
                                  " weights within a step, 0 nothing [3 under torchrun, 0 on one CPU]",
                            choices=(0, 2, 3))
    processes: int | None = knob(None, "on a CPU: processes that share each batch [a core each]", least=1)

    # what may differ when a run is resumed: where and how it is computed, how often it is looked at, and
    # the learning rate, since a run that diverged goes on with a lower one
    FREE_ON_RESUME = frozenset({"resume", "overwrite", "out", "device", "impl", "micro_batch", "recompute",
                                "snapshots", "eval_every", "lr", "steps", "max_bad_steps", "expert_parallel",
                                "zero", "processes"})

    def rules(self):
        is_plain = self.name not in ("", ".", "..") and Path(self.name).name == self.name
        yield "name", "a plain folder name (the place goes into --out)", is_plain
        yield "zero", "2 or 3 with --expert_parallel", self.zero != 0 or self.expert_parallel == 1

    def shares(self) -> tuple[int, int]:
        """Parts into which a batch can be cut, and how many of them are worth a process."""
        return 1, 1

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


class RunFolder:
    """out/<name>/: the checkpoint directory, the knobs, the log, and what is needed to go on.

    `save` writes a state whole or not at all, so a kill at any moment leaves weights, optimizer, notes and
    log of one and the same step. Only the first rank writes besides its shard, and it holds a lock: two runs
    cannot share a folder.
    """

    def __init__(self, path: str | Path, world: Dist | None = None, knobs_file: str = "train.json"):
        self.path, self.world, self.knobs = Path(path), world or Dist(), None
        self.is_main = self.world.is_main
        self.knobs_path, self.log_path = self.path / knobs_file, self.path / "log.csv"

    def begin(self, knobs: dict, config: RunConfig) -> tuple[Mapping[str, Tensor], dict]:
        """What there is to go on from, where that is asked for; else nothing, when nothing is in the way.

        Raises UserError as `resume` or `check`. A new run calls `start` once all that can fail is done. A
        process that torchrun started again goes on with the run that it began.
        """
        if config.resume or is_restarted() and self.knobs_path.exists():
            return self.resume(knobs, config.FREE_ON_RESUME)
        self.check(config.overwrite)
        return {}, {}

    def check(self, overwrite: bool = False) -> None:
        """Raises UserError when a run is in the way; nothing is touched."""
        is_taken = (self.path / "model.safetensors").exists() or saved_states(self.path)
        if is_taken and not overwrite:
            raise UserError(f"{self.path} holds a run already: --resume goes on with it, --overwrite "
                            "starts over, --name NAME begins another one")

    def start(self, knobs: dict, overwrite: bool = False) -> None:
        """Begin a new run: what an earlier one made goes, its state first. Raises UserError as `check`.

        Whatever can fail comes before: this destroys.
        """
        if self.is_main:
            self.check(overwrite)
            self._lock()
            for stale in (*(p for made in MADE for p in self.path.glob(made)), self.log_path):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
            write_json(self.knobs_path, knobs)

    def resume(self, knobs: dict, free: Collection[str] = ()) -> tuple[Mapping[str, Tensor], dict]:
        """Tensors and notes of the last `save`, the run's knobs among them; log.csv is what it was then.

        A run that was killed before its first save has neither: it starts over, with a line that says
        so. Raises UserError when there is no run, or a knob that is not in `free` differs from its own.
        """
        try:
            was = read_json(self.knobs_path)
        except FileNotFoundError:
            raise UserError(f"nothing to resume in {self.path}: no checkpoint; "
                            "go without --resume") from None
        told = [f"{name} was {was.get(name)!r}, is {knobs.get(name)!r}"
                for name in sorted((was.keys() | knobs.keys()) - set(free))
                if was.get(name) != knobs.get(name)]
        if told:
            raise UserError(f"cannot resume {self.path} with another config: {', '.join(told)} (another --name can "
                            f"start from the weights in {self.path})")
        if self.is_main:
            self._lock()
        states = saved_states(self.path)
        if not states:
            self.world.say(f"{self.path}: no state was saved yet, starting over")
            return {}, {}
        state = SavedState(states[-1])
        if "log" not in state or not isinstance(state.notes.get("step"), int):
            raise UserError(f"{state.path}: is no state of a run; --overwrite starts over")
        if self.is_main:
            write_text(self.log_path, bytes(state["log"]).decode("utf-8", "replace"))
        self.knobs = knobs  # some may have changed: the next save notes them
        return state, state.notes | {"knobs": was}

    def save(self, modules: nn.Module, optimizer: torch.optim.Optimizer, notes: dict,
             **tensors: Tensor | None) -> None:
        """Replace the state, or the earlier one stays. notes must be JSON and hold "step".

        It has `state_of` modules and optimizer, the text of log.csv, and `tensors` (but None) under their own
        names; `load_state` is the inverse. Every rank calls this.
        """
        state = state_of(modules, optimizer)
        state |= {name: value for name, value in tensors.items() if value is not None}
        if self.is_main:
            log = self.log_path.read_bytes() if self.log_path.exists() else b""
            state["log"] = torch.tensor(np.frombuffer(log, np.uint8))  # (bytes,)
            if self.knobs is not None:
                write_json(self.knobs_path, self.knobs)
                self.knobs = None
        save_state(self.path, state, notes, self.world)

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

    def _lock(self) -> None:
        """Hold the folder until this process ends. Raises UserError when another one does."""
        try:
            import fcntl
        except ImportError:  # Windows has no such module, and no lock
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a+", encoding="utf-8")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock.truncate(0)
            self.lock.write(str(os.getpid()))
            self.lock.flush()
            remove_abandoned(self.path)
        except BlockingIOError:
            self.lock.seek(0)
            raise UserError(f"{self.path} is in use by process {self.lock.read() or '(unknown)'}: wait for it, "
                            "end it, or take another --name") from None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from None


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

    They have config, model, tokenizer, modules, optimizer, folder, world, `loads` (a list of tensors), NOTES,
    the names of their attributes that are saved as JSON, perhaps a `loader` of data, and `whole(main_only)`,
    the model with all its weights.
    """

    NOTES: tuple[str, ...] = ("step",)
    loader = None
    bad_steps = 0  # in a row

    def save(self) -> None:
        """First the checkpoint directory, then the state, chance and place in the data included.

        Raises UserError when a weight is not finite: the last good checkpoint stays.
        """
        is_finite = [local(parameter.detach()).isfinite().all() for parameter in self.model.parameters()]
        if self.world.any(not torch.stack(is_finite).all()):
            raise UserError(f"step {self.step}: the weights are not finite, nothing was saved; lower --lr: "
                            "--resume goes on from the last checkpoint")
        self.publish(self.folder.path)
        notes = {name: getattr(self, name) for name in self.NOTES}
        tensors = {"rng": torch.get_rng_state(), "loads": torch.stack(self.loads) if self.loads else None}
        if self.loader is not None:
            notes["loader"] = self.loader.state_dict()
        self.folder.save(self.modules, self.optimizer, notes, **tensors)

    def publish(self, path: Path) -> None:
        """Write the checkpoint directory; every rank calls this, the first one writes."""
        model = self.whole(main_only=True)
        self.world.on_main(lambda: model.save_pretrained(path, self.tokenizer))

    def check_bad_steps(self, is_bad: bool) -> None:
        """Count steps that were left out. Raises UserError after too many in a row."""
        self.bad_steps = self.bad_steps + 1 if is_bad else 0
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(f"step {self.step + 1}: the gradient was not finite {self.bad_steps} times in a row: lower "
                            f"--lr; --resume goes on from the last save in {self.folder.path}")

    @contextmanager
    def saved_if_refused(self) -> Iterator[None]:
        """Whatever stops a run inside the block, what was done before it is saved first.

        Of several processes the first one saves alone, if it holds the whole model and knows why it stops: where the
        others are, nobody knows.
        """
        try:
            yield
        except Exception as error:
            world, is_refused = self.world, isinstance(error, UserError)
            is_able = world.world_size == 1 or world.is_main and is_refused and not is_split(self.model)
            if is_able and self.step:
                self.world = self.folder.world = Dist(device=world.device)
                with suppress(UserError):  # the first reason is the one to tell
                    self.save()
            raise

    def restore(self, tensors: SavedState, notes: dict) -> None:
        """Take up where `save` left off."""
        load_state(self.modules, self.optimizer, tensors)
        self.loads = list(tensors.get("loads", ()))
        for name in self.NOTES:
            setattr(self, name, notes[name])
        if self.loader is not None:
            self.loader.load_state_dict(notes["loader"])
        torch.set_rng_state(tensors["rng"])


# ---------------------------------------------------------------------------------------- the loop


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop after the running step; a second acts at once."""

    def __enter__(self):
        self.is_set, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            last = STOPS[-1]  # ignored under nohup, where a run outlives its terminal
            kinds = STOPS[:-1] if signal.getsignal(last) is signal.SIG_IGN else STOPS
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

    A signal ends it after the running step, and so does a reader of the output that is gone (`| head`) or
    torchrun that died; `agree` is asked before each step, and says True on every rank when the flag of
    one is True. However the loop ends, the handlers of signals are back and the bar is closed. A terminal
    has a bar, a file a plain line now and then; only the main process shows.
    """

    def __init__(self, folder: RunFolder, *, done: int, total: int, every: int, label: str = "train",
                 agree: Callable[[bool], bool] = bool):
        self.step, self.total, self.every, self.agree = done, total, every, agree
        self.first, self.label, self.is_main = done, label, folder.is_main
        self.started, is_terminal, self.is_unheard = time.monotonic(), bool(sys.stderr and sys.stderr.isatty()), False
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix[0]} {elapsed}, {remaining} left"
        self.bar = progress(total=total, initial=done, desc=label, disable=not (is_terminal and self.is_main),
                        dynamic_ncols=True, smoothing=0.05, bar_format=layout, postfix=[""])

    def __iter__(self) -> Iterator[int]:
        try:
            with StopSignal() as stop:
                parent = os.getppid()
                while self.step < self.total:
                    is_orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent
                    if self.agree(stop.is_set or self.is_unheard or is_orphan):
                        break
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
        return self.step >= self.total

    def show(self, text: str) -> None:
        """What there is to say about the running step, once it is done."""
        if not self.bar.disable:
            self.bar.postfix[0] = text
            self.bar.update(1)
        elif self.is_main and (self.step % max(1, self.total // 20) == 0 or self.is_complete):
            pace = (time.monotonic() - self.started) / (self.step - self.first)  # seconds per step
            left = minutes(pace * (self.total - self.step))
            self.note(f"{self.label} {self.step}/{self.total}  {text}  {left} left")

    def note(self, text: str) -> None:
        """A line that stays above the bar."""
        try:
            if self.is_main and sys.stdout:
                self.bar.write(text)
                sys.stdout.flush()
        except OSError:  # the reader has gone, or the disk of the log is full
            self.is_unheard = True
            mute()


class Commands:
    """Commands that can be typed, run here one after the other.

    What is finished is noted in out/<name>.json: with `resume` it is passed over, and the command that
    was cut off goes on. programs: "rl.py" -> a main(argv) that says False when a signal ended it early;
    of: what the commands start from, which must be the same when they are resumed.
    """

    def __init__(self, config: RunConfig, programs: dict[str, Callable[[list[str]], bool]],
                 say: Callable = print, is_main: bool = True, of: str = ""):
        self.config, self.programs, self.say, self.is_main, self.of = config, programs, say, is_main, of
        self.notes = Path(f"{config.folder}.json")

    def run(self, commands: list[str]) -> bool:
        """Run them all; False when a signal ended one early."""
        finished = []
        if self.config.resume and self.notes.exists():
            notes = read_json(self.notes)
            if notes.get("of") != self.of:
                raise UserError(f"{self.notes}: what these commands start from has changed since; --overwrite "
                                "starts over, --name NAME begins another one")
            finished = notes.get("finished", [])
        if finished == commands:
            self.say(f"all {len(commands)} commands are finished; --overwrite starts over")
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
                write_json(self.notes, {"of": self.of, "finished": commands[: i + 1]})
        return True

    def _more(self, flags: list[str]) -> list[str]:
        """--resume for a run that was cut off, --overwrite where it is asked for."""
        if "--name" not in flags:
            return []
        folder = Path(self.config.out, flags[flags.index("--name") + 1])
        if self.config.resume:
            is_begun = (folder / "train.json").exists() or (folder / "rl.json").exists()
            return ["--resume"] if is_begun else []
        return ["--overwrite"] if self.config.overwrite else []


# ----------------------------------------------------------------------------------------- in words


def minutes(seconds: float) -> str:
    """A duration for people.

    >>> minutes(200), minutes(7300)
    ('3m20s', '2h01m')
    """
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}m{rest:02}s" if whole < 60 else f"{whole // 60}h{whole % 60:02}m"


def to_go_on(program: str, argv: Sequence[str]) -> str:
    """What to type so that a run that was stopped goes on."""
    flags = [flag for flag in argv if flag not in ("--resume", "--overwrite")]
    return f"to go on:\n  python {program} {shlex.join([*flags, '--resume'])}"


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
