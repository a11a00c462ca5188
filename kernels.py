"""Every costly operation of the model twice: a readable twin and a fast twin, side by side.

The *reference* twin is the equation, written to be read. The *fused* twin gives the same numbers
with less time or memory, in plain PyTorch without Triton. `tests/test_kernels.py` walks the pairs
(values, gradients, odd shapes, dtypes), and `choose` picks a side for a model and says what the
machine forced.

    operation             equation                                   what the fast twin saves
    rms_norm              x / sqrt(mean(x^2) + eps) * w              one call where there were six
    apply_rope            (x0 + i x1) (cos + i sin)                  one complex product
    linear                x W^T + b                                  float32 on a CPU by oneDNN
    causal_attention      softmax(scale q k^T + mask) v              T x T scores are never stored
    latent_attention      softmax(scale q c^T + mask) c              the cache is read where it lies
    expert_ffn            sum_k gate_k FFN_k(u)                      sorted tokens, one grouped product
    linear_cross_entropy  -log softmax(h W^T)[target]                logits in one block at a time

One more set has other numbers, the products of training in FP8: `linear_fp8`, also in the experts.
Shapes use the legend of model.py. A mask is True where a query may see the key.

    python -m tests.bench.kernels [tiny | small | medium] [fp32 | bf16]     both twins, measured here
"""

from contextlib import contextmanager, nullcontext
from functools import cache, partial
from inspect import signature
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

IGNORE = -100  # a target with this value has no loss, as in F.cross_entropy
CUDNN = SDPBackend.CUDNN_ATTENTION.value


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and softmaxes: float32, or float64 when the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------ RMSNorm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`, with the mean taken in float32.

    >>> rms_norm_reference(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    wide = x.to(at_least_float32(x.dtype))  # (..., C)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return weight.to(x.dtype) * (wide * scale).to(x.dtype)


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by torch's own, which spares a decoded token most of the calls."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


# --------------------------------------------------------------------------------------------- RoPE


def apply_rope_reference(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the adjacent pairs `(x0, x1), (x2, x3), ...` by their angles (RoFormer; V3 eqs 3, 8).

    x (..., P); freqs_cis (..., P/2) complex, `cos + i sin` of the angles, broadcast against x.
    DeepSeek's checkpoints want adjacent pairs; a rotation of halves would permute weights.
    """
    cos, sin = freqs_cis.real, freqs_cis.imag
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., P/2) each
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)  # (..., P/2, 2)
    return turned.flatten(-2).to(x.dtype)


def apply_rope_fused(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """The same as one complex product: `(x0 + i x1) * (cos + i sin)`."""
    pairs = x.to(at_least_float32(x.dtype)).unflatten(-1, (-1, 2)).contiguous()  # (..., P/2, 2)
    turned = torch.view_as_complex(pairs) * freqs_cis  # (..., P/2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------- linear


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + b`, in x's dtype. x (..., I); weight (O, I); bias (O,). Returns (..., O)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Linear(torch.autograd.Function):
    """By the library that `by_onednn` takes; a cast weight is not kept for the backward, but made again."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with by_onednn(x):
            return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with by_onednn(grad):
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            return grad @ weight.to(grad.dtype), grad_weight.to(weight.dtype)


def linear_fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the faster of two libraries."""
    if not torch.is_grad_enabled():  # spares a decoded token the Function
        with by_onednn(x):
            return linear_reference(x, weight, bias)
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


# ---------------------------------------------------------------------------------------- attention


