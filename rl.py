"""Reinforcement learning with verifiable rewards: GRPO and its kin, and the R1 recipe around it.

    python train.py                      first a base: out/base
    python rl.py                         R1-Zero on it: out/rl, with rl.png and answers.txt
    python rl.py --variant dapo          another objective: grpo, dr_grpo, dapo, gspo, v3.2
    python rl.py --task mytask:MyTask    your own questions and verifier
    python rl.py --recipe r1             cold start, RL, rejection sampling, RL over all tasks
    python rl.py --recipe distill        a smaller model, taught by R1 or by RL itself
    torchrun --nproc_per_node=2 rl.py    the same questions, shared by two processes

Papers: Math = DeepSeekMath, arXiv 2402.03300; R1 = 2501.12948; Dr.GRPO = 2503.20783; DAPO = 2503.14476;
GSPO = 2507.18071; V3.2 = DeepSeek-V3.2, 2512.02556. G is the group size, Q questions, N = Q*G answers.
"""

import copy
import json
import math
import random
import re
import shlex
import textwrap
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from data import UserError, plot, run_main
from data.corpus import prepare
from data.loader import Loader
from data.tasks import EOS, Problem, Task, load_task, prompt_text, reward_total, split_completion
from data.tokenizer import load_tokenizer
from kernels import IGNORE
from model import Transformer, load_pretrained, save_pretrained, write_json, written_aside
from sample import Generation, generate, knob, parse_flags
from train import (Dist, Progress, RunFolder, StopSignal, TrainConfig, Trainer, layer_names, load_optimizer,
                   make_optimizer, max_violation, minutes, optimizer_tensors, setup_distributed, update_routing)

RATIO_TOLERANCE = 1e-4  # sampler and trainer must agree on log-probs to this, in nats (float32)
FREE_ON_RESUME = {"resume", "overwrite", "out", "device", "impl", "micro_batch"}
RECIPES = {  # the program of each, and knobs that fit it; a flag on the command line still wins
    "": "",
    "r1": "--name r1 --task chain,countdown,compare --steps 60 --eval_samples 8",
    "distill": "--name distill --steps 60 --eval_samples 8",
    "quality": "--name quality --steps 60 --eval_every 60 --eval_samples 8",
}
SFT_BATCH, SFT_LENGTH = 64, 96  # sequences of a step of supervised fine-tuning, and their tokens
HARDER = {"chain": ("terms", (4, 6, 8, 10, 12)), "countdown": ("count", (2, 3, 4)), "findtwo": ("count", (4, 6, 8)),
          "compare": ("digits", (3, 4)), "multiply": ("digits", (2, 3)), "sort": ("count", (6, 8))}
NOTES = ("step", "seconds", "before", "strips", "hopeless")  # what a run saves besides tensors
PATIENCE = 20  # steps without a single right answer or difference in reward before the run gives up

# --------------------------------------------------------------------------------------------- the knobs

# Knobs that each paper changes; a flag on the command line still wins.
VARIANTS = {
    "grpo": "",
    "dr_grpo": "--no-divide-by-std --aggregate constant --kl-beta 0",
    "dapo": "--clip-eps-high 0.28 --aggregate token --kl-beta 0 --resample 4 --overlong-tokens 16",
    "gspo": "--sequence-ratio --clip-eps 3e-4 --clip-eps-high 4e-4 --kl-beta 0",
    "v3.2": "--no-divide-by-std --unbiased-kl --off-policy-delta 0.5 --keep-sampling-mask",
}


@dataclass
class RLConfig:
    """Every knob of a reinforcement learning run."""

    base: str = knob("out/base", "checkpoint directory to start from")
    task: str = knob("chain", "task, several with commas between, or module:Class for your own")
    variant: str = knob("grpo", "objective; sets the knobs that its paper changes", choices=tuple(VARIANTS))
    recipe: str = knob("", "several stages, each on top of the last", choices=tuple(RECIPES))
    steps: int = knob(100, "rollouts, each followed by its updates")
    questions: int = knob(16, "questions of one step, over all ranks (R1: 32)")
    group_size: int = knob(16, "answers sampled per question (R1: 16)")
    max_new_tokens: int = knob(96, "longest answer")
    temperature: float = knob(1.0, "of the rollout (R1: 1)")
    top_k: int = knob(0, "rollout: only the k likeliest tokens; 0 is all")
    top_p: float = knob(1.0, "rollout: only the likeliest tokens that hold this probability; 1 is all")
    updates: int = knob(1, "optimizer steps per rollout; each sees all answers")
    clip_eps: float = knob(0.2, "clip range of the ratio (has an effect from the second update on)")
    clip_eps_high: float | None = knob(None, "clip range above 1 when it differs (DAPO: 0.28)")
    kl_beta: float = knob(0.001, "weight of the KL to the reference (Math: 0.04, R1: 0.001)")
    reference_every: int = knob(50, "steps after which the reference becomes the present policy (R1: 400)")
    divide_by_std: bool = knob(True, "advantage in standard deviations of its group (Math, R1)")
    aggregate: str = knob("answer", "what is averaged first", choices=("answer", "token", "constant"))
    sequence_ratio: bool = knob(False, "one ratio per answer (GSPO)")
    unbiased_kl: bool = knob(False, "weight the KL estimate by the ratio (V3.2 eq 7)")
    off_policy_delta: float | None = knob(None, "drop bad answers that drifted further, in nats (V3.2 eq 9)")
    keep_routing: bool = knob(True, "update with the experts that the rollout chose, ties or not (V3.2)")
    keep_sampling_mask: bool = knob(False, "update within the tokens left by top-k and top-p (V3.2)")
    resample: int = knob(0, "ask another question up to so often when a group is dead (DAPO)")
    overlong_tokens: int = knob(0, "answers are punished over the last so many tokens (DAPO)")
    lr: float = knob(1e-4, "learning rate of AdamW, constant behind the warm-up")
    warmup_steps: int = knob(10, "steps over which the learning rate rises")
    weight_decay: float = knob(0.0, "AdamW: decay of matrices")
    clip: float = knob(1.0, "largest norm of the gradient")
    train_router: bool = knob(False, "let the gradient move the routers' weights")
    bias_update_speed: float = knob(0.0, "step of the routing bias after every update; 0 leaves it as it is")
    sft_steps: int = knob(120, "recipes: steps of supervised fine-tuning")
    sft_lr: float = knob(1.5e-3, "recipes: its learning rate")
    micro_batch: int = knob(64, "answers of one forward pass on one rank; the rest is accumulated")
    eval_every: int = knob(25, "steps between evaluations; each one saves and redraws the pictures")
    eval_questions: int = knob(64, "held-out questions of an evaluation")
    eval_samples: int = knob(64, "answers to each of them before and after the run (8 in between)")
    out: str = knob("out", "folder of all runs")
    name: str = knob("rl", "folder of this run, within --out")
    resume: bool = knob(False, "go on from the last checkpoint of this run")
    overwrite: bool = knob(False, "start over although the run folder holds a checkpoint")
    seed: int = knob(0, "seed of questions and answers")
    device: str = knob("auto", "auto, cpu, cuda or mps")
    impl: str = knob("fused", "twins of kernels.py", choices=("fused", "reference"))

    def __post_init__(self):
        for name, wanted, is_met in self._rules():
            if not is_met:
                raise UserError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")

    def _rules(self):
        for name in ("steps", "questions", "max_new_tokens", "updates", "reference_every", "micro_batch",
                     "eval_every", "eval_questions", "eval_samples"):
            yield name, "at least 1", getattr(self, name) >= 1
        yield "group_size", "at least 2: an advantage compares answers", self.group_size >= 2
        for name in ("lr", "clip", "temperature"):
            yield name, "a number above 0", 0 < getattr(self, name) < math.inf
        yield "overlong_tokens", "0 to max_new_tokens", 0 <= self.overlong_tokens <= self.max_new_tokens
        is_plain = self.name not in ("", ".", "..") and Path(self.name).name == self.name
        yield "name", "a plain folder name (the place goes into --out)", is_plain


