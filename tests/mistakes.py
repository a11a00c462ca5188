"""Known mistakes of reimplementations of DeepSeek-V3, to be put into the model on purpose.

Each is a function that stands where ours stands, by one of a few mechanisms (an attribute of a module or class, an
operation of kernels.py, a piece of the router), and names the checks of checks.py that must notice. test_pitfalls.py puts them
in one by one; bug.py trains with them; exercise.py tries them beside what a learner wrote."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import model as ours
import train
from data.io import checkpoint
from model import MTP, Attention, Cache, Config, Experts, MoE, Router, Routing, Transformer
from tests import checks
from tests.checks import ARCHITECTURES, YARN

UNSEEN = "not met in public code: a slip that the equations invite"
TEACHING = "a teaching repository of V3"
SCALE = "attention back ends: Megatron-LM#1429, transformers PR #47435, optimum-intel PR #1877, onnxruntime/mobius PR #548"
MISTAKES: dict[str, "Mistake"] = {}


@dataclass(frozen=True)
class Mistake:
    """How to break the model, the checks that must notice, and what is known of it."""

    put_in: Callable  # put_in(patches), which undoes it in the end: pytest's monkeypatch or `Patches`
    noticed_by: tuple[Callable, ...]
    broken: Callable  # the function with the mistake in it
    place: str  # what it stands in for: "model.Attention.latents"
    seen: str  # in which kind of code

    @property
    def changes(self) -> dict:
        """Of the preset: the architecture in which a check notices it."""
        return getattr(self.noticed_by[0], "changes", {})


class Patches(ExitStack):
    """Attributes set inside a block as pytest's monkeypatch sets them, and put back at its end."""

    def setattr(self, owner, name: str, value) -> None:
        self.enter_context(mock.patch.object(owner, name, value))


def mistake(text: str, put: Callable, *noticed_by: Callable, seen: str = UNSEEN):
    """Registers a function as a mistake: `put(patches, function)` puts it in its place."""

    def register(broken):
        place = getattr(put, "func", put).place  # of a partial, of what it calls
        MISTAKES[text] = Mistake(partial(put, broken=broken), noticed_by, broken, place, seen)
        return broken

    return register


def stands_for(place: str) -> Callable:
    """Names what a mechanism replaces."""

    def named(put):
        put.place = place
        return put

    return named


def at(owner, name: str) -> Callable:
    """In place of a function or method, which the broken one gets as its first argument."""
    where = owner.__name__ if not isinstance(owner, type) else f"{owner.__module__}.{owner.__qualname__}"

    @stands_for(f"{where}.{name}")
    def put(patches, broken):
        original = getattr(owner, name)
        patches.setattr(owner, name, lambda *args, **named: broken(original, *args, **named))

    return put


def twin(name: str) -> Callable:
    """In place of an operation of kernels.py, which the broken one gets as its first argument."""

    @stands_for(f"kernels.{name}_reference")
    def put(patches, broken):
        choose = ours.choose

        def chosen(*args, **named):
            ops, reasons = choose(*args, **named)
            return ops._replace(**{name: partial(broken, getattr(ops, name))}), reasons

        patches.setattr(ours, "choose", chosen)

    return put


def architecture(named: dict) -> dict:
    """Of a check's arguments those that change the model's sizes and switches."""
    changes = {name: value for name, value in named.items() if name in Config.__dataclass_fields__}
    return changes | ({"num_nextn_predict_layers": named["modules"]} if "modules" in named else {})


@cache
def check(function, *argv, **changes) -> Callable:
    """A check with its arguments; those that want a directory get one, others pass it over."""
    def run(tmp_path):
        function(*argv, **changes)

    run.__name__, run.changes = function.__name__, architecture(changes)
    known = [name for name, each in ARCHITECTURES.items() if each and each.items() <= changes.items()][-1:]
    kept = changes if not known else {key: value for key, value in changes.items() if key not in ARCHITECTURES[known[0]]}
    words = [*map(str, argv), *[f"{key}={value}" for key, value in kept.items()], *known]
    run.words = function.__name__.replace("_", " ") + f" ({', '.join(words)})" * bool(words)
    return run


