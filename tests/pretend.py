"""A CPU that says it is a GPU, so that the CUDA branches run, and are right, where there is none.

Inside `gpu()` a tensor made on or moved to "cuda" is a `Pretended`: it says cuda:0, is computed on the CPU,
refuses to mix with tensors of the CPU as CUDA does, and notes in `log` whatever would make the host wait:

    with gpu((9, 0)) as log:
        model = Transformer(config).to("cuda")
        model(tokens.to("cuda"))
    log                  [Wait("copy to the device", "test_gpu_path.py:7"), ...]

F.scaled_mm, the grouped product, cuDNN's attention and varlen_attn are held to what torch asks of their inputs on a
GPU of that capability. Speed, memory, the choice among SDPA's kernels, NCCL and FP8's own rounding it cannot see.
"""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

ROOT = str(Path(__file__).parent.parent)
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
DATA_DEPENDENT = {aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim, aten.unique_consecutive,
                  aten.equal, aten._local_scalar_dense, aten.is_nonzero}  # whose result's size or value the host wants


class Wait(NamedTuple):
    """Something for which the host stands still until the device has done all it was asked to."""

    what: str
    where: str  # file:line of the innermost line of ours


log: list[Wait] = []  # of the `gpu()` that is open
major = 9  # of its capability


def note(what: str) -> None:
    frame = sys._getframe(1)
    while frame and not (frame.f_code.co_filename.startswith(ROOT) and frame.f_code.co_filename != __file__):
        frame = frame.f_back
    if Graph.open is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")
    log.append(Wait(what, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"))


class Graph:
    """torch.cuda.CUDAGraph: what was done inside torch.cuda.graph(...) is done again, on the same memory (here the capture
    itself has run, too)."""

    open: list | None = None  # of the graph that is being captured

    @contextmanager
    def capture(self, *_, **__):
        self.done = Graph.open = []
        try:
            yield
        finally:
            Graph.open = None

    def replay(self) -> None:
        for function, args, kwargs, out in self.done:
            for old, new in zip(tensors(out), tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Pretended(torch.Tensor):
    """A tensor of the CPU, `held`, that says it lies on the GPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="cpu", requires_grad=held.requires_grad)  # autograd knows no GPU on a torch without CUDA
        out.held = held
        return out

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)

    def __repr__(self, **_) -> str:
        return f"Pretended({self.held!r})"

    def __deepcopy__(self, memo):
        out = Pretended(self.held.detach().clone()).requires_grad_(self.requires_grad)
        out._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), out)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_devices(op, args, kwargs)
        note_waits(op, args, kwargs)
        function = STAND_INS.get(op.overloadpacket, op)
        args_held, kwargs_held = unwrapped(args), {name: unwrapped(x) for name, x in kwargs.items()}
        out = function(*args_held, **kwargs_held)
        if Graph.open is not None:
            Graph.open.append((function, args_held, kwargs_held, out))
        is_in_place = bool(op._schema.arguments) and op._schema.arguments[0].is_write
        return args[0] if is_in_place and not isinstance(args[0], (list, tuple)) else wrapped(out)


def wrapped(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(wrapped, x))
    return Pretended(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) else x


def unwrapped(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(unwrapped, x))
    return x.held if isinstance(x, Pretended) else x


def tensors(*tree) -> list[torch.Tensor]:
    found = []
    for x in tree:
        found += tensors(*x) if isinstance(x, (list, tuple)) else [x] if isinstance(x, torch.Tensor) else []
    return found


def check_devices(op, args, kwargs) -> None:
    """Tensors of the CPU may come along as numbers, as indices, and as either side of a copy."""
    if op.overloadpacket in (aten.copy_, aten._to_copy):
        return
    inputs = tensors(args, *kwargs.values())
    if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        inputs = tensors(args[0], args[2:]) if isinstance(args[0], Pretended) else inputs
    strange = [x for x in inputs if not isinstance(x, Pretended) and x.ndim and x.numel()]
    if strange:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                           f"({op}, {[tuple(x.shape) for x in strange]})")


def note_waits(op, args, kwargs) -> None:
    """What torch's CUDA code copies to the host and waits for, by operation."""
    kind = op.overloadpacket
    if kind in DATA_DEPENDENT:
        note("a word to the host: " + kind.__name__)
    elif kind in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        indices = tensors(args[1])
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            note("a word to the host: boolean index")
        if any(not isinstance(x, Pretended) for x in indices):
            note("copy to the device: index")
    elif kind is aten.repeat_interleave and kwargs.get("output_size") is None:
        note("a word to the host: repeat_interleave without output_size")
    elif kind is aten.copy_ and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if not isinstance(args[0], Pretended) or is_blocking and args[1].ndim:
            note("copy to the " + ("device" if isinstance(args[0], Pretended) else "host"))
    elif kind is aten._grouped_mm and not (major in (9, 10) and args[0].dtype == torch.bfloat16):
        note("a word to the host: grouped product in a loop")  # GroupedBlas.cpp: offs.cpu()


# ------------------------------------------------------------------------------------ what CUDA asks


def scaled_mm(a, b, a_scales, a_kind, a_swizzle, b_scales, b_kind, b_swizzle, bias, dtype, *_):
    """F.scaled_mm of DeepSeek's blocks, held to the checks of torch's ScaledBlas.cpp (ValueError as there)."""
    tile, block = F.ScalingType.BlockWise1x128.value, F.ScalingType.BlockWise128x128.value
    (M, K), N, (sa,), (sb,) = a.shape, b.shape[1], a_scales, b_scales
    deep = -(-K // 128)  # blocks along K

    def wants(is_met: bool, what: str) -> None:
        if not is_met:
            raise ValueError(f"scaled_mm of ({M}, {K}) and ({K}, {N}) wants {what}, got scales {tuple(sa.shape)} "
                             f"{sa.stride()} and {tuple(sb.shape)} {sb.stride()}")

    def is_by_column(scales, rows: int, columns: int) -> bool:
        strides = scales.stride()
        return (scales.shape == (rows, columns) and strides[0] == 1
                and (strides[1] == rows or columns == 1 and strides[1] == 1))

    if major != 9:
        raise NotImplementedError("DeepSeek style (1x128, 128x128) scaling only supported in CUDA for SM90")
    wants(a.dtype == b.dtype == torch.float8_e4m3fn and sa.dtype == sb.dtype == torch.float32, "e4m3 and float32 scales")
    wants(a.stride(1) == 1 and b.stride(0) == 1, "a by rows, b by columns")
    wants(K % 16 == 0 and N % 16 == 0, "K and N in multiples of 16")
    wants(a_kind == [tile] and b_kind in ([tile], [block]), "tiles, and tiles or blocks")
    wants(is_by_column(sa, M, deep), "scale_a by columns")
    wants(dtype in (torch.bfloat16, torch.float32), "another output")
    if b_kind == [tile]:
        wants(is_by_column(sb, N, deep), "scale_b by columns")
        right = sb
    else:
        wants(is_by_column(sb, deep + -deep % 4, -(-N // 128)), "scale_b (K/128 rounded up to 4, N/128) by columns")
        right = sb[:deep].t().repeat_interleave(128, 0)[:N]
    left, right = (s.repeat_interleave(128, 1)[:, :K] for s in (sa, right))
    return ((a.float() * left) @ (b.t().float() * right).t()).to(dtype)


def histc(x, *args, **kwargs):
    return torch.histc(x.float(), *args, **kwargs).to(x.dtype)  # CUDA's knows integers


STAND_INS = {aten._conj: torch.conj_physical,  # for the lazy form is a mark on the tensor, which a wrapper has not
             aten.histc: histc}
if hasattr(aten, "_scaled_mm_v2"):
    STAND_INS[aten._scaled_mm_v2] = scaled_mm


def sdpa_choice(q, k, v, mask=None, *_, **__) -> int:
    """cuDNN first on sm_90 and sm_100, for half precision and heads of at most 128 numbers or of 192 and 128; then flash,
    for equal heads of at most 256 without a mask; then the memory-efficient kernel (torch's sdp_utils.cpp)."""
    widths, is_half = [q.shape[-1], v.shape[-1]], q.dtype in (torch.bfloat16, torch.float16)
    if is_half and major in (9, 10) and (max(widths) <= 128 or widths == [192, 128]) and not any(w % 8 for w in widths):
        return SDPBackend.CUDNN_ATTENTION.value
    has_flash = is_half and mask is None and widths[0] == widths[1] <= 256
    return (SDPBackend.FLASH_ATTENTION if has_flash else SDPBackend.EFFICIENT_ATTENTION).value


def packed_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=None):
    """Causal attention inside each of the sequences that lie one behind the other, q, k, v (tokens, H, D)."""
    for x in (q, k, v):
        assert isinstance(x, Pretended) and x.dtype in (torch.bfloat16, torch.float16), "varlen_attn: half precision"
        assert x.shape == q.shape and x.stride(-1) == 1 and x.shape[-1] <= 256 and x.shape[-1] % 8 == 0
    assert isinstance(max_q, int) and max_q == max_k
    bounds = [unwrapped(cu).tolist() for cu in (cu_seq_q, cu_seq_k)]
    assert all(isinstance(cu, Pretended) and cu.dtype == torch.int32 and cu.is_contiguous() for cu in (cu_seq_q, cu_seq_k))
    assert bounds[0] == bounds[1] == sorted(bounds[0]) and bounds[0][0] == 0 and bounds[0][-1] == len(q)
    assert max(b - a for a, b in zip(bounds[0], bounds[0][1:])) <= max_q
    parts = [[x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)] for a, b in zip(bounds[0], bounds[0][1:]) if b > a]
    made = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]  # (1, H, length, D)
    return torch.cat(made, dim=2)[0].transpose(0, 1).contiguous()


attended: list[tuple[int, int, int]] = []  # of each F.scaled_dot_product_attention: widths of q and v, torch's choice


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """F.scaled_dot_product_attention, whose kernel for CPUs wants heads of one width, and no mask for causality."""
    attended.append((q.shape[-1], v.shape[-1], sdpa_choice(q, k, v, attn_mask)))
    if is_causal and q.shape[-1] != v.shape[-1]:
        attn_mask, is_causal = Pretended(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)


def varlen_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def varlen_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


# ------------------------------------------------------------------------------- making and moving


def is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class Pretending(TorchFunctionMode):
    """Catches what torch without CUDA would refuse: making tensors on the GPU, moving them there and back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if function is torch.Tensor.pin_memory:
            return first
        if function is torch.Tensor.tolist and isinstance(first, Pretended):
            note("copy to the host: tolist")
            return first.held.tolist()
        if function is torch.Tensor.numpy and isinstance(first, Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function is F.scaled_dot_product_attention and isinstance(first, Pretended):
            return attention(*args, **kwargs)
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(function, first, args[1:], kwargs)
        if function is torch.Tensor.new_tensor and isinstance(first, Pretended):
            kwargs.setdefault("device", CUDA)
        if not is_cuda(kwargs.get("device")):
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            note("copy to the device: " + function.__name__)
        return wrapped(function(*unwrapped(args), **kwargs | {"device": "cpu"}))

    def move(self, function, x, args: tuple, kwargs: dict):
        """`to`, `cpu` and `cuda` as CUDA has them; a copy between two devices waits unless it is told not to."""
        target, dtype, is_patient = {torch.Tensor.cpu: torch.device("cpu"), torch.Tensor.cuda: CUDA}.get(function), None, False
        is_copy = kwargs.pop("copy", False)
        if function is torch.Tensor.to and isinstance(args[0] if args else None, torch.Tensor):
            target, dtype = args[0].device, args[0].dtype
        elif function is torch.Tensor.to:
            target, dtype, is_patient, _ = torch._C._nn._parse_to(*args, **kwargs)
        if target is None or target.type not in {"cpu", "cuda"} - {x.device.type}:
            elsewhere = {"device": target} if target and target.type != x.device.type else {}  # "meta"
            return torch.Tensor.to(x, **elsewhere, dtype=dtype or x.dtype, copy=is_copy)
        if target.type == "cpu" or not is_patient:
            note("copy to the " + ("device" if target.type == "cuda" else "host"))
        there = Crossing.apply(x, target)
        return there if dtype is None else there.to(dtype)


group_tensors = torch.optim.Optimizer._group_tensors_by_device_and_dtype


def by_device(lists, with_indices=False):
    """What an optimizer updates together: torch's C++ sees the CPU behind the GPU."""
    is_there = isinstance(lists[0][0], Pretended)
    return {(CUDA if is_there else device, dtype): group
            for (device, dtype), group in group_tensors(lists, with_indices).items()}


run_backward = torch.autograd._engine_run_backward


def backward(*args, **kwargs):
    """The engine behind `backward` and `grad`, which torch calls outside the mode that caught these two."""
    with Pretending():
        return run_backward(*args, **kwargs)


class Crossing(torch.autograd.Function):
    """A copy from one device to the other, and its gradient back."""

    @staticmethod
    def forward(ctx, x, target):
        ctx.is_there = target.type == "cuda"
        return Pretended(x.detach().clone()) if ctx.is_there else x.held.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.held.clone() if ctx.is_there else Pretended(grad.clone()), None


@contextmanager
def gpu(capability: tuple[int, int] = (9, 0), varlen_attn: Callable | None = varlen_of_2_11):
    """Pretend that this machine has a GPU of this capability; yields the log of waits.

    `varlen_attn` stands in for torch's: that of torch 2.10, of 2.11 and later, or None for a torch without it.
    """
    global major
    properties = SimpleNamespace(major=capability[0], minor=capability[1], total_memory=80 * 2**30, name="pretended",
                                 multi_processor_count=132)
    facts = {"is_available": True, "device_count": 1, "current_device": 0, "synchronize": None, "empty_cache": None,
             "get_device_capability": capability, "get_device_properties": properties, "get_device_name": "pretended",
             "max_memory_allocated": 0, "memory_allocated": 0, "reset_peak_memory_stats": None, "is_bf16_supported": True,
             "is_current_stream_capturing": False}
    with ExitStack() as stack:
        for name, fact in facts.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, fact=fact, **__: fact))
        stack.enter_context(patch.object(torch, "_fused_sdp_choice", sdpa_choice))
        stack.enter_context(patch.object(varlen, "varlen_attn", varlen_attn))
        log.clear()
        attended.clear()
        major = capability[0]
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion,
                       torch.__future__.get_overwrite_module_params_on_conversion())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype",
                                         staticmethod(by_device)))
        stack.enter_context(patch.object(torch.cuda, "CUDAGraph", Graph))
        stack.enter_context(patch.object(torch.cuda, "graph", Graph.capture))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(Pretending())
        yield log


def waits_of(function: Callable, *args, **kwargs) -> list[Wait]:
    """The waits of one call, inside `gpu()`."""
    before = len(log)
    function(*args, **kwargs)
    return log[before:]
