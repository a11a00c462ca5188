"""The CUDA branches, on the CPU that says it is a GPU (tests/pretend.py): no mixing of devices, the numbers of the CPU,
and how often the host waits for the device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import kernels
import rl
import train
from data.io.cli import widest_float
from kernels import FUSED, REFERENCE
from model import Config, Transformer
from sample import generate
from tests import pretend
from tests.pretend import gpu, unwrapped, varlen_of_2_10, varlen_of_2_11, waits_of
from tests.test_kernels import expert_inputs
from tests.test_rl_loop import SHORT
from train import Dist, evaluate, make_optimizer, train_step

SIZES = dict(vocab_size=112, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
             num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
             qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=64)
MOE_LAYERS = 3  # one of the main model's three is dense, one is of the MTP module
STEP = dict(micro_batch=2, lr=1e-3, mtp_loss_weight=0.3, aux_loss_alpha=0.01, bias_update_speed=0.01)
GPU = Dist(device=pretend.CUDA)
BOUNDS = "a word to the host: nonzero"  # of the documents' bounds


def small_model(**changes) -> Transformer:
    """Weights large enough for a loss that is not that of chance."""
    torch.manual_seed(0)
    model = Transformer(Config.preset("tiny", **SIZES | changes))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.8 / model.config.hidden_size**0.5)
    return model


def batch(B=4, T=24):
    """Tokens of several documents in a row, and targets of which some are left out."""
    text = torch.randint(1, SIZES["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(1))
    text[1, 7] = text[2, 0] = text[3, 5] = text[3, 6] = 0  # where documents begin
    targets = text[:, 1:].clone()
    targets[0, :4] = kernels.IGNORE
    return text[:, :-1].contiguous(), targets


def losses_and_gradients(model, tokens, targets, **options) -> dict:
    losses = model(tokens, targets, **options)
    sum(losses[name] for name in losses.keys() - {"load"}).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in (losses | grads).items()}


def on_gpu(model: Transformer, **settings) -> Transformer:
    there = copy.deepcopy(model).to("cuda").train()
    for name, value in settings.items():
        setattr(there, name, value)
    there.use_kernels("fused")
    return there


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((unwrapped(got) - wanted).norm() / wanted.norm().clamp(min=1e-9))


# --------------------------------------------------------------------------------- the helper itself


def test_the_pretender_refuses_to_mix_and_says_where_it_lies():
    here = torch.ones(3)
    with gpu():
        there = torch.zeros(3, device="cuda")
        assert there.is_cuda and there.device == pretend.CUDA and not there.is_cpu and torch.cuda.is_available()
        for mixed in (lambda: here + there, lambda: torch.cat((here, there)), lambda: F.linear(here, there.view(1, 3)),
                      lambda: there.index_select(0, torch.arange(2)), lambda: here[torch.ones(3, device="cuda") > 0]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (there + torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number may lie anywhere
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
    assert not torch.cuda.is_available()


WAITS = {
    "item": lambda x: x.sum().item(), "float": lambda x: float(x[0]), "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(), "to": lambda x: x.to("cpu", torch.float64),
    "nonzero": lambda x: x.nonzero(), "where": lambda x: torch.where(x > 0), "boolean index": lambda x: x[x > 0],
    "boolean write": lambda x: x.index_put_((x > 0,), x.new_zeros(())), "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(), "repeat": lambda x: x.repeat_interleave(x.long()),
    "copy into the host's": lambda x: torch.zeros(3).copy_(x), "list": lambda x: torch.tensor([1, 2], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]), "blocking copy": lambda x: torch.zeros(3).to("cuda"),
    "index of the host": lambda x: x[torch.arange(2)], "equal": lambda x: torch.equal(x, x),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2).softmax(0).sum(), "where": lambda x: torch.where(x > 1, x, 0), "slice": lambda x: x[1:],
    "copy that need not wait": lambda x: torch.zeros(3).to("cuda", non_blocking=True), "make": lambda x: x.new_zeros(4),
    "sort": lambda x: x.sort(), "index": lambda x: x[x.long() * 0], "scatter": lambda x: x.scatter(0, x.long() * 0, x),
    "arange": lambda x: torch.arange(3, device=x.device), "dtype": lambda x: x.to(torch.float64),
    "known size": lambda x: x.repeat_interleave(x.long(), output_size=4),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_noted_with_its_line(name):
    with gpu():
        (wait,) = waits_of(WAITS[name], torch.tensor([0.0, 1.0, 3.0]).to("cuda"))
    assert wait.where.startswith("test_gpu_path.py:")


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_does_not_wait_is_not_noted(name):
    with gpu():
        assert waits_of(NO_WAITS[name], torch.tensor([0.0, 1.0, 3.0]).to("cuda")) == []


def test_a_graph_does_again_what_was_captured_and_may_not_wait():
    with gpu():
        x = torch.ones(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x * 2).view(1, 3)
        x.fill_(5.0)
        graph.replay()
        assert y.tolist() == [[10, 10, 10]]
        with pytest.raises(RuntimeError, match="stream is capturing"), torch.cuda.graph(graph):
            x.sum().item()
        assert x.sum().item() == 15


@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_a_decoded_token_can_be_captured(capability, dtype):
    """The model's part of it: what it reads and writes stays where it is."""
    from tests.bench.decode import our_step

    text = batch()[0][:, :9]
    with gpu(capability), torch.no_grad():
        model = on_gpu(small_model(), compute_dtype=dtype).eval()
        text = text.to("cuda")
        step = our_step(model, text)
        wanted, graph = step(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        logits.zero_()
        graph.replay()
        assert torch.equal(unwrapped(logits), unwrapped(wanted))


# ------------------------------------------------------------------------------ forward and backward


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_float32_has_the_numbers_of_the_cpu(isolate, recompute):
    model = small_model().train()
    model.isolate, model.recompute = isolate, recompute
    wanted = losses_and_gradients(copy.deepcopy(model), *batch())
    with gpu():
        there = copy.deepcopy(model).to("cuda")  # no more than this: the twins and angles come along
        got = losses_and_gradients(there, *(x.to("cuda") for x in batch()))
        assert there.frequencies.is_cuda and there.lm_head.ops.expert_ffn is FUSED.expert_ffn
    assert got.keys() == wanted.keys()
    assert max(off(got[name], wanted[name]) for name in got) < 5e-6


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
def test_bf16_follows_float32_and_waits_for_bounds_alone(isolate, recompute):
    """The experts are replayed, since near ties flip; MTP's would choose anew."""
    model = small_model().train()
    model.isolate = isolate
    tokens, targets = batch()
    replay = [routing.topk_idx for routing in model.trunk(tokens)[1]]
    wanted = losses_and_gradients(copy.deepcopy(model), tokens, targets, mtp=False, replay=replay)
    here = copy.deepcopy(model)
    here.compute_dtype = torch.bfloat16
    rounded = losses_and_gradients(here, tokens, targets, mtp=False, replay=replay)
    with gpu():
        there = on_gpu(model, compute_dtype=torch.bfloat16, recompute=recompute)
        tokens, targets, *replay = (x.to("cuda") for x in (tokens, targets, *replay))
        waits = waits_of(lambda: losses_and_gradients(there, tokens, targets))
        there.zero_grad()
        got = losses_and_gradients(there, tokens, targets, mtp=False, replay=replay)
    for name in got:
        assert off(got[name], wanted[name]) < 2 * max(off(rounded[name], wanted[name]), 0.005), name
    assert [wait.what for wait in waits] == ([BOUNDS] * 2 if isolate else [])  # of the main model, of the MTP module


@pytest.mark.parametrize("capability, dtype, waits", [
    ((9, 0), torch.bfloat16, 0), ((10, 0), torch.bfloat16, 0), ((8, 0), torch.bfloat16, 6), ((12, 0), torch.bfloat16, 6),
    ((9, 0), torch.float32, 6)])
def test_experts_wait_where_torch_groups_them_in_a_loop(capability, dtype, waits):
    """And the line that says at start what was forced says it."""
    with gpu(capability):
        there = on_gpu(small_model(), compute_dtype=dtype)
        tokens, targets = (x.to("cuda") for x in batch())
        assert len(waits_of(lambda: losses_and_gradients(there, tokens, targets))) == waits * MOE_LAYERS
        said = "; ".join(there.use_kernels("fused"))
    assert ("the host waits in each product of the experts" in said) == (waits > 0)


@pytest.mark.parametrize("N", [1, 40, 512])
@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_experts_of_decoded_tokens_wait_nowhere(N, capability, dtype):
    inputs = expert_inputs(N, C=32, F=16, E=8, K=3)
    inputs = [x.to(dtype) if i < 3 else x for i, x in enumerate(inputs)]
    wanted = REFERENCE.expert_ffn(*(x.double() if x.is_floating_point() else x for x in inputs))
    with gpu(capability), torch.no_grad():
        inputs = [x.to("cuda") for x in inputs]
        assert waits_of(lambda: FUSED.expert_ffn(*inputs)) == []
        assert off(FUSED.expert_ffn(*inputs).double(), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_copy_of_a_weight_is_not_kept_for_the_backward():
    kept = []
    with gpu():
        there = on_gpu(small_model(), compute_dtype=torch.bfloat16)
        tokens, targets = (x.to("cuda") for x in batch())
        shapes = {tuple(p.shape) for p in there.parameters() if p.ndim > 1}
        shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            there(tokens, targets)
        assert any(x.dtype == torch.bfloat16 for x in kept)
        assert not [x.shape for x in kept if x.dtype == torch.bfloat16 and tuple(x.shape) in shapes]


def test_logits_of_many_rows_come_in_few_large_products():
    h, weight = torch.zeros(5000, 8), torch.zeros(1024, 8)
    blocks = kernels._LinearCrossEntropy.blocks
    with gpu():
        assert len(blocks(h, weight)) == 10 and len(blocks(h.to("cuda"), weight.to("cuda"))) == 1


def test_a_mac_has_no_float64():
    assert widest_float(torch.device("mps")) == torch.float32 and widest_float(pretend.CUDA) == torch.float64


# ----------------------------------------------------------------------------------------- attention


def heads(D, P, Dv, B=2, T=40, H=2) -> tuple:
    widths = ((B, T, H, D), (B, T, H, P), (B, T, H, D), (B, T, P), (B, T, H, Dv))
    return tuple(torch.randn(shape).bfloat16() for shape in widths)


CUDNN, FLASH, EFFICIENT = (getattr(SDPBackend, f"{name}_ATTENTION").value for name in ("CUDNN", "FLASH", "EFFICIENT"))


@pytest.mark.parametrize("widths, capability, dtype, taken", [
    ((128, 64, 128), (9, 0), torch.bfloat16, (192, 128, CUDNN)),  # V3
    ((64, 32, 64), (10, 0), torch.bfloat16, (96, 64, CUDNN)),  # medium
    ((128, 64, 128), (8, 0), torch.bfloat16, (192, 192, FLASH)),
    ((160, 32, 128), (9, 0), torch.bfloat16, (192, 128, CUDNN)),
    ((128, 64, 64), (9, 0), torch.bfloat16, (192, 192, FLASH)),  # which cuDNN refuses
    ((128, 64, 128), (9, 0), torch.float32, (192, 128, EFFICIENT))])
def test_values_are_padded_for_flash_alone(widths, capability, dtype, taken):
    inputs = [x.to(dtype) for x in heads(*widths)]
    wanted = REFERENCE.causal_attention(*(x.float() for x in inputs), 0.1)
    with gpu(capability):
        got = FUSED.causal_attention(*(x.to("cuda") for x in inputs), 0.1)
        assert pretend.attended == [taken]
    assert off(got.float(), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("varlen_attn", [varlen_of_2_10, varlen_of_2_11])
@pytest.mark.parametrize("scale", [24**-0.5, 0.5])  # varlen_attn's own, and another
def test_packed_documents_are_those_of_the_mask(varlen_attn, scale):
    is_begin = torch.rand(2, 40) < 0.15
    is_begin[1] = False
    inputs = [x.requires_grad_() for x in heads(16, 8, 16)]
    mask = kernels.document_mask(is_begin)
    wanted = REFERENCE.causal_attention(*(x.float() for x in inputs), scale, mask)
    outside = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, outside)
    with gpu(varlen_attn=varlen_attn):
        leaves = [x.detach().to("cuda").requires_grad_() for x in inputs]
        bounds = kernels.document_mask(is_begin.to("cuda"), is_packed=True)
        assert bounds.dtype == torch.int32 and len(bounds) < 24
        got = FUSED.causal_attention(*leaves, scale, bounds)
        grads = torch.autograd.grad(got, leaves, outside.bfloat16().to("cuda"))
    assert pretend.attended and off(got.detach().float(), wanted.detach()) < 1e-2
    assert max(off(g.float(), w.float()) for g, w in zip(grads, gradients)) < 2e-2


def test_a_document_sees_itself_alone():
    is_begin = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    assert kernels.document_mask(is_begin, is_packed=True).tolist() == [0, 2, 4, 5, 10]
    seen = kernels.document_mask(is_begin)  # (B, T, T)
    for b, bounds in enumerate(([0, 2, 4, 5], [0, 5])):
        for first, end in zip(bounds, bounds[1:]):
            assert seen[b, first:end].sum() == sum(range(end - first + 1))
            assert seen[b, first:end, first:end].tril().equal(seen[b, first:end, first:end])


@pytest.mark.parametrize("changes, is_packed", [
    ({}, True), ({"capability": (7, 5)}, False), ({"dtype": torch.float32}, False), ({"impl": "reference"}, False),
    ({"v_head_dim": 32}, False), ({"qk_rope_head_dim": 6}, False)])
def test_bounds_are_made_once_where_varlen_attention_can_take_them(changes, is_packed):
    changes = {"capability": (9, 0), "dtype": torch.bfloat16, "impl": "fused"} | changes
    capability, dtype, impl = (changes.pop(name) for name in ("capability", "dtype", "impl"))
    with gpu(capability):
        there = on_gpu(small_model(**changes), compute_dtype=dtype, isolate=True)
        there.use_kernels(impl)
        mask = there.freqs_and_mask(batch()[0].to("cuda"))[1]
        assert mask.ndim == (1 if is_packed else 3)
    model = small_model()
    model.isolate = True
    assert model.freqs_and_mask(batch()[0])[1].shape == (4, 24, 24)


# ----------------------------------------------------------------------------------------------- fp8


needs_blocks = pytest.mark.skipif(not hasattr(F, "ScalingType"), reason="this torch knows no scaled blocks")
WIDE = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=640,
            qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=128)


@needs_blocks
def test_fp8_units_have_the_numbers_of_the_emulation(monkeypatch):
    """All widths are multiples of 128, so that every product of the three is by the units."""
    model = small_model(**WIDE)
    exact = losses_and_gradients(copy.deepcopy(model), *batch())
    model.use_kernels("fused", fp8=True)
    wanted = losses_and_gradients(copy.deepcopy(model), *batch())
    counted = []
    monkeypatch.setitem(pretend.STAND_INS, torch.ops.aten._scaled_mm_v2,
                        lambda *args: counted.append(1) or pretend.scaled_mm(*args))
    with gpu():
        there = copy.deepcopy(model).to("cuda")
        reasons = there.use_kernels("fused", fp8=True)
        assert "fp8 by F.scaled_mm" in reasons[-1] and "host waits" in reasons[-1]
        got = losses_and_gradients(there, *(x.to("cuda") for x in batch()))
    assert len(counted) > 3 * 30
    units, emulated = (sorted(off(each[name], exact[name]) for name in got) for each in (got, wanted))
    assert units[len(units) // 2] < 1.2 * emulated[len(units) // 2] and units[-1] < 1.2 * emulated[-1]
    assert off(got["ce"], wanted["ce"]) < 0.005


@needs_blocks
@pytest.mark.parametrize("M", [1, 2, 48])
@pytest.mark.parametrize("N", [128, 384, 512])  # N/128 with and without rounding up to 4
@pytest.mark.parametrize("K", [128, 512, 640])
def test_scales_lie_as_scaled_mm_wants_them_in_all_three_products(M, N, K):
    x, weight = torch.randn(M, K), torch.randn(N, K)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    outside = torch.randn(M, N)
    wanted = [y := kernels.linear_fp8(*leaves), *torch.autograd.grad(y, leaves, outside)]
    with gpu():
        leaves = [x.detach().to("cuda").requires_grad_() for x in leaves]
        got = [y := kernels.linear_fp8(*leaves, units=True), *torch.autograd.grad(y, leaves, outside.to("cuda"))]
    assert max(off(a, b.detach()) for a, b in zip(got, wanted)) < 0.005  # a result in bf16


@needs_blocks
@pytest.mark.parametrize("capability", [(8, 9), (10, 0)])
def test_fp8_is_emulated_where_there_are_no_units_for_blocks(capability):
    with gpu(capability):
        assert kernels.try_fp8_units(pretend.CUDA) == (False, "fp8 emulated: cuda here has no units for scaled FP8 blocks")
        with pytest.raises(NotImplementedError):
            kernels.linear_fp8(torch.zeros(2, 128, device="cuda"), torch.zeros(128, 128, device="cuda"), units=True)


# ------------------------------------------------------------------------------- the three programs


def trained(model: Transformer, world: Dist, steps: int = 3) -> tuple[list, list]:
    """Losses of some steps, and their waits."""
    optimizer, rows, waits = make_optimizer(model, 1e-3), [], []
    tokens, targets = (x.to(world.device) for x in batch())
    for _ in range(steps):
        waits.append(waits_of(lambda: rows.append(train_step(model, optimizer, tokens, targets, world, **STEP))))
    return rows, waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_steps_are_those_of_the_cpu(dtype):
    model = small_model().train()
    wanted, _ = trained(copy.deepcopy(model), Dist())
    with gpu():
        got, _ = trained(on_gpu(model, compute_dtype=dtype), GPU)
    for row, right in zip(got, wanted):
        for name in ("ce", "mtp", "balance", "total", "grad_norm"):
            assert row[name] == pytest.approx(right[name], rel=1e-5 if dtype == torch.float32 else 0.1)
    assert got[-1]["total"] < got[0]["total"]


def test_a_training_step_waits_once():
    with gpu():
        _, waits = trained(on_gpu(small_model(), compute_dtype=torch.bfloat16), GPU)
    assert max(map(len, waits)) <= 1, waits[-1]


def test_evaluation_is_that_of_the_cpu():
    model = small_model()
    wanted, used = evaluate(model, [batch()] * 2, Dist())
    with gpu():
        got, there = evaluate(on_gpu(model), [batch()] * 2, GPU)
    assert got == pytest.approx(wanted, rel=1e-5) and torch.equal(unwrapped(there), used)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_tokens_are_those_of_the_cpu(temperature):
    options = dict(num_samples=2, max_new_tokens=12, temperature=temperature, top_k=20, top_p=0.9, stop_ids=[3],
                   seed=1, keep_routing=True, keep_sampling_mask=True)
    model = small_model()
    wanted = generate(model, PROMPTS, **options)
    with gpu():
        got = generate(on_gpu(model), PROMPTS, **options)
        for name, x in got.tensors().items():
            assert x.is_cuda
            torch.testing.assert_close(x.cpu(), getattr(wanted, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_waits_once_in_sixteen_tokens(dtype):
    """What a prompt costs is not counted: the waits of 40 tokens are compared with those of 8."""
    with gpu():
        model = on_gpu(small_model(), compute_dtype=dtype)
        counts = [len(waits_of(generate, model, PROMPTS, max_new_tokens=n, seed=1, keep_routing=True, num_samples=2))
                  for n in (8, 40)]
    assert counts[1] - counts[0] <= 32 / 16, counts


def test_reinforcement_learning_is_that_of_the_cpu(base, tmp_path, monkeypatch):
    """Rollout, scores, loss, two updates a step, reference, evaluation, saving, and resuming from it."""
    monkeypatch.setattr(rl.plot, "draw_rl", lambda *_: None)  # seconds of drawing, tested elsewhere

    def run(device, **changes):
        world = Dist(device=torch.device(device, 0) if device == "cuda" else torch.device(device))
        knobs = SHORT | {"base": str(base), "out": str(tmp_path / device), "device": device, "updates": 2,
                         "steps": 2, "max_new_tokens": 4, "eval_every": 1, "eval_questions": 1} | changes
        trainer = rl.build_trainer(rl.RLConfig(**knobs), world)
        assert trainer.run()
        return trainer.folder.rows()

    wanted = run("cpu")
    with gpu():
        got = run("cuda")
        resumed = run("cuda", steps=3, resume=True)
    assert len(wanted) == len(got) == 2 and len(resumed) == 3
    for row, right in zip(got, wanted):
        for name in ("reward", "total", "pg", "kl", "entropy", "length", "grad_norm", "max_vio"):
            assert float(row[name]) == pytest.approx(float(right[name]), rel=1e-3, abs=1e-5), name


def test_a_whole_training_run_is_that_of_the_cpu(workplace, tmp_path, monkeypatch):
    """From the command line's knobs to the checkpoint: evaluation, saving, report."""
    monkeypatch.setattr(train.plot, "draw_training", lambda *_: None)
    argv = ["--data", str(workplace / "text"), "--steps", "2", "--tokens_per_step", "128", "--seq_len", "32", "--eval_every",
            "2", "--eval_tokens", "32", "--precision", "fp32", "--set",
            *(f"{k}={v}" for k, v in (SIZES | dict(num_hidden_layers=1)).items() if k != "vocab_size")]
    rows = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        with gpu():
            assert train.main([*argv, "--device", device, "--out", str(folder)])
        rows[device] = train.RunFolder(folder / "base").rows()
    for row, right in zip(rows["cuda"], rows["cpu"], strict=True):
        for name in ("ce", "mtp", "grad_norm"):
            assert row[name] == right[name] == "" or float(row[name]) == pytest.approx(float(right[name]), rel=1e-4)


def test_the_script_for_a_gpu_runs_in_miniature(exit_code, capsys):
    """Its parts but "small", which is "medium"'s code, with transformers beside it; and none without a GPU."""
    from tests.bench import gpu as bench

    parts = [part for part in bench.PARTS if part != "small"]
    assert exit_code(bench.main, "--pretend", "--only", *parts) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAIL"))]
    assert len(lines) > 45 and not [line for line in lines if line.startswith("FAIL")]
    for row in ("expert_ffn, bf16", "fp8 units and emulation apart", "as a graph", "medium, transformers", "rl.py", "the largest"):
        assert [line for line in lines if row in line], row


def test_the_script_for_a_gpu_says_where_there_is_none(refuses, monkeypatch):
    from tests.bench import gpu as bench

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(bench.main, "no NVIDIA GPU here")
