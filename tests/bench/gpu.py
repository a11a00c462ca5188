"""What only a GPU can tell, as one table in at most six minutes; exit code 1 when a check fails, 2 without a GPU.

    python -m tests.bench.gpu                        everything; downloads nothing
    python -m tests.bench.gpu --only twins fp8       some parts of it
    python -m tests.bench.gpu --pretend              in miniature on a CPU that says it is a GPU: times mean nothing
"""

import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import rl
from data.io.checkpoint import config_to_hf, preset_names
from data.io.cli import Knobs, UserError, knob, parse_flags, pick_device, run_main
from data.text.corpus import prepare
from data.text.loader import Loader
from data.text.tokenizer import load_tokenizer
from kernels import REFERENCE
from model import Config, Transformer, count_parameters, flops_per_token
from sample import generate
from tests.bench.decode import our_step, their_step
from tests.bench.kernels import matmul_ceiling, samples, seconds
from tests.bench.train import timed_step
from train import Dist, make_optimizer, train_step

PARTS = ("card", "twins", "attention", "fp8", "waits", "precision", "small", "medium", "decode", "rl", "largest")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 5e-5, "bf16": 6e-2}  # of values and gradients, relative to the largest
STEP = dict(mtp_loss_weight=0.3, aux_loss_alpha=1e-4, bias_update_speed=1e-3)
DENSE_BF16 = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}  # TFLOP/s of the data sheets


@dataclass
class GpuConfig(Knobs):
    """What is measured."""

    only: list[str] = knob([], "these parts alone", choices=PARTS)
    minutes: float = knob(6.0, "no part begins after so long", above=0)
    pretend: bool = knob(False, "in miniature, on a CPU that says it is a GPU")


@dataclass
class Sizes:
    """How much of it: what a GPU is given, or, to prove that the script runs, a CPU that says it is one."""

    presets: dict[str, dict] = field(default_factory=lambda: {"small": {}, "medium": {}})
    shape: tuple[int, int] = (4, 1024)  # of the twins: B rows of T tokens
    batch: dict[str, tuple[int, int]] = field(default_factory=lambda: {"small": (16, 1024), "medium": (8, 2048)})
    heads: tuple[int, ...] = (4, 4096, 16, 128, 64, 128)  # of the attention: B, T, H, D, P, Dv as in V3
    fp8: tuple[int, int, int] = (8192, 2048, 2048)  # M, K, N
    steps: int = 200
    text: str = "local"
    context: int = 1024
    decoded: int = 128
    rows: tuple[int, ...] = (1, 32)
    rl: dict = field(default_factory=lambda: dict(task="chain", questions=16, group_size=16, max_new_tokens=96))


SLIGHT = dict(vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
              num_attention_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=16, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)
MINIATURE = Sizes(
    presets={"small": SLIGHT, "medium": SLIGHT}, shape=(2, 16), batch={"small": (2, 16), "medium": (2, 16)},
    heads=(2, 24, 2, 128, 64, 128), fp8=(16, 128, 256), steps=3, text=str(Path(kernels.__file__).parent / "data/text/stories.txt"),
    context=16, decoded=4, rows=(2,), rl=dict(task="chain", questions=2, group_size=2, max_new_tokens=4))