def loads_as_mtp(tmp_path):
    model = checks.build()
    model.save_pretrained(tmp_path)
    checks.transformers_loads_the_mtp_layer(tmp_path, model)


PARITY = check(checks.logits_equal_transformers, T=60)
PARITY_YARN = check(checks.logits_equal_transformers, T=60, **YARN)
PARITY_V2 = check(checks.logits_equal_transformers, T=60, **ARCHITECTURES["v2"])
ROUTER = check(checks.router_follows_the_official_rule)
DECODING = check(checks.decoding_equals_one_pass)
CAUSAL = check(checks.nothing_sees_the_future)
AT_LN_VOCAB = check(checks.random_tokens_stay_at_ln_vocab)
MTP_PARITY = check(checks.mtp_equals_transformers)


# ------------------------------------------------------------------------- attention, RoPE and YaRN


@mistake("the norm of the latent covers the shared rope key too", at(Attention, "latents"), PARITY)
def _(original, self, h, freqs_cis):
    R, P = self.config.kv_lora_rank, self.config.qk_rope_head_dim
    c_kv, k_pe = self.kv_a_proj_with_mqa(h).split((R, P), -1)
    k_pe = self.ops.apply_rope(F.rms_norm(k_pe, (P,), eps=1e-6).unsqueeze(2), freqs_cis).squeeze(2)
    return torch.cat((self.kv_a_layernorm(c_kv), k_pe), dim=-1)


@mistake("the latent is cached and used without its norm", at(Attention, "latents"), PARITY)
def _(original, self, h, freqs_cis):
    R, P = self.config.kv_lora_rank, self.config.qk_rope_head_dim
    c_kv, k_pe = self.kv_a_proj_with_mqa(h).split((R, P), -1)
    return torch.cat((c_kv, self.ops.apply_rope(k_pe.unsqueeze(2), freqs_cis).squeeze(2)), dim=-1)


@mistake("the latent norms use rms_norm_eps", at(Attention, "__init__"),
         check(checks.logits_equal_transformers, **ARCHITECTURES["moonlight"]))
def _(original, self, config, layer):
    original(self, config, layer)
    self.kv_a_layernorm.eps = config.rms_norm_eps


@mistake("RoPE rotates halves instead of adjacent pairs", twin("apply_rope"), PARITY,
         seen="ports of the released weights: DeepSeek-V3#938, transformers#39687")
def _(original, x, freqs_cis):
    (one, two), cos, sin = x.chunk(2, dim=-1), freqs_cis.real, freqs_cis.imag
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)


@stands_for("model.Attention.expanded")
def rotating_all_keys(patches, broken):
    """`queries` also notes the angles, for `expanded`."""
    at(Attention, "expanded")(patches, broken)

    def queries(original, self, h, freqs_cis):
        self.freqs_cis = freqs_cis
        return original(self, h, freqs_cis)

    at(Attention, "queries")(patches, queries)


@mistake("RoPE on the reconstructed keys of each head: nothing left to absorb", rotating_all_keys,
         PARITY, check(checks.absorbed_equals_expanded), DECODING, seen="two teaching repositories of MLA")
def _(original, self, q_nope, q_pe, latent, mask):
    attend, angles = self.ops.causal_attention, self.freqs_cis
    ops = self.ops
    self.ops = ops._replace(causal_attention=lambda q, q_pe, k, *rest: attend(
        q, q_pe, ops.apply_rope(k, angles), *rest))
    try:
        return original(self, q_nope, q_pe, latent, mask)
    finally:
        self.ops = ops


