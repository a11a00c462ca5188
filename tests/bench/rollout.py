"""Answers to many questions of unequal length at once, as RL samples them, beside transformers' generate.

python -m tests.bench.rollout [--rows 64 256] [--max_new_tokens 128] [--checkpoint out/base]

Both draw from the whole distribution at temperature 1, with the same weights, one prompt a row; neither stops early.
Behind it stands how much of our time is spent in matrix products and attention, which nobody can leave out: if all the
rest took no time, a rollout would be faster by one over that.
"""

import random
import time
import warnings
from dataclasses import dataclass
from functools import partial

import torch

from data.io.cli import Knobs, knob, parse_flags, pick_device, run_main
from model import Config, Transformer
from sample import generate
from tests.bench.hugging_face import transformers_twin
from tests.bench.train import share_of_products


@dataclass
class RolloutConfig(Knobs):
    """What is measured."""

    preset: str = knob("tiny", "size of the model, with random weights: a file of data/presets/")
    rows: list[int] = knob([64, 256], "prompts that are answered at once", least=1)
    longest_prompt: int = knob(64, "tokens of a prompt, which has half of that at least", least=2)
    max_new_tokens: int = knob(128, "tokens of an answer", least=1)
    rounds: int = knob(3, "runs of each, in turn, whose median counts", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps")


def prompts_of(config: RolloutConfig, rows: int, vocab_size: int) -> list[list[int]]:
    """Random ids, of random length."""
    rng, longest = random.Random(0), config.longest_prompt
    return [[rng.randrange(4, vocab_size) for _ in range(rng.randint(longest // 2, longest))] for _ in range(rows)]


def their_inputs(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """As transformers wants them: padded on the left, with a mask."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}


def main(argv: list[str]) -> None:
    """Print tokens/s of both, and our share of products."""
    config = parse_flags(RolloutConfig, argv, __doc__)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = pick_device(config.device)
    sizes = Config.preset(config.preset)
    model = Transformer(sizes).to(device).eval()
    other = transformers_twin(model)
    print(f"{config.preset}, prompts of {config.longest_prompt // 2} to {config.longest_prompt} tokens, "
          f"{config.max_new_tokens} tokens more, float32, {torch.get_num_threads()} threads")
    for rows in config.rows:
        prompts = prompts_of(config, rows, sizes.vocab_size)
        length = config.max_new_tokens
        runs = {"plainseek": partial(generate, model, prompts, max_new_tokens=length)}
        if other:
            runs["transformers"] = partial(
                other.eval().generate, **their_inputs(prompts, device), max_new_tokens=length, min_new_tokens=length,
                do_sample=True, temperature=1.0, top_k=0, pad_token_id=0)
        times = {name: [] for name in runs}
        for _ in range(config.rounds + 1):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begun)
        for name, found in times.items():
            median = sorted(found[1:])[config.rounds // 2]
            print(f"{rows:4} rows  {name:14}{rows * config.max_new_tokens / median:10,.0f} tokens/s")
        with torch.profiler.profile() as trace:
            runs["plainseek"]()
        share = share_of_products(trace)
        print(f"{rows:4} rows  products and attention are {share:.0%} of our time: at most {1 / share:.1f}x as fast")


if __name__ == "__main__":
    run_main(main)