class Bench:
    """The parts, each a generator of (what, what was found, whether it is as wanted)."""

    def __init__(self, sizes: Sizes, is_real: bool):
        self.sizes, self.is_real, self.device = sizes, is_real, pick_device("cuda")
        self.world = Dist(device=torch.device("cuda", 0))

    def model(self, preset: str, dtype: torch.dtype = torch.bfloat16, **changes) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(Config.preset(preset, **self.sizes.presets.get(preset, {}) | changes))
        model.compute_dtype = dtype
        return model.to(self.device)

    def text(self, config, B: int, T: int) -> tuple[Tensor, Tensor]:
        """Random tokens and targets, (B, T) each, without begin tokens."""
        text = torch.randint(2, config.vocab_size, (B, T + 1)).to(self.device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def card(self) -> Iterator[tuple]:
        facts = torch.cuda.get_device_properties(0)
        yield "card", f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 1e9:.0f} GB", True
        versions = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        yield "torch", versions, True
        for name, dtype in DTYPES.items():
            reasons = kernels.choose("fused", self.device, dtype, widths=(512, 256))[1]
            yield f"kernels, {name}", "; ".join(reasons) or "all fused", True

    def twins(self) -> Iterator[tuple]:
        """The fused twin's and the reference's largest error, both to the reference in float64."""
        config, tiny = Config.preset("small", **self.sizes.presets["small"]), self.sizes.shape
        widths = (config.hidden_size, config.moe_intermediate_size)
        for kind, dtype in DTYPES.items():
            fused = kernels.choose("fused", self.device, dtype, widths=widths)[0]
            for row, (inputs, _) in samples(config, *tiny, dtype).items():
                name = row.partition(",")[0]
                inputs = [moved(x, self.device) for x in inputs]
                exact = value_and_gradients(getattr(REFERENCE, name), [widened(x) for x in inputs])
                errors = [[error(x, e) for x, e in zip(value_and_gradients(twin, inputs), exact)]
                          for twin in (getattr(fused, name), getattr(REFERENCE, name))]
                found = (f"value {errors[0][0]:.0e}, gradients {max(errors[0][1:]):.0e} "
                         f"(reference {errors[1][0]:.0e}, {max(errors[1][1:]):.0e})")
                yield f"{row}, {kind}", found, max(errors[0]) < max(TOLERANCE[kind], 2 * max(errors[1]))

    def attention(self) -> Iterator[tuple]:
        """V3's heads in bf16: which kernel, narrow values or padded; documents by bounds or by a mask."""
        B, T, H, D, P, Dv = self.sizes.heads
        shapes = ((B, T, H, D), (B, T, H, P), (B, T, H, D), (B, T, P), (B, T, H, Dv))
        inputs = [torch.randn(shape, device=self.device).bfloat16().requires_grad_() for shape in shapes]
        q = torch.empty(B, H, T, D + P, device=self.device, dtype=torch.bfloat16)
        is_cudnn = torch._fused_sdp_choice(q, q, q[..., :Dv], is_causal=True) == kernels.CUDNN
        is_begin = torch.rand(B, T, device=self.device) < 8 / T
        ways = {"alone": None, "documents by a mask": kernels.document_mask(is_begin),
                "documents by bounds": kernels.document_mask(is_begin, is_packed=True)}
        made = {}
        for name, mask in ways.items():
            made[name] = kernels.causal_attention_fused(*inputs, (D + P)**-0.5, mask)
            took = seconds(partial(value_and_gradients, kernels.causal_attention_fused, [*inputs, (D + P)**-0.5, mask]))
            flops = 3 * B * H * T * T * (D + P + Dv)
            yield (f"attention, {name}", f"{1e3 * took:.2f} ms with backward, {flops / took / 1e12:.0f} TFLOP/s as if causal"
                   + (f", {'cuDNN, narrow' if is_cudnn else 'padded'} values" if mask is None else ""), True)
        apart = error(made["documents by bounds"], made["documents by a mask"].double())
        yield "bounds and mask apart", f"{apart:.0e}", apart < TOLERANCE["bf16"]

    def fp8(self) -> Iterator[tuple]:
        units, reason = kernels.try_fp8_units(self.device)
        yield "fp8", reason, True
        M, K, N = self.sizes.fp8
        inputs = [torch.randn(shape, device=self.device).bfloat16().requires_grad_() for shape in ((M, K), (N, K))]
        linear = {name: partial(kernels.linear_fp8, units=name == "units") for name in ("emulated", "units")}
        linear = {"bf16": kernels.linear_fused} | linear if units else {"bf16": kernels.linear_fused, "emulated": linear["emulated"]}
        made = {name: value_and_gradients(product, inputs) for name, product in linear.items()}
        if units:
            apart = max(error(x, e) for x, e in zip(made["units"], made["emulated"]))
            yield "fp8 units and emulation apart", f"{apart:.0e}", apart < 0.02
        for name, product in linear.items():
            took = seconds(partial(value_and_gradients, product, inputs))
            yield f"linear {M} x {K} x {N}, {name}", f"{1e3 * took:.2f} ms, {6 * M * K * N / took / 1e12:.0f} TFLOP/s", True

    def waits(self) -> Iterator[tuple]:
        """How often the host waits: torch's own count."""
        model = self.model("small").train()
        tokens, targets = self.text(model.config, *self.sizes.shape)
        optimizer = make_optimizer(model, 1e-4)
        step = partial(train_step, model, optimizer, tokens, targets, self.world, micro_batch=2, lr=1e-4, **STEP)
        step()  # the first one loads libraries
        losses = partial(model, tokens, targets)
        found = self.waits_of(lambda: with_mtp(losses()).backward())
        yield "waits in forward and backward", found, not found or torch.cuda.get_device_capability() not in ((9, 0), (10, 0))
        yield "waits in a training step", self.waits_of(step), True
        prompts, more = tokens[:, :4].tolist(), {}
        for count in (8, 8 + self.sizes.decoded):
            more[count] = len(self.waits_of(partial(generate, model, prompts, max_new_tokens=count, seed=0)))
        yield "waits per decoded token", f"{(more[count] - more[8]) / self.sizes.decoded:.2f}", True

    def waits_of(self, function: Callable) -> list[str]:
        if not self.is_real:
            from tests.pretend import waits_of

            return [wait.where for wait in waits_of(function)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]

    def precision(self) -> Iterator[tuple]:
        """The same steps on the same text in both precisions."""
        with TemporaryDirectory() as folder:
            tokenizer = load_tokenizer("plainseek:1024")
            corpus = prepare(self.sizes.text, tokenizer, folder, log=lambda *_: None)
            rows, T = self.sizes.batch["small"][0], self.sizes.batch["small"][1] // 2
            ids = dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
            last, ends = {}, max(1, self.sizes.steps // 10)
            for kind, dtype in DTYPES.items():
                model, loader = self.model("small", dtype, **ids).train(), Loader(corpus.train, T, seed=0)
                optimizer, losses, start = make_optimizer(model, 1e-3), [], time.perf_counter()
                for step in range(self.sizes.steps):
                    x, y = (t.to(self.device) for t in loader.next_batch(rows))
                    lr = 1e-3 * min(1, (step + 1) / 20)
                    losses.append(train_step(model, optimizer, x, y, self.world, micro_batch=rows, lr=lr, **STEP)["ce"])
                last[kind] = sum(losses[-ends:]) / ends
                yield (f"small, {kind}, {len(losses)} steps", f"{losses[0]:.3f} to {last[kind]:.3f} nats in "
                       f"{time.perf_counter() - start:.0f} s", last[kind] < losses[0])
        apart = abs(last["bf16"] - last["fp32"]) / last["fp32"]
        yield "bf16 and fp32 apart at the end", f"{apart:.2%}", apart < 0.02

    def small(self) -> Iterator[tuple]:
        yield from self.training("small", is_compiled=self.is_real)

    def medium(self) -> Iterator[tuple]:
        yield from self.training("medium")

    def training(self, preset: str, is_compiled: bool = False) -> Iterator[tuple]:
        """Tokens/s and FLOP/s of one micro-batch and its step in bf16, beside transformers' model of that size."""
        B, T = self.sizes.batch[preset]
        ceiling = matmul_ceiling(torch.bfloat16, self.device) if self.is_real else 1e12
        name = torch.cuda.get_device_name()
        sheet = next((peak for card, peak in DENSE_BF16.items() if card in name), None)
        flops = flops_per_token(Config.preset(preset, **self.sizes.presets[preset]), T)

        def row(who: str, model, loss_of: Callable) -> tuple:
            torch.cuda.reset_peak_memory_stats()
            try:
                optimizer = make_optimizer(model.train(), 1e-4)
                tokens, targets = self.text(model.config, B, T)
                took = sorted(sum(timed_step(loss_of, optimizer, tokens, targets, B)[:3]) for _ in range(6))[2]
            except torch.OutOfMemoryError:
                return f"{preset}, {who}", "out of memory", True
            rate, peak = B * T / took, torch.cuda.max_memory_allocated() / 2**30
            share = f"{rate * flops / sheet / 1e12:.0%} of the data sheet, " if sheet else ""
            return (f"{preset}, {who}", f"{rate:,.0f} tokens/s, {rate * flops / 1e12:.1f} TFLOP/s, {share}"
                    f"{rate * flops / ceiling:.0%} of what one product reaches, {peak:.1f} GiB", True)

        model = self.model(preset)
        yield row("without MTP", model, lambda x, y: model(x, y, mtp=False)["ce"])
        yield row("with MTP", model, lambda x, y: with_mtp(model(x, y)))
        config, model = model.config, None
        torch.cuda.empty_cache()
        if other := self.transformers(config):
            yield row("transformers", other, partial(their_loss, other))
            if is_compiled:
                yield row("transformers, compiled", other, partial(their_loss, torch.compile(other)))

    def transformers(self, config: Config):
        """transformers' model of this size with random weights, None where it is not installed."""
        if not find_spec("transformers"):
            return None
        from transformers import AutoConfig, AutoModelForCausalLM

        values = config_to_hf(asdict(config))
        with torch.device(self.device) if self.is_real else nullcontext():
            other = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        return other.to(self.device)

    @torch.no_grad()
    def decode(self) -> Iterator[tuple]:
        """One token behind a context for each row of a batch: as it is, as a CUDA graph, and transformers'."""
        S = self.sizes.context
        for kind, dtype in DTYPES.items():
            model = self.model("small", dtype, max_position_embeddings=2 * S).eval().to(dtype)
            for _, moe in model.moe_layers():
                moe.gate.float()
            text = self.text(model.config, 1, S)[0]
            other = self.transformers(model.config) if kind == "fp32" else None
            for B in self.sizes.rows:
                what = f"decode, small, {kind}, {B} rows, context {S}"
                step = our_step(model, text.expand(B, -1))
                yield what, rate_of(step, B), True
                yield f"{what}, as a graph", *self.as_graph(step, B)
                if other:
                    yield f"{what}, transformers", rate_of(their_step(other.eval(), text.expand(B, -1)), B), True
            prompts, start = text[:, :16].expand(max(self.sizes.rows), -1).tolist(), time.perf_counter()
            made = generate(model, prompts, max_new_tokens=self.sizes.decoded, seed=0)
            took = time.perf_counter() - start
            yield f"generate, small, {kind}, {len(prompts)} rows", f"{int(made.mask.sum()) / took:,.0f} tokens/s", True

    def as_graph(self, step: Callable, B: int) -> tuple[str, bool]:
        if any(self.waits_of(step)):
            return "cannot be captured: the host waits in it", True
        wanted, graph = step(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        rate = rate_of(graph.replay, B)
        apart = error(logits, wanted.double())
        return f"{rate}, logits {apart:.0e} apart", apart < TOLERANCE["bf16"]

    def rl(self) -> Iterator[tuple]:
        """Two steps of rl.py from random weights; the sampler's log-probs are the trainer's, or it raises."""
        with TemporaryDirectory() as folder:
            tokenizer, base = load_tokenizer("plainseek:1024"), Path(folder, "base")
            ids = dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
            self.model("small", torch.float32, **ids, max_position_embeddings=256).save_pretrained(base, tokenizer)
            torch.cuda.reset_peak_memory_stats()
            config = rl.RLConfig(base=str(base), out=str(Path(folder, "out")), device="cuda", **self.sizes.rl)
            trainer = rl.build_trainer(config, self.world)
            trainer.advance()
            values, peak = trainer.advance(), torch.cuda.max_memory_allocated() / 2**30
            answers = config.questions * config.group_size
            took = sum(values[name] for name in ("rollout_s", "score_s", "update_s"))
            yield (f"rl.py, small, {answers} answers of {config.max_new_tokens}", f"{took:.2f} s a step: rollout "
                   f"{values['rollout_s']:.2f}, score {values['score_s']:.2f}, update {values['update_s']:.2f}; {peak:.1f} GiB", True)
            yield "sampler and trainer apart", f"{values['ratio_gap']:.0e} nats", values["ratio_gap"] < rl.RATIO_TOLERANCE

    def largest(self) -> Iterator[tuple]:
        """The largest preset that makes a step: one row of 1024 tokens, blocks computed twice."""
        room = torch.cuda.get_device_properties(0).total_memory
        names = preset_names() if self.is_real else self.sizes.presets
        sizes = {name: count_parameters(Config.preset(name, **self.sizes.presets.get(name, {})))["total"] for name in names}
        for name in sorted(sizes, key=sizes.get, reverse=True):
            states = 16 * sizes[name]  # weights, gradients, two moments
            if states > room:
                yield f"{name}, {sizes[name] / 1e9:.2f} B parameters", f"states alone take {states / 1e9:,.0f} GB", True
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                model = self.model(name).train()
                model.recompute = True
                tokens, targets = self.text(model.config, 1, min(1024, self.sizes.shape[1]))
                train_step(model, make_optimizer(model, 1e-4), tokens, targets, self.world, micro_batch=1, lr=1e-4, **STEP)
            except torch.OutOfMemoryError:
                yield f"{name}, {sizes[name] / 1e9:.2f} B parameters", "out of memory", True
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30
            yield f"{name}, {sizes[name] / 1e9:.2f} B parameters", f"trains, {peak:.1f} GiB: the largest", True
            return


def moved(x, device):
    return x.detach().to(device).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x


def widened(x):
    is_wide = torch.is_tensor(x) and x.is_floating_point()
    return x.detach().double().requires_grad_(x.requires_grad) if is_wide else x


def value_and_gradients(function: Callable, inputs: list) -> list[Tensor]:
    out = function(*inputs)
    outside = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if torch.is_tensor(x) and x.requires_grad], outside)]


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value."""
    got, exact = got.detach().double(), exact.detach()
    return float((got - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def with_mtp(losses: dict[str, Tensor]) -> Tensor:
    return sum(loss for name, loss in losses.items() if name != "load")


def their_loss(other, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = other(input_ids=x, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def rate_of(step: Callable, B: int) -> str:
    took = seconds(step)
    return f"{B / took:,.0f} tokens/s, {1e3 * took:.2f} ms a step"


def main(argv: list[str]) -> None:
    """Print the table, part by part."""
    config = parse_flags(GpuConfig, argv, __doc__)
    if not (config.pretend or torch.cuda.is_available()):
        raise UserError("no NVIDIA GPU here, and nothing was measured: --pretend runs the script in miniature")
    pretended = nullcontext()
    if config.pretend:
        from tests.pretend import gpu

        pretended = gpu()
    warnings.filterwarnings("ignore", category=FutureWarning)
    failed, start = 0, time.monotonic()
    with pretended:
        bench = Bench(MINIATURE if config.pretend else Sizes(), not config.pretend)
        for part in config.only or PARTS:
            if time.monotonic() - start > 60 * config.minutes:
                print(f"     {part:60}left out: {config.minutes:g} minutes are over", flush=True)
                continue
            try:
                for what, found, is_ok in getattr(bench, part)():
                    failed += not is_ok
                    print(f"{'ok' if is_ok else 'FAIL':5}{what:60}{found or 'none'}", flush=True)
            except Exception as fault:  # the other parts are worth their time all the same
                failed += 1
                print(f"FAIL {part:60}{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}", flush=True)
                traceback.print_exc()
            torch.cuda.empty_cache()
    print(f"{failed} failed, {time.monotonic() - start:.0f} s")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
