"""Pretraining as V3 did it, in small (V3 section 4.2).

    AdamW on every matrix and vector; the learning rate rises, stays, falls along a cosine, stays
    low. The batch grows in the beginning. The loss is ce + weight * mtp + alpha * balance, and the
    weight of multi-token prediction falls late. After each step routing biases move by the load.

    python train.py                            preset tiny on the embedded corpus, minutes on a CPU
    python train.py --data my/texts --name my  your own text
    python train.py --resume                   go on after Ctrl-C or a crash, bit for bit
    python train.py --init_from out/base --data examples:answers.jsonl --name sft     fine-tuning
    python train.py --processes 1              on a CPU one process, not one for each core: the same losses
    torchrun --nproc_per_node=2 train.py       and on two GPUs

A run lives in out/<name>/: the checkpoint (a Hugging Face directory), train.json, log.csv,
pictures, and the state of its last save, from which --resume goes on.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from data.io import plot
from data.io.cli import UserError, knob, parse_flags, run_main, set_fields, widest_float
from data.io.cores import together
from data.io.portrait import check_memory
from data.io.ranks import Dist, is_restarted, is_split, local, traffic
from data.io.run import Loop, RunConfig, RunFolder, SavedRun, minutes, peak_memory, to_go_on
from data.tasks.task import BOS
from data.text.corpus import prepare
from data.text.files import read_examples
from data.text.loader import Examples, Loader, eval_batches, opening
from data.text.tokenizer import check_belongs, load_tokenizer
from kernels import IGNORE
from model import Config, Transformer, count_parameters, flops_per_token
from sample import evaluating, generate

# --------------------------------------------------------------------------------------- one step


def lr_factor(done: float, config) -> float:
    """Learning rate relative to its peak when the fraction `done` of the tokens is seen (V3 4.2).

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


def train_step(model, optimizer, tokens: Tensor, targets: Tensor, world: Dist, *,
               micro_batch: int, lr: float, mtp_loss_weight: float, aux_loss_alpha: float,
               bias_update_speed: float, clip: float = 1.0) -> dict:
    """One optimizer step on this rank's share (n, T) of the global batch, on the CPU or the device.

    `total = ce + mtp_loss_weight * mtp + aux_loss_alpha * balance`, each a mean over the real
    targets (or the sequences) of the WHOLE batch, so that micro-batches and ranks change nothing
    but rounding. Returns the losses, `grad_norm` before clipping, `is_bad` (the norm is not finite
    and the step left out: weights, moments and biases are as before), and `load` (MoE layers, E),
    the routed tokens. The device is asked for a number once, at the end.
    """
    counts = count_targets(targets, model.config).to(world.device, widest_float(world.device))
    counts = world.all_reduce_sum(counts).clamp(min=1)  # (3,)
    tokens, targets = (x.to(world.device, non_blocking=True) for x in (tokens, targets))
    factors = (1.0, mtp_loss_weight, aux_loss_alpha)
    layers, E = len(model.moe_layers()), model.config.n_routed_experts
    sums, load = torch.zeros_like(counts), counts.new_zeros(layers, E)
    micros = list(zip(tokens.split(micro_batch), targets.split(micro_batch)))
    for i, (x, y) in enumerate(micros):
        world.accumulate(model, is_last=i == len(micros) - 1)
        losses = model(x, y, reduction="sum")
        parts = [losses.get(name, losses["ce"] * 0) for name in ("ce", "mtp", "balance")]
        total = sum(part * (factor / n) for part, factor, n in zip(parts, factors, counts))
        total.float().backward()
        sums += torch.stack(parts).detach()
        if "load" in losses:  # a model of dense layers has none
            load[: len(losses["load"])] += losses["load"]
    grad_norm = optimizer_step(model, optimizer, lr, clip, world)
    is_good = grad_norm.isfinite()
    whole = world.all_reduce_sum(torch.cat((sums, load.flatten())))  # (3 + layers * E,)
    sums, load = whole[:3], whole[3:].view(layers, E).float()
    update_biases(model, load, bias_update_speed * is_good)
    seen = torch.cat((sums / counts, torch.stack((grad_norm, is_good)), load.flatten())).cpu()
    means, (norm, is_good) = seen[:3].tolist(), seen[3:5].tolist()
    losses = dict(zip(("ce", "mtp", "balance"), means))
    losses["total"] = sum(mean * factor for mean, factor in zip(means, factors))
    load = seen[5:].view(layers, E).float()
    return losses | {"grad_norm": norm, "is_bad": not is_good, "load": load}


