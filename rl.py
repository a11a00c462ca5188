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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data import UserError
from sample import knob

RATIO_TOLERANCE = 1e-4  # sampler and trainer must agree on log-probs to this, in nats (float32)

# --------------------------------------------------------------------------------------------- the knobs

# Knobs that each paper changes; a flag on the command line still wins.
VARIANTS = {
    "grpo": "",
    "dr_grpo": "--no-divide-by-std --aggregate constant --kl-beta 0",
    "dapo": "--clip-eps-high 0.28 --aggregate token --kl-beta 0 --resample 4 --overlong-tokens 16",
    "gspo": "--sequence-ratio --clip-eps 3e-4 --clip-eps-high 4e-4 --kl-beta 0",
    "v3.2": "--no-divide-by-std --unbiased-kl --off-policy-delta 0.5 --keep-routing --keep-sampling-mask",
}


@dataclass
class RLConfig:
    """Every knob of a reinforcement learning run."""

    base: str = knob("out/base", "checkpoint directory to start from")
    task: str = knob("chain", "task, several with commas between, or module:Class for your own")
    variant: str = knob("grpo", "objective; sets the knobs that its paper changes", choices=tuple(VARIANTS))
    steps: int = knob(150, "rollouts, each followed by its updates")
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
    keep_routing: bool = knob(False, "update with the experts that the rollout chose (V3.2)")
    keep_sampling_mask: bool = knob(False, "update within the tokens left by top-k and top-p (V3.2)")
    resample: int = knob(0, "ask another question up to so often when a group is dead (DAPO)")
    overlong_tokens: int = knob(0, "answers are punished over the last so many tokens (DAPO)")


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
    there are `clipped` and `dropped`, the shares of tokens and answers that the clip and the mask silenced.

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
    is_dropped = torch.zeros_like(A, dtype=torch.bool)  # (N, 1)
    if knobs.off_policy_delta is not None:
        is_dropped = (A < 0) & (-drift > knobs.off_policy_delta)
        gain = gain.masked_fill(is_dropped, 0)
    log_rho = (ref_logps - logps).masked_fill(~mask, 0)  # (N, T)
    leash = log_rho.exp() - log_rho - 1
    if knobs.unbiased_kl:
        leash = leash * log_ratio.exp()
    weights = weights.to(logps.dtype)
    pg, kl = -(weights * gain).sum(), (weights * leash).sum()
    is_silent = (gain != judged * A) & ~is_dropped
    return {"pg": pg, "kl": kl, "total": pg + knobs.kl_beta * kl,
            "clipped": (is_silent * mask).sum() / mask.sum(), "dropped": is_dropped.float().mean()}