@stands_for("model.Attention.__init__")
def scale(patches, broken):
    """Another scale(config) of the softmax."""

    def init(original, self, config, layer):
        original(self, config, layer)
        self.scale = broken(config)

    at(Attention, "__init__")(patches, init)


def plain_scale(config):
    return (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


mistake("mscale enters the softmax scale once, not squared", scale, PARITY_YARN, seen=SCALE)(
    lambda c: plain_scale(c) * ours.yarn_mscale(c.rope_factor, c.rope_mscale_all_dim))
mistake("the softmax scale leaves mscale out (SDPA's default scale)", scale, PARITY_YARN, seen=SCALE)(plain_scale)
mistake("mscale without YaRN", at(ours, "yarn_mscale"), PARITY)(
    lambda original, factor, mscale: 0.1 * mscale * math.log(40) + 1.0)
mistake("the softmax scale comes from mscale, not from mscale_all_dim", scale,
        check(checks.logits_equal_transformers, **ARCHITECTURES["v3 mscale below mscale_all_dim"]), seen=SCALE)(
    lambda c: plain_scale(c) * ours.yarn_mscale(c.rope_factor, c.rope_mscale) ** 2)
mistake("the softmax scale divides by the nope width only", scale, PARITY)(lambda config: config.qk_nope_head_dim**-0.5)
mistake("cos and sin are multiplied by mscale although it should cancel", at(ours, "rotations"), PARITY_YARN,
        seen="an inference engine: kekzl/imp PR #880")(
    lambda original, config, *rest: original(config, *rest) * ours.yarn_mscale(config.rope_factor, 1.0))


@mistake("YaRN slows the fast pairs and keeps the slow ones", at(ours, "rope_frequencies"), PARITY_YARN)
def _(original, config, device=None):
    plain = original(replace(config, rope_factor=1.0), device)
    return plain + plain / config.rope_factor - original(config, device)


@mistake("the cache holds keys and values of every head", at(Cache, "__init__"), check(checks.cache_holds_latents_only),
         seen="the first code published with the weights, and inference engines: DeepSeek-R1#238, llama.cpp PR #11049")
def _(original, self, config, batch, capacity, *rest):
    original(self, config, batch, capacity, *rest)
    width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    self.expanded = torch.zeros(config.num_hidden_layers, batch, capacity, width)


@mistake("after a prefix, several new tokens are masked as if there were none",
         twin("latent_attention"), check(checks.decoding_equals_one_pass, chunks=(5, 1, 2, 4)),
         seen="DeepSeek's inference code, whose mask knew no prefix: DeepSeek-V3 PR #1536")
def _(original, q_latent, q_pe, latent, mask, scale):
    return original(q_latent, q_pe, latent, torch.ones_like(mask).tril(), scale)


@mistake("every row is decoded at the position of the first one", at(Cache, "begin"), DECODING)
def _(original, self, T):
    self.positions = original(self, T)[:1].expand(len(self.length), -1)
    return self.positions


@mistake("the causal mask is transposed", twin("causal_attention"), CAUSAL, PARITY, seen=TEACHING)
def _(original, q_nope, q_pe, k_nope, k_pe, v, scale, mask):
    return original(*(t.flip(1) for t in (q_nope, q_pe, k_nope, k_pe, v)), scale).flip(1)


# ------------------------------------------------------------------------------------------- router


def routing(self, logits, replay, gates=None, scores=None) -> Routing:
    """What the router makes of its logits, with other gates(self, s, topk_idx) or affinities."""
    plain = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
    affinity = plain if scores is None else scores(self, logits)
    topk_idx = self.choose(affinity.detach()) if replay is None else replay
    if gates is not None:
        return Routing(topk_idx, gates(self, affinity, topk_idx), affinity)
    chosen = affinity.gather(-1, topk_idx)
    chosen = chosen / chosen.sum(-1, keepdim=True) if self.config.norm_topk_prob else chosen
    return Routing(topk_idx, chosen * self.config.routed_scaling_factor, affinity)


def router(patches, **how):
    def forward(self, u, replay=None):
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        return routing(self, F.linear(u, self.weight.to(u.dtype)), replay, **how)

    patches.setattr(Router, "forward", forward)


@stands_for("model.Router.forward")
def gates(patches, broken):
    router(patches, gates=broken)


@stands_for("model.Router.forward")
def scores(patches, broken):
    router(patches, scores=broken)


def normed(router, chosen):
    return chosen / chosen.sum(-1, keepdim=True) * router.config.routed_scaling_factor


mistake("the bias enters the gates, not only the choice", gates, ROUTER, PARITY,
        seen="a library's refactoring and an inference engine: transformers PR #41647, vllm PR #12002")(
    lambda self, s, idx: normed(self, (s + self.e_score_correction_bias).gather(-1, idx)))
mistake("the bias is added to the logits before the sigmoid", scores, ROUTER, PARITY, seen=TEACHING)(
    lambda self, logits: (logits + self.e_score_correction_bias).sigmoid())
mistake("gates are not normalised over the chosen experts", gates, ROUTER, PARITY, seen=TEACHING)(
    lambda self, s, idx: s.gather(-1, idx) * self.config.routed_scaling_factor)
mistake("gates are normalised over all experts", gates, ROUTER, PARITY)(
    lambda self, s, idx: normed(self, s).gather(-1, idx))
mistake("gates are normalised although the config says no (V2)", gates, PARITY_V2)(
    lambda self, s, idx: normed(self, s.gather(-1, idx)))
mistake("routed_scaling_factor is left out", gates, ROUTER, PARITY)(
    lambda self, s, idx: normed(self, s.gather(-1, idx)) / 2.5)
mistake("routed_scaling_factor is applied twice", gates, ROUTER, PARITY, seen=TEACHING)(
    lambda self, s, idx: normed(self, s.gather(-1, idx)) * 2.5)
mistake("gates carry no gradient, so the router never learns", gates, check(checks.gradients_equal_transformers))(
    lambda self, s, idx: normed(self, s.gather(-1, idx)).detach())
mistake("V3 scores with a softmax", scores, ROUTER, PARITY)(lambda self, logits: logits.softmax(-1))
mistake("the router runs in bf16", at(ours, "at_least_float32"), check(checks.router_stays_in_float32),
        seen="DeepSeek's inference code, and teaching repositories under autocast")(
    lambda original, dtype: dtype)


@mistake("the bias is ignored outside training", at(Router, "choose"), ROUTER, PARITY,
         check(checks.training_and_evaluation_route_alike), seen=TEACHING)
def _(original, self, affinity):
    return original(self, affinity if self.training else affinity - self.e_score_correction_bias)


@stands_for("model.Router.choose")
def group_score(patches, broken, fill=float("-inf")):
    """Another score of a group, (..., E/groups) -> (...), or another value for dropped experts."""

    def choose(self, affinity):
        c, bias = self.config, getattr(self, "e_score_correction_bias", 0.0)
        grouped = (affinity + bias).unflatten(-1, (c.n_group, -1))
        kept = broken(grouped).topk(c.topk_group, dim=-1).indices
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter_(-1, kept, False)
        left = grouped.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)
        return left.topk(c.num_experts_per_tok, dim=-1).indices

    patches.setattr(Router, "choose", choose)