# ----------------------------------------------------------------------------------------- the objective


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """`A_i = (R_i - mean(R)) / std(R)` within each group (Math section 4.1.2): (Q, G) -> (Q, G).

    Without `divide_by_std` only the mean goes (Dr.GRPO, V3.2). The deviation has Bessel's correction. A
    dead group, all rewards equal, teaches nothing: exactly 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), divide_by_std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    if divide_by_std:
        centred = centred / rewards.std(1, keepdim=True)
    return centred.masked_fill(is_dead(rewards).unsqueeze(1), 0)


def is_dead(rewards: Tensor) -> Tensor:
    """Groups without a difference in reward: (Q, G) -> (Q,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """Soft punishment of length (DAPO eq 13): 0 until `longest - margin` tokens, then linearly to -1.

    >>> overlong_penalty(torch.tensor([5, 8, 9, 10]), longest=10, margin=4)
    tensor([ 0.0000, -0.5000, -0.7500, -1.0000])
    """
    return ((longest - margin - lengths) / margin).clamp(-1, 0)


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


def policy_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
                weights: Tensor, knobs) -> dict[str, Tensor]:
    """`total = pg + kl_beta * kl`, a number to minimise; the default is GRPO's (Math eq 3).

        ratio = pi / pi_old                                exactly 1 on the first update after a rollout
        pg    = -sum weight * min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) A)
        kl    = sum weight * (rho - ln rho - 1),  rho = pi_ref / pi        "k3", Math eq 4, never negative

    sequence_ratio (GSPO eq 7): `ratio = exp(mean_t ln(pi / pi_old))`, one for the whole answer.
    unbiased_kl (V3.2 eq 7): each term of kl times pi / pi_old, which mends its gradient off policy.
    off_policy_delta (V3.2 eqs 8-9): no pg where `A < 0` and `mean_t ln(pi_old / pi) > delta`.

    logps, old_logps, ref_logps (N, T) in nats, of the sampled tokens; advantages (N,); mask (N, T) bool,
    where the policy chose; weights (N, T) of `token_weights`; knobs: a RLConfig. Besides the three terms
    there are `clipped` and `dropped`, the weight of the tokens that the clip and the drift mask silenced.

    >>> half = torch.full((2, 1), 0.5).log()
    >>> mask, A = torch.ones(2, 1, dtype=torch.bool), torch.tensor([1.0, 1.0])
    >>> weights = token_weights(mask, 2, "answer", 1)
    >>> losses = policy_loss(half + 1, half, half, A, mask, weights, RLConfig(kl_beta=0.1))
    >>> [round(losses[name].item(), 4) for name in ("pg", "kl", "total")]     # e is clipped at 1.2
    [-1.2, 0.3679, -1.1632]
    """
    A, lengths = advantages.unsqueeze(1), mask.sum(1, keepdim=True)  # (N, 1)
    log_ratio = (logps - old_logps).masked_fill(~mask, 0)  # (N, T)
    drift = log_ratio.sum(1, keepdim=True) / lengths  # (N, 1), mean over the answer
    judged = drift.exp() if knobs.sequence_ratio else log_ratio.exp()  # (N, 1) or (N, T)
    high = knobs.clip_eps if knobs.clip_eps_high is None else knobs.clip_eps_high
    clipped = judged.clamp(1 - knobs.clip_eps, 1 + high)
    gain = torch.minimum(judged * A, clipped * A)
    delta = math.inf if knobs.off_policy_delta is None else knobs.off_policy_delta
    is_dropped = (A < 0) & (-drift > delta)  # (N, 1)
    gain = gain.masked_fill(is_dropped, 0)
    log_rho = (ref_logps - logps).masked_fill(~mask, 0)  # (N, T)
    leash = log_rho.exp() - log_rho - 1
    if knobs.unbiased_kl:
        leash = leash * log_ratio.exp()
    weights = weights.to(logps.dtype)
    pg, kl = -(weights * gain).sum(), (weights * leash).sum()
    is_silent = (gain != judged * A) & ~is_dropped
    return {"pg": pg, "kl": kl, "total": pg + knobs.kl_beta * kl,
            "clipped": (weights * is_silent).sum(), "dropped": (weights * is_dropped).sum()}


# ------------------------------------------------------------------------------------ asking and judging


@dataclass
class Question:
    """One question of a task, and the seed of the answers to it."""

    task: Task
    problem: Problem
    seed: int


@dataclass
class Answers:
    """G answers to each of Q questions, row by row as in `generation`, and what the rules say of them."""

    questions: list[Question]  # (N,) of each answer
    generation: Generation
    texts: list[str]  # (N,) whole completions
    parts: list[dict[str, float]]  # (N,) accuracy, format, ... of each
    rewards: Tensor  # (Q, G)

    @property
    def lengths(self) -> Tensor:
        """Sampled tokens of each answer, (N,)."""
        return self.generation.mask.sum(1)

    def part(self, name: str) -> Tensor:
        """One part of the reward, (Q, G) float64; 0 for a task that does not give it."""
        return torch.tensor([parts.get(name, 0.0) for parts in self.parts], dtype=torch.float64).view_as(self.rewards)


def draw_questions(tasks: list[Task], split: str, where: str, slots, **difficulty) -> list[Question]:
    """The questions of the numbered `slots`; what a slot asks depends on `where` and its number alone."""
    out = []
    for slot in slots:
        rng = random.Random(f"{where} {slot}")
        task = rng.choice(tasks)
        out.append(Question(task, task.problem(rng, split, **difficulty), rng.getrandbits(62)))
    return out


def ask(model: Transformer, tokenizer, questions: list[Question], num_samples: int, folder: Path,
        **sampling) -> Answers:
    """Sample answers to every question with sample.py's engine, and judge them."""
    prompts = [tokenizer.encode_trusted(prompt_text(q.problem.question)) for q in questions]
    made = generate(model, prompts, num_samples=num_samples, stop_ids=[tokenizer.eos_id],
                    seed=[q.seed for q in questions], **sampling)
    texts = [tokenizer.decode(made.completion(row)) for row in range(len(made.tokens))]
    asked = [question for question in questions for _ in range(num_samples)]
    parts = [judge(question, text, folder) for question, text in zip(asked, texts)]
    rewards = torch.tensor([each["total"] for each in parts], dtype=torch.float64).view(-1, num_samples)
    return Answers(asked, made, texts, parts, rewards)


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


