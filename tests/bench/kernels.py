"""Both twins of every operation, measured on this machine at the shapes of a preset.

python -m tests.bench.kernels [tiny | small | medium] [fp32 | bf16]
"""

import time
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from data.io.cli import UserError, run_main
from kernels import REFERENCE, by_onednn, choose
from model import Config

BATCHES = {"tiny": (32, 128), "small": (4, 1024), "medium": (1, 2048)}  # B rows of T tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(function: Callable, times: int = 5) -> float:
    """Median seconds of a call, after one to warm up; waits for a GPU."""
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return sorted(took[1:])[times // 2]


def matmul_ceiling(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Most FLOP/s that this machine reaches in one matrix product."""
    sizes = (512, 1024, 2048) if torch.device(device).type == "cpu" else (2048, 4096, 8192)
    squares = {n: torch.randn(n, n, dtype=dtype, device=device) for n in sizes}
    with by_onednn(squares[sizes[0]]):
        return max(2 * n**3 / seconds(partial(torch.mm, x, x)) for n, x in squares.items())


def samples(config: Config, B: int, T: int, dtype: torch.dtype) -> dict[str, tuple[tuple, float]]:
    """Inputs of every operation, B rows of T tokens, and the FLOPs of its forward products."""
    C, H, R, V = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.vocab_size
    D, P, Dv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    E, K, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    N = B * T

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_()

    def routed(n: int) -> tuple:
        topk_idx, gates = torch.rand(n, E).topk(K).indices, torch.rand(n, K, requires_grad=True)
        return make(n, C), *weights, topk_idx, gates

    angle = torch.arange(T)[:, None, None] * torch.rand(P // 2)  # (T, 1, P/2)
    heads = (make(B, T, H, D), make(B, T, H, P), make(B, T, H, D), make(B, T, P), make(B, T, H, Dv))
    mask = torch.ones(B, 1, T, dtype=torch.bool)  # one token is decoded behind T - 1 cached ones
    cached = (make(B, 1, H, R), make(B, 1, H, P), make(B, T, R + P), mask, 1.0)
    weights = (make(E, 2 * F, C), make(E, C, F))
    return {
        "linear": ((make(N, C), make(C, C)), 2 * N * C * C),
        "rms_norm": ((make(N, C), make(C), 1e-6), 0),
        "apply_rope": ((make(B, T, H, P), torch.polar(torch.ones_like(angle), angle)), 0),
        "causal_attention": ((*heads, 1.0), B * H * T * T * (D + P + Dv)),
        "latent_attention": (cached, 2 * B * H * T * (2 * R + P)),
        "expert_ffn": (routed(N), 6 * N * K * C * F),
        "expert_ffn, one token": (routed(1), 6 * K * C * F),
        "linear_cross_entropy": ((make(N, C), make(V, C), torch.randint(0, V, (N,))), 2 * N * C * V),
    }


def measure(twin: Callable, inputs: tuple) -> tuple[Tensor, float, float, int]:
    """Result, seconds forward, seconds with backward, and bytes kept in between beside the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs if torch.is_tensor(x)}
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = twin(*inputs)
    outside = torch.randn_like(out)
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    both = seconds(lambda: torch.autograd.grad(twin(*inputs), leaves, outside))
    with torch.no_grad():
        forward = seconds(lambda: twin(*inputs))
    return out.detach(), forward, both, sum(kept[key] for key in kept.keys() - known)


def table_row(name: str, twins: tuple, inputs: tuple, flops: float, ceiling: float) -> str:
    """One line of the table: both twins (reference, fused) on the same inputs."""
    results = [measure(twin, inputs) for twin in twins]
    wide = [x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    exact = twins[0](*wide)
    errors = [((out - exact).abs().max() / exact.abs().max()).item() for out, *_ in results]
    pairs = zip(*((1e3 * forward, 1e3 * both, kept / 1e6) for _, forward, both, kept in results))
    forward, both, kept = (f"{a:.3g} -> {b:.3g}" for a, b in pairs)
    faster = results[0][2] / results[1][2]
    share = f"{3 * flops / results[1][2] / ceiling:12.0%}" if flops else f"{'-':>12}"
    return (f"{name:22}{forward:>19}{both:>21}{faster:>7.2f}x{kept:>18}"
            f"{errors[0]:>10.0e} ->{errors[1]:.0e}{share}")


def main(argv: list[str]) -> None:
    """Print the table of one preset and dtype."""
    name, kind = [*argv, "tiny"][0], [*argv[1:], "fp32"][0]
    if len(argv) > 2 or name not in BATCHES or kind not in DTYPES:
        usage = f"python -m tests.bench.kernels [{' | '.join(BATCHES)}] [fp32 | bf16]"
        raise UserError(f"got {' '.join(argv)}, wanted: {usage}")
    torch.manual_seed(0)
    config, dtype = Config.preset(name), DTYPES[kind]
    widths = (config.hidden_size, config.moe_intermediate_size)
    fused, reasons = choose("fused", dtype=dtype, widths=widths)
    ceiling = matmul_ceiling(dtype)
    print(f"{name}, {kind}, {torch.get_num_threads()} threads; products reach {ceiling / 1e9:.0f} GFLOP/s; "
          f"{'; '.join(reasons)}\nms and MB as reference -> fused; kept: for the backward, beside the inputs\n\n"
          f"{'operation':22}{'forward ms':>19}{'with backward ms':>21}{'faster':>8}{'kept MB':>18}"
          f"{'error':>19}{'of ceiling':>12}")
    for row, (inputs, flops) in samples(config, *BATCHES[name], dtype).items():
        operation = row.partition(",")[0]
        twins = getattr(REFERENCE, operation), getattr(fused, operation)
        print(table_row(row, twins, inputs, flops, ceiling))


if __name__ == "__main__":
    run_main(main)