def top2(grouped):
    return grouped.topk(2, dim=-1).values.sum(-1)


mistake("V3 scores a group by its best expert", group_score, ROUTER, PARITY, seen=TEACHING)(lambda grouped: grouped.amax(-1))
mistake("V2 scores a group by its two best experts", group_score, PARITY_V2)(top2)
mistake("dropped groups are set to 0, not to -inf: wrong once scores are negative",
        partial(group_score, fill=0.0), check(checks.router_follows_the_official_rule, -5.0),
        seen="a library: transformers#45440; asked in DeepSeek-V3#741")(top2)


@mistake("groups are strided, not consecutive experts", at(Router, "choose"), ROUTER, PARITY)
def _(original, self, affinity):
    order = torch.arange(16).view(4, 4).T.flatten()
    bias = self.e_score_correction_bias
    self.e_score_correction_bias = bias[order]
    chosen = order[original(self, affinity[..., order])]
    self.e_score_correction_bias = bias
    return chosen


# ------------------------------------------------------------------------------- bias and its loads

SIGN = check(checks.bias_moves_by_the_sign_of_the_load)
EVENS_OUT = check(checks.load_evens_out)
STEPS = check(checks.nothing_but_training_moves_the_bias)
STEPS_AND_EVALUATION = check(checks.nothing_but_training_moves_the_bias, disturbed=True)
STEPS_RECOMPUTED = check(checks.nothing_but_training_moves_the_bias, recompute=True)
MICRO_BATCHES = check(checks.micro_batches_give_the_bias_of_one_batch)
LOAD = check(checks.load_is_of_tokens_with_a_target)
IS_STATE = check(checks.bias_is_state_and_not_a_weight)

