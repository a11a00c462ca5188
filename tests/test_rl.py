"""rl.py: every objective and its gradient against the formula of its paper."""

import math
import statistics

import pytest
import torch

from data.io.cli import parse_flags
from rl import VARIANTS, RLConfig, group_advantages, overlong_penalty, policy_loss, token_weights


def twin_advantages(rewards: list[list[float]], divide_by_std: bool) -> list[float]:
    out = []
    for group in rewards:
        spread = statistics.stdev(group) if divide_by_std else 1.0
        mean = statistics.fmean(group)
        out += [0.0 if max(group) == min(group) else (r - mean) / spread for r in group]
    return out


def twin_loss(new, old, ref, advantages, mask, group_size, longest, knobs):
    """(total, kl, gradient of total by each new log-prob): the papers' sums, derivatives by hand."""
    N, T = len(new), len(new[0])
    Q = N // group_size
    total, total_kl, grad = 0.0, 0.0, [[0.0] * T for _ in range(N)]
    high = knobs.clip_eps if knobs.clip_eps_high is None else knobs.clip_eps_high
    delta = math.inf if knobs.off_policy_delta is None else knobs.off_policy_delta
    for i in range(N):
        spots = [t for t in range(T) if mask[i][t]]
        group = range(i // group_size * group_size, (i // group_size + 1) * group_size)
        share = {"answer": 1 / (Q * group_size * len(spots)), "constant": 1 / (Q * group_size * longest),
                 "token": 1 / (Q * sum(sum(mask[j]) for j in group))}[knobs.aggregate]
        A, drift = advantages[i], sum(new[i][t] - old[i][t] for t in spots) / len(spots)
        is_dropped = A < 0 and -drift > delta
        for t in spots:
            r = math.exp(new[i][t] - old[i][t])
            rho = math.exp(ref[i][t] - new[i][t])
            k3, slope = rho - math.log(rho) - 1, 1 - rho
            if knobs.unbiased_kl:
                k3, slope = r * k3, r * k3 + r * slope
            total += share * knobs.kl_beta * k3
            total_kl += share * k3
            grad[i][t] += share * knobs.kl_beta * slope
            if is_dropped:
                continue
            judged = math.exp(drift) if knobs.sequence_ratio else r
            low_side, high_side = judged < 1 - knobs.clip_eps, judged > 1 + high
            bounded = 1 - knobs.clip_eps if low_side else 1 + high if high_side else judged
            total -= share * min(judged * A, bounded * A)
            if judged * A <= bounded * A:  # the unclipped side is smaller: it has the gradient
                for u in (spots if knobs.sequence_ratio else [t]):
                    grad[i][u] -= share * A * judged / (len(spots) if knobs.sequence_ratio else 1)
    return total, total_kl, grad


def knobs_of(variant: str, more: str = "") -> RLConfig:
    return parse_flags(RLConfig, ["--variant", variant, *more.split()], "", presets={"variant": VARIANTS})


def advantages_of(rewards: list[list[float]], knobs: RLConfig) -> torch.Tensor:
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), knobs.divide_by_std).flatten()


