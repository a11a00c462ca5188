"""Every costly operation of the model twice: a readable twin and a fast twin, side by side.

The *reference* twin is the equation, written so that it can be read. The *fused* twin gives the same
numbers with less work or less memory, in plain PyTorch: no Triton, no custom build. `OPS` pairs them,
`tests/test_kernels.py` walks the pairs (values, gradients, odd shapes, dtypes), and `select` picks
one side for a model and says why.

Shapes use the legend of model.py.
"""

from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target with this value has no loss, as in F.cross_entropy


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and softmaxes: float32, or float64 when the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------- RMSNorm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`, with the mean taken in float32.

    >>> rms_norm_reference(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    wide = x.to(at_least_float32(x.dtype))  # (..., C)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return weight.to(x.dtype) * (wide * scale).to(x.dtype)


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in one operator of torch."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


# ------------------------------------------------------------------------------------------------- RoPE


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the adjacent pairs `(x0, x1), (x2, x3), ...` by their angles (RoFormer; V3 eqs 3 and 8).

    x (..., P), cos and sin (..., P/2) in float32, broadcast against x. The checkpoints of DeepSeek are
    written for adjacent pairs; a rotation of halves would need permuted weights.
    """
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., P/2) each
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)  # (..., P/2, 2)
    return turned.flatten(-2).to(x.dtype)


def apply_rope_fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as one complex product: `(x0 + i x1) * (cos + i sin)`."""
    wide = x.to(at_least_float32(x.dtype)).unflatten(-1, (-1, 2)).contiguous()  # (..., P/2, 2)
    turned = torch.view_as_complex(wide) * torch.complex(cos, sin).to(wide.dtype.to_complex())
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# -------------------------------------------------------------------------------------------- attention


def causal_attention_reference(q_nope, q_pe, k_nope, k_pe, v, scale):
    """Expanded latent attention of a sequence on itself (V3 eqs 9-10).

    `o_i = sum_{j<=t} softmax_j(scale * (q_nope_i . k_nope_j + q_pe_i . k_pe_j)) v_j`

    q_nope, k_nope (B, T, H, D); q_pe (B, T, H, P); k_pe (B, T, P), one for all heads; v (B, T, H, Dv).
    Returns (B, T, H, Dv).
    """
    T = q_nope.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q_nope, k_nope)  # (B, H, T, T)
    scores = (scores + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)) * scale
    future = torch.ones(T, T, dtype=torch.bool, device=v.device).triu(1)  # (T, T)
    scores = scores.to(at_least_float32(v.dtype)).masked_fill(future, float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)


def causal_attention_fused(q_nope, q_pe, k_nope, k_pe, v, scale):
    """The same through `scaled_dot_product_attention`, which never stores the T x T weights.

    Its CPU and CUDA flash kernels want one head width, so narrow values are padded with zeros.
    """
    H, Dv = v.shape[2:]
    q = torch.cat((q_nope, q_pe), -1).transpose(1, 2)  # (B, H, T, D+P)
    k = torch.cat((k_nope, k_pe.unsqueeze(2).expand(-1, -1, H, -1)), -1).transpose(1, 2)
    padded = F.pad(v, (0, max(0, q.shape[-1] - Dv))).transpose(1, 2)  # (B, H, T, D+P)
    out = F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scale)
    return out[..., :Dv].transpose(1, 2)  # (B, T, H, Dv)


def latent_attention_reference(q_latent, q_pe, c_kv, k_pe, positions, scale):
    """Absorbed latent attention: every head reads the same cached latents (V2 section 2.1.2).

    `z_i = sum_{s<=position} softmax_s(scale * (q_latent_i . c_s + q_pe_i . k_pe_s)) c_s`

    q_latent (B, T, H, R) is `W_UK^T q_nope`; q_pe (B, T, H, P); c_kv (B, S, R); k_pe (B, S, P);
    positions (B, T) int64. Returns (B, T, H, R); the caller applies `W_UV`.
    """
    scores = torch.einsum("bthr,bsr->bths", q_latent, c_kv) + torch.einsum("bthp,bsp->bths", q_pe, k_pe)
    slots = torch.arange(c_kv.shape[1], device=c_kv.device)  # (S,)
    hidden = slots > positions[:, :, None, None]  # (B, T, 1, S): keys after the query
    scores = (scores * scale).to(at_least_float32(c_kv.dtype)).masked_fill(hidden, float("-inf"))
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1).to(c_kv.dtype), c_kv)


def latent_attention_fused(q_latent, q_pe, c_kv, k_pe, positions, scale):
    """The same as two batched products: heads and tokens of a row are queries of one shared key."""
    B, T, H, R = q_latent.shape
    S = c_kv.shape[1]
    scores = torch.bmm(q_latent.reshape(B, T * H, R), c_kv.transpose(1, 2))  # (B, T*H, S)
    scores = torch.baddbmm(scores, q_pe.reshape(B, T * H, q_pe.shape[-1]), k_pe.transpose(1, 2), beta=scale, alpha=scale)
    hidden = torch.arange(S, device=c_kv.device) > positions[:, :, None]  # (B, T, S)
    wide = scores.view(B, T, H, S).to(at_least_float32(c_kv.dtype))
    weights = wide.masked_fill_(hidden[:, :, None], float("-inf")).softmax(-1).to(c_kv.dtype)
    return torch.bmm(weights.view(B, T * H, S), c_kv).view(B, T, H, R)


# ---------------------------------------------------------------------------------------------- experts


def expert_ffn_reference(u, gate_up, down, topk_idx, gates):
    """The routed half of a MoE layer (V3 eq 12): `y_n = sum_k gates_nk * FFN_{topk_idx_nk}(u_n)`.

    u (N, C); gate_up (E, 2F, C), gate rows first; down (E, C, F); topk_idx and gates (N, K).
    `FFN(u) = W_down (silu(W_gate u) * W_up u)`. No token is dropped. Returns (N, C).
    """
    y = torch.zeros_like(u, dtype=at_least_float32(u.dtype))  # (N, C)
    for expert in range(gate_up.shape[0]):
        rows, slots = torch.where(topk_idx == expert)  # the (token, slot) pairs of this expert
        gate, up = F.linear(u[rows], gate_up[expert]).chunk(2, dim=-1)  # (n, F) each
        out = F.linear(F.silu(gate) * up, down[expert])  # (n, C)
        y = y.index_add(0, rows, out.to(y.dtype) * gates[rows, slots, None].to(y.dtype))
    return y.to(u.dtype)


class _ExpertFFN(torch.autograd.Function):
    """Experts over sorted pairs; the backward keeps only the packed pre-activations (pairs, 2F)."""

    @staticmethod
    def forward(ctx, u, gate_up, down, topk_idx, gates):
        order = topk_idx.flatten().argsort()  # (N*K,) pairs grouped by expert
        rows = order // topk_idx.shape[1]  # (N*K,) token of each pair
        ends = torch.bincount(topk_idx.flatten(), minlength=len(gate_up)).cumsum(0).tolist()
        weight = gates.flatten()[order].to(u.dtype).unsqueeze(1)  # (N*K, 1)
        y = torch.zeros_like(u, dtype=at_least_float32(u.dtype))  # (N, C)
        packed = u.new_empty(len(order), gate_up.shape[1])  # (N*K, 2F)
        for expert, (start, end) in enumerate(zip([0] + ends, ends)):
            if start == end:
                continue
            torch.mm(u[rows[start:end]], gate_up[expert].t(), out=packed[start:end])
            gate, up = packed[start:end].chunk(2, dim=-1)
            hidden = F.silu(gate).mul_(up).mul_(weight[start:end])  # (n, F)
            y.index_add_(0, rows[start:end], (hidden @ down[expert].t()).to(y.dtype))
        ctx.save_for_backward(u, gate_up, down, gates, packed, order, rows, weight)
        ctx.ends = ends
        return y.to(u.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        u, gate_up, down, gates, packed, order, rows, weight = ctx.saved_tensors
        grad_u = torch.zeros_like(u, dtype=at_least_float32(u.dtype))
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        grad_weight = torch.empty_like(weight)
        for expert, (start, end) in enumerate(zip([0] + ctx.ends, ctx.ends)):
            if start == end:
                continue
            here = rows[start:end]
            x, dy, w = u[here], grad_y[here], weight[start:end]
            gate, up = packed[start:end].chunk(2, dim=-1)
            slope = torch.sigmoid(gate)  # (n, F)
            silu = gate * slope
            hidden = silu * up
            d_hidden = dy @ down[expert]  # (n, F), gradient of w * hidden
            grad_weight[start:end] = (d_hidden * hidden).sum(-1, keepdim=True)
            torch.mm(dy.t(), hidden.mul_(w), out=grad_down[expert])
            d_hidden.mul_(w)
            d_gate = (slope + silu * (1 - slope)).mul_(up).mul_(d_hidden)
            d_packed = torch.cat((d_gate, silu.mul_(d_hidden)), dim=-1)  # (n, 2F)
            torch.mm(d_packed.t(), x, out=grad_gate_up[expert])
            grad_u.index_add_(0, here, (d_packed @ gate_up[expert]).to(grad_u.dtype))
        grad_gates = torch.empty_like(gates).flatten()
        grad_gates[order] = grad_weight.squeeze(1).to(gates.dtype)
        return grad_u.to(u.dtype), grad_gate_up, grad_down, None, grad_gates.view_as(gates)


def expert_ffn_fused(u, gate_up, down, topk_idx, gates):
    """The same over sorted pairs, one joined product per expert, written as one autograd Function."""
    return _ExpertFFN.apply(u, gate_up, down, topk_idx, gates)


# ---------------------------------------------------------------------------------------- cross-entropy


def linear_cross_entropy_reference(h, weight, targets):
    """Negative log-likelihood in nats of each target: `-log softmax(h W^T)[target]`, 0 where IGNORE.

    h (N, C); weight (V, C); targets (N,). Returns (N,) in float32 (float64 for float64 inputs).
    """
    logits = F.linear(h, weight).to(at_least_float32(h.dtype))  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy in blocks of rows: logits exist for one block at a time, in both directions."""

    BLOCK = 1024  # rows

    @staticmethod
    def forward(ctx, h, weight, targets):
        dtype = at_least_float32(h.dtype)
        nll, lse = h.new_empty(len(h), dtype=dtype), h.new_empty(len(h), dtype=dtype)
        known = targets.clamp(min=0)  # (N,) IGNORE becomes a legal index
        for start in range(0, len(h), _LinearCrossEntropy.BLOCK):
            block = slice(start, start + _LinearCrossEntropy.BLOCK)
            logits = F.linear(h[block], weight).to(dtype)  # (n, V)
            lse[block] = logits.logsumexp(-1)
            nll[block] = lse[block] - logits.gather(1, known[block, None]).squeeze(1)
        ctx.save_for_backward(h, weight, targets, known, lse)
        return nll.masked_fill_(targets == IGNORE, 0)

    @staticmethod
    def backward(ctx, grad_nll):
        h, weight, targets, known, lse = ctx.saved_tensors
        grad_nll = grad_nll.masked_fill(targets == IGNORE, 0).to(lse.dtype).unsqueeze(1)  # (N, 1)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=lse.dtype)
        for start in range(0, len(h), _LinearCrossEntropy.BLOCK):
            block = slice(start, start + _LinearCrossEntropy.BLOCK)
            probs = F.linear(h[block], weight).to(lse.dtype).sub_(lse[block, None]).exp_()  # (n, V)
            probs.scatter_add_(1, known[block, None], -torch.ones_like(lse[block, None]))
            d_logits = probs.mul_(grad_nll[block]).to(h.dtype)  # (n, V)
            torch.mm(d_logits, weight, out=grad_h[block])
            grad_weight += d_logits.t() @ h[block]
        return grad_h, grad_weight.to(weight.dtype), None


def linear_cross_entropy_fused(h, weight, targets):
    """The same without ever holding all logits; the backward computes each block of them again."""
    return _LinearCrossEntropy.apply(h, weight, targets)


# --------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Op:
    """The two twins of one operation."""

    reference: Callable
    fused: Callable


OPS = {
    "rms_norm": Op(rms_norm_reference, rms_norm_fused),
    "apply_rope": Op(apply_rope_reference, apply_rope_fused),
    "causal_attention": Op(causal_attention_reference, causal_attention_fused),
    "latent_attention": Op(latent_attention_reference, latent_attention_fused),
    "expert_ffn": Op(expert_ffn_reference, expert_ffn_fused),
    "linear_cross_entropy": Op(linear_cross_entropy_reference, linear_cross_entropy_fused),
}


class Kernels(NamedTuple):
    """One chosen twin per operation, and the reasons for choices that the machine forced."""

    rms_norm: Callable
    apply_rope: Callable
    causal_attention: Callable
    latent_attention: Callable
    expert_ffn: Callable
    linear_cross_entropy: Callable
    reasons: tuple[str, ...] = ()


def select(impl: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Kernels:
    """The twins for `impl` ("reference" or "fused") on a device and dtype.

    Raises ValueError for any other `impl`.
    """
    if impl not in ("reference", "fused"):
        raise ValueError(f"impl: got {impl!r}, wanted 'reference' or 'fused'")
    return Kernels(**{name: getattr(op, impl) for name, op in OPS.items()})