# -------------------------------------------------------------------------------------- batch and scores


@dataclass
class Batch:
    """Answers as the update sees them: column t is about token t + 1, which tokens up to t predict."""

    tokens: Tensor  # (N, T) int64
    targets: Tensor  # (N, T) int64, IGNORE where the policy did not choose
    sampler_logps: Tensor  # (N, T) nats
    advantages: Tensor  # (N,)
    weights: Tensor  # (N, T) float64
    replay: list[Tensor] | None = None  # per MoE layer (N, T, K), experts that the rollout chose
    keep: Tensor | None = None  # (N, T, V) bool, tokens that top-k and top-p left
    old_logps: Tensor | None = None  # (N, T); None: those of the update's own forward pass, ratio 1
    ref_logps: Tensor | None = None  # (N, T); None: there is no KL term

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE

    def micros(self, size: int) -> "list[Batch]":
        """All answers in batches of `size`, by length, each cut to its longest."""
        place = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)  # (T,)
        ends = (self.mask * place).amax(1)  # (N,)
        return [self._cut(rows, int(ends[rows].max())) for rows in ends.argsort().split(size)]

    def _cut(self, rows: Tensor, T: int) -> "Batch":
        def cut(value):
            if isinstance(value, list):
                return [cut(each) for each in value]
            return value if value is None else value[rows] if value.ndim == 1 else value[rows, :T]

        return Batch(**{each.name: cut(getattr(self, each.name)) for each in fields(self)})


def make_batch(answers: Answers, config: RLConfig) -> Batch:
    """Rewards become advantages; prompt and padding lose their targets, the stop token keeps its."""
    made, rewards = answers.generation, answers.rewards
    if config.overlong_tokens:
        lengths = answers.lengths.view(rewards.shape).cpu()
        rewards = rewards + overlong_penalty(lengths, config.max_new_tokens, config.overlong_tokens)
    mask = made.mask[:, 1:]  # (N, T)
    advantages = group_advantages(rewards, config.divide_by_std).flatten().to(made.logps)  # (N,)
    return Batch(tokens=made.tokens[:, :-1], targets=made.tokens[:, 1:].masked_fill(~mask, IGNORE),
                 sampler_logps=made.logps[:, 1:], advantages=advantages,
                 weights=token_weights(mask, config.group_size, config.aggregate, config.max_new_tokens),
                 replay=made.routing and [chosen[:, :-1] for chosen in made.routing],
                 keep=None if made.keep is None else made.keep[:, 1:] | ~mask.unsqueeze(-1))


def score(model, batch: Batch, temperature: float) -> Tensor:
    """Log-probs (N, T) of the sampled tokens under `model`, in nats, 0 where there is no target.

    One function for old, new and reference policy. `model` may be wrapped in DDP and is called as such.
    """
    if temperature == 1 and batch.keep is None:  # never holds all logits
        return -model(batch.tokens, batch.targets, reduction="none", mtp=False, replay=batch.replay)["ce"]
    logits = model(batch.tokens, replay=batch.replay) / temperature  # (N, T, V)
    if batch.keep is not None:
        logits = logits.masked_fill(~batch.keep, -math.inf)
    chosen = batch.targets.clamp(min=0).unsqueeze(-1)  # (N, T, 1)
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).masked_fill(~batch.mask, 0)


# --------------------------------------------------------------------------------------------- evaluation


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean over questions (Q,) and its standard error: answers to one question are not independent."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return float(values.mean()), float(error)


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """Chance that one of k answers is right, per question: `1 - C(n-c, k) / C(n, k)` (arXiv 2107.03374 eq 1).

    right (Q, n) bool -> (Q,) float64.

    >>> pass_at_k(torch.tensor([[True, False, False, False]]), 2)
    tensor([0.5000], dtype=torch.float64)
    """
    n, hits = right.shape[1], right.sum(1).tolist()
    return torch.tensor([1 - math.comb(n - c, k) / math.comb(n, k) for c in hits], dtype=torch.float64)


def majority_at_k(votes: list[list[str | None]], right: Tensor, k: int, draws: int = 16) -> Tensor:
    """Chance that the most frequent of k answers is right, per question (R1's cons@k): (Q,) float64.

    votes: the answers' texts, None where there is none, which is no vote; of equals the first seen wins.
    Below all n answers it is a mean over `draws` random subsets.
    """
    rng, out = random.Random(0), []
    for texts, is_right in zip(votes, right.tolist()):
        known, hits = dict(zip(texts, is_right)), 0
        subsets = [texts] if k == len(texts) else [rng.sample(texts, k) for _ in range(draws)]
        for subset in subsets:
            ranking = Counter(text for text in subset if text is not None).most_common(1)
            hits += bool(ranking) and known[ranking[0][0]]
        out.append(hits / len(subsets))
    return torch.tensor(out, dtype=torch.float64)


def evaluate(model: Transformer, tokenizer, tasks: list[Task], config: RLConfig, folder: Path, samples: int,
             is_full: bool) -> dict:
    """Held-out questions, the same for every run: pass@1 as [mean, standard error], format, length.

    A full one adds greedy decoding, pass@k, majority@k, harder questions and thinking budgets.
    """
    questions = draw_questions(tasks, "test", "held out", range(config.eval_questions))
    answers = [ask(model, tokenizer, questions[start : start + 16], samples, folder,
                   max_new_tokens=config.max_new_tokens) for start in range(0, len(questions), 16)]
    right = torch.cat([each.part("accuracy") > 0 for each in answers])  # (Q, n)
    form = torch.cat([each.part("format") for each in answers])  # (Q, n)
    lengths = torch.cat([each.lengths.double() for each in answers])  # (Q * n,)
    texts = [text for each in answers for text in each.texts]
    asked = [question.task for each in answers for question in each.questions]
    clean = {task: clean_forms(task) for task in tasks}
    readable = [is_readable(text, clean[task]) for task, text in zip(asked, texts)]
    out = {"accuracy": mean_error(right.double().mean(1)), "format": float(form.mean()),
           "readable": sum(readable) / len(texts), "length": float(lengths.mean()),
           "tries": sum(text.count("?") for text in texts) / len(texts), "styles": {}}
    habits = [task.style_of(text) for task, text in zip(asked, texts)]
    for habit in sorted(set(habits)):  # [share, accuracy] of each
        hits = [is_right for one, is_right in zip(habits, right.flatten().tolist()) if one == habit]
        out["styles"][habit] = [len(hits) / len(texts), sum(hits) / len(hits)]
    if is_full:
        out |= full_evaluation(model, tokenizer, tasks, config, folder, questions, texts, right)
    return json.loads(json.dumps(out))  # as it will be after a resume