CASES = {  # (lengths of the answers, rewards of the groups)
    "ragged": ([3, 1, 7, 5, 2, 7, 4, 6], [[1.1, 0.1, 0.0, 1.1], [0.0, 0.1, 0.1, 1.1]]),
    "all rewards equal": ([3, 1, 7, 5, 2, 7, 4, 6], [[0.1] * 4, [1.1] * 4]),
    "length 1": ([1] * 8, [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]),
    "all truncated": ([7] * 8, [[0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]),
    "one group dead": ([3, 1, 7, 5, 2, 7, 4, 6], [[1.1, 1.1, 1.1, 1.1], [0.0, 1.1, 0.1, 0.0]]),
}
EXTRA = {"grpo": ["--kl-beta 0.3", "--unbiased-kl --kl-beta 0.3", "--no-divide-by-std"],
         "gspo": ["--clip-eps 0.1 --clip-eps-high 0.2", "--kl-beta 0.1"],
         "v3.2": ["--kl-beta 0.2 --off-policy-delta 0.05"]}
VARIANT_CASES = [(v, extra) for v in VARIANTS for extra in ["", *EXTRA.get(v, [])]]


def log_probs(case: str):  # new, old, ref, mask (8, 7) each; rewards (2, 4)
    lengths, rewards = CASES[case]
    g = torch.Generator().manual_seed(len(case))
    old = -torch.rand(8, 7, generator=g, dtype=torch.float64) * 2
    new = (old + 0.25 * torch.randn(8, 7, generator=g, dtype=torch.float64)).requires_grad_()
    ref = old + 0.4 * torch.randn(8, 7, generator=g, dtype=torch.float64)
    return new, old, ref, torch.arange(7) < torch.tensor(lengths).unsqueeze(1), rewards


@pytest.mark.parametrize("variant, extra", VARIANT_CASES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_objective_and_gradient_equal_the_formula(variant, extra, case):
    knobs, (new, old, ref, mask, rewards) = knobs_of(variant, extra), log_probs(case)
    advantages = advantages_of(rewards, knobs)
    by_hand = twin_advantages(rewards, knobs.divide_by_std)
    assert advantages.tolist() == pytest.approx(by_hand, abs=1e-12)
    weights = token_weights(mask, 4, knobs.aggregate, longest=7)
    losses = policy_loss(new, old, ref, advantages, mask, weights, knobs)
    losses["total"].backward()
    lists = [new.tolist(), old.tolist(), ref.tolist(), by_hand, mask.tolist()]
    total, kl, grad = twin_loss(*lists, 4, 7, knobs)
    assert abs(losses["total"].item() - total) < 1e-8 and abs(losses["kl"].item() - kl) < 1e-8
    assert (new.grad - torch.tensor(grad, dtype=torch.float64)).abs().max() < 1e-8
    assert (new.grad[~mask] == 0).all() and (case != "all rewards equal" or losses["pg"].item() == 0)


def test_variants_differ_and_grpo_is_the_default():
    assert knobs_of("grpo") == RLConfig()
    new, old, ref, mask, rewards = log_probs("ragged")
    totals = []
    for variant in VARIANTS:
        knobs = knobs_of(variant)
        weights = token_weights(mask, 4, knobs.aggregate, longest=7)
        losses = policy_loss(new, old, ref, advantages_of(rewards, knobs), mask, weights, knobs)
        totals.append(losses["total"].item())
    assert len({round(total, 6) for total in totals}) == len(VARIANTS)


def test_on_policy_gradient_is_the_plain_policy_gradient_and_kl_is_zero():
    logps = torch.tensor([[0.5, 0.25], [0.125, 0.5]], dtype=torch.float64).log().requires_grad_()
    mask, A = torch.ones(2, 2, dtype=torch.bool), torch.tensor([2.0, -1.0], dtype=torch.float64)
    fixed, weights = logps.detach(), token_weights(mask, 2, "answer", 2)
    losses = policy_loss(logps, fixed, fixed, A, mask, weights, RLConfig())
    losses["total"].backward()
    assert losses["kl"].item() == 0 and losses["clipped"].item() == 0
    wanted = torch.tensor([[-0.5, -0.5], [0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(logps.grad, wanted)


def test_long_answers_weigh_as_each_paper_says():
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    answer, token, constant = (token_weights(mask, 2, how, 6) for how in ("answer", "token", "constant"))
    assert answer[0, 0] == 3 * answer[1, 0]  # per token, a long answer counts less in GRPO
    assert token[0, 0] == token[1, 0] and token.sum() == pytest.approx(1)
    assert constant[0, 0] == constant[1, 0] == pytest.approx(1 / 12)
    with pytest.raises(ValueError, match="no sampled token"):
        token_weights(torch.zeros(2, 3, dtype=torch.bool), 2, "answer", 3)


def test_overlong_penalty_has_dapos_three_parts():
    lengths = torch.tensor([0, 80, 81, 90, 100, 120])
    expected = torch.tensor([0, 0, -0.05, -0.5, -1, -1])
    torch.testing.assert_close(overlong_penalty(lengths, longest=100, margin=20), expected)
