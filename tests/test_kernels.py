"""Every operation of the registry: fused and reference against each other and against float64."""

import math
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import IGNORE, OPS, select


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: a second thread only gets in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# largest error relative to the largest value of the float64 result
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def rms_norm_inputs(n=7, C=24):
    return (torch.randn(n, 3, C), torch.randn(C), 1e-6)


def rope_inputs(B=2, T=5, H=3, P=8, rows=1):
    angle = torch.randn(rows, T, 1, P // 2)
    return (torch.randn(B, T, H, P), torch.polar(torch.full_like(angle, 1.2), angle))


def attention_inputs(B=2, T=150, H=3, D=6, P=4, Dv=5):
    widths = ((B, T, H, D), (B, T, H, P), (B, T, H, D), (B, T, P), (B, T, H, Dv))
    return (*(torch.randn(shape) for shape in widths), 0.3)


def isolated_inputs(B=2, T=150):
    """Documents of random lengths, packed."""
    starts = torch.where(torch.rand(B, T) < 0.1, torch.arange(T), 0)
    return (*attention_inputs(B, T), starts.cummax(1).values)


def linear_inputs(n=7, K=24, N=10):
    return (torch.randn(3, n, K), torch.randn(N, K), torch.randn(N))


def latent_inputs(B=2, T=3, S=9, H=3, R=10, P=4):
    positions = torch.arange(S - T, S).repeat(B, 1)  # (B, T)
    positions[:1] -= min(1, S - T)  # rows of different length
    late = torch.arange(max(0, S - T - 1), S)  # what the first query of the shortest row sees is left out
    hidden = late[1 if len(late) > 1 else 0 :] > positions.unsqueeze(-1)  # (B, T, n)
    return (torch.randn(B, T, H, R), torch.randn(B, T, H, P), torch.randn(B, S, R + P), hidden, 0.3)


def expert_inputs(N=40, C=12, F=5, E=6, K=2, idle=0):
    """The last `idle` experts get no token."""
    topk_idx = torch.rand(N, E - idle).argsort(-1)[:, :K]  # (N, K) distinct
    return (torch.randn(N, C), torch.randn(E, 2 * F, C), torch.randn(E, C, F), topk_idx, torch.rand(N, K))


def loss_inputs(N=300, C=12, V=50, ignored=0.3):
    targets = torch.randint(0, V, (N,))
    return (torch.randn(N, C), torch.randn(V, C), targets.masked_fill(torch.rand(N) < ignored, IGNORE))


torch.manual_seed(0)  # a width of 1 and a number near 0 are beyond any tolerance
CASES = {
    "linear": [linear_inputs(), linear_inputs(0), linear_inputs(1, 1, 1)],
    "rms_norm": [rms_norm_inputs(), rms_norm_inputs(1, 1), rms_norm_inputs(0, 4), rms_norm_inputs(2, 33)],
    "apply_rope": [rope_inputs(), rope_inputs(1, 1, 1, 2), rope_inputs(B=0), rope_inputs(rows=2)],
    "causal_attention": [attention_inputs(), attention_inputs(T=1), attention_inputs(B=0, T=3), attention_inputs(H=1),
                         attention_inputs(1, 128), attention_inputs(T=5, D=3, P=2, Dv=9), attention_inputs(1, 300, 2),
                         isolated_inputs(), isolated_inputs(B=3, T=300), isolated_inputs(B=1, T=2)],
    "latent_attention": [latent_inputs(), latent_inputs(T=1), latent_inputs(1, 1, 1), latent_inputs(B=0),
                         latent_inputs(T=9), latent_inputs(H=1, R=3, P=2)],
    "expert_ffn": [expert_inputs(), expert_inputs(idle=3), expert_inputs(N=1), expert_inputs(N=0), expert_inputs(E=1, K=1),
                   expert_inputs(N=3, E=32, K=3), expert_inputs(N=700, F=7, K=3), expert_inputs(N=9, K=6)],
    "linear_cross_entropy": [loss_inputs(), loss_inputs(N=1, ignored=0), loss_inputs(N=0), loss_inputs(ignored=1.0),
                             loss_inputs(N=2500, V=7), loss_inputs(C=1, V=3)],
}
EVERY = [pytest.param(name, i, id=f"{name}-{i}") for name in OPS for i in range(len(CASES[name]))]


def cast(inputs, dtype):
    """The inputs as leaves of `dtype`; what never leaves float32 in the model (angles, gates) stays float32."""
    def one(x, like):
        if not torch.is_tensor(x) or not x.is_floating_point():
            return x
        return x.to(torch.promote_types(dtype, torch.float32) if like else dtype).clone()

    return [one(x, like) for x, like in zip(inputs, is_wide(inputs))]


def is_wide(inputs):
    """Which inputs stay in float32: the gates of the experts."""
    is_experts = len(inputs) == 5 and torch.is_tensor(inputs[4])
    return [is_experts and i == 4 for i in range(len(inputs))]


def needs_grad(name, x):
    return torch.is_tensor(x) and x.is_floating_point()


def run(function, inputs, name, seed=0):
    """Result and every gradient under a random outside gradient."""
    inputs = [x.requires_grad_() if needs_grad(name, x) else x for x in inputs]
    differentiated = [x for i, x in enumerate(inputs) if needs_grad(name, x)]
    out = function(*inputs)
    outside = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, differentiated, outside)]


