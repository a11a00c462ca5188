"""model.py against oracles: transformers, loops in float64, closed formulas, published figures.

Checks without arguments are run in test_pitfalls.py, beside the mistakes that they notice."""

import math
from dataclasses import asdict, fields

import checks
import pytest
import torch
from checks import ARCHITECTURES, YARN, build, close, random_text

import kernels
import model as ours
from data.io.checkpoint import config_to_hf, preset_names
from data.io.cli import UserError
from model import Cache, Config, Transformer, count_parameters, flops_per_token, rope_frequencies
from tests.conftest import refused

IMPLS = ["reference", "fused"]
TOTALS = {"v3": 671_026_419_200, "v2": 235_741_434_880, "v2-lite": 15_706_484_224,
          "moonlight": 15_960_110_208, "kimi-k2": 1_026_408_232_448}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, impl):
    checks.logits_equal_transformers(impl, T=200, **ARCHITECTURES[name])


@pytest.mark.parametrize("name", ["v3", "v3 yarn", "v3 attention bias", "v2", "v2-lite"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_equal_transformers_in_float64(name, impl):
    checks.gradients_equal_transformers(impl, **ARCHITECTURES[name])


@pytest.mark.parametrize("impl, modules", [("reference", 1), ("fused", 2)])
def test_mtp_equals_transformers_own_modules(impl, modules):
    checks.mtp_equals_transformers(impl, modules)
    checks.mtp_gradients_equal_transformers(impl, modules)


def test_mtp_after_yarn_and_in_a_model_of_dense_layers():
    checks.mtp_equals_transformers(**YARN)
    checks.mtp_equals_transformers(first_k_dense_replace=5)  # the module itself always has experts


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["v3 yarn", "v3 attention bias", "v2-lite"])
def test_absorbed_equals_expanded(name, impl):
    checks.absorbed_equals_expanded(impl, **ARCHITECTURES[name])
    checks.absorbed_equals_expanded(impl, torch.float64, **ARCHITECTURES[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 2, 4)])
def test_decoding_unequal_prompts_equals_one_pass(impl, chunks):
    checks.decoding_equals_one_pass(impl, chunks, **YARN)


def test_prefill_in_chunks_equals_one_pass():
    model = build()
    tokens, _ = random_text(model.config, T=30)
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        parts = []
        for size in (1, 12, 17):
            parts.append(model(tokens[:, cache.longest : cache.longest + size], cache=cache))
            cache.advance(size)
        close(torch.cat(parts, 1), model(tokens), checks.TOLERANCE, "chunked prefill")


def test_cache_is_exactly_the_latents():
    checks.cache_holds_latents_only(kv_lora_rank=20, qk_rope_head_dim=6, num_hidden_layers=2)
    with torch.device("meta"):
        cache = Cache(Config.preset("v3"), 1, 1000, dtype=torch.bfloat16)
    assert cache.buffer.nbytes == 1000 * 70_272  # bytes per token that DeepSeek publishes for V3


def test_cache_rows_can_be_chosen_and_repeated():
    model = build()
    tokens, _ = random_text(model.config, B=3, T=20)
    cache = model.new_cache(3, 20)
    with torch.no_grad():
        model(tokens[:, :10], cache=cache)
        cache.advance(torch.tensor([10, 4, 7]))
        chosen = cache.select(torch.tensor([1, 1, 2, 2]))
        assert chosen.length.tolist() == [4, 4, 7, 7] and chosen.longest == 7
        got = model(torch.stack([tokens[1, 4:6]] * 2 + [tokens[2, 7:9]] * 2), cache=chosen)
        whole = model(tokens)
    wanted = torch.stack([whole[1, 4:6]] * 2 + [whole[2, 7:9]] * 2)
    close(got, wanted, checks.TOLERANCE, "selected and repeated rows")
    assert cache.length.tolist() == [10, 4, 7], "a selection is a copy"


def test_the_model_never_moves_the_cache_and_some_rows_can_have_their_logits_alone():
    model = build()
    tokens, _ = random_text(model.config, T=9)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        all_logits = model(tokens, cache=cache)
        assert cache.length.tolist() == [0, 0]
        h, _ = model.trunk(tokens, cache)
        picked = model.lm_head(h[torch.arange(2), torch.tensor([8, 3])])
    close(picked, torch.stack([all_logits[0, 8], all_logits[1, 3]]), 1e-5, "picked positions")


