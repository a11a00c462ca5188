"""DeepSeek-V3 in plain PyTorch: MLA, DeepSeekMoE balanced by a bias, multi-token prediction.

Papers: V2 = arXiv 2405.04434, V3 = arXiv 2412.19437, LF = arXiv 2408.15664 (balancing without a
loss). Weights and config fields have Hugging Face's names, local tensors the papers'. Shapes,
everywhere in this repository (in brackets the papers' own symbol where it is another):

    B   batch                    T   tokens in this call          S   keys visible, S >= T
    N   B*T tokens               C   hidden_size (d)              V   vocabulary
    H   heads (n_h)              D   qk_nope_head_dim (d_h)       P   qk_rope_head_dim (d_h^R)
    R   kv_lora_rank (d_c)       Dv  v_head_dim (d_h)             F   width of an FFN
    E   routed experts (N_r)     K   experts per token (K_r)      L   layers (l)
    Q   questions (RL)           G   answers to each (RL)

In this order: Config, norm and FFN, rotary positions, cache, attention, experts, transformer, cost.

    python model.py v3      the self-portrait of a preset or of a checkpoint directory
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from data.io import checkpoint
from data.io.cli import Knobs, UserError, knob, nearest, parse_flags, run_main
from data.io.portrait import PortraitConfig, check_memory, parameter_counts, portrait, shared_out
from kernels import IGNORE, Kernels, at_least_float32, choose, document_mask


@dataclass(frozen=True)
class Config(Knobs):
    """Every size and switch of the architecture, V3's by default. Raises UserError where they clash."""

    vocab_size: int = knob(129280, "V", least=1)
    hidden_size: int = knob(7168, "C", least=1)
    intermediate_size: int = knob(18432, "F of the dense layers", least=1)
    num_hidden_layers: int = knob(61, "L", least=1)
    max_position_embeddings: int = knob(4096, "the longest text", least=1)
    rms_norm_eps: float = knob(1e-6, "of the norms in blocks", least=0)
    initializer_range: float = knob(0.006, "in presets about 0.5 / sqrt(hidden_size)", least=0)
    bos_token_id: int = knob(0, "begins a document", least=0)
    eos_token_id: int = knob(1, "ends a text", least=0)

    num_attention_heads: int = knob(128, "H", least=1)
    q_lora_rank: int | None = knob(1536, "None: queries straight from the hidden state", least=1)
    kv_lora_rank: int = knob(512, "R", least=1)
    qk_nope_head_dim: int = knob(128, "D", least=1)
    qk_rope_head_dim: int = knob(64, "P", least=1)
    v_head_dim: int = knob(128, "Dv", least=1)
    attention_bias: bool = False

    rope_theta: float = knob(10000.0, "base of the angles", above=1)
    rope_factor: float = knob(1.0, "YaRN's s; 1 is plain RoPE", least=1)
    rope_original_max_position_embeddings: int = knob(4096, "the context before YaRN", least=1)
    rope_beta_fast: float = knob(32.0, "pairs with more turns stay as they are", least=0)
    rope_beta_slow: float = knob(1.0, "pairs with fewer are slowed by s", least=0)
    rope_mscale: float = knob(1.0, "see yarn_mscale", least=0)
    rope_mscale_all_dim: float = knob(1.0, "see yarn_mscale", least=0)

    first_k_dense_replace: int = knob(3, "layers at the beginning without experts", least=0)
    n_routed_experts: int = knob(256, "E", least=1)
    num_experts_per_tok: int = knob(8, "K", least=1)
    n_shared_experts: int = knob(1, "seen by every token", least=0)
    moe_intermediate_size: int = knob(2048, "F of an expert", least=1)
    n_group: int = knob(8, "groups of consecutive experts", least=1)
    topk_group: int = knob(4, "groups that a token may go to", least=1)
    scoring_func: str = knob("sigmoid", "of the affinities; softmax: V2", choices=("sigmoid", "softmax"))
    topk_method: str = knob("noaux_tc", "V3, V2, V2-Lite: see Router.choose",
                            choices=("noaux_tc", "group_limited_greedy", "greedy"))
    norm_topk_prob: bool = True
    routed_scaling_factor: float = knob(2.5, "of the gates", least=0)
    num_nextn_predict_layers: int = knob(1, "MTP modules", least=0)

    def rules(self):
        """What fields ask of each other: (field, what is wanted, whether it is met)."""
        E, K, groups = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        yield "qk_rope_head_dim", "an even number (pairs are rotated)", self.qk_rope_head_dim % 2 == 0
        yield "n_group", f"a divisor of n_routed_experts = {E}", E % groups == 0
        yield "topk_group", f"at most n_group = {groups}", self.topk_group <= groups
        room = self.topk_group * (E // groups)
        yield "num_experts_per_tok", f"at most {room}, the experts in topk_group groups", K <= room
        has_two = groups == 1 or self.topk_method != "noaux_tc" or E // groups >= 2
        yield "n_group", "at least 2 experts per group (groups score by their top 2)", has_two

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has experts: all but the first ones, and always the MTP modules."""
        return layer >= self.first_k_dense_replace or layer >= self.num_hidden_layers

    @classmethod
    def preset(cls, name: str, **changes) -> "Config":
        """A file of data/presets/, changed. Raises UserError for an unknown name or key."""
        for key in changes.keys() - cls.__dataclass_fields__.keys():
            raise UserError(f"config: no key {key!r}{nearest(key, cls.__dataclass_fields__)}")
        return cls(**(checkpoint.load_preset(name) | changes))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`; the operation itself is in kernels.py."""

    ops: Kernels  # of this and every other module: the twins that `Transformer.use_kernels` chose

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A product in the dtype of its input: the weight stays float32, activations may be bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)

    def reset_parameters(self):
        """Nothing: `Transformer.init_weights` fills every weight."""


