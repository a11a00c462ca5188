"""DeepSeek-V3 in plain PyTorch: MLA, DeepSeekMoE balanced by a bias, multi-token prediction.

Papers: V2 = arXiv 2405.04434, V3 = arXiv 2412.19437, LF = arXiv 2408.15664 (balancing without a loss).
Names of weights and config fields are Hugging Face's, names of local tensors are the papers'.

Shapes, everywhere in this repository:

    B batch               T tokens in this call     S keys visible, S >= T    N = B*T tokens
    C hidden_size         H heads                   V vocabulary              G group size (RL)
    D qk_nope_head_dim    P qk_rope_head_dim        Dv v_head_dim             R kv_lora_rank
    F FFN width           E routed experts          K experts per token       L layers

    python model.py v3          the self-portrait of a preset or of a checkpoint directory
"""

import copy
import json
import math
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import UserError, nearest, run_main
from kernels import IGNORE, Kernels, at_least_float32, select

SHARD_BYTES = 5_000_000_000  # one safetensors file holds at most this much

# ----------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    """Every size and switch of the architecture, with Hugging Face's names.

    >>> Config.preset("tiny").q_lora_rank < Config.preset("tiny").hidden_size
    True

    Raises UserError when sizes do not fit together.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"  # sigmoid (V3) or softmax (V2)
    topk_method: str = "noaux_tc"  # noaux_tc (V3: bias, top-2 sum), group_limited_greedy (V2: max), greedy
    q_lora_rank: int | None = 1536  # None: queries straight from the hidden state
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_nextn_predict_layers: int = 1  # MTP modules
    attention_bias: bool = False
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # YaRN's s; 1 = plain RoPE
    rope_original_max_position_embeddings: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 1.0
    rope_mscale_all_dim: float = 1.0
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        for name, wanted, is_met in self._rules():
            if not is_met:
                raise UserError(f"config: {name} is {getattr(self, name)!r}, wanted {wanted}")

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in _MAY_BE_ZERO)
            if field.type is bool:
                yield field.name, "true or false", isinstance(value, bool)
            elif field.type is float:
                is_number = type(value) in (int, float)
                yield field.name, "a finite number, not negative", is_number and 0 <= value < math.inf
            elif field.type is int or (field.type is not str and value is not None):
                yield field.name, f"a whole number, at least {least}", isinstance(value, int) and value >= least
        E, K, groups = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        yield "qk_rope_head_dim", "an even number (pairs are rotated)", self.qk_rope_head_dim % 2 == 0
        yield "num_experts_per_tok", f"at most n_routed_experts = {E}", K <= E
        yield "n_group", f"a divisor of n_routed_experts = {E}", E % groups == 0
        yield "topk_group", f"at most n_group = {groups}", self.topk_group <= groups
        room = self.topk_group * (E // groups)
        yield "num_experts_per_tok", f"at most {room}, the experts in topk_group groups", K <= room
        yield "scoring_func", "'sigmoid' or 'softmax'", self.scoring_func in ("sigmoid", "softmax")
        methods = ("noaux_tc", "group_limited_greedy", "greedy")
        yield "topk_method", f"one of {', '.join(methods)}", self.topk_method in methods
        top2 = groups == 1 or self.topk_method != "noaux_tc" or E // groups >= 2
        yield "n_group", "at least 2 experts per group (groups score by their top 2)", top2
        yield "rope_factor", "at least 1", self.rope_factor >= 1
        yield "rope_theta", "above 1", self.rope_theta > 1

    @classmethod
    def preset(cls, name: str, **changes) -> "Config":
        """A named preset with changes on top. Raises UserError for an unknown name or key."""
        if name not in PRESETS:
            raise UserError(f"preset: got {name!r}, wanted one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        for key in changes:
            if key not in cls.__dataclass_fields__:
                raise UserError(f"config: no key {key!r}{nearest(key, cls.__dataclass_fields__)}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Read a Hugging Face `config.json` of model_type deepseek_v3 or deepseek_v2, in both of its forms.

        The public form has `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`.
        Keys that do not touch the arithmetic are passed over; a value that would change it is a UserError.
        """
        kind = values.get("model_type")
        if kind not in _BY_MODEL_TYPE:
            raise UserError(f"config.json: model_type is {kind!r}, wanted one of {', '.join(_BY_MODEL_TYPE)}")
        for key, only in _ONLY.items():
            if values.get(key, only) not in (only, None):
                raise UserError(f"config.json: {key} is {values[key]!r}, only {only!r} is supported")
        if values.get("num_key_value_heads") not in (None, values.get("num_attention_heads")):
            raise UserError("config.json: num_key_value_heads differs from num_attention_heads, MLA has one latent")
        own = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        own = _BY_MODEL_TYPE[kind] | {k: v for k, v in own.items() if v is not None or k == "q_lora_rank"}
        return cls(**(own | _read_rope(values)))

    def to_dict(self) -> dict:
        """The `config.json` in its public form, which transformers loads."""
        own = asdict(self)
        rope = {name[5:]: own.pop(name) for name in list(own) if name.startswith("rope_") and name != "rope_theta"}
        is_v3 = self.topk_method == "noaux_tc"
        return own | {
            "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": rope | {"type": "yarn"} if self.rope_factor > 1 else None,
            "hidden_act": "silu",
            "moe_layer_freq": 1,
            "tie_word_embeddings": False,
        }

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has experts: all but the first ones, and always the MTP modules."""
        return layer >= self.first_k_dense_replace or layer >= self.num_hidden_layers


_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")
_ONLY = {"hidden_act": "silu", "tie_word_embeddings": False, "moe_layer_freq": 1, "rope_interleave": True,
         "mlp_bias": False, "quantization_config": None, "index_topk": None}
_V2_GATE = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
_BY_MODEL_TYPE = {
    "deepseek_v3": {},
    "kimi_k2": {},
    "deepseek_v2": _V2_GATE | {"topk_method": "greedy", "n_group": 1, "topk_group": 1,
                               "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
}


def _read_rope(values: dict) -> dict:
    """The `rope_*` fields out of either form of config.json."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope settings are {rope!r}, wanted an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope type is {kind!r}, wanted 'default' or 'yarn'")
    out = {"rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0}
    if kind == "yarn":
        defaults = {"factor": None, "original_max_position_embeddings": values.get("max_position_embeddings"),
                    "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        out |= {f"rope_{key}": rope.get(key) or default for key, default in defaults.items()}
        if not out["rope_mscale_all_dim"]:
            out["rope_mscale"] = 1.0  # transformers looks at mscale only where both are given
    return out


# Presets are differences from the defaults above, which are V3's. Initialisation: V3's 0.006 at width
# 7168 is 0.5 / sqrt(hidden_size), so that a product of a normalised vector with a weight row has the
# same spread (0.5) at any width; the small presets follow that rule.
_YARN_40 = {"rope_factor": 40.0, "max_position_embeddings": 163840}
_V2 = _V2_GATE | {"vocab_size": 102400, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
_16B = {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
PRESETS = {
    "tiny": dict(vocab_size=1024, hidden_size=96, intermediate_size=256, moe_intermediate_size=48,
                 num_hidden_layers=4, num_attention_heads=4, n_routed_experts=16, num_experts_per_tok=4,
                 n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=48,
                 qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=1024,
                 initializer_range=0.05),
    "small": dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, moe_intermediate_size=256,
                  num_hidden_layers=10, num_attention_heads=8, n_routed_experts=32, num_experts_per_tok=4,
                  n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=192, kv_lora_rank=128,
                  qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=2048,
                  initializer_range=0.022),
    "medium": dict(vocab_size=50304, hidden_size=1024, intermediate_size=2816, moe_intermediate_size=512,
                   num_hidden_layers=16, num_attention_heads=16, n_routed_experts=64, num_experts_per_tok=6,
                   n_group=8, topk_group=4, first_k_dense_replace=1, q_lora_rank=384, kv_lora_rank=256,
                   qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, initializer_range=0.016),
    "v2-lite": _YARN_40 | _16B | _V2 | dict(intermediate_size=10944, topk_method="greedy", routed_scaling_factor=1.0,
                                            rope_mscale=0.707, rope_mscale_all_dim=0.707),
    "v2": _YARN_40 | _V2 | dict(hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
                                num_hidden_layers=60, n_routed_experts=160, topk_group=3,
                                topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "v3": _YARN_40,
    "moonlight": _16B | dict(vocab_size=163840, intermediate_size=11264, routed_scaling_factor=2.446,
                             rope_theta=50000.0, max_position_embeddings=8192, rms_norm_eps=1e-5),
    "kimi-k2": dict(vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1,
                    first_k_dense_replace=1, routed_scaling_factor=2.827, num_nextn_predict_layers=0,
                    rope_theta=50000.0, rope_factor=32.0, rope_beta_fast=1.0, max_position_embeddings=131072),
}


# ---------------------------------------------------------------------------------------- small modules


class Linear(nn.Linear):
    """A product whose weight follows the dtype of its input: masters stay float32, activations may be bf16."""

    product = staticmethod(F.linear)  # or the FP8 twin of kernels.py

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.product(x, self.weight.to(x.dtype), bias)

    def reset_parameters(self):
        """Nothing: `Transformer.init_weights` fills every weight."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`; the operation itself is in kernels.py."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, ops: Kernels) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: `W_down (silu(W_gate u) * W_up u)`."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


# ------------------------------------------------------------------------------------- RoPE, YaRN, cache


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature `m(s) = 0.1 mscale ln s + 1` (V3 section 4.3), 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config: Config, device=None) -> Tensor:
    """Angle per position of each rotated pair, (P/2,) float32: `theta^(-2i/P)`, stretched by YaRN.

    Pairs that turn more than `beta_fast` times within the original context stay, pairs that turn less
    than `beta_slow` times are slowed by `rope_factor`, the ones between are blended (V3 section 4.3).
    """
    P, theta, factor = config.qk_rope_head_dim, config.rope_theta, config.rope_factor
    pair = torch.arange(0, P, 2, dtype=torch.float32, device=device)  # (P/2,)
    frequencies = 1.0 / theta ** (pair / P)
    if factor == 1:
        return frequencies

    def pair_turning(turns: float) -> float:
        length = config.rope_original_max_position_embeddings
        return P * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.rope_beta_slow)), P - 1)
    ramp = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: slow down
    return frequencies / factor * ramp + frequencies * (1 - ramp)