def full_evaluation(model, tokenizer, tasks, config: RLConfig, folder, questions, texts, right: Tensor) -> dict:
    """Greedy decoding, pass@k, majority@k of the answers' `texts` (Q * n), thinking budgets, harder questions."""
    samples, knobs = right.shape[1], {"max_new_tokens": config.max_new_tokens}
    greedy = ask(model, tokenizer, questions, 1, folder, temperature=0.0, **knobs)
    votes = [parts and parts[1] for parts in map(split_completion, texts)]
    votes = [votes[i : i + samples] for i in range(0, len(votes), samples)]
    powers = [2**i for i in range(samples.bit_length())]
    out = {"greedy": mean_error(greedy.part("accuracy").squeeze(1)), "harder": {}}
    out["pass"] = {k: mean_error(pass_at_k(right, k)) for k in powers}
    out["majority"] = {k: mean_error(majority_at_k(votes, right, k)) for k in powers}
    out["budget"] = {b: mean_error(think_within(model, tokenizer, questions, b, folder))
                     for b in (0, 4, 8, 16, 32, 64) if b < config.max_new_tokens}
    for task in tasks:
        key, values = HARDER.get(task.name, ("", ()))
        for value in values:
            questions = draw_questions([task], "test", "harder", range(config.eval_questions), **{key: value})
            answers = ask(model, tokenizer, questions, 4, folder, **knobs)
            out["harder"][f"{task.name}, {value} {key}"] = mean_error(answers.part("accuracy").mean(1))
    return out


def clean_style(task: Task) -> str:
    """The style of full work, in one language where a task has several."""
    return next((style for style in ("english", "search", "full") if style in task.styles), next(iter(task.styles)))


def clean_forms(task: Task) -> set[str] | None:
    """Forms of steps and words in 200 clean traces of the task; None where they have no fixed form."""
    rng, forms = random.Random(0), set()
    try:
        for _ in range(200):
            trace = task.trace(task.problem(rng), rng, style=clean_style(task), tagged=True)
            forms |= forms_of(split_completion(trace)[0])
    except NotImplementedError:  # a user's task without `work`
        return None
    return forms if len(forms) < 200 else None


def forms_of(thinking: str) -> set[str]:
    """The words of a thought, and the forms of its steps: `12-4=8 no` is `0-0=0 w`."""
    steps = re.sub("[0-9]+", "0", thinking).split(";")
    return {re.sub(r"[^\W\d]+", "w", step) for step in steps} | set(re.findall(r"[^\W\d]+", thinking))


def is_readable(text: str, clean: set[str] | None) -> bool:
    """Well-formed, and each step and word is one of `clean_forms`: no stray text, skipped steps, second language."""
    parts = split_completion(text)
    return parts is not None and (clean is None or forms_of(parts[0]) <= clean)


def think_within(model, tokenizer, questions: list[Question], budget: int, folder: Path, samples: int = 4) -> Tensor:
    """Accuracy (Q,) when a thought is cut after `budget` tokens and the answer is asked for at once."""
    begin, end = tokenizer.specials["<think>"], tokenizer.encode_trusted("</think><answer>")
    answers = ask(model, tokenizer, questions, samples, folder, max_new_tokens=budget + 1)
    right, cut = answers.part("accuracy").flatten(), {}  # (N,); the thoughts that are cut, by their rows
    for row in range(len(right)):
        thought = answers.generation.completion(row)
        if thought[:1] == [begin] and end[0] not in thought:
            cut[row] = thought + end
    if cut:
        prompts = [tokenizer.encode_trusted(prompt_text(answers.questions[row].problem.question)) for row in cut]
        made = generate(model, [prompt + thought for prompt, thought in zip(prompts, cut.values())], max_new_tokens=16,
                        stop_ids=[tokenizer.eos_id], seed=budget)
        for i, (row, thought) in enumerate(cut.items()):
            text = tokenizer.decode(thought + made.completion(i))
            right[row] = judge(answers.questions[row], text, folder)["accuracy"]
    return right.view(-1, samples).mean(1)


# ------------------------------------------------------------------------------------------------ the loop


