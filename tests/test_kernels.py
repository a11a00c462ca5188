"""Every operation: fused and reference against each other and against float64."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import FUSED, IGNORE, REFERENCE, Kernels, choose

TWINS = {"reference": REFERENCE, "fused": FUSED}
# largest error relative to the largest value of the float64 result
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def rms_norm_inputs(n=7, C=24):
    return torch.randn(n, 3, C), torch.randn(C), 1e-6


def rope_inputs(B=2, T=5, H=3, P=8, rows=1):
    angle = torch.randn(rows, T, 1, P // 2)
    return torch.randn(B, T, H, P), torch.polar(torch.full_like(angle, 1.2), angle)


def attention_inputs(B=2, T=150, H=3, D=6, P=4, Dv=5):
    widths = ((B, T, H, D), (B, T, H, P), (B, T, H, D), (B, T, P), (B, T, H, Dv))
    return (*(torch.randn(shape) for shape in widths), 0.3)


def isolated_inputs(B=2, T=150):
    """Documents of random lengths, packed."""
    starts = torch.where(torch.rand(B, T) < 0.1, torch.arange(T), 0).cummax(1).values  # (B, T)
    mask = torch.arange(T) >= starts.unsqueeze(-1)  # (B, T, T)
    return *attention_inputs(B, T), mask & torch.ones(T, T, dtype=torch.bool).tril()


def linear_inputs(n=7, K=24, N=10):
    return torch.randn(3, n, K), torch.randn(N, K), torch.randn(N)


def latent_inputs(B=2, T=3, S=9, H=3, R=10, P=4, masks=None):
    """Rows of different length in one cache; with `masks=1` all rows have one mask."""
    positions = torch.arange(S - T, S).repeat(B if masks is None else masks, 1)  # (B, T)
    positions[:1] -= min(1, S - T)
    mask = torch.arange(S) <= positions.unsqueeze(-1)  # (B, T, S)
    return torch.randn(B, T, H, R), torch.randn(B, T, H, P), torch.randn(B, S, R + P), mask, 0.3


def expert_inputs(N=40, C=16, F=8, E=6, K=2, idle=0):
    """The last `idle` experts get no token."""
    topk_idx = torch.rand(N, E - idle).argsort(-1)[:, :K]  # (N, K) distinct
    return torch.randn(N, C), torch.randn(E, 2 * F, C), torch.randn(E, C, F), topk_idx, torch.rand(N, K)


def loss_inputs(N=300, C=12, V=50, ignored=0.3):
    targets = torch.randint(0, V, (N,))
    return torch.randn(N, C), torch.randn(V, C), targets.masked_fill(torch.rand(N) < ignored, IGNORE)


torch.manual_seed(0)  # a width of 1 and a number near 0 are beyond any tolerance
CASES = {
    "linear": [linear_inputs(), linear_inputs(0), linear_inputs(1, 1, 1), linear_inputs(90)],
    "rms_norm": [rms_norm_inputs(), rms_norm_inputs(1, 1), rms_norm_inputs(0, 4), rms_norm_inputs(2, 33)],
    "apply_rope": [rope_inputs(), rope_inputs(1, 1, 1, 2), rope_inputs(B=0), rope_inputs(rows=2)],
    "causal_attention": [
        attention_inputs(), attention_inputs(T=1), attention_inputs(B=0, T=3), attention_inputs(H=1),
        attention_inputs(1, 128), attention_inputs(T=5, D=3, P=2, Dv=9), attention_inputs(1, 300, 2),
        isolated_inputs(), isolated_inputs(B=3, T=300), isolated_inputs(B=1, T=2)],
    "latent_attention": [
        latent_inputs(), latent_inputs(T=1), latent_inputs(1, 1, 1), latent_inputs(B=0),
        latent_inputs(T=9), latent_inputs(H=1, R=3, P=2), latent_inputs(T=5, masks=1)],
    "expert_ffn": [
        expert_inputs(), expert_inputs(idle=3), expert_inputs(N=1), expert_inputs(N=0),
        expert_inputs(E=1, K=1), expert_inputs(N=3, E=32, K=3), expert_inputs(N=1200, F=24, K=3),
        expert_inputs(N=9, K=6), expert_inputs(N=2000, K=2, idle=3)],
    "linear_cross_entropy": [
        loss_inputs(), loss_inputs(N=1, ignored=0), loss_inputs(N=0), loss_inputs(ignored=1.0),
        loss_inputs(N=2500, V=7), loss_inputs(C=1, V=3), loss_inputs(V=5000)],  # in three blocks
}
PAIRS = [pytest.param(name, *twins, id=name) for name, *twins in zip(Kernels._fields, REFERENCE, FUSED, strict=True)]
EVERY = [pytest.param(name, i, id=f"{name}-{i}") for name in Kernels._fields for i in range(len(CASES[name]))]


def is_float(x):
    return torch.is_tensor(x) and x.is_floating_point()


def cast(name, inputs, dtype):
    """The inputs in `dtype`; what never leaves float32 in the model (angles, gates) stays float32."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = [wide if (name, i) == ("expert_ffn", 4) else dtype for i in range(len(inputs))]
    return [x.detach().to(d).clone() if is_float(x) else x for x, d in zip(inputs, dtypes)]