mistake("the bias moves the wrong way", at(Router, "update_bias"), SIGN, EVENS_OUT,
        seen="a teaching repository: in 1,000 of its updates max/mean load went from 1.46 to 1.82")(
    lambda original, self, load, speed: original(self, load, -speed))
mistake("the bias never moves", at(Router, "update_bias"), SIGN, EVENS_OUT,
        seen="a library and a training framework that only load it: maxtext#2494")(lambda original, self, load, speed: None)


@mistake("the bias moves in proportion to the load", at(Router, "update_bias"), SIGN)
def _(original, self, load, speed):
    self.e_score_correction_bias += speed * (load.mean() - load)


@mistake("the bias is kept in bf16: near 5 a step of 0.001 is lost", at(Router, "update_bias"), SIGN)
def _(original, self, load, speed):
    self.e_score_correction_bias = self.e_score_correction_bias.bfloat16()
    original(self, load, speed)
    self.e_score_correction_bias = self.e_score_correction_bias.float()


@stands_for("train.update_biases")
def noted_load(patches, broken):
    """The model keeps a load of its own, `broken(model, load)` after each forward pass with targets
    makes it, and the biases move by it, not by the load that a step has added up."""

    def forward(original, self, tokens, targets=None, *args, **named):
        out = original(self, tokens, targets, *args, **named)
        if targets is not None:
            self.noted = broken(self, out["load"])
        return out

    def update_biases(original, model, load, speed):
        original(model, model.noted, speed)
        model.was_updated = True

    at(Transformer, "forward")(patches, forward)
    at(train, "update_biases")(patches, update_biases)


@mistake("evaluation counts too", noted_load, STEPS_AND_EVALUATION, seen=TEACHING)
def _(model, load):
    is_first = model.__dict__.pop("was_updated", False)
    return load if is_first else getattr(model, "noted", 0) + load


@mistake("only the last micro-batch counts", noted_load, MICRO_BATCHES, STEPS, seen=TEACHING)
def _(model, load):
    return load


@mistake("counts are never cleared", noted_load, STEPS)
def _(model, load):
    return getattr(model, "noted", 0) + load * model.training


@mistake("the bias moves in every forward pass", at(Transformer, "forward"), MICRO_BATCHES, STEPS, STEPS_AND_EVALUATION,
         seen=TEACHING)
def _(original, self, tokens, targets=None, *args, **named):
    out = original(self, tokens, targets, *args, **named)
    if targets is not None:
        train.update_biases(self, out["load"], 0.01)
    return out