def assert_close(got, exact, tolerance, what):
    assert got.shape == exact.shape, what
    if exact.numel():
        error = (got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"{what}: relative error {error:.2e}, wanted {tolerance:.0e}"


def test_registry_is_complete():
    assert set(OPS) == set(CASES) == set(kernels.Kernels._fields) - {"reasons", "is_fp8"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("name,case", EVERY)
def test_values_and_gradients_are_those_of_the_float64_reference(name, case, impl, dtype):
    torch.manual_seed(case)
    rounded = cast(CASES[name][case], dtype)
    exact = run(OPS[name].reference, cast(rounded, torch.float64), name)
    got = run(getattr(OPS[name], impl), rounded, name)
    wanted = torch.promote_types(dtype, torch.float32) if name == "linear_cross_entropy" else dtype
    assert got[0].dtype == wanted
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert_close(g, e, TOLERANCE[dtype], f"{name} case {case}, {'value' if i == 0 else f'gradient {i}'}")


@pytest.mark.parametrize("name", OPS)
def test_inputs_need_not_be_contiguous(name):
    inputs = cast(CASES[name][0], torch.float64)
    exact = run(OPS[name].reference, cast(inputs, torch.float64), name)
    strided = [x.mT.contiguous().mT if torch.is_tensor(x) and x.ndim > 1 else x for x in inputs]
    wide = [torch.stack((x, x), -1)[..., 0] if torch.is_tensor(x) else x for x in inputs]
    for variant in (strided, wide):
        for impl in ("reference", "fused"):
            for g, e in zip(run(getattr(OPS[name], impl), [x.detach() if torch.is_tensor(x) else x for x in variant],
                                name), exact):
                assert_close(g, e, 1e-12, f"{name} {impl}")


@pytest.mark.parametrize("name", OPS)
def test_fused_gradients_agree_with_finite_differences(name):
    inputs = {"linear": linear_inputs(2, 3, 4), "rms_norm": rms_norm_inputs(2, 3), "apply_rope": rope_inputs(1, 2, 1, 4),
              "causal_attention": attention_inputs(1, 4, 2, 2, 2, 3), "latent_attention": latent_inputs(1, 2, 4, 2, 3, 2),
              "expert_ffn": expert_inputs(5, 3, 2, 3, 2), "linear_cross_entropy": loss_inputs(5, 3, 4)}[name]
    inputs = cast(inputs, torch.float64)
    leaves = [x.requires_grad_() if needs_grad(name, x) else x
              for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(OPS[name].fused, leaves, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_inputs_and_outside_gradient_are_left_alone(name):
    inputs = [x.requires_grad_() if needs_grad(name, x) else x for x in cast(CASES[name][0], torch.float32)]
    before = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    out = OPS[name].fused(*inputs)
    outside = torch.randn_like(out)
    kept = outside.clone()
    out.backward(outside)
    assert torch.equal(outside, kept)
    for x, y in zip(inputs, before):
        assert not torch.is_tensor(x) or torch.equal(x, y)


@pytest.mark.parametrize("name", OPS)
def test_no_gradient_no_graph_same_values(name):
    inputs = cast(CASES[name][0], torch.float32)
    with torch.inference_mode():
        out = OPS[name].fused(*inputs)
    assert_close(out, OPS[name].fused(*inputs), 1e-6, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(CASES["expert_ffn"])))
def test_other_ways_through_the_experts_are_the_reference(case, dtype):
    """The grouped product of a GPU, which runs on a CPU too, and the fused twin without a gradient."""
    u, gate_up, down, topk_idx, gates = CASES["expert_ffn"][case]
    pad = lambda x, *sizes: torch.nn.functional.pad(x, sizes)
    F_ = down.shape[2]  # torch wants rows of 16 bytes: widths are padded with zeros
    gate_up = torch.cat([pad(half, 0, -u.shape[1] % 8, 0, -F_ % 8) for half in gate_up.chunk(2, 1)], 1)
    inputs = cast((pad(u, 0, -u.shape[1] % 8), gate_up, pad(down, 0, -F_ % 8, 0, -u.shape[1] % 8), topk_idx, gates), dtype)
    exact = run(OPS["expert_ffn"].reference, cast(inputs, torch.float64), "expert_ffn")
    if hasattr(torch.nn.functional, "grouped_mm"):  # since torch 2.10; `select` takes the reference twin before
        for g, e in zip(run(OPS["expert_ffn"].grouped, cast(inputs, dtype), "expert_ffn"), exact, strict=True):
            assert_close(g, e, TOLERANCE[dtype], f"grouped, case {case}")
    with torch.no_grad():
        assert_close(OPS["expert_ffn"].fused(*inputs), exact[0], TOLERANCE[dtype], f"no gradient, case {case}")


# ---------------------------------------------------------------------------------------- decoding in C


IN_C = [name for name, op in OPS.items() if op.in_c]
needs_c = pytest.mark.skipif(kernels.compiled()[0] is None, reason=kernels.compiled()[1])
DECODING = {
    "linear": [linear_inputs(n, 64, 600) for n in (0, 1, 2, 3)] + [(torch.randn(1, 1, 1000), torch.randn(300, 1000))],
    "rms_norm": CASES["rms_norm"] + [(torch.randn(40), torch.randn(40), 1e-6)],
    "expert_ffn": CASES["expert_ffn"] + [expert_inputs(1, 96, 48, 16, 4), expert_inputs(13, 96, 48, 16, 4),
                                         expert_inputs(3, 200, 130, 5, 5, 0), expert_inputs(64, 33, 17, 16, 4)],
}


@needs_c
@pytest.mark.parametrize("name,case", [(name, i) for name in IN_C for i in range(len(DECODING[name]))])
def test_c_gives_the_values_of_the_float64_reference(name, case):
    inputs = cast(DECODING[name][case], torch.float32)
    exact = OPS[name].reference(*cast(inputs, torch.float64))
    with torch.inference_mode():
        assert_close(OPS[name].in_c(*inputs), exact, 2e-6, f"{name} case {case}")
    for x, y in zip(run(OPS[name].in_c, inputs, name), run(OPS[name].fused, cast(inputs, torch.float32), name)):
        assert torch.equal(x, y)  # with a gradient it is the fused twin


@needs_c
@pytest.mark.parametrize("name", IN_C)
def test_c_is_called_where_it_may_read_and_only_there(name, monkeypatch):
    """Another dtype, a gradient, numbers that do not lie in rows: the fused twin takes them."""
    library, called = kernels.compiled()[0], []

    class Watched:
        def __getattr__(self, function):
            called.append(function)
            return getattr(library, function)

    monkeypatch.setattr(kernels, "compiled", lambda: (Watched(), ""))
    inputs = cast(DECODING[name][1], torch.float32)
    strided = [torch.stack((x, x), -1)[..., 0] if torch.is_tensor(x) else x for x in inputs]
    with torch.no_grad():
        expected = OPS[name].fused(*inputs)
        assert_close(OPS[name].in_c(*inputs), expected, 2e-6, name)
        assert called == [name]
        assert_close(OPS[name].in_c(*strided), expected, 2e-6, name)
        for dtype in (torch.bfloat16, torch.float64):
            OPS[name].in_c(*cast(inputs, dtype))
    OPS[name].in_c(*inputs)
    assert called == [name]


@needs_c
def test_c_takes_rows_of_a_wider_matrix():
    wide, weight = torch.randn(3, 2, 40), torch.randn(24)
    for x in (wide[..., :24], wide[:, :1, 8:32], wide.transpose(0, 1)[..., :24]):
        with torch.no_grad():
            assert_close(OPS["rms_norm"].in_c(x, weight, 1e-6), OPS["rms_norm"].reference(x, weight, 1e-6), 2e-6, x.shape)


@needs_c
def test_c_never_gets_more_pairs_than_its_stack_holds():
    """However narrow the model is; twenty megabytes of pairs would end the process."""
    inputs = cast(expert_inputs(300_000, 1, 1, 256, 4), torch.float32)
    with torch.no_grad():
        assert OPS["expert_ffn"].in_c(*inputs).isfinite().all()


@needs_c
def test_infinities_come_through_c():
    u, gate_up, down, topk_idx, gates = cast(expert_inputs(2, 8, 4, 3, 2), torch.float32)
    u[0, 0], u[1, 0] = torch.nan, 1e30
    with torch.no_grad():
        y = OPS["expert_ffn"].in_c(u, gate_up, down, topk_idx, gates)
    assert y[0].isnan().all() and not (y[1].abs() < 1e20).any()


def test_without_a_compiler_or_a_cache_there_is_a_line_and_no_c(tmp_path, monkeypatch):
    compiled = kernels.compiled.__wrapped__
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    library, reason = compiled()
    assert library is None and reason.startswith("float32 decoding without C: ") and "cc" in reason
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'cc: error: I am old' >&2\necho more >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    assert compiled() == (None, "float32 decoding without C: cc: error: I am old")
    assert not list((tmp_path / ".cache" / "plainseek").iterdir())
    monkeypatch.setattr(kernels, "compiled", lambda: (library, reason))
    assert select("fused").rms_norm is OPS["rms_norm"].fused and reason in select("fused").reasons


@needs_c
def test_a_broken_cache_is_a_line(tmp_path, monkeypatch):
    compiled = kernels.compiled.__wrapped__
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path / "good")
    assert compiled()[0] and compiled()[1] == "float32 decoding in C"
    made = next((tmp_path / "good" / ".cache" / "plainseek").iterdir())  # and no rest of the compilation beside it
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path / "bad")
    broken = tmp_path / "bad" / ".cache" / "plainseek" / made.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a library")
    assert compiled()[0] is None and made.name in compiled()[1]
    broken.unlink()
    broken.parent.rmdir()
    broken.parent.write_text("not a folder")
    assert compiled()[0] is None and "without C" in compiled()[1]


# ------------------------------------------------------------------------------------------------- FP8


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
    assert not model.ops.is_fp8
    reasons = model.use_kernels("fused", fp8=True)
    high = {name for name, module in model.named_modules()
            if isinstance(module, Linear) and module.product is not model.ops.linear}
    assert high == {"lm_head", "model.layers.4.eh_proj"} and any("fp8 emulated" in reason for reason in reasons)
    tokens = torch.randint(0, 1024, (2, 64))
    ce = {}
    for fp8 in (False, True):
        model.use_kernels("fused", fp8=fp8)
        model.zero_grad()
        losses = model(tokens, tokens)
        sum(losses.values()).backward()
        ce[fp8] = losses["ce"].item()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert ce[True] != ce[False] and abs(ce[True] / ce[False] - 1) < 0.0025


@pytest.mark.parametrize("dtype,device,words", [(torch.float16, "cpu", "reference twins"), (torch.float32, "meta", "experts by"),
                                                (torch.bfloat16, "meta", "experts by")])
def test_a_forced_choice_is_named(dtype, device, words):
    chosen = select("fused", device, dtype, widths=(96, 7))
    assert chosen.expert_ffn is OPS["expert_ffn"].reference
    assert any(words in reason for reason in chosen.reasons)
    assert select("reference", device, dtype).reasons == ()


def test_onednn_products_are_exact_or_not_used():
    x, w = torch.randn(512, 256), torch.randn(128, 256)
    for rows in (1, 512):
        product = kernels.by_onednn(torch.mm)(x[:rows], w.t())
        assert_close(product, x[:rows].double() @ w.double().t(), 2e-6, f"{rows} rows")


@pytest.mark.skipif(not kernels.onednn_is_exact(), reason="never switched here")
def test_the_precision_is_switched_for_many_rows_only_and_put_back():
    seen = kernels.by_onednn(lambda x: torch.get_float32_matmul_precision())
    broken = kernels.by_onednn(lambda x: 1 / 0)
    many = torch.zeros(64, 2)
    assert [seen(many), seen(many[:3]), seen(many.double()), seen(many[:, 0])] == ["medium", "highest", "highest", "medium"]
    with pytest.raises(ZeroDivisionError):
        broken(many)
    assert torch.get_float32_matmul_precision() == "highest"
    with kernels.precision("high"):  # the caller's own choice
        assert seen(many) == "high"


def test_a_broken_twin_is_found():
    """The comparison itself must be able to fail."""
    inputs = cast(CASES["rms_norm"][0], torch.float32)
    exact = run(OPS["rms_norm"].reference, cast(inputs, torch.float64), "rms_norm")
    broken = run(lambda x, w, eps: OPS["rms_norm"].fused(x, w, eps) * (1 + 1e-3), inputs, "rms_norm")
    with pytest.raises(AssertionError):
        assert_close(broken[0], exact[0], TOLERANCE[torch.float32], "rms_norm")


def test_a_huge_loss_stays_finite():
    h, weight = torch.tensor([[1.0]]), torch.tensor([[300.0], [-300.0], [0.0]])
    targets = torch.tensor([1])
    for impl in ("reference", "fused"):
        nll = getattr(OPS["linear_cross_entropy"], impl)(h.requires_grad_(), weight, targets)
        assert nll.item() == pytest.approx(600.0)


def test_latent_attention_gives_padding_no_weight():
    """Slots behind a row's position may hold anything, even after a longer row filled the batch."""
    q, q_pe, latent, hidden, scale = latent_inputs(T=1)
    for impl in ("reference", "fused"):
        attend = getattr(OPS["latent_attention"], impl)
        clean = attend(q, q_pe, latent, hidden, scale)
        dirty = latent.clone()
        dirty[0, -int(hidden[0].sum()) :] = 1e4
        torch.testing.assert_close(attend(q, q_pe, dirty, hidden, scale), clean)


def test_shapes_are_those_of_the_presets():
    from model import Config

    names = {"C": "hidden_size", "H": "num_attention_heads", "D": "qk_nope_head_dim", "P": "qk_rope_head_dim",
             "Dv": "v_head_dim", "R": "kv_lora_rank", "E": "n_routed_experts", "K": "num_experts_per_tok",
             "F": "moe_intermediate_size", "V": "vocab_size"}
    for preset, shape in kernels.SHAPES.items():
        config = Config.preset(preset)
        assert {k: v for k, v in shape.items() if k in names} == {k: getattr(config, v) for k, v in names.items()}


def test_the_table_names_every_operation_with_two_twins(capsys, monkeypatch, exit_code):
    small = dict(B=2, T=8, C=16, H=2, D=4, P=4, Dv=4, R=8, E=4, K=2, F=8, V=32)
    monkeypatch.setitem(kernels.SHAPES, "tiny", small)
    monkeypatch.setattr(kernels, "matmul_ceiling", lambda dtype: 1e11)
    for kind in ("fp32", "bf16"):
        assert exit_code(kernels.main, "tiny", kind) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split()[0] for line in lines[4:] if "one token" not in line]
        assert rows == list(OPS) and len(lines) == 5 + len(OPS)
    assert exit_code(kernels.main, "tinny") == 2 and "wanted: python kernels.py" in capsys.readouterr().err