def exact_dtype(name):
    """float64, but for torch's grouped product, which has none."""
    return torch.float32 if name == "expert_ffn" else torch.float64


def run(function, inputs, seed=0):
    """Result and every gradient under a random outside gradient."""
    inputs = [x.detach().requires_grad_() if is_float(x) else x for x in inputs]
    out = function(*inputs)
    outside = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if is_float(x)], outside)]


def assert_close(got, exact, tolerance, what):
    assert got.shape == exact.shape, what
    if exact.numel():
        error = (got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"{what}: relative error {error:.2e}, wanted {tolerance:.0e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", TWINS)
@pytest.mark.parametrize("name,case", EVERY)
def test_values_and_gradients_are_those_of_the_float64_reference(name, case, impl, dtype):
    if (name, impl, dtype) == ("expert_ffn", "fused", torch.float64):
        pytest.skip("torch's grouped product has no float64; `choose` takes the reference twin")
    torch.manual_seed(case)
    rounded = cast(name, CASES[name][case], dtype)
    exact = run(getattr(REFERENCE, name), cast(name, rounded, torch.float64))
    got = run(getattr(TWINS[impl], name), rounded)
    wanted = torch.promote_types(dtype, torch.float32) if name == "linear_cross_entropy" else dtype
    assert got[0].dtype == wanted
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert_close(g, e, TOLERANCE[dtype], f"{name} case {case}, {f'gradient {i}' if i else 'value'}")


@pytest.mark.parametrize("name,reference,fused", PAIRS)
def test_inputs_need_not_be_contiguous(name, reference, fused):
    dtype = exact_dtype(name)
    inputs = cast(name, CASES[name][0], dtype)
    exact = run(reference, inputs)
    strided = [x.mT.contiguous().mT if torch.is_tensor(x) and x.ndim > 1 else x for x in inputs]
    wide = [torch.stack((x, x), -1)[..., 0] if torch.is_tensor(x) else x for x in inputs]
    for variant in (strided, wide) if name != "expert_ffn" else (strided,):  # its weights lie in rows
        for twin in (reference, fused):
            for got, wanted in zip(run(twin, variant), exact, strict=True):
                assert_close(got, wanted, TOLERANCE[dtype], f"{name} {twin.__name__}")


@pytest.mark.parametrize("name,reference,fused", PAIRS)
def test_fused_gradients_agree_with_finite_differences(name, reference, fused):
    if name == "expert_ffn":
        pytest.skip("torch's grouped product has no float64")
    inputs = {"linear": linear_inputs(2, 3, 4), "rms_norm": rms_norm_inputs(2, 3),
              "apply_rope": rope_inputs(1, 2, 1, 4), "causal_attention": attention_inputs(1, 4, 2, 2, 2, 3),
              "latent_attention": latent_inputs(1, 2, 4, 2, 3, 2), "linear_cross_entropy": loss_inputs(5, 3, 4)}[name]
    leaves = [x.requires_grad_() if is_float(x) else x for x in cast(name, inputs, torch.float64)]
    assert torch.autograd.gradcheck(fused, leaves, atol=1e-6)