class RLTrainer:
    """A run: questions -> answers -> rewards -> advantages -> updates; evaluation, checkpoint, pictures.

    What stays still: the MTP modules (they are no part of the policy), and by default the routers' weights
    and balancing biases (README: measured). The balance loss is a pretraining matter and is not used.
    """

    def __init__(self, config: RLConfig, model: Transformer, tokenizer, tasks: list[Task], folder: RunFolder,
                 world: Dist):
        self.config, self.model, self.tokenizer, self.tasks = config, model, tokenizer, tasks
        self.folder, self.world = folder, world
        for _, moe in model.moe_layers():
            moe.gate.weight.requires_grad_(config.train_router)
        for module in model.model.layers[model.config.num_hidden_layers :]:  # MTP
            module.requires_grad_(False)
        self.reference = copy.deepcopy(model).requires_grad_(False) if config.kl_beta else None
        self.models = nn.ModuleDict({"model": model} | ({"reference": self.reference} if self.reference else {}))
        self.wrapped = world.wrap(model)
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        known = [*(style for task in tasks for style in task.styles), "correction", "search", "other"]
        self.styles = list(dict.fromkeys(known))
        self.step, self.seconds, self.hopeless = 0, 0.0, 0  # done so far
        self.before: dict = {}  # evaluation of the base
        self.strips: list[list] = []  # [step, texts of the answers to the five questions]
        self.loads: list[Tensor] = []  # (MoE layers, E) routed tokens of every step

    def run(self) -> bool:
        """Train to the end; False when a signal ended it early. Either way all is saved."""
        progress = Progress(self.config.steps, self.step, self.world.is_main, "rl")
        with StopSignal() as stop:
            if self.step == 0:
                self.before = self.evaluate(is_full=True)
                self.read(progress)
            while self.step < self.config.steps and not self.world.any(stop.is_set):
                values = self.advance()
                is_due = self.step % self.config.eval_every == 0 or self.step == self.config.steps
                if is_due:
                    values |= zip(("eval_accuracy", "eval_error"), self.evaluate(is_full=False)["accuracy"])
                self.folder.log(self.row(values))
                progress.show(self.step, summary(values))
                self.check_hope(values)
                if is_due:
                    self.read(progress)
                    self.save()
                    self.draw()
            if self.step < self.config.steps:
                self.save()
        progress.bar.close()
        if self.step < self.config.steps:
            return False
        self.finish(self.evaluate(is_full=True))
        return True

    def finish(self, after: dict) -> None:
        """The base beside the policy: report.txt, report.json and thinking.png."""
        if self.world.is_main:
            rows, parts = self.folder.rows(), ("rollout", "score", "update")
            took = [sum(float(row[f"{part}_s"]) for row in rows) for part in parts]
            shares = [f"{part} {100 * seconds / sum(took):.0f} %" for part, seconds in zip(parts, took)]
            text = "\n".join([*report(self.before, after),
                              f"time        {minutes(sum(took))}: {', '.join(shares)}; evaluation apart"])
            print("\n" + text)
            with written_aside(self.folder.path / "report.txt") as aside:
                aside.write_text(text + "\n")
            write_json(self.folder.path / "report.json", {"before": self.before, "after": after})
            plot.thinking_figure(self.folder.path / "thinking.png", {"the base": self.before, "after RL": after})

    def advance(self) -> dict[str, float]:
        """One rollout and its updates; returns the columns of the log."""
        start = time.monotonic()
        answers, values = self.rollout()
        values |= self.learn(make_batch(answers, self.config))
        if self.reference and (self.step + 1) % self.config.reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.step += 1
        self.seconds += time.monotonic() - start
        return values | {"step": self.step, "seconds": self.seconds}

    def rollout(self) -> tuple[Answers, dict[str, float]]:
        """Answers to this rank's questions; a dead group is replaced up to `resample` times (DAPO)."""
        config, start = self.config, time.monotonic()
        slots = range(self.world.rank, config.questions, self.world.world_size)
        rollouts = [self.ask(slots, 0)]
        answers = rollouts[0]
        while len(rollouts) <= config.resample and is_dead(answers.rewards).any():
            groups = is_dead(answers.rewards).nonzero().flatten().tolist()
            rollouts.append(self.ask([slots[group] for group in groups], len(rollouts)))
            answers = swap(answers, rollouts[-1], groups)
        return answers, self.measure(rollouts) | {"rollout_s": time.monotonic() - start}

    def ask(self, slots, attempt: int) -> Answers:
        """The questions of these slots of the present step, answered by the policy."""
        config = self.config
        questions = draw_questions(self.tasks, "train", f"{config.seed} {self.step} {attempt}", slots)
        is_cut = config.top_k > 0 or config.top_p < 1
        return ask(self.model, self.tokenizer, questions, config.group_size, self.folder.path,
                   max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                   top_p=config.top_p, keep_routing=config.keep_routing,
                   keep_sampling_mask=config.keep_sampling_mask and is_cut)

    def measure(self, rollouts: list[Answers]) -> dict[str, float]:
        """Means over the first answers of all ranks, quartiles of their lengths, and dead groups of all rollouts."""
        answers, made = rollouts[0], rollouts[0].generation
        style = Counter(question.task.style_of(text) for question, text in zip(answers.questions, answers.texts))
        style["other"] = len(answers.texts) - sum(style[name] for name in self.styles)
        sums = {"reward": answers.rewards.sum(), "truncated": (~made.finished).sum(), "entropy": made.entropy.sum(),
                "length": made.mask.sum(), "answers": len(answers.texts),
                "dead": sum(is_dead(each.rewards).sum() for each in rollouts),
                "asked": sum(len(each.rewards) for each in rollouts)}
        sums |= {name: answers.part(name).sum() for name in ("accuracy", "format", "language")}
        sums |= {"style_" + name: style[name] for name in self.styles}
        histogram = torch.bincount(answers.lengths.cpu(), minlength=self.config.max_new_tokens + 1)
        flat = torch.cat([torch.tensor([float(value) for value in sums.values()]), histogram]).double()
        flat = self.world.all_reduce_sum(flat.to(self.world.device)).tolist()
        total = dict(zip(sums, flat))
        histogram = torch.tensor(flat[len(sums) :])
        quartile = [int((histogram.cumsum(0) < share * histogram.sum()).sum()) for share in (0.25, 0.75)]
        counted_in = {"entropy": "length", "dead": "asked"}  # tokens, groups; the others in answers
        means = {name: total[name] / total[counted_in.get(name, "answers")] for name in total}
        return means | {"length_q1": quartile[0], "length_q3": quartile[1]}

    def learn(self, batch: Batch) -> dict[str, float]:
        """Old and reference log-probs, then `updates` optimizer steps on all answers."""
        config, start = self.config, time.monotonic()
        micros = batch.micros(config.micro_batch)
        with torch.no_grad():
            for micro in micros:
                if config.updates > 1:
                    micro.old_logps = score(self.model, micro, config.temperature)
                if self.reference:
                    micro.ref_logps = score(self.reference, replace(micro, replay=None), config.temperature)
        scored = time.monotonic()
        values = self.update(micros, is_first=True)
        for _ in range(config.updates - 1):
            values = self.update(micros, is_first=False) | {"ratio_gap": values["ratio_gap"]}
        return values | {"score_s": scored - start, "update_s": time.monotonic() - scored}

    def update(self, micros: list[Batch], is_first: bool) -> dict[str, float]:
        """One optimizer step; before the first of a rollout, sampler and trainer must agree."""
        config, sums, gap = self.config, Counter(), 0.0
        for i, micro in enumerate(micros):
            is_last = i == len(micros) - 1
            with nullcontext() if is_last or self.wrapped is self.model else self.wrapped.no_sync():
                logps = score(self.wrapped, micro, config.temperature)  # (n, T)
                old, ref = (logps.detach() if x is None else x for x in (micro.old_logps, micro.ref_logps))
                losses = policy_loss(logps, old, ref, micro.advantages, micro.mask, micro.weights, config)
                losses["total"].backward()
            for name, value in losses.items():
                sums[name] += float(value.detach())
            gap = max(gap, float((logps.detach() - micro.sampler_logps)[micro.mask].abs().max()))
        if is_first:
            self.check_ratio(gap)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not math.isfinite(grad_norm):
            raise UserError("the gradient is not finite: lower --lr; --resume goes on from the last checkpoint")
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = self.world.all_reduce_mean(torch.tensor(list(sums.values()), device=self.world.device))
        load = update_routing(self.model, config.bias_update_speed, self.world)[: len(self.model.routing)]
        self.loads.append(load)
        return dict(zip(sums, means.tolist())) | {"ratio_gap": gap, "grad_norm": grad_norm,
                                                  "lr": self.optimizer.param_groups[0]["lr"],
                                                  "max_vio": max_violation(load)}

    def check_ratio(self, gap: float) -> None:
        """Before the first update pi / pi_old is 1: the sampler and the trainer are the same policy."""
        config = self.config
        is_cut = (config.top_k > 0 or config.top_p < 1) and not config.keep_sampling_mask
        if gap > RATIO_TOLERANCE and not is_cut:
            raise UserError(f"step {self.step + 1}: log-probs of sampler and trainer differ by {gap:.1e} nats, wanted "
                            f"at most {RATIO_TOLERANCE:.0e}: the update would not be on policy"
                            + ("" if config.keep_routing else "; --keep-routing removes what near ties of experts add"))

    def check_hope(self, values: dict[str, float]) -> None:
        """Raises UserError when no answer has been right, and no group alive, for PATIENCE steps."""
        is_hopeless = values["dead"] == 1 and values["accuracy"] == 0
        self.hopeless = self.hopeless + 1 if is_hopeless else 0
        if self.hopeless >= PATIENCE:
            raise UserError(f"no right answer and every group dead for {PATIENCE} steps: there is nothing to learn "
                            "from. Wanted: a base that is right now and then (more --temperature, an easier "
                            "--task, a longer python train.py, or a cold start: --recipe r1)")

    def evaluate(self, is_full: bool) -> dict:
        """Rank 0 examines the policy; the others wait."""
        found, config = {"accuracy": ("", "")}, self.config
        if self.world.is_main:
            samples = config.eval_samples if is_full else min(8, config.eval_samples)
            found = evaluate(self.model, self.tokenizer, self.tasks, config, self.folder.path, samples, is_full)
        self.world.barrier()
        return found

    def read(self, progress: Progress) -> None:
        """Five held-out questions answered once more: the strip, in the terminal and in answers.txt."""
        if not self.world.is_main:
            return
        questions = draw_questions(self.tasks, "test", "strip", range(5))
        answers = ask(self.model, self.tokenizer, questions, 1, self.folder.path,
                      max_new_tokens=self.config.max_new_tokens)
        self.strips.append([self.step, answers.texts, answers.part("accuracy").flatten().tolist()])
        strips = [strip(questions, self.strips[0], after) for after in self.strips[1:]]
        with written_aside(self.folder.path / "answers.txt") as aside:
            aside.write_text("\n\n".join(strips) + "\n")
        if strips:
            progress.note(strips[-1])

    def row(self, values: dict[str, float]) -> dict:
        """The values in the order of the log's columns; empty where there is none."""
        columns = ["step", "reward", "accuracy", "format", "language", "length", "length_q1", "length_q3", "truncated",
                   *("style_" + name for name in self.styles), "total", "pg", "kl", "entropy", "dead", "clipped",
                   "dropped", "ratio_gap", "grad_norm", "lr", "max_vio", "rollout_s", "score_s", "update_s",
                   "seconds", "eval_accuracy", "eval_error"]
        return {name: f"{values[name]:.6g}" if isinstance(values.get(name), float) else values.get(name, "")
                for name in columns}

    def save(self) -> None:
        """First the checkpoint directory for others, then the state for ourselves."""
        if self.world.is_main:
            save_pretrained(self.model, self.folder.path, self.tokenizer)
        tensors = self.models.state_dict() | optimizer_tensors(self.model, self.optimizer)
        if self.loads:
            tensors["loads"] = torch.stack(self.loads)  # (steps, MoE layers, E)
        self.folder.save(tensors, {name: getattr(self, name) for name in NOTES})
        self.world.barrier()

    def restore(self, tensors: dict[str, Tensor], notes: dict) -> None:
        """Take up where `save` left off; all chance comes from (seed, step), so there is no random state."""
        self.models.load_state_dict({name: tensors[name] for name in self.models.state_dict()})
        load_optimizer(self.model, self.optimizer, tensors)
        self.loads = list(tensors.get("loads", ()))
        for name in NOTES:
            setattr(self, name, notes[name])

    def draw(self) -> None:
        """Redraw rl.png and expert_load.png."""
        if self.world.is_main:
            plot.rl_figure(self.folder.path / "rl.png", self.folder.rows(), self.styles)
            names = layer_names(self.model)[: self.loads[0].shape[0]]
            plot.expert_load_figure(self.folder.path / "expert_load.png", torch.stack(self.loads),
                                    list(range(1, len(self.loads) + 1)), names, "update")