def count_targets(targets: Tensor, config: Config) -> Tensor:
    """Targets of ce, targets of mtp (mean over modules), and sequences in targets (n, T): (3,).

    MTP module k has a target where there is one k tokens further on.
    """
    is_real = (targets != IGNORE).to(widest_float(targets.device))  # (n, T)
    modules = config.num_nextn_predict_layers
    ahead = sum((is_real[:, k:].sum() for k in range(1, modules + 1)), start=is_real.new_zeros(()))
    return torch.stack((is_real.sum(), ahead / max(1, modules), is_real.new_full((), len(targets))))


def optimizer_step(model: Transformer, optimizer, lr: float, clip: float, world: Dist) -> Tensor:
    """Clip the gradient and move the weights; returns the gradient's norm before the cut.

    When it is not finite, the optimizer leaves the step out without a word to the host.
    """
    gradients, norm = world.gradient(model)
    torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = 1.0 - norm.isfinite().float()  # as torch.amp.GradScaler tells it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def update_biases(model: Transformer, load: Tensor, speed: float | Tensor) -> None:
    """Move the routing bias of every MoE layer by its row of load (MoE layers, E), once a step."""
    for (_, moe), counts in zip(model.moe_layers(), load):
        moe.gate.update_bias(counts, speed)


def max_violation(load: Tensor) -> float:
    """MaxVio (LF section 3) of load (layers, E): excess of the fullest expert, mean of the layers.

    >>> max_violation(torch.tensor([[3.0, 1.0, 1.0, 3.0]]))
    0.5
    """
    return float((load.amax(-1) / load.mean(-1).clamp(min=1e-9) - 1).mean()) if len(load) else 0.0