class Cache:
    """What decoding keeps of the past: one normed latent and one rotated key per token and layer.

    Side by side in `buffer` (L, B, capacity, R+P), so the cache has exactly `(R + P) * L` numbers per token.
    `length` (B,) counts the tokens of each row. The model writes behind `length` and never moves it: the
    caller calls `advance`.
    """

    ROUND = 32  # keys are shown in steps of this many, since oneDNN compiles a kernel for every new number

    def __init__(self, config: Config, batch: int, capacity: int, device=None, dtype=torch.float32):
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.buffer = torch.zeros(config.num_hidden_layers, batch, capacity, width, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = self.shortest = 0  # of length, kept on the host so that layers need not wait for the device

    @property
    def capacity(self) -> int:
        return self.buffer.shape[2]

    def shown(self, T: int) -> int:
        """S, the keys that attention is given for T new tokens: up to the longest row and a little over."""
        end = self.longest + T
        return min(end + -end % self.ROUND, self.capacity)

    def places(self, positions: Tensor) -> Tensor:
        """Where positions (B, T) lie when the rows of a layer follow each other, (B*T,)."""
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)  # (B, 1)
        return (rows * self.capacity + positions).flatten()

    def write(self, layer: int, latent: Tensor, places: Tensor) -> Tensor:
        """Store latent (B, T, R+P) at `places`; returns the keys shown, (B, S, R+P)."""
        held = self.buffer[layer]  # (B, capacity, R+P)
        held.flatten(0, 1).index_copy_(0, places, latent.flatten(0, 1).to(held.dtype))
        return held[:, : self.shown(latent.shape[1])]

    def advance(self, tokens: int | Tensor) -> None:
        """Accept `tokens` more: one number for all rows, or (B,) for rows of unequal prompts."""
        self.length = self.length + tokens
        if isinstance(tokens, int):
            self.shortest, self.longest = self.shortest + tokens, self.longest + tokens
        else:
            self.shortest, self.longest = (int(x) for x in self.length.aminmax())

    def select(self, rows: Tensor) -> "Cache":
        """A cache of the given rows, (n,) int64; a row may come several times."""
        out = copy.copy(self)
        out.buffer, out.length = self.buffer[:, rows], self.length[rows]
        out.advance(torch.zeros_like(out.length))
        return out