def swap(answers: Answers, fresh: Answers, groups: list[int]) -> Answers:
    """`answers` with the given groups replaced by those of `fresh`, in order."""
    (Q, G), N = answers.rewards.shape, len(answers.texts)
    rows = list(range(N))  # of both, one behind the other
    for i, group in enumerate(groups):
        rows[group * G : (group + 1) * G] = range(N + i * G, N + (i + 1) * G)

    def pick(one: list, two: list) -> list:
        both = one + two
        return [both[row] for row in rows]

    def merge(one, two):
        if one is None or isinstance(one, list):
            return one and [merge(x, y) for x, y in zip(one, two)]
        if one.ndim > 1:  # pad the columns; what stands there is never looked at
            T = max(one.shape[1], two.shape[1])
            one, two = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, T - x.shape[1])) for x in (one, two))
        return torch.cat([one, two])[rows]

    old, new = answers.generation, fresh.generation
    made = Generation(**{each.name: merge(getattr(old, each.name), getattr(new, each.name)) for each in fields(old)})
    rewards = merge(answers.rewards.flatten(), fresh.rewards.flatten()).view(Q, G)
    return Answers(pick(answers.questions, fresh.questions), made, pick(answers.texts, fresh.texts),
                   pick(answers.parts, fresh.parts), rewards)


# ------------------------------------------------------------------------------------------------- seeing


def summary(values: dict[str, float]) -> str:
    """One step for the progress bar."""
    return ("reward {reward:.2f}  accuracy {accuracy:.2f}  format {format:.2f}  length {length:.0f}  "
            "kl {kl:.4f}  entropy {entropy:.2f}  dead {dead:.2f}  rollout {rollout_s:.1f}s  "
            "update {work:.1f}s").format(**values, work=values["score_s"] + values["update_s"])


def strip(questions: list[Question], before: list, after: list, width: int = 44) -> str:
    """The same questions answered by the base and by the policy, side by side."""
    lines = [f"{'the base':{width}} │ after {after[0]} steps"]
    for i, question in enumerate(questions):
        lines.append(f"{'─' * width}─┼─{'─' * width}\n{question.problem.question}")
        sides = []
        for _, texts, right in (before, after):
            text = " ".join(texts[i].split()) + ("  ✓" if right[i] else "  ✗")
            sides.append(textwrap.wrap(text, width, break_on_hyphens=False))
        lines += [f"{one:{width}} │ {two}" for one, two in zip_longest(*sides, fillvalue="")]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- the whole recipe


class Stopped(Exception):
    """A signal ended a stage early; all is saved."""


