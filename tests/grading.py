"""How each exercise of exercise.py is judged; run by it, in a process of its own.

`results` calls the function on small inputs, whoever wrote it, so that a learner's can be compared with ours; the checks
are those of the test suite, smallest first, most of them with an oracle of their own. Known mistakes of a
function are those of mistakes.py that stand in its place, and its `slips`: changes of its source."""

import csv
import json
import math
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model as ours
import rl
import sample
import train
from data.io import plot
from data.io.cli import UserError, nearest
from model import Config
from tests import checks, test_kernels, test_rl, test_sample, test_train
from tests.checks import ARCHITECTURES, YARN, build, close, random_text
from tests.exercise import EXERCISES, ROOT, Exercise
from tests.mistakes import (CAUSAL, DECODING, MICRO_BATCHES, MISTAKES, MTP_PARITY, PARITY, PARITY_V2, ROUTER, Patches,
                            check)


@dataclass(frozen=True)
class Grading:
    """How one exercise is judged."""

    results: Callable  # () -> {name: tensor}
    checks: tuple[Callable, ...]  # each takes a folder, or None
    slips: dict[str, tuple[str, str]] = field(default_factory=dict)  # text -> (what stands there, what instead)


# ------------------------------------------------------------------- what a function gives for small inputs


def gradients(out: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor | None]:
    """Of the leaves; None where nothing leads."""
    return list(torch.autograd.grad(out, leaves, allow_unused=True)) if out.requires_grad else [None] * len(leaves)


def operation(name: str, make: Callable) -> Callable:
    """The result of an operation of kernels.py, by its readable twin, and its gradients."""

    def results():
        inputs = [x.requires_grad_() if test_kernels.is_float(x) else x for x in make()]
        out, leaves = getattr(kernels.REFERENCE, name)(*inputs), [x for x in inputs if test_kernels.is_float(x)]
        grads = gradients((out * torch.linspace(1, 2, out.shape[-1])).sum(), *leaves)
        return {"result": out.detach()} | {f"gradient of input {i}": grad for i, grad in enumerate(grads, 1)}

    return results


def of_layer(ask: Callable, **changes) -> Callable:
    """ask(layer, h, freqs_cis) of the last layer of a small model, without gradients."""

    def results():
        model = build(**changes)
        tokens, _ = random_text(model.config, T=12)
        h = torch.randn(2, 12, model.config.hidden_size)
        with torch.no_grad():
            return ask(model.model.layers[model.config.num_hidden_layers - 1], h, model.freqs_and_mask(tokens)[0])

    return results


def frequencies():
    configs = {"plain RoPE": {}, "YaRN": YARN, "YaRN, factor 4": dict(rope_factor=4.0, rope_beta_fast=8.0)}
    return {name: ours.rope_frequencies(Config.preset("tiny", **changes)) for name, changes in configs.items()}


def queries_and_latents(layer, h, freqs_cis):
    return (*layer.self_attn.queries(h, freqs_cis), layer.self_attn.latents(h, freqs_cis))


def attended(way: str) -> Callable:
    """The output per head, causal and with a mask that also hides the first key from the later ones."""

    def ask(layer, h, freqs_cis):
        causal = torch.ones(2, 12, 12, dtype=torch.bool).tril()
        masked = causal.clone()
        masked[:, 1:, 0] = False
        inputs, function = queries_and_latents(layer, h, freqs_cis), getattr(layer.self_attn, way)
        return {"o": function(*inputs, causal), "o with a mask": function(*inputs, masked)}

    return of_layer(ask)


def dense_gates(layer, h, _):
    """The gate of each expert, 0 where it was not chosen: the order of the chosen ones is free."""
    routing = layer.mlp.gate(h)
    chosen = {"topk_idx, sorted": routing.topk_idx.sort(-1).values, "affinity": routing.affinity}
    return chosen | {"gates by expert": torch.zeros_like(routing.affinity).scatter(-1, routing.topk_idx, routing.gates)}


def chosen_experts(layer, h, _):
    router = layer.mlp.gate
    affinity = (h @ router.weight.T).sigmoid()
    plain = router.choose(affinity).sort(-1).values
    router.e_score_correction_bias -= 5.0
    return {"experts, sorted": plain, "experts when all scores are negative": router.choose(affinity).sort(-1).values}


