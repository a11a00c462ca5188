"""One decoded token behind a context, beside transformers' cached decoding with the same weights.

python -m tests.bench.decode [--preset tiny] [--context 512] [--batch 1 32] [--set hidden_size=256]
"""

import warnings
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from data.io.cli import Knobs, knob, parse_flags, pick_device, run_main, set_fields
from model import Config, Transformer
from tests.bench.hugging_face import transformers_twin
from tests.bench.kernels import seconds


@dataclass
class DecodeConfig(Knobs):
    """What is measured."""

    preset: str = knob("tiny", "size of the model: a file of data/presets/")
    set: list[str] = knob([], "changes of the preset, as hidden_size=128")
    context: int = knob(512, "tokens in the cache", least=1)
    batch: list[int] = knob([1, 32], "rows that are decoded at once", least=1)
    rounds: int = knob(5, "medians of five tokens each, whose median counts", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps")


def our_step(model: Transformer, text: Tensor) -> Callable[[], Tensor]:
    """Logits (B, V) behind text (B, S + 1), of which S tokens are in the cache and stay alone there."""
    cache = model.new_cache(1, text.shape[1])
    model.trunk(text[:1, :-1], cache)  # all rows have the same text, so one of them is read
    cache.advance(text.shape[1] - 1)
    cache = cache.select(torch.zeros(len(text), dtype=torch.int64, device=text.device))
    return lambda: model.lm_head(model.trunk(text[:, -1:], cache)[0][:, -1])


def their_step(other, text: Tensor) -> Callable[[], Tensor]:
    """The same of transformers, whose cache is cut back after each token."""
    past = other(text[:1, :-1], use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(len(text))

    def step() -> Tensor:
        logits = other(text[:, -1:], past_key_values=past, use_cache=True).logits  # (B, 1, V)
        past.crop(-1)
        return logits[:, -1]

    return step


@torch.no_grad()
def main(argv: list[str]) -> None:
    """Print tokens/s of all rows together, and milliseconds a step, for each batch."""
    config = parse_flags(DecodeConfig, argv, __doc__)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    changes = {"max_position_embeddings": config.context + 1} | set_fields(Config, config.set)
    device = pick_device(config.device)
    model = Transformer(Config.preset(config.preset, **changes)).to(device).eval()
    engines = {"plainseek": lambda text: our_step(model, text)}
    if other := transformers_twin(model):
        engines["transformers"] = lambda text: their_step(other.eval(), text)
    print(f"{config.preset}, {config.context} tokens in the cache, float32, {torch.get_num_threads()} threads")
    text = torch.randint(0, model.config.vocab_size, (1, config.context + 1), device=device)
    for B in config.batch:
        steps = {name: make(text.expand(B, -1)) for name, make in engines.items()}
        apart = max(float((step() - steps["plainseek"]()).abs().max()) for step in steps.values())
        print(f"batch {B}: logits at most {apart:.0e} apart")
        rounds = [[seconds(step) for step in steps.values()] for _ in range(config.rounds)]  # in turn
        for name, times in zip(steps, zip(*rounds)):
            median = sorted(times)[len(times) // 2]
            print(f"  {name:14}{B / median:10,.0f} tokens/s{1e3 * median:10.2f} ms a step")


if __name__ == "__main__":
    run_main(main)