@dataclass
class Pass:
    """What all layers of one forward pass share."""

    ops: Kernels
    turn: Tensor  # (1 or B, T, 1, P/2) complex64, what rope multiplies pairs with
    cache: Cache | None = None  # None: the tokens see themselves only, position = index
    places: Tensor | None = None  # (B*T,) int64, where the cache takes this call's latents
    hidden: Tensor | None = None  # (B, T, n) bool: which of the last n keys each query does not see
    since: Tensor | None = None  # (B, T) int64, the first token that each one sees; None: the first of the row


# -------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head latent attention (V2 section 2.1, V3 eqs 1-11).

    Keys and values of all heads come out of one latent of R numbers per token, `c_kv`, and one rotated
    key `k_pe` that the heads share. Two ways to the same result: `expanded` forms keys and values per
    head (cheaper for many queries), `absorbed` moves their weights to the query and output side, so that
    decoding reads the cached latents as they are.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
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
        # YaRN scales q and k by m each, so the logits by m squared
        self.scale = (D + P) ** -0.5 * yarn_mscale(config.rope_factor, config.rope_mscale_all_dim) ** 2

    def forward(self, h: Tensor, step: Pass, layer: int) -> Tensor:
        """h (B, T, C) -> (B, T, C)."""
        q_nope, q_pe = self.queries(h, step)
        latent = self.latents(h, step)  # (B, T, R+P)
        is_alone = step.cache is None or step.cache.longest == 0  # no past: the keys are this call's own
        if step.cache is not None:
            visible = step.cache.write(layer, latent, step.places)  # (B, S, R+P)
            latent = latent if is_alone else visible.to(h.dtype)
        attend = self.expanded if is_alone else self.absorbed
        o = attend(q_nope, q_pe, latent, step)  # (B, T, H, Dv)
        return self.o_proj(o.flatten(2))

    def queries(self, h: Tensor, step: Pass) -> tuple[Tensor, Tensor]:
        """`c_Q = W_DQ h; q_nope = W_UQ c_Q; q_pe = RoPE(W_QR c_Q)` (V3 eqs 6-9): (B, T, H, D), (B, T, H, P)."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(h)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h), step.ops))
        q = q.unflatten(-1, (config.num_attention_heads, -1))  # (B, T, H, D+P)
        q_nope, q_pe = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return q_nope, step.ops.apply_rope(q_pe, step.turn)

    def latents(self, h: Tensor, step: Pass) -> Tensor:
        """`[c_kv ; k_pe]` (V3 eqs 1 and 3), (B, T, R+P): the latent normed, the shared key rotated.

        These R+P numbers are all that is cached of a token. The norm covers the latent only.
        """
        ranks = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        c_kv, k_pe = self.kv_a_proj_with_mqa(h).split(ranks, dim=-1)  # (B, T, R), (B, T, P)
        k_pe = step.ops.apply_rope(k_pe.unsqueeze(2), step.turn).squeeze(2)
        return torch.cat((self.kv_a_layernorm(c_kv, step.ops), k_pe), dim=-1)

    def expanded(self, q_nope, q_pe, latent, step: Pass) -> Tensor:
        """Keys and values per head, `[k_nope ; v] = W_UKV c_kv` (V3 eqs 2 and 5); T queries on T keys."""
        config = self.config
        c_kv, k_pe = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (config.num_attention_heads, -1))  # (B, T, H, D+Dv)
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        return step.ops.causal_attention(q_nope, q_pe, k_nope, k_pe, v, self.scale, step.since)

    def absorbed(self, q_nope, q_pe, latent, step: Pass) -> Tensor:
        """`W_UK` moves into the query and `W_UV` behind the sum (V2 section 2.1.2); T queries on S latents."""
        config = self.config
        weight = self.kv_b_proj.weight.to(latent.dtype).unflatten(0, (config.num_attention_heads, -1))
        w_uk, w_uv = weight.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)  # (H, D, R), (H, Dv, R)
        q_latent = per_head(q_nope, w_uk)  # (B, T, H, R)
        z = step.ops.latent_attention(q_latent, q_pe, latent, step.hidden, self.scale)  # (B, T, H, R)
        return per_head(z, w_uv.mT)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head by its own matrix: x (B, T, H, i), weight (H, i, o) -> (B, T, H, o)."""
    y = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight)  # (H, B*T, o)
    return y.transpose(0, 1).unflatten(0, x.shape[:2])


