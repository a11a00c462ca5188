"""Known mistakes, put in on purpose: each must turn the named check of checks.py red.

The same checks are green on the model as it is in test_model.py and test_checkpoint.py, so every test here
says that a check can fail. The mistakes are those of public reimplementations; `python -m pytest -v
tests/test_pitfalls.py` prints the list.
"""

import math
from dataclasses import dataclass
from typing import Callable

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import YARN
from torch import Tensor, nn

import kernels
import model as ours
from model import MTP, Attention, Cache, Experts, MoE, Router, Routing, Transformer, save_pretrained

MISTAKES: dict[str, "Mistake"] = {}


@dataclass
class Mistake:
    """How to break the model, and the checks that must notice."""

    put_in: Callable  # put_in(monkeypatch)
    noticed_by: tuple[Callable, ...]


def mistake(text: str, *noticed_by: Callable):
    """Registers a function that puts a mistake in."""

    def register(put_in):
        MISTAKES[text] = Mistake(put_in, noticed_by)
        return put_in

    return register


def check(function, *argv, **changes) -> Callable:
    """A check with its arguments; one that wants a directory gets it when it runs."""
    return lambda tmp_path: function(*argv, **changes)


def check_files(function) -> Callable:
    return lambda tmp_path: function(tmp_path)


def loads_as_mtp(tmp_path):
    model = checks.build()
    save_pretrained(model, tmp_path)
    checks.transformers_loads_the_mtp_layer(tmp_path, model)


PARITY = check(checks.logits_equal_transformers, T=60)
PARITY_YARN = check(checks.logits_equal_transformers, T=60, **YARN)
PARITY_V2 = check(checks.logits_equal_transformers, T=60, **checks.ARCHITECTURES["v2"])
ROUTER = check(checks.router_follows_the_official_rule)


# ------------------------------------------------------------------------------ attention, RoPE and YaRN


@mistake("the norm of the latent covers the shared rope key too", PARITY)
def _(monkeypatch):
    def latents(self, h, step):
        c_kv, k_pe = self.kv_a_proj_with_mqa(h).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        k_pe = F.rms_norm(k_pe, k_pe.shape[-1:], eps=1e-6)
        k_pe = step.ops.apply_rope(k_pe.unsqueeze(2), step.turn).squeeze(2)
        return torch.cat((self.kv_a_layernorm(c_kv, step.ops), k_pe), dim=-1)

    monkeypatch.setattr(Attention, "latents", latents)


@mistake("the latent is cached and used without its norm", PARITY)
def _(monkeypatch):
    def latents(self, h, step):
        c_kv, k_pe = self.kv_a_proj_with_mqa(h).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        return torch.cat((c_kv, step.ops.apply_rope(k_pe.unsqueeze(2), step.turn).squeeze(2)), dim=-1)

    monkeypatch.setattr(Attention, "latents", latents)


@mistake("the latent norms use rms_norm_eps", check(checks.logits_equal_transformers, **checks.ARCHITECTURES["moonlight"]))
def _(monkeypatch):
    original = Attention.__init__

    def init(self, config):
        original(self, config)
        self.kv_a_layernorm.eps = config.rms_norm_eps

    monkeypatch.setattr(Attention, "__init__", init)


def set_rope(monkeypatch, broken):
    monkeypatch.setitem(kernels.OPS, "apply_rope", kernels.Op(broken, broken))


@mistake("RoPE rotates halves instead of adjacent pairs", PARITY)
def _(monkeypatch):
    def halves(x, turn):
        (one, two), cos, sin = x.chunk(2, dim=-1), turn.real, turn.imag
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)

    set_rope(monkeypatch, halves)


@mistake("RoPE on the reconstructed keys of each head: nothing left to absorb", PARITY,
         check(checks.absorbed_equals_expanded), check(checks.decoding_equals_one_pass))
def _(monkeypatch):
    original = Attention.expanded

    def expanded(self, q_nope, q_pe, latent, step):
        c_kv = latent[..., : self.config.kv_lora_rank]
        weight = self.kv_b_proj.weight.unflatten(0, (self.config.num_attention_heads, -1))[:, : q_nope.shape[-1]]
        keys = torch.einsum("bsr,hdr->bshd", c_kv, weight)
        extra = step.ops.apply_rope(keys, step.turn) - keys
        kernel = step.ops.causal_attention
        ops = step.ops._replace(causal_attention=lambda q, qp, k, *rest: kernel(q, qp, k + extra, *rest))
        return original(self, q_nope, q_pe, latent, ours.replace(step, ops=ops))

    monkeypatch.setattr(Attention, "expanded", expanded)


