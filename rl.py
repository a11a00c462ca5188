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

Papers: Math = DeepSeekMath, arXiv 2402.03300; R1 = 2501.12948; Dr.GRPO = 2503.20783;
DAPO = 2503.14476; GSPO = 2507.18071; V3.2 = 2512.02556.
"""

import copy
import math
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import data.tasks.__main__ as traces
import train
from data.io import plot
from data.io.checkpoint import identity
from data.io.cli import UserError, knob, parse_flags, run_main, to_flags, widest_float
from data.io.cores import together
from data.io.ranks import is_restarted
from data.io.run import Commands, Loop, RunConfig, RunFolder, SavedRun, to_go_on
from data.tasks import exam, load_task
from data.tasks.task import prompt_text
from data.text.origin import task_digest
from data.text.tokenizer import check_belongs, load_tokenizer
from kernels import IGNORE
from model import Transformer, expert_load
from sample import Generation, generate

# ---------------------------------------------------------------------------------- the objective


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """`A_i = (R_i - mean(R)) / std(R)` within each group (Math section 4.1.2): (Q, G) -> (Q, G).

    Without `divide_by_std` only the mean goes (Dr.GRPO, V3.2). The deviation has Bessel's
    correction. A dead group, all rewards equal, teaches nothing: exactly 0.

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    >>> group_advantages(rewards, divide_by_std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    if divide_by_std:
        centred = centred / rewards.std(1, keepdim=True)
    return centred.masked_fill(is_dead(rewards).unsqueeze(1), 0)


def policy_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor,
                mask: Tensor, weights: Tensor, knobs) -> dict[str, Tensor]:
    """`total = pg + kl_beta * kl`, a number to minimise; the default is GRPO's (Math eq 3).

        ratio     = pi / pi_old                          exactly 1 on the first update of a rollout
        surrogate = min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) A)
        pg        = -sum weight * surrogate
        kl        = sum weight * (rho - ln rho - 1),  rho = pi_ref / pi       "k3" (Math eq 4), >= 0

    sequence_ratio (GSPO eq 7): `ratio = exp(mean_t ln(pi / pi_old))`, one for the whole answer.
    unbiased_kl (V3.2 eq 7): each term of kl times pi / pi_old, which mends its gradient off policy.
    off_policy_delta (V3.2 eqs 8-9): no pg where `A < 0` and `mean_t ln(pi_old / pi) > delta`.

    logps, old_logps, ref_logps (N, T) in nats, of the sampled tokens; advantages (N,); mask (N, T)
    bool, where the policy chose; weights (N, T) of `token_weights`; knobs: a RLConfig. Besides the
    three terms there are `clipped` and `dropped`, the weight of the tokens that the clip and the
    drift mask silenced.
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

    mask (N, T) bool, a group in consecutive rows. Raises ValueError when an answer has no token.
    """
    lengths = mask.sum(1).to(widest_float(mask.device))  # (N,)
    if (lengths == 0).any():
        raise ValueError("token_weights: an answer has no sampled token, wanted one or more")
    N, Q = len(mask), len(mask) // group_size
    of_group = lengths.view(Q, group_size).sum(1).repeat_interleave(group_size)  # (N,)
    share = {"answer": N * lengths, "token": Q * of_group,
             "constant": torch.full_like(lengths, N * longest)}[aggregate]
    return mask * (1 / share).unsqueeze(1)  # (N, T) float64


def is_dead(rewards: Tensor) -> Tensor:
    """Groups without a difference in reward: (Q, G) -> (Q,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """Soft punishment of length (DAPO eq 13): 0 up to `longest - margin`, then linearly to -1.

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
RECIPES = {"r1": dict(name="r1", task="chain,countdown,compare", steps=60, lr=1e-4, constant_until=1.0,
                      max_new_tokens=128, eval_samples=8)}
SUMMARY = ("reward {reward:.2f}  accuracy {accuracy:.2f}  format {format:.2f}  length {length:.0f}  "
           "kl {kl:.4f}  entropy {entropy:.2f}  dead {dead:.2f}  rollout {rollout_s:.1f}s  update {update:.1f}s")