def moved_bias(layer, *_):
    router = layer.mlp.gate
    router.e_score_correction_bias.fill_(5.0)
    router.update_bias(torch.arange(16.0).roll(3), 0.001)
    return {"e_score_correction_bias": router.e_score_correction_bias.clone()}


def balance():
    affinity = torch.rand(3, 9, 8, requires_grad=True)
    is_counted = torch.rand(3, 9) < 0.8
    loss = ours.balance_loss(ours.Routing(torch.zeros(3, 9, 2).long(), torch.ones(3, 9, 2), affinity), is_counted)
    return {"loss": loss.detach(), "gradient of affinity": gradients(loss.sum(), affinity)[0]}


def ahead():
    model = build()
    tokens, _ = random_text(model.config, T=12)
    inputs = torch.randn(2, 2, 12, model.config.hidden_size)
    with torch.no_grad():
        h, routing = model.model.layers[-1](*inputs, model.freqs_and_mask(tokens)[0])
    return {"state": h, "affinity of its router": routing.affinity}


def blocked_loss():
    inputs = [x.clone() for x in test_kernels.loss_inputs(N=700, V=1000)]
    nll, *grads = test_kernels.run(kernels.linear_cross_entropy_fused, inputs)
    return {"nll": nll, "gradient of h": grads[0], "gradient of weight": grads[1]}


def quantised():
    x, out = torch.randn(130, 200) * torch.rand(130, 1), {}
    for rows, is_round in ((1, False), (128, False), (1, True)):
        codes, scales = kernels.quantise(x, rows, power_of_two=is_round)
        name = f"rows={rows}" + ", power_of_two" * is_round
        out |= {f"scales, {name}": scales, f"codes, {name}": codes}
    return out


def rates():
    shares = torch.linspace(0, 1, 101).tolist()
    return {"factor at 0, 1 .. 100 %": torch.tensor([train.lr_factor(x, train.TrainConfig()) for x in shares])}


def draws():
    out, logits, noise = {}, 2 * torch.randn(40, 9), torch.rand(40)
    for knobs in ((1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (2.0, 0, 0.7), (0.0, 0, 1.0)):
        draw = sample.sample_tokens(logits, *knobs, noise)
        name = "temperature {}, top_k {}, top_p {}".format(*knobs)
        out |= {f"{each} at {name}": value for each, value in draw._asdict().items()}
    return out


def advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.1], [0.1, 0.1, 0.1, 0.1], [1.1, 0.1, 1.1, 1.1]])
    return {"A": rl.group_advantages(rewards), "A without the division": rl.group_advantages(rewards, False)}


def weights():
    mask = torch.arange(6) < torch.tensor([2, 6, 1, 3]).unsqueeze(1)
    return {name: rl.token_weights(mask, 2, name, 8) for name in ("answer", "token", "constant")}


def objective():
    new, old, ref, mask, rewards = test_rl.log_probs("ragged")
    out, A = {}, torch.linspace(-1.5, 1.5, 8).double()
    for variant in rl.VARIANTS:
        knobs = test_rl.knobs_of(variant, "--kl-beta 0.3")
        losses = rl.policy_loss(new, old, ref, A, mask, mask / mask.sum(), knobs)
        out |= {f"{name}, {variant}": value.detach() for name, value in losses.items()}
        out[f"gradient of logps, {variant}"] = gradients(losses["total"], new)[0]
    return out


# ----------------------------------------------------------------------------------- checks that are not elsewhere


def equals_fused_twin(name: str):
    """Values and gradients of the fast twin, which is written another way."""
    for inputs in test_kernels.CASES[name]:
        inputs = test_kernels.cast(name, inputs, torch.float32)
        got, wanted = (test_kernels.run(twin, inputs) for twin in (
            getattr(kernels.REFERENCE, name), getattr(kernels, name + "_fused")))
        for i, (a, b) in enumerate(zip(got, wanted)):
            if b.numel():
                tolerance = 2e-5 * max(1.0, b.abs().max().item())
                close(a, b, tolerance, f"{name} of {tuple(inputs[0].shape)}, {f'gradient {i}' if i else 'value'}")