class Examples:
    """Questions and answers for train.py's loop: the question carries no loss, the stop token does.

    texts: (question, answer) pairs. Every fourth sequence is plain text of another loader, whole.
    The order is a matter of seed and position alone.
    """

    def __init__(self, texts: list[tuple[str, str]], tokenizer, seq_len: int, world: Dist, seed: int, plain=None):
        self.rows = [(tokenizer.encode_trusted(prompt_text(question)), tokenizer.encode_trusted(answer + EOS))
                     for question, answer in texts]
        self.rows = [(prompt, answer) for prompt, answer in self.rows if len(prompt) + len(answer) <= seq_len + 1]
        if not self.rows:
            raise UserError(f"no example fits into {seq_len} tokens")
        self.seq_len, self.world, self.seed, self.plain, self.position = seq_len, world, seed, plain, 0

    def next_batch(self, sequences: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets, (n, T) each; targets are IGNORE on prompt and padding."""
        count = sequences // 4 if self.plain else 0
        mine = range(self.position + self.world.rank, self.position + sequences - count, self.world.world_size)
        self.position += sequences - count
        pairs = [self.row(*random.Random(f"{self.seed} {place}").choice(self.rows)) for place in mine]
        tokens, targets = (torch.stack(side) for side in zip(*pairs))
        if count:
            tokens, targets = (torch.cat(both) for both in zip((tokens, targets), self.plain.next_batch(count)))
        return tokens, targets

    def row(self, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        """One example as tokens and targets, (T,) each."""
        blank = [answer[-1]] * (self.seq_len + 1 - len(prompt) - len(answer))
        targets = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE] * len(blank)
        return torch.tensor((prompt + answer + blank)[:-1]), torch.tensor(targets)

    def state_dict(self) -> dict:
        return {"position": self.position, "plain": self.plain and self.plain.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]
        if self.plain:
            self.plain.load_state_dict(state["plain"])


class Recipe:
    """Stages in out/<name>-<label>/, each a checkpoint directory with its examination in exam.json.

    A finished stage is passed over when the recipe is resumed, one that was cut off continues.
    """

    def __init__(self, config: RLConfig, world: Dist):
        self.config, self.world, self.table = config, world, {}
        self.tasks = [load_task(name) for name in config.task.split(",")]
        self.groups = [tasks for tasks in (self.tasks[:1], self.tasks[1:]) if tasks]  # examined apart
        self.tokenizer = load_tokenizer(open_base(config.base))

    def rl(self, label: str, base: Path, task: str, **changes) -> Path:
        """A stage of reinforcement learning from the checkpoint `base`."""
        def run(path: Path, is_begun: bool) -> bool:
            config = replace(self.config, base=str(base), task=task, name=path.name, resume=is_begun, **changes)
            return build_trainer(config, self.world).run()

        return self.stage(label, run)

    def sft(self, label: str, base: Path, make_texts, plain=None) -> Path:
        """A stage of supervised fine-tuning: `make_texts()` gives (question, answer) pairs."""
        def run(path: Path, is_begun: bool) -> bool:
            texts = make_texts()
            config = TrainConfig(init_from=str(base), name=path.name, out=self.config.out, steps=self.config.sft_steps,
                                 tokens_per_step=SFT_BATCH * SFT_LENGTH, seq_len=SFT_LENGTH, lr=self.config.sft_lr,
                                 eval_every=self.config.sft_steps, seed=self.config.seed, device=self.config.device,
                                 bias_update_speed=0.0, mtp_loss_weight=0.1, ramp_from=1.0)
            folder = RunFolder(path, self.world)
            tensors, notes = folder.resume(asdict(config)) if is_begun else ({}, {})
            if not is_begun:
                folder.start(asdict(config), self.config.overwrite)
            if self.world.is_main:
                write_json(path / "texts.json", texts)
            model = load_pretrained(base, self.config.impl, self.world.device)
            loader = Examples(texts, self.tokenizer, SFT_LENGTH, self.world, self.config.seed, plain)
            trainer = Trainer(config, model, self.tokenizer, loader, folder, self.world)
            if notes:
                trainer.restore(tensors, notes)
            return trainer.run()

        return self.stage(label, run)

    def stage(self, label: str, run) -> Path:
        """Run a stage, unless it is finished, and examine what it made."""
        path = Path(self.config.out) / f"{self.config.name}-{label}"
        is_done = self.config.resume and (path / "exam.json").exists()
        if self.world.is_main and not is_done:
            print(f"\n=== {label}: {path}", flush=True)
        if not is_done and not run(path, self.config.resume and (path / "state.safetensors").exists()):
            raise Stopped
        self.exam(label, path)
        return path

    def exam(self, label: str, path: Path) -> None:
        """Held-out questions of the first task, and of the others: a row of the table."""
        file = Path(self.config.out) / f"{self.config.name}-{label}" / "exam.json"  # another recipe asks otherwise
        if not file.exists() and self.world.is_main:
            model = load_pretrained(path, self.config.impl, self.world.device)
            write_json(file, [evaluate(model, self.tokenizer, tasks, self.config, path, 8, is_full=False)
                              for tasks in self.groups])
        self.world.barrier()
        self.table[label] = json.loads(file.read_text())

    def report(self, title: str) -> None:
        """The table of all stages, printed and kept in out/<name>.txt."""
        groups = [f"pass@1 {', '.join(task.name for task in tasks)}" for tasks in self.groups]
        head = [*groups, "format", "readable", "length"]
        lines = [title, f"{'':20}" + "".join(f"{name:>{len(name) + 3}}" for name in head)]
        for label, found in self.table.items():
            shares = [each["accuracy"][0] for each in found] + [found[0]["format"], found[0]["readable"]]
            cells = [*(f"{100 * share:.1f} %" for share in shares), f"{found[0]['length']:.1f}"]
            lines.append(f"{label:20}" + "".join(f"{cell:>{len(name) + 3}}" for cell, name in zip(cells, head)))
        if self.world.is_main:
            print("\n" + "\n".join(lines))
            with written_aside(Path(self.config.out) / f"{self.config.name}.txt") as aside:
                aside.write_text("\n".join(lines) + "\n")

    def clean_traces(self, tasks: list[Task], count: int) -> list[tuple[str, str]]:
        """Long, clean answers in tags, written by the tasks themselves: each the longer of two."""
        rng, pairs = random.Random(f"traces {self.config.seed}"), []
        for task in islice(cycle(tasks), count):
            two = [(problem.question, task.trace(problem, rng, style=clean_style(task), tagged=True))
                   for problem in (task.problem(rng), task.problem(rng))]
            pairs.append(max(two, key=lambda pair: len(pair[1])))
        return pairs

    def good_samples(self, path: Path, tasks: list[Task], count: int) -> list[tuple[str, str]]:
        """Rejection sampling: what this checkpoint answers correctly and readably, at most one per question and
        `count` in all. Raises UserError when hardly anything is."""
        model, kept = load_pretrained(path, self.config.impl, self.world.device), {}
        clean = {task: clean_forms(task) for task in tasks}
        for start in range(0, 8 * count, 64):
            questions = draw_questions(tasks, "train", f"rejection {self.config.seed}", range(start, start + 64))
            answers = ask(model, self.tokenizer, questions, 4, path, max_new_tokens=self.config.max_new_tokens)
            for question, text, parts in zip(answers.questions, answers.texts, answers.parts):
                if parts["accuracy"] == 1 and is_readable(text, clean[question.task]):
                    kept.setdefault(question.seed, (question.problem.question, text))
            if len(kept) >= count:
                break
        if len(kept) < count // 8:
            raise UserError(f"{path}: {len(kept)} of {8 * count} questions had a correct and readable answer, wanted "
                            f"{count // 8} or more: a better base, or more --steps")
        return list(kept.values())[:count]

    def plain_text(self):
        """A loader of the pretraining corpus without its reasoning; None when the base does not name its corpus."""
        try:
            knobs = json.loads((Path(self.config.base) / "train.json").read_text())
            corpus = prepare(knobs["data"], self.tokenizer, Path(self.config.out) / "cache", seed=knobs["seed"])
        except (OSError, KeyError):
            return None
        files = {domain: file for domain, file in corpus.train.items() if domain != "reasoning"}
        return Loader(files, SFT_LENGTH, rank=self.world.rank, world_size=self.world.world_size) if files else None


def recipe_r1(recipe: Recipe) -> None:
    """DeepSeek-R1 in four stages (R1 sections 2.3.1 to 2.3.4), beside R1-Zero (2.2)."""
    base, tasks = Path(recipe.config.base), recipe.tasks
    reasoning, everything = recipe.config.task.split(",")[0], recipe.config.task
    recipe.exam("base", base)
    recipe.rl("0-zero", base, reasoning)  # R1-Zero: reinforcement learning on the base itself
    # 2.3.1 a thousand long, clean traces (R1: thousands), so that RL starts from readable thoughts
    started = recipe.sft("1-cold-start", base, lambda: recipe.clean_traces(tasks[:1], 1000))
    # 2.3.2 reinforcement learning on reasoning; a task with languages rewards their consistency
    reasoner = recipe.rl("2-reasoning", started, reasoning)
    # 2.3.3 its correct and readable answers, other tasks' data and plain text teach the base anew
    taught = recipe.sft("3-rejection", base, lambda: recipe.good_samples(reasoner, tasks[:1], 600)
                        + recipe.clean_traces(tasks[1:] or tasks, 200), recipe.plain_text())
    # 2.3.4 reinforcement learning over all tasks
    recipe.rl("4-all", taught, everything)
    recipe.report("R1, stage by stage (0-zero is R1-Zero: no cold start)")


def recipe_distill(recipe: Recipe) -> None:
    """A smaller model taught by R1's correct samples, beside RL on the small one itself (R1 section 4.1)."""
    out, reasoning = recipe.config.out, recipe.config.task.split(",")[0]
    teachers = [Path(out) / name for name in ("r1-4-all", "rl")]
    teacher = next((path for path in teachers if (path / "config.json").exists()), None)
    if teacher is None:
        raise UserError(f"distill: no teacher in {out}: python rl.py --recipe r1, or python rl.py, makes one")
    small = recipe.stage("0-small", lambda path, is_begun: pretrain_small(recipe, path, is_begun))
    recipe.exam("teacher", teacher)
    taught = recipe.sft("1-taught", small, lambda: recipe.good_samples(teacher, recipe.tasks[:1], 1500))
    recipe.rl("2-small-rl", small, reasoning)
    recipe.rl("3-taught-rl", taught, reasoning)
    recipe.report(f"distillation: the small model is taught by {teacher}")


def pretrain_small(recipe: Recipe, path: Path, is_begun: bool) -> bool:
    """A model of less than half of the base's active parameters, pretrained for as many tokens on the same corpus."""
    try:
        knobs = json.loads((Path(recipe.config.base) / "train.json").read_text())
    except OSError as error:
        raise UserError(f"distill: {error}: a small model needs to know the corpus of the base") from None
    changes = {"set": ["hidden_size=64", "num_hidden_layers=3", "intermediate_size=160", "moe_intermediate_size=32"],
               "name": path.name, "out": recipe.config.out, "device": recipe.config.device, "keep": [],
               "resume": is_begun, "overwrite": recipe.config.overwrite}
    return train.build_trainer(TrainConfig(**knobs | changes), recipe.world).run()


def recipe_quality(recipe: Recipe) -> None:
    """The same RL from several checkpoints of one pretraining run: where thinking is found, where it collapses."""
    base, rows = Path(recipe.config.base), []
    stages = [*sorted(base.glob("at-*")), base]
    if len(stages) == 1:
        raise UserError(f"quality: no at-* in {base}: python train.py --keep 0.1 0.2 0.4 0.7 leaves them there")
    for path in stages:
        share = int(path.name[3:]) if path is not base else 100
        recipe.exam(f"base-{share:03}", path)
        for seed in range(3):
            label = f"{share:03}-{seed}"
            recipe.rl(label, path, recipe.config.task, seed=seed)
            rows.append((share, recipe.table[f"base-{share:03}"][0], recipe.table[label][0]))
    recipe.report("RL from checkpoints of one pretraining run, three seeds each")
    if recipe.world.is_main:
        plot.quality_figure(Path(recipe.config.out) / f"{recipe.config.name}.png", rows)


# -------------------------------------------------------------------------------------------- the program


def open_base(base: str) -> Path:
    """The directory of the base. Raises UserError when there is none."""
    if not (Path(base) / "config.json").exists():
        raise UserError(f"base: no checkpoint in {base}; python train.py makes out/base, --base names another")
    return Path(base)


def build_trainer(config: RLConfig, world: Dist) -> RLTrainer:
    """Everything of a run, new or resumed; says what it is going to do."""
    say = print if world.is_main else lambda *words: None
    base, folder = open_base(config.base), RunFolder(Path(config.out) / config.name, world, "rl.json")
    if config.questions % world.world_size:
        raise UserError(f"questions: got {config.questions}, wanted a multiple of the {world.world_size} ranks")
    tokenizer, tasks = load_tokenizer(base), [load_task(name) for name in config.task.split(",")]
    model = load_pretrained(base, config.impl, world.device)
    check_room(config, model, tokenizer, tasks)
    tensors, notes = folder.resume(asdict(config), FREE_ON_RESUME) if config.resume else ({}, {})
    if not notes:
        folder.start(asdict(config), config.overwrite)
    world.barrier()
    trainer = RLTrainer(config, model, tokenizer, tasks, folder, world)
    if notes:
        trainer.restore(tensors, notes)
        say(f"resumed at step {trainer.step} of {config.steps}")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, moving = sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves)
    say(f"policy      {base}: {moving:,} of {total:,} parameters are trained\n"
        f"task        {config.task}, such as {draw_questions(tasks, 'train', 'example', [0])[0].problem.question}\n"
        f"objective   {config.variant}: {config.questions} questions x {config.group_size} answers a step, "
        f"{config.updates} update{'s' * (config.updates > 1)}\nrun         {config.steps} steps into {folder.path}")
    return trainer