def set_scale(monkeypatch, scale):
    original = Attention.__init__

    def init(self, config):
        original(self, config)
        self.scale = scale(config)

    monkeypatch.setattr(Attention, "__init__", init)


def plain_scale(config):
    return (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


@mistake("mscale enters the softmax scale once, not squared", PARITY_YARN)
def _(monkeypatch):
    set_scale(monkeypatch, lambda c: plain_scale(c) * ours.yarn_mscale(c.rope_factor, c.rope_mscale_all_dim))


@mistake("the softmax scale leaves mscale out (SDPA's default scale)", PARITY_YARN)
def _(monkeypatch):
    set_scale(monkeypatch, plain_scale)


@mistake("mscale without YaRN", PARITY)
def _(monkeypatch):
    monkeypatch.setattr(ours, "yarn_mscale", lambda factor, mscale: 0.1 * mscale * math.log(40) + 1.0)


@mistake("the softmax scale comes from mscale, not from mscale_all_dim",
         check(checks.logits_equal_transformers, **checks.ARCHITECTURES["v3 mscale below mscale_all_dim"]))
def _(monkeypatch):
    set_scale(monkeypatch, lambda c: plain_scale(c) * ours.yarn_mscale(c.rope_factor, c.rope_mscale) ** 2)


@mistake("the softmax scale divides by the nope width only", PARITY)
def _(monkeypatch):
    set_scale(monkeypatch, lambda config: config.qk_nope_head_dim**-0.5)


@mistake("cos and sin are multiplied by mscale although it should cancel", PARITY_YARN)
def _(monkeypatch):
    original = Transformer._new_pass

    def new_pass(self, tokens, cache):
        step, size = original(self, tokens, cache), ours.yarn_mscale(self.config.rope_factor, 1.0)
        return ours.replace(step, turn=step.turn * size)

    monkeypatch.setattr(Transformer, "_new_pass", new_pass)


@mistake("YaRN slows the fast pairs and keeps the slow ones", PARITY_YARN)
def _(monkeypatch):
    original = ours.rope_frequencies

    def swapped(config, device=None):
        plain = original(ours.replace(config, rope_factor=1.0), device)
        return plain + plain / config.rope_factor - original(config, device)

    monkeypatch.setattr(ours, "rope_frequencies", swapped)


@mistake("the cache holds keys and values of every head", check(checks.cache_holds_latents_only))
def _(monkeypatch):
    original = Cache.__init__

    def init(self, config, batch, capacity, device=None, dtype=torch.float32):
        original(self, config, batch, capacity, device, dtype)
        width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.expanded = torch.zeros(config.num_hidden_layers, batch, capacity, width)

    monkeypatch.setattr(Cache, "__init__", init)


@mistake("after a prefix, several new tokens are masked as if there were none",
         check(checks.decoding_equals_one_pass, chunks=(5, 1, 2, 4)))
def _(monkeypatch):
    original = kernels.latent_attention_reference

    def square_mask(q_latent, q_pe, latent, hidden, scale):
        later = torch.ones(q_latent.shape[1], latent.shape[1], dtype=torch.bool).triu(1)
        return original(q_latent, q_pe, latent, later.expand(len(latent), -1, -1), scale)

    monkeypatch.setitem(kernels.OPS, "latent_attention", kernels.Op(square_mask, square_mask))


@mistake("every row is decoded at the position of the first one", check(checks.decoding_equals_one_pass))
def _(monkeypatch):
    original = Transformer._new_pass

    def new_pass(self, tokens, cache):
        if cache is not None:
            cache = cache.select(torch.arange(len(cache.length)))
            cache.length = cache.length[:1].expand_as(cache.length)
        return original(self, tokens, cache)

    monkeypatch.setattr(Transformer, "_new_pass", new_pass)


@mistake("the causal mask is transposed", check(checks.nothing_sees_the_future), PARITY)
def _(monkeypatch):
    original = kernels.causal_attention_reference

    def backwards(q_nope, q_pe, k_nope, k_pe, v, scale, since):
        return original(*(t.flip(1) for t in (q_nope, q_pe, k_nope, k_pe, v)), scale).flip(1)

    monkeypatch.setitem(kernels.OPS, "causal_attention", kernels.Op(backwards, backwards))


# ------------------------------------------------------------------------------------------------ router


def set_router(monkeypatch, gates=None, scores=None):
    """The router with other gates(self, affinity, topk_idx) or other affinities(logits)."""

    def forward(self, u, replay=None):
        logits = F.linear(u.float() if u.dtype == torch.bfloat16 else u, self.weight.to(u.dtype))
        plain = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        affinity = plain if scores is None else scores(self, logits)
        topk_idx = self.choose(affinity.detach()) if replay is None else replay
        chosen = affinity.gather(-1, topk_idx)
        if gates is not None:
            return Routing(topk_idx, gates(self, affinity, topk_idx), affinity)
        chosen = chosen / chosen.sum(-1, keepdim=True) if self.config.norm_topk_prob else chosen
        return Routing(topk_idx, chosen * self.config.routed_scaling_factor, affinity)

    monkeypatch.setattr(Router, "forward", forward)


def normed(router, chosen):
    return chosen / chosen.sum(-1, keepdim=True) * router.config.routed_scaling_factor


@mistake("the bias enters the gates, not only the choice", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, (s + self.e_score_correction_bias).gather(-1, idx)))