def norm_equals_torch():
    x, weight = torch.randn(4, 7, 33), torch.randn(33)
    close(kernels.REFERENCE.rms_norm(x, weight, 0.1), F.rms_norm(x, (33,), weight, 0.1), 1e-5, "F.rms_norm")
    wide = kernels.REFERENCE.rms_norm(x.bfloat16(), weight, 0.1)
    assert wide.dtype == torch.bfloat16, f"rms_norm of bfloat16 is {wide.dtype}, wanted the dtype of its input"


def frequencies_follow_the_closed_formula(factor=40.0, fast=32.0, slow=1.0):
    c = Config.preset("tiny", rope_factor=factor, rope_beta_fast=fast, rope_beta_slow=slow, qk_rope_head_dim=64,
                      rope_original_max_position_embeddings=1024)
    wanted = checks.yarn_frequencies(64, c.rope_theta, factor, 1024, fast, slow)
    close(ours.rope_frequencies(c), torch.tensor(wanted), 1e-6, "frequencies")


def blocks_equal_all_logits():
    """Values and gradients of the readable twin, which holds all logits."""
    for inputs in test_kernels.CASES["linear_cross_entropy"]:
        got, wanted = (test_kernels.run(twin, test_kernels.cast("linear_cross_entropy", inputs, torch.float32))
                       for twin in (kernels.linear_cross_entropy_fused, kernels.linear_cross_entropy_reference))
        for what, a, b in zip(("nll", "gradient of h", "gradient of weight"), got, wanted):
            if b.numel():
                close(a, b, 2e-5 * max(1.0, b.abs().max().item()), what)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation has made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if torch.is_tensor(out):
            self.numbers = max(self.numbers, out.numel())
        return out


def all_logits_are_never_held(N=4096, V=2000):
    h, weight = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    with Largest() as seen:
        kernels.linear_cross_entropy_fused(h, weight, torch.randint(V, (N,))).sum().backward()
    assert seen.numbers <= N * V // 4, f"a tensor of {seen.numbers:,} numbers; all logits are {N * V:,}"


def each(function: Callable, *calls: tuple) -> Callable:
    """One check of several calls of a test."""

    def run(folder):
        for argv in calls:
            function(*argv)

    run.__name__ = function.__name__.removeprefix("test_")
    return run