# ------------------------------------------------------------------------------------ mixture of experts


@dataclass
class Routing:
    """Where one MoE layer sent its tokens."""

    topk_idx: Tensor  # (B, T, K) int64, chosen experts
    gates: Tensor  # (B, T, K) float32, their weights (V3 eq 13)
    affinity: Tensor  # (B, T, E) float32, s of V3 eq 15


class Router(nn.Module):
    """Affinities, the choice of K experts, and their gates (V3 eqs 12-16; V2 section 2.2 for softmax).

    `e_score_correction_bias` takes part in choosing and nowhere else. `counts` is the number of tokens
    that each expert got since the last `update_bias`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("counts", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, u: Tensor, replay: Tensor | None = None) -> Routing:
        """u (B, T, C). `replay` (B, T, K) forces the experts (V3.2's keep routing); gates stay live."""
        dtype = at_least_float32(u.dtype)  # near ties flip in bf16, so the router never runs in it
        logits = F.linear(u.to(dtype), self.weight.to(dtype))  # (B, T, E)
        affinity = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        topk_idx = self.choose(affinity.detach()) if replay is None else replay
        gates = affinity.gather(-1, topk_idx)  # (B, T, K), of the affinity without the bias
        if self.config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(topk_idx, gates * self.config.routed_scaling_factor, affinity)

    def choose(self, affinity: Tensor) -> Tensor:
        """The K best experts by affinity + bias within the best groups: (B, T, E) -> (B, T, K)."""
        config = self.config
        scores = affinity
        if config.topk_method == "noaux_tc":
            scores = affinity + self.e_score_correction_bias.to(affinity.dtype)
        if config.topk_method != "greedy" and config.n_group > 1:
            grouped = scores.unflatten(-1, (config.n_group, -1))  # (B, T, groups, E/groups)
            if config.topk_method == "noaux_tc":
                group_score = grouped.topk(2, dim=-1).values.sum(-1)  # V3: sum of the two best
            else:
                group_score = grouped.amax(-1)  # V2: the best
            kept = group_score.topk(config.topk_group, dim=-1, sorted=False).indices
            dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(-1, kept, False)
            scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def count(self, topk_idx: Tensor, is_counted: Tensor) -> None:
        """Add the routed tokens where `is_counted` (B, T) to `counts`."""
        weight = is_counted.unsqueeze(-1).expand_as(topk_idx).flatten().to(self.counts.dtype)
        self.counts.scatter_add_(0, topk_idx.flatten(), weight)

    @torch.no_grad()
    def update_bias(self, speed: float) -> None:
        """`b_i += speed * sign(mean(c) - c_i)` (LF algorithm 1): idle experts become likelier, full ones less."""
        if self.config.topk_method == "noaux_tc":
            self.e_score_correction_bias += speed * torch.sign(self.counts.mean() - self.counts)
        self.counts.zero_()


def balance_loss(routing: Routing, is_counted: Tensor) -> Tensor:
    """Sequence-wise balance loss without its factor, (B,) (V3 eqs 17-20): `sum_i f_i P_i`.

    `f_i = E/(K T) sum_t 1[s_it among the K largest s_t]` has no gradient, `P_i = mean_t s_it / sum_j s_jt`
    has. It is 1 when the affinities are uniform. `is_counted` (B, T) leaves out padding.
    """
    E, K = routing.affinity.shape[-1], routing.topk_idx.shape[-1]
    weight = is_counted.unsqueeze(-1).to(routing.affinity.dtype)  # (B, T, 1)
    tokens = weight.sum(1).clamp(min=1)  # (B, 1)
    top = routing.affinity.detach().topk(K, dim=-1, sorted=False).indices  # (B, T, K), unbiased as in eq 18
    hits = torch.zeros_like(routing.affinity).scatter_(-1, top, weight.expand_as(top).contiguous())
    f = hits.sum(1) * E / (K * tokens)  # (B, E)
    share = routing.affinity / (routing.affinity.sum(-1, keepdim=True) + 1e-20)  # (B, T, E)
    P = (share * weight).sum(1) / tokens  # (B, E)
    return (f * P).sum(-1)


class Experts(nn.Module):
    """All routed experts of a layer in two stacked weights; the checkpoint has one pair per expert."""

    def __init__(self, config: Config):
        super().__init__()
        E, C, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))

    def forward(self, u: Tensor, routing: Routing, ops: Kernels) -> Tensor:
        K = routing.topk_idx.shape[-1]
        flat = u.reshape(-1, u.shape[-1])  # (N, C)
        y = ops.expert_ffn(flat, self.gate_up_proj, self.down_proj, routing.topk_idx.reshape(-1, K),
                           routing.gates.reshape(-1, K))
        return y.view_as(u)