def make_optimizer(model, lr: float, weight_decay: float = 0.1, betas=(0.9, 0.95)):
    """AdamW in V3's setting (section 4.2); only matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model: Transformer, batches: list, world: Dist) -> tuple[dict, Tensor]:
    """Losses ce and mtp over batches (tokens, targets) that all ranks know, each computing a share.

    Also the routed tokens of the main model, (MoE layers, E): which experts this text uses. All
    ranks run equally often, since they gather weights together: the last ones perhaps for nothing.
    """
    config = model.config
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    used = torch.zeros(layers, config.n_routed_experts, device=world.device)
    wide = widest_float(world.device)
    sums = torch.zeros(4, dtype=wide, device=world.device)  # ce, mtp, numbers of targets
    for start in range(0, len(batches), world.world_size):
        tokens, targets = batches[min(start + world.rank, len(batches) - 1)]
        if start + world.rank >= len(batches):
            targets = torch.full_like(targets, IGNORE)
        counts = count_targets(targets, config).to(world.device, wide)
        tokens, targets = tokens.to(world.device), targets.to(world.device)
        with evaluating(model):
            losses = model(tokens, targets, reduction="sum")
        mtp = losses.get("mtp", losses["ce"] * 0)
        sums += torch.stack([losses["ce"], mtp, counts[0], counts[1]])
        used += losses["load"][:layers] if layers else 0
    ce, mtp, targets, mtp_targets = world.all_reduce_sum(sums).tolist()
    return {"ce": ce / max(targets, 1), "mtp": mtp / max(mtp_targets, 1)}, world.all_reduce_sum(used).cpu()


def shard(model: Transformer, config: RunConfig, world: Dist) -> Transformer:
    """Split the model over the ranks, block by block (data/io/ranks.py); alone, nothing happens."""
    experts = [moe.experts for _, moe in model.moe_layers()]
    return world.shard(model, model.model.layers, experts, expert_parallel=config.expert_parallel,
                       zero=config.zero)


def whole(model: Transformer, world: Dist, main_only: bool = False) -> Transformer | None:
    """A model with all the weights, of this process alone: to save, to sample from.

    The model itself where nothing is split. Every rank calls this. With `main_only` the first rank
    gets it, on its CPU, and the others None.
    """
    is_absent = main_only and not world.is_main
    if not is_split(model):
        return None if is_absent else model
    state = world.gathered(model, main_only)
    if is_absent:
        return None
    with torch.device("meta"):
        twin = Transformer(model.config, init=False)
    twin.load_state_dict(state, assign=True)
    twin.compute_dtype, twin.isolate = model.compute_dtype, model.isolate
    twin.use_kernels(*model.chosen)
    return twin.requires_grad_(False)


# -------------------------------------------------------------------------------------- the knobs


@dataclass
class TrainConfig(RunConfig):
    """Every knob of a pretraining run. Fractions are of the tokens of the whole run."""

    preset: str = knob("tiny", "size of the model: a file of data/presets/")
    set: list[str] = knob([], "changes of the preset, as hidden_size=128 n_routed_experts=32")
    init_from: str = knob("", "checkpoint directory to start from, in place of random weights")
    name: str = knob("base", "folder of this run, within --out")
    data: str = knob("local", "local[:TASK], shakespeare, tinystories[:MB], fineweb[:shards], path,"
                              " or examples:FILE.jsonl (of which only the answers are learned)")
    mix: str = knob("", "with examples: every fourth sequence is plain text of this corpus")
    tokenizer: str = knob("plainseek:1024", "plainseek[:size], gpt2, cl100k, or a tokenizer.json")
    steps: int = knob(1000, "optimizer steps", least=1)
    tokens_per_step: int = knob(4096, "tokens of one optimizer step, over all ranks", least=1)
    seq_len: int = knob(128, "tokens of one sequence", least=1)
    ramp_from: float = knob(1.0, "first batch, of --tokens_per_step (V3: 0.2)", above=0, most=1)
    ramp_until: float = knob(0.03, "fraction of the steps at which the batch has its full size")

    lr: float = knob(2e-3, "peak learning rate (V3: 2.2e-4)", above=0)
    warmup_until: float = knob(0.02, "the learning rate rises linearly until this fraction")
    constant_until: float = knob(0.4, "and stays at --lr until this one (V3: 0.68)")
    cosine_until: float = knob(0.97, "then falls along a cosine until this one (V3: 0.97)")
    cosine_to: float = knob(0.1, "end of the cosine, relative to --lr")
    final_from: float = knob(0.985, "the last part begins at this fraction (V3: 0.99)")
    final_to: float = knob(0.033, "learning rate of the last part, relative to --lr")
    beta1: float = knob(0.9, "AdamW: decay of the mean of gradients", least=0, below=1)
    beta2: float = knob(0.95, "AdamW: decay of the mean of their squares", least=0, below=1)

    mtp_loss_weight: float = knob(0.3, "weight of the multi-token prediction loss")
    mtp_loss_weight_later: float = knob(0.1, "its weight after --mtp_switch")
    mtp_switch: float = knob(0.68, "fraction at which it changes (V3: 10T of 14.8T tokens)")
    aux_loss_alpha: float = knob(1e-4, "weight of the sequence-wise balance loss")
    bias_update_speed: float = knob(1e-3, "step of the routing bias after every optimizer step")
    bias_until: float = knob(0.97, "fraction after which the bias stays (V3: 14.3T of 14.8T)")

    eval_tokens: int = knob(8192, "tokens of an evaluation, per domain and split", least=1)
    snapshots: list[float] = knob([], "fractions of the run at which to keep weights, in at-010 ..",
                                  least=0, most=1)
    precision: str = knob("auto", "auto: bf16 on a GPU that has it", choices=("auto", "fp32", "bf16", "fp8"))
    isolate: bool = knob(True, "documents packed into one row do not see each other (V3: they do)")
    recompute: bool = knob(False, "keep block inputs only, compute the rest twice")

    def shares(self) -> tuple[int, int]:
        return self.tokens_per_step // self.seq_len, math.ceil(512 / self.seq_len)  # tokens that keep a core busy

    def rules(self):
        floor = 0.0
        for name in ("warmup_until", "constant_until", "cosine_until", "final_from"):
            yield name, f"{floor} to 1 (they follow each other)", floor <= getattr(self, name) <= 1
            floor = getattr(self, name)
        yield "tokens_per_step", f"a multiple of seq_len = {self.seq_len}", self.tokens_per_step % self.seq_len == 0
        if self.init_from:
            usual = TrainConfig()
            for name in ("preset", "set", "tokenizer"):
                is_default = getattr(self, name) == getattr(usual, name)
                yield name, "none beside --init_from, which brings its own", is_default
            is_other = Path(self.init_from).resolve() != self.folder.resolve()
            yield "name", "another one than that of --init_from, which it would overwrite", is_other
        yield from super().rules()


# Knobs that go with a preset; a flag on the command line still wins.
PRESET_KNOBS = {
    "small": dict(data="tinystories:400", tokenizer="plainseek", steps=6000, tokens_per_step=65536, lr=1e-3,
                  seq_len=1024, micro_batch=16, eval_every=500, eval_tokens=65536, ramp_from=0.25, isolate=False),
    "medium": dict(data="fineweb:20", tokenizer="gpt2", steps=20000, tokens_per_step=524288, lr=5e-4,
                   seq_len=2048, micro_batch=8, eval_every=1000, eval_tokens=262144, ramp_from=0.25, isolate=False),
}
MOVED = {"keep": "--snapshots", "bench": "python -m tests.bench.train",
         "profile": "python -m tests.bench.train --profile"}


class Plan:
    """What each step does: `sequences` in its global batch, `tokens` seen after it, its knobs."""

    def __init__(self, config: TrainConfig, world_size: int = 1):
        full = config.tokens_per_step // config.seq_len
        if full % world_size:
            raise UserError(f"tokens_per_step: {full} sequences cannot be shared by {world_size} "
                            f"ranks, wanted a multiple of {world_size * config.seq_len}")
        self.config = config
        self.steps = config.steps
        ramp = max(1.0, config.ramp_until * config.steps)
        shares = [config.ramp_from + (1 - config.ramp_from) * min(1.0, step / ramp) for step in range(self.steps)]
        self.sequences = [max(1, round(share * full / world_size)) * world_size for share in shares]
        self.tokens = [sequences * config.seq_len for sequences in accumulate(self.sequences)]

    def knobs(self, step: int) -> dict[str, float]:
        """The scheduled knobs of one step, as keyword arguments of `train_step`."""
        config, done = self.config, self.tokens[step] / self.tokens[-1]
        is_late = done > config.mtp_switch
        return {"lr": config.lr * lr_factor(done, config),
                "mtp_loss_weight": config.mtp_loss_weight_later if is_late else config.mtp_loss_weight,
                "bias_update_speed": config.bias_update_speed if done <= config.bias_until else 0.0}

    def check_resumed(self, step: int, was: int) -> None:
        """Raises UserError when another number of steps meant another schedule up to `step`."""
        low, high = self.config.warmup_until, self.config.constant_until
        shares = (step / was, step / self.steps)
        if was != self.steps and not low <= min(shares) <= max(shares) <= high:
            raise UserError(f"steps: was {was}, is {self.steps}; it can change while the learning rate is "
                            f"constant, from {low:g} to {high:g} of the run, and step {step} is not there")


# --------------------------------------------------------------------------------------- the loop


class Trainer(SavedRun):
    """A run: batches -> train_step -> log; now and then evaluation, checkpoint and pictures.

    `loader` gives `next_batch(sequences) -> (tokens, targets)` of this rank, `state_dict`,
    `load_state_dict`. `evals` maps a column such as "val_code" to batches that all ranks know.
    """

    NOTES = ("step", "seconds", "latest", "bad_steps")

    def __init__(self, config: TrainConfig, model: Transformer, tokenizer, loader,
                 folder: RunFolder, world: Dist, evals: dict[str, list] | None = None):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.loader, self.folder, self.world, self.evals = loader, folder, world, evals or {}
        self.plan = Plan(config, world.world_size)
        shard(model, config, world)
        self.experts = [moe.experts for _, moe in model.moe_layers()]
        self.modules = nn.ModuleDict({"model": model})
        betas = (config.beta1, config.beta2)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay, betas)
        self.step, self.seconds = 0, 0.0  # done so far
        self.stride = max(1, self.plan.steps // 200)  # of the steps whose loads are drawn
        self.loads: list[Tensor] = []  # (MoE layers, E) routed tokens of every `stride`-th step
        self.usage: dict[str, Tensor] = {}  # per domain, (MoE layers, E) of the latest evaluation
        self.latest: dict[str, float] = {}  # losses of the latest evaluation
        self.columns = [
            "step", "tokens", "ce", "mtp", "balance", "total", "grad_norm", "lr", "mtp_loss_weight",
            "bias_update_speed", "max_vio", "bad_steps", "tokens_per_s", "seconds", *self.evals, "val_mtp"]
        if config.expert_parallel > 1:
            self.columns += ["ranks_per_token", "mb_sent"]

    def run(self) -> bool:
        """Train to the end; False when a signal ended it early. Either way all is saved."""
        if self.step == 0:
            self.folder.log({"step": 0, "tokens": 0} | self.evaluate(), self.columns)
        loop = Loop(self.folder, done=self.step, total=self.plan.steps, label="train",
                    every=self.config.eval_every, agree=self.world.any)
        for step in loop:
            with self.saved_if_refused():
                values = self.advance()
            values |= self.evaluate() if loop.is_due else {}
            self.folder.log(values, self.columns)
            loop.show(f"loss {values['ce']:.3f}  {values['tokens_per_s'] / 1e3:.1f}k tokens/s")
            for share in self.config.snapshots:
                if step == round(share * self.plan.steps):
                    self.publish(self.folder.path / f"at-{100 * share:03.0f}")
            if loop.is_due:
                loop.note(f"step {step}: {self.losses()}, max_vio {values['max_vio']:.2f}")
                self.save()
                self.world.on_main(self.draw)
        if not loop.is_complete:
            self.save()
        return loop.is_complete

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its columns of the log."""
        start, config, knobs = time.monotonic(), self.config, self.plan.knobs(self.step)
        sequences = self.plan.sequences[self.step]
        tokens, targets = self.loader.next_batch(sequences)  # (n, T), this rank's share
        traffic(self.experts)  # what an evaluation sent is not of this step
        values = train_step(
            self.model, self.optimizer, tokens, targets, self.world, clip=config.clip,
            micro_batch=config.micro_batch, aux_loss_alpha=config.aux_loss_alpha, **knobs)
        load = values.pop("load")
        self.check_bad_steps(values.pop("is_bad"))
        if self.step % self.stride == 0 and len(load):
            self.loads.append(load)
        seconds = time.monotonic() - start
        values |= knobs | {"tokens": self.plan.tokens[self.step], "max_vio": max_violation(load),
                           "bad_steps": self.bad_steps, "tokens_per_s": sequences * config.seq_len / seconds}
        values |= self.traffic()
        self.seconds += seconds
        self.step += 1
        return values | {"step": self.step, "seconds": self.seconds}

    def traffic(self) -> dict[str, float]:
        """Of expert parallel: ranks that a token visited in a layer, and MB sent between ranks."""
        sent = traffic(self.experts)
        if sent is None:
            return {}
        tokens, visits, sent = self.world.all_reduce_sum(sent.to(self.world.device)).tolist()
        return {"ranks_per_token": visits / max(tokens, 1), "mb_sent": sent / 1e6}

    def whole(self, main_only: bool = False) -> Transformer | None:
        return whole(self.model, self.world, main_only)

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
        """The latest validation losses in words; of few documents there may be none."""
        shown = [name for name in self.latest if name.startswith("val_")]
        losses = [f"{name[4:]} {self.latest[name]:.3f}" for name in shown]
        return ", ".join(losses) or "(no text fell to validation)"

    def draw(self) -> None:
        """Redraw the pictures of the run folder."""
        config, layers = self.model.config, [path for path, _ in self.model.moe_layers()]
        x = [tokens / 1e6 for tokens in self.plan.tokens[:: self.stride]]
        plot.draw_training(self.folder.path, self.folder.rows(), config.vocab_size, self.loads, x,
                           self.usage, plot.layer_names(layers, config.num_hidden_layers))