FORMULA = test_rl.test_objective_and_gradient_equal_the_formula
GRADINGS = {
    "rms_norm": Grading(
        operation("rms_norm", lambda: (torch.randn(2, 5, 24), torch.randn(24), 0.1)),
        (check(norm_equals_torch), check(equals_fused_twin, "rms_norm"), PARITY),
        {"the mean is subtracted, as LayerNorm does": ("(wide * scale)", "((wide - wide.mean(-1, keepdim=True)) * scale)"),
         "the sum of squares instead of their mean": (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
         "eps is added to the root, not under it": (
             "torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)", "1 / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps)")}),
    "apply_rope": Grading(
        operation("apply_rope", test_kernels.rope_inputs),
        (check(equals_fused_twin, "apply_rope"), check(checks.absorbed_equals_expanded), PARITY, DECODING),
        {"pairs turn the other way": ("even * cos - odd * sin, odd * cos + even * sin",
                                      "even * cos + odd * sin, odd * cos - even * sin")}),
    "latents": Grading(
        of_layer(lambda layer, h, freqs_cis: {"latent": layer.self_attn.latents(h, freqs_cis)}),
        (check(checks.cache_holds_latents_only), PARITY, DECODING)),
    "attention": Grading(
        operation("causal_attention", partial(test_kernels.isolated_inputs, 2, 9)),
        (check(equals_fused_twin, "causal_attention"), CAUSAL, PARITY),
        {"only the part without position is scaled": (
            '(scores + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)) * scale',
            'scores * scale + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)')}),
    "expanded": Grading(
        attended("expanded"),
        (check(checks.absorbed_equals_expanded), CAUSAL, PARITY, check(checks.gradients_equal_transformers)),
        {"values come first in W_UKV": ("k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim)",
                                        "v, k_nope = kv.split((config.v_head_dim, config.qk_nope_head_dim)")}),
    "absorbed": Grading(
        attended("absorbed"),
        (check(checks.absorbed_equals_expanded), DECODING, check(checks.decoding_equals_one_pass, chunks=(5, 1, 2, 4))),
        {"W_UK and W_UV are swapped": ("w_uk, w_uv = ", "w_uv, w_uk = "),
         "the scale is left out": ("mask, self.scale)", "mask, 1.0)")}),
    "choose": Grading(
        of_layer(chosen_experts),
        (ROUTER, check(checks.router_follows_the_official_rule, -5.0),
         check(checks.router_follows_the_official_rule, **ARCHITECTURES["v2"]), PARITY),
        {"groups are passed over": ("and config.n_group > 1", "and False")}),
    "gates": Grading(
        of_layer(dense_gates),
        (ROUTER, check(checks.router_stays_in_float32), check(checks.training_and_evaluation_route_alike), PARITY, PARITY_V2,
         check(checks.gradients_equal_transformers))),
    "expert_ffn": Grading(
        operation("expert_ffn", test_kernels.expert_inputs),
        (check(equals_fused_twin, "expert_ffn"), check(checks.rows_do_not_touch), PARITY),
        {"the gates are left out": (" * gates[rows, slots, None].to(y.dtype)", ""),
         "every expert is the one before": ("down[expert]", "down[expert - 1]")}),
    "balance_loss": Grading(
        balance,
        (check(checks.balance_loss_equals_the_loops), check(checks.balance_loss_sees_each_sequence),
         check(checks.balance_loss_reaches_the_router))),
    "update_bias": Grading(
        of_layer(moved_bias),
        (check(checks.bias_moves_by_the_sign_of_the_load), check(checks.load_evens_out), MICRO_BATCHES)),
    "mtp": Grading(
        ahead,
        (MTP_PARITY, check(checks.mtp_equals_transformers, modules=2), CAUSAL)),
    "cross_entropy": Grading(
        blocked_loss,
        (check(blocks_equal_all_logits), check(all_logits_are_never_held),
         check(checks.gradients_equal_transformers, "fused")),
        {"ignored targets have a gradient": ("grad_nll.masked_fill(targets == IGNORE, 0)", "grad_nll"),
         "the gradient from outside is forgotten": ("grad_h.mul_(factor)", "grad_h"),
         "all logits at once": ("for rows in _LinearCrossEntropy.blocks(h, weight):", "for rows in [slice(None)]:")}),
    "quantise": Grading(
        quantised,
        (each(test_kernels.test_codes_and_scales_are_deepseeks, *[(rows, (129, 127), 1.0) for rows in (1, 128)]),
         each(test_kernels.test_codes_come_back_within_their_three_bits, ()),
         each(test_kernels.test_scales_that_are_powers_of_two_spare_the_second_rounding, ())),
        {"the largest code is taken for 256": ("/ E4M3_MAX", "/ 256.0"),
         "a power of two below the scale: the largest codes overflow": ("log2().ceil()", "log2().floor()")}),
    "lr_factor": Grading(
        rates,
        (each(test_train.test_learning_rate_follows_the_closed_formula_of_v3, ()),),
        {"a line instead of the cosine": ("0.5 * (1 + math.cos(math.pi * fall))", "(1 - fall)"),
         "the cosine ends at zero": ("config.cosine_to + (1 - config.cosine_to) * 0.5", "0.5")}),
    "yarn": Grading(
        frequencies,
        (check(frequencies_follow_the_closed_formula), check(frequencies_follow_the_closed_formula, 4.0, 8.0, 2.0),
         check(checks.logits_equal_transformers, T=60, **YARN)),
        {"pairs are counted by their first number": ("(pair / 2 - low)", "(pair - low)")}),
    "sample_tokens": Grading(
        draws,
        (each(test_sample.test_entropy_in_nats, ()), each(test_sample.test_tiny_temperatures_are_greedy_and_finite, ()),
         each(test_sample.test_tokens_follow_the_distribution, (1.0, 0, 1.0), (2.0, 6, 1.0), (1.0, 0, 0.8))),
        {"temperature acts behind the truncation": ("truncate((logits - peak) / temperature, top_k, top_p)",
                                                    "truncate(logits - peak, top_k, top_p) / temperature"),
         "entropy in bits": ("(probs * information).sum(-1)", "(probs * information).sum(-1) / math.log(2)")}),
    "group_advantages": Grading(
        advantages,
        (each(FORMULA, ("grpo", "", "ragged"), ("dr_grpo", "", "ragged"), ("grpo", "", "one group dead")),),
        {"the deviation without Bessel's correction": ("rewards.std(1, keepdim=True)",
                                                       "rewards.std(1, keepdim=True, unbiased=False)"),
         "the mean of all groups": ("rewards.mean(1, keepdim=True)", "rewards.mean()")}),
    "token_weights": Grading(
        weights,
        (each(test_rl.test_long_answers_weigh_as_each_paper_says, ()),
         each(FORMULA, ("grpo", "", "ragged"), ("dapo", "", "ragged"), ("dr_grpo", "", "ragged"))),
        {"tokens are averaged over the batch, not within the group": ("Q * of_group", "torch.full_like(lengths, lengths.sum())"),
         "an answer counts by its length": ("N * lengths", "torch.full_like(lengths, N)")}),
    "policy_loss": Grading(
        objective,
        (each(test_rl.test_on_policy_gradient_is_the_plain_policy_gradient_and_kl_is_zero, ()),
         each(FORMULA, *[(variant, "", "ragged") for variant in rl.VARIANTS])),
        {"the clip without the minimum": ("torch.minimum(ratio * A, ratio.clamp(1 - knobs.clip_eps, 1 + high) * A)",
                                          "ratio.clamp(1 - knobs.clip_eps, 1 + high) * A"),
         "the KL by its first-order estimate, which can be negative": ("log_rho.exp() - log_rho - 1", "-log_rho"),
         "the ratio of the KL is upside down": ("ref_logps - logps", "logps - ref_logps")}),
}


# ------------------------------------------------------------------------- the learner's function in place of ours

FAULTS = (Exception, SystemExit)  # of what a learner wrote: exit() in it is no end of the checks


def load(path: Path, owner: str, names: list[str]) -> dict:
    """The functions `names` of the learner's file, which holds the class of the owner or the functions themselves.

    Raises UserError with the line when it is no Python, and naming what it has when it lacks one.
    """
    space = {"__name__": f"mine.{path.stem}"}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), space)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except FileNotFoundError:
        raise UserError(f"{path} is not there: python -m tests.exercise {path.stem} writes it") from None
    except FAULTS as error:
        raise UserError(f"{path} cannot be imported: {what_went_wrong(error, path)}") from None
    if isinstance(resolve_name(owner), type):
        kind = owner.rpartition(".")[2]
        if not isinstance(space.get(kind), type):
            raise UserError(f"{path} has no class {kind}{nearest(kind, space)}")
        space = vars(space[kind])
    for name in names:
        if not callable(getattr(space.get(name), "__func__", space.get(name))):
            raise UserError(f"{path} has no function {name}{nearest(name, space)}")
    return {name: space[name] for name in names}