def causal_attention_reference(q_nope, q_pe, k_nope, k_pe, v, scale, mask=None) -> Tensor:
    """Expanded latent attention of a sequence on itself (V3 eqs 9-10).

    `o_i = sum_{j seen} softmax_j(scale * (q_nope_i . k_nope_j + q_pe_i . k_pe_j)) v_j`

    q_nope, k_nope (B, T, H, D); q_pe (B, T, H, P); k_pe (B, T, P), one for all heads; v (B, T, H,
    Dv); mask (B, T, T) bool, causality included, or None: causality alone. Returns (B, T, H, Dv).
    """
    T = q_nope.shape[1]
    if mask is None:
        mask = torch.ones(1, T, T, dtype=torch.bool, device=v.device).tril()
    scores = torch.einsum("bthd,bshd->bhts", q_nope, k_nope)  # (B, H, T, T)
    scores = (scores + torch.einsum("bthp,bsp->bhts", q_pe, k_pe)) * scale
    scores = scores.to(at_least_float32(v.dtype)).masked_fill(~mask.unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)


def causal_attention_fused(q_nope, q_pe, k_nope, k_pe, v, scale, mask=None) -> Tensor:
    """The same by torch's flash kernels, which want heads of one width: narrow values get zeros.

    On a CPU in float32 also for bfloat16 inputs, which takes half the time there. On a GPU values
    stay narrow in float32, which has no flash kernel, and where torch would choose cuDNN's, which
    takes V3's 192 and 128. `mask` may also be the bounds of a packed `document_mask`.
    """
    H, Dv = v.shape[2:]
    q = torch.cat((q_nope, q_pe), -1)  # (B, T, H, D+P)
    k = torch.cat((k_nope, k_pe.unsqueeze(2).expand(-1, -1, H, -1)), -1)  # (B, T, H, D+P)
    padded = F.pad(v, (0, max(0, q.shape[-1] - Dv)))  # (B, T, H, D+P)
    if mask is not None and mask.ndim == 1:
        return packed_attention(q, k, padded, scale, mask)[..., :Dv]
    wide = at_least_float32(v.dtype) if v.is_cpu else v.dtype
    q, k, v, padded = (x.to(wide).transpose(1, 2) for x in (q, k, v, padded))
    if v.is_cuda and (wide == torch.float32 or torch._fused_sdp_choice(q, k, v, is_causal=True) == CUDNN):
        padded = v
    seen = None if mask is None else mask.unsqueeze(1)  # (B, 1, T, T)
    out = F.scaled_dot_product_attention(q, k, padded, seen, is_causal=seen is None, scale=scale)
    return out[..., :Dv].transpose(1, 2).to(q_nope.dtype)  # (B, T, H, Dv)


def packed_attention(q, k, v, scale: float, bounds: Tensor) -> Tensor:
    """Causal within the documents that lie between bounds, by torch's varlen_attn: (B, T, H, D+P)."""
    from torch.nn.attention.varlen import varlen_attn  # here, as it loads Triton where there is one

    T, width = q.shape[1], q.shape[-1]
    is_old = "is_causal" in signature(varlen_attn).parameters  # torch 2.10, which knows no scale
    rows = (x.flatten(0, 1) for x in (q * (scale * width**0.5), k, v))  # (N, H, D+P) each
    causal = {"is_causal": True} if is_old else {"window_size": (-1, 0)}
    return varlen_attn(*rows, bounds, bounds, T, T, **causal).unflatten(0, (-1, T))


def document_mask(is_begin: Tensor, is_packed: bool = False) -> Tensor:
    """Causal and within one document, which begins where is_begin (B, T) says: (B, T, T) bool.

    Packed, for `packed_attention`: the first token of each document in the rows laid end to end,
    and B*T: (documents + 1,) int32. Their number is data, for which the host of a GPU waits.
    """
    if not is_packed:
        number = is_begin.cumsum(1)  # (B, T), of the document in its row
        return (number.unsqueeze(2) == number.unsqueeze(1)).tril()
    is_first = F.pad(is_begin[:, 1:], (1, 0), value=True)  # (B, T), of a document or of its part in a row
    return F.pad(is_first.flatten().nonzero().flatten(), (0, 1), value=is_first.numel()).int()