@stands_for("model.expert_load")
def inside_the_router(patches, broken):
    """Routers count what they choose, whoever asks, and `load` is what they have counted."""

    def route(original, self, u, replay=None):
        routing = original(self, u, replay)
        self.counts = broken(getattr(self, "counts", 0), routing.topk_idx.flatten())
        return routing

    def forward(original, self, *args, **named):
        out = original(self, *args, **named)
        if isinstance(out, dict) and "load" in out:
            routers = [moe.gate for _, moe in self.moe_layers()]
            out["load"] = torch.stack([router.counts for router in routers])
            for router in routers:
                router.counts = 0
        return out

    at(Router, "forward")(patches, route)
    at(Transformer, "forward")(patches, forward)


@mistake("counts are taken inside the router: evaluation and recomputation count again",
         inside_the_router, STEPS_AND_EVALUATION, STEPS_RECOMPUTED, LOAD,
         seen="a training framework, which halves its counts again under activation checkpointing")
def _(counts, topk_idx):
    return counts + torch.bincount(topk_idx, minlength=16).float()


@mistake("positions without a target count", at(ours, "expert_load"), LOAD)
def _(original, topk_idx, is_counted, experts):
    return original(topk_idx, torch.ones_like(is_counted), experts)


@mistake("the bias is a parameter of the optimizer", at(Router, "__init__"), IS_STATE,
         seen="a training framework: maxtext#2494")
def _(original, self, config):
    original(self, config)
    bias = self._buffers.pop("e_score_correction_bias")
    self.e_score_correction_bias = nn.Parameter(bias)


@mistake("the bias exists only at V3's width", at(Router, "__init__"), IS_STATE,
         seen="DeepSeek's inference code, where it depends on dim == 7168")
def _(original, self, config):
    original(self, config)
    if config.hidden_size != 7168:  # none: nothing is added, nothing moves
        del self.e_score_correction_bias
        self.e_score_correction_bias = torch.zeros(config.n_routed_experts, device="cpu")
        self.update_bias = lambda load, speed: None


@mistake("the bias is not saved", at(Router, "__init__"), IS_STATE, checks.saved_bits_are_the_weights)
def _(original, self, config):
    original(self, config)
    self._non_persistent_buffers_set.add("e_score_correction_bias")


mistake("a bf16 checkpoint narrows the bias", at(Router, "float"),
        checks.bf16_checkpoint_keeps_the_bias_wide)(lambda original, self: self)


# ------------------------------------------------------------------------------------- balance loss

LOOPS = check(checks.balance_loss_equals_the_loops)


@mistake("the balance loss is made of counts only: no gradient", at(ours, "balance_loss"), LOOPS,
         check(checks.balance_loss_reaches_the_router), seen=TEACHING)
def _(original, routing, mask):
    return original(replace(routing, affinity=routing.affinity.detach()), mask)


@mistake("the balance loss is taken over the batch", at(ours, "balance_loss"), LOOPS,
         check(checks.balance_loss_sees_each_sequence),
         seen="two teaching repositories; discussed in torchtitan PR #2061")
def _(original, routing, mask):
    one = replace(routing, affinity=routing.affinity.flatten(0, 1)[None], topk_idx=routing.topk_idx.flatten(0, 1)[None])
    return original(one, mask.flatten()[None]).expand(len(mask))


@mistake("the balance loss counts the experts chosen with bias", at(ours, "balance_loss"), LOOPS)
def _(original, routing, mask):
    E, K = routing.affinity.shape[-1], routing.topk_idx.shape[-1]
    weight = mask.unsqueeze(-1).to(routing.affinity.dtype)
    tokens = weight.sum(1)
    hits = torch.zeros_like(routing.affinity)
    hits.scatter_(-1, routing.topk_idx, weight.expand(-1, -1, K).contiguous())
    share = routing.affinity / routing.affinity.sum(-1, keepdim=True)
    return (hits.sum(1) * E / (K * tokens) * (share * weight).sum(1) / tokens).sum(-1)


# ---------------------------------------------------------------------------------------------- MTP