RATIO_TOLERANCE = 1e-4  # sampler and trainer must agree on log-probs to this, in nats (float32)
MOST_STEPS_IN_VAIN = 20  # without a right answer or a difference in reward before the run gives up


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

    steps: int = knob(60, "rollouts, each followed by its updates", least=1)
    questions: int = knob(16, "questions of one step, over all ranks (R1: 32)", least=1)
    group_size: int = knob(16, "answers sampled per question (R1: 16)")
    max_new_tokens: int = knob(96, "longest answer", least=1)
    temperature: float = knob(1.0, "of the rollout (R1: 1)", above=0)
    top_k: int = knob(0, "rollout: only the k likeliest tokens; 0 is all", least=0)
    top_p: float = knob(1.0, "rollout: only the nucleus of this mass; 1 is all", above=0, most=1)
    updates: int = knob(1, "optimizer steps per rollout; each sees all answers", least=1)

    clip_eps: float = knob(0.2, "clip range of the ratio (felt from the second update on)")
    clip_eps_high: float | None = knob(None, "clip range above 1 when it differs (DAPO: 0.28)")
    kl_beta: float = knob(0.001, "weight of the KL (Math: 0.04, R1: 0.001)", least=0)
    reference_every: int = knob(50, "steps until the reference is renewed (R1: 400)", least=1)
    divide_by_std: bool = knob(True, "advantage in standard deviations of its group (Math, R1)")
    aggregate: str = knob("answer", "averaged first", choices=("answer", "token", "constant"))
    sequence_ratio: bool = knob(False, "one ratio per answer (GSPO)")
    unbiased_kl: bool = knob(False, "weight the KL estimate by the ratio (V3.2 eq 7)")
    off_policy_delta: float | None = knob(None, "nats of drift that drop a bad answer (V3.2)")
    keep_routing: bool = knob(True, "update with the experts that the rollout chose (V3.2)")
    keep_sampling_mask: bool = knob(False, "update within the tokens of top-k and top-p (V3.2)")
    resample: int = knob(0, "replace a dead group up to so often (DAPO)", least=0)
    overlong_tokens: int = knob(0, "punish answers over the last so many tokens (DAPO)")

    lr: float = knob(3e-4, "peak learning rate of AdamW", above=0)
    warmup_steps: int = knob(10, "steps over which the learning rate rises")
    constant_until: float = knob(0.4, "fraction of the steps behind which it falls, linearly to 0", least=0, most=1)
    weight_decay: float = knob(0.0, "AdamW: decay of matrices", least=0)
    train_router: bool = knob(False, "let the gradient move the routers' weights")
    bias_update_speed: float = knob(0.0, "step of the routing bias after every update")
    sft_steps: int = knob(120, "recipe: steps of supervised fine-tuning", least=1)
    sft_lr: float = knob(1.5e-3, "recipe: its learning rate", above=0)
    mix: str = knob("local", "recipe: corpus of plain text in the third stage; '' is none")
    micro_batch: int = knob(64, "answers of one forward pass on one rank", least=1)
    eval_every: int = knob(25, "steps between evaluations; each one saves and draws", least=1)
    eval_questions: int = knob(64, "held-out questions of an evaluation", least=1)
    eval_samples: int = knob(64, "answers to each, before and after (8 in between)", least=1)

    def shares(self) -> tuple[int, int]:
        return math.gcd(self.questions, 64) if self.recipe else self.questions, 1  # SFT: of 64 sequences

    def rules(self):
        yield "group_size", "at least 2: an advantage compares answers", self.group_size >= 2
        longest, names = self.max_new_tokens, ("", *RECIPES)
        yield "overlong_tokens", f"0 to max_new_tokens = {longest}", 0 <= self.overlong_tokens <= longest
        yield "recipe", "r1 (distill, base_quality: python -m tests.claims.NAME)", self.recipe in names
        yield from super().rules()


# ------------------------------------------------------------------- asking, judging and scoring