# ------------------------------------------------------------------------------------ the program


def use_precision(model: Transformer, precision: str, impl: str) -> str:
    """Compute in fp32, bf16, or bf16 with FP8 products from now on; returns what to say about it.

    `auto` is bf16 on a GPU with units for it, else fp32: on a CPU bf16 costs up to 1 % of the loss.
    """
    if precision == "auto":
        has_units = model.lm_head.weight.is_cuda and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16" if has_units else "fp32"
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    reasons = model.use_kernels(impl, fp8=precision == "fp8")
    return f"precision   {precision}\nkernels     {'; '.join([impl, *reasons])}"


def build_model(config: TrainConfig, tokenizer, world: Dist) -> Transformer:
    """The model on its device: a preset fitted to the tokenizer, or the weights of `init_from`."""
    torch.manual_seed(config.seed)
    if config.init_from:
        model = Transformer.from_pretrained(config.init_from, config.impl, world.device)
        check_belongs(tokenizer, model.config)
    else:
        changes = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
                   "eos_token_id": tokenizer.eos_id} | set_fields(Config, config.set)
        sizes = Config.preset(config.preset, **changes)
        check_memory(asdict(sizes), copies=world.world_size if world.is_of_one_cpu else 1)
        model = Transformer(sizes, config.impl)
    for name, got, limit in (("tokenizer", tokenizer.vocab_size, "vocab_size"),
                             ("seq_len", config.seq_len, "max_position_embeddings")):
        if got > getattr(model.config, limit):
            raise UserError(f"{name}: got {got}, the model's {limit} is {getattr(model.config, limit)}")
    world.check_experts(config.expert_parallel, model.config.n_routed_experts)
    model.recompute, model.isolate = config.recompute, config.isolate
    return model.to(world.device)


