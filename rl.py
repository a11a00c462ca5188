"""Reinforcement learning with verifiable rewards: GRPO and its kin, and R1's recipe as commands.

    1. Ask Q questions, sample G answers to each.                           R1 section 2.2.1
    2. Reward each answer by rule: is it right, is it well formed?          R1 section 2.2.2
    3. Its advantage is its reward relative to its group.                   Math section 4.1.2
    4. The ratio of policy and sampler times the advantage, clipped.        Math eq 3
    5. Keep near a reference policy, by an estimate of the KL.              Math eq 4
    6. Step, and ask again; now and then the reference becomes the policy.

    python train.py                      first a base: out/base
    python rl.py                         R1-Zero on it: out/rl, with rl.png and answers.txt
    python rl.py --variant dapo          another objective: grpo, dr_grpo, dapo, gspo, v3.2
    python rl.py --task mytask:MyTask    your own questions and verifier
    python rl.py --recipe r1             cold start, RL, rejection sampling, RL over all tasks
    python rl.py --exam out/base out/rl  checkpoints beside each other
    torchrun --nproc_per_node=2 rl.py    the same questions, shared by two processes

Papers: Math = DeepSeekMath, arXiv 2402.03300; R1 = 2501.12948; Dr.GRPO = 2503.20783; DAPO =
2503.14476; GSPO = 2507.18071; V3.2 = DeepSeek-V3.2, 2512.02556.
"""

import copy
import json
import math
import random
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data.tasks.__main__ as traces
import train
from data.io import plot
from data.io.checkpoint import write_json, written_aside
from data.io.cli import UserError, knob, parse_flags, run_main, to_flags
from data.io.run import Commands, Loop, RunConfig, RunFolder, SavedRun, minutes
from data.tasks import exam, load_task
from data.tasks.task import Problem, Task, prompt_text, reward_total
from data.text.tokenizer import load_tokenizer
from kernels import IGNORE
from model import Transformer, expert_load
from sample import Generation, generate