def put_in_place(patches: Patches, owner: str, written: dict) -> None:
    """Whoever holds one of the functions gets the learner's: class, modules that imported it, both twins of kernels.py."""
    holder = resolve_name(owner)
    for name, function in written.items():
        if isinstance(holder, type):
            plain = getattr(function, "__func__", function)
            for variable, cell in zip(plain.__code__.co_freevars, plain.__closure__ or ()):
                if variable == "__class__":
                    cell.cell_contents = holder  # for super()
            patches.setattr(holder, name, function)
            continue
        original, operation = getattr(holder, name), name.removesuffix("_reference")
        for module in [each for each in sys.modules.values() if is_of_project(getattr(each, "__file__", None) or "/")]:
            for place, value in list(vars(module).items()):
                if value is original:
                    patches.setattr(module, place, function)
                elif isinstance(value, kernels.Kernels) and operation in value._fields:
                    patches.setattr(module, place, value._replace(**{operation: function}))


def is_of_project(file: str) -> bool:
    return Path(file).is_relative_to(ROOT) and "site-packages" not in file


def what_went_wrong(error: BaseException, path: Path) -> str:
    """In a line: what a check says, or an exception with its line in the learner's file."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == str(path)]
    if isinstance(error, AssertionError) and (str(error) or not mine):
        return " ".join(str(error).split())[:300] or f"not so: {frames[-1].line}"
    where = (mine or [frame for frame in frames if is_of_project(frame.filename)])[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}, line {where.lineno}: {where.line})"


# --------------------------------------------------------------------------------------------------- the judgement

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest number


def outcome(grading: Grading) -> dict:
    """What the function gives now, always for the same inputs."""
    torch.manual_seed(0)
    return grading.results()


def differences(got: dict, wanted: dict) -> list[str]:
    """Of each tensor that is not as it should be: its shape, dtype, or how far off, and where."""
    found = []
    for name, b in wanted.items():
        a = got[name]
        if a is None or a.shape != b.shape or a.dtype != b.dtype:
            is_there = "there is none" if a is None else f"{tuple(a.shape)} {a.dtype}"
            found.append(f"{name}: {is_there}, wanted {tuple(b.shape)} {b.dtype}".replace("torch.", ""))
            continue
        a, b = a.double(), b.double()
        is_off = ~((a - b).abs() <= TOLERANCES.get(wanted[name].dtype, 0) * max(1.0, b.abs().max().item())) & (a != b)
        if is_off.any():
            place = is_off.nonzero()[0].tolist()
            where = f"{is_off.double().mean():.0%} of it differs, first at {place}: " if place else ""
            found.append(f"{name}: {where}{a[tuple(place)]:.4g}, wanted {b[tuple(place)]:.4g}"
                         + f"; off by up to {(a - b).abs().max():.2g}" * bool(place))
    return found


def verdicts(grading: Grading, ours: dict, path: Path) -> Iterator[dict]:
    """One after the other, comparison with ours first: name of the check, verdict, what differs."""

    def gives_what_ours_gives(folder):
        found = differences(outcome(grading), ours)
        assert not found, "; ".join(found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)

    yield from run_checks((gives_what_ours_gives, *grading.checks), path)


def run_checks(checks: Iterable[Callable], path: Path) -> Iterator[dict]:
    """Green, to do or red; behind a stub, or what does not end, nothing more is asked."""
    for each in checks:
        verdict, what = "green", ""
        try:
            torch.manual_seed(0)
            with bounded(SECONDS):
                each(None)
        except FAULTS as error:
            is_stub = isinstance(error, NotImplementedError) and is_raised_in(path, error)
            verdict, what = ("to do", "") if is_stub else ("red", what_went_wrong(error, path))
            is_last = is_stub or isinstance(error, TimeoutError)
        yield {"check": getattr(each, "words", each.__name__), "verdict": verdict, "what": what}
        if verdict != "green" and is_last:
            return


def is_raised_in(path: Path, error: BaseException) -> bool:
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(str(path))


# ------------------------------------------------------------------------------------------- trying known mistakes


def tried(exercise: Exercise, folder: Path) -> Iterator[tuple[str, Callable]]:
    """Every known mistake of a function: its text, and what puts it in."""
    for text, known in MISTAKES.items():
        if known.place == exercise.target:
            yield text, partial(put_operation, known.place, known.broken) if exercise.owner == "kernels" else known.put_in
    for text, (old, new) in GRADINGS[exercise.name].slips.items():
        yield text, partial(put_slip, exercise=exercise, folder=folder, old=old, new=new)


def put_operation(place: str, broken: Callable, patches: Patches) -> None:
    """A mistake in an operation of kernels.py, in place of both twins."""
    owner, _, name = place.rpartition(".")
    put_in_place(patches, owner, {name: partial(broken, resolve_name(place))})


def put_slip(patches: Patches, exercise: Exercise, folder: Path, old: str, new: str) -> None:
    """Our own function with one piece of its source changed."""
    source = exercise.source(is_solved=True)
    assert old in source, f"{exercise.target} has no {old!r} any more: its slip in tests/grading.py wants another text"
    path = folder / f"{exercise.name}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    put_in_place(patches, exercise.owner, load(path, exercise.owner, exercise.functions))


def pattern(exercise: Exercise, put: Callable) -> dict | str:
    """What comes out with something put in: tensors, or in a word the error."""
    with Patches() as patches:
        try:
            put(patches)
            with bounded(max(1, SECONDS // 4)):
                return outcome(GRADINGS[exercise.name])
        except FAULTS as error:
            return type(error).__name__


def distance(got: dict | str, other: dict | str, ours: dict) -> float:
    """Between two errors: 0 when `got` is wrong just as `other` is, 1 when it is no nearer to it than to ours."""
    if isinstance(got, str) or isinstance(other, str):
        return math.inf  # an error speaks for itself
    shape = lambda x: None if x is None else x.shape
    if any(shape(got[name]) != shape(other[name]) for name in ours):
        return math.inf

    def apart(a: dict, b: dict) -> float:
        pairs = [(a[name].double(), b[name].double()) for name in ours if a[name] is not None and shape(a[name]) == shape(b[name])]
        return sum(float((x - y).nan_to_num().square().mean() / (y.square().mean() + 1e-12)) for x, y in pairs) ** 0.5

    return apart(got, other) / max(apart(got, ours), 1e-12) if apart(got, ours) else 0.0


def nearest_mistakes(exercise: Exercise, put: Callable, ours: dict) -> list[tuple[float, str]]:
    """Known mistakes by how alike their error is to that of the learner's function."""
    got = pattern(exercise, put)
    if not isinstance(got, str) and not differences(got, ours):
        return []
    with tempfile.TemporaryDirectory() as folder:
        found = [(distance(got, pattern(exercise, one), ours), text) for text, one in tried(exercise, Path(folder))]
    return sorted(pair for pair in found if pair[0] < 0.9)


