"""A training step on random tokens, beside transformers' model with the same weights.

    python -m tests.bench.train                        tokens/s, GFLOP/s, share of what products reach
    python -m tests.bench.train --profile              a trace and the fifteen costliest operations

With all flags of train.py, as --preset small --precision bf16 --tokens_per_step 8192.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.io.cli import knob, parse_flags, pick_device, run_main
from data.io.run import peak_memory
from data.text.tokenizer import load_tokenizer
from model import Transformer, flops_per_token
from tests.bench.hugging_face import transformers_twin
from tests.bench.kernels import matmul_ceiling
from train import PRESET_KNOBS, Dist, TrainConfig
from train import build_model, make_optimizer, train_step, use_precision

KNOBS_OF_A_STEP = ("lr", "mtp_loss_weight", "aux_loss_alpha", "bias_update_speed", "micro_batch")


@dataclass
class BenchConfig(TrainConfig):
    """The knobs of a training run, and of its measurement."""

    profile: bool = knob(False, "trace three steps, name the costliest operations")
    rounds: int = knob(5, "rounds of which the median counts; one more warms up", least=1)


def random_run(config: BenchConfig, world: Dist) -> tuple[Transformer, Tensor, Tensor]:
    """The model, and random tokens and targets (n, T) of one step; says what is measured."""
    model = build_model(config, load_tokenizer(config.init_from or config.tokenizer), world).train()
    shape = (config.tokens_per_step // config.seq_len, config.seq_len + 1)
    V, begin = model.config.vocab_size, model.config.bos_token_id
    text = torch.randint(0, V, shape)
    text[text == begin] = (begin + 1) % V  # transformers' model knows no documents
    print(f"model       {config.init_from or config.preset}, {config.tokens_per_step:,} random tokens "
          f"a step, {torch.get_num_threads()} threads, on {world.device}\n"
          f"{use_precision(model, config.precision, config.impl)}")
    return model, text[:, :-1].to(world.device), text[:, 1:].to(world.device)


def now() -> float:
    """The clock, when a GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_step(loss_of: Callable, optimizer, tokens: Tensor, targets: Tensor, micro_batch: int):
    """Seconds forward, backward and in the optimizer of one step, and the loss: four floats."""
    forward = backward = total = 0.0
    for x, y in zip(tokens.split(micro_batch), targets.split(micro_batch)):
        start = now()
        loss = loss_of(x, y) * (len(x) / len(tokens))
        middle = now()
        loss.backward()
        end = now()
        forward += middle - start
        backward += end - middle
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return forward, backward, now() - end, total


def bench(config: BenchConfig, world: Dist) -> None:
    """Print the medians of our step, without and with MTP, and of transformers', taken in turn."""
    model, tokens, targets = random_run(config, world)
    flops = flops_per_token(model.config, config.seq_len) * tokens.numel()
    ceiling, dtype = matmul_ceiling(model.compute_dtype, world.device), model.compute_dtype

    def with_mtp(x: Tensor, y: Tensor) -> Tensor:
        return sum(loss for name, loss in model(x, y).items() if name != "load")

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = other(input_ids=x, use_cache=False).logits  # (n, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    with_mtp(tokens[: config.micro_batch], targets[: config.micro_batch]).backward()
    print(f"memory      {peak_memory(world.device)} at most, forward and backward")
    model.zero_grad()
    optimizer = make_optimizer(model, config.lr)
    runs = {"plainseek": (lambda x, y: model(x, y, mtp=False)["ce"], optimizer),
            "plainseek with MTP": (with_mtp, optimizer)}
    if other := transformers_twin(model):
        runs["transformers"] = (theirs, make_optimizer(other.train(), config.lr))
    rounds = [[timed_step(*run, tokens, targets, config.micro_batch) for run in runs.values()]
              for _ in range(config.rounds + 1)]
    for name, (first, *rows) in zip(runs, zip(*rounds)):
        forward, backward, update, _ = (sorted(column)[len(rows) // 2] for column in zip(*rows))
        rate = 1 / (forward + backward + update)
        print(f"{name:20}{rate * tokens.numel():10,.0f} tokens/s  forward {1e3 * forward:.0f}, "
              f"backward {1e3 * backward:.0f}, optimizer {1e3 * update:.0f} ms  "
              f"{rate * flops / 1e9:,.0f} GFLOP/s = {rate * flops / ceiling:.0%} of "
              f"{ceiling / 1e9:,.0f}, first loss {first[-1]:.4f}")
    print("MTP's work is not counted in GFLOP/s")


def share_of_products(trace: torch.profiler.profile) -> float:
    """Of a traced time, the share of matrix products and attention: what is left of it if all else is free."""
    times = {}
    for event in trace.key_averages():
        times[event.key] = event.self_device_time_total or event.self_cpu_time_total
    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_dot_product", "mkldnn")
    return sum(time for key, time in times.items() if key.startswith(products)) / sum(times.values())


def profile(config: BenchConfig, world: Dist) -> None:
    """Trace three training steps into the run folder and print the fifteen costliest operations."""
    model, tokens, targets = random_run(config, world)
    optimizer = make_optimizer(model, config.lr)
    knobs = {name: getattr(config, name) for name in KNOBS_OF_A_STEP}
    step = partial(train_step, model, optimizer, tokens, targets, world, **knobs)
    step()
    with torch.profiler.profile() as trace:
        for _ in range(3):
            step()
    path = config.folder / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if tokens.is_cuda else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    share = share_of_products(trace)
    print(f"products    and attention are {share:.0%} of the time: at most {1 / share:.1f}x as fast without all else")
    print(f"trace       {path} (open it in chrome://tracing or ui.perfetto.dev)")


def main(argv: list[str]) -> None:
    """Measure, or trace, one step."""
    config = parse_flags(BenchConfig, argv, __doc__, presets={"preset": PRESET_KNOBS})
    (profile if config.profile else bench)(config, Dist(device=pick_device(config.device)))


if __name__ == "__main__":
    run_main(main)