@mistake("the bias is added to the logits before the sigmoid", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, scores=lambda self, logits: (logits + self.e_score_correction_bias).sigmoid())


@mistake("the bias is ignored outside training", ROUTER, PARITY, check(checks.training_and_evaluation_route_alike))
def _(monkeypatch):
    original = Router.choose

    def choose(self, affinity):
        bias = self.e_score_correction_bias
        return original(self, affinity if self.training else affinity - bias)

    monkeypatch.setattr(Router, "choose", choose)


@mistake("gates are not normalised over the chosen experts", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: s.gather(-1, idx) * self.config.routed_scaling_factor)


@mistake("gates are normalised over all experts", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, s).gather(-1, idx))


@mistake("gates are normalised although the config says no (V2)", PARITY_V2)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, s.gather(-1, idx)))


@mistake("routed_scaling_factor is left out", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, s.gather(-1, idx)) / 2.5)


@mistake("routed_scaling_factor is applied twice", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, s.gather(-1, idx)) * 2.5)


@mistake("gates carry no gradient, so the router never learns", check(checks.gradients_equal_transformers))
def _(monkeypatch):
    set_router(monkeypatch, gates=lambda self, s, idx: normed(self, s.gather(-1, idx)).detach())


@mistake("V3 scores with a softmax", ROUTER, PARITY)
def _(monkeypatch):
    set_router(monkeypatch, scores=lambda self, logits: logits.softmax(-1))


@mistake("the router runs in bf16", check(checks.router_stays_in_float32))
def _(monkeypatch):
    monkeypatch.setattr(ours, "at_least_float32", lambda dtype: dtype)


def set_choice(monkeypatch, group_score, fill=float("-inf")):
    """The choice with another score of a group (..., E/groups) -> (...), or another value for dropped ones."""

    def choose(self, affinity):
        c = self.config
        scores = affinity + self.e_score_correction_bias if hasattr(self, "e_score_correction_bias") else affinity
        grouped = scores.unflatten(-1, (c.n_group, -1))
        kept = group_score(grouped).topk(c.topk_group, dim=-1).indices
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter_(-1, kept, False)
        scores = grouped.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)
        return scores.topk(c.num_experts_per_tok, dim=-1).indices

    monkeypatch.setattr(Router, "choose", choose)


def top2(grouped):
    return grouped.topk(2, dim=-1).values.sum(-1)


@mistake("V3 scores a group by its best expert", ROUTER, PARITY)
def _(monkeypatch):
    set_choice(monkeypatch, lambda grouped: grouped.amax(-1))


@mistake("V2 scores a group by its two best experts", PARITY_V2)
def _(monkeypatch):
    set_choice(monkeypatch, top2)


@mistake("dropped groups are set to 0, not to -inf: wrong once scores are negative",
         check(checks.router_follows_the_official_rule, -5.0))
def _(monkeypatch):
    set_choice(monkeypatch, top2, fill=0.0)


