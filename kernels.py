"""Every costly operation of the model twice: a readable twin and a fast twin, side by side.

The *reference* twin is the equation, written so that it can be read. The *fused* twin gives the same
numbers with less work or less memory, in plain PyTorch without Triton. Three operations have a third twin
in C, for decoding, where a C compiler is at hand. `OPS` pairs them, `tests/test_kernels.py` walks the pairs
(values, gradients, odd shapes, dtypes), and `select` picks one side for a model and says why.

Shapes use the legend of model.py.

    python kernels.py [tiny | small | medium] [fp32 | bf16]     both twins of every operation, measured here
"""

import ctypes
import hashlib
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError, run_main

IGNORE = -100  # a target with this value has no loss, as in F.cross_entropy


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and softmaxes: float32, or float64 when the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


# --------------------------------------------------------------------------------------- matrix products


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's float32 products are as exact as MKL's here, which on many CPUs take twice as long.

    PyTorch calls oneDNN for them at the precision "medium" only, which permits, but does not ask for, rounding
    to bfloat16; a CPU with AMX does round.
    """
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    x = torch.linspace(-9.0, 9.0, 256 * 256).sin().view(256, 256)
    with precision("medium"):
        error = (x @ x - x.double() @ x.double()).abs().max()
    return bool(error < 1e-3)  # rounding to bfloat16 is off by 0.1


@contextmanager
def precision(name: str):
    """torch's precision of float32 products inside the block, in the whole process; afterwards as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def by_onednn(function: Callable, least: int = 64) -> Callable:
    """The function with its float32 products by oneDNN, where these are exact and the first tensor has `least` rows.

    With fewer rows MKL is the faster one. Nothing is switched for another device or dtype, or where the caller
    has chosen a precision other than torch's default.
    """

    @wraps(function)
    def switched(*args):
        x = args[0] if torch.is_tensor(args[0]) else args[1]  # behind the ctx of an autograd Function
        rows = x.shape[: max(1, x.ndim - 1)].numel()
        is_fit = rows >= least and x.dtype == torch.float32 and x.device.type == "cpu"
        if not is_fit or torch.get_float32_matmul_precision() != "highest" or not onednn_is_exact():
            return function(*args)
        with precision("medium"):
            return function(*args)

    return switched


def linear_reference(x, weight, bias=None):
    """`y = x W^T + b`. x (..., I); weight (O, I); bias (O,)."""
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """As autograd would do it, but by oneDNN."""

    @staticmethod
    @by_onednn
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @by_onednn
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


_product = by_onednn(F.linear)


def linear_fused(x, weight, bias=None):
    """The same by the faster of two libraries."""
    y = (_Linear.apply if torch.is_grad_enabled() else _product)(x, weight)
    return y if bias is None else y + bias