@pytest.mark.parametrize("name,reference,fused", PAIRS)
def test_inputs_and_outside_gradient_are_left_alone(name, reference, fused):
    inputs = [x.requires_grad_() if is_float(x) else x for x in cast(name, CASES[name][0], torch.float32)]
    before = [x.detach().clone() if torch.is_tensor(x) else x for x in inputs]
    out = fused(*inputs)
    outside = torch.randn_like(out)
    kept = outside.clone()
    out.backward(outside)
    with torch.no_grad():
        fused(*inputs)
    assert torch.equal(outside, kept)
    for x, y in zip(inputs, before, strict=True):
        assert not torch.is_tensor(x) or torch.equal(x, y)


@pytest.mark.parametrize("name,case", EVERY)
def test_no_gradient_no_graph_same_values(name, case):
    """Decoding: the single token's way through its experts, the products without a Function."""
    fused = getattr(FUSED, name)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cast(name, CASES[name][case], dtype)
        with torch.inference_mode():
            out = fused(*inputs)
        exact = getattr(REFERENCE, name)(*cast(name, inputs, torch.float64))
        assert_close(out, exact, TOLERANCE[dtype], f"{name} case {case}")
        assert_close(out, run(fused, inputs)[0], TOLERANCE[dtype], f"{name} case {case}")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 40, 2000])
def test_experts_cast_their_weights_to_the_dtype_of_the_tokens(N, weights):
    """Masters stay float32; gradients come back in the dtype of the weights."""
    u, gate_up, down, topk_idx, gates = expert_inputs(N)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = u.to(dtype), gate_up.to(weights), down.to(weights), topk_idx, gates
        wanted = [(y.dtype, y.shape) for y in run(REFERENCE.expert_ffn, inputs)]
        got = run(FUSED.expert_ffn, inputs)
        assert [(y.dtype, y.shape) for y in got] == wanted
        exact = run(REFERENCE.expert_ffn, [x.double() if is_float(x) else x for x in inputs])
        for g, e in zip(got, exact, strict=True):
            assert_close(g, e, TOLERANCE[torch.bfloat16], f"{N} tokens")


def test_idle_experts_get_gradients_of_zero():
    *_, grad_gate_up, grad_down, _ = run(FUSED.expert_ffn, expert_inputs(N=20, E=6, idle=4))
    assert not grad_gate_up[2:].any() and not grad_down[2:].any() and grad_down[:2].any()


def test_infinities_come_through_the_experts():
    for N in (1, 2):
        u, *rest = expert_inputs(N, 8, 4, 3, 2)
        u[0, 0] = torch.nan
        with torch.no_grad():
            y = FUSED.expert_ffn(u, *rest)
        assert y[0].isnan().all() and y[1:].isfinite().all()


def quantise_by_hand(x, rows, power_of_two=False):
    """DeepSeek's rule, one block after the other."""
    codes, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), []
    for i in range(0, x.shape[0], rows):
        scales.append([])
        for k in range(0, x.shape[1], 128):
            block = x[i : i + rows, k : k + 128].float()
            s = torch.tensor(max(block.abs().max().item(), 1e-4)) / 448.0
            s = torch.tensor(2.0 ** math.ceil(math.log2(s))) if power_of_two else s
            codes[i : i + rows, k : k + 128] = (block / s).to(torch.float8_e4m3fn)
            scales[-1].append(s)
    return codes, torch.tensor(scales)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("shape", [(3, 128), (1, 1), (5, 130), (128, 256), (129, 127), (300, 200)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_codes_and_scales_are_deepseeks(rows, shape, size):
    x = torch.randn(shape) * size * torch.rand(shape[0], 1)
    x[:1] = 0
    codes, scales = kernels.quantise(x, rows, least=1e-4)
    wanted = quantise_by_hand(x, rows)
    assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8)) and torch.equal(scales, wanted[1])