def latent_attention_reference(q_latent, q_pe, latent, mask, scale) -> Tensor:
    """Absorbed latent attention: every head reads the same cached latents (V2 section 2.1.2).

    `z_i = sum_{s seen} softmax_s(scale * (q_latent_i . c_s + q_pe_i . k_pe_s)) c_s`

    q_latent (B, T, H, R) is `W_UK^T q_nope`; q_pe (B, T, H, P); latent (B, S, R+P) holds `[c ;
    k_pe]`; mask (B or 1, T, S) bool. Returns (B, T, H, R); the caller applies `W_UV`.
    """
    c_kv, k_pe = latent.split((q_latent.shape[-1], q_pe.shape[-1]), dim=-1)  # (B, S, R), (B, S, P)
    scores = torch.einsum("bthr,bsr->bths", q_latent, c_kv)  # (B, T, H, S)
    scores = (scores + torch.einsum("bthp,bsp->bths", q_pe, k_pe)) * scale
    scores = scores.to(at_least_float32(latent.dtype)).masked_fill(~mask.unsqueeze(2), float("-inf"))
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1).to(latent.dtype), c_kv)


def latent_attention_fused(q_latent, q_pe, latent, mask, scale) -> Tensor:
    """The same by torch's flash kernel on the cache as it lies: all heads are queries of one key.

    Keys are the values too: to weight `k_pe` along is cheaper than a copy of the latents without it.
    """
    T, H, R = q_latent.shape[1:]
    q = torch.cat((q_latent, q_pe), -1).flatten(1, 2).unsqueeze(1)  # (B, 1, T*H, R+P)
    keys = latent.unsqueeze(1)  # (B, 1, S, R+P)
    seen = mask.unsqueeze(2).expand(-1, -1, H, -1).flatten(1, 2).unsqueeze(1)  # (B or 1, 1, T*H, S)
    z = F.scaled_dot_product_attention(q, keys, keys, seen, scale=scale)  # (B, 1, T*H, R+P)
    return z[:, 0, :, :R].unflatten(1, (T, H))


# ------------------------------------------------------------------------------------------ experts


def expert_ffn_reference(u, gate_up, down, topk_idx, gates, linear=linear_reference) -> Tensor:
    """The routed half of a MoE layer (V3 eq 12): `y_n = sum_k gates_nk * FFN_{topk_idx_nk}(u_n)`.

    `FFN(u) = W_down (silu(W_gate u) * W_up u)`; no token is dropped. u (N, C); gate_up (E, 2F, C),
    gate rows first; down (E, C, F); both are cast to u's dtype; topk_idx, gates (N, K). Returns (N, C).
    """
    y = torch.zeros_like(u, dtype=at_least_float32(u.dtype))  # (N, C)
    for expert in topk_idx.unique().tolist() or [0]:  # one even without a token, for the gradient
        rows, slots = torch.where(topk_idx == expert)  # the (token, slot) pairs of this expert
        gate, up = linear(u[rows], gate_up[expert]).chunk(2, dim=-1)  # (n, F) each
        out = linear(F.silu(gate) * up, down[expert])  # (n, C)
        y = y.index_add(0, rows, out.to(y.dtype) * gates[rows, slots, None].to(y.dtype))
    return y.to(u.dtype)