# ---------------------------------------------------------------------------------------------- RMSNorm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`, with the mean taken in float32.

    >>> rms_norm_reference(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    wide = x.to(at_least_float32(x.dtype))  # (..., C)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return weight.to(x.dtype) * (wide * scale).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per row, where autograd would keep the normed row as well."""

    @staticmethod
    def normed(x, weight, eps):
        """The result, and the factor of each row (..., 1)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x.dtype))  # (..., 1)
        scale = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps)).to(x.dtype)
        return (x * scale).mul_(weight.to(x.dtype)), scale

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _RMSNorm.normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, weight_ = x * scale, weight.to(x.dtype)
        along = grad * normed  # (..., C)
        grad_weight = along.reshape(-1, len(weight)).sum(0, dtype=at_least_float32(x.dtype))
        share = (along @ weight_).div_(-len(weight)).unsqueeze(-1)  # (..., 1)
        grad_x = (grad * weight_).addcmul_(normed, share).mul_(scale)
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as one autograd Function."""
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _RMSNorm.normed(x, weight, eps)[0]


# ------------------------------------------------------------------------------------------------- RoPE


def apply_rope_reference(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the adjacent pairs `(x0, x1), (x2, x3), ...` by their angles (RoFormer; V3 eqs 3 and 8).

    x (..., P); turn (..., P/2) complex, `cos + i sin` of the angles, broadcast against x. The checkpoints of
    DeepSeek are written for adjacent pairs; a rotation of halves would need permuted weights.
    """
    cos, sin = turn.real, turn.imag
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., P/2) each
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)  # (..., P/2, 2)
    return turned.flatten(-2).to(x.dtype)


def apply_rope_fused(x: Tensor, turn: Tensor) -> Tensor:
    """The same as one complex product: `(x0 + i x1) * (cos + i sin)`."""
    wide = x.to(at_least_float32(x.dtype)).unflatten(-1, (-1, 2)).contiguous()  # (..., P/2, 2)
    return torch.view_as_real(torch.view_as_complex(wide) * turn).flatten(-2).to(x.dtype)


# -------------------------------------------------------------------------------------------- attention


def causal_attention_reference(q_nope, q_pe, k_nope, k_pe, v, scale, since=None):
    """Expanded latent attention of a sequence on itself (V3 eqs 9-10).

    `o_i = sum_{j<=t} softmax_j(scale * (q_nope_i . k_nope_j + q_pe_i . k_pe_j)) v_j`

    q_nope, k_nope (B, T, H, D); q_pe (B, T, H, P); k_pe (B, T, P), one for all heads; v (B, T, H, Dv);
    since (B, T) int64, where given: the first token that each one sees, the beginning of its document.
    Returns (B, T, H, Dv).
    """
    T = q_nope.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q_nope, k_nope)  # (B, H, T, T)
    scores = (scores + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)) * scale
    future = torch.ones(T, T, dtype=torch.bool, device=v.device).triu(1)  # (T, T)
    scores = scores.to(at_least_float32(v.dtype)).masked_fill(future, float("-inf"))
    if since is not None:
        scores = scores.masked_fill(before(since, T).unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)


def before(since: Tensor, keys: int) -> Tensor:
    """Which of the first `keys` tokens lie before `since` (B, T), and are not seen: (B, T, keys) bool."""
    return torch.arange(keys, device=since.device) < since.unsqueeze(-1)


class _TiledAttention(torch.autograd.Function):
    """Attention in tiles of queries whose scores stay in the cache; the backward computes them again."""

    TILE = 128  # queries
    CACHE = 1 << 18  # scores of one tile: 1 MiB in float32

    @staticmethod
    def blocks(v):
        """Slices of the batch: as many rows as fit into CACHE together."""
        B, T, H, _ = v.shape
        rows = max(1, _TiledAttention.CACHE // max(1, H * T * min(T, _TiledAttention.TILE)))
        return [slice(start, min(start + rows, B)) for start in range(0, B, rows)]

    @staticmethod
    def packed(rows, q_nope, q_pe, k_nope, k_pe, v, scale):
        """Heads first: q, already scaled, and k (rows*H, T, D+P), v (rows*H, T, Dv)."""
        q_nope, q_pe, k_nope, v = (x[rows].transpose(1, 2) for x in (q_nope, q_pe, k_nope, v))  # (rows, H, T, .)
        D, P = q_nope.shape[-1], q_pe.shape[-1]
        q, k = (x.new_empty(*x.shape[:3], D + P) for x in (q_nope, k_nope))
        q[..., :D], q[..., D:], k[..., :D], k[..., D:] = q_nope, q_pe, k_nope, k_pe[rows].unsqueeze(1)
        return [x.flatten(0, 1) for x in (q.mul_(scale), k, v)]

    @staticmethod
    def tiles(q, k, since):
        """Yields (queries, keys, weights): two slices and softmax(q k^T) between them, (rows*H, n, keys)."""
        T, n = q.shape[1], min(q.shape[1], _TiledAttention.TILE)
        future = torch.full((n, n), float("-inf"), dtype=q.dtype).triu_(1)
        for start in range(0, T, n):
            queries, keys = slice(start, min(start + n, T)), slice(0, min(start + n, T))
            scores = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
            size = scores.shape[1]
            scores[:, :, start:] += future[:size, :size]
            if since is not None:
                hidden = before(since[:, queries], keys.stop).unsqueeze(1)  # (rows, 1, n, keys)
                scores.unflatten(0, (len(since), -1)).masked_fill_(hidden, float("-inf"))
            yield queries, keys, scores.softmax(-1)

    @staticmethod
    @by_onednn
    def forward(ctx, q_nope, q_pe, k_nope, k_pe, v, scale, since):
        ctx.save_for_backward(q_nope, q_pe, k_nope, k_pe, v)
        ctx.scale, ctx.since = scale, since
        B, T, H, Dv = v.shape
        out = torch.empty(B, T, H, Dv, dtype=v.dtype)
        for rows in _TiledAttention.blocks(v):
            q, k, values = _TiledAttention.packed(rows, q_nope, q_pe, k_nope, k_pe, v, scale)
            for queries, keys, weights in _TiledAttention.tiles(q, k, None if since is None else since[rows]):
                o = torch.bmm(weights, values[:, keys])  # (rows*H, n, Dv)
                out[rows, queries] = o.unflatten(0, (-1, H)).transpose(1, 2)
        return out

    @staticmethod
    @by_onednn
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        D, H = inputs[0].shape[-1], inputs[0].shape[2]
        d_q_nope, d_q_pe, d_k_nope, d_k_pe, d_v = grads = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        for rows in _TiledAttention.blocks(inputs[-1]):
            q, k, values = _TiledAttention.packed(rows, *inputs, ctx.scale)
            d_out = grad[rows].transpose(1, 2).flatten(0, 1)  # (rows*H, T, Dv)
            d_q, d_k = torch.empty_like(q), torch.zeros_like(k, dtype=at_least_float32(k.dtype))
            d_values = torch.zeros_like(values, dtype=d_k.dtype)
            for queries, keys, weights in _TiledAttention.tiles(q, k, None if ctx.since is None else ctx.since[rows]):
                here = d_out[:, queries]  # (rows*H, n, Dv)
                d_values[:, keys] += torch.bmm(weights.transpose(1, 2), here)
                d_weights = torch.bmm(here, values[:, keys].transpose(1, 2))  # (rows*H, n, keys)
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                d_q[:, queries] = torch.bmm(d_scores, k[:, keys])
                d_k[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, queries])
            d_q, d_k, d_values = (x.unflatten(0, (-1, H)).transpose(1, 2) for x in (d_q.mul_(ctx.scale), d_k, d_values))
            d_q_nope[rows], d_q_pe[rows], d_v[rows] = d_q[..., :D], d_q[..., D:], d_values
            d_k_nope[rows], d_k_pe[rows] = d_k[..., :D], d_k[..., D:].sum(2)
        return *grads, None, None


def causal_attention_fused(q_nope, q_pe, k_nope, k_pe, v, scale, since=None):
    """The same without ever storing T x T weights: own tiles on a CPU, torch's flash kernels elsewhere.

    Those want one head width, so that narrow values are padded with zeros.
    """
    if v.device.type == "cpu":
        return _TiledAttention.apply(q_nope, q_pe, k_nope, k_pe, v, scale, since)
    H, Dv = v.shape[2:]
    q = torch.cat((q_nope, q_pe), -1).transpose(1, 2)  # (B, H, T, D+P)
    k = torch.cat((k_nope, k_pe.unsqueeze(2).expand(-1, -1, H, -1)), -1).transpose(1, 2)
    padded = F.pad(v, (0, max(0, q.shape[-1] - Dv))).transpose(1, 2)  # (B, H, T, D+P)
    T, seen = q.shape[2], None
    if since is not None:  # (B, 1, T, T)
        seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() & ~before(since, T).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, padded, seen, is_causal=seen is None, scale=scale)
    return out[..., :Dv].transpose(1, 2)  # (B, T, H, Dv)


def latent_attention_reference(q_latent, q_pe, latent, hidden, scale):
    """Absorbed latent attention: every head reads the same cached latents (V2 section 2.1.2).

    `z_i = sum_{s not hidden} softmax_s(scale * (q_latent_i . c_s + q_pe_i . k_pe_s)) c_s`

    q_latent (B, T, H, R) is `W_UK^T q_nope`; q_pe (B, T, H, P); latent (B, S, R+P) holds `[c ; k_pe]`;
    hidden (B, T, n) bool: which of the last n keys lie after the query; all see the S - n before them.
    Returns (B, T, H, R); the caller applies `W_UV`.
    """
    c_kv, k_pe = latent.split((q_latent.shape[-1], q_pe.shape[-1]), dim=-1)  # (B, S, R), (B, S, P)
    scores = torch.einsum("bthr,bsr->bths", q_latent, c_kv) + torch.einsum("bthp,bsp->bths", q_pe, k_pe)
    hidden = F.pad(hidden, (latent.shape[1] - hidden.shape[-1], 0)).unsqueeze(2)  # (B, T, 1, S)
    scores = (scores * scale).to(at_least_float32(latent.dtype)).masked_fill(hidden, float("-inf"))
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1).to(latent.dtype), c_kv)


def latent_attention_fused(q_latent, q_pe, latent, hidden, scale):
    """The same as two products with the cache as it lies in memory: heads are queries of one shared key.

    The weighted sum takes `k_pe` along, which is cheaper than to copy the latents away from it. Rows go in blocks
    whose latents (2^18 numbers) are still in the processor's cache when the second product reads them.
    """
    (B, T, H, R), (S, width) = q_latent.shape, latent.shape[1:]
    q = torch.cat((q_latent, q_pe), -1).mul_(scale).view(B, T * H, width)
    size = max(1, (1 << 18) // (S * width)) if latent.is_cpu else B
    is_tall = B > 1 or S > 4096  # then the long side goes first; else there is least to do
    if B <= size or B == 1:
        z = _latent_block(latent, q, hidden, is_tall)  # (B, T*H, R+P)
    else:
        blocks = zip(latent.split(size), q.split(size), hidden.split(size))
        z = torch.cat([_latent_block(*block, is_tall) for block in blocks])
    return z[..., :R].view(B, T, H, R)


@partial(by_onednn, least=5000)  # one long row; where a block has several, MKL is the faster one
def _latent_block(latent, q, hidden, is_tall: bool):
    scores = torch.bmm(latent, q.mT).mT.contiguous() if is_tall else torch.bmm(q, latent.mT)  # (rows, T*H, S)
    scores = scores.to(at_least_float32(latent.dtype))
    late = scores[..., latent.shape[1] - hidden.shape[-1] :]  # (rows, T*H, n)
    late.unflatten(1, (hidden.shape[1], -1)).masked_fill_(hidden.unsqueeze(2), float("-inf"))
    return torch.bmm(scores.softmax(-1).to(latent.dtype), latent)


# ---------------------------------------------------------------------------------------------- experts


def expert_ffn_reference(u, gate_up, down, topk_idx, gates, linear=F.linear):
    """The routed half of a MoE layer (V3 eq 12): `y_n = sum_k gates_nk * FFN_{topk_idx_nk}(u_n)`.

    u (N, C); gate_up (E, 2F, C), gate rows first; down (E, C, F), both in any dtype and cast to that of u expert by
    expert; topk_idx and gates (N, K). `FFN(u) = W_down (silu(W_gate u) * W_up u)`. No token is dropped.
    Returns (N, C).
    """
    y = torch.zeros_like(u, dtype=at_least_float32(u.dtype))  # (N, C)
    for expert in range(gate_up.shape[0]):
        rows, slots = torch.where(topk_idx == expert)  # the (token, slot) pairs of this expert
        gate, up = linear(u[rows], gate_up[expert].to(u.dtype)).chunk(2, dim=-1)  # (n, F) each
        out = linear(F.silu(gate) * up, down[expert].to(u.dtype))  # (n, C)
        y = y.index_add(0, rows, out.to(y.dtype) * gates[rows, slots, None].to(y.dtype))
    return y.to(u.dtype)


class _ExpertFFN(torch.autograd.Function):
    """One expert after the other over sorted pairs; keeps the pre-activations (slots, 2F) and nothing else.

    The rows of an expert are rounded up with slots of weight 0: oneDNN compiles a kernel for every number
    of rows that it has not yet seen, half a millisecond each.
    """

    @staticmethod
    def groups(topk_idx, gates, E):
        """Sort the pairs (token, k) by expert into padded groups of slots.

        Returns `order` (N*K,), the pairs sorted; `slot` (N*K,), where they went; `token` and `weight` (slots,)
        of every slot; and the slice of each expert's slots.
        """
        chosen, K = topk_idx.flatten(), topk_idx.shape[1]
        multiple = 2 ** min(6, max(3, (len(chosen) // (16 * E)).bit_length()))  # 8 to 64
        counts = torch.bincount(chosen, minlength=E)  # (E,)
        padded = (counts + (multiple - 1)).div_(multiple, rounding_mode="floor").mul_(multiple)
        ends = padded.cumsum(0)
        order = chosen.argsort()
        moved = (ends - padded) - (counts.cumsum(0) - counts)  # (E,) first slot less first pair
        slot = torch.arange(len(chosen)) + moved[chosen[order]]
        ends = ends.tolist()
        token, weight = slot.new_zeros(ends[-1]), gates.new_zeros(ends[-1])
        token[slot], weight[slot] = order // K, gates.flatten()[order]
        return order, slot, token, weight, [slice(*pair) for pair in zip([0] + ends, ends)]

    @staticmethod
    @by_onednn
    def forward(ctx, u, gate_up, down, topk_idx, gates):
        order, slot, token, weight, experts = _ExpertFFN.groups(topk_idx, gates, len(gate_up))
        weight = weight.to(u.dtype).unsqueeze(1)  # (slots, 1)
        y = torch.zeros(u.shape, dtype=at_least_float32(u.dtype))  # (N, C)
        packed = torch.empty(len(token), gate_up.shape[1], dtype=u.dtype)  # (slots, 2F)
        for expert, here in enumerate(experts):
            if here.start == here.stop:
                continue
            torch.mm(u.index_select(0, token[here]), gate_up[expert].t().to(u.dtype), out=packed[here])
            gate, up = packed[here].chunk(2, dim=-1)  # (n, F)
            hidden = F.silu(gate).mul_(up).mul_(weight[here])
            y.index_add_(0, token[here], (hidden @ down[expert].t().to(u.dtype)).to(y.dtype))
        ctx.save_for_backward(u, gate_up, down, gates, packed, order, slot, token, weight)
        ctx.experts = experts
        return y.to(u.dtype)

    @staticmethod
    @by_onednn
    def backward(ctx, grad_y):
        u, gate_up, down, gates, packed, order, slot, token, weight = ctx.saved_tensors
        grad_u = torch.zeros(u.shape, dtype=at_least_float32(u.dtype))
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_weight = torch.empty(len(token), dtype=u.dtype)
        for expert, here in enumerate(ctx.experts):
            if here.start == here.stop:
                grad_gate_up[expert], grad_down[expert] = 0, 0
                continue
            x, dy = u.index_select(0, token[here]), grad_y.index_select(0, token[here])  # (n, C)
            gate, up = packed[here].chunk(2, dim=-1)  # (n, F)
            silu, d_hidden = F.silu(gate), dy @ down[expert].to(u.dtype)  # before the weight
            hidden = silu * up
            grad_weight[here] = (d_hidden * hidden).sum(-1)
            d_hidden.mul_(weight[here])
            grad_down[expert] = dy.t() @ hidden.mul_(weight[here])
            d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
            d_packed = torch.cat((d_gate, silu.mul_(d_hidden)), dim=-1)  # (n, 2F)
            grad_gate_up[expert] = d_packed.t() @ x
            grad_u.index_add_(0, token[here], (d_packed @ gate_up[expert].to(u.dtype)).to(grad_u.dtype))
        grad_gates = torch.empty_like(gates).flatten()
        grad_gates[order] = grad_weight[slot].to(gates.dtype)
        return grad_u.to(u.dtype), grad_gate_up, grad_down, None, grad_gates.view_as(gates)


def expert_ffn_fused(u, gate_up, down, topk_idx, gates):
    """The same over sorted pairs, gate and up joined in one product, written as one autograd Function."""
    return _ExpertFFN.apply(u, gate_up, down, topk_idx, gates)


def expert_ffn_grouped(u, gate_up, down, topk_idx, gates):
    """The same for a GPU: sorted pairs through torch's grouped product, no word from the device to the host."""
    E, K = len(gate_up), topk_idx.shape[1]
    chosen, order = topk_idx.flatten().sort()  # (N*K,) each
    token, weight = order // K, gates.flatten()[order].unsqueeze(1)  # (N*K,), (N*K, 1)
    ends = torch.searchsorted(chosen, torch.arange(E, device=u.device), right=True, out_int32=True)  # (E,)
    gate, up = F.grouped_mm(u[token], gate_up.to(u.dtype).mT, offs=ends).chunk(2, dim=-1)  # (N*K, F) each
    out = F.grouped_mm(F.silu(gate) * up, down.to(u.dtype).mT, offs=ends)  # (N*K, C)
    wide = at_least_float32(u.dtype)
    return torch.zeros_like(u, dtype=wide).index_add(0, token, out * weight.to(wide)).to(u.dtype)


# ------------------------------------------------------------------------------------------------- FP8


TILE = 128  # V3 section 3.3: activations are scaled in tiles of 1 x 128, weights in blocks of 128 x 128
E4M3_MAX = 448.0
LEAST = 1e-30  # so that a block of zeros has a scale; DeepSeek's code takes 1e-4 for activations


def quantise(x: Tensor, rows: int, least: float = LEAST, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x (M, K) and the float32 scale of every block of `rows` x 128: `s = max(amax, least) / 448`.

    At a ragged edge a block holds what there is. Scales have shape (ceil(M/rows), ceil(K/128)). With `power_of_two`
    they are rounded up to one: codes can then be grouped anew without a second rounding.
    """
    M, K = x.shape
    padded = x.new_zeros(M + -M % rows, K + -K % TILE, dtype=torch.float32)
    padded[:M, :K] = x
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // TILE, TILE)
    scales = blocks.abs().amax((1, 3)).clamp(min=least) / E4M3_MAX
    scales = scales.log2().ceil().exp2() if power_of_two else scales
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:M, :K], scales


def dequantise(codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The float32 matrix that the codes (M, K) and scales of `quantise` stand for."""
    M, K = codes.shape
    return codes.float() * scales.repeat_interleave(TILE, 1)[:, :K].repeat_interleave(rows, 0)[:M]


def fp8_product(a, b, b_rows: int, dtype, units: bool = False) -> Tensor:
    """`a b^T` of quantised a (M, K) in tiles and b (N, K) in tiles or blocks, summed in float32: (M, N).

    With `units` by the FP8 units of a Hopper GPU, else emulated: the same products of the same codes.
    """
    if units and a[0].shape[1] % TILE == 0 and len(b[0]) % TILE == 0:
        kinds = {1: F.ScalingType.BlockWise1x128, TILE: F.ScalingType.BlockWise128x128}
        a_scales, b_scales = a[1].t().contiguous().t(), b[1].t().contiguous().t()  # rows lie next to each other
        return F.scaled_mm(a[0].contiguous(), b[0].contiguous().t(), a_scales, kinds[1], b_scales, kinds[b_rows],
                           output_dtype=torch.bfloat16).to(dtype)
    return (dequantise(*a, 1) @ dequantise(*b, b_rows).t()).to(dtype)


def try_fp8_units(device: torch.device) -> tuple[bool, str]:
    """Whether F.scaled_mm multiplies scaled blocks there as the emulation does, and what to say about it."""
    if device.type != "cuda" or not hasattr(F, "scaled_mm") or torch.cuda.get_device_capability(device) != (9, 0):
        return False, f"fp8 emulated: {device.type} here has no units for scaled FP8 blocks"
    x = torch.randn(2 * TILE, 2 * TILE, device=device)
    a, b = quantise(x, 1), quantise(x, TILE)
    exact = fp8_product(a, b, TILE, torch.float32)
    try:
        off = (fp8_product(a, b, TILE, torch.float32, units=True) - exact).norm() / exact.norm()
    except RuntimeError as error:
        return False, f"fp8 emulated: F.scaled_mm refuses, {error}"
    return bool(off < 0.01), f"fp8 by F.scaled_mm where widths are multiples of 128 (else emulated), off by {off:.1e}"


class _FP8Linear(torch.autograd.Function):
    """Quantised forward, input gradient and weight gradient (V3 figure 6); keeps the codes of the input.

    The weight gradient wants them in tiles along the tokens, hence their scales are powers of two (V3 section 3.3.2).
    """

    @staticmethod
    @by_onednn
    def forward(ctx, x, weight, units):
        flat = x.reshape(-1, x.shape[-1])  # (M, K)
        a, w = quantise(flat, 1, 1e-4, power_of_two=True), quantise(weight, TILE)
        ctx.save_for_backward(*a, *w)
        ctx.dtypes, ctx.units = (x.dtype, weight.dtype), units
        return fp8_product(a, w, TILE, x.dtype, units).view(*x.shape[:-1], len(weight))

    @staticmethod
    @by_onednn
    def backward(ctx, grad):
        codes, scales, w_codes, w_scales = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])  # (M, N)
        dx = fp8_product(quantise(dy, 1), (w_codes.t(), w_scales.t()), TILE, ctx.dtypes[0], ctx.units)
        x_again = quantise(dequantise(codes, scales, 1).t(), 1, power_of_two=True)  # (K, M), along the tokens
        dw = fp8_product(quantise(dy.t(), 1), x_again, 1, ctx.dtypes[1], ctx.units)  # (N, K)
        return dx.view(*grad.shape[:-1], dx.shape[-1]), dw, None


def linear_fp8(x, weight, bias=None, units=False):
    """The same with all three products of training in FP8, as V3 was trained (section 3.3)."""
    y = _FP8Linear.apply(x, weight, units)
    return y if bias is None else y + bias


def expert_ffn_fp8(u, gate_up, down, topk_idx, gates, units=False):
    """The experts with their products in FP8."""
    return expert_ffn_reference(u, gate_up, down, topk_idx, gates, linear=partial(linear_fp8, units=units))


# ---------------------------------------------------------------------------------------- cross-entropy


def linear_cross_entropy_reference(h, weight, targets):
    """Negative log-likelihood in nats of each target: `-log softmax(h W^T)[target]`, 0 where IGNORE.

    h (N, C); weight (V, C); targets (N,). Returns (N,) in float32 (float64 for float64 inputs).
    """
    logits = F.linear(h, weight).to(at_least_float32(h.dtype))  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy in blocks of rows: logits exist for one block at a time, the backward computes them again."""

    BLOCK = 1 << 19  # logits in a block: 2 MiB in float32

    @staticmethod
    def blocks(h, weight):
        size = max(128, _LinearCrossEntropy.BLOCK // len(weight))
        return [slice(start, start + size) for start in range(0, len(h), size)]

    @staticmethod
    @by_onednn
    def forward(ctx, h, weight, targets):
        nll = torch.empty(len(h), dtype=at_least_float32(h.dtype), device=h.device)
        for rows in _LinearCrossEntropy.blocks(h, weight):
            nll[rows] = linear_cross_entropy_reference(h[rows], weight, targets[rows])
        ctx.save_for_backward(h, weight, targets)
        return nll

    @staticmethod
    @by_onednn
    def backward(ctx, grad_nll):
        h, weight, targets = ctx.saved_tensors
        factor = grad_nll.masked_fill(targets == IGNORE, 0).unsqueeze(1).to(h.dtype)  # (N, 1)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=grad_nll.dtype)
        for rows in _LinearCrossEntropy.blocks(h, weight):
            d_logits = F.linear(h[rows], weight).to(grad_nll.dtype).softmax(-1)  # (n, V), and the target's less 1
            target = targets[rows].clamp(min=0).unsqueeze(1)  # (n, 1): IGNORE becomes a legal index
            d_logits = d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1.0)).to(h.dtype)
            torch.mm(d_logits, weight, out=grad_h[rows])
            grad_weight += d_logits.t() @ (h[rows] * factor[rows])
        return grad_h.mul_(factor), grad_weight.to(weight.dtype), None


def linear_cross_entropy_fused(h, weight, targets):
    """The same without ever holding all logits in float32."""
    return _LinearCrossEntropy.apply(h, weight, targets)


# ---------------------------------------------------------------------------------------- decoding in C


# When one token follows the other, products are short and what costs is to call them: a MoE layer is some 25 calls
# into torch for a token's four experts. Here it is one, compiled with the machine's own C compiler in a quarter of a
# second.
C_SOURCE = r"""
#include <math.h>

// y (N, O) = x W^T for N rows of I numbers that may lie anywhere, four of them at a time beside each row of W
static void product(float *y, const float **x, long N, const float *w, long O, long I) {
    #pragma omp parallel for if (N * O * I > 1 << 18)
    for (long o = 0; o < O; o++) {
        const float *v = w + o * I;
        long n = 0;
        for (; n + 4 <= N; n += 4) {
            const float *p = x[n], *q = x[n + 1], *r = x[n + 2], *s = x[n + 3];
            float a = 0, b = 0, c = 0, d = 0;
            for (long i = 0; i < I; i++) a += p[i] * v[i], b += q[i] * v[i], c += r[i] * v[i], d += s[i] * v[i];
            y[n * O + o] = a, y[(n + 1) * O + o] = b, y[(n + 2) * O + o] = c, y[(n + 3) * O + o] = d;
        }
        for (; n < N; n++) {
            float a = 0;
            for (long i = 0; i < I; i++) a += x[n][i] * v[i];
            y[n * O + o] = a;
        }
    }
}

void linear(float *y, const float *x, const float *w, long N, long O, long I) {
    const float *rows[N];
    for (long n = 0; n < N; n++) rows[n] = x + n * I;
    product(y, rows, N, w, O, I);
}

void rms_norm(float *y, const float *x, const float *w, double eps, long N, long C, long stride) {
    #pragma omp parallel for if (N * C > 1 << 18)
    for (long n = 0; n < N; n++) {
        const float *row = x + n * stride;
        float squares = 0;
        for (long c = 0; c < C; c++) squares += row[c] * row[c];
        float scale = 1 / sqrtf(squares / C + (float)eps);
        for (long c = 0; c < C; c++) y[n * C + c] = row[c] * scale * w[c];
    }
}

// room (N*K, 2F+C): for the n rows of the expert at hand gate and up (n, 2F), and behind them its output (n, C)
void expert_ffn(float *y, float *room, const float *u, const float *gate_up, const float *down,
                const long long *topk_idx, const float *gates, long N, long K, long E, long C, long F) {
    const float *rows[N * K];
    long pair[N * K];
    for (long i = 0; i < N * C; i++) y[i] = 0;
    for (long e = 0; e < E; e++) {
        long n = 0;
        for (long i = 0; i < N * K; i++)
            if (topk_idx[i] == e) pair[n] = i, rows[n++] = u + i / K * C;
        product(room, rows, n, gate_up + e * 2 * F * C, 2 * F, C);
        for (long i = 0; i < n; i++) {
            float *gate = room + i * 2 * F, *up = gate + F;
            for (long f = 0; f < F; f++)  // silu(x) = x / (1 + e^-x)
                gate[f] *= gates[pair[i]] * up[f] / (1 + expf(-gate[f]));
            rows[i] = gate;
        }
        float *out = room + n * 2 * F;
        product(out, rows, n, down + e * C * F, C, F);
        for (long i = 0; i < n; i++)
            for (long c = 0; c < C; c++) y[pair[i] / K * C + c] += out[i * C + c];
    }
}
"""


@cache
def compiled() -> tuple[ctypes.CDLL | None, str]:
    """The functions of C_SOURCE, and what to say about them; None where there is no C compiler.

    The library stays in the user's cache folder under a name made of all that went into it.
    """
    avx2, avx512 = ["-mavx2", "-mfma"], [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    widths = {"AVX2": avx2, "AVX512": [*avx2, *avx512, "-mprefer-vector-width=512"]}
    threads = [str(path) for path in Path(torch.__file__).parent.glob("lib/libgomp*")][:1]  # torch's own, to share them
    command = ["cc", "-std=c11", "-O3", "-shared", "-fPIC", *widths.get(torch.backends.cpu.get_cpu_capability(), []),
               "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    libraries = ["-lm", *(["-fopenmp", "-Wl,--as-needed", *threads] if threads else ["-Wno-unknown-pragmas"])]
    name = hashlib.sha256(" ".join([C_SOURCE, *command, *libraries]).encode()).hexdigest()[:16]
    library = Path.home() / ".cache" / "plainseek" / f"{name}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                source, made = Path(folder, "decode.c"), Path(folder, "decode.so")
                source.write_text(C_SOURCE)
                command += [str(source), "-o", str(made), *libraries]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                made.replace(library)
        functions = ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace") or str(error)
        return None, f"float32 decoding without C: {told.splitlines()[0]}"
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
    functions.linear.argtypes = 3 * [pointer] + 3 * [size]
    functions.rms_norm.argtypes = 3 * [pointer] + [number] + 3 * [size]
    functions.expert_ffn.argtypes = 7 * [pointer] + 5 * [size]
    return functions, "float32 decoding in C"


def is_for_c(x: Tensor) -> bool:
    """Whether C may read it: float32 on a CPU, row behind row, no gradient wanted, not traced by torch.compile."""
    is_plain = x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()
    return is_plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear_in_c(x, weight, bias=None):
    """The same for up to 8 rows on a weight worth the call."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows > 8 or weight.numel() < 1 << 14 or not is_for_c(x) or not is_for_c(weight):
        return linear_fused(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    compiled()[0].linear(y.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, *weight.shape)
    return y if bias is None else y + bias


def rms_norm_in_c(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in one pass."""
    y, rows = x.new_empty(x.shape), x.reshape(-1, x.shape[-1])  # (N, C)
    if not is_for_c(y) or weight.dtype != y.dtype or rows.stride(1) != 1:
        return rms_norm_fused(x, weight, eps)
    compiled()[0].rms_norm(y.data_ptr(), rows.data_ptr(), weight.data_ptr(), eps, *rows.shape, rows.stride(0))
    return y


def expert_ffn_in_c(u, gate_up, down, topk_idx, gates):
    """The same in one call, for few pairs (token, k) per expert: with many, products by a library are faster."""
    (N, K), (E, C, F_) = topk_idx.shape, down.shape
    if N * K * max(C, 64) > 7000 * E or not all(map(is_for_c, (u, gate_up, down, gates))):
        return expert_ffn_fused(u, gate_up, down, topk_idx, gates)
    topk_idx, y, room = topk_idx.contiguous(), torch.empty_like(u), u.new_empty(N * K, 2 * F_ + C)
    pointers = [x.data_ptr() for x in (y, room, u, gate_up, down, topk_idx, gates)]
    compiled()[0].expert_ffn(*pointers, N, K, E, C, F_)
    return y


# --------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Op:
    """The twins of one operation: `grouped` is fused for a GPU, `in_c` for decoding, `fp8` has other numbers."""

    reference: Callable
    fused: Callable
    grouped: Callable | None = None
    in_c: Callable | None = None
    fp8: Callable | None = None


OPS = {
    "linear": Op(linear_reference, linear_fused, in_c=linear_in_c, fp8=linear_fp8),
    "rms_norm": Op(rms_norm_reference, rms_norm_fused, in_c=rms_norm_in_c),
    "apply_rope": Op(apply_rope_reference, apply_rope_fused),
    "causal_attention": Op(causal_attention_reference, causal_attention_fused),
    "latent_attention": Op(latent_attention_reference, latent_attention_fused),
    "expert_ffn": Op(expert_ffn_reference, expert_ffn_fused, expert_ffn_grouped, expert_ffn_in_c, expert_ffn_fp8),
    "linear_cross_entropy": Op(linear_cross_entropy_reference, linear_cross_entropy_fused),
}


class Kernels(NamedTuple):
    """One chosen twin per operation, and the reasons for choices that the machine forced."""

    linear: Callable
    rms_norm: Callable
    apply_rope: Callable
    causal_attention: Callable
    latent_attention: Callable
    expert_ffn: Callable
    linear_cross_entropy: Callable
    reasons: tuple[str, ...] = ()
    is_fp8: bool = False


def select(impl: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, fp8: bool = False,
           widths: tuple[int, ...] = ()) -> Kernels:
    """The twins for `impl` ("reference" or "fused") on a device and dtype; `widths` are C and F of the experts.

    Where the machine cannot run a fused twin the next one is taken and named in `reasons`.
    Raises ValueError for any other `impl`.
    """
    if impl not in ("reference", "fused"):
        raise ValueError(f"impl: got {impl!r}, wanted 'reference' or 'fused'")
    device, reasons = torch.device(device), []
    is_known = dtype in (torch.float64, torch.float32, torch.bfloat16)
    if impl == "fused" and not is_known:
        reasons.append(f"reference twins, since the fused ones are not tested in {dtype}")
    chosen = {name: op.fused if impl == "fused" and is_known else op.reference for name, op in OPS.items()}
    if chosen["expert_ffn"] is expert_ffn_fused and device.type != "cpu":
        is_able = device.type == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
        is_able = is_able and torch.cuda.get_device_capability(device) >= (8, 0) and not any(w % 8 for w in widths)
        chosen["expert_ffn"] = expert_ffn_grouped if is_able else expert_ffn_reference
        if not is_able:
            reasons.append("experts by the reference twin: torch's grouped product wants CUDA 8.0, bfloat16, "
                           f"widths in multiples of 8 and torch 2.10; got {device.type}, {dtype}, {widths}")
    if fp8:
        units, reason = try_fp8_units(device)
        chosen |= {name: partial(op.fp8, units=units) for name, op in OPS.items() if op.fp8}
        reasons.append(reason)
    if impl == "fused" and device.type == "cpu" and dtype == torch.float32:
        if onednn_is_exact():
            reasons.append("float32 products by oneDNN, as exact as MKL's")
        library, reason = compiled()
        chosen |= {name: op.in_c for name, op in OPS.items() if op.in_c and library and not fp8}
        reasons.append(reason)
    return Kernels(**chosen, reasons=tuple(reasons), is_fp8=fp8)


# -------------------------------------------------------------------------------------------- measuring

# of the presets of model.py, which this file may not import; B rows of T tokens in training
SHAPES = {
    "tiny": dict(B=32, T=128, C=96, H=4, D=16, P=16, Dv=16, R=48, E=16, K=4, F=48, V=1024),
    "small": dict(B=4, T=1024, C=512, H=8, D=64, P=32, Dv=64, R=128, E=32, K=4, F=256, V=4096),
    "medium": dict(B=1, T=2048, C=1024, H=16, D=64, P=32, Dv=64, R=256, E=64, K=6, F=512, V=50304),
}


def seconds(function: Callable, times: int = 5) -> float:
    """Median seconds of a call, after one to warm up; waits for a GPU."""
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return sorted(took[1:])[times // 2]


def matmul_ceiling(dtype: torch.dtype, device="cpu") -> float:
    """Most FLOP/s that this machine reaches in one matrix product."""
    sizes = (512, 1024, 2048) if torch.device(device).type == "cpu" else (2048, 4096, 8192)
    squares = {n: torch.randn(n, n, dtype=dtype, device=device) for n in sizes}
    return max(2 * n**3 / seconds(partial(by_onednn(torch.mm), x, x)) for n, x in squares.items())


def samples(s: dict, dtype: torch.dtype) -> dict[str, tuple[tuple, float]]:
    """Inputs of every operation at one shape, and the FLOPs of its products in the forward pass."""
    B, T, C, H, D, P, Dv, R, E, K, F_, V = s.values()
    N = B * T
    make = lambda *shape: torch.randn(shape, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_()  # noqa: E731
    angle = torch.arange(T)[:, None, None] * torch.rand(P // 2)  # (T, 1, P/2)
    heads = (make(B, T, H, D), make(B, T, H, P), make(B, T, H, D), make(B, T, P), make(B, T, H, Dv), 1.0)
    nothing = torch.zeros(B, 1, 0, dtype=torch.bool)  # hidden from a token that is decoded behind T cached ones
    cached = (make(B, 1, H, R), make(B, 1, H, P), make(B, T, R + P), nothing, 1.0)
    weights = (make(E, 2 * F_, C), make(E, C, F_))
    experts = [(make(n, C), *weights, torch.rand(n, E).topk(K).indices, torch.rand(n, K, requires_grad=True))
               for n in (N, 1)]
    return {"linear": ((make(N, C), make(C, C)), 2 * N * C * C),
            "rms_norm": ((make(N, C), make(C), 1e-6), 0),
            "apply_rope": ((make(B, T, H, P), torch.polar(torch.ones_like(angle), angle)), 0),
            "causal_attention": (heads, B * H * T * T * (D + P + Dv)),
            "latent_attention": (cached, 2 * B * H * T * (2 * R + P)),
            "expert_ffn": (experts[0], 6 * N * K * C * F_),
            "expert_ffn, one token": (experts[1], 6 * K * C * F_),
            "linear_cross_entropy": ((make(N, C), make(V, C), torch.randint(0, V, (N,))), 2 * N * C * V)}


def measure(twin: Callable, inputs: tuple) -> tuple[Tensor, float, float, int]:
    """Result, seconds forward, seconds forward and backward, and bytes kept in between beside the inputs."""
    known, kept = {x.untyped_storage().data_ptr() for x in inputs if torch.is_tensor(x)}, {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = twin(*inputs)
    outside, leaves = torch.randn_like(out), [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    both = seconds(lambda: torch.autograd.grad(twin(*inputs), leaves, outside))
    with torch.no_grad():
        return out.detach(), seconds(lambda: twin(*inputs)), both, sum(kept[key] for key in kept.keys() - known)


def main(argv: list[str]) -> None:
    """Print the table of one shape and dtype."""
    name, kind = ([*argv, "tiny"][0], [*argv[1:], "fp32"][0])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if len(argv) > 2 or name not in SHAPES or kind not in dtypes:
        raise UserError(f"got {' '.join(argv)}, wanted: python kernels.py [{' | '.join(SHAPES)}] [fp32 | bf16]")
    torch.manual_seed(0)
    ops = select("fused", dtype=dtypes[kind])
    ceiling = matmul_ceiling(dtypes[kind])
    print(f"{name}, {kind}, {torch.get_num_threads()} threads; products reach {ceiling / 1e9:.0f} GFLOP/s; "
          f"{'; '.join(ops.reasons)}\nms and MB as reference -> fused; kept: for the backward, beside the inputs\n\n"
          f"{'operation':22}{'forward ms':>19}{'with backward ms':>21}{'faster':>8}{'kept MB':>18}"
          f"{'error':>19}{'of ceiling':>12}")
    for row, (inputs, flops) in samples(SHAPES[name], dtypes[kind]).items():
        op = row.partition(",")[0]
        twins = [measure(twin, inputs) for twin in (OPS[op].reference, getattr(ops, op))]
        wide = [x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
        exact = OPS[op].reference(*wide)
        errors = [((out - exact).abs().max() / exact.abs().max()).item() for out, *_ in twins]
        pairs = [[1e3 * t[1] for t in twins], [1e3 * t[2] for t in twins], [t[3] / 1e6 for t in twins]]
        forward, both, kept = (f"{a:.3g} -> {b:.3g}" for a, b in pairs)
        share = f"{3 * flops / twins[1][2] / ceiling:12.0%}" if flops else f"{'-':>12}"
        print(f"{row:22}{forward:>19}{both:>21}{twins[0][2] / twins[1][2]:>7.2f}x{kept:>18}"
              f"{errors[0]:>10.0e} ->{errors[1]:.0e}{share}")


if __name__ == "__main__":
    run_main(main)