class MLP(nn.Module):
    """SwiGLU: `W_down (silu(W_gate u) * W_up u)`."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


# ------------------------------------------------------------------------------- rotary positions


def rope_frequencies(config: Config, device="cpu") -> Tensor:
    """Angle per position of each rotated pair, (P/2,) float32: `theta^(-2i/P)`, stretched by YaRN.

    Pairs with more than `beta_fast` turns within the original context stay, pairs with less than
    `beta_slow` turns are slowed by `rope_factor`, those between are blended (V3 section 4.3).
    """
    P, theta, factor = config.qk_rope_head_dim, config.rope_theta, config.rope_factor
    pair = torch.arange(0, P, 2, dtype=torch.float32, device=device)  # (P/2,)
    frequencies = 1.0 / theta ** (pair / P)
    if factor == 1:
        return frequencies

    def pair_with(revolutions: float) -> float:
        length = config.rope_original_max_position_embeddings
        return P * math.log(length / (revolutions * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair_with(config.rope_beta_slow)), P - 1)
    ramp = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: slow down
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature `m(s) = 0.1 mscale ln s + 1` (V3 section 4.3), 1 without extension.

    It acts in two places: `m(mscale_all_dim)` squared in the scale of the softmax (`Attention`),
    and `m(mscale) / m(mscale_all_dim)`, 1 for V3, in the length of what RoPE turns (`rotations`).
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotations(config: Config, frequencies: Tensor, positions: Tensor) -> Tensor:
    """freqs_cis, what RoPE multiplies pairs with: `m e^(i position frequency)`, with YaRN's m.

    positions (1 or B, T) -> (1 or B, T, 1, P/2) complex, one for all heads.
    """
    angle = positions[:, :, None, None] * frequencies  # (., T, 1, P/2)
    m = yarn_mscale(config.rope_factor, config.rope_mscale)
    m = m / yarn_mscale(config.rope_factor, config.rope_mscale_all_dim)
    return torch.polar(torch.full_like(angle, m), angle)


# ------------------------------------------------------------------------------------------ cache


class Cache:
    """What decoding keeps of the past: one normed latent and one rotated key per token and layer.

    Side by side in `buffer` (L, B, capacity, R+P): exactly `(R + P) * L` numbers per token, and
    with MTP `modules` as many more layers. The model writes behind `length` (B,), the tokens of
    each row; the caller moves it by `advance`.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device=None, dtype=torch.float32,
                 modules: int = 0):
        L, width = config.num_hidden_layers + modules, config.kv_lora_rank + config.qk_rope_head_dim
        self.buffer = torch.zeros(L, batch, capacity, width, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # no length is above it; on the host, so that layers need not wait for the device
        self.capacity = capacity

    def begin(self, T: int) -> Tensor:
        """Begin a pass over T more tokens of each row: their positions, (B, T) int64.

        `shown` becomes S, the keys that the pass may see: up to the longest row, and over it to a
        multiple of 32, since libraries prepare products anew for every size not yet seen.
        """
        end = self.longest + T
        self.shown = min(end + -end % 32, self.capacity)
        self.rows = torch.arange(len(self.length), device=self.length.device).unsqueeze(1)  # (B, 1)
        self.positions = self.length.unsqueeze(1) + torch.arange(T, device=self.length.device)
        return self.positions

    def write(self, layer: int, latent: Tensor) -> Tensor:
        """Store latent (B, T, R+P) where the pass goes; returns the keys shown, (B, S, R+P)."""
        held = self.buffer[layer]  # (B, capacity, R+P)
        held[self.rows, self.positions] = latent.to(held.dtype)
        return held[:, : self.shown]

    def advance(self, tokens: int | Tensor, longest: int | None = None) -> None:
        """Accept `tokens` more: one number for all rows, or (B,) for each row its own.

        Who knows a `longest` that no row is above then spares a look at the device.
        """
        self.length = self.length + tokens
        if longest is None:
            longest = self.longest + tokens if isinstance(tokens, int) else int(self.length.max())
        self.longest = longest

    def select(self, rows: Tensor, longest: int | None = None) -> "Cache":
        """A cache of the given rows, (n,) int64; a row may come several times."""
        out = copy.copy(self)
        out.buffer = self.buffer[:, rows]
        out.length = self.length[rows]
        out.longest = int(out.length.max()) if longest is None else longest
        return out

    def cat(self, other: "Cache") -> "Cache":
        """A cache of the rows of both, the other's last."""
        out = copy.copy(self)
        out.buffer = torch.cat((self.buffer, other.buffer), dim=1)
        out.length = torch.cat((self.length, other.length))
        out.longest = max(self.longest, other.longest)
        return out


# -------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head latent attention (V2 section 2.1, V3 eqs 1-11).

    Keys and values of all heads come out of one latent of R numbers per token, `c_kv`. Rotated, it
    could not be absorbed, so position is decoupled (V2 section 2.1.3): one rotated key, `k_pe`, for
    all heads. Two ways to the same result: `expanded` forms keys and values per head (cheaper for
    many queries), `absorbed` moves their weights to query and output, so that decoding reads the
    cached latents as they are.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        C, H, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        D, P, Dv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        bias, rank = config.attention_bias, config.q_lora_rank
        if rank is None:
            self.q_proj = Linear(C, H * (D + P), bias=False)
        else:
            self.q_a_proj = Linear(C, rank, bias=bias)
            self.q_a_layernorm = RMSNorm(rank, 1e-6)  # not rms_norm_eps: transformers fixes it
            self.q_b_proj = Linear(rank, H * (D + P), bias=False)
        self.kv_a_proj_with_mqa = Linear(C, R + P, bias=bias)
        self.kv_a_layernorm = RMSNorm(R, 1e-6)
        self.kv_b_proj = Linear(R, H * (D + Dv), bias=False)
        self.o_proj = Linear(H * Dv, C, bias=bias)
        m = yarn_mscale(config.rope_factor, config.rope_mscale_all_dim)  # of q and of k, hence squared
        self.scale = (D + P) ** -0.5 * m**2

    def forward(self, h: Tensor, freqs_cis: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """h (B, T, C) -> (B, T, C); the others are those of `Transformer.freqs_and_mask`."""
        q_nope, q_pe = self.queries(h, freqs_cis)  # (B, T, H, D), (B, T, H, P)
        latent = self.latents(h, freqs_cis)  # (B, T, R+P)
        if cache is not None:
            past = cache.write(self.layer, latent)  # (B, S, R+P)
        if cache is None or cache.longest == 0:  # no past: the keys are this call's own
            o = self.expanded(q_nope, q_pe, latent, mask)
        else:
            o = self.absorbed(q_nope, q_pe, past.to(h.dtype), mask)
        return self.o_proj(o.flatten(2))  # o (B, T, H, Dv)

    def queries(self, h: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        """`c_Q = W_DQ h; q_nope = W_UQ c_Q; q_pe = RoPE(W_QR c_Q)`, decoupled (V3 eqs 6-9)."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(h)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))
        q = q.unflatten(-1, (config.num_attention_heads, -1))  # (B, T, H, D+P)
        q_nope, q_pe = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return q_nope, self.ops.apply_rope(q_pe, freqs_cis)  # (B, T, H, D), (B, T, H, P)

    def latents(self, h: Tensor, freqs_cis: Tensor) -> Tensor:
        """`[c_kv ; k_pe]` (V3 eqs 1 and 3), (B, T, R+P): the latent normed, the key rotated."""
        ranks = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        c_kv, k_pe = self.kv_a_proj_with_mqa(h).split(ranks, dim=-1)  # (B, T, R), (B, T, P)
        k_pe = self.ops.apply_rope(k_pe.unsqueeze(2), freqs_cis).squeeze(2)  # (B, T, P)
        return torch.cat((self.kv_a_layernorm(c_kv), k_pe), dim=-1)

    def expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """`[k_nope ; v] = W_UKV c_kv`, keys and values per head (V3 eqs 2 and 5); T keys."""
        config = self.config
        c_kv, k_pe = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (config.num_attention_heads, -1))  # (B, T, H, D+Dv)
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        return self.ops.causal_attention(q_nope, q_pe, k_nope, k_pe, v, self.scale, mask)

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        """`W_UK` moves into the query, `W_UV` behind the sum (V2 section 2.1.2); S latents.

        `q_nope . (W_UK c_kv) = (W_UK^T q_nope) . c_kv`, so no key or value is ever formed.
        """
        config = self.config
        weight = self.kv_b_proj.weight.to(latent.dtype)  # (H * (D+Dv), R)
        weight = weight.unflatten(0, (config.num_attention_heads, -1))  # (H, D+Dv, R)
        w_uk, w_uv = weight.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        q_latent = torch.einsum("bthd,hdr->bthr", q_nope, w_uk)
        z = self.ops.latent_attention(q_latent, q_pe, latent, mask, self.scale)  # (B, T, H, R)
        return torch.einsum("bthr,hvr->bthv", z, w_uv)  # v: Dv


# ----------------------------------------------------------------------------- mixture of experts


@dataclass
class Routing:
    """Where one MoE layer sent its tokens."""

    topk_idx: Tensor  # (B, T, K) int64, chosen experts
    gates: Tensor  # (B, T, K) float32, their weights (V3 eq 13)
    affinity: Tensor  # (B, T, E) float32, s of V3 eq 15


class Router(nn.Module):
    """Affinities, choice of K experts, gates (V3 eqs 12-16; softmax: V2 2.2). The bias only chooses."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, u: Tensor, replay: Tensor | None = None) -> Routing:
        """u (B, T, C). `replay` (B, T, K) forces the experts (V3.2's keep routing), not the gates."""
        dtype = at_least_float32(u.dtype)  # near ties flip in bf16, so the router never runs in it
        logits = F.linear(u.to(dtype), self.weight.to(dtype))  # (B, T, E)
        affinity = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        topk_idx = self.choose(affinity.detach()) if replay is None else replay
        gates = affinity.gather(-1, topk_idx)  # (B, T, K), of the affinity without the bias
        if self.config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(topk_idx, gates * self.config.routed_scaling_factor, affinity)

    def choose(self, affinity: Tensor) -> Tensor:
        """The K best experts by affinity + bias within the best groups: (B, T, E) -> (B, T, K).

        A group is as good as its two best experts (V3) or its best one (V2, which has no bias);
        V2-Lite has neither bias nor groups.
        """
        config = self.config
        is_v3 = config.topk_method == "noaux_tc"
        scores = affinity + self.e_score_correction_bias if is_v3 else affinity
        if config.topk_method != "greedy" and config.n_group > 1:
            grouped = scores.unflatten(-1, (config.n_group, -1))  # (B, T, groups, E/groups)
            worth = grouped.topk(2, dim=-1).values.sum(-1) if is_v3 else grouped.amax(-1)
            kept = worth.topk(config.topk_group, dim=-1, sorted=False).indices
            dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, kept, False)
            scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """`b_i += speed * sign(mean(c) - c_i)` (LF algorithm 1): idle experts become likelier.

        load (E,) is c, the tokens that each expert got in one optimizer step, over all ranks.
        """
        if self.config.topk_method == "noaux_tc":
            self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def expert_load(topk_idx: Tensor, is_counted: Tensor, experts: int) -> Tensor:
    """Tokens that each expert got where `is_counted` (B, T): topk_idx (B, T, K) -> (E,) float32."""
    weight = is_counted.unsqueeze(-1).expand_as(topk_idx).flatten().float()  # (B*T*K,)
    return weight.new_zeros(experts).scatter_add_(0, topk_idx.flatten(), weight)


def balance_loss(routing: Routing, is_counted: Tensor) -> Tensor:
    """Sequence-wise balance loss without its factor, (B,) (V3 eqs 17-20): `sum_i f_i P_i`.

    `f_i = E/(K T) sum_t 1[s_it among the K largest s_t]` has no gradient, `P_i = mean_t s_it /
    sum_j s_jt` has; 1 when affinities are uniform. `is_counted` (B, T) leaves out padding.
    """
    E, K = routing.affinity.shape[-1], routing.topk_idx.shape[-1]
    weight = is_counted.unsqueeze(-1).to(routing.affinity.dtype)  # (B, T, 1)
    tokens = weight.sum(1).clamp(min=1)  # (B, 1)
    # as in eq 18 of the affinity without the bias, so these need not be the chosen ones
    top = routing.affinity.detach().topk(K, dim=-1, sorted=False).indices  # (B, T, K)
    hits = torch.zeros_like(routing.affinity).scatter_(-1, top, weight.expand_as(top).contiguous())
    f = hits.sum(1) * E / (K * tokens)  # (B, E)
    share = routing.affinity / (routing.affinity.sum(-1, keepdim=True) + 1e-20)  # (B, T, E)
    P = (share * weight).sum(1) / tokens  # (B, E)
    return (f * P).sum(-1)


class Experts(nn.Module):
    """All routed experts of a layer in two stacked weights; checkpoints have each one apart."""

    def __init__(self, config: Config):
        super().__init__()
        E, C, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))

    def forward(self, u: Tensor, routing: Routing) -> Tensor:
        """u (B, T, C) -> (B, T, C)."""
        topk_idx, gates = routing.topk_idx.flatten(0, 1), routing.gates.flatten(0, 1)  # (N, K) each
        y = self.ops.expert_ffn(u.flatten(0, 1), self.gate_up_proj, self.down_proj, topk_idx, gates)
        return y.view_as(u)