def test_codes_come_back_within_their_three_bits():
    x = torch.randn(200, 300)
    for rows in (1, 128):
        back = kernels.dequantise(*kernels.quantise(x, rows), rows)
        assert 0.02 < (back - x).norm() / x.norm() < 0.03  # 2.6 % for a Gaussian tensor
        assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax() / 448 * 2**-10 * 1.01).all()
    zeros = kernels.quantise(torch.zeros(2, 3), 1)
    assert torch.equal(kernels.dequantise(*zeros, 1), torch.zeros(2, 3))
    tiny = torch.randn(4, 128) * 1e-9  # gradients are that small
    assert (kernels.dequantise(*kernels.quantise(tiny, 1), 1) - tiny).norm() < 0.03 * tiny.norm()


def test_scales_that_are_powers_of_two_spare_the_second_rounding():
    """V3 section 3.3.2: codes in tiles along the width become codes in tiles along the tokens."""
    x, same = torch.randn(256, 384), {}
    for is_round in (True, False):
        once = kernels.dequantise(*kernels.quantise(x, 1, power_of_two=is_round), 1)
        twice = kernels.dequantise(*kernels.quantise(once.t(), 1, power_of_two=is_round), 1).t()
        same[is_round] = (once == twice).double().mean()
    assert same[True] > 0.999 and same[False] < 0.5
    assert torch.equal(kernels.quantise(x, 1, power_of_two=True)[1].log2() % 1, torch.zeros(256, 3))


@pytest.mark.parametrize("M,K,N", [(5, 7, 3), (130, 200, 140), (1, 128, 128), (0, 5, 4)])
def test_fp8_products_are_those_of_the_codes(M, K, N):
    """Forward, input gradient and weight gradient against a sum over blocks in float64."""
    def blocks(a, b, a_rows, b_rows, *are_round):
        a, b = (quantise_by_hand(*each) for each in zip((a, b), (a_rows, b_rows), are_round))
        out = torch.zeros(len(a[0]), len(b[0]), dtype=torch.float64)
        for k in range(a[1].shape[1]):
            part = slice(128 * k, 128 * k + 128)
            sizes = [q[1].double()[:, k].repeat_interleave(r)[: len(q[0])] for q, r in ((a, a_rows), (b, b_rows))]
            out += a[0][:, part].double() @ b[0][:, part].double().t() * sizes[0][:, None] * sizes[1]
        return out

    x, weight, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = kernels.linear_fp8(*leaves)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    if M == 0:
        return
    x_hat = kernels.dequantise(*quantise_by_hand(x, 1, True), 1)
    w_hat = kernels.dequantise(*quantise_by_hand(weight, 128), 128)
    dy_hat = kernels.dequantise(*quantise_by_hand(dy, 1), 1)
    assert_close(y.detach(), blocks(x, weight, 1, 128, True, False), 1e-6, "forward")
    assert_close(dx, dy_hat.double() @ w_hat.double(), 1e-6, "input gradient")
    assert_close(dw, blocks(dy.t(), x_hat.t(), 1, 1, False, True), 1e-6, "weight gradient")
    assert 0.01 < (y - x @ weight.t()).norm() / (x @ weight.t()).norm() < 0.08 or M * K < 100


def test_fp8_covers_what_v3_covered():
    """All products of attention and FFNs; not the head, eh_proj, the router, norms, embedding."""
    from model import Config, Linear, Transformer

    model = Transformer(Config.preset("tiny"))
    reasons = model.use_kernels("fused", fp8=True)
    high = {name for name, module in model.named_modules()
            if isinstance(module, Linear) and module.ops.linear is FUSED.linear}
    assert high == {"lm_head", "model.layers.4.eh_proj"} and any("fp8 emulated" in reason for reason in reasons)
    tokens = torch.randint(0, 1024, (2, 64))
    ce = {}
    for fp8 in (False, True):
        model.use_kernels("fused", fp8=fp8)
        model.zero_grad()
        losses = model(tokens, tokens)
        (losses["ce"] + losses["mtp"] + losses["balance"]).backward()
        ce[fp8] = losses["ce"].item()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert ce[True] != ce[False] and abs(ce[True] / ce[False] - 1) < 0.0025


