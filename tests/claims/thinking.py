"""Test-time compute: accuracy is bought with thought, and with votes (R1 section 2.2.3, cons@64).

    python train.py && python rl.py
    python -m tests.claims.thinking --base out/base --policy out/rl

For both checkpoints and the same held-out questions: sampled and greedy answers, pass@k and the
majority of k, thoughts cut after so many tokens with the answer asked for at once, and questions
harder than those of training. A table, out/thinking.txt, and out/thinking.png. What came out:
README.md beside this file; ten terms, more than in any training question, stay at 12 to 17 %.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import rl
from data.io.cli import knob, run_main
from data.talk.reply import budget_of, think_within
from data.tasks import exam
from data.tasks.task import prompt_text
from sample import generate
from tests.claims import lab

HARDER = {"chain": ("terms", (4, 6, 8, 10, 12)), "countdown": ("count", (2, 3, 4)),
          "findtwo": ("count", (4, 6, 8)), "compare": ("digits", (3, 4)),
          "multiply": ("digits", (2, 3)), "sort": ("count", (6, 8))}
BUDGETS = (0, 4, 8, 16, 32, 64)  # tokens of thought
ANSWER = 16  # of what follows it


@dataclass
class ThinkingConfig(rl.RLConfig):
    """The knobs of rl.py, those of an evaluation among them, and the policy."""

    policy: str = knob("out/rl", "checkpoint directory of what became of --base")


def right_within(policy: rl.Policy, questions: list[exam.Question], budget: int,
                 samples: int = 4) -> Tensor:
    """Share right (Q,) when a thought is cut after `budget` tokens and the answer asked for at once."""
    tokenizer = policy.tokenizer
    prompts = [tokenizer.encode_trusted(prompt_text(one.problem.question)) for one in questions]
    made = think_within(generate, policy.model, prompts, budget=budget_of(tokenizer, budget),
                        num_samples=samples, max_new_tokens=budget + ANSWER, stop_ids=[tokenizer.eos_id],
                        seed=[one.seed for one in questions])
    right = [exam.judge(questions[row // samples], tokenizer.decode(ids), policy.folder)["accuracy"] == 1
             for row, ids in enumerate(made)]
    return torch.tensor(right, dtype=torch.float64).view(-1, samples).mean(1)


def examine(config: ThinkingConfig, directory: str) -> dict:
    """What data/tasks/exam.py finds, and greedy, budget, harder: each [mean, standard error]."""
    policy = lab.open_policy(config, directory)
    found = policy.evaluate(config.eval_samples)
    questions = policy.questions("test", "held out", range(config.eval_questions))
    greedy = policy.ask(questions, 1, temperature=0.0).right  # (Q, 1)
    found["greedy"] = exam.mean_error(greedy.double().squeeze(1))
    budgets = [budget for budget in BUDGETS if budget < config.max_new_tokens]
    found["budget"] = {str(budget): exam.mean_error(right_within(policy, questions, budget))
                       for budget in budgets}
    found["harder"] = {}
    for task in policy.tasks:
        key, values = HARDER.get(task.name, ("", ()))
        for value in values:
            slots = range(config.eval_questions)
            hard = exam.draw_questions([task], "test", "harder", slots, policy.room, **{key: value})
            right = policy.ask(hard, 4).right.double()  # (Q, 4)
            found["harder"][f"{task.name}, {value} {key}"] = exam.mean_error(right.mean(1))
    return found


def main(argv: list[str]) -> None:
    """Examine both, print the table and draw the picture."""
    config = lab.read_flags(ThinkingConfig, argv, __doc__, name="thinking")
    found = {"the base": examine(config, config.base), "after RL": examine(config, config.policy)}
    before, after = found.values()
    pairs = {"greedy": (before["greedy"], after["greedy"])}
    pairs |= {f"thought of {budget} tokens": (before["budget"][budget], after["budget"][budget])
              for budget in before["budget"]}
    pairs |= {name: (before["harder"][name], after["harder"][name]) for name in before["harder"]}
    lines = exam.report(before, after)
    for name, shares in pairs.items():
        cells = [f"{100 * mean:.1f} ± {100 * error:.1f} %" for mean, error in shares]
        lines.append(f"{name:26}{cells[0]:>16}{cells[1]:>16}")
    exam.write_lines(f"{config.folder}.txt", lines)
    lab.thinking_figure(f"{config.folder}.png", found)
    print(f"{config.folder}.png")


if __name__ == "__main__":
    run_main(main)