@pytest.mark.parametrize("factor, fast, slow", [(40.0, 32.0, 1.0), (32.0, 1.0, 1.0), (4.0, 8.0, 2.0)])
def test_yarn_frequencies_follow_the_closed_formula(factor, fast, slow):
    config = Config.preset("v3", rope_factor=factor, rope_beta_fast=fast, rope_beta_slow=slow)
    if fast == slow:  # Kimi-K2: no ramp, a step between two pairs
        got = rope_frequencies(config)
        plain = rope_frequencies(Config.preset("v3", rope_factor=1.0))
        ratio = (plain / got).tolist()
        step = next(i for i, r in enumerate(ratio) if r > 1.01)
        cut = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(1e4))
        assert step == math.ceil(cut) and ratio[:step] == pytest.approx([1.0] * step)
        assert ratio[step:] == pytest.approx([factor] * (32 - step), rel=1e-5)
    else:
        wanted = checks.yarn_frequencies(64, 1e4, factor, 4096, fast, slow)
        assert rope_frequencies(config).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["v3", "v3 gates not normalised", "moonlight", "v2", "v2-lite"])
@pytest.mark.parametrize("bias_mean", [0.0, -5.0])
def test_router_follows_the_official_rule(name, bias_mean):
    for training in (False, True):
        checks.router_follows_the_official_rule(bias_mean, training, **ARCHITECTURES[name])


def test_replayed_routing_gives_the_same_pass_and_live_gates():
    model = build()
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        logits = model(tokens)
        chosen = checks.choices(model, tokens)
        assert [idx.shape for idx in chosen] == [(2, 40, 4)] * 2
        close(model(tokens, replay=chosen), logits, 1e-6, "replay of its own choice")
        other = [(idx + 1) % 16 for idx in chosen]
        assert (model(tokens, replay=other) - logits).abs().max() > 0.1
        _, routings = model.trunk(tokens, replay=other)
        assert all(torch.equal(a.topk_idx, b) for a, b in zip(routings, other))
    model(tokens, targets, replay=other, mtp=False)["ce"].backward()
    grad = model.model.layers[1].mlp.gate.weight.grad
    assert grad is not None and grad.abs().sum() > 0, "gates come from the live affinities"


def test_idle_experts_keep_the_model_finite_and_rise():
    """More experts than tokens: most get nothing, all keep a gradient (DDP needs one), the bias lifts them."""
    model = build(n_routed_experts=64, n_group=1, topk_group=1).train()
    tokens, targets = random_text(model.config, B=1, T=3)
    used = checks.training_pass(model, tokens, targets)["load"] > 0
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    before = checks.biases(model)
    checks.a_step(model, tokens, targets, micro_batch=1, speed=0.1)
    moved = checks.biases(model) - before
    assert ((~used).sum(1) > 40).all() and (moved[~used] > 0).all() and (moved[used] < 0).all()