# ------------------------------------------------------------------------------------------------------ the process

SECONDS = 20  # that a check may take
TOGETHER = (PARITY, check(checks.gradients_equal_transformers), DECODING, MTP_PARITY)


@contextmanager
def bounded(seconds: int):
    """Raises TimeoutError inside the block after so long, where the system has alarms (Windows has not)."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_and_put(patches: Patches, exercise: Exercise, folder: Path) -> None:
    """The learner's functions, out of their file, in place of ours."""
    with bounded(SECONDS):
        put_in_place(patches, exercise.owner, load(folder / f"{exercise.name}.py", exercise.owner, exercise.functions))


def judged(exercise: Exercise, folder: Path) -> Iterator[dict]:
    """The findings about one exercise, with the learner's function alone in place."""
    ours = outcome(GRADINGS[exercise.name])
    with Patches() as patches:
        try:
            read_and_put(patches, exercise, folder)
        except (UserError, TimeoutError) as error:
            yield {"check": "the_file_can_be_read", "verdict": "red", "what": str(error)}
            return
        yield from verdicts(GRADINGS[exercise.name], ours, folder / f"{exercise.name}.py")


def hints(exercise: Exercise, folder: Path) -> list[tuple[float, str]]:
    """Of a file that can be read: the known mistakes that look like it, the nearest first."""
    with suppress(UserError, TimeoutError):
        ours = outcome(GRADINGS[exercise.name])
        return nearest_mistakes(exercise, partial(read_and_put, exercise=exercise, folder=folder), ours)
    return []