@mistake("groups are strided, not consecutive experts", ROUTER, PARITY)
def _(monkeypatch):
    original = Router.choose

    def choose(self, affinity):
        order = torch.arange(16).view(4, 4).T.flatten()
        bias = self.e_score_correction_bias
        self.e_score_correction_bias = bias[order]
        chosen = order[original(self, affinity[..., order])]
        self.e_score_correction_bias = bias
        return chosen

    monkeypatch.setattr(Router, "choose", choose)


# ------------------------------------------------------------------------------------- bias and its counts


@mistake("the bias moves the wrong way", check(checks.bias_moves_by_the_sign_of_the_load), check(checks.load_evens_out))
def _(monkeypatch):
    original = Router.update_bias
    monkeypatch.setattr(Router, "update_bias", lambda self, speed: original(self, -speed))


@mistake("the bias never moves", check(checks.bias_moves_by_the_sign_of_the_load), check(checks.load_evens_out))
def _(monkeypatch):
    monkeypatch.setattr(Router, "update_bias", lambda self, speed: self.counts.zero_())


@mistake("the bias moves in proportion to the load", check(checks.bias_moves_by_the_sign_of_the_load))
def _(monkeypatch):
    def update_bias(self, speed):
        self.e_score_correction_bias += speed * (self.counts.mean() - self.counts)
        self.counts.zero_()

    monkeypatch.setattr(Router, "update_bias", update_bias)


@mistake("the bias is kept in bf16: near 5 a step of 0.001 is lost", check(checks.bias_moves_by_the_sign_of_the_load))
def _(monkeypatch):
    original = Router.update_bias

    def update_bias(self, speed):
        self.e_score_correction_bias = self.e_score_correction_bias.bfloat16()
        original(self, speed)
        self.e_score_correction_bias = self.e_score_correction_bias.float()

    monkeypatch.setattr(Router, "update_bias", update_bias)


@mistake("the bias moves in every forward pass", check(checks.nothing_but_training_counts),
         check(checks.micro_batches_give_the_bias_of_one_batch))
def _(monkeypatch):
    original = Router.count

    def count(self, topk_idx, is_counted):
        original(self, topk_idx, is_counted)
        self.update_bias(0.01)

    monkeypatch.setattr(Router, "count", count)


@mistake("counts are taken inside the router: evaluation and recomputation count again",
         check(checks.nothing_but_training_counts), check(checks.counts_are_of_trained_tokens))
def _(monkeypatch):
    original, count = Router.forward, Router.count

    def forward(self, u, replay=None):
        routing = original(self, u, replay)
        count(self, routing.topk_idx, torch.ones(u.shape[:2], dtype=torch.bool))
        return routing

    monkeypatch.setattr(Router, "forward", forward)
    monkeypatch.setattr(Router, "count", lambda self, topk_idx, is_counted: None)


@mistake("evaluation counts too", check(checks.nothing_but_training_counts))
def _(monkeypatch):
    original = Transformer.forward

    def forward(self, tokens, targets=None, **how):
        was, self.training = self.training, True
        try:
            return original(self, tokens, targets, **how)
        finally:
            self.training = was

    monkeypatch.setattr(Transformer, "forward", forward)


@mistake("only the last micro-batch counts", check(checks.micro_batches_give_the_bias_of_one_batch))
def _(monkeypatch):
    original = Router.count

    def count(self, topk_idx, is_counted):
        self.counts.zero_()
        original(self, topk_idx, is_counted)

    monkeypatch.setattr(Router, "count", count)


@mistake("positions without a target count", check(checks.counts_are_of_trained_tokens))
def _(monkeypatch):
    original = Router.count
    monkeypatch.setattr(Router, "count", lambda self, idx, mask: original(self, idx, torch.ones_like(mask)))


@mistake("counts are never cleared", check(checks.nothing_but_training_counts),
         check(checks.bias_moves_by_the_sign_of_the_load))
def _(monkeypatch):
    def update_bias(self, speed):
        self.e_score_correction_bias += speed * torch.sign(self.counts.mean() - self.counts)

    monkeypatch.setattr(Router, "update_bias", update_bias)


def with_bias(monkeypatch, change):
    original = Router.__init__

    def init(self, config):
        original(self, config)
        change(self, config)

    monkeypatch.setattr(Router, "__init__", init)