def scaled_mm_layouts(monkeypatch, a_shape, b_shape, b_rows):
    """What F.scaled_mm is handed for a product a b^T of these shapes, as if on a Hopper GPU."""
    seen = []

    def scaled_mm(a, b, a_scales, a_kind, b_scales, b_kind, output_dtype):
        seen.append((a_scales.shape, a_scales.stride(), b_scales.shape, b_scales.stride(), b_kind))
        return torch.zeros(len(a), b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm, raising=False)
    a, b = kernels.quantise(torch.randn(a_shape), 1), kernels.quantise(torch.randn(b_shape), b_rows)
    product = kernels.fp8_product(a, b, b_rows, torch.float32, units=True)
    assert product.shape == (a_shape[0], b_shape[0]) and product.dtype == torch.float32
    return seen


@pytest.mark.skipif(not hasattr(F, "ScalingType"), reason="this torch knows no scaled blocks")
def test_scales_lie_as_the_fp8_units_want_them(monkeypatch):
    """ScaledBlas.cpp: 1 x 128 scales by columns; 128 x 128 as (K/128 up to 4, N/128)."""
    kinds = F.ScalingType
    for K, blocks, padded in ((256, 2, 4), (640, 5, 8), (512, 4, 4)):
        tiles = scaled_mm_layouts(monkeypatch, (48, K), (384, K), 1)
        assert tiles == [((48, blocks), (1, 48), (384, blocks), (1, 384), kinds.BlockWise1x128)]
        squares = scaled_mm_layouts(monkeypatch, (48, K), (384, K), 128)
        assert squares == [((48, blocks), (1, 48), (padded, 3), (1, padded), kinds.BlockWise128x128)]
    assert scaled_mm_layouts(monkeypatch, (48, 130), (384, 130), 128) == []  # emulated