@dataclass
class Rollout:
    """G answers to each of Q questions, N = Q*G rows group by group, and what the rules say."""

    questions: list[exam.Question]  # (Q,)
    made: Generation  # N rows
    texts: list[str]  # (N,) whole completions
    rewards: dict[str, Tensor]  # accuracy, format, language and their "total", (Q, G) float64 each

    @property
    def asked(self) -> list[exam.Question]:
        """The question of each row, (N,)."""
        G = len(self.texts) // len(self.questions)
        return [question for question in self.questions for _ in range(G)]

    @property
    def right(self) -> Tensor:
        """Which answers are right, (Q, G) bool: all that the verifier asks, not a share of it."""
        return self.rewards["accuracy"] == 1

    def replaced(self, other: "Rollout", groups: list[int]) -> "Rollout":
        """This rollout with the groups of those numbers replaced by those of `other`, in order."""
        Q, G = self.rewards["total"].shape
        order = torch.arange(Q)  # of the groups of both, one behind the other
        order[groups] = torch.arange(Q, Q + len(groups))
        rows = (order.unsqueeze(1) * G + torch.arange(G)).flatten()  # (N,)
        questions = self.questions + other.questions
        texts = self.texts + other.texts
        made = self.made.cat(other.made).rows(rows.to(self.made.tokens.device))
        rewards = {name: torch.cat((mine, other.rewards[name]))[order] for name, mine in self.rewards.items()}
        return Rollout([questions[i] for i in order], made, [texts[row] for row in rows], rewards)