@mistake("the bias is a parameter of the optimizer", check(checks.bias_is_state_and_not_a_weight))
def _(monkeypatch):
    def as_parameter(router, config):
        bias = router._buffers.pop("e_score_correction_bias")
        router.e_score_correction_bias = nn.Parameter(bias)

    with_bias(monkeypatch, as_parameter)


@mistake("the bias exists only at V3's width", check(checks.bias_is_state_and_not_a_weight))
def _(monkeypatch):
    def only_wide(router, config):
        if config.hidden_size != 7168:
            del router._buffers["e_score_correction_bias"]

    with_bias(monkeypatch, only_wide)


@mistake("the bias is not saved", check(checks.bias_is_state_and_not_a_weight),
         check_files(checks.saved_bits_are_the_weights))
def _(monkeypatch):
    with_bias(monkeypatch, lambda router, _: router._non_persistent_buffers_set.add("e_score_correction_bias"))


@mistake("a bf16 checkpoint narrows the bias", check_files(checks.bf16_checkpoint_keeps_the_bias_wide))
def _(monkeypatch):
    monkeypatch.setattr(Router, "float", lambda self: self)


# ------------------------------------------------------------------------------------------ balance loss


@mistake("the balance loss is made of counts only: no gradient", check(checks.balance_loss_equals_the_loops),
         check(checks.balance_loss_reaches_the_router))
def _(monkeypatch):
    original = ours.balance_loss

    def counted_only(routing, mask):
        return original(ours.replace(routing, affinity=routing.affinity.detach()), mask)

    patch_balance(monkeypatch, counted_only)


@mistake("the balance loss is taken over the batch", check(checks.balance_loss_sees_each_sequence),
         check(checks.balance_loss_equals_the_loops))
def _(monkeypatch):
    original = ours.balance_loss

    def over_the_batch(routing, mask):
        B = len(mask)
        one = ours.replace(routing, affinity=routing.affinity.flatten(0, 1)[None],
                           topk_idx=routing.topk_idx.flatten(0, 1)[None])
        return original(one, mask.flatten()[None]).expand(B)

    patch_balance(monkeypatch, over_the_batch)


@mistake("the balance loss counts the experts chosen with bias", check(checks.balance_loss_equals_the_loops))
def _(monkeypatch):
    def of_the_routed(routing, mask):
        E, K = routing.affinity.shape[-1], routing.topk_idx.shape[-1]
        weight = mask.unsqueeze(-1).to(routing.affinity.dtype)
        tokens = weight.sum(1)
        hits = torch.zeros_like(routing.affinity).scatter_(-1, routing.topk_idx, weight.expand(-1, -1, K).contiguous())
        share = routing.affinity / routing.affinity.sum(-1, keepdim=True)
        return (hits.sum(1) * E / (K * tokens) * (share * weight).sum(1) / tokens).sum(-1)

    patch_balance(monkeypatch, of_the_routed)


def patch_balance(monkeypatch, broken):
    monkeypatch.setattr(ours, "balance_loss", broken)
    monkeypatch.setattr(checks, "balance_loss", broken)


# --------------------------------------------------------------------------------------------------- MTP


def set_mtp_inputs(monkeypatch, change):
    """`change(self, h, ahead, step)` gives the two inputs of eh_proj, both normed, in their order."""

    def forward(self, h, ahead, step):
        joined = torch.cat(change(self, h, ahead, step), dim=-1)
        h, routing = super(MTP, self).forward(self.eh_proj(joined), step)
        return self.shared_head["norm"](h, step.ops), routing

    monkeypatch.setattr(MTP, "forward", forward)


@mistake("MTP joins [hidden; embedding] as the paper prints it", check(checks.mtp_equals_transformers))
def _(monkeypatch):
    set_mtp_inputs(monkeypatch, lambda self, h, ahead, step: (self.hnorm(h, step.ops), self.enorm(ahead, step.ops)))


@mistake("MTP swaps enorm and hnorm", check(checks.mtp_equals_transformers))
def _(monkeypatch):
    set_mtp_inputs(monkeypatch, lambda self, h, ahead, step: (self.hnorm(ahead, step.ops), self.enorm(h, step.ops)))