def draw_own(folder: Path, count: int) -> None:
    """yours.png beside the other pictures of the run: the losses, and whose functions learned them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((folder / "log.csv").read_text(encoding="utf-8").splitlines()))
    title = f"Learned by functions of your own: {count} of {len(EXERCISES)}"
    plot.loss_figure(folder / "yours.png", rows, math.log(config["vocab_size"]), title)
    print(f"picture     {folder / 'yours.png'}: {title}")


def main(argv: list[str]) -> None:
    """`python -m tests.grading FOLDER check|together|train NAME,NAME [flags of train.py]`: JSON, a line per finding."""
    folder, task, names, *flags = argv
    torch.set_num_threads(1)
    with Patches() as patches:
        for name in names.split(","):
            if task != "check":
                read_and_put(patches, EXERCISES[name], Path(folder))
                continue
            is_red = False
            for found in judged(EXERCISES[name], Path(folder)):
                is_red = is_red or found["verdict"] == "red"
                print(json.dumps({"exercise": name} | found), flush=True)
            print(json.dumps({"exercise": name, "hints": hints(EXERCISES[name], Path(folder)) if is_red else []}), flush=True)
        if task == "together":
            for found in run_checks(TOGETHER, Path(folder)):
                print(json.dumps({"exercise": "together"} | found), flush=True)
        if task == "train":
            train.main([*flags, "--processes=1"])  # another one would not have these functions
            draw_own(train.parse_flags(train.TrainConfig, flags, "").folder, len(names.split(",")))


if __name__ == "__main__":
    main(sys.argv[1:])