# ---------------------------------------------------------------------------------- the objective


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """`A_i = (R_i - mean(R)) / std(R)` within each group (Math section 4.1.2): (Q, G) -> (Q, G).

    Without `divide_by_std` only the mean goes (Dr.GRPO, V3.2). The deviation has Bessel's
    correction. A dead group, all rewards equal, teaches nothing: exactly 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), divide_by_std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    if divide_by_std:
        centred = centred / rewards.std(1, keepdim=True)
    return centred.masked_fill(is_dead(rewards).unsqueeze(1), 0)


def policy_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
                weights: Tensor, knobs) -> dict[str, Tensor]:
    """`total = pg + kl_beta * kl`, a number to minimise; the default is GRPO's (Math eq 3).

        ratio     = pi / pi_old                            exactly 1 on the first update after a rollout
        surrogate = min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) A)
        pg        = -sum weight * surrogate
        kl        = sum weight * (rho - ln rho - 1),  rho = pi_ref / pi    "k3", Math eq 4, never negative

    sequence_ratio (GSPO eq 7): `ratio = exp(mean_t ln(pi / pi_old))`, one for the whole answer.
    unbiased_kl (V3.2 eq 7): each term of kl times pi / pi_old, which mends its gradient off policy.
    off_policy_delta (V3.2 eqs 8-9): no pg where `A < 0` and `mean_t ln(pi_old / pi) > delta`.

    logps, old_logps, ref_logps (N, T) in nats, of the sampled tokens; advantages (N,); mask (N, T)
    bool, where the policy chose; weights (N, T) of `token_weights`; knobs: a RLConfig. Besides the
    three terms there are `clipped` and `dropped`, the weight of the tokens that the clip and the
    drift mask silenced.

    >>> half = torch.full((2, 1), 0.5).log()
    >>> mask, A = torch.ones(2, 1, dtype=torch.bool), torch.tensor([1.0, 1.0])
    >>> weights = token_weights(mask, 2, "answer", 1)
    >>> losses = policy_loss(half + 1, half, half, A, mask, weights, RLConfig(kl_beta=0.1))
    >>> [round(losses[name].item(), 4) for name in ("pg", "kl", "total")]     # e is clipped at 1.2
    [-1.2, 0.3679, -1.1632]
    """
    A, lengths = advantages.unsqueeze(1), mask.sum(1, keepdim=True)  # (N, 1)
    log_ratio = (logps - old_logps).masked_fill(~mask, 0)  # (N, T)
    mean_log_ratio = log_ratio.sum(1, keepdim=True) / lengths  # (N, 1)
    ratio = mean_log_ratio.exp() if knobs.sequence_ratio else log_ratio.exp()  # (N, 1) or (N, T)
    high = knobs.clip_eps if knobs.clip_eps_high is None else knobs.clip_eps_high
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - knobs.clip_eps, 1 + high) * A)
    delta = math.inf if knobs.off_policy_delta is None else knobs.off_policy_delta
    is_dropped = (A < 0) & (-mean_log_ratio > delta)  # (N, 1)
    surrogate = surrogate.masked_fill(is_dropped, 0)
    log_rho = (ref_logps - logps).masked_fill(~mask, 0)  # (N, T)
    k3 = log_rho.exp() - log_rho - 1
    if knobs.unbiased_kl:
        k3 = k3 * log_ratio.exp()
    weights = weights.to(logps.dtype)
    pg, kl = -(weights * surrogate).sum(), (weights * k3).sum()
    is_clipped = (surrogate != ratio * A) & ~is_dropped
    return {"pg": pg, "kl": kl, "total": pg + knobs.kl_beta * kl,
            "clipped": (weights * is_clipped).sum(), "dropped": (weights * is_dropped).sum()}


def token_weights(mask: Tensor, group_size: int, aggregate: str, longest: int) -> Tensor:
    """The weight of each token in the loss, (N, T), 0 where the policy did not choose.

    answer    `1/Q 1/G sum_i 1/|o_i| sum_t`: every answer counts alike (Math eq 3, R1, GSPO)
    token     `1/Q 1/(sum_j |o_j|) sum_i sum_t`: every token of a group counts alike (DAPO eq 8)
    constant  `1/Q 1/G 1/longest sum_i sum_t`: no answer gains by its length (Dr.GRPO)

    mask (N, T) bool, the answers of a group in consecutive rows.
    Raises ValueError when an answer has no token.
    """
    lengths = mask.sum(1).double()  # (N,)
    if (lengths == 0).any():
        raise ValueError("token_weights: an answer has no sampled token, wanted at least its stop token")
    N, Q = len(mask), len(mask) // group_size
    if aggregate == "token":
        per_row = 1 / (Q * lengths.view(Q, group_size).sum(1)).repeat_interleave(group_size)
    else:
        per_row = 1 / (N * (lengths if aggregate == "answer" else torch.full_like(lengths, longest)))
    return mask * per_row.unsqueeze(1)  # (N, T) float64


def is_dead(rewards: Tensor) -> Tensor:
    """Groups without a difference in reward: (Q, G) -> (Q,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """Soft punishment of length (DAPO eq 13): 0 until `longest - margin` tokens, then linearly to -1.

    >>> overlong_penalty(torch.tensor([5, 8, 9, 10]), longest=10, margin=4)
    tensor([ 0.0000, -0.5000, -0.7500, -1.0000])
    """
    return ((longest - margin - lengths) / margin).clamp(-1, 0)


# -------------------------------------------------------------------------------------- the knobs

# Knobs that each paper changes; a flag on the command line still wins.
VARIANTS = {
    "grpo": {},
    "dr_grpo": dict(divide_by_std=False, aggregate="constant", kl_beta=0.0),
    "dapo": dict(clip_eps_high=0.28, aggregate="token", kl_beta=0.0, resample=4, overlong_tokens=16),
    "gspo": dict(sequence_ratio=True, clip_eps=3e-4, clip_eps_high=4e-4, kl_beta=0.0),
    "v3.2": dict(divide_by_std=False, unbiased_kl=True, off_policy_delta=0.5, keep_sampling_mask=True),
}
RECIPES = {"r1": dict(name="r1", task="chain,countdown,compare", steps=60, eval_samples=8)}
SUMMARY = ("reward {reward:.2f}  accuracy {accuracy:.2f}  format {format:.2f}  length {length:.0f}  "
           "kl {kl:.4f}  entropy {entropy:.2f}  dead {dead:.2f}  rollout {rollout_s:.1f}s  update {update:.1f}s")
RATIO_TOLERANCE = 1e-4  # sampler and trainer must agree on log-probs to this, in nats (float32)
MOST_STEPS_IN_VAIN = 20  # without a single right answer or difference in reward before the run gives up


@dataclass
class RLConfig(RunConfig):
    """Every knob of a reinforcement learning run."""

    base: str = knob("out/base", "checkpoint directory to start from")
    task: str = knob("chain", "task, several with commas between, or module:Class for your own")
    variant: str = knob("grpo", "objective of which paper", choices=tuple(VARIANTS))
    recipe: str = knob("", "several stages, each on top of the last: r1")
    name: str = knob("rl", "folder of this run, within --out")
    exam: list[str] = knob([], "in place of training: examine these checkpoint directories")
    write: str = knob("", "in place of training: write good answers of --base into this .jsonl")
    count: int = knob(600, "with --write: how many answers", least=1)

    steps: int = knob(100, "rollouts, each followed by its updates", least=1)
    questions: int = knob(16, "questions of one step, over all ranks (R1: 32)", least=1)
    group_size: int = knob(16, "answers sampled per question (R1: 16)")
    max_new_tokens: int = knob(96, "longest answer", least=1)
    temperature: float = knob(1.0, "of the rollout (R1: 1)", above=0)
    top_k: int = knob(0, "rollout: only the k likeliest tokens; 0 is all", least=0)
    top_p: float = knob(1.0, "rollout: only the nucleus of this probability; 1 is all", above=0, most=1)
    updates: int = knob(1, "optimizer steps per rollout; each sees all answers", least=1)

    clip_eps: float = knob(0.2, "clip range of the ratio (has an effect from the second update on)")
    clip_eps_high: float | None = knob(None, "clip range above 1 when it differs (DAPO: 0.28)")
    kl_beta: float = knob(0.001, "weight of the KL to the reference (Math: 0.04, R1: 0.001)", least=0)
    reference_every: int = knob(50, "steps until the reference is renewed (R1: 400)", least=1)
    divide_by_std: bool = knob(True, "advantage in standard deviations of its group (Math, R1)")
    aggregate: str = knob("answer", "what is averaged first", choices=("answer", "token", "constant"))
    sequence_ratio: bool = knob(False, "one ratio per answer (GSPO)")
    unbiased_kl: bool = knob(False, "weight the KL estimate by the ratio (V3.2 eq 7)")
    off_policy_delta: float | None = knob(None, "drop bad answers that drifted further, nats (V3.2 eq 9)")
    keep_routing: bool = knob(True, "update with the experts that the rollout chose (V3.2)")
    keep_sampling_mask: bool = knob(False, "update within the tokens left by top-k and top-p (V3.2)")
    resample: int = knob(0, "replace a dead group up to so often (DAPO)", least=0)
    overlong_tokens: int = knob(0, "answers are punished over the last so many tokens (DAPO)")

    lr: float = knob(1e-4, "learning rate of AdamW, constant behind the warm-up", above=0)
    warmup_steps: int = knob(10, "steps over which the learning rate rises")
    weight_decay: float = knob(0.0, "AdamW: decay of matrices", least=0)
    train_router: bool = knob(False, "let the gradient move the routers' weights")
    bias_update_speed: float = knob(0.0, "step of the routing bias after every update")
    sft_steps: int = knob(120, "recipe: steps of supervised fine-tuning", least=1)
    sft_lr: float = knob(1.5e-3, "recipe: its learning rate", above=0)
    mix: str = knob("local", "recipe: corpus whose plain text goes into the third stage; '' is none")
    micro_batch: int = knob(64, "answers of one forward pass on one rank", least=1)
    eval_every: int = knob(25, "steps between evaluations; each one saves and draws", least=1)
    eval_questions: int = knob(64, "held-out questions of an evaluation", least=1)
    eval_samples: int = knob(64, "answers to each, before and after (8 in between)", least=1)

    def rules(self):
        yield "group_size", "at least 2: an advantage compares answers", self.group_size >= 2
        has_room = 0 <= self.overlong_tokens <= self.max_new_tokens
        yield "overlong_tokens", f"0 to max_new_tokens = {self.max_new_tokens}", has_room
        yield "recipe", "r1 (distill, base_quality: python -m tests.claims.NAME)", self.recipe in ("", *RECIPES)
        yield from super().rules()


# ---------------------------------------------------------------------------- asking and judging


class Question(NamedTuple):
    """One question of a task, and the seed of the answers to it."""

    task: Task
    problem: Problem
    seed: int


@dataclass
class Rollout:
    """G answers to each of Q questions, N = Q*G rows group by group, and what the rules say of them."""

    questions: list[Question]  # (Q,)
    made: Generation  # N rows
    texts: list[str]  # (N,) whole completions
    rewards: dict[str, Tensor]  # accuracy, format, ... and "total", (Q, G) float64 each

    @property
    def asked(self) -> list[Question]:
        """The question of each row, (N,)."""
        G = len(self.texts) // len(self.questions)
        return [question for question in self.questions for _ in range(G)]

    def replaced(self, other: "Rollout", groups: list[int]) -> "Rollout":
        """This rollout with the groups of those numbers replaced by the groups of `other`, in order."""
        Q, G = self.rewards["total"].shape
        order = torch.arange(Q)  # of the groups of both, one behind the other
        order[groups] = torch.arange(Q, Q + len(groups))
        rows = (order.unsqueeze(1) * G + torch.arange(G)).flatten()  # (N,)
        rewards = {}
        for name in self.rewards.keys() | other.rewards.keys():
            both = [each.rewards.get(name, 0 * each.rewards["total"]) for each in (self, other)]
            rewards[name] = torch.cat(both)[order]
        questions = self.questions + other.questions
        texts = self.texts + other.texts
        made = self.made.cat(other.made).rows(rows.to(self.made.tokens.device))
        return Rollout([questions[i] for i in order], made, [texts[row] for row in rows], rewards)


def draw_questions(tasks: list[Task], split: str, where: str, slots, **difficulty) -> list[Question]:
    """The questions of the numbered `slots`; what a slot asks depends on `where` and its number alone."""
    out = []
    for slot in slots:
        rng = random.Random(f"{where} {slot}")
        task = rng.choice(tasks)
        out.append(Question(task, task.problem(rng, split, **difficulty), rng.getrandbits(62)))
    return out


def ask(model: Transformer, tokenizer, questions: list[Question], num_samples: int, folder: Path,
        **sampling) -> Rollout:
    """Sample answers to every question with sample.py's engine, and judge them."""
    prompts = [tokenizer.encode_trusted(prompt_text(question.problem.question)) for question in questions]
    made = generate(model, prompts, num_samples=num_samples, stop_ids=[tokenizer.eos_id],
                    seed=[question.seed for question in questions], **sampling)
    texts = [tokenizer.decode(made.completion(row)) for row in range(len(made.tokens))]
    parts = [judge(questions[row // num_samples], text, folder) for row, text in enumerate(texts)]
    rewards = {}
    for name in sorted(set().union(*parts)):
        values = [each.get(name, 0.0) for each in parts]  # 0 for a task that does not give it
        rewards[name] = torch.tensor(values, dtype=torch.float64).view(-1, num_samples)  # (Q, G)
    return Rollout(questions, made, texts, rewards)


def judge(question: Question, text: str, folder: Path) -> dict[str, float]:
    """The task's reward. A verifier that breaks ends the run, with the text that broke it on disk."""
    try:
        parts = question.task.reward(question.problem, text)
        return parts | {"total": reward_total(parts)}
    except Exception as error:  # whatever a user's verifier may raise
        path = folder / "broke_the_verifier.txt"
        path.write_text(f"{question.problem}\n{text}\n")
        raise UserError(f"the verifier of task {question.task.name} raised {error!r}; the question and the "
                        f"answer that it was given are in {path}") from error


# ---------------------------------------------------------------------------------------- scores


def score(model, made: Generation, temperature: float, routing: Tensor | None = None) -> Tensor:
    """Log-probs of the sampled tokens under `model`, in nats, 0 where the policy did not choose.

    Column t is about token t + 1, which the tokens up to t predict: (n, T-1). `routing` is
    replayed. One function for old, new and reference policy. `model` may be wrapped in DDP and is
    called as such.
    """
    tokens, mask = made.tokens[:, :-1], made.mask[:, 1:]  # (n, T-1)
    targets = made.tokens[:, 1:].masked_fill(~mask, IGNORE)  # the stop token keeps its place
    replay = None if routing is None else routing[:, :-1].unbind(2)  # per MoE layer (n, T-1, K)
    if temperature == 1 and made.support is None:  # never holds all logits
        return -model(tokens, targets, reduction="none", mtp=False, replay=replay)["ce"]
    logits = model(tokens, replay=replay) / temperature  # (n, T-1, V)
    if made.support is not None:
        is_possible = made.support[:, 1:] | ~mask.unsqueeze(-1)
        logits = logits.masked_fill(~is_possible, -math.inf)
    chosen = targets.clamp(min=0).unsqueeze(-1)  # (n, T-1, 1)
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).masked_fill(~mask, 0)


def micro_batches(made: Generation, size: int) -> list[tuple[Tensor, Generation]]:
    """All rows in batches of `size`, by length, each cut to its longest: (their numbers, the rows)."""
    return [(rows, made.rows(rows, int(made.lengths[rows].max()))) for rows in made.lengths.argsort().split(size)]


def advantages_and_weights(rollout: Rollout, config: RLConfig) -> tuple[Tensor, Tensor]:
    """What the update makes of the rewards: advantages (N,), and the weight of each token (N, T-1)."""
    made, rewards = rollout.made, rollout.rewards["total"]
    mask = made.mask[:, 1:]  # (N, T-1)
    if config.overlong_tokens:
        lengths = mask.sum(1).view(rewards.shape).cpu()
        rewards = rewards + overlong_penalty(lengths, config.max_new_tokens, config.overlong_tokens)
    advantages = group_advantages(rewards, config.divide_by_std).flatten().to(made.logps)
    return advantages, token_weights(mask, config.group_size, config.aggregate, config.max_new_tokens)


def routed_load(made: Generation, experts: int) -> Tensor:
    """Tokens that each expert got where the policy chose the next one: (MoE layers, E)."""
    layers = made.routing[:, :-1].unbind(2)  # (N, T-1, K) each
    loads = [expert_load(chosen, made.mask[:, 1:], experts) for chosen in layers]
    return torch.stack(loads) if loads else made.logps.new_zeros(0, experts)


def evaluate(model: Transformer, tokenizer, tasks: list[Task], config: RLConfig, folder: Path,
             samples: int) -> dict:
    """Held-out questions, the same for every run, and what data/tasks/exam.py finds in the answers."""
    questions = draw_questions(tasks, "test", "held out", range(config.eval_questions))
    rollouts = [ask(model, tokenizer, questions[start : start + 16], samples, folder,
                    max_new_tokens=config.max_new_tokens) for start in range(0, len(questions), 16)]
    asked = [question.task for each in rollouts for question in each.asked]
    texts = [text for each in rollouts for text in each.texts]
    lengths = torch.cat([each.made.mask.sum(1) for each in rollouts])  # (Q * n,)
    right = torch.cat([each.rewards["accuracy"] == 1 for each in rollouts])  # (Q, n)
    form = torch.cat([each.rewards["format"] for each in rollouts])  # (Q, n)
    return exam.examine(asked, texts, lengths, right, form)


# --------------------------------------------------------------------------------------- the loop


class RLTrainer(SavedRun):
    """A run: questions -> answers -> rewards -> advantages -> updates; evaluation, checkpoint, pictures.

    What stays still: the MTP modules (they are no part of the policy), and by default the routers'
    weights and balancing biases. The balance loss is a pretraining matter and is not used.
    """

    NOTES = ("step", "seconds", "before", "answers", "steps_in_vain")  # saved besides tensors

    def __init__(self, config: RLConfig, model: Transformer, tokenizer, tasks: list[Task],
                 folder: RunFolder, world: train.Dist):
        self.config, self.model, self.tokenizer, self.tasks = config, model, tokenizer, tasks
        self.folder, self.world = folder, world
        for _, moe in model.moe_layers():
            moe.gate.weight.requires_grad_(config.train_router)
        for module in model.model.layers[model.config.num_hidden_layers :]:  # MTP
            module.requires_grad_(False)
        self.modules = nn.ModuleDict({"model": model})
        if config.kl_beta:
            self.modules["reference"] = copy.deepcopy(model).requires_grad_(False)
        self.wrapped = world.wrap(model)
        self.optimizer = train.make_optimizer(model, config.lr, config.weight_decay)
        known = [*(style for task in tasks for style in task.styles), "correction", "search", "other"]
        self.styles = list(dict.fromkeys(known))
        self.step, self.seconds, self.steps_in_vain = 0, 0.0, 0  # done so far
        self.before: dict = {}  # evaluation of the base
        self.answers: list[list] = []  # [step, texts of five answers, whether each is right]
        self.loads: list[Tensor] = []  # (MoE layers, E) routed tokens of every update
        self.columns = [
            "step", "reward", "accuracy", "format", "language", "length", "length_q1", "length_q3",
            "truncated", *("style_" + name for name in self.styles), "total", "pg", "kl", "entropy",
            "dead", "clipped", "dropped", "ratio_gap", "grad_norm", "lr", "max_vio", "rollout_s",
            "score_s", "update_s", "seconds", "eval_accuracy", "eval_error"]

    def run(self) -> bool:
        """Train to the end; False when a signal ended it early. Either way all is saved."""
        config = self.config
        if self.step == 0:
            self.before = self.evaluate(config.eval_samples)
            self.answer_samples()
        loop = Loop(self.folder, done=self.step, total=config.steps, every=config.eval_every,
                    label="rl", agree=self.world.any)
        for _ in loop:
            values = self.advance()
            if loop.is_due:
                found = self.evaluate(min(8, config.eval_samples))
                values |= zip(("eval_accuracy", "eval_error"), found.get("accuracy", ("", "")))
            self.folder.log(values, self.columns)
            values["update"] = values["score_s"] + values["update_s"]
            loop.show(SUMMARY.format(**values))
            self.check_signal(values)
            if loop.is_due:
                loop.note(self.answer_samples())
                self.save()
                self.draw()
        if not loop.is_complete:
            self.save()
            return False
        self.finish(self.evaluate(config.eval_samples))
        return True

    def advance(self) -> dict[str, float]:
        """One rollout and its updates; returns the columns of the log."""
        start = time.monotonic()
        rollout, values = self.rollout()
        values |= self.learn(rollout)
        if "reference" in self.modules and (self.step + 1) % self.config.reference_every == 0:
            self.modules["reference"].load_state_dict(self.model.state_dict())
        self.step += 1
        self.seconds += time.monotonic() - start
        return values | {"step": self.step, "seconds": self.seconds}

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """Answers to this rank's questions; a dead group is replaced up to `resample` times (DAPO)."""
        config, start = self.config, time.monotonic()
        slots = range(self.world.rank, config.questions, self.world.world_size)
        rollout = self.ask(slots, 0)
        values = self.measure(rollout)
        for attempt in range(1, config.resample + 1):
            dead = is_dead(rollout.rewards["total"]).nonzero().flatten().tolist()
            if not dead:
                break
            rollout = rollout.replaced(self.ask([slots[group] for group in dead], attempt), dead)
        return rollout, values | {"rollout_s": time.monotonic() - start}

    def ask(self, slots, attempt: int) -> Rollout:
        """The questions of these slots of the present step, answered by the policy."""
        config = self.config
        questions = draw_questions(self.tasks, "train", f"{config.seed} {self.step} {attempt}", slots)
        is_cut = config.top_k > 0 or config.top_p < 1
        return ask(self.model, self.tokenizer, questions, config.group_size, self.folder.path,
                   max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                   top_k=config.top_k, top_p=config.top_p, keep_routing=True,
                   keep_sampling_mask=config.keep_sampling_mask and is_cut)

    def measure(self, rollout: Rollout) -> dict[str, float]:
        """Means over the answers of all ranks, and quartiles of their lengths."""
        made, rewards, G = rollout.made, rollout.rewards, self.config.group_size
        styles = [question.task.style_of(text) for question, text in zip(rollout.asked, rollout.texts)]
        styles = [style if style in self.styles else "other" for style in styles]
        none = torch.zeros_like(rewards["total"])
        columns = {name: rewards.get(name, none) for name in ("accuracy", "format", "language")}
        columns |= {"reward": rewards["total"], "dead": is_dead(rewards["total"]).repeat_interleave(G),
                    "length": made.mask.sum(1), "truncated": ~made.finished, "entropy": made.entropy.sum(1)}
        columns |= {"style_" + name: torch.tensor([style == name for style in styles]) for name in self.styles}
        device = self.world.device
        table = torch.stack([column.flatten().to(device).double() for column in columns.values()], 1)
        table = self.world.all_gather(table).cpu()  # (answers of all ranks, columns)
        values = dict(zip(columns, table.mean(0).tolist()))
        values["entropy"] /= values["length"]  # per token
        quarters = table.new_tensor([0.25, 0.75])
        lengths = table[:, list(columns).index("length")].quantile(quarters, interpolation="lower")
        return values | {"length_q1": int(lengths[0]), "length_q3": int(lengths[1])}

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Old and reference log-probs, then `updates` optimizer steps on all answers."""
        config, start, made = self.config, time.monotonic(), rollout.made
        load = self.world.all_reduce_sum(routed_load(made, self.model.config.n_routed_experts))
        advantages, weights = advantages_and_weights(rollout, config)
        micros = micro_batches(made, config.micro_batch)
        old = ref = [None] * len(micros)
        with torch.no_grad():
            if config.updates > 1:
                old = [self.score(self.model, micro) for _, micro in micros]
            if "reference" in self.modules:  # which chooses its own experts
                reference = self.modules["reference"]
                ref = [score(reference, micro, config.temperature) for _, micro in micros]
        scored = time.monotonic()
        for number in range(config.updates):
            values, gap = self.backward(micros, old, ref, advantages, weights)
            if number == 0:
                first_gap = gap
                self.check_ratio(gap)
            lr = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
            values |= {"lr": lr, "grad_norm": train.optimizer_step(self.model, self.optimizer, lr, config.clip)}
            train.update_biases(self.model, load, config.bias_update_speed)
            self.loads.append(load.cpu())
        return values | {"ratio_gap": first_gap, "max_vio": train.max_violation(load),
                         "score_s": scored - start, "update_s": time.monotonic() - scored}

    def score(self, model, micro: Generation) -> Tensor:
        """Log-probs (n, T-1) with the experts that the rollout chose, if `keep_routing`."""
        routing = micro.routing if self.config.keep_routing else None
        return score(model, micro, self.config.temperature, routing)

    def backward(self, micros, old: list, ref: list, advantages: Tensor,
                 weights: Tensor) -> tuple[dict, float]:
        """The gradient of the objective over all answers: its terms, and the gap of policy and sampler.

        micros: (rows, Generation) of `micro_batches`; old, ref: log-probs (n, T-1) of each, or None
        for those of the policy itself.
        """
        sums, gap = Counter(), 0.0
        for i, (rows, micro) in enumerate(micros):
            mask = micro.mask[:, 1:]  # (n, T-1)
            with self.world.accumulating(self.wrapped, is_last=i == len(micros) - 1):
                logps = self.score(self.wrapped, micro)  # (n, T-1)
                here = logps.detach()
                before, anchor = (here if each is None else each for each in (old[i], ref[i]))
                losses = policy_loss(logps, before, anchor, advantages[rows], mask,
                                     weights[rows, : mask.shape[1]], self.config)
                losses["total"].backward()
            for name, value in losses.items():
                sums[name] += float(value.detach())
            gap = max(gap, float((here - micro.logps[:, 1:])[mask].abs().max()))
        terms = self.world.all_reduce_sum(torch.tensor(list(sums.values()), device=self.world.device))
        return dict(zip(sums, (terms / self.world.world_size).tolist())), gap

    def check_ratio(self, gap: float) -> None:
        """Before the first update pi / pi_old is 1: the sampler and the trainer are the same policy."""
        config = self.config
        is_cut = (config.top_k > 0 or config.top_p < 1) and not config.keep_sampling_mask
        if gap > RATIO_TOLERANCE and not is_cut:
            hint = "" if config.keep_routing else "; --keep-routing removes what near ties of experts add"
            raise UserError(f"step {self.step + 1}: log-probs of sampler and trainer differ by {gap:.1e} "
                            f"nats, wanted at most {RATIO_TOLERANCE:.0e}: the update would not be on "
                            f"policy{hint}")

    def check_signal(self, values: dict[str, float]) -> None:
        """Raises UserError when no answer has been right, and no group alive, for too many steps."""
        is_in_vain = values["dead"] == 1 and values["accuracy"] == 0
        self.steps_in_vain = self.steps_in_vain + 1 if is_in_vain else 0
        if self.steps_in_vain >= MOST_STEPS_IN_VAIN:
            raise UserError(f"no right answer and every group dead for {MOST_STEPS_IN_VAIN} steps: there "
                            "is nothing to learn from. Wanted: a base that is right now and then (more "
                            "--temperature, an easier --task, a longer python train.py, or a cold start: "
                            "--recipe r1)")

    def evaluate(self, samples: int) -> dict:
        """Rank 0 examines the policy; the others wait, and know nothing."""
        found = {}
        if self.world.is_main:
            found = evaluate(self.model, self.tokenizer, self.tasks, self.config, self.folder.path,
                             samples)
        self.world.barrier()
        return found

    def answer_samples(self) -> str:
        """Five held-out questions answered once more: beside the base's answers, in answers.txt too."""
        if not self.world.is_main:
            return ""
        questions = draw_questions(self.tasks, "test", "strip", range(5))
        made = ask(self.model, self.tokenizer, questions, 1, self.folder.path,
                   max_new_tokens=self.config.max_new_tokens)
        self.answers.append([self.step, made.texts, (made.rewards["accuracy"] == 1).flatten().tolist()])
        texts = [question.problem.question for question in questions]
        pairs = [exam.side_by_side(texts, self.answers[0], after) for after in self.answers[1:]]
        with written_aside(self.folder.path / "answers.txt") as aside:
            aside.write_text("\n\n".join(pairs) + "\n", encoding="utf-8")
        return pairs[-1] if pairs else ""

    def finish(self, after: dict) -> None:
        """The base beside the policy: report.txt and report.json."""
        if not self.world.is_main:
            return
        parts, rows = ("rollout", "score", "update"), self.folder.rows()
        took = [sum(float(row[f"{part}_s"]) for row in rows) for part in parts]
        shares = [f"{part} {100 * seconds / sum(took):.0f} %" for part, seconds in zip(parts, took)]
        time_line = f"time        {minutes(sum(took))}: {', '.join(shares)}; evaluation apart"
        text = "\n".join([*exam.report(self.before, after), time_line])
        print("\n" + text)
        with written_aside(self.folder.path / "report.txt") as aside:
            aside.write_text(text + "\n", encoding="utf-8")
        write_json(self.folder.path / "report.json", {"before": self.before, "after": after})

    def draw(self) -> None:
        """Redraw rl.png and expert_load.png."""
        if not self.world.is_main:
            return
        plot.rl_figure(self.folder.path / "rl.png", self.folder.rows(), self.styles)
        if self.loads and len(self.loads[0]):
            names = train.layer_names(self.model)[: len(self.loads[0])]
            updates = list(range(1, len(self.loads) + 1))
            plot.expert_load_figure(self.folder.path / "expert_load.png", torch.stack(self.loads),
                                    updates, names, "update")


def build_trainer(config: RLConfig, world: train.Dist) -> RLTrainer:
    """Everything of a run, new or resumed; says what it is going to do."""
    folder = RunFolder(config.folder, world.is_main, "rl.json")
    if config.questions % world.world_size:
        raise UserError(f"questions: got {config.questions}, wanted a multiple of the {world.world_size} ranks")
    model, tokenizer, tasks = open_base(config, world)
    check_room(config, model, tokenizer, tasks)
    tensors, notes = folder.resume(asdict(config), config.FREE_ON_RESUME) if config.resume else ({}, {})
    if not notes:
        folder.start(asdict(config), config.overwrite)
    world.barrier()
    trainer = RLTrainer(config, model, tokenizer, tasks, folder, world)
    if notes:
        trainer.restore(tensors, notes)
        world.say(f"resumed at step {trainer.step} of {config.steps}")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, moving = sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves)
    example = draw_questions(tasks, "train", "example", [0])[0].problem.question
    world.say(f"policy      {config.base}: {moving:,} of {total:,} parameters are trained\n"
              f"task        {config.task}, such as {example}\n"
              f"objective   {config.variant}: {config.questions} questions x {config.group_size} answers a step, "
              f"{config.updates} update{'s' * (config.updates > 1)}\n"
              f"run         {config.steps} steps into {folder.path}")
    return trainer


def open_base(config: RLConfig, world: train.Dist) -> tuple[Transformer, object, list[Task]]:
    """Model and tokenizer of the base, and the tasks. Raises UserError when there is none."""
    if not (Path(config.base) / "config.json").exists():
        raise UserError(f"base: no checkpoint in {config.base}; python train.py makes out/base, "
                        "--base names another")
    tokenizer, tasks = load_tokenizer(config.base), [load_task(name) for name in config.task.split(",")]
    return Transformer.from_pretrained(config.base, config.impl, world.device), tokenizer, tasks


def check_room(config: RLConfig, model: Transformer, tokenizer, tasks: list[Task]) -> None:
    """Raises UserError when a split has no question, or an answer of `max_new_tokens` does not fit behind one."""
    questions = [q for split in ("train", "test") for q in draw_questions(tasks, split, "room", range(16))]
    longest = max(len(tokenizer.encode_trusted(prompt_text(q.problem.question))) for q in questions)
    context = model.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise UserError(f"max_new_tokens: got {config.max_new_tokens}; questions have up to {longest} tokens and the "
                        f"context {context}, wanted at most {context - longest}")


# -------------------------------------------------------------------------------- the whole recipe

SFT = "--seq_len 96 --tokens_per_step 6144 --bias_update_speed 0 --mtp_loss_weight 0.1 --eval_every 1000"


def r1_commands(config: RLConfig) -> list[str]:
    """DeepSeek-R1 as commands that can be typed: R1-Zero (R1 section 2.2), then the four stages of 2.3."""
    base, out, path = map(shlex.quote, (config.base, config.out, config.folder.as_posix()))
    name, seed, (first, _, others) = config.name, config.seed, config.task.partition(",")
    stage = {"name", "task", "base", "recipe", "resume", "overwrite", "sft_steps", "sft_lr", "mix"}
    rl = f"python rl.py {shlex.join(to_flags(config, asdict(config).keys() - stage))}".strip()
    sft = (f"python train.py --out {out} --init_from {base} {SFT} --steps {config.sft_steps} "
           f"--lr {config.sft_lr} --seed {seed} --device {config.device}")
    return [
        f"{rl} --base {base} --task {first} --name {name}-0-zero",
        # 2.3.1 a thousand long, clean traces (R1: thousands), so that RL starts from readable thoughts
        f"python -m data.tasks {first} 1000 {path}-traces.jsonl --seed {seed}",
        f"{sft} --data examples:{path}-traces.jsonl --name {name}-1-cold-start",
        # 2.3.2 reinforcement learning on reasoning; a task with languages rewards their consistency
        f"{rl} --base {path}-1-cold-start --task {first} --name {name}-2-reasoning",
        # 2.3.3 its right and readable answers, other tasks' data and plain text teach the base anew
        f"{rl} --base {path}-2-reasoning --task {first} --write {path}-good.jsonl",
        f"python -m data.tasks {others or first} 200 {path}-others.jsonl --seed {seed}",
        f"{sft} --data examples:{path}-good.jsonl,{path}-others.jsonl --mix {shlex.quote(config.mix)} "
        f"--name {name}-3-rejection",
        # 2.3.4 reinforcement learning over all tasks
        f"{rl} --base {path}-3-rejection --task {config.task} --name {name}-4-all",
        f"{rl} --task {config.task} --name {name} --exam {base} {path}-0-zero {path}-1-cold-start "
        f"{path}-2-reasoning {path}-3-rejection {path}-4-all",
    ]


def write_good_answers(config: RLConfig, world: train.Dist) -> None:
    """Rejection sampling (R1 2.3.3): right and readable answers of the base, at most one per question.

    `count` of them go into the file `write`. Raises UserError when hardly any answer is good.
    """
    model, tokenizer, tasks = open_base(config, world)
    clean, kept, count = {task: exam.clean_forms(task) for task in tasks}, {}, config.count
    for start in range(0, 8 * count, 64):
        questions = draw_questions(tasks, "train", f"rejection {config.seed}", range(start, start + 64))
        made = ask(model, tokenizer, questions, 4, Path(config.base), max_new_tokens=config.max_new_tokens)
        right = made.rewards["accuracy"].flatten() == 1
        for question, text, is_right in zip(made.asked, made.texts, right.tolist()):
            if is_right and exam.is_readable(text, clean[question.task]):
                kept.setdefault(question.seed, {"question": question.problem.question, "answer": text})
        if len(kept) >= count:
            break
    if len(kept) < count // 8:
        raise UserError(f"{config.base}: {len(kept)} of {8 * count} questions had a correct and readable answer, "
                        f"wanted {count // 8} or more: a better base, or more --steps")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in list(kept.values())[:count]]
    with written_aside(Path(config.write)) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} answers of {config.base} in {config.write}")