@stands_for("model.MTP.forward")
def joined(patches, broken):
    """`broken(self, h, ahead)` gives the two inputs of eh_proj, both normed, in their order."""

    def forward(self, h, ahead, freqs_cis, mask=None):
        h = self.eh_proj(torch.cat(broken(self, h, ahead), dim=-1))
        h, routing = super(MTP, self).forward(h, freqs_cis, mask)
        return self.shared_head["norm"](h), routing

    patches.setattr(MTP, "forward", forward)


mistake("MTP joins [hidden; embedding] as the paper prints it", joined, MTP_PARITY,
        seen="whoever follows the paper's equation: the released weights have the other order")(
    lambda self, h, ahead: (self.hnorm(h), self.enorm(ahead)))
mistake("MTP swaps enorm and hnorm", joined, MTP_PARITY)(lambda self, h, ahead: (self.hnorm(ahead), self.enorm(h)))


@stands_for("model.Transformer._mtp_loss")
def noting_the_state(patches, broken):
    """`trunk` also notes what its final norm got, for `_mtp_loss`."""

    def trunk(original, self, *args):
        hook = self.model.norm.register_forward_pre_hook(lambda _, inputs: setattr(self, "before_norm", inputs[0]))
        out = original(self, *args)
        hook.remove()
        return out

    at(Transformer, "trunk")(patches, trunk)
    at(Transformer, "_mtp_loss")(patches, broken)


mistake("MTP gets the state before the final norm", noting_the_state, MTP_PARITY,
        seen="an open question: DeepSeek-V3#839; vllm PR #12915 measured it as the better one")(
    lambda original, self, h, *rest: original(self, self.before_norm, *rest))


@stands_for("model.MTP.forward")
def chained(patches, broken):
    """`before` holds what the norm of the latest module got."""
    at(MTP, "forward")(patches, partial(broken, {}))


@mistake("MTP chains the state before shared_head.norm", chained, check(checks.mtp_equals_transformers, modules=2))
def _(before, original, self, h, *rest):
    is_first = self.self_attn.layer == self.self_attn.config.num_hidden_layers
    h = h if is_first else before["state"][:, : h.shape[1]]
    hook = self.shared_head["norm"].register_forward_pre_hook(lambda _, inputs: before.update(state=inputs[0]))
    out = original(self, h, *rest)
    hook.remove()
    return out


@mistake("MTP joins the embedding of the token that it predicts", at(MTP, "forward"), MTP_PARITY, AT_LN_VOCAB, CAUSAL,
         seen=TEACHING)
def _(original, self, h, ahead, *rest):
    return original(self, h, torch.cat((ahead[:, 1:], ahead[:, -1:]), 1), *rest)


@mistake("the MTP block attends to later tokens", at(MTP, "forward"), MTP_PARITY, AT_LN_VOCAB, CAUSAL, seen=TEACHING)
def _(original, self, *inputs):
    def both_ways(q_nope, q_pe, k_nope, k_pe, v, scale, mask):
        scores = torch.einsum("bthd,bshd->bhts", q_nope, k_nope)
        scores = scores + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)
        return torch.einsum("bhts,bshd->bthd", (scores * scale).softmax(-1), v)

    self.self_attn.ops = self.self_attn.ops._replace(causal_attention=both_ways)
    return original(self, *inputs)


@mistake("MTP predicts the token of the main head again", at(Transformer, "_mtp_loss"), MTP_PARITY, AT_LN_VOCAB)
def _(original, self, h, tokens, targets, *rest):
    return original(self, h, tokens, targets.roll(1, dims=1), *rest)  # [:, k:] is then the input i+k


@mistake("MTP has weights of its own for embedding and head", at(Transformer, "_mtp_loss"),
         check(checks.mtp_gradients_equal_transformers, modules=1))
def _(original, self, *inputs):
    shared = [self.model.embed_tokens.weight, self.lm_head.weight]
    for p in shared:
        p.requires_grad_(False)
    out = original(self, *inputs)
    for p in shared:
        p.requires_grad_(True)
    return out