def build_data(config: TrainConfig, tokenizer, world: Dist):
    """The loader of this rank and the evaluation batches of every domain, of both splits."""
    mine = {"rank": world.rank, "world_size": world.world_size, "seed": config.seed}
    source = config.mix if config.data.startswith("examples:") else config.data
    find = partial(prepare, source, tokenizer, Path(config.out) / "cache", seed=config.seed, log=world.say)
    corpus = world.once_per_node(find) if source else None  # the first rank of a machine writes the files
    T = config.seq_len
    if source != config.data:
        plain = {domain: file for domain, file in corpus.train.items() if domain != "reasoning"} if corpus else {}
        texts = [pair for path in config.data[9:].split(",") for pair in read_examples(path)]
        loader = Examples(texts, tokenizer, T, plain=Loader(plain, T, **mine) if plain else None, **mine)
        share = loader.left_out / len(texts)
        world.say(f"data        {len(texts)} examples; {loader.left_out} of them ({share:.0%}) are longer than "
                  f"--seq_len {T} and left out")
        return loader, {}
    world.say(corpus.description)
    rows = max(1, config.eval_tokens // T)
    evals = {f"{split}_{domain}": list(eval_batches(files[domain], T, config.micro_batch, rows))
             for split, files in (("val", corpus.val), ("train", corpus.train)) for domain in corpus.domains}
    return Loader(corpus.train, T, **mine), {name: each for name, each in evals.items() if each}


def build_trainer(config: TrainConfig, world: Dist) -> Trainer:
    """Everything of a run, new or resumed; prints what it is going to do."""
    folder, knobs = RunFolder(config.folder, world), asdict(config)
    tensors, notes = folder.begin(knobs, config)
    plan = Plan(config, world.world_size)
    tokenizer = load_tokenizer(config.init_from or config.tokenizer)
    model = build_model(config, tokenizer, world)
    loader, evals = build_data(config, tokenizer, world)
    how = use_precision(model, config.precision, config.impl)
    trainer = Trainer(config, model, tokenizer, loader, folder, world, evals)
    if notes:
        plan.check_resumed(notes["step"], notes["knobs"].get("steps", plan.steps))
        trainer.restore(tensors, notes)
        world.say(f"resumed at step {trainer.step} of {plan.steps}")
    else:
        folder.start(knobs, config.overwrite or config.resume or is_restarted())
    counts, flops = count_parameters(model.config), flops_per_token(model.config, config.seq_len)
    world.say(f"model       {config.init_from or config.preset}: {counts['total']:,} parameters ({counts['mtp']:,} "
              f"of them MTP), {counts['active']:,} active per token, {flops / 1e6:.2f} MFLOP per token\n"
              f"run         {plan.steps} steps, {plan.tokens[-1]:,} tokens, {config.tokens_per_step:,} per "
              f"step, on {world.world_size} x {world.device.type}, into {folder.path}\n{how}")
    if is_split(model):
        mine = sum(local(parameter).numel() for parameter in model.parameters())
        world.say(f"rank 0      holds {mine:,} parameters, {16 * mine / 1e6:,.1f} MB with gradients "
                  "and moments")
    return trainer


def final_report(trainer: Trainer, model: Transformer) -> None:
    """What was reached and what it took; and, behind a bar, how the model goes on with a text."""
    rate = trainer.plan.tokens[-1] / trainer.seconds
    flops = flops_per_token(trainer.model.config, trainer.config.seq_len) * rate
    each = ", in each process" * (trainer.world.world_size > 1)
    print(f"\nloss        {trainer.losses()}, in nats per token of validation text\n"
          f"speed       {rate:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP/s of the main model\n"
          f"time        {minutes(trainer.seconds)}, without preparation and evaluation\n"
          f"memory      {peak_memory(trainer.world.device)} at most{each}\n"
          f"checkpoint  {trainer.folder.path}")
    tokenizer = trainer.tokenizer
    for name in [name for name in trainer.evals if name.startswith("val_")]:
        room = model.config.max_position_embeddings // 2
        prompt = opening(trainer.evals[name][0][0].flatten().tolist(), tokenizer)[:room]
        made = generate(model, [prompt], max_new_tokens=64, temperature=0.7,
                        stop_ids=tokenizer.stop_ids, seed=trainer.config.seed)
        text, more = (tokenizer.decode(ids) for ids in (prompt, made.completion(0)))
        print(f"\n--- {name[4:]} {'-' * (64 - len(name))}\n{text.removeprefix(BOS)} │ {more}")


def main(argv: list[str], world: Dist | None = None) -> bool:
    """Train, or go on training, and show the result; False when a signal ended the run early."""
    config = parse_flags(TrainConfig, argv, __doc__, presets={"preset": PRESET_KNOBS}, moved=MOVED)
    with together(config, main, argv, world) as mine:
        trainer = build_trainer(config, mine)
        is_complete = trainer.run()
        if is_complete:
            mine.on_main(final_report, trainer, trainer.whole(main_only=True))
        else:
            mine.say(f"stopped at step {trainer.step} and saved; {to_go_on('train.py', argv)}")
        return is_complete


if __name__ == "__main__":
    run_main(main)
