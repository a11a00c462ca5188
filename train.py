"""Pretraining: the loop around the model, and its run folder.

    python train.py                            preset tiny on the embedded corpus, a few minutes on a CPU
    python train.py --data my/texts --name my  your own text
    python train.py --resume                   go on after Ctrl-C or a crash, bit for bit
    torchrun --nproc_per_node=2 train.py       the same losses on two processes

A run lives in out/<name>/: the checkpoint (a Hugging Face directory), train.json, log.csv, three pictures,
and state.safetensors, from which --resume goes on. Fine-tuning is the same `Trainer` with another loader.
"""

import csv
import gc
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import UserError, nearest, plot, run_main
from data.corpus import prepare
from data.loader import Loader, eval_batches
from data.tasks import BOS, load_task, prompt_text
from data.tokenizer import load_tokenizer
from kernels import IGNORE, matmul_ceiling
from model import (PRESETS, Config, Transformer, count_parameters, flops_per_token, load_pretrained,
                   save_pretrained, write_json, written_aside)
from sample import evaluating, generate, knob, parse_flags, pick_device

# --------------------------------------------------------------------------------------------- the knobs


@dataclass
class TrainConfig:
    """Every knob of a pretraining run. Fractions are of the tokens of the whole run."""

    preset: str = knob("tiny", "size of the model: " + ", ".join(PRESETS))
    set: list[str] = knob([], "changes of the preset, as hidden_size=128 n_routed_experts=32")
    init_from: str = knob("", "start from the weights of this checkpoint directory, in place of random ones")
    data: str = knob("local", "corpus: local, shakespeare, tinystories[:MB], fineweb[:shards], or a path")
    tokenizer: str = knob("plainseek:1024", "plainseek[:size], gpt2, cl100k, or a path to a tokenizer.json")
    out: str = knob("out", "folder of all runs")
    name: str = knob("base", "folder of this run, within --out")
    resume: bool = knob(False, "go on from the last checkpoint of this run")
    overwrite: bool = knob(False, "start over although the run folder holds a checkpoint")
    steps: int = knob(1000, "optimizer steps")
    tokens_per_step: int = knob(4096, "tokens of one optimizer step, over all ranks")
    seq_len: int = knob(128, "tokens of one sequence")
    micro_batch: int = knob(32, "sequences of one forward pass on one rank; the rest is accumulated")
    lr: float = knob(2e-3, "peak learning rate (V3: 2.2e-4)")
    warmup_until: float = knob(0.02, "the learning rate rises linearly until this fraction")
    constant_until: float = knob(0.4, "and stays at --lr until this one (V3: 0.68)")
    cosine_until: float = knob(0.97, "then falls along a cosine to --cosine_to until this one (V3: 0.97)")
    cosine_to: float = knob(0.1, "end of the cosine, relative to --lr")
    final_from: float = knob(0.985, "the last part, at --final_to, begins at this fraction (V3: 0.99)")
    final_to: float = knob(0.033, "learning rate of the last part, relative to --lr")
    ramp_from: float = knob(1.0, "batch size of the first step, relative to --tokens_per_step (V3: 0.2)")
    ramp_until: float = knob(0.03, "fraction of the steps at which the batch has its full size")
    beta1: float = knob(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = knob(0.95, "AdamW: decay of the mean of their squares")
    weight_decay: float = knob(0.1, "AdamW: decay of matrices; norms and biases have none")
    clip: float = knob(1.0, "largest norm of the gradient")
    mtp_loss_weight: float = knob(0.3, "weight of the multi-token prediction loss")
    mtp_loss_weight_later: float = knob(0.1, "its weight after --mtp_switch")
    mtp_switch: float = knob(0.68, "fraction at which it changes (V3: 10T of 14.8T tokens)")
    aux_loss_alpha: float = knob(1e-4, "weight of the sequence-wise balance loss")
    bias_update_speed: float = knob(1e-3, "step of the routing bias after every optimizer step")
    bias_until: float = knob(0.97, "fraction after which the bias stays (V3: 14.3T of 14.8T tokens)")
    eval_every: int = knob(100, "steps between evaluations; each one saves and redraws the pictures")
    eval_tokens: int = knob(8192, "tokens per evaluation and domain, of validation and of training text each")
    keep: list[float] = knob([], "fractions of the run at which the weights are kept, in at-010 and so on")
    seed: int = knob(0, "seed of weights and data order")
    device: str = knob("auto", "auto, cpu, cuda or mps")
    precision: str = knob("auto", "of activations; auto: fp32 or bf16", choices=("auto", "fp32", "bf16", "fp8"))
    impl: str = knob("fused", "twins of kernels.py", choices=("fused", "reference"))
    isolate: bool = knob(True, "documents packed into one row do not see each other (V3: they do)")
    recompute: bool = knob(False, "keep block inputs only, compute activations again in the backward pass")
    bench: bool = knob(False, "time a step on random tokens, beside transformers' model, in place of training")
    profile: bool = knob(False, "trace three steps and name the costliest operations, in place of training")

    def __post_init__(self):
        for name, wanted, is_met in self._rules():
            if not is_met:
                raise UserError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")

    def _rules(self):
        for name in ("steps", "tokens_per_step", "seq_len", "micro_batch", "eval_every", "eval_tokens"):
            yield name, "at least 1", getattr(self, name) >= 1
        for name in ("lr", "clip"):
            yield name, "a number above 0", 0 < getattr(self, name) < math.inf
        floor = 0.0
        for name in ("warmup_until", "constant_until", "cosine_until", "final_from"):
            yield name, f"{floor} to 1 (they follow each other)", floor <= getattr(self, name) <= 1
            floor = getattr(self, name)
        yield "tokens_per_step", f"a multiple of seq_len = {self.seq_len}", self.tokens_per_step % self.seq_len == 0
        yield "ramp_from", "above 0, at most 1", 0 < self.ramp_from <= 1
        is_plain = self.name not in ("", ".", "..") and Path(self.name).name == self.name
        yield "name", "a plain folder name (the place goes into --out)", is_plain


# Other training knobs that go with a preset; a flag on the command line still wins.
RECIPES = {
    "small": "--data tinystories:400 --tokenizer plainseek --steps 6000 --tokens_per_step 65536 --lr 1e-3 "
             "--seq_len 1024 --micro_batch 16 --eval_every 500 --eval_tokens 65536 --ramp_from 0.25 --no-isolate",
    "medium": "--data fineweb:20 --tokenizer gpt2 --steps 20000 --tokens_per_step 524288 --lr 5e-4 "
              "--seq_len 2048 --micro_batch 8 --eval_every 1000 --eval_tokens 262144 --ramp_from 0.25 --no-isolate",
}
# Knobs that may differ when a run is resumed: they change where and how it is computed, not what.
FREE_ON_RESUME = {"resume", "overwrite", "out", "device", "impl", "recompute", "micro_batch", "keep", "bench",
                  "profile"}


def model_changes(settings: list[str]) -> dict:
    """The `--set` flags as keyword arguments of `Config.preset`. Raises UserError for an unknown key.

    >>> model_changes(["hidden_size=128", "q_lora_rank=none", "scoring_func=softmax"])
    {'hidden_size': 128, 'q_lora_rank': None, 'scoring_func': 'softmax'}
    """
    kinds, changes = {f.name: type(f.default) for f in fields(Config)}, {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in kinds:
            raise UserError(f"set: the model's config has no key {key!r}{nearest(key, kinds)}")
        words = {"none": None, "true": True, "false": False}
        try:
            changes[key] = words[value.lower()] if value.lower() in words else kinds[key](value)
        except ValueError:
            raise UserError(f"set: {key} is {value!r}, wanted a {kinds[key].__name__}") from None
    return changes


# ----------------------------------------------------------------------------------------- the schedules


def lr_factor(done: float, config) -> float:
    """Learning rate relative to its peak once the fraction `done` of the tokens is seen (V3 section 4.2).

    Linear warm-up, constant, cosine, its end value, and a last part still lower.
    """
    if done < config.warmup_until:
        return done / config.warmup_until
    if done <= config.constant_until:
        return 1.0
    if done >= config.final_from:
        return config.final_to
    fall = min(1.0, (done - config.constant_until) / max(config.cosine_until - config.constant_until, 1e-9))
    return config.cosine_to + (1 - config.cosine_to) * 0.5 * (1 + math.cos(math.pi * fall))


class Plan:
    """What each step of a run does: `sequences` in its global batch, `tokens` seen after it, its knobs."""

    def __init__(self, config: TrainConfig, world_size: int = 1):
        full = config.tokens_per_step // config.seq_len
        if full % world_size:
            raise UserError(f"tokens_per_step: {full} sequences cannot be shared by {world_size} ranks, wanted "
                            f"a multiple of {world_size * config.seq_len}")
        self.config, self.steps = config, config.steps
        ramp, rise = max(1.0, config.ramp_until * config.steps), 1 - config.ramp_from
        shares = [config.ramp_from + rise * min(1.0, step / ramp) for step in range(self.steps)]
        self.sequences = [max(1, round(share * full / world_size)) * world_size for share in shares]
        self.tokens = [sequences * config.seq_len for sequences in accumulate(self.sequences)]

    def knobs(self, step: int) -> dict[str, float]:
        """The scheduled knobs of one step, as keyword arguments of `train_step`."""
        config, done = self.config, self.tokens[step] / self.tokens[-1]
        is_late = done > config.mtp_switch
        return {"lr": config.lr * lr_factor(done, config),
                "mtp_loss_weight": config.mtp_loss_weight_later if is_late else config.mtp_loss_weight,
                "bias_update_speed": config.bias_update_speed if done <= config.bias_until else 0.0}


# --------------------------------------------------------------------------------------- many processes


@dataclass
class Dist:
    """This process among its equals. Alone, every method is a no-op, so the loop has one code path."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        return self.all_reduce_sum(tensor).div_(self.world_size)

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is on one."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: Transformer, **options):
        """The module to call in training, so that gradients are averaged over ranks.

        Buffers are not broadcast: every rank moves the routing bias by the same rule on the same counts.
        """
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():  # torch 2.13 has a second name for the option, torch 2.9 has not
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, **options)

    def close(self) -> None:
        if self.world_size > 1:
            gc.collect()  # DDP's wrapper sits in a reference cycle and must be gone before its group
            dist.destroy_process_group()


def setup_distributed(device: str = "auto") -> Dist:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA); alone without torchrun."""
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Dist(device=chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Dist(dist.get_rank(), dist.get_world_size(), chosen)


# ---------------------------------------------------------------------------------------------- one step


def make_optimizer(model, lr: float, weight_decay: float = 0.1, betas=(0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW in V3's setting (section 4.2); only matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def count_targets(targets: Tensor, config: Config, world: Dist) -> Tensor:
    """Targets of ce, targets of mtp, and sequences in the global batch: (3,) float64.

    targets (n, T) of this rank. MTP module k has a target wherever there is one k tokens further on.
    """
    is_real = targets != IGNORE  # (n, T)
    ahead = [float(is_real[:, k:].sum()) for k in range(1, config.num_nextn_predict_layers + 1)]
    counts = [float(is_real.sum()), sum(ahead) / max(1, len(ahead)), float(len(targets))]
    return world.all_reduce_sum(torch.tensor(counts, dtype=torch.float64).to(targets.device))


def train_step(model, optimizer, tokens: Tensor, targets: Tensor, world: Dist, *, micro_batch: int, lr: float,
               mtp_loss_weight: float, aux_loss_alpha: float, bias_update_speed: float, clip: float = 1.0) -> dict:
    """One optimizer step on this rank's share (n, T) of the global batch.

    `total = ce + mtp_loss_weight * mtp + aux_loss_alpha * balance`, each a mean over the real targets (or the
    sequences) of the WHOLE batch, so that micro-batches and ranks change nothing but rounding.
    Returns the losses, `grad_norm` before clipping, and `load` (MoE layers, E), the routed tokens.
    Raises UserError when the gradient is not finite; the weights are then as they were.
    """
    raw = model.module if isinstance(model, DistributedDataParallel) else model
    counts = count_targets(targets, raw.config, world).clamp(min=1)  # (3,)
    weights = counts.new_tensor([1.0, mtp_loss_weight, aux_loss_alpha])
    scale = (weights / counts * world.world_size).float()  # (3,); DDP averages over ranks, we want the sum
    sums = torch.zeros_like(counts)
    micros = list(zip(tokens.split(micro_batch), targets.split(micro_batch)))
    for i, (x, y) in enumerate(micros):
        is_last = i == len(micros) - 1
        with nullcontext() if is_last or raw is model else model.no_sync():
            losses = model(x, y, reduction="sum")
            zero = losses["ce"].new_zeros(())
            parts = torch.stack([losses.get(name, zero) for name in ("ce", "mtp", "balance")])  # (3,)
            (parts * scale).sum().backward()
        sums += parts.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), clip)
    if not torch.isfinite(grad_norm):
        raise UserError("the gradient is not finite: lower --lr; --resume goes on from the last checkpoint")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = world.all_reduce_sum(sums) / counts
    losses = dict(zip(("ce", "mtp", "balance", "total"), [*means.tolist(), float(means @ weights)]))
    return losses | {"grad_norm": float(grad_norm), "load": update_routing(raw, bias_update_speed, world)}


def update_routing(model: Transformer, speed: float, world: Dist) -> Tensor:
    """Sum the routed tokens over ranks and move the routing bias once; returns them, (MoE layers, E)."""
    gates = [moe.gate for _, moe in model.moe_layers()]
    if not gates:
        return torch.zeros(0, 0)
    load = world.all_reduce_sum(torch.stack([gate.counts for gate in gates]))
    for gate, counts in zip(gates, load):
        gate.counts.copy_(counts)
    model.update_routing_bias(speed)
    return load.cpu()


def max_violation(load: Tensor) -> float:
    """MaxVio (LF section 3) of load (layers, E): excess of the fullest expert over its share, layers' mean.

    >>> max_violation(torch.tensor([[3.0, 1.0, 1.0, 3.0]]))
    0.5
    """
    return float((load.amax(-1) / load.mean(-1).clamp(min=1e-9) - 1).mean()) if len(load) else 0.0


@torch.no_grad()
def evaluate(model: Transformer, batches: list[tuple[Tensor, Tensor]], world: Dist) -> tuple[dict, Tensor]:
    """Losses ce and mtp over batches that all ranks know, each rank computing a share of them.

    Also the routed tokens of the main model, (MoE layers, E): which experts this text uses.
    """
    config = model.config
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    used = torch.zeros(layers, config.n_routed_experts, device=world.device)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # ce, mtp and their numbers of targets
    for tokens, targets in islice(batches, world.rank, None, world.world_size):
        tokens, targets = tokens.to(world.device), targets.to(world.device)
        with evaluating(model):
            losses = model(tokens, targets, reduction="sum")
        counts = count_targets(targets, config, Dist(device=world.device))
        sums += torch.stack([losses["ce"], losses.get("mtp", losses["ce"] * 0), counts[0], counts[1]])
        for layer, topk_idx in enumerate(model.routing):
            used[layer] += torch.bincount(topk_idx.flatten(), minlength=config.n_routed_experts)
    ce, mtp, targets, mtp_targets = world.all_reduce_sum(sums).tolist()
    return {"ce": ce / max(targets, 1), "mtp": mtp / max(mtp_targets, 1)}, world.all_reduce_sum(used).cpu()


# --------------------------------------------------------------------------------------- the run folder


class RunFolder:
    """out/<name>/: the checkpoint directory, the knobs, the log, and what is needed to go on.

    `save` writes state.safetensors whole or not at all, so a kill at any moment leaves weights, optimizer,
    loader and random state of one and the same step. Only rank 0 writes.
    """

    def __init__(self, path: str | Path, world: Dist | None = None, knobs_file: str = "train.json"):
        self.path, self.is_main = Path(path), world is None or world.is_main
        self.knobs_path, self.log_path = self.path / knobs_file, self.path / "log.csv"
        self.state_path = self.path / "state.safetensors"

    def start(self, knobs: dict, overwrite: bool = False) -> None:
        """Begin a new run. Raises UserError when a checkpoint is in the way."""
        if not overwrite and ((self.path / "model.safetensors").exists() or self.state_path.exists()):
            raise UserError(f"{self.path} holds a run already: --resume goes on with it, --overwrite starts "
                            "over, --name NAME begins another one")
        if self.is_main:
            write_json(self.knobs_path, knobs)
            self.state_path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)

    def resume(self, knobs: dict, free=FREE_ON_RESUME) -> tuple[dict[str, Tensor], dict]:
        """The tensors and notes of the last `save`; the log is cut at its step.

        Raises UserError when there is nothing to resume or a knob differs from the run's own.
        """
        try:
            was = json.loads(self.knobs_path.read_text())
            with safe_open(self.state_path, framework="pt") as state:
                tensors = {name: state.get_tensor(name) for name in state.keys()}
                notes = json.loads(state.metadata()["notes"])
            names = sorted((was.keys() | knobs.keys()) - free)
        except FileNotFoundError:
            raise UserError(f"nothing to resume in {self.path}: no checkpoint; go without --resume") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: state cannot be read ({error}); --overwrite starts over") from None
        told = [f"{name} was {was.get(name)!r}, is {knobs.get(name)!r}" for name in names
                if was.get(name) != knobs.get(name)]
        if told:
            raise UserError(f"cannot resume {self.path} with another config: {', '.join(told)}")
        rows = self.rows()
        if self.is_main and rows:
            with written_aside(self.log_path) as aside, open(aside, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(row for row in rows if float(row["step"]) <= notes["step"])
        return tensors, notes

    def save(self, tensors: dict[str, Tensor], notes: dict) -> None:
        """Replace the state: all of it, or the earlier one stays. notes must be JSON and hold "step"."""
        if self.is_main:
            with written_aside(self.state_path) as aside:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside,
                          metadata={"notes": json.dumps(notes)})

    def log(self, row: dict) -> None:
        """Append one row to log.csv; the first row fixes the columns."""
        if self.is_main:
            try:
                with open(self.log_path, "a", newline="") as file:
                    csv.writer(file).writerows([row.values()] if file.tell() else [row, row.values()])
            except OSError as error:
                raise UserError(f"cannot write {self.log_path}: {error}") from None

    def rows(self) -> list[dict[str, str]]:
        """The rows of log.csv, less a last one that a kill cut short."""
        text = self.log_path.read_text() if self.log_path.exists() else ""
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def optimizer_tensors(model: Transformer, optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts under the names of their parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"optimizer.{key}.{names[parameter]}": value
            for parameter, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(model: Transformer, optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for name, parameter in model.named_parameters():
        state = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if state["step"] is not None:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a stop after the running step; a second one acts at once."""

    def __enter__(self):
        self.is_set = False
        self.before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, kind, frame):
        self.is_set = True
        self.__exit__()

    def __exit__(self, *exception):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere; silent on all ranks but the first."""

    def __init__(self, total: int, done: int = 0, is_main: bool = True, label: str = "train"):
        self.total, self.first, self.label, self.is_main = total, done, label, is_main
        self.is_plain, self.started = not sys.stderr.isatty(), time.monotonic()
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix[0]} {elapsed}, {remaining} left"
        self.bar = tqdm(total=total, initial=done, desc=label, disable=self.is_plain or not is_main,
                        dynamic_ncols=True, smoothing=0.05, bar_format=layout, postfix=[""])

    def show(self, step: int, text: str) -> None:
        """`step` is done; `text` is what there is to say about it."""
        if not self.bar.disable:
            self.bar.postfix[0] = text
            self.bar.update(1)
        elif self.is_main and (step % max(1, self.total // 20) == 0 or step == self.total):
            left = (time.monotonic() - self.started) / (step - self.first) * (self.total - step)
            print(f"{self.label} {step}/{self.total}  {text}  {minutes(left)} left", flush=True)

    def note(self, text: str) -> None:
        """A line that stays above the bar."""
        if self.is_main:
            tqdm.write(text)


def minutes(seconds: float) -> str:
    """A duration for people.

    >>> minutes(200), minutes(7300)
    ('3m20s', '2h01m')
    """
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}m{rest:02}s" if whole < 60 else f"{whole // 60}h{whole % 60:02}m"


# ----------------------------------------------------------------------------------------------- the loop


class Trainer:
    """A run: batches -> train_step -> log; evaluation, checkpoint and pictures at every `eval_every` steps.

    `loader` gives `next_batch(sequences) -> (tokens, targets)` of this rank, `state_dict`, `load_state_dict`;
    targets of -100 carry no loss. `evals` maps a column such as "val_code" to batches that all ranks know.
    """

    def __init__(self, config: TrainConfig, model: Transformer, tokenizer, loader, folder: RunFolder,
                 world: Dist, evals: dict[str, list] | None = None):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.loader, self.folder, self.world, self.evals = loader, folder, world, evals or {}
        self.plan = Plan(config, world.world_size)
        self.wrapped = world.wrap(model)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay, (config.beta1, config.beta2))
        self.step, self.seconds = 0, 0.0  # done so far
        self.stride = max(1, self.plan.steps // 200)  # of the steps whose loads are kept for the picture
        self.loads: list[Tensor] = []  # (MoE layers, E) routed tokens of every `stride`-th step
        self.usage: dict[str, Tensor] = {}  # per domain, (MoE layers, E) of the latest evaluation
        self.latest: dict[str, float] = {}  # losses of the latest evaluation

    def run(self) -> bool:
        """Train to the end of the plan; False when a signal ended it early. Either way all is saved."""
        progress = Progress(self.plan.steps, self.step, self.world.is_main)
        with StopSignal() as stop:
            if self.step == 0:
                self.folder.log(self.row({"step": 0, "tokens": 0} | self.evaluate()))
            while self.step < self.plan.steps and not self.world.any(stop.is_set):
                values = self.advance()
                is_due = self.step % self.config.eval_every == 0 or self.step == self.plan.steps
                self.folder.log(self.row(values | (self.evaluate() if is_due else {})))
                rate = values["tokens_per_s"]
                progress.show(self.step, f"loss {values['ce']:.3f}  {rate / 1e3:.1f}k tokens/s")
                for share in self.config.keep:
                    if self.world.is_main and self.step == round(share * self.plan.steps):
                        save_pretrained(self.model, self.folder.path / f"at-{100 * share:03.0f}", self.tokenizer)
                if is_due:
                    progress.note(f"step {self.step}: {self.losses()}, max_vio {values['max_vio']:.2f}")
                    self.save()
                    self.draw()
            if self.step < self.plan.steps:
                self.save()
        progress.bar.close()
        return self.step == self.plan.steps

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its columns of the log."""
        start, config, knobs = time.monotonic(), self.config, self.plan.knobs(self.step)
        sequences = self.plan.sequences[self.step]
        tokens, targets = (t.to(self.world.device) for t in self.loader.next_batch(sequences))  # (n, T)
        values = train_step(self.wrapped, self.optimizer, tokens, targets, self.world, clip=config.clip,
                            micro_batch=config.micro_batch, aux_loss_alpha=config.aux_loss_alpha, **knobs)
        load = values.pop("load")
        if self.step % self.stride == 0 and len(load):
            self.loads.append(load)
        seconds, tokens_seen = time.monotonic() - start, self.plan.tokens[self.step]
        self.seconds += seconds
        self.step += 1
        return values | knobs | {"step": self.step, "tokens": tokens_seen, "max_vio": max_violation(load),
                                 "tokens_per_s": sequences * config.seq_len / seconds, "seconds": self.seconds}

    def row(self, values: dict[str, float]) -> dict:
        """The values in the order of the log's columns; empty where there is none."""
        columns = ["step", "tokens", "ce", "mtp", "balance", "total", "grad_norm", "lr", "mtp_loss_weight",
                   "bias_update_speed", "max_vio", "tokens_per_s", "seconds", *self.evals, "val_mtp"]
        return {name: f"{values[name]:.6g}" if isinstance(values.get(name), float) else values.get(name, "")
                for name in columns}

    def evaluate(self) -> dict[str, float]:
        """Loss of every domain, and of MTP over the validation domains."""
        values, mtp = {}, []
        for name, batches in self.evals.items():
            losses, used = evaluate(self.model, batches, self.world)
            values[name] = losses["ce"]
            if name.startswith("val_"):
                self.usage[name[4:]] = used
                mtp.append(losses["mtp"])
        self.latest = values | ({"val_mtp": sum(mtp) / len(mtp)} if mtp else {})
        return self.latest

    def losses(self) -> str:
        """The latest validation losses in words; a corpus of few documents may have none for validation."""
        losses = [f"{name[4:]} {loss:.3f}" for name, loss in self.latest.items() if name.startswith("val_")]
        return ", ".join(losses) or "(no text fell to validation)"

    def save(self) -> None:
        """First the checkpoint directory for others, then the state for ourselves."""
        if self.world.is_main:
            save_pretrained(self.model, self.folder.path, self.tokenizer)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer) | {"rng": torch.get_rng_state()}
        if self.loads:
            tensors["loads"] = torch.stack(self.loads)  # (n, MoE layers, E)
        self.folder.save(tensors, {"step": self.step, "seconds": self.seconds, "latest": self.latest,
                                   "loader": self.loader.state_dict(), "precision": precision_of(self.model)})
        self.world.barrier()

    def restore(self, tensors: dict[str, Tensor], notes: dict) -> None:
        """Take up where `save` left off."""
        self.model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
        load_optimizer(self.model, self.optimizer, tensors)
        torch.set_rng_state(tensors["rng"])
        self.loader.load_state_dict(notes["loader"])
        self.step, self.seconds, self.latest = notes["step"], notes["seconds"], notes["latest"]
        self.loads = list(tensors.get("loads", ()))

    def draw(self) -> None:
        """Redraw the pictures of the run folder."""
        if not self.world.is_main or not self.usage:
            return
        path, uniform = self.folder.path, math.log(self.model.config.vocab_size)
        plot.loss_figure(path / "loss.png", self.folder.rows(), uniform)
        if self.loads:
            names, loads = layer_names(self.model), torch.stack(self.loads)  # (n, MoE layers, E)
            x = [tokens / 1e6 for tokens in self.plan.tokens[:: self.stride]][: len(loads)]
            plot.expert_load_figure(path / "expert_load.png", loads, x, names, "million tokens seen")
            plot.expert_domains_figure(path / "expert_domains.png", self.usage, names)


def layer_names(model: Transformer) -> list[str]:
    """A short name for every MoE layer, in the order of `moe_layers`: "layer 3", "MTP 1"."""
    main = model.config.num_hidden_layers
    layers = [int(name.split(".")[2]) for name, _ in model.moe_layers()]
    return [f"layer {layer}" if layer < main else f"MTP {layer - main + 1}" for layer in layers]


# -------------------------------------------------------------------------------------------- the program


def use_precision(model: Transformer, precision: str, impl: str) -> None:
    """Compute in fp32, bf16, or bf16 with FP8 products, from now on."""
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model.use_kernels(impl, fp8=precision == "fp8")


def precision_of(model: Transformer) -> str:
    """What `use_precision` was last told."""
    return "fp8" if model.ops.is_fp8 else "bf16" if model.compute_dtype == torch.bfloat16 else "fp32"


def time_micro_step(model: Transformer, tokens: Tensor, precision: str, impl: str) -> float:
    """Seconds of one forward and backward pass on tokens (n, T) at this precision."""
    use_precision(model, precision, impl)
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        sum(model(tokens, tokens).values()).backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
    model.zero_grad(set_to_none=True)
    model.update_routing_bias(0.0)  # clears the counts
    return seconds


def choose_precision(wanted: str, model: Transformer, tokens: Tensor, impl: str, world: Dist):
    """Set the precision of the model's products; returns seconds per micro-batch (n, T) and the reason.

    What is not known is measured on the model itself: on small shapes the products alone are faster in bf16 and
    the step as a whole hardly is. bf16 costs up to 1 % of the loss, so it has to save a quarter of the time.
    """
    reason = "asked for"
    if wanted == "auto" and world.device.type != "cpu":
        has_units = world.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        wanted, reason = ("bf16", "this GPU has units for it") if has_units else ("fp32", "no fast bf16 here")
    tried = ("fp32", "bf16") if wanted == "auto" else (wanted,)
    times = [time_micro_step(model, tokens, name, impl) for name in tried]
    times = world.all_reduce_mean(torch.tensor(times, device=world.device))  # all ranks must choose alike
    took = dict(zip(tried, times.tolist()))
    if wanted == "auto":
        wanted = "bf16" if took["bf16"] < 0.75 * took["fp32"] else "fp32"
        reason = " against ".join(f"{1e3 * seconds:.0f} ms in {name}" for name, seconds in took.items())
    use_precision(model, wanted, impl)
    return took[wanted], f"{wanted} ({reason})"


def build_model(config: TrainConfig, tokenizer, world: Dist) -> Transformer:
    """The model of the run on its device: a preset fitted to the tokenizer, or the weights of `init_from`."""
    torch.manual_seed(config.seed)
    if config.init_from:
        model = load_pretrained(config.init_from, config.impl, world.device)
    else:
        changes = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
                   "eos_token_id": tokenizer.eos_id} | model_changes(config.set)
        model = Transformer(Config.preset(config.preset, **changes), config.impl)
    for name, got, limit in (("tokenizer", tokenizer.vocab_size, "vocab_size"),
                             ("seq_len", config.seq_len, "max_position_embeddings")):
        if got > getattr(model.config, limit):
            raise UserError(f"{name}: got {got}, the model's {limit} is {getattr(model.config, limit)}")
    model.recompute, model.isolate = config.recompute, config.isolate
    return model.to(world.device)


def build_data(config: TrainConfig, tokenizer, world: Dist, say) -> tuple[Loader, dict[str, list]]:
    """The loader of this rank and the evaluation batches of every domain, of both splits."""
    if not world.is_main:
        world.barrier()  # the first rank prepares the files, the others find them
    corpus = prepare(config.data, tokenizer, Path(config.out) / "cache", seed=config.seed, log=say)
    if world.is_main:
        world.barrier()
    say(corpus.description)
    rows = max(1, config.eval_tokens // config.seq_len)
    evals = {f"{split}_{domain}": list(eval_batches(files[domain], config.seq_len, config.micro_batch, rows))
             for split, files in (("val", corpus.val), ("train", corpus.train)) for domain in corpus.domains}
    loader = Loader(corpus.train, config.seq_len, rank=world.rank, world_size=world.world_size, seed=config.seed)
    return loader, {name: batches for name, batches in evals.items() if batches}


def build_trainer(config: TrainConfig, world: Dist) -> Trainer:
    """Everything of a run, new or resumed; prints what it is going to do."""
    say = print if world.is_main else lambda *words: None
    folder, knobs = RunFolder(Path(config.out) / config.name, world), asdict(config)
    tensors, notes = folder.resume(knobs) if config.resume else ({}, {})
    tokenizer = load_tokenizer(config.tokenizer)
    model = build_model(config, tokenizer, world)
    plan = Plan(config, world.world_size)
    if not config.resume:
        folder.start(knobs, config.overwrite)
    loader, evals = build_data(config, tokenizer, world, say)
    micro = loader.next_batch(plan.sequences[-1])[0][: config.micro_batch].to(world.device)  # (n, T)
    loader.position = 0  # this batch was for the clock only
    precision = notes.get("precision", config.precision)
    seconds, reason = choose_precision(precision, model, micro, config.impl, world)
    trainer = Trainer(config, model, tokenizer, loader, folder, world, evals)
    if notes:
        trainer.restore(tensors, notes)
        say(f"resumed at step {trainer.step} of {plan.steps}")
    counts, flops = count_parameters(model.config), flops_per_token(model.config, config.seq_len)
    left = sum(plan.sequences[trainer.step :]) / (len(micro) * world.world_size)  # micro-batches
    say(f"model       {config.init_from or config.preset}: {counts['total']:,} parameters ({counts['mtp']:,} "
        f"of them MTP), {counts['active']:,} active per token, {flops / 1e6:.2f} MFLOP per token\n"
        f"run         {plan.steps} steps, {plan.tokens[-1]:,} tokens, {config.tokens_per_step:,} per step, "
        f"on {world.world_size} x {world.device.type}, into {folder.path}\n"
        f"precision   {reason}\nkernels     {'; '.join([config.impl, *model.ops.reasons])}\n"
        f"time        about {minutes(seconds * left * 1.1)}")
    return trainer


def final_report(trainer: Trainer) -> None:
    """The lines at the end of a run; per domain the opening of a text and, after a bar, how the model goes on."""
    rate = trainer.plan.tokens[-1] / trainer.seconds
    flops = flops_per_token(trainer.model.config, trainer.config.seq_len) * rate
    print(f"\nloss        {trainer.losses()}, in nats per token of validation text\n"
          f"speed       {rate:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP/s of the main model\n"
          f"time        {minutes(trainer.seconds)}, without preparation and evaluation\n"
          f"memory      {peak_memory(trainer.world.device)} at most\ncheckpoint  {trainer.folder.path}")
    if trainer.config.data == "local":
        print(f"reasoning   {fitness(trainer)}")
    tokenizer = trainer.tokenizer
    for name in [name for name in trainer.evals if name.startswith("val_")]:
        prompt = opening(trainer.evals[name][0][0].flatten().tolist(), tokenizer)
        made = generate(trainer.model, [prompt], max_new_tokens=64, temperature=0.7, stop_ids=[tokenizer.eos_id],
                        seed=trainer.config.seed)
        print(f"\n--- {name[4:]} {'-' * (64 - len(name))}\n{tokenizer.decode(prompt).removeprefix(BOS)} │ "
              f"{tokenizer.decode(made.completion(0))}")


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of the GPU"
    try:
        import resource
    except ImportError:  # Windows has no such module
        return "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB"


def fitness(trainer: Trainer, questions: int = 200) -> str:
    """What rl.py will find: single steps and work once begun (greedy), and whole answers (sampled), shares right."""
    task, rng, tokenizer = load_task("chain"), random.Random(0), trainer.tokenizer
    problems = [task.problem(rng, "test") for _ in range(questions)]

    def answers(begun: list[str], **sampling) -> list[str]:
        prompts = [tokenizer.encode_trusted(prompt_text(p.question) + text) for p, text in zip(problems, begun)]
        made = generate(trainer.model, prompts, stop_ids=[tokenizer.eos_id], seed=0, **sampling)
        return [text + tokenizer.decode(made.completion(row)) for row, text in enumerate(begun)]

    def solved(begun: list[str], **sampling) -> float:
        rewards = [task.reward(p, text) for p, text in zip(problems, answers(begun, max_new_tokens=96, **sampling))]
        return sum(reward["accuracy"] for reward in rewards) / questions

    works = [task.trace(problem, rng, style="full", tagged=True) for problem in problems]
    ends = [rng.choice([place.end() for place in re.finditer("=", work)]) for work in works]  # an "=", and its result
    steps = answers([work[:end] for work, end in zip(works, ends)], max_new_tokens=1, temperature=0)
    right = sum(step == work[: end + 1] for step, work, end in zip(steps, works, ends)) / questions
    begun = solved([work[: work.find(";") + 1] for work in works], temperature=0)
    whole = solved([""] * questions)
    return (f"right are {right:.0%} of single steps, {begun:.0%} of works once begun, {whole:.0%} of whole answers; "
            "python rl.py goes on from here")


def opening(tokens: list[int], tokenizer, length: int = 12) -> list[int]:
    """The first tokens of the first document that begins in `tokens`; of a dialogue, the whole question."""
    start = tokens.index(tokenizer.bos_id) if tokenizer.bos_id in tokens else 0
    head, assistant = tokens[start : start + 64], tokenizer.specials["<｜Assistant｜>"]
    return head[: head.index(assistant) + 1] if assistant in head else head[:length]


# ------------------------------------------------------------------------------------------- measuring


def random_run(config: TrainConfig, world: Dist):
    """Model, optimizer and random tokens and targets (n, T) of one step, for `bench` and `profile`."""
    model = build_model(config, load_tokenizer(config.tokenizer), world).train()
    shape = (config.tokens_per_step // config.seq_len // world.world_size, config.seq_len + 1)
    text = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
    tokens, targets = text[:, :-1].contiguous().to(world.device), text[:, 1:].contiguous().to(world.device)
    _, reason = choose_precision(config.precision, model, tokens[: config.micro_batch], config.impl, world)
    print(f"model       {config.preset}, {config.tokens_per_step:,} random tokens a step, {torch.get_num_threads()} "
          f"threads\nprecision   {reason}\nkernels     {'; '.join([config.impl, *model.ops.reasons])}")
    return model, make_optimizer(model, config.lr), tokens, targets


def timed_step(loss_of, optimizer, tokens, targets, micro_batch: int) -> list[float]:
    """Seconds forward, backward and in the optimizer of one step, and the loss."""
    def now() -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    forward = backward = total = 0.0
    for x, y in zip(tokens.split(micro_batch), targets.split(micro_batch)):
        start = now()
        loss = loss_of(x, y) * (len(x) / len(tokens))
        middle = now()
        loss.backward()
        end = now()
        forward, backward, total = forward + middle - start, backward + end - middle, total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return [forward, backward, now() - end, float(total)]


def transformers_twin(model: Transformer):
    """transformers' DeepseekV3 with the weights of `model`. Raises ImportError where it is not installed."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        other = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return other.train().to(model.lm_head.weight.device)


def bench(config: TrainConfig, world: Dist, rounds: int = 5) -> None:
    """Print the step of our model, and beside it, in turn, that of transformers on the same weights and batch."""
    model, optimizer, tokens, targets = random_run(config, world)
    dtype, vocab = model.compute_dtype, model.config.vocab_size
    flops = flops_per_token(model.config, config.seq_len) * tokens.numel()
    ceiling = matmul_ceiling(dtype, world.device)

    def theirs(x, y):
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = other(input_ids=x, use_cache=False).logits  # (n, T, V)
        return F.cross_entropy(logits.float().view(-1, vocab), y.flatten())

    runs = {"plainseek": (lambda x, y: model(x, y, mtp=False)["ce"], optimizer),
            "plainseek with MTP": (lambda x, y: sum(model(x, y).values()), optimizer)}
    print(f"memory      {peak_memory(world.device)} at most, up to here")
    try:
        other = transformers_twin(model)
        runs["transformers"] = (theirs, make_optimizer(other, config.lr))
    except ImportError:
        print("transformers is not installed: pip install transformers compares with it")
    took = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first round warms up
        for name, (loss_of, its_optimizer) in runs.items():
            took[name].append(timed_step(loss_of, its_optimizer, tokens, targets, config.micro_batch))
    for name, rows in took.items():
        forward, backward, step, _ = (sorted(column)[rounds // 2] for column in zip(*rows[1:]))
        seconds = forward + backward + step
        print(f"{name:20}{tokens.numel() / seconds:10,.0f} tokens/s  forward {1e3 * forward:.0f}, backward "
              f"{1e3 * backward:.0f}, optimizer {1e3 * step:.0f} ms  {flops / seconds / 1e9:,.0f} GFLOP/s = "
              f"{flops / seconds / ceiling:.0%} of {ceiling / 1e9:,.0f}, first loss {rows[0][-1]:.4f}")
    print("MTP's work is not counted in GFLOP/s")


def profile(config: TrainConfig, world: Dist) -> None:
    """Trace three training steps into the run folder and print the fifteen costliest operations."""
    model, optimizer, tokens, targets = random_run(config, world)
    knobs = {"lr": config.lr, "mtp_loss_weight": config.mtp_loss_weight, "aux_loss_alpha": config.aux_loss_alpha,
             "bias_update_speed": config.bias_update_speed, "micro_batch": config.micro_batch}
    train_step(model, optimizer, tokens, targets, world, **knobs)
    with torch.profiler.profile() as trace:
        for _ in range(3):
            train_step(model, optimizer, tokens, targets, world, **knobs)
    path = Path(config.out) / config.name / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if tokens.is_cuda else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    print(f"trace       {path} (open it in chrome://tracing or ui.perfetto.dev)")


def pretrain(config: TrainConfig, world: Dist, flags: list[str]) -> None:
    """Train, and show the result; `flags` go into the command that continues a run which was stopped."""
    trainer = build_trainer(config, world)
    is_complete = trainer.run()
    if is_complete and world.is_main:
        final_report(trainer)
    elif world.is_main:
        print(f"stopped at step {trainer.step} of {trainer.plan.steps} and saved; to go on:\n"
              f"  python train.py {shlex.join([*flags, '--resume'])}")


def main(argv: list[str]) -> None:
    """Train, or go on training, and show the result."""
    preset = parse_flags(TrainConfig, argv, __doc__).preset
    config = parse_flags(TrainConfig, shlex.split(RECIPES.get(preset, "")) + argv, __doc__)
    world = setup_distributed(config.device)
    try:
        if config.bench or config.profile:
            return bench(config, world) if config.bench else profile(config, world)
        pretrain(config, world, [flag for flag in argv if flag not in ("--resume", "--overwrite")])
    finally:
        world.close()


if __name__ == "__main__":
    run_main(main)