mistake("the MTP layer has another index than num_hidden_layers", at(checkpoint, "published_names"), loads_as_mtp)(
    lambda original, *inputs: {name.replace("model.layers.3.", "mtp.0."): tensor
                               for name, tensor in original(*inputs).items()})


# --------------------------------------------------------------------- experts, head, losses, files


@mistake("an expert has a capacity and drops tokens", at(Experts, "forward"), check(checks.rows_do_not_touch), PARITY)
def _(original, self, u, routing):
    flat = routing.topk_idx.flatten(0, 1)  # (N, K)
    hits = F.one_hot(flat, 16).sum(1)  # (N, E)
    place = (hits.cumsum(0) - hits).gather(-1, flat).view_as(routing.topk_idx)
    fits = place < hits.sum() / 16  # capacity factor 1
    return original(self, u, replace(routing, gates=routing.gates * fits))


@mistake("an expert's capacity goes to its best tokens first, so later tokens push earlier ones out",
         at(Experts, "forward"), CAUSAL, seen="a teaching repository of MoE")
def _(original, self, u, routing):
    affinity = routing.affinity.gather(-1, routing.topk_idx)
    fits = torch.zeros_like(routing.gates)
    for expert in range(16):
        mine = affinity.where(routing.topk_idx == expert, -1.0).flatten()
        best = mine.topk(max(1, affinity.numel() // 20)).indices
        fits.view(-1)[best[mine[best] > 0]] = 1.0
    return original(self, u, replace(routing, gates=routing.gates * fits))


@mistake("routed_scaling_factor also scales the shared expert", at(MoE, "forward"), PARITY)
def _(original, self, u, replay=None):
    y, routing = original(self, u, replay)
    return y + self.shared_experts(u) * (self.gate.config.routed_scaling_factor - 1), routing


mistake("two shared experts are two modules of one width, and one is lost", at(MoE, "__init__"),
        check(checks.logits_equal_transformers, n_shared_experts=2))(
    lambda original, self, config: original(self, replace(config, n_shared_experts=1)))
mistake("gate and up are swapped in the stacked experts", twin("expert_ffn"), PARITY)(
    lambda original, u, gate_up, *rest: original(u, gate_up.roll(gate_up.shape[1] // 2, 1), *rest))


@mistake("the head is tied to the embedding", at(Transformer, "__init__"), check(checks.head_is_not_the_embedding))
def _(original, self, *inputs, **named):
    original(self, *inputs, **named)
    self.lm_head.weight = self.model.embed_tokens.weight


TARGETS = check(checks.cross_entropy_is_of_the_given_targets)
mistake("labels are shifted again inside the model", at(Transformer, "_nll"), TARGETS,
        seen="a teaching repository, where loader and model both shifted")(
    lambda original, self, h, targets: original(self, h, F.pad(targets[:, 1:], (0, 1), value=-100)))
mistake("the mean is over all positions, ignored ones too", at(ours, "_reduce"), TARGETS)(
    lambda original, nll, mask, how: nll.sum() if how == "sum" else nll.mean())


@mistake("weights are saved in half precision", at(checkpoint, "write_tensors"), checks.saved_bits_are_the_weights,
         seen="a teaching repository, in its state to resume from")
def _(original, path, tensors, *rest):
    narrow = {name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}
    return original(path, narrow, *rest)


@stands_for("data.io.checkpoint.save_weights")
def while_saving(patches, broken):
    """Other names of the tensors on disk, but not where they are read back."""

    def save_weights(original, directory, tensors, *rest, **named):
        original(directory, broken(tensors), *rest, **named)

    at(checkpoint, "save_weights")(patches, save_weights)


@mistake("the rows of one expert are written under the name of another", while_saving,
         checks.saved_bits_are_the_weights)
def _(tensors):
    a, b = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (3, 4))
    return tensors | {a: tensors[b], b: tensors[a]}