class MoE(nn.Module):
    """`y = sum_k gate_k FFN_k(u) + FFN_shared(u)` (V3 eq 12); no token is dropped."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:  # the shared experts are one FFN of their joint width
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, u: Tensor, ops: Kernels, replay: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.gate(u, replay)
        y = self.experts(u, routing, ops)
        return (y + self.shared_experts(u) if hasattr(self, "shared_experts") else y), routing


# ------------------------------------------------------------------------------------------ transformer


class Block(nn.Module):
    """Pre-norm: `h += attention(norm(h)); h += ffn(norm(h))`."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_moe = config.is_moe(layer)
        self.mlp = MoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h: Tensor, step: Pass, replay: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        h = h + self.self_attn(self.input_layernorm(h, step.ops), step, self.layer)
        u = self.post_attention_layernorm(h, step.ops)  # (B, T, C)
        if isinstance(self.mlp, MLP):
            return h + self.mlp(u), None
        y, routing = self.mlp(u, step.ops, replay)
        return h + y, routing


class MTP(Block):
    """One multi-token prediction module (V3 section 2.2): a block that looks one token further ahead.

    At position i, module k joins the state of depth k-1 with the embedding of token i+k and predicts
    token i+k+1; embedding and head are the main model's. In the released weights the embedding comes
    first in `eh_proj` and the state is the one after the final norm, so it is here.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(self, h: Tensor, ahead: Tensor, step: Pass) -> tuple[Tensor, Routing]:
        """h and ahead, the embeddings of the tokens k further on, (B, T-k, C) -> normed state (B, T-k, C)."""
        joined = torch.cat((self.enorm(ahead, step.ops), self.hnorm(h, step.ops)), dim=-1)
        h, routing = super().forward(self.eh_proj(joined), step)
        return self.shared_head["norm"](h, step.ops), routing


class Transformer(nn.Module):
    """The whole model. Attribute names give Hugging Face's tensor names; MTP modules are the last layers.

    >>> model = Transformer(Config.preset("tiny"))
    >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
    >>> model(tokens).shape
    torch.Size([2, 5, 1024])
    >>> sorted(model(tokens, targets=tokens))
    ['balance', 'ce', 'mtp']
    """

    def __init__(self, config: Config, impl: str = "fused", init: bool = True):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        main = [Block(config, i) for i in range(config.num_hidden_layers)]
        ahead = [MTP(config, config.num_hidden_layers + i) for i in range(config.num_nextn_predict_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(V, C, _weight=torch.empty(V, C)),  # filled by `init_weights`
            "layers": nn.ModuleList(main + ahead),
            "norm": RMSNorm(C, config.rms_norm_eps),
        })
        self.lm_head = Linear(C, V, bias=False)
        self.compute_dtype = torch.float32  # of activations; the weights are cast in each product
        self.recompute = False  # store only block inputs in training and compute the rest again
        self.isolate = False  # documents packed into one row, each behind its begin token, do not see each other
        self.routing: list[Tensor] = []  # topk_idx (B, T, K) of each MoE layer in the latest forward
        self.use_kernels(impl)
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix from N(0, initializer_range), biases zero, norms one (V3 section 4.2)."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range)
        for module in self.modules():
            if isinstance(module, Linear) and module.bias is not None:
                module.bias.zero_()

    def use_kernels(self, impl: str, fp8: bool = False) -> tuple[str, ...]:
        """Choose the twins of kernels.py for the present device and compute dtype; returns the reasons.

        With `fp8` the products of attention and FFNs are quantised; the head, `eh_proj`, the router, norms and
        attention itself keep the compute dtype (V3 section 3.3), and so does decoding's absorbed `kv_b_proj`.
        """
        widths = (self.config.hidden_size, self.config.moe_intermediate_size)
        self.ops = select(impl, self.lm_head.weight.device, self.compute_dtype, fp8=fp8, widths=widths)
        self.frequencies = rope_frequencies(self.config, self.lm_head.weight.device)
        for name, module in self.named_modules():
            if isinstance(module, Linear) and not (fp8 and name.endswith(("lm_head", "eh_proj"))):
                module.product = self.ops.linear
        return self.ops.reasons

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Name and module of every layer with experts, the MTP modules' included."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, MoE)]

    def update_routing_bias(self, speed: float) -> None:
        """Once per optimizer step, after `gate.counts` was summed over ranks: move the bias, clear the counts."""
        for _, moe in self.moe_layers():
            moe.gate.update_bias(speed)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        return Cache(self.config, batch, capacity, self.lm_head.weight.device, self.compute_dtype)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None, *,
                reduction: str = "mean", mtp: bool = True, last_only: Tensor | None = None,
                replay: list[Tensor] | None = None) -> Tensor | dict[str, Tensor]:
        """Logits (B, T, V), or the losses when `targets` are given.

        tokens, targets (B, T) int64; targets are the tokens that follow, -100 where there is no loss.
        Losses are in nats per token: `ce`, `mtp` (mean over modules) and `balance` (sum over MoE layers,
        without its factor), each a mean; `reduction="sum"` sums over targets (balance over sequences);
        "none" gives `ce` per token (B, T). `last_only` (B,) picks one position per row: logits (B, V).
        Raises UserError when the text is longer than max_position_embeddings or the cache.
        """
        self._check(tokens, targets, cache)
        step = self._new_pass(tokens, cache)
        h, routings = self.trunk(tokens, step, replay)
        if targets is None:
            picked = h if last_only is None else h[torch.arange(len(h), device=h.device), last_only]
            return self.lm_head(picked).to(at_least_float32(h.dtype))
        is_counted = targets != IGNORE  # (B, T)
        counted = [(block.mlp.gate, routing, is_counted) for block, routing in routings]
        nll = self._nll(h, targets)  # (B, T)
        losses = {"ce": nll if reduction == "none" else _reduce(nll, is_counted, reduction)}
        if mtp and self.config.num_nextn_predict_layers:
            losses["mtp"] = self._mtp_loss(h, tokens, targets, step, counted, reduction)
        balance = [balance_loss(routing, mask) for _, routing, mask in counted]
        if reduction != "none" and balance:
            per_sequence = torch.stack(balance).sum(0)  # (B,)
            losses["balance"] = per_sequence.mean() if reduction == "mean" else per_sequence.sum()
        if self.training and torch.is_grad_enabled():
            for gate, routing, mask in counted:
                gate.count(routing.topk_idx, mask)
        return losses

    def trunk(self, tokens: Tensor, step: Pass, replay: list[Tensor] | None = None):
        """Embedding, blocks, final norm: (B, T, C), and [(block, Routing)] of the blocks with experts."""
        h = self.model.embed_tokens(tokens).to(self.compute_dtype)  # (B, T, C)
        routings = []
        forced = iter(replay or [])
        for block in self.model.layers[: self.config.num_hidden_layers]:
            experts = next(forced, None) if isinstance(block.mlp, MoE) else None
            h, routing = self._run(block, h, step, experts)
            if routing is not None:
                routings.append((block, routing))
        self.routing = [routing.topk_idx for _, routing in routings]
        return self.model.norm(h, step.ops), routings

    def _run(self, block: Block, *inputs):
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _mtp_loss(self, h, tokens, targets, step: Pass, counted: list, reduction: str) -> Tensor:
        """`1/D sum_k mean_i -log P^k(token i+k+1)` (V3 eqs 21-25); appends the modules' routing to `counted`."""
        losses = []
        for k, module in enumerate(self.model.layers[self.config.num_hidden_layers :], start=1):
            if tokens.shape[1] <= k:
                break  # too short to look k tokens ahead
            ahead = self.model.embed_tokens(tokens[:, k:]).to(h.dtype)  # (B, T-k, C) token i+k
            T = ahead.shape[1]
            since = None if step.since is None else step.since[:, :T]
            short = replace(step, turn=step.turn[:, :T], since=since)
            h, routing = self._run(module, h[:, :T], ahead, short)
            wanted = targets[:, k:]  # (B, T-k) token i+k+1
            mask = wanted != IGNORE
            losses.append(_reduce(self._nll(h, wanted), mask, "sum" if reduction == "sum" else "mean"))
            counted.append((module.mlp.gate, routing, mask))
        return torch.stack(losses).mean() if losses else h.new_zeros((), dtype=at_least_float32(h.dtype))

    def _nll(self, h: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target in nats, (B, T); 0 where there is none."""
        weight = self.lm_head.weight.to(h.dtype)
        nll = self.ops.linear_cross_entropy(h.flatten(0, 1), weight, targets.flatten())
        return nll.view_as(targets)

    def _new_pass(self, tokens: Tensor, cache: Cache | None) -> Pass:
        T = tokens.shape[1]
        index = torch.arange(T, device=tokens.device).unsqueeze(0)  # (1, T)
        positions = index if cache is None else index + cache.length.unsqueeze(1)  # (1 or B, T)
        angle = positions[:, :, None, None] * self.frequencies.to(tokens.device)  # (., T, 1, P/2)
        config = self.config
        size = yarn_mscale(config.rope_factor, config.rope_mscale)
        size = size / yarn_mscale(config.rope_factor, config.rope_mscale_all_dim)
        step = Pass(self.ops, torch.polar(torch.full_like(angle, size), angle), cache)
        if cache is not None:
            step.places = cache.places(positions)
        if cache is not None and cache.longest:
            # up to the first query of the shortest row nobody's future begins: no need to look there
            late = torch.arange(cache.shortest + 1, cache.shown(T), device=tokens.device)  # (n,)
            step.hidden = late > positions.unsqueeze(-1)
        if self.isolate and cache is None:
            step.since = index.expand_as(tokens).where(tokens == config.bos_token_id, 0).cummax(1).values  # (B, T)
        return step

    def _check(self, tokens: Tensor, targets: Tensor | None, cache: Cache | None) -> None:
        used, limit = 0, self.config.max_position_embeddings
        if cache is not None:
            used, limit = cache.longest, min(limit, cache.capacity)
        if tokens.shape[1] + used > limit:
            raise UserError(f"context: {used} + {tokens.shape[1]} tokens, at most {limit} fit: shorten the text")
        if targets is not None and targets.shape != tokens.shape:
            raise UserError(f"targets: shape {tuple(targets.shape)}, wanted that of tokens {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and tokens.numel():  # on a GPU the look would wait for the device
            V = self.config.vocab_size
            for ids in (tokens,) if targets is None else (tokens, targets.masked_fill(targets == IGNORE, 0)):
                low, high = (int(x) for x in ids.aminmax())
                if low < 0 or high >= V:
                    raise UserError(f"token id {low if low < 0 else high}: the model's vocabulary is 0 to {V - 1} "
                                    f"(vocab_size {V}); the text comes from another tokenizer")


def _reduce(nll: Tensor, mask: Tensor, reduction: str) -> Tensor:
    return nll.sum() if reduction == "sum" else nll.sum() / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------- checkpoints


def disk_tensors(model: Transformer) -> dict[str, Tensor]:
    """Published tensor name -> view into the model, for saving and for loading alike.

    Stacked experts appear as one name per expert and matrix, MTP modules bring their copies of
    embedding and head. Writing into a view writes into the model.
    """
    views = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1))):
                views[f"{prefix}.{i}.gate_proj.weight"], views[f"{prefix}.{i}.up_proj.weight"] = gate, up
        elif last == "down_proj":
            views |= {f"{prefix}.{i}.down_proj.weight": down for i, down in enumerate(tensor)}
        else:
            views[name] = tensor
    return views | {name: views[source] for name, source in _mtp_copies(model.config).items()}


def _mtp_prefixes(config: Config) -> tuple[str, ...]:
    return tuple(f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))


def _mtp_copies(config: Config) -> dict[str, str]:
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {prefix + name: source for prefix in _mtp_prefixes(config) for name, source in shared.items()}


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well: old or new, never half a file.

    Raises UserError when the disk is full or the folder cannot be written; `path` is then as before.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; the earlier file is untouched") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def save_pretrained(model: Transformer, directory: str | Path, tokenizer=None) -> None:
    """Write a Hugging Face directory: config.json, model.safetensors (sharded above 5 GB), tokenizer files."""
    directory = Path(directory)
    shards, size = [{}], 0
    for name, tensor in disk_tensors(model).items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files, contents = ["model.safetensors"], {"config.json": model.config.to_dict()}
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        contents["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with ExitStack() as stack:  # all files are complete on disk before the first one takes its place
        for name, value in contents.items():
            stack.enter_context(written_aside(directory / name)).write_text(json.dumps(value, indent=2) + "\n")
        for name, shard in zip(files, shards):
            aside = stack.enter_context(written_aside(directory / name))
            save_file({k: v.clone().contiguous() for k, v in shard.items()}, aside, metadata={"format": "pt"})
    for old in directory.glob("model*.safetensors*"):  # of a save with another number of shards
        if old.name not in (*files, *contents):
            old.unlink()
    if tokenizer is not None:
        tokenizer.save(directory)


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def load_config(directory: str | Path) -> Config:
    """The Config of a checkpoint directory. Raises UserError when there is none or it is another model's."""
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no checkpoint in {directory}: {path.name} is missing (python train.py makes one)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted a JSON object")
    return Config.from_dict(values)


def load_pretrained(directory: str | Path, impl: str = "fused", device="cpu", dtype=torch.float32) -> Transformer:
    """Build the model of a Hugging Face directory, ours or another's, tensor by tensor.

    Peak memory is the model plus one tensor. Raises UserError naming every missing or unexpected tensor
    and every wrong shape. A checkpoint without MTP weights gives a model without MTP, with a line saying so.
    """
    config = load_config(directory)
    names = {name: file for file in _checkpoint_files(Path(directory)) for name in file.keys()}
    prefixes = _mtp_prefixes(config)
    if prefixes and not any(name.startswith(prefixes) for name in names):
        print(f"{directory}: no MTP weights, loading the main model only", file=sys.stderr)
        config = replace(config, num_nextn_predict_layers=0)
    model = Transformer(config, impl, init=False).to(device=device, dtype=dtype)
    for _, moe in model.moe_layers():
        moe.gate.float()  # the router and its bias stay float32
    views, copies = disk_tensors(model), _mtp_copies(config).keys()
    wanted, got = views.keys() - copies, names.keys() - copies
    for what, odd in (("missing", wanted - got), ("unexpected", got - wanted)):
        if odd:
            raise UserError(f"{directory}: {len(odd)} {what} tensors: {', '.join(sorted(odd))}")
    for name in sorted(wanted):
        tensor = names[name].get_tensor(name)
        if tensor.shape != views[name].shape:
            raise UserError(f"{directory}: {name} has shape {tuple(tensor.shape)}, "
                            f"config.json wants {tuple(views[name].shape)}")
        views[name].copy_(tensor)
    model.compute_dtype = dtype
    model.use_kernels(impl)
    return model


def _checkpoint_files(directory: Path) -> list:
    index = directory / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [safe_open(directory / Path(name).name, framework="pt") for name in names]
    except FileNotFoundError as error:
        raise UserError(f"no weights in {directory}: {error}") from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}: weights cannot be read ({error}): the file is truncated or foreign") from None