@mistake("MTP gets the state before the final norm", check(checks.mtp_equals_transformers))
def _(monkeypatch):
    trunk, mtp_loss = Transformer.trunk, Transformer._mtp_loss

    def keeping(self, tokens, step, replay=None):
        hook = self.model.norm.register_forward_pre_hook(lambda _, inputs: setattr(self, "before_norm", inputs[0]))
        out = trunk(self, tokens, step, replay)
        hook.remove()
        return out

    monkeypatch.setattr(Transformer, "trunk", keeping)
    monkeypatch.setattr(Transformer, "_mtp_loss", lambda self, h, *rest: mtp_loss(self, self.before_norm, *rest))


@mistake("MTP chains the state before shared_head.norm", check(checks.mtp_equals_transformers, modules=2))
def _(monkeypatch):
    """The second module reads what the first one gave before its norm."""
    before, original = {}, MTP.forward

    def forward(self, h, ahead, step):
        h = before.get("state", h)[:, : h.shape[1]]
        hook = self.shared_head["norm"].register_forward_pre_hook(lambda _, inputs: before.update(state=inputs[0]))
        out = original(self, h, ahead, step)
        hook.remove()
        return out

    monkeypatch.setattr(MTP, "forward", forward)


def shift_embeddings(monkeypatch, by: int):
    """Module k sees Emb(t_{i+k+by}), the last ones repeated."""
    original = MTP.forward

    def forward(self, h, ahead, step):
        ahead = torch.cat((ahead, ahead[:, -1:].expand(-1, 2, -1)), 1)[:, by : by + h.shape[1]]
        return original(self, h, ahead, step)

    monkeypatch.setattr(MTP, "forward", forward)


@mistake("MTP joins the embedding of the token that it predicts", check(checks.mtp_equals_transformers),
         check(checks.random_tokens_stay_at_ln_vocab), check(checks.nothing_sees_the_future))
def _(monkeypatch):
    shift_embeddings(monkeypatch, by=1)


@mistake("the MTP block attends to later tokens", check(checks.mtp_equals_transformers),
         check(checks.random_tokens_stay_at_ln_vocab), check(checks.nothing_sees_the_future))
def _(monkeypatch):
    original = MTP.forward

    def both_ways(q_nope, q_pe, k_nope, k_pe, v, scale, since):
        scores = torch.einsum("bthd,bshd->bhts", q_nope, k_nope) + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)
        return torch.einsum("bhts,bshd->bthd", (scores * scale).softmax(-1), v)

    def forward(self, h, ahead, step):
        return original(self, h, ahead, ours.replace(step, ops=step.ops._replace(causal_attention=both_ways)))

    monkeypatch.setattr(MTP, "forward", forward)


@mistake("MTP predicts the token of the main head again", check(checks.mtp_equals_transformers),
         check(checks.random_tokens_stay_at_ln_vocab))
def _(monkeypatch):
    original = Transformer._mtp_loss

    def mtp_loss(self, h, tokens, targets, *rest):
        return original(self, h, tokens, targets.roll(1, dims=1), *rest)  # [:, k:] is then the input i+k

    monkeypatch.setattr(Transformer, "_mtp_loss", mtp_loss)


@mistake("MTP has weights of its own for embedding and head", check(checks.mtp_gradients_equal_transformers, modules=1))
def _(monkeypatch):
    original = Transformer._mtp_loss

    def mtp_loss(self, h, *rest):
        shared = [self.model.embed_tokens.weight, self.lm_head.weight]
        for p in shared:
            p.requires_grad_(False)
        loss = original(self, h, *rest)
        for p in shared:
            p.requires_grad_(True)
        return loss

    monkeypatch.setattr(Transformer, "_mtp_loss", mtp_loss)


@mistake("the MTP layer has another index than num_hidden_layers", loads_as_mtp)
def _(monkeypatch):
    original = ours.disk_tensors
    monkeypatch.setattr(ours, "disk_tensors", lambda model: {
        name.replace("model.layers.3.", "mtp.0."): tensor for name, tensor in original(model).items()})


# --------------------------------------------------------------------------- experts, head, losses, files


@mistake("an expert has a capacity and drops tokens", check(checks.rows_do_not_touch), PARITY)
def _(monkeypatch):
    original = Experts.forward

    def forward(self, u, routing, ops):
        hits = F.one_hot(routing.topk_idx.flatten(0, 1), 16).sum(1)  # (N, E)
        place = (hits.cumsum(0) - hits).gather(-1, routing.topk_idx.flatten(0, 1)).view_as(routing.topk_idx)
        fits = place < hits.sum() / 16  # capacity factor 1
        return original(self, u, ours.replace(routing, gates=routing.gates * fits), ops)

    monkeypatch.setattr(Experts, "forward", forward)