def test_balance_of_the_model_is_the_sum_over_its_layers():
    model, caught = build(num_nextn_predict_layers=2), []
    hooks = [moe.gate.register_forward_hook(lambda _m, _i, out: caught.append(out.affinity.double()))
             for _, moe in model.moe_layers()]
    tokens, targets = random_text(model.config, T=12)
    targets[0, :5] = -100
    with torch.no_grad():
        got = model(tokens, targets)["balance"]
    for hook in hooks:
        hook.remove()
    wanted = sum(checks.naive_balance(a, 4, targets[:, 12 - a.shape[1] :] != -100).mean() for a in caught)
    assert len(caught) == 4 and got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_recomputation_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = build("fused").train()
        model.recompute = recompute
        checks.training_pass(model, *random_text(model.config))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-6, f"gradient of {name}")


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_sees_the_future(impl):
    checks.nothing_sees_the_future(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_isolated_documents_in_one_row_are_those_alone(impl):
    model = build(impl, dtype=torch.float64)
    tokens = random_text(model.config, B=1, T=40)[0].clamp(min=2)
    tokens[0, [0, 9, 23]] = model.config.bos_token_id  # three documents, the last one up to the end
    targets = tokens.roll(-1, 1)
    model.isolate = True
    packed = model(tokens, targets, reduction="none")["ce"][0]
    model.isolate = False
    open_ = model(tokens, targets, reduction="none")["ce"][0]
    for start, end in ((0, 9), (9, 23), (23, 40)):
        alone = model(tokens[:, start:end], targets[:, start:end], reduction="none")["ce"][0]
        close(packed[start:end], alone, 1e-5, "a document alone")  # angles are float32
    assert (open_ - packed)[9:].abs().max() > 1e-3  # without it, they do see each other


def test_it_learns_to_count():
    """Overfits "count up", and the greedy continuation counts by one: labels are shifted exactly once."""
    V = 24
    sizes = dict(vocab_size=V, hidden_size=48, num_hidden_layers=2)
    model = Transformer(Config.preset("tiny", **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        start = torch.randint(V, (16, 1))
        text = (start + torch.arange(9)) % V
        losses = model(text[:, :-1], text[:, 1:])
        (losses["ce"] + 0.3 * losses["mtp"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["ce"] < 0.1 and losses["mtp"] < 0.2
    text = torch.tensor([[5, 6, 7]])
    for _ in range(4):
        text = torch.cat((text, model.eval()(text)[:, -1:].argmax(-1)), 1)
    assert text[0].tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_another_dtype_or_device_chooses_the_twins_again():
    """`model.double()` of a fused model runs in float64, experts included, which its float32 twins
    cannot; back in float32 it has the fast ones."""
    model = build("fused")
    fast = kernels.expert_ffn_fused
    tokens, _ = random_text(model.config)
    assert model.ops.expert_ffn is fast
    model.compute_dtype = torch.float64
    model.double()
    assert {module.ops.expert_ffn for module in model.modules()} == {kernels.expert_ffn_reference}
    assert model.ops.linear is kernels.linear_fused, "the choice of fused twins stays"
    with torch.no_grad():
        wide = model(tokens)
        close(wide, build(dtype=torch.float64)(tokens), 1e-10, "float64")
    model.compute_dtype = torch.float32
    assert model.float().ops.expert_ffn is fast
    model.to("meta")
    assert model.ops.expert_ffn is kernels.expert_ffn_reference, "no grouped product there"
    assert model.frequencies.device.type == "meta"


def test_initialisation_is_what_it_says():
    """Every matrix N(0, initializer_range), norms one, biases zero; twice the same from one seed."""
    def make():
        torch.manual_seed(7)
        return Transformer(Config.preset("tiny", attention_bias=True, initializer_range=0.02))

    one, two = make().state_dict(), make().state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1) and abs(tensor.mean()) < 2e-3, name
        else:
            assert (tensor == (1.0 if "norm" in name else 0.0)).all(), name


@pytest.mark.parametrize("name", TOTALS)
def test_released_presets_have_the_published_counts(name):
    config = Config.preset(name)
    counts, wanted = count_parameters(config), checks.formula(config)
    assert wanted["main"] == TOTALS[name]
    assert {key: counts[key] for key in wanted} == wanted
    assert counts["total"] == wanted["main"] + wanted["mtp"]


def test_v3_figures():
    config = Config.preset("v3")
    counts = count_parameters(config)
    assert round(counts["active"] / 1e9, 1) == 36.6  # as DeepSeek's model page now says
    assert round(flops_per_token(config, 4096) / 1e9) == 250  # arXiv 2505.09343, table 2
    assert round(flops_per_token(Config.preset("v2"), 4096) / 1e9) == 155
    assert counts["mtp"] == 11_610_068_224
    assert round((counts["active"] + counts["embedding"]) / 1e9, 2) == 37.55


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(Config.preset(name), init=False)
    numbers = sum(t.numel() for t in model.state_dict().values())
    assert numbers == count_parameters(model.config)["total"]


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
def test_trainable_presets_have_every_feature_really_on(name):
    c = Config.preset(name)
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    assert c.q_lora_rank < c.hidden_size and c.kv_lora_rank < min(c.hidden_size, heads)
    assert 1 < c.topk_group < c.n_group and c.n_shared_experts and c.num_nextn_predict_layers == 1
    assert 0 < c.first_k_dense_replace < c.num_hidden_layers and c.topk_method == "noaux_tc"
    wanted = 0.5 / c.hidden_size**0.5  # V3's rule
    assert c.initializer_range == pytest.approx(wanted, rel=0.05)


CHANGED = dict(vocab_size=96, hidden_size=80, intermediate_size=100, moe_intermediate_size=24,
               num_hidden_layers=2, num_attention_heads=2, n_shared_experts=2, n_routed_experts=8,
               num_experts_per_tok=3, n_group=2, topk_group=1, first_k_dense_replace=2, norm_topk_prob=False,
               routed_scaling_factor=1.0, scoring_func="softmax", topk_method="greedy", q_lora_rank=None,
               kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
               num_nextn_predict_layers=2, attention_bias=True, max_position_embeddings=20, rms_norm_eps=0.1,
               initializer_range=0.1, rope_theta=100.0, rope_factor=2.0,
               rope_original_max_position_embeddings=256, rope_beta_fast=4.0, rope_beta_slow=0.1,
               rope_mscale=0.5, rope_mscale_all_dim=0.5, bos_token_id=3, eos_token_id=4)


@pytest.mark.parametrize("field", [field.name for field in fields(Config)])
def test_no_knob_without_an_effect(field):
    """Each field of Config changes shapes, logits, the initial weights, the limit, or the written file."""
    base = YARN | dict(num_hidden_layers=3)
    assert getattr(Config.preset("tiny", **base), field) != CHANGED[field]
    one, two = build(**base), build(**(base | {field: CHANGED[field]}))
    assert config_to_hf(asdict(one.config)) != config_to_hf(asdict(two.config))
    tokens = random_text(one.config, T=30)[0] % 96
    if field == "max_position_embeddings":
        with pytest.raises(UserError, match="20"):
            two(tokens)
    elif field == "initializer_range":
        heads = [Transformer(model.config).lm_head.weight for model in (one, two)]
        assert not torch.equal(*heads)
    elif field not in ("bos_token_id", "eos_token_id"):  # those are for whoever generates
        shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (one, two)]
        if shapes[0] == shapes[1]:
            with torch.no_grad():
                assert (one(tokens) - two(tokens)).abs().max() > 1e-3

BAD = {
    "hidden_size": 0, "num_attention_heads": -1, "qk_rope_head_dim": 15, "num_experts_per_tok": 17,
    "n_group": 3, "topk_group": 5, "scoring_func": "tanh", "topk_method": "best", "q_lora_rank": 0,
    "rope_factor": 0.5, "vocab_size": 0, "n_shared_experts": -1, "first_k_dense_replace": -2,
    "num_nextn_predict_layers": -1, "rms_norm_eps": -1e-6, "rope_theta": 0.0, "kv_lora_rank": "32",
    "routed_scaling_factor": float("nan"), "num_hidden_layers": 2.5, "norm_topk_prob": "yes",
}


@pytest.mark.parametrize("field", BAD)
def test_sizes_that_do_not_fit_are_one_line(field):
    with refused(f"{field}: got {BAD[field]!r}, wanted "):
        Config.preset("tiny", **{field: BAD[field]})


def test_combinations_that_do_not_fit():
    with pytest.raises(UserError, match="num_experts_per_tok.*topk_group"):
        Config.preset("tiny", topk_group=1, num_experts_per_tok=5)
    with pytest.raises(UserError, match="2 experts per group"):
        Config.preset("tiny", n_group=16, topk_group=8)


def test_unknown_names_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        Config.preset("tiny", hiden_size=3)
    for name, words in (("v2lite", "wanted one of .*did you mean 'v2-lite'"), ("../presets/v3", "preset")):
        with pytest.raises(UserError, match=words):
            Config.preset(name)
    with pytest.raises(Exception, match="hidden_size"):
        Config.preset("tiny").hidden_size = 3  # frozen


def test_text_that_does_not_fit():
    model = build(max_position_embeddings=32)
    tokens, _ = random_text(model.config, T=33)
    with pytest.raises(UserError, match="33 tokens, at most 32"):
        model(tokens)
    cache = model.new_cache(2, 16)
    model(tokens[:, :10], cache=cache)
    cache.advance(10)
    with pytest.raises(UserError, match=r"10 \+ 7 tokens, at most 16"):
        model(tokens[:, :7], cache=cache)
    with pytest.raises(UserError, match="targets"):
        model(tokens[:, :5], tokens[:, :4])


@pytest.mark.parametrize("argv, words", [
    (["tinny"], "did you mean 'tiny'"), (["--help-me"], "unknown flag --help-me"), (["a", "b"], "unexpected argument"),
    (["tiny", "--ranks", "3", "--expert_parallel", "2"], "a divisor of ranks = 3"),
    (["empty"], "config.json is missing")])
def test_command_line_errors_are_one_line_and_exit_2(tmp_path, monkeypatch, refuses, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refuses(ours.main, words, *argv)


def test_the_self_portrait_of_v3_has_the_published_numbers(python):
    done = python("model.py", "v3")
    assert done.returncode == 0, done.stderr
    for number in ("671,026,419,200", "70,272", "250 GFLOP", "36,625,618,432"):
        assert number in done.stdout, number


def test_the_self_portrait_knows_every_preset(capsys, exit_code):
    for name in preset_names():
        assert exit_code(ours.main, name) == 0
        assert f"{count_parameters(Config.preset(name))['main']:,}" in capsys.readouterr().out