def test_kept_bytes_are_counted():
    x = torch.randn(100, 10, requires_grad=True)
    assert kernels.measure(lambda x: x.exp(), (x,))[3] == 4000  # exp keeps its result
    assert kernels.measure(lambda x: x.square(), (x,))[3] == 0  # square its input


def test_bench_and_profile(tmp_path, capsys, monkeypatch):
    import train

    monkeypatch.setattr(train, "matmul_ceiling", lambda *_: 1e11)
    config = train.TrainConfig(out=str(tmp_path), tokens_per_step=64, seq_len=16, micro_batch=2, precision="fp32",
                               set=["hidden_size=32", "num_hidden_layers=2", "moe_intermediate_size=16"])
    train.bench(config, train.Dist(), rounds=1)
    lines = {line[:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    if "transformers" in lines:
        ours, theirs = (float(lines[name].split("first loss ")[1]) for name in ("plainseek", "transformers"))
        assert abs(ours - theirs) < 2e-3  # the same weights and batch
    train.profile(config, train.Dist())
    out = capsys.readouterr().out
    assert "Self CPU" in out and "aten::" in out  # which fifteen are the costliest depends on the machine's load
    assert '"aten::mm"' in (tmp_path / "base" / "trace.json").read_text()


def test_select_knows_two_sides():
    assert select("fused").causal_attention is OPS["causal_attention"].fused
    assert select("fused", dtype=torch.bfloat16).expert_ffn is OPS["expert_ffn"].fused
    assert select("reference").rms_norm is OPS["rms_norm"].reference
    with pytest.raises(ValueError, match="wanted 'reference' or 'fused'"):
        select("triton")


def test_triton_is_never_imported(tmp_path):
    """Even where a package of that name is installed."""
    (tmp_path / "triton.py").write_text("raise SystemExit('triton was imported')")
    code = "import sys, torch, kernels; before = set(sys.modules)\n" \
           "kernels.select('fused').rms_norm(torch.ones(2, 2, requires_grad=True), torch.ones(2), 1e-6).sum().backward()\n" \
           "assert not any(m.split('.')[0] == 'triton' for m in set(sys.modules)), 'triton'"
    path = f"import sys; sys.path[:0] = {[str(tmp_path), str(sys.path[0] or '.'), '.']!r}\n"
    result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