class MoE(nn.Module):
    """`y = sum_k gate_k FFN_k(u) + FFN_shared(u)` (V3 eq 12); no token is dropped."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.moe_intermediate_size * config.n_shared_experts  # all of them as one FFN
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def forward(self, u: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.gate(u, replay)
        y = self.experts(u, routing)  # (B, T, C)
        if self.shared_experts is not None:
            y = y + self.shared_experts(u)
        return y, routing


# ------------------------------------------------------------------------------------ transformer


class Block(nn.Module):
    """Pre-norm: `h += attention(norm(h)); h += ffn(norm(h))`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe(layer)
        self.mlp = MoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h, freqs_cis, mask=None, cache=None, replay=None):
        """h (B, T, C) -> (B, T, C), and the Routing, None in a dense layer."""
        h = h + self.self_attn(self.input_layernorm(h), freqs_cis, mask, cache)
        u = self.post_attention_layernorm(h)  # (B, T, C)
        y, routing = self.mlp(u, replay) if self.is_moe else (self.mlp(u), None)
        return h + y, routing


class MTP(Block):
    """Multi-token prediction (V3 section 2.2): a block that looks one token further ahead.

    At position i, module k joins the state of depth k-1 with the embedding of token i+k and
    predicts token i+k+1; embedding and head are the main model's. As in the released weights,
    `eh_proj` has the embedding first, and the state is the one after the final norm.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(self, h: Tensor, ahead: Tensor, freqs_cis: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None):
        """h, and ahead, the embedding k tokens on -> normed state, all (B, T-k, C), and Routing."""
        joined = torch.cat((self.enorm(ahead), self.hnorm(h)), dim=-1)  # (B, T-k, 2C)
        h, routing = super().forward(self.eh_proj(joined), freqs_cis, mask, cache)
        return self.shared_head["norm"](h), routing


class Transformer(nn.Module):
    """The whole model, its attributes named as Hugging Face's tensors; MTP modules come last.

    >>> model = Transformer(Config.preset("tiny"))
    >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
    >>> model(tokens).shape
    torch.Size([2, 5, 1024])
    >>> sorted(model(tokens, targets=tokens))
    ['balance', 'ce', 'load', 'mtp']
    """

    def __init__(self, config: Config, impl: str = "fused", init: bool = True):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
        main = [Block(config, i) for i in range(L)]
        ahead = [MTP(config, L + i) for i in range(config.num_nextn_predict_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(V, C, _weight=torch.empty(V, C)),  # filled by `init_weights`
            "layers": nn.ModuleList(main + ahead),
            "norm": RMSNorm(C, config.rms_norm_eps),
        })
        self.lm_head = Linear(C, V, bias=False)
        self.compute_dtype = torch.float32  # of activations; the weights are cast in each product
        self.recompute = False  # in training keep the inputs of blocks only, compute the rest again
        self.isolate = False  # documents of one row, each behind its begin token, are apart
        self.use_kernels(impl)
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix from N(0, initializer_range), biases zero, norms one (V3 section 4.2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()

    def use_kernels(self, impl: str, fp8: bool = False) -> tuple[str, ...]:
        """Choose twins for the present device and compute dtype; returns what these forced.

        With `fp8` the products of attention and FFNs are quantised (V3 section 3.3), but not the
        head, `eh_proj`, router, norms, attention itself, and decoding's absorbed `kv_b_proj`.
        """
        device = self.lm_head.weight.device
        widths = (self.config.hidden_size, self.config.moe_intermediate_size)
        ops, reasons = choose(impl, device, self.compute_dtype, fp8=fp8, widths=widths)
        exact, _ = choose(impl, device, self.compute_dtype, widths=widths)
        for name, module in self.named_modules():
            module.ops = exact if name.endswith(("lm_head", "eh_proj")) else ops
        self.frequencies = rope_frequencies(self.config).to(device)
        heads = (self.config.qk_nope_head_dim + self.config.qk_rope_head_dim, self.config.v_head_dim)
        self.is_packed = ops.packs_documents(device, self.compute_dtype, *heads)
        self.chosen = (impl, fp8)
        return reasons

    def _apply(self, *args, **kwargs):
        """`to`, `cuda` and so on: another device may want other twins."""
        super()._apply(*args, **kwargs)
        self.use_kernels(*self.chosen)
        return self

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Name and module of every layer with experts, the MTP modules' included."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, MoE)]

    def new_cache(self, batch: int, capacity: int, modules: int = 0) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens, and for MTP `modules`."""
        device = self.lm_head.weight.device
        return Cache(self.config, batch, capacity, device, self.compute_dtype, modules)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None, *,
                reduction: str = "mean", mtp: bool = True,
                replay: list[Tensor] | None = None) -> Tensor | dict[str, Tensor]:
        """Logits (B, T, V), or the losses when `targets` are given.

        tokens, targets (B, T) int64; targets are the tokens that follow, -100 where there is no
        loss. Losses in nats per token: `ce`, `mtp` (mean over modules), `balance` (sum over MoE
        layers, without its factor); `reduction="sum"` sums over targets (balance over sequences),
        "none" gives `ce` alone, (B, T). `load` (MoE layers, E): the tokens with a target that each
        expert got, MTP's layers last. `replay` forces the experts of every MoE layer of the main
        model, (B, T, K) each. Raises UserError for a text longer than the context or the cache.
        """
        h, routings = self.trunk(tokens, cache, replay)
        if targets is None:
            return self.lm_head(h).to(at_least_float32(h.dtype))
        if targets.shape != tokens.shape:
            raise UserError(f"targets: shape {tuple(targets.shape)}, wanted that of tokens {tuple(tokens.shape)}")
        nll = self._nll(h, targets)  # (B, T)
        if reduction == "none":
            return {"ce": nll}
        is_real = targets != IGNORE  # (B, T)
        losses = {"ce": _reduce(nll, is_real, reduction)}
        counted = [(routing, is_real) for routing in routings]
        if mtp and self.config.num_nextn_predict_layers:
            losses["mtp"], more = self._mtp_loss(h, tokens, targets, reduction)
            counted += more
        if counted:
            balance = torch.stack([balance_loss(*pair) for pair in counted]).sum(0)  # (B,)
            losses["balance"] = balance.sum() if reduction == "sum" else balance.mean()
            losses["load"] = torch.stack([
                expert_load(routing.topk_idx, is_counted, self.config.n_routed_experts)
                for routing, is_counted in counted])
        return losses

    def trunk(self, tokens: Tensor, cache: Cache | None = None,
              replay: list[Tensor] | None = None) -> tuple[Tensor, list[Routing]]:
        """Embedding, blocks, final norm: h (B, T, C), and the Routing of each MoE layer."""
        used, limit = 0, self.config.max_position_embeddings
        if cache is not None:
            has_drafts = len(cache.buffer) > self.config.num_hidden_layers  # may lie behind the context
            used, limit = cache.longest, cache.capacity if has_drafts else min(limit, cache.capacity)
        if tokens.shape[1] + used > limit:
            raise UserError(f"context: {used} + {tokens.shape[1]} tokens, at most {limit} fit: shorten the text")
        freqs_cis, mask = self.freqs_and_mask(tokens, cache)
        h = self.model.embed_tokens(tokens).to(self.compute_dtype)  # (B, T, C)
        routings = []
        for block in self.model.layers[: self.config.num_hidden_layers]:
            experts = replay[len(routings)] if replay and block.is_moe else None  # (B, T, K)
            h, routing = self._run(block, h, freqs_cis, mask, cache, experts)
            routings += [routing] if block.is_moe else []
        return self.model.norm(h), routings

    def freqs_and_mask(self, tokens: Tensor, cache: Cache | None = None):
        """What all layers share: freqs_cis (1 or B, T, 1, P/2), and mask (B, T, S) bool or None.

        True where a query sees a key, None where causality is all there is to it. Of a cache, in
        which this begins a pass, a query sees what lies up to its own position; with `isolate` its
        own document only, keys from the latest begin token on (in bf16 on a GPU: its bounds).
        """
        T, mask = tokens.shape[1], None
        positions = torch.arange(T, device=tokens.device).unsqueeze(0)  # (1, T)
        if cache is not None:
            positions = cache.begin(T)  # (B, T)
            if cache.longest:
                keys = torch.arange(cache.shown, device=tokens.device)  # (S,)
                mask = keys <= positions.unsqueeze(-1)
        elif self.isolate:
            mask = document_mask(tokens == self.config.bos_token_id, self.is_packed)
        return rotations(self.config, self.frequencies, positions), mask

    def _run(self, block: Block, *inputs):
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _mtp_loss(self, h: Tensor, tokens: Tensor, targets: Tensor, reduction: str):
        """`1/D sum_k mean_i -log P^k(token i+k+1)` (V3 eqs 21-25).

        Besides, for each module its Routing and which tokens have a target, (B, T-k) bool.
        """
        losses, counted = [], []
        for k, module in enumerate(self.model.layers[self.config.num_hidden_layers :], start=1):
            if tokens.shape[1] <= k:
                break  # too short to look k tokens ahead
            ahead = self.model.embed_tokens(tokens[:, k:]).to(h.dtype)  # (B, T-k, C), token i+k
            freqs_cis, mask = self.freqs_and_mask(tokens[:, :-k])
            h, routing = self._run(module, h[:, : ahead.shape[1]], ahead, freqs_cis, mask)
            wanted = targets[:, k:]  # (B, T-k), token i+k+1
            is_real = wanted != IGNORE
            losses.append(_reduce(self._nll(h, wanted), is_real, reduction))
            counted.append((routing, is_real))
        none = h.new_zeros((), dtype=at_least_float32(h.dtype))
        return torch.stack(losses).mean() if losses else none, counted

    def _nll(self, h: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target in nats, (B, T); 0 where there is none."""
        nll = self.ops.linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return nll.view_as(targets)

    def published(self) -> dict[str, Tensor]:
        """Hugging Face's tensor names -> views; who writes into a view writes into the model."""
        L, modules = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        return checkpoint.published_names(self.state_dict(), L, modules)

    def save_pretrained(self, directory: str | Path, tokenizer=None) -> None:
        """Write a Hugging Face directory: config.json, weights (sharded above 5 GB), tokenizer."""
        config = checkpoint.config_to_hf(asdict(self.config))
        checkpoint.save_weights(directory, self.published(), config, tokenizer=tokenizer)

    @classmethod
    def from_pretrained(cls, directory: str | Path, impl: str = "fused", device="cpu",
                        dtype: torch.dtype | None = torch.float32, mtp: bool = True, experts=None) -> "Transformer":
        """The model of a Hugging Face directory, ours or another's, filled tensor by tensor.

        dtype None is the file's; MTP is left out without `mtp` or its weights; with `experts`, an
        ExpertCache, these stay on disk. Raises UserError naming tensors that are not as wanted.
        """
        config, weights, block, dtype = checkpoint.open_checkpoint(directory, Config, mtp, dtype)
        check_memory(asdict(config), dtype.itemsize, experts and experts.size)
        with torch.device("meta"):
            model = cls(config, impl, init=False).to(dtype)
        model.compute_dtype = dtype
        for _, moe in model.moe_layers():
            moe.gate.float()  # the router and its bias stay float32
        weights = experts.attach(model.moe_layers(), weights, block, dtype, device) if experts else weights
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # to_empty takes a second
        checkpoint.copy_weights(directory, weights, model.published(), block)
        return model


def _reduce(nll: Tensor, is_real: Tensor, reduction: str) -> Tensor:
    return nll.sum() if reduction == "sum" else nll.sum() / is_real.sum().clamp(min=1)


# ----------------------------------------------------------------------------------- what it costs


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters `main`, `experts`, `mtp`, `total`, `embedding`, `active`, as `parameter_counts` has them."""
    with torch.device("meta"):
        model = Transformer(config, init=False)
    return parameter_counts(model.state_dict(), asdict(config))


def flops_per_token(config: Config, T: int) -> float:
    """FLOPs of forward and backward per token of the main model in a text of T tokens.

    `6 N + 3 L H (D + P + Dv) * 2 * T/2`, with N the active parameters; attention expanded and
    causal. With T = 4096 this gives the 250 GFLOP of V3 (arXiv 2505.09343, table 2).
    """
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = 3 * config.num_hidden_layers * config.num_attention_heads * width * T
    return 6.0 * count_parameters(config)["active"] + attention


def main(argv: list[str]) -> None:
    """Print the self-portrait of a preset or of a checkpoint directory."""
    knobs = parse_flags(PortraitConfig, argv, "What a model is made of, and what it costs.")
    name = knobs.name
    config, stored = checkpoint.find_config(name, Config)
    with torch.device("meta"):
        model = Transformer(config, init=False)
    if knobs.ranks:
        print(shared_out(name, asdict(config), model.state_dict(), knobs.ranks, knobs.expert_parallel))
    else:
        flops = flops_per_token(config, min(4096, config.max_position_embeddings))
        print(portrait(name, asdict(config), model.state_dict(), flops, stored))


if __name__ == "__main__":
    run_main(main)