class Policy:
    """The checkpoint `base`, and all that it takes to ask it what the tasks ask.

    A text that breaks a verifier is kept in `folder`. Raises UserError without a checkpoint.
    """

    def __init__(self, config: RLConfig, world: train.Dist, folder: Path | None = None):
        self.config, self.world, self.folder = config, world, folder or Path(config.base)
        if not Path(config.base, "config.json").exists():
            raise UserError(f"base: no checkpoint in {config.base}; python train.py makes out/base, --base names one")
        self.tokenizer = load_tokenizer(config.base)
        self.tasks = [load_task(name) for name in config.task.split(",")]
        self.model = Transformer.from_pretrained(config.base, config.impl, world.device)
        check_belongs(self.tokenizer, self.model.config)
        context = self.model.config.max_position_embeddings
        self.room = exam.Room(self.tokenizer.encode_trusted, context, config.max_new_tokens)

    def questions(self, split: str, where: str, slots) -> list[exam.Question]:
        """See exam.draw_questions: each leaves room for an answer of `max_new_tokens`."""
        return exam.draw_questions(self.tasks, split, where, slots, self.room)

    def ask(self, questions: list[exam.Question], num_samples: int, **sampling) -> Rollout:
        """`num_samples` answers to every question from sample.py's engine, judged."""
        tokenizer, knobs = self.tokenizer, {"max_new_tokens": self.config.max_new_tokens} | sampling
        prompts = [tokenizer.encode_trusted(prompt_text(one.problem.question)) for one in questions]
        made = generate(self.model, prompts, num_samples=num_samples, stop_ids=tokenizer.stop_ids,
                        seed=[question.seed for question in questions], **knobs)
        texts = [tokenizer.decode(made.completion(row)) for row in range(len(made.tokens))]
        judged = [exam.judge(questions[row // num_samples], text, self.folder) for row, text in enumerate(texts)]
        rewards = {name: torch.tensor([each[name] for each in judged], dtype=torch.float64)
                   .view(-1, num_samples) for name in judged[0]}  # (Q, G) each
        return Rollout(questions, made, texts, rewards)

    def evaluate(self, samples: int) -> dict:
        """What data/tasks/exam.py finds in answers to the held-out questions of every run, shared by the ranks."""
        questions = self.questions("test", "held out", range(self.config.eval_questions))

        def answers(part) -> list[tuple]:  # of each question n texts, lengths, whether right, form
            rollout = self.ask(part, samples)
            texts = [rollout.texts[row : row + samples] for row in range(0, len(rollout.texts), samples)]
            numbers = rollout.made.mask.sum(1).view(-1, samples), rollout.right, rollout.rewards["format"]
            return list(zip(texts, *(each.tolist() for each in numbers)))

        texts, *numbers = zip(*self.world.shared(answers, questions, 16))
        tasks = [question.task for question in questions for _ in range(samples)]
        return exam.examine(tasks, sum(texts, []), *map(torch.tensor, numbers))


def score(model, made: Generation, temperature: float, keep_routing: bool = False) -> Tensor:
    """Log-probs of the sampled tokens under `model`, in nats, 0 where the policy did not choose.

    Column t is about token t + 1, which the tokens up to t predict: (n, T-1). One function for old,
    new and reference policy; `keep_routing` replays the experts that the rollout chose.
    """
    tokens, mask = made.tokens[:, :-1], made.mask[:, 1:]  # (n, T-1)
    targets = made.tokens[:, 1:].masked_fill(~mask, IGNORE)  # the stop token keeps its place
    replay = made.routing[:, :-1].unbind(2) if keep_routing else None  # per MoE layer (n, T-1, K)
    if temperature == 1 and made.support is None:  # never holds all logits
        return -model(tokens, targets, reduction="none", mtp=False, replay=replay)["ce"]
    logits = model(tokens, replay=replay) / temperature  # (n, T-1, V)
    if made.support is not None:
        is_possible = made.support[:, 1:] | ~mask.unsqueeze(-1)
        logits = logits.masked_fill(~is_possible, -math.inf)
    chosen = targets.clamp(min=0).unsqueeze(-1)  # (n, T-1, 1)
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).masked_fill(~mask, 0)


def micro_batches(made: Generation, size: int) -> list[tuple[Tensor, Generation]]:
    """All rows in batches of `size`, by length, each cut to its longest: (numbers, rows)."""
    return [(rows, made.rows(rows, int(made.lengths[rows].max()))) for rows in made.lengths.argsort().split(size)]


def advantages_and_weights(rollout: Rollout, config: RLConfig) -> tuple[Tensor, Tensor]:
    """What becomes of the rewards: advantages (N,), and the weight of each token (N, T-1)."""
    made, rewards = rollout.made, rollout.rewards["total"]
    mask = made.mask[:, 1:]  # (N, T-1)
    if config.overlong_tokens:
        lengths = mask.sum(1).view(rewards.shape).cpu()
        rewards = rewards + overlong_penalty(lengths, config.max_new_tokens, config.overlong_tokens)
    advantages = group_advantages(rewards, config.divide_by_std).flatten().to(made.logps)
    return advantages, token_weights(mask, config.group_size, config.aggregate, config.max_new_tokens)


def routed_load(made: Generation, experts: int) -> Tensor:
    """Tokens that each expert got where the policy chose the next one: (MoE layers, E)."""
    loads = [expert_load(chosen, made.mask[:, 1:], experts) for chosen in made.routing[:, :-1].unbind(2)]
    return torch.stack(loads) if loads else made.logps.new_zeros(0, experts)


# --------------------------------------------------------------------------------------- the loop


class RLTrainer(SavedRun):
    """A run: questions -> answers -> rewards -> advantages -> updates, and what is seen of them.

    The MTP modules and, by default, the routers stay; the balance loss is a matter of pretraining.
    """

    NOTES = ("step", "seconds", "before", "answers", "steps_in_vain", "bad_steps")  # saved besides tensors

    def __init__(self, config: RLConfig, policy: Policy, folder: RunFolder, world: train.Dist):
        self.config, self.policy, self.folder, self.world = config, policy, folder, world
        model = self.model = policy.model
        self.tokenizer = policy.tokenizer
        for _, moe in model.moe_layers():
            moe.gate.weight.requires_grad_(config.train_router)
        for module in model.model.layers[model.config.num_hidden_layers :]:  # MTP
            module.requires_grad_(False)
        self.modules = nn.ModuleDict({"model": model})
        if config.kl_beta:
            self.modules["reference"] = copy.deepcopy(model).requires_grad_(False)
        for module in self.modules.values():
            train.shard(module, config, world)
        self.optimizer = train.make_optimizer(model, config.lr, config.weight_decay)
        self.styles = exam.known_styles(policy.tasks)
        self.step, self.seconds, self.steps_in_vain = 0, 0.0, 0  # done so far
        self.is_cut = config.top_k > 0 or config.top_p < 1  # answers are of a part of it all
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
        config, on_main = self.config, self.world.on_main
        self.policy.model = self.whole()  # on every rank: gathered once a step, not once a token
        if self.step == 0:
            self.before = self.policy.evaluate(config.eval_samples)
            on_main(self.answer_samples)
        loop = Loop(self.folder, done=self.step, total=config.steps, every=config.eval_every,
                    label="rl", agree=self.world.any)
        for _ in loop:
            with self.saved_if_refused():
                values = self.advance()
            if loop.is_due:
                found = self.policy.evaluate(min(8, config.eval_samples))
                values |= zip(("eval_accuracy", "eval_error"), found["accuracy"])
            self.folder.log(values, self.columns)
            loop.show(SUMMARY.format(**values, update=values["score_s"] + values["update_s"]))
            self.check_signal(values)
            if loop.is_due:
                loop.note(on_main(self.answer_samples))
                self.save()
                on_main(plot.draw_rl, self.folder.path, self.folder.rows(), self.styles, self.loads,
                        [path for path, _ in self.model.moe_layers()])
        if loop.is_complete:
            after = self.policy.evaluate(config.eval_samples)
            on_main(exam.write_report, self.folder.path, self.folder.rows(), self.before, after)
        else:
            self.save()
        return loop.is_complete

    def advance(self) -> dict[str, float]:
        """One rollout and its updates; returns the columns of the log."""
        start = time.monotonic()
        rollout, values = self.rollout()
        values |= self.learn(rollout)
        self.policy.model = self.whole()
        if "reference" in self.modules and (self.step + 1) % self.config.reference_every == 0:
            self.modules["reference"].load_state_dict(self.model.state_dict())
        self.step += 1
        self.seconds += time.monotonic() - start
        return values | {"step": self.step, "seconds": self.seconds}

    def whole(self, main_only: bool = False) -> Transformer | None:
        return train.whole(self.model, self.world, main_only)

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """Answers to this rank's questions; dead groups are replaced, `resample` times (DAPO)."""
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
        questions = self.policy.questions("train", f"{config.seed} {self.step} {attempt}", slots)
        return self.policy.ask(questions, config.group_size, temperature=config.temperature,
                               top_k=config.top_k, top_p=config.top_p, keep_routing=True,
                               keep_sampling_mask=config.keep_sampling_mask and self.is_cut)

    def measure(self, rollout: Rollout) -> dict[str, float]:
        """Means over the answers of all ranks, and quartiles of their lengths.

        "accuracy" is the mean of what the verifier gives; "right", the share of those with 1.
        """
        made, total = rollout.made, rollout.rewards["total"]  # (Q, G)
        columns = rollout.rewards | exam.style_columns(rollout.asked, rollout.texts, self.styles) | {
            "reward": total, "right": rollout.right, "length": made.mask.sum(1),
            "dead": is_dead(total).unsqueeze(1).expand_as(total), "truncated": ~made.finished,
            "entropy": made.entropy.sum(1)}  # N values each
        values = exam.means(columns, self.world.all_gather)
        return values | {"entropy": values["entropy"] / values["length"]}  # per token

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Old and reference log-probs, then `updates` optimizer steps on all answers."""
        config, start, made = self.config, time.monotonic(), rollout.made
        load = self.world.all_reduce_sum(routed_load(made, self.model.config.n_routed_experts))
        advantages, weights = advantages_and_weights(rollout, config)
        micros = micro_batches(made, config.micro_batch)
        old = ref = [None] * len(micros)
        with torch.no_grad():
            if config.updates > 1:
                old = [score(self.model, micro, config.temperature, config.keep_routing) for _, micro in micros]
            if "reference" in self.modules:  # which chooses its own experts
                ref = [score(self.modules["reference"], micro, config.temperature) for _, micro in micros]
        scored = time.monotonic()
        for number in range(config.updates):
            values, gap = self.backward(micros, old, ref, advantages, weights)
            if number == 0:
                first_gap = gap
                self.check_ratio(gap)
            left = (config.steps - self.step) / max(1.0, config.steps * (1 - config.constant_until))
            lr = config.lr * min(1.0, left, (self.step + 1) / max(1, config.warmup_steps))
            grad_norm = float(train.optimizer_step(self.model, self.optimizer, lr, config.clip, self.world))
            is_good = math.isfinite(grad_norm)
            self.check_bad_steps(not is_good)
            train.update_biases(self.model, load, config.bias_update_speed * is_good)
            self.loads.append(load.cpu())
        return values | {"ratio_gap": first_gap, "lr": lr, "grad_norm": grad_norm,
                         "max_vio": train.max_violation(load), "score_s": scored - start,
                         "update_s": time.monotonic() - scored}

    def backward(self, micros, old: list, ref: list, advantages: Tensor,
                 weights: Tensor) -> tuple[dict, float]:
        """The gradient of the objective over all answers: its terms, and the gap to the sampler.

        old, ref: log-probs (n, T-1) of each of the `micro_batches`, None: the policy's own.
        """
        config, sums, gap = self.config, Counter(), 0.0
        for i, (rows, micro) in enumerate(micros):
            mask = micro.mask[:, 1:]  # (n, T-1)
            self.world.accumulate(self.model, is_last=i == len(micros) - 1)
            logps = score(self.model, micro, config.temperature, config.keep_routing)  # (n, T-1)
            here = logps.detach()
            before, anchor = (here if each is None else each for each in (old[i], ref[i]))
            losses = policy_loss(logps, before, anchor, advantages[rows], mask,
                                 weights[rows, : mask.shape[1]], config)
            (losses["total"] / self.world.world_size).backward()  # ranks add up
            for name, value in losses.items():
                sums[name] += float(value.detach())
            gap = max(gap, float((here - micro.logps[:, 1:])[mask].abs().max()))
        terms = torch.tensor(list(sums.values()), device=self.world.device)  # (5,)
        terms = self.world.all_reduce_sum(terms) / self.world.world_size
        return dict(zip(sums, terms.tolist())), gap

    def check_ratio(self, gap: float) -> None:
        """Before the first update the sampler is the policy. Raises UserError when it is not."""
        if gap > RATIO_TOLERANCE and (self.config.keep_sampling_mask or not self.is_cut):
            hint = "" if self.config.keep_routing else "; --keep-routing removes what near ties add"
            raise UserError(f"step {self.step + 1}: log-probs of sampler and trainer differ by {gap:.1e} nats, "
                            f"wanted at most {RATIO_TOLERANCE:.0e}: the update would not be on policy{hint}")

    def check_signal(self, values: dict[str, float]) -> None:
        """Raises UserError after too many steps without a right answer or a living group."""
        is_in_vain = values["dead"] == 1 and values["right"] == 0
        self.steps_in_vain = self.steps_in_vain + 1 if is_in_vain else 0
        if self.steps_in_vain >= MOST_STEPS_IN_VAIN:
            raise UserError(f"no right answer and every group dead for {MOST_STEPS_IN_VAIN} steps. "
                            "Wanted: a base that is right now and then (more --temperature, an "
                            "easier --task, a longer train.py, or a cold start: --recipe r1)")

    def answer_samples(self) -> str:
        """Five held-out questions once more: answers beside the base's, in answers.txt too."""
        made = self.policy.ask(self.policy.questions("test", "strip", range(5)), 1)
        self.answers.append([self.step, made.texts, made.right.flatten().tolist()])
        return exam.write_answers(self.folder.path / "answers.txt", made.questions, self.answers)


def origin_of(config: RLConfig) -> str:
    """What changes with the checkpoint that a run starts from and with the files of its tasks."""
    return " ".join([identity(config.base), *(task_digest(name) for name in config.task.split(","))])


def build_trainer(config: RLConfig, world: train.Dist) -> RLTrainer:
    """Everything of a run, new or resumed; says what it is going to do."""
    if config.questions % world.world_size:
        raise UserError(f"questions: got {config.questions}, wanted a multiple of the {world.world_size} ranks")
    if Path(config.base).resolve() == config.folder.resolve():
        raise UserError(f"name: got {config.name!r}, wanted another one than that of --base")
    folder = RunFolder(config.folder, world, "rl.json")
    policy = Policy(config, world, folder.path)
    examples = [policy.questions(split, "example", [0]) for split in ("train", "test")]
    knobs = asdict(config) | {"base_and_tasks": origin_of(config)}
    tensors, notes = folder.begin(knobs, config)
    trainer = RLTrainer(config, policy, folder, world)
    if notes:
        trainer.restore(tensors, notes)
        world.say(f"resumed at step {trainer.step} of {config.steps}")
    else:
        folder.start(knobs, config.overwrite or config.resume or is_restarted())
    world.barrier()
    moving = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    changed = to_flags(config, {name for knobs in VARIANTS.values() for name in knobs})
    world.say(f"policy      {config.base}: {moving:,} parameters are trained\n"
              f"task        {config.task}, such as {examples[0][0].problem.question}\n"
              f"objective   {' '.join(['GRPO', *changed])}\n"
              f"run         {config.steps} steps of {config.questions} x {config.group_size} "
              f"answers and {config.updates} updates, into {folder.path}")
    return trainer


# -------------------------------------------------------------------- R1's recipe, and the program

SFT = "--seq_len 144 --tokens_per_step 9216 --bias_update_speed 0 --mtp_loss_weight 0.1 --eval_every 1000"


def r1_commands(config: RLConfig) -> list[str]:
    """DeepSeek-R1 as commands to type: R1-Zero (R1 section 2.2), then the four stages of 2.3."""
    base, out, path = map(shlex.quote, (config.base, config.out, config.folder.as_posix()))
    name, seed, (first, _, others) = config.name, config.seed, config.task.partition(",")
    left_out = {"name", "task", "base", "recipe", "resume", "overwrite", "sft_steps", "sft_lr", "mix",
                "variant"}  # whose knobs are spelled out
    rl = shlex.join(["python", "rl.py", *to_flags(config, asdict(config).keys() - left_out)])
    sft = (f"python train.py --out {out} --init_from {base} {SFT} --steps {config.sft_steps} "
           f"--lr {config.sft_lr} --seed {seed} --device {config.device}")
    return [
        f"{rl} --base {base} --task {first} --name {name}-0-zero",
        # 2.3.1 a thousand long, clean traces (R1: thousands): RL starts from readable thoughts
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
    """Rejection sampling (R1 2.3.3): right and readable answers of the base, one a question.

    `count` of them go into the file `write`. Raises UserError when hardly any answer is good.
    """
    policy, count, kept = Policy(config, world), config.count, {}
    clean = {task: exam.clean_forms(task) for task in policy.tasks}
    for start in range(0, 8 * count, 64):
        slots = range(start, start + 64)
        made = policy.ask(policy.questions("train", f"rejection {config.seed}", slots), 4)
        kept |= exam.good_answers(made.asked, made.texts, made.right, clean)
        if len(kept) >= count:
            break
    if len(kept) < count // 8:
        raise UserError(f"{config.base}: {len(kept)} of {8 * count} questions had a correct and readable "
                        f"answer, wanted {count // 8} or more: a better base, or more --steps")
    traces.write_examples(config.write, list(kept.values())[:count])
    print(f"{min(len(kept), count)} answers of {config.base} in {config.write}")


def examine(config: RLConfig, world: train.Dist) -> None:
    """Checkpoints side by side, on the first task and on the others; in out/<name>.txt."""
    groups, found = config.task.split(",", 1), {}
    for base in config.exam:
        policies = [Policy(replace(config, base=base, task=group), world) for group in groups]
        found[base] = [policy.evaluate(min(8, config.eval_samples)) for policy in policies]
    world.on_main(exam.write_lines, f"{config.folder}.txt", exam.table(groups, found))


def main(argv: list[str], world: train.Dist | None = None) -> bool:
    """Run RL, or what --recipe, --write or --exam ask for; False when a signal ended it early."""
    config = parse_flags(RLConfig, argv, __doc__, presets={"variant": VARIANTS, "recipe": RECIPES})
    with together(config, main, argv, world) as mine:
        if config.exam or config.write:
            examine(config, mine) if config.exam else mine.on_main(write_good_answers, config, mine)
            return True
        programs = {"rl.py": partial(main, world=mine), "train.py": partial(train.main, world=mine),
                    "data.tasks": partial(mine.on_main, traces.main)}
        if config.recipe:
            commands = Commands(config, programs, mine.say, mine.is_main, origin_of(config))
            is_complete = commands.run(r1_commands(config))
        else:
            is_complete = build_trainer(config, mine).run()
        if not is_complete:
            mine.say(f"stopped and saved; {to_go_on('rl.py', argv)}")
        return is_complete


if __name__ == "__main__":
    run_main(main)