def examine(config: RLConfig, world: train.Dist) -> None:
    """Checkpoints side by side on held-out questions of the first task, and of the others: out/<name>.txt."""
    first, _, others = config.task.partition(",")
    groups = [group for group in (first, others) if group]
    rows = {}
    for directory in config.exam:
        bases = [open_base(replace(config, base=directory, task=group), world) for group in groups]
        rows[Path(directory).name] = [evaluate(*base, config, Path(directory), min(8, config.eval_samples))
                                      for base in bases]
    text = "\n".join(exam.table(groups, rows))
    print(text)
    with written_aside(Path(f"{config.folder}.txt")) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ the program


def on_first_rank(world: train.Dist, function, *args) -> None:
    """Call it on the first rank only; the others wait."""
    if world.is_main:
        function(*args)
    world.barrier()


def main(argv: list[str], world: train.Dist | None = None) -> bool:
    """One run of RL, or a recipe, good answers, an examination; False when a signal ended it early."""
    config = parse_flags(RLConfig, argv, __doc__, presets={"variant": VARIANTS, "recipe": RECIPES})
    mine = world or train.setup_distributed(config.device)
    try:
        if config.exam or config.write:
            on_first_rank(mine, examine if config.exam else write_good_answers, config, mine)
            return True
        if config.recipe:
            programs = {"rl.py": partial(main, world=mine), "train.py": partial(train.main, world=mine),
                        "data.tasks": partial(on_first_rank, mine, traces.main)}
            is_complete = Commands(config, programs, mine.say, mine.is_main).run(r1_commands(config))
        else:
            is_complete = build_trainer(config, mine).run()
        if not is_complete:
            flags = [flag for flag in argv if flag not in ("--resume", "--overwrite")]
            mine.say(f"stopped and saved; to go on:\n  python rl.py {shlex.join([*flags, '--resume'])}")
        return is_complete
    finally:
        if world is None:
            mine.close()


if __name__ == "__main__":
    run_main(main)