@mistake("an expert's capacity goes to its best tokens first, so later tokens push earlier ones out",
         check(checks.nothing_sees_the_future))
def _(monkeypatch):
    original = Experts.forward

    def forward(self, u, routing, ops):
        affinity = routing.affinity.gather(-1, routing.topk_idx)
        fits = torch.zeros_like(routing.gates)
        for expert in range(16):
            mine = torch.where(routing.topk_idx == expert, affinity, affinity.new_full((), -1.0)).flatten()
            best = mine.topk(max(1, affinity.numel() // 20)).indices
            fits.view(-1)[best[mine[best] > 0]] = 1.0
        return original(self, u, ours.replace(routing, gates=routing.gates * fits), ops)

    monkeypatch.setattr(Experts, "forward", forward)


@mistake("routed_scaling_factor also scales the shared expert", PARITY)
def _(monkeypatch):
    def forward(self, u, ops, replay=None):
        routing = self.gate(u, replay)
        return self.experts(u, routing, ops) + self.shared_experts(u) * self.gate.config.routed_scaling_factor, routing

    monkeypatch.setattr(MoE, "forward", forward)


@mistake("two shared experts are two modules of one width, and one is lost",
         check(checks.logits_equal_transformers, n_shared_experts=2))
def _(monkeypatch):
    original = MoE.__init__

    def init(self, config):
        original(self, ours.replace(config, n_shared_experts=1))

    monkeypatch.setattr(MoE, "__init__", init)


@mistake("gate and up are swapped in the stacked experts", PARITY)
def _(monkeypatch):
    original = kernels.expert_ffn_reference

    def swapped(u, gate_up, down, topk_idx, gates):
        return original(u, torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1), down, topk_idx, gates)

    monkeypatch.setitem(kernels.OPS, "expert_ffn", kernels.Op(swapped, swapped))


@mistake("the head is tied to the embedding", check(checks.head_is_not_the_embedding))
def _(monkeypatch):
    original = Transformer.__init__

    def init(self, config, impl="fused", init=True):
        original(self, config, impl, init)
        self.lm_head.weight = self.model.embed_tokens.weight

    monkeypatch.setattr(Transformer, "__init__", init)


@mistake("labels are shifted again inside the model", check(checks.cross_entropy_is_of_the_given_targets))
def _(monkeypatch):
    original = Transformer._nll

    def nll(self, h, targets):
        again = F.pad(targets[:, 1:], (0, 1), value=-100)
        return original(self, h, again)

    monkeypatch.setattr(Transformer, "_nll", nll)


@mistake("the mean is over all positions, ignored ones too", check(checks.cross_entropy_is_of_the_given_targets))
def _(monkeypatch):
    monkeypatch.setattr(ours, "_reduce", lambda nll, mask, how: nll.sum() if how == "sum" else nll.mean())


@mistake("weights are saved in half precision", check_files(checks.saved_bits_are_the_weights))
def _(monkeypatch):
    original = ours.save_file

    def narrow(tensors: dict[str, Tensor], *rest, **how):
        return original({name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}, *rest, **how)

    monkeypatch.setattr(ours, "save_file", narrow)


@mistake("the rows of one expert are written under the name of another", check_files(checks.saved_bits_are_the_weights))
def _(monkeypatch):
    loading, original = [False], ours.disk_tensors

    def mixed(model):
        views = original(model)
        if not loading[0]:  # saving
            loading[0] = True
            a, b = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (3, 4))
            views[a], views[b] = views[b], views[a]
        return views

    monkeypatch.setattr(ours, "disk_tensors", mixed)


# ------------------------------------------------------------------------------------------------ the test


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_is_noticed(text, monkeypatch, tmp_path):
    broken = MISTAKES[text]
    broken.put_in(monkeypatch)
    for i, notices in enumerate(broken.noticed_by):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(AssertionError):
            notices(tmp_path / str(i))


def test_the_checks_are_green_without_a_mistake(tmp_path):
    """The very calls that the mistakes turn red."""
    calls = {id(c): c for broken in MISTAKES.values() for c in broken.noticed_by}
    for i, notices in enumerate(calls.values()):
        (tmp_path / str(i)).mkdir()
        notices(tmp_path / str(i))