class _ExpertFFN(torch.autograd.Function):
    """Pairs (token, k) sorted by expert, one grouped product for all; keeps the pre-activations."""

    @staticmethod
    def pairs(u, topk_idx, gates, E):
        """M pairs sorted by expert: where each came from, its token, its weight (M,); ends (E,).

        oneDNN compiles its bfloat16 product for every number of rows that it has not yet seen, so
        that pairs of weight 0 round the rows of an expert up to 64 where there are many.
        """
        (N, K), chosen, weight = topk_idx.shape, topk_idx.flatten(), gates.flatten()  # (N*K,) each
        experts = torch.arange(E, device=u.device)  # (E,)
        if u.is_cpu and u.dtype == torch.bfloat16 and N * K > 512 * E:
            spare = experts.repeat_interleave(-torch.bincount(chosen, minlength=E) % 64)
            chosen, weight = torch.cat((chosen, spare)), F.pad(weight, (0, len(spare)))  # (M,) each
        chosen, order = chosen.sort()
        ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        return order, order.div(K, rounding_mode="floor").clamp_(max=N - 1), weight[order], ends

    @staticmethod
    def forward(ctx, u, gate_up, down, topk_idx, gates):
        order, token, weight, ends = _ExpertFFN.pairs(u, topk_idx, gates, len(gate_up))
        weight = weight.unsqueeze(1).to(u.dtype)  # (M, 1)
        rows = u.index_select(0, token)  # (M, C)
        packed = F.grouped_mm(rows, gate_up.to(u.dtype).mT, offs=ends)  # (M, 2F)
        gate, up = packed.chunk(2, dim=-1)  # (M, F) each
        hidden = F.silu(gate).mul_(up).mul_(weight)
        out = F.grouped_mm(hidden, down.to(u.dtype).mT, offs=ends)  # (M, C)
        y = torch.zeros_like(u, dtype=at_least_float32(u.dtype))  # (N, C)
        ctx.save_for_backward(u, gate_up, down, gates, packed, order, token, weight, ends)
        return y.index_add_(0, token, out.to(y.dtype)).to(u.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        u, gate_up, down, gates, packed, order, token, weight, ends = ctx.saved_tensors
        rows, dy = u.index_select(0, token), grad_y.index_select(0, token)  # (M, C) each
        gate, up = packed.chunk(2, dim=-1)  # (M, F) each
        silu = F.silu(gate)
        hidden = silu * up
        d_hidden = F.grouped_mm(dy, down.to(u.dtype), offs=ends)  # (M, F), before the weight
        grad_gates = gates.new_empty(len(order))  # (M,)
        grad_gates[order] = (d_hidden * hidden).sum(-1).to(gates.dtype)
        grad_down = F.grouped_mm(dy.t(), hidden.mul_(weight), offs=ends)  # (E, C, F)
        d_hidden.mul_(weight)
        d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
        d_packed = torch.cat((d_gate, silu.mul_(d_hidden)), dim=-1)  # (M, 2F)
        grad_gate_up = F.grouped_mm(d_packed.t(), rows, offs=ends)  # (E, 2F, C)
        d_rows = F.grouped_mm(d_packed, gate_up.to(u.dtype), offs=ends)  # (M, C)
        grad_u = torch.zeros_like(u, dtype=at_least_float32(u.dtype))
        grad_u.index_add_(0, token, d_rows.to(grad_u.dtype))
        grads = grad_u.to(u.dtype), grad_gate_up.to(gate_up.dtype), grad_down.to(down.dtype)
        return *grads, None, grad_gates[: gates.numel()].view_as(gates)


def expert_ffn_fused(u, gate_up, down, topk_idx, gates) -> Tensor:
    """The same as one autograd Function; decoded tokens go other ways where these are the shorter.

    One on a CPU asks its experts in turn. A few on a GPU, where the Function would wait, ask all of
    them, with weight 0 where they were not chosen: their weights are read in any case.
    """
    if not isinstance(gate_up, Tensor):  # of experts on disk there is no stack to multiply with
        return expert_ffn_reference(u, gate_up, down, topk_idx, gates)
    is_few = u.is_cuda and len(u) <= 512 and not groups_on_device(u.device, u.dtype)
    is_one = u.is_cpu and len(u) == 1 and u.dtype == torch.float32
    if torch.is_grad_enabled() or not (is_few or is_one):
        return _ExpertFFN.apply(u, gate_up, down, topk_idx, gates)
    if is_few:
        weight = gates.new_zeros(len(u), len(gate_up)).scatter_(1, topk_idx, gates).to(u.dtype)  # (N, E)
        gate, up = (u @ gate_up.to(u.dtype).mT).chunk(2, dim=-1)  # (E, N, F) each
        hidden = F.silu(gate).mul_(up).mul_(weight.t().unsqueeze(-1))
        return (hidden @ down.to(u.dtype).mT).sum(0, dtype=at_least_float32(u.dtype)).to(u.dtype)
    y = torch.zeros_like(u[0])  # (C,)
    for expert, weight in zip(topk_idx[0].tolist(), gates[0].tolist()):
        gate, up = torch.mv(gate_up[expert].to(u.dtype), u[0]).chunk(2)  # (F,) each
        y.addmv_(down[expert].to(u.dtype), F.silu(gate).mul_(up), alpha=weight)
    return y.unsqueeze(0)


def groups_on_device(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is one kernel on this GPU, or a loop for which the host waits."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


# ------------------------------------------------------------------------------------ cross-entropy


def linear_cross_entropy_reference(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target: its negative log-likelihood `-log softmax(h W^T)[target]`, 0 where IGNORE.

    h (N, C); weight (V, C); targets (N,). Returns (N,) in float32 (float64 for float64 inputs).
    """
    logits = linear_reference(h, weight).to(at_least_float32(h.dtype))  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits exist for one block of rows at a time; the backward computes them again."""

    @staticmethod
    def blocks(h, weight):
        """Slices of rows whose logits stay in a CPU's cache; on a GPU few large products win."""
        size = max(128, (1 << 19 if h.is_cpu else 1 << 28) // len(weight))
        return [slice(start, start + size) for start in range(0, len(h), size)]

    @staticmethod
    def forward(ctx, h, weight, targets):
        nll = torch.empty(len(h), dtype=at_least_float32(h.dtype), device=h.device)
        ctx.save_for_backward(h, weight, targets)
        weight = weight.to(h.dtype)
        for rows in _LinearCrossEntropy.blocks(h, weight):
            with by_onednn(h[rows]):
                nll[rows] = linear_cross_entropy_reference(h[rows], weight, targets[rows])
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        h, master, targets = ctx.saved_tensors
        weight = master.to(h.dtype)
        factor = grad_nll.masked_fill(targets == IGNORE, 0).unsqueeze(1).to(h.dtype)  # (N, 1)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=grad_nll.dtype)
        for rows in _LinearCrossEntropy.blocks(h, weight):
            with by_onednn(h[rows]):
                d_logits = F.linear(h[rows], weight).to(grad_nll.dtype).softmax(-1)  # (n, V)
                target = targets[rows].clamp(min=0).unsqueeze(1)  # (n, 1): IGNORE made legal
                d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1.0))
                d_logits = d_logits.to(h.dtype)
                grad_h[rows] = d_logits @ weight
                grad_weight += d_logits.t() @ (h[rows] * factor[rows])
        return grad_h.mul_(factor), grad_weight.to(master.dtype), None


def linear_cross_entropy_fused(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same without ever holding all logits."""
    return _LinearCrossEntropy.apply(h, weight, targets)


# ----------------------------------------------------------------------------------------- registry


class Kernels(NamedTuple):
    """One twin of each operation."""

    linear: Callable
    rms_norm: Callable
    apply_rope: Callable
    causal_attention: Callable
    latent_attention: Callable
    expert_ffn: Callable
    linear_cross_entropy: Callable

    def packs_documents(self, device: torch.device, dtype: torch.dtype, D_P: int, Dv: int) -> bool:
        """Whether attention takes the bounds of documents in place of a mask, heads D+P and Dv wide."""
        is_able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        is_fit = dtype == torch.bfloat16 and Dv <= D_P <= 256 and D_P % 8 == 0
        return self.causal_attention is causal_attention_fused and is_able and is_fit


REFERENCE = Kernels(
    linear=linear_reference, rms_norm=rms_norm_reference, apply_rope=apply_rope_reference,
    causal_attention=causal_attention_reference, latent_attention=latent_attention_reference,
    expert_ffn=expert_ffn_reference, linear_cross_entropy=linear_cross_entropy_reference)
FUSED = Kernels(
    linear=linear_fused, rms_norm=rms_norm_fused, apply_rope=apply_rope_fused,
    causal_attention=causal_attention_fused, latent_attention=latent_attention_fused,
    expert_ffn=expert_ffn_fused, linear_cross_entropy=linear_cross_entropy_fused)


def choose(impl: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *,
           fp8: bool = False, widths: tuple[int, ...] = ()) -> tuple[Kernels, tuple[str, ...]]:
    """The twins for `impl` ("reference" or "fused"), and what the device and dtype forced.

    `widths` are C and F of the experts. Raises ValueError for any other `impl`.
    """
    if impl not in ("reference", "fused"):
        raise ValueError(f"impl: got {impl!r}, wanted 'reference' or 'fused'")
    device, chosen, reasons = torch.device(device), FUSED if impl == "fused" else REFERENCE, []
    if chosen is FUSED and dtype not in (torch.float64, torch.float32, torch.bfloat16):
        chosen = REFERENCE
        reasons.append(f"reference twins, since the fused ones are not tested in {dtype}")
    if chosen is FUSED:
        is_able = device.type in ("cpu", "cuda") and dtype != torch.float64 and hasattr(F, "grouped_mm")
        if not is_able or any(width * dtype.itemsize % 16 for width in widths):
            chosen = chosen._replace(expert_ffn=expert_ffn_reference)
            reasons.append("experts by the reference twin: the grouped product wants torch 2.10, CPU or CUDA, "
                           f"float32 or bfloat16, widths of 16 bytes; got {device.type}, {dtype}, {widths}")
        elif device.type == "cuda" and not fp8 and not groups_on_device(device, dtype):
            reasons.append("the host waits in each product of the experts: torch groups them on the "
                           "device in bfloat16 on sm_90 and sm_100 alone")
        if device.type == "cpu" and dtype == torch.float32 and onednn_is_exact():
            reasons.append("float32 products by oneDNN, as exact as MKL's")
    if fp8:
        units, reason = try_fp8_units(device)
        linear = partial(linear_fp8, units=units)
        chosen = chosen._replace(linear=linear, expert_ffn=partial(expert_ffn_reference, linear=linear))
        reasons.append(f"{reason}; experts in turn, and for each a GPU's host waits")
    return chosen, tuple(reasons)


# ---------------------------------------------------------------------------------------------- FP8

TILE = 128  # V3 section 3.3: activations are scaled in tiles of 1 x 128, weights in blocks of 128 x 128
E4M3_MAX = 448.0
LEAST = 1e-30  # so that a block of zeros has a scale; DeepSeek's code takes 1e-4 for activations


def quantise(x: Tensor, rows: int, least: float = LEAST, power_of_two: bool = False):
    """E4M3 codes of x (M, K) and the scale `max(amax, least) / 448` of each block of `rows` x 128.

    At a ragged edge a block holds what there is. Scales are float32 (ceil(M/rows), ceil(K/128)).
    With `power_of_two` they are rounded up to one: codes can be grouped anew without a new error.
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


def fp8_product(a, b, b_rows: int, dtype: torch.dtype, units: bool = False) -> Tensor:
    """`a b^T` (M, N) of quantised a (M, K) in tiles and b (N, K) in tiles or blocks, in float32.

    With `units` by the FP8 units of a Hopper GPU, else emulated: products of the same codes.
    """
    if units and len(a[0]) > 1 and a[0].shape[1] % TILE == 0 and len(b[0]) % TILE == 0:
        kinds = {1: F.ScalingType.BlockWise1x128, TILE: F.ScalingType.BlockWise128x128}
        by_column = [scales.t().contiguous().t() for scales in (a[1], b[1])]  # for tiles
        by_block = F.pad(b[1], (0, -b[1].shape[1] % 4)).contiguous().t()  # (K/128 rounded up to 4, N/128)
        b_scales = by_column[1] if b_rows == 1 else by_block
        return F.scaled_mm(a[0].contiguous(), b[0].contiguous().t(), by_column[0], kinds[1],
                           b_scales, kinds[b_rows], output_dtype=torch.bfloat16).to(dtype)
    return (dequantise(*a, 1) @ dequantise(*b, b_rows).t()).to(dtype)


def try_fp8_units(device: torch.device) -> tuple[bool, str]:
    """Whether F.scaled_mm multiplies scaled blocks there as the emulation does, and what to say."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if not is_hopper or not hasattr(F, "scaled_mm"):
        return False, f"fp8 emulated: {device.type} here has no units for scaled FP8 blocks"
    x = torch.randn(2 * TILE, 2 * TILE, device=device)
    a, b = quantise(x, 1), quantise(x, TILE)
    exact = fp8_product(a, b, TILE, torch.float32)
    try:
        off = (fp8_product(a, b, TILE, torch.float32, units=True) - exact).norm() / exact.norm()
    except (RuntimeError, ValueError) as error:
        return False, f"fp8 emulated: F.scaled_mm refuses, {error}"
    reason = f"fp8 by F.scaled_mm where widths are multiples of 128 (else emulated), off by {off:.1e}"
    return bool(off < 0.01), reason


class _FP8Linear(torch.autograd.Function):
    """Quantised forward, input gradient and weight gradient (V3 figure 6); keeps the input's codes.

    The weight gradient wants tiles along the tokens, hence scales are powers of two (3.3.2).
    """

    @staticmethod
    def forward(ctx, x, weight, units):
        flat = x.reshape(-1, x.shape[-1])  # (M, K)
        a, w = quantise(flat, 1, 1e-4, power_of_two=True), quantise(weight, TILE)
        ctx.save_for_backward(*a, *w)
        ctx.dtypes, ctx.units = (x.dtype, weight.dtype), units
        with by_onednn(flat):
            return fp8_product(a, w, TILE, x.dtype, units).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        codes, scales, w_codes, w_scales = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])  # (M, N)
        x_again = dequantise(codes, scales, 1).t()  # (K, M), in tiles along the tokens
        with by_onednn(dy):
            dx = fp8_product(quantise(dy, 1), (w_codes.t(), w_scales.t()), TILE,
                             ctx.dtypes[0], ctx.units)  # (M, K)
            dw = fp8_product(quantise(dy.t(), 1), quantise(x_again, 1, power_of_two=True), 1,
                             ctx.dtypes[1], ctx.units)  # (N, K)
        return dx.view(*grad.shape[:-1], dx.shape[-1]), dw, None


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None = None, units: bool = False) -> Tensor:
    """`linear` with all three products of training in FP8, as V3 was trained (section 3.3)."""
    y = _FP8Linear.apply(x, weight, units)
    return y if bias is None else y + bias


# ------------------------------------------------------------------------- which library multiplies


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's float32 products are as exact as MKL's here, which can take twice as long.

    PyTorch calls oneDNN for them at the precision "medium" only, which permits, but does not ask
    for, rounding to bfloat16; a CPU with AMX does round.
    """
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    x = torch.linspace(-9.0, 9.0, 256 * 256).sin().view(256, 256)
    with precision("medium"):
        error = (x @ x - x.double() @ x.double()).abs().max()
    return bool(error < 1e-3)  # rounding to bfloat16 is off by 0.1


@contextmanager
def precision(name: str):
    """torch's precision of float32 products inside the block, process-wide; then as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def by_onednn(x: Tensor, least: int = 64):
    """A block whose float32 products are oneDNN's, where these are exact and x has `least` rows.

    With fewer rows MKL is the faster one. Nothing is switched for another device or dtype, or where
    the caller has chosen a precision other than torch's default.
    """
    is_fit = x.shape[:-1].numel() >= least and x.dtype == torch.float32 and x.is_cpu
    if not is_fit or torch.get_float32_matmul_precision() != "highest" or not onednn_is_exact():
        return nullcontext()
    return precision("medium")