@pytest.mark.skipif(not hasattr(F, "ScalingType"), reason="this torch knows no scaled blocks")
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_units_that_refuse_are_named(monkeypatch, error):
    def scaled_mm(*_, **__):
        raise error("scale_b must have another shape")

    randn = torch.randn
    monkeypatch.setattr(F, "scaled_mm", scaled_mm, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    units, reason = kernels.try_fp8_units(torch.device("cuda"))
    assert not units and reason == "fp8 emulated: F.scaled_mm refuses, scale_b must have another shape"


def test_choose_knows_two_sides():
    assert choose("reference") == (REFERENCE, ())
    assert choose("fused")[0] is FUSED and choose("fused", dtype=torch.bfloat16) == (FUSED, ())
    assert choose("fused", widths=(96, 48))[0] is FUSED
    with pytest.raises(ValueError, match="wanted 'reference' or 'fused'"):
        choose("triton")


@pytest.mark.parametrize("dtype,device,widths", [
    (torch.float32, "meta", (96, 48)), (torch.bfloat16, "cpu", (96, 12)), (torch.float32, "cpu", (6, 48)),
    (torch.float64, "cpu", (96, 48))])
def test_experts_that_torch_cannot_group_are_the_reference_and_named(dtype, device, widths):
    chosen, reasons = choose("fused", device, dtype, widths=widths)
    assert chosen == FUSED._replace(expert_ffn=REFERENCE.expert_ffn)
    assert reasons[0].startswith("experts by the reference twin") and reasons[0].endswith(f"{dtype}, {widths}")
    assert choose("reference", device, dtype, widths=widths)[1] == ()


def test_half_precision_and_an_old_torch_take_the_reference(monkeypatch):
    chosen, reasons = choose("fused", dtype=torch.float16)
    assert chosen is REFERENCE and "torch.float16" in reasons[0]
    monkeypatch.delattr(F, "grouped_mm")
    chosen, reasons = choose("fused")
    assert chosen.expert_ffn is REFERENCE.expert_ffn and "torch 2.10" in reasons[0]


def test_onednn_products_are_exact_or_not_used():
    x, w = torch.randn(512, 256), torch.randn(128, 256)
    for rows in (1, 512):
        with kernels.by_onednn(x[:rows]):
            product = x[:rows] @ w.t()
        assert_close(product, x[:rows].double() @ w.double().t(), 2e-6, f"{rows} rows")


@pytest.mark.skipif(not kernels.onednn_is_exact(), reason="never switched here")
def test_the_precision_is_switched_for_many_rows_only_and_put_back():
    def seen(x):
        with kernels.by_onednn(x):
            return torch.get_float32_matmul_precision()

    many = torch.zeros(64, 2)
    assert [seen(many), seen(many.view(8, 8, 2)), seen(many[:3]), seen(many.double()), seen(many.bfloat16())] \
        == ["medium", "medium", "highest", "highest", "highest"]
    with pytest.raises(ZeroDivisionError):
        with kernels.by_onednn(many):
            raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
    with kernels.precision("high"):  # the caller's own choice
        assert seen(many) == "high"


def test_a_huge_loss_stays_finite():
    h, weight = torch.tensor([[1.0]]), torch.tensor([[300.0], [-300.0], [0.0]])
    for twins in TWINS.values():
        nll = twins.linear_cross_entropy(h.requires_grad_(), weight, torch.tensor([1]))
        assert nll.item() == pytest.approx(600.0)


def test_latent_attention_gives_padding_no_weight():
    """Slots behind a row's position may hold anything, even after a longer row filled the batch."""
    q, q_pe, latent, mask, scale = latent_inputs(T=1)
    dirty = torch.where(mask.any(1).unsqueeze(-1), latent, 1e4)
    assert not torch.equal(dirty, latent)
    for twins in TWINS.values():
        clean = twins.latent_attention(q, q_pe, latent, mask, scale)
        torch.testing.assert_close(twins.latent_attention(q, q_pe, dirty, mask, scale), clean)


def test_attention_without_a_mask_is_causal():
    inputs = attention_inputs(T=70)
    mask = torch.ones(2, 70, 70, dtype=torch.bool).tril()
    for twins in TWINS.values():
        for g, e in zip(run(twins.causal_attention, inputs), run(twins.causal_attention, (*inputs, mask))):
            assert_close(g, e, TOLERANCE[torch.float32], "with and without a mask")


def test_the_table_names_every_operation_with_two_twins(capsys, monkeypatch, exit_code, refuses):
    from tests.bench import kernels as bench

    monkeypatch.setattr(bench, "BATCHES", {"tiny": (2, 8)})
    monkeypatch.setattr(bench, "matmul_ceiling", lambda dtype: 1e11)
    for kind in ("fp32", "bf16"):
        assert exit_code(bench.main, "tiny", kind) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split()[0] for line in lines[4:] if "one token" not in line]
        assert rows == list(Kernels._fields) and len(lines) == 5 + len(rows)
    refuses(bench.main, "wanted: python -m tests.bench.kernels", "tinny")


def test_kept_bytes_are_counted():
    from tests.bench.kernels import measure

    x = torch.randn(100, 10, requires_grad=True)
    assert measure(lambda x: x.exp(), (x,))[3] == 4000  # exp keeps its result
    assert measure(lambda x: x.square(), (x,))[3] == 0  # square its input


def test_triton_is_never_imported(tmp_path):
    """Even where a package of that name is installed."""
    (tmp_path / "triton.py").write_text("raise SystemExit('triton was imported')")
    code = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(Path(kernels.__file__).parent)]!r}
import torch, kernels
x = torch.ones(2, 2, requires_grad=True)
kernels.choose("fused")[0].rms_norm(x, torch.ones(2), 1e-6).sum().backward()
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "triton"
assert not {{name.split(".")[0] for name in sys.modules}} & {{"model", "data", "train"}}, "imports of ours"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
