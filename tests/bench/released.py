"""Loading a published FP8 checkpoint, and running it with its experts on disk, in processes of little memory.

python -m tests.bench.released [--gigabytes 1.8]

Writes a checkpoint of random weights in DeepSeek-V3's layout. Then: seconds of CPU and memory to load
it, in a process that may not take more than the model and 0.2 GB besides what Python and torch take; and the
same greedy answer by `sample.py` with all weights in memory and with --experts disk in a third of their size.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import save_file

from data.io import checkpoint
from data.io.cli import Knobs, knob, parse_flags, run_main
from data.io.portrait import parameters_on_paper, si
from data.text.tokenizer import load_tokenizer
from model import Config, Transformer
from tests.layouts import KEPT
from tests.published import FP8

ROOT = Path(__file__).parent.parent.parent
SHARD = 400_000_000  # bytes
IMPORTS = "import resource, time, torch; import sample; from model import Transformer; "
USED = "int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]) * 1024"


@dataclass
class BenchConfig(Knobs):
    """What is measured."""

    gigabytes: float = knob(1.8, "size of the checkpoint, by the number of its layers", above=0.2)
    folder: str = knob(tempfile.gettempdir(), "where a folder for it is made, which is removed at the end")
    tokens: int = knob(16, "length of the answer", least=1)


def write(folder: Path, gigabytes: float) -> Config:
    """FP8 weights of normal random numbers, made of one block of them again and again."""
    tokenizer = load_tokenizer("plainseek:1024")
    sizes = dict(vocab_size=1024, hidden_size=1024, moe_intermediate_size=512, intermediate_size=2048, q_lora_rank=512,
                 num_attention_heads=16, n_routed_experts=256, first_k_dense_replace=1, num_nextn_predict_layers=0,
                 bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    layer = parameters_on_paper(asdict(Config.preset("v3", num_hidden_layers=3, **sizes))) - parameters_on_paper(
        asdict(Config.preset("v3", num_hidden_layers=2, **sizes)))
    config = Config.preset("v3", num_hidden_layers=1 + max(1, round(gigabytes * 1e9 / layer)), **sizes)
    with torch.device("meta"):
        shapes = Transformer(config, init=False).published()
    numbers = torch.randn(5_000_011)
    codes, bf16 = (numbers * 64).to(torch.float8_e4m3fn), (numbers * 0.02).bfloat16()
    shard, weight_map, count, size = {}, {}, 0, 0
    for name, shape in [*((name, tensor.shape) for name, tensor in shapes.items()), ("", None)]:
        if shape is None or size > SHARD:
            save_file(shard, folder / f"model-{count:05d}.safetensors")
            weight_map |= dict.fromkeys(shard, f"model-{count:05d}.safetensors")
            shard, count, size = {}, count + 1, 0
        if shape is None:
            break
        if len(shape) == 1:
            shard[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape, dtype=torch.bfloat16)
        else:
            is_fp8 = not any(word in name for word in KEPT)
            source = codes if is_fp8 else bf16
            begin = len(weight_map) % 1000
            often = source.repeat(-(-(shape.numel() + begin) // len(source)))
            shard[name] = often[begin : begin + shape.numel()].view(shape).clone()
            if is_fp8:
                shard[name + "_scale_inv"] = torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), 0.02 / 64)
        size += shard[name].nbytes
    values = checkpoint.config_to_hf(asdict(config)) | {"torch_dtype": "bfloat16"} | FP8
    checkpoint.write_json(folder / "config.json", values)
    checkpoint.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    tokenizer.save(folder)
    return config


def limited(memory: int | None) -> Callable[[], None]:
    """What a child process does first: no more than so many bytes of its own."""
    return lambda: memory and resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def run(folder: Path, words: list[str], memory: int | None = None) -> tuple[str, str, float]:
    """stdout, stderr and seconds of CPU of a child process of one thread in a folder, which must end well."""
    # one thread: several would count the time in which one waits for another
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=folder, env=alone, capture_output=True, text=True,
                          preexec_fn=limited(memory))
    if done.returncode:
        raise SystemExit(f"{' '.join(words)[:200]} with {si(memory or 0)}B: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str]) -> None:
    """Write, load, answer twice, print."""
    config = parse_flags(BenchConfig, argv, __doc__)
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        sizes = write(folder, config.gigabytes)
        bytes_on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        weights = parameters_on_paper(asdict(sizes))
        print(f"{sizes.num_hidden_layers} layers of {sizes.n_routed_experts} experts, {weights / 1e9:.2f}e9 weights, "
              f"{si(bytes_on_disk)}B on disk in FP8", flush=True)
        bare = int(run(folder, ["-c", IMPORTS + f"print({USED})"])[0])
        for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
            room = bare + itemsize * weights + 200_000_000
            load = (f"begun = time.process_time(); Transformer.from_pretrained({str(folder)!r}, dtype=torch.{dtype}); "
                    "print(time.process_time() - begun)")
            cpu = float(run(folder, ["-c", IMPORTS + load], room)[0])
            print(f"load as {dtype}: {cpu / weights * 1e9:.2f} s of CPU for 1e9 weights, in a process limited to "
                  f"{si(room)}B: model {si(itemsize * weights)}B + Python and torch {si(bare)}B + 0.2 GB", flush=True)
        third = bytes_on_disk // 3
        sample = [str(ROOT / "sample.py"), "--checkpoint", str(folder), "--temperature", "0", "--max_new_tokens",
                  str(config.tokens), "--dtype", "float32", "--device", "cpu"]
        experts = 3 * sizes.hidden_size * sizes.moe_intermediate_size * sizes.n_routed_experts
        dense = 4 * (weights - experts * (sizes.num_hidden_layers - 1))  # bytes
        room = third - bare - dense - 130_000_000  # for activations and the picture
        disk = ["--experts", "disk", "--expert_cache", str(max(2_000_000, room)), "--stats"]
        loaded, _, seconds = run(folder, [*sample, "1+2+3="])
        begun = time.perf_counter()
        told, stats, disk_seconds = run(folder, [*sample, *disk, "1+2+3="], third)
        wall = time.perf_counter() - begun
        print(f"sample.py, all in memory: {seconds:.1f} s of CPU; --experts disk limited to {si(third)}B: "
              f"{disk_seconds:.1f} s of CPU ({wall:.1f} s), the {'same' if told == loaded else 'ANOTHER'} answer")
        print("\n".join(stats.strip().splitlines()[-3:]))
        print(json.dumps(told[:200]))


if __name__ == "__main__":
    run_main(main)