# ------------------------------------------------------------------------------------------ self-portrait


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by the hub's convention: the routing bias counts, copies inside the MTP modules do not.

    Keys: `main` (without MTP), `mtp`, `total`, `embedding`, `active` (used per token, without the input
    embedding, which is a lookup, but with the head; MTP not included).
    """
    with torch.device("meta"):
        model = Transformer(config, init=False)
    size = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    prefixes = _mtp_prefixes(config)
    mtp = sum(n for name, n in size.items() if name.startswith(prefixes))
    experts = sum(n for name, n in size.items() if ".experts." in name and not name.startswith(prefixes))
    total, embedding = sum(size.values()), size["model.embed_tokens.weight"]
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"main": total - mtp, "mtp": mtp, "total": total, "embedding": embedding,
            "active": total - mtp - embedding - idle}


def flops_per_token(config: Config, T: int) -> float:
    """FLOPs of forward and backward per token of the main model in a text of T tokens.

    `6 N + 3 L H (D + P + Dv) * 2 * T/2`, with N the active parameters; attention expanded and causal.
    With T = 4096 this gives the 250 GFLOP of V3 (arXiv 2505.09343, table 2).
    """
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = 3 * config.num_hidden_layers * config.num_attention_heads * width * T
    return 6.0 * count_parameters(config)["active"] + attention


def cache_numbers(config: Config) -> dict[str, int]:
    """Numbers cached per token: MLA, and what MHA and GQA with (at most) 8 groups of the same heads would need."""
    L, H, D = config.num_hidden_layers, config.num_attention_heads, config.qk_nope_head_dim
    groups = max(1, min(8, H // 2))
    return {"MLA": (config.kv_lora_rank + config.qk_rope_head_dim) * L,
            f"GQA, {groups} groups": 2 * groups * D * L, "MHA": 2 * H * D * L}


def portrait(config: Config, name: str) -> str:
    """The printed self-portrait: modules with shapes, parameters, FLOPs, cache, memory."""
    with torch.device("meta"):
        model = Transformer(config, init=False)
    lines = [f"{name}: {config.num_hidden_layers} layers, {config.n_routed_experts} experts, "
             f"{config.num_experts_per_tok} per token", "", f"{'tensor':58}{'shape':>22}{'parameters':>18}"]
    shown = {0, config.first_k_dense_replace, config.num_hidden_layers}  # one layer of each kind
    for tensor_name, tensor in model.state_dict().items():
        layer = tensor_name.split(".")[2] if ".layers." in tensor_name else None
        if layer is None or int(layer) in shown:
            lines.append(f"{tensor_name:58}{str(tuple(tensor.shape)):>22}{tensor.numel():>18,}")
    counts, T = count_parameters(config), min(4096, config.max_position_embeddings)
    lines += ["", f"parameters            {counts['main']:,}  (main model, routing bias counted)",
              f"  MTP modules         {counts['mtp']:,}  (more, without their copies of embedding and head)",
              f"  active per token    {counts['active']:,}  (head counted, input embedding not, MTP not)",
              f"FLOPs per token       {_si(flops_per_token(config, T))}FLOP  (forward + backward, T = {T}, causal)"]
    for kind, numbers in cache_numbers(config).items():
        lines.append(f"cache per token       {2 * numbers:,} bytes in bf16 with {kind}")
    lines.append(f"memory to train       {_si(16 * counts['total'])}B  (float32 weight, gradient, two AdamW moments; "
                 "activations come on top)")
    return "\n".join(lines + (_v3_bill(config) if name == "v3" else []))


def _v3_bill(config: Config) -> list[str]:
    """The training bill of V3 (V3 table 1) recomputed from its parts."""
    tokens, per_trillion, extension, post = 14.8e12, 180e3, 119e3, 5e3
    pretraining = tokens / 1e12 * per_trillion  # H800 hours
    hours = pretraining + extension + post
    flops = tokens * flops_per_token(config, 4096)
    return ["", "training bill (V3 table 1, at $2 per H800 hour)",
            f"  pretraining         14.8T tokens x 180K hours per 1T = {pretraining / 1e3:,.0f}K hours",
            f"  + extension 119K + post-training 5K = {hours / 1e6:.3f}M H800 hours = ${2 * hours / 1e6:.3f}M",
            f"  check               {_si(flops)}FLOP / {pretraining / 1e6:.3f}M hours = "
            f"{flops / pretraining / 3600 / 1e12:.0f} TFLOP/s per GPU"]


def _si(value: float) -> str:
    for prefix in ("", "K", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Y"


def main(argv: list[str]) -> None:
    """Print the self-portrait of a preset or of a checkpoint directory."""
    name = argv[0] if argv else "tiny"
    if len(argv) > 1 or name.startswith("-"):
        raise UserError(f"got {' '.join(argv)}, wanted: python model.py [{' | '.join(PRESETS)} | directory]")
    print(portrait(load_config(name) if Path(name).is_dir() else Config.preset(name), name))


if __name__ == "__main__":
    run_main(main)