def check_room(config: RLConfig, model: Transformer, tokenizer, tasks: list[Task]) -> None:
    """Raises UserError when a split has no question, or an answer of `max_new_tokens` does not fit behind one."""
    questions = [q for split in ("train", "test") for q in draw_questions(tasks, split, "room", range(16))]
    longest = max(len(tokenizer.encode_trusted(prompt_text(q.problem.question))) for q in questions)
    context = model.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise UserError(f"max_new_tokens: got {config.max_new_tokens}; questions have up to {longest} tokens and the "
                        f"context {context}, wanted at most {context - longest}")


def report(before: dict, after: dict) -> list[str]:
    """Two full evaluations side by side, as the lines of a table."""
    def column(found: dict) -> dict[str, str]:
        shares = {"pass@1, sampled": found["accuracy"], "pass@1, greedy": found["greedy"]}
        shares |= {f"{kind}@{k}": found[kind][k] for kind in ("pass", "majority") for k in list(found[kind])[1:]}
        shares |= found["harder"]
        cells = {name: f"{100 * mean:.1f} ± {100 * error:.1f} %" for name, (mean, error) in shares.items()}
        for name, key, unit in (("format in %", "format", 100), ("readable in %", "readable", 100),
                                ("length in tokens", "length", 1), ("tries (?)", "tries", 1)):
            if before[key] or after[key]:
                cells[name] = f"{unit * found[key]:.1f}  "
        for style in sorted(before["styles"] | after["styles"]):
            share, right = found["styles"].get(style, (0, 0))
            cells[f"{style}: share, right"] = f"{100 * share:.0f} %{100 * right:4.0f} %"
        return cells

    left, right = column(before), column(after)
    rows = [("", "the base", "after RL"), *zip(left, left.values(), right.values())]
    return [f"{name:26}{one:>16}{two:>16}" for name, one, two in rows]


def main(argv: list[str]) -> None:
    """One run of RL, or a recipe."""
    first = parse_flags(RLConfig, argv, __doc__)
    flags = shlex.split(f"{VARIANTS[first.variant]} {RECIPES[first.recipe]}")
    config = parse_flags(RLConfig, flags + argv, __doc__)
    recipes = {"r1": recipe_r1, "distill": recipe_distill, "quality": recipe_quality}
    world = setup_distributed(config.device)
    try:
        if config.recipe:
            recipes[config.recipe](Recipe(config, world))
        elif not build_trainer(config, world).run():
            raise Stopped
    except Stopped:
        if world.is_main:
            flags = [flag for flag in argv if flag not in ("--resume", "--overwrite")]
            print(f"stopped and saved; to go on:\n  python rl.py {shlex.join([*flags, '--resume'])}")
    finally:
        world.close()


if __name__ == "__main__":
    run_main(main)
