"""What rl.py will find in a base: reinforcement learning sharpens what a base does now and then.

    python -m tests.claims.fitness out/base

R1-Zero (R1 section 2.2) starts from a base that is right once in a while. Three shares of 200
held-out questions: the result behind an "=" of a worked trace (greedy), work once begun (greedy), and
whole answers (sampled). What came out for the default base: 100 % of single steps, 100 % of works once
begun, 22 % of whole answers; a base whose steps fail learns to guess (base_quality.py).
"""

import random
import re
from dataclasses import dataclass

from data.io.cli import Knobs, knob, parse_flags, pick_device, run_main
from data.tasks import load_task
from data.tasks.task import Task, prompt_text
from data.text.tokenizer import load_tokenizer
from model import Transformer
from sample import generate


@dataclass
class FitnessConfig(Knobs):
    """Which base, which questions."""

    base: str = knob("out/base", "checkpoint directory", positional=True)
    task: str = knob("chain", "task with worked traces of the style full")
    questions: int = knob(200, "held-out questions", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps")


def fitness(model: Transformer, tokenizer, task: Task, count: int) -> tuple[float, float, float]:
    """Shares right of single steps, of works once begun, and of whole answers."""
    rng = random.Random(0)
    problems = [task.problem(rng, "test") for _ in range(count)]

    def answers(begun: list[str], **sampling) -> list[str]:
        prompts = [tokenizer.encode_trusted(prompt_text(problem.question) + text)
                   for problem, text in zip(problems, begun)]
        made = generate(model, prompts, stop_ids=[tokenizer.eos_id], seed=0, **sampling)
        return [text + tokenizer.decode(made.completion(row)) for row, text in enumerate(begun)]

    def solved(begun: list[str], **sampling) -> float:
        texts = answers(begun, max_new_tokens=96, **sampling)
        rewards = [task.reward(problem, text) for problem, text in zip(problems, texts)]
        return sum(reward["accuracy"] == 1 for reward in rewards) / count

    works = [task.trace(problem, rng, style="full", tagged=True) for problem in problems]
    ends = [rng.choice([place.end() for place in re.finditer("=", work)]) for work in works]
    steps = answers([work[:end] for work, end in zip(works, ends)], max_new_tokens=1, temperature=0)
    right = sum(step == work[: end + 1] for step, work, end in zip(steps, works, ends)) / count
    begun = solved([work[: work.find(";") + 1] for work in works], temperature=0)
    return right, begun, solved([""] * count)


def main(argv: list[str]) -> None:
    """Print the three shares."""
    config = parse_flags(FitnessConfig, argv, __doc__)
    model = Transformer.from_pretrained(config.base, device=pick_device(config.device))
    shares = fitness(model, load_tokenizer(config.base), load_task(config.task), config.questions)
    step, begun, whole = (f"{share:.0%}" for share in shares)
    print(f"{config.base}: right are {step} of single steps, {begun} of works once begun, "
          f"{whole} of whole answers")


if __name__ == "__main__":
    run_main(main)
