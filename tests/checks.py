"""What must hold of model.py, as functions that raise AssertionError when it does not.

test_pitfalls.py runs them on the model as it is, test_model.py and test_checkpoint.py in more of its forms;
test_pitfalls.py also breaks the model on purpose, one known mistake at a time, and asks the same functions to notice.
Oracles are independent of model.py: transformers'
DeepSeek classes, plain loops in float64, closed formulas."""

import copy
import math

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import (AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config,
                          DeepseekV3ForCausalLM)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import model as ours
import train
from data.io import checkpoint
from model import Config, Router, Transformer

TOLERANCE = 5e-5  # of logits in float32, whose standard deviation is about 1.5

# Changes of the preset "tiny" under which we must equal transformers.
YARN = dict(rope_factor=40.0, rope_original_max_position_embeddings=1024)
V2_GATE = dict(scoring_func="softmax", norm_topk_prob=False, num_nextn_predict_layers=0, n_shared_experts=2)
GROUPS_BY_BEST = V2_GATE | dict(topk_method="group_limited_greedy")
ARCHITECTURES = {
    "v3": {},
    "v3 yarn": YARN | dict(q_lora_rank=None),
    "v3 mscale below mscale_all_dim": YARN | dict(rope_mscale=0.5),
    "v3 without q low rank": dict(q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.3),
    "v3 attention bias": dict(attention_bias=True, v_head_dim=24, first_k_dense_replace=0),
    "v3 gates not normalised": dict(norm_topk_prob=False),
    "moonlight": dict(q_lora_rank=None, n_group=1, topk_group=1, rms_norm_eps=1e-2, rope_theta=5e4),
    "v2": YARN | GROUPS_BY_BEST | dict(routed_scaling_factor=1.6),
    "v2 attention bias": GROUPS_BY_BEST | dict(attention_bias=True),
    "v2-lite": YARN | V2_GATE | dict(topk_method="greedy", q_lora_rank=None, routed_scaling_factor=1.0,
                                     rope_mscale=0.707, rope_mscale_all_dim=0.707),
}


# ------------------------------------------------------------------------------------------- makers


@torch.no_grad()
def build(impl: str = "reference", dtype=torch.float32, seed: int = 0, **changes) -> Transformer:
    """A small model in eval mode with weights far from their initial values: norms and biases too."""
    torch.manual_seed(seed)
    sizes = dict(num_hidden_layers=3, vocab_size=256) | changes
    model = Transformer(Config.preset("tiny", **sizes), impl)
    for name, p in model.named_parameters():
        p.normal_(0.0, 0.15 if p.ndim > 1 else 0.3).add_(1.0 if "norm" in name else 0.0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
    model.compute_dtype = dtype
    return model.to(dtype).eval()


def random_text(config: Config, B: int = 2, T: int = 40, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the tokens that follow them."""
    text = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def transformers_twin(model: Transformer):
    """The model of transformers with our weights, put there by name, without going through our files."""
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor > 1:
        names = ("theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                 "mscale", "mscale_all_dim")
        rope = {name: getattr(c, f"rope_{name}") for name in names}
        rope |= {"rope_type": "yarn", "rope_theta": rope.pop("theta")}
    values = {name: getattr(c, name) for name in checkpoint.FIELDS}
    values |= dict(num_key_value_heads=c.num_attention_heads, rope_parameters=rope)
    if c.topk_method == "noaux_tc":
        twin = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    else:
        twin = DeepseekV2ForCausalLM(DeepseekV2Config(**values))
    twin = twin.to(model.lm_head.weight.dtype).eval()
    twin.set_experts_implementation("eager")  # its grouped kernel knows no float64
    extra = mtp_prefixes(c)
    main = {name: t for name, t in model.state_dict().items() if not name.startswith(extra)}
    shapes = {name: t.shape for name, t in twin.state_dict().items()}
    assert shapes == {name: t.shape for name, t in main.items()}, "names and shapes of transformers' model"
    twin.load_state_dict(main)
    return twin


def mtp_prefixes(config: Config) -> tuple[str, ...]:
    return checkpoint.mtp_prefixes(config.num_hidden_layers, config.num_nextn_predict_layers)


def close(a, b, tolerance: float, what: str) -> None:
    """The largest difference must be within `tolerance`; NaN fails."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, wanted {tuple(b.shape)}"
    off = (a - b).abs()
    place = torch.unravel_index(off.argmax(), off.shape)  # of the largest
    where = f" at {[int(i) for i in place]}: got {a[place].item():.4g}, wanted {b[place].item():.4g};" * bool(place)
    worst = off[place].item()
    assert worst <= tolerance, f"{what}: off by {worst:.2g}{where or ','} allowed {tolerance:.2g}"


def relative(a, b) -> float:
    """Norm of the difference over the norm of `b`; a gradient that is not there is a failure."""
    assert a is not None and b is not None, "no gradient"
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


# ----------------------------------------------------------------------------- against transformers


@torch.no_grad()
def logits_equal_transformers(impl="reference", T=200, **changes):
    model = build(impl, **changes)
    tokens, _ = random_text(model.config, T=T)
    logits = model(tokens)
    assert logits.std() > 0.5, "logits so small that any two models agree"
    close(logits, transformers_twin(model)(tokens).logits, TOLERANCE, "logits")


def gradients_equal_transformers(impl="reference", T=60, **changes):
    """In float64; transformers' router and angles stay in float32 there, which leaves about 1e-7."""
    model = build(impl, torch.float64, **changes)
    twin = transformers_twin(model)
    tokens, targets = random_text(model.config, T=T)
    model(tokens, targets, mtp=False)["ce"].backward()
    F.cross_entropy(twin(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    wanted = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name.startswith(mtp_prefixes(model.config)):
            assert p.grad is None, f"{name} has a gradient of the main loss"
            continue
        assert p.grad is not None, f"{name} has no gradient"
        off = relative(p.grad, wanted[name].grad)
        assert off <= 1e-5, f"gradient of {name}: relative difference {off:.2g}"


def transformers_mtp(model: Transformer, twin) -> MtpModel:
    """transformers' own MTP modules (the ones of its speculative decoding) with our weights."""
    mtp = MtpModel(twin, model.config.num_nextn_predict_layers).to(model.compute_dtype).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(mtp_prefixes(model.config)):
            _, _, layer, rest = name.split(".", 3)
            own = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
            rest = rest if rest in own else "mtp_block." + rest
            rest = rest.replace("mtp_block.shared_head.norm", "post_norm")
            state[f"layers.{int(layer) - model.config.num_hidden_layers}.{rest}"] = tensor
    missing, unexpected = mtp.load_state_dict(state, strict=False)
    assert set(missing) == {"embed_tokens.weight", "shared_head.weight"} and not unexpected
    return mtp


def mtp_nll_of_transformers(mtp: MtpModel, h, tokens, targets) -> list[torch.Tensor]:
    """Per module k the losses (B, T-k) of token i+k+1 from the state of depth k-1 and token i+k."""
    nlls = []
    for k in range(1, mtp.num_mtp_layers + 1):
        ids = tokens[:, k:]
        positions = torch.arange(k, k + ids.shape[1]).unsqueeze(0)
        h = mtp.forward_layer(k - 1, h[:, : ids.shape[1]], positions, MtpCache(config=mtp.config), input_ids=ids)
        nlls.append(F.cross_entropy(mtp._project_to_logits(h).mT, targets[:, k:], reduction="none"))
    return nlls


def mtp_equals_transformers(impl="reference", modules=1, T=40, **changes):
    """The MTP loss, its mean over modules, and where targets are left out; float64."""
    model = build(impl, torch.float64, num_nextn_predict_layers=modules, **changes)
    twin = transformers_twin(model)
    tokens, targets = random_text(model.config, T=T)
    targets[0, :9] = -100
    targets[1, 30:] = -100
    with torch.no_grad():
        h = twin.model(tokens).last_hidden_state
        nlls = mtp_nll_of_transformers(transformers_mtp(model, twin), h, tokens, targets)
        means = [nll.sum() / (targets[:, k:] != -100).sum() for k, nll in enumerate(nlls, 1)]
        wanted = torch.stack(means).mean()
        got = model(tokens, targets)["mtp"]
    close(got, wanted, 1e-6, "MTP loss")


def mtp_gradients_equal_transformers(impl="reference", modules=2, T=24):
    """Through the modules into the main model, embedding and head included."""
    model = build(impl, torch.float64, num_nextn_predict_layers=modules)
    twin = transformers_twin(model)
    mtp = transformers_mtp(model, twin)
    tokens, targets = random_text(model.config, T=T)
    model(tokens, targets)["mtp"].backward()
    nlls = mtp_nll_of_transformers(mtp, twin.model(tokens).last_hidden_state, tokens, targets)
    torch.stack([nll.mean() for nll in nlls]).mean().backward()
    pairs = [(p, twin.get_parameter(name)) for name, p in model.named_parameters()
             if not name.startswith(mtp_prefixes(model.config))]
    for k in range(modules):
        mine, theirs = model.model.layers[model.config.num_hidden_layers + k], mtp.layers[k]
        pairs += [(mine.get_parameter(name), theirs.get_parameter(name))
                  for name in ("eh_proj.weight", "enorm.weight", "hnorm.weight")]
        pairs += [(mine.mlp.experts.down_proj, theirs.mtp_block.mlp.experts.down_proj)]
    worst = max(relative(a.grad, b.grad) for a, b in pairs)
    assert worst <= 1e-5, f"gradients of the MTP loss: relative difference {worst:.2g}"


# --------------------------------------------------------------------------------- attention, cache


@torch.no_grad()
def absorbed_equals_expanded(impl="reference", dtype=torch.float32, **changes):
    """The two ways through attention, on the same queries and latents."""
    model = build(impl, dtype, **changes)
    attention = model.model.layers[0].self_attn
    tokens, _ = random_text(model.config, T=50)
    freqs_cis, _ = model.freqs_and_mask(tokens)
    mask = torch.ones(2, 50, 50, dtype=torch.bool).tril()
    h = torch.randn(2, 50, model.config.hidden_size, dtype=dtype)
    inputs = (*attention.queries(h, freqs_cis), attention.latents(h, freqs_cis))
    absorbed = attention.absorbed(*inputs, mask)
    assert absorbed.std() > 0.1
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-12
    close(attention.expanded(*inputs, mask), attention.expanded(*inputs, None), tolerance, "mask")
    close(absorbed, attention.expanded(*inputs, None), tolerance, "absorbed against expanded")


@torch.no_grad()
def decoding_equals_one_pass(impl="reference", chunks=(1,) * 12, **changes):
    """Prompts of unequal length, right-padded, then tokens in `chunks`: the logits of one pass per row."""
    model = build(impl, **changes)
    tokens, _ = random_text(model.config, B=3, T=40)
    lengths = torch.tensor([20, 7, 13])
    whole = [model(row.unsqueeze(0))[0] for row in tokens]
    cache = model.new_cache(3, 20 + sum(chunks))
    prompt = tokens[:, :20].masked_fill(torch.arange(20) >= lengths[:, None], 5)  # like any token
    last = model(prompt, cache=cache)[torch.arange(3), lengths - 1]
    wanted = torch.stack([whole[b][n - 1] for b, n in enumerate(lengths)])
    close(last, wanted, TOLERANCE, "prompt")
    cache.advance(lengths)
    for size in chunks:
        here = torch.stack([tokens[b, n : n + size] for b, n in enumerate(cache.length)])
        wanted = torch.stack([whole[b][n : n + size] for b, n in enumerate(cache.length)])
        close(model(here, cache=cache), wanted, TOLERANCE, f"after {cache.length.tolist()}")
        cache.advance(size)


@torch.no_grad()
def cache_holds_latents_only(**changes):
    """(kv_lora_rank + qk_rope_head_dim) x layers x tokens numbers: all that decoding needs."""
    model = build(**changes)
    c = model.config
    cache = model.new_cache(2, 30)
    model(random_text(c, T=30)[0], cache=cache)
    tensors = [value for value in vars(cache).values() if torch.is_tensor(value)]
    numbers = sum(t.numel() for t in tensors if t.is_floating_point())
    assert numbers == (c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers * 2 * 30
    assert cache.buffer.shape[:3] == (c.num_hidden_layers, 2, 30)
    c_kv, k_pe = cache.buffer.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    assert c_kv.abs().amin(dim=(1, 2, 3)).min() > 0 and k_pe.abs().sum() > 0


# ------------------------------------------------------------------------------------------- router


def official_choice(config: Config, affinity: list[float], bias: list[float]) -> set[int]:
    """The rule of DeepSeek's inference code for one token, in plain Python."""
    scores = [s + b for s, b in zip(affinity, bias)]
    width = config.n_routed_experts // config.n_group
    groups = [sorted(scores[g * width : (g + 1) * width]) for g in range(config.n_group)]
    worth = [sum(g[-2:]) if config.topk_method == "noaux_tc" else g[-1] for g in groups]
    best = sorted(range(config.n_group), key=lambda g: -worth[g])[: config.topk_group]
    allowed = range(len(scores))
    if config.topk_method != "greedy" and config.n_group > 1:
        allowed = [i for i in allowed if i // width in best]
    return set(sorted(allowed, key=lambda i: -scores[i])[: config.num_experts_per_tok])


@torch.no_grad()
def router_follows_the_official_rule(bias_mean=0.0, training=False, **changes):
    """Choice, gates and affinities of single tokens; `bias_mean` -5 makes every score negative."""
    model = build(dtype=torch.float64, **changes).train(training)
    c, router = model.config, model.model.layers[-1].mlp.gate
    is_v3 = c.topk_method == "noaux_tc"
    if is_v3:
        router.e_score_correction_bias += bias_mean
    u = torch.randn(1, 60, c.hidden_size, dtype=torch.float64)
    routing = router(u)
    logits = (u[0] @ router.weight.T).tolist()
    for token, row in enumerate(logits):
        if c.scoring_func == "sigmoid":
            s = [1 / (1 + math.exp(-x)) for x in row]
        else:
            s = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        bias = router.e_score_correction_bias.tolist() if is_v3 else [0.0] * len(s)
        chosen = official_choice(c, s, bias)
        got = routing.topk_idx[0, token].tolist()
        assert set(got) == chosen, f"token {token}: experts {sorted(got)}, wanted {sorted(chosen)}"
        total = sum(s[i] for i in chosen) if c.norm_topk_prob else 1.0
        for expert, gate in zip(got, routing.gates[0, token].tolist()):
            assert abs(gate - s[expert] / total * c.routed_scaling_factor) < 1e-12, "gates"
    if c.norm_topk_prob:
        wanted = torch.full((1, 60), c.routed_scaling_factor).double()
        close(routing.gates.sum(-1), wanted, 1e-12, "sum of gates")


@torch.no_grad()
def choices(model: Transformer, tokens) -> list[torch.Tensor]:
    """The experts (B, T, K) in each MoE layer of the main model."""
    return [routing.topk_idx for routing in model.trunk(tokens)[1]]


@torch.no_grad()
def training_and_evaluation_route_alike():
    model = build()
    tokens, _ = random_text(model.config)
    seen = []
    for mode in (True, False):
        model.train(mode)
        seen.append((model(tokens), [idx.sort(-1).values for idx in choices(model, tokens)]))
    assert len(seen[0][1]) == 2
    for a, b in zip(seen[0][1], seen[1][1]):
        assert torch.equal(a, b), "train() and eval() choose different experts"
    close(seen[0][0], seen[1][0], 0.0, "logits of train() and eval()")


@torch.no_grad()
def router_stays_in_float32():
    """With bf16 activations the affinities must still be float32: near ties flip in bf16."""
    model = build()
    model.compute_dtype = torch.bfloat16
    router = model.model.layers[-1].mlp.gate
    u = torch.randn(2, 30, model.config.hidden_size).bfloat16()
    routing = router(u)
    assert routing.affinity.dtype == torch.float32 and routing.gates.dtype == torch.float32
    wanted = (u.double() @ router.weight.double().T).sigmoid().float()
    close(routing.affinity, wanted, 1e-6, "affinities of bf16 activations")


# ------------------------------------------------------------------------------------ load and bias


def training_pass(model: Transformer, tokens, targets) -> dict[str, torch.Tensor]:
    losses = model(tokens, targets)
    (losses["ce"] + 0.3 * losses["mtp"] + losses["balance"]).backward()
    return losses


def a_step(model: Transformer, tokens, targets, micro_batch: int, speed=0.01) -> torch.Tensor:
    """The load (MoE layers, E) of one step of train.py that leaves all weights but moves the biases."""
    optimizer = train.make_optimizer(model, lr=0.0)
    knobs = dict(lr=0.0, mtp_loss_weight=0.3, aux_loss_alpha=0.1, bias_update_speed=speed)
    return train.train_step(model, optimizer, tokens, targets, train.Dist(), micro_batch=micro_batch, **knobs)["load"]


def biases(model: Transformer) -> torch.Tensor:
    """(MoE layers, E), a copy."""
    return torch.stack([moe.gate.e_score_correction_bias.detach() for _, moe in model.moe_layers()])


@torch.no_grad()
def load_by_hand(model: Transformer, tokens, targets) -> torch.Tensor:
    """(MoE layers, E) from what the routers choose in one plain pass of a copy of the model."""
    model, chosen = copy.deepcopy(model).eval(), []
    for _, moe in model.moe_layers():
        moe.gate.register_forward_hook(lambda _m, _i, routing: chosen.append(routing.topk_idx))
    model(tokens, targets)
    E, T = model.config.n_routed_experts, tokens.shape[1]
    counted = [idx[targets[:, T - idx.shape[1] :] != -100].flatten() for idx in chosen]
    return torch.stack([torch.bincount(idx, minlength=E) for idx in counted]).float()


def load_is_of_tokens_with_a_target():
    """Every token with a target counts once in each of K experts; positions without one do not."""
    model = build(num_nextn_predict_layers=2).train()
    tokens, targets = random_text(model.config, B=3)
    targets[0, :11] = -100
    targets[2] = -100
    load = model(tokens, targets)["load"]
    assert load.shape == (4, 16) and load.dtype == torch.float32 and not load.requires_grad
    K, L = model.config.num_experts_per_tok, model.config.num_hidden_layers
    layers = [int(name.split(".")[2]) for name, _ in model.moe_layers()]
    wanted = [K * (targets[:, max(0, layer - L + 1) :] != -100).sum() for layer in layers]
    assert load.sum(1).tolist() == wanted, "every token with a target goes to K experts"
    assert torch.equal(load, load_by_hand(model, tokens, targets))


def nothing_but_training_moves_the_bias(recompute=False, disturbed=False):
    """Each of three steps moves it by its own tokens, counted by hand; what else the model is asked
    between the steps, or computes twice within one, does not count."""
    model = build().train()
    model.recompute = recompute
    for step in range(3):
        tokens, targets = random_text(model.config, B=4, T=20, seed=step)
        before, by_hand = biases(model), load_by_hand(model, tokens, targets)
        if disturbed:
            other = random_text(model.config, B=4, T=20, seed=7)
            train.evaluate(model, [other], train.Dist())
            training_pass(model.eval(), *other)  # with gradients, in eval mode
            with torch.no_grad():
                model(other[0], cache=model.new_cache(4, 20))
            model.train().zero_grad()
        assert torch.equal(biases(model), before), "the bias moved outside a step"
        load = a_step(model, tokens, targets, micro_batch=2)
        assert torch.equal(load, by_hand), "load"
        moved = 0.01 * torch.sign(by_hand.mean(1, keepdim=True) - by_hand)
        close(biases(model), before + moved, 1e-6, "bias")


def micro_batches_give_the_bias_of_one_batch():
    tokens, targets = random_text(Config.preset("tiny", vocab_size=256), B=8, T=12)
    targets[1, :7] = -100
    models = [build().train() for _ in range(2)]
    loads = [a_step(model, tokens, targets, size) for model, size in zip(models, (8, 2))]
    assert torch.equal(*loads), "load"
    assert torch.equal(*map(biases, models)), "the bias depends on the micro-batch size"


@torch.no_grad()
def bias_moves_by_the_sign_of_the_load(speed=0.001):
    """`b += speed * sign(mean - load)`: idle up, overloaded down, at the mean not at all, far from 0 as well."""
    sizes = dict(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)
    router = Router(Config.preset("tiny", **sizes))
    router.e_score_correction_bias.fill_(5.0)
    router.update_bias(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 2.5]), speed)
    wanted = 5.0 + speed * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0])
    close(router.e_score_correction_bias, wanted, 1e-6, "updated bias")
    before = router.e_score_correction_bias.clone()
    router.update_bias(torch.zeros(8), speed)  # nothing was routed: all at the mean
    assert torch.equal(router.e_score_correction_bias, before)


def bias_is_state_and_not_a_weight():
    """There at every width, float32, saved, without gradient."""
    model = build()
    names = [f"{name}.gate.e_score_correction_bias" for name, _ in model.moe_layers()]
    assert len(names) == 3 and set(names) <= set(model.state_dict())
    assert not set(names) & {name for name, _ in model.named_parameters()}
    assert all(model.get_buffer(name).dtype == torch.float32 for name in names)
    training_pass(model.train(), *random_text(model.config))
    assert all(not model.get_buffer(name).requires_grad for name in names)


def load_evens_out(steps=60, speed=0.03):
    """From a skewed start the fullest expert must lose load, in every layer: the effect, not the movement."""
    model = build("fused").train()
    with torch.no_grad():
        for _, moe in model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(torch.linspace(0.4, -0.4, 16))
            moe.gate.weight.mul_(0.3)
    tokens, targets = random_text(model.config, B=4, T=32)
    loads = []
    for _ in range(steps):
        with torch.no_grad():
            load = model(tokens, targets)["load"]
        loads.append((load.amax(1) / load.mean(1)).tolist())
        train.update_biases(model, load, speed)
    assert min(loads[0]) > 3, "the start is skewed"
    for first, last in zip(loads[0], loads[-1]):
        assert last < 1 + 0.4 * (first - 1), f"max/mean load went from {first:.2f} to {last:.2f}"


# ------------------------------------------------------------------------------------- balance loss


def naive_balance(affinity, K: int, mask) -> torch.Tensor:
    """V3 eqs 17-20 for each sequence, by loops over tokens and experts."""
    B, T, E = affinity.shape
    out = []
    for b in range(B):
        rows = [affinity[b, t] for t in range(T) if mask[b, t]]
        loss = torch.zeros((), dtype=affinity.dtype)
        for i in range(E):
            f = sum(1.0 for s in rows if i in s.topk(K).indices.tolist()) * E / (K * len(rows))
            P = sum(s[i] / s.sum() for s in rows) / len(rows)
            loss = loss + f * P
        out.append(loss)
    return torch.stack(out)


def balance_loss_equals_the_loops():
    """Value, gradient, masked tokens; of the affinities, whatever was chosen."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4:] = False
    chosen = torch.zeros(3, 9, 2, dtype=torch.int64)
    routing = ours.Routing(chosen, torch.ones(3, 9, 2), logits.sigmoid())
    got = ours.balance_loss(routing, mask)
    wanted = naive_balance(logits.sigmoid(), 2, mask)
    close(got, wanted, 1e-12, "balance loss")
    assert got.requires_grad, "the balance loss has no gradient"
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    grads = [torch.autograd.grad((loss * weight).sum(), logits, retain_graph=True)[0] for loss in (got, wanted)]
    assert grads[1].abs().max() > 1e-4
    close(grads[0], grads[1], 1e-12, "gradient of the balance loss")


def balance_loss_sees_each_sequence():
    """Two sequences, each on its own half of the experts: flat together, and still punished."""
    affinity = torch.full((2, 8, 8), 0.01)
    affinity[0, :, :4] = 0.9
    affinity[1, :, 4:] = 0.9
    flat = ours.Routing(torch.zeros(2, 8, 4, dtype=torch.int64), torch.ones(2, 8, 4), affinity)
    loss = ours.balance_loss(flat, torch.ones(2, 8, dtype=torch.bool))
    assert loss.min() > 1.9, f"skewed sequences cost {loss.tolist()}, wanted nearly 2 (uniform: 1)"


def balance_loss_reaches_the_router():
    """The summed loss of the model moves every router's weight, the MTP module's too."""
    model = build().train()
    losses = model(*random_text(model.config))
    for name in ("ce", "mtp", "balance"):
        assert losses[name].requires_grad, f"{name} has no gradient"
    losses["balance"].backward()
    for name, moe in model.moe_layers():
        assert moe.gate.weight.grad is not None and moe.gate.weight.grad.abs().sum() > 0, name


# ----------------------------------------------------------------------------------- what is causal


def losses_per_position(model: Transformer, tokens, targets) -> list[torch.Tensor]:
    """ce (B, T) and, per MTP module, its losses (B, T-k), caught where the model computes them."""
    caught, original = [], model._nll
    model._nll = lambda h, wanted: caught.append(original(h, wanted)) or caught[-1]
    try:
        model(tokens, targets)
    finally:
        del model._nll
    return caught


@torch.no_grad()
def nothing_sees_the_future(impl="reference", **changes):
    """Change token t: logits before t stay, and so do MTP losses whose inputs end before t."""
    model = build(impl, num_nextn_predict_layers=2, **changes)
    tokens, targets = random_text(model.config, B=2, T=24)
    fixed = targets.clone()
    base, base_losses = model(tokens), losses_per_position(model, tokens, fixed)
    assert len(base_losses) == 3
    for t in (1, 9, 17, 23):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1 + t) % model.config.vocab_size
        moved = model(other)
        close(moved[:, :t], base[:, :t], 1e-5, f"logits before token {t}")
        assert (moved[:, t] - base[:, t]).abs().max() > 1e-3
        for k, (a, b) in enumerate(zip(losses_per_position(model, other, fixed), base_losses)):
            first = max(0, t - k)  # module k reads tokens up to i+k
            if first:
                close(a[:, :first], b[:, :first], 1e-5, f"losses of depth {k} before token {t}")
            assert (a[:, first] - b[:, first]).abs().max() > 1e-4, f"depth {k} does not read token {t}"


def rows_do_not_touch(**changes):
    """The logits of a row are those of the row alone: no capacity shared between sequences."""
    model = build(**changes)
    tokens, _ = random_text(model.config, B=4, T=16)
    with torch.no_grad():
        together = model(tokens)
        for b in range(4):
            close(together[b : b + 1], model(tokens[b : b + 1]), 1e-5, f"row {b} alone")


def random_tokens_stay_at_ln_vocab(steps=60, V=32):
    """Nothing can be learned from fresh random tokens, so a loss below ln V has seen its answer."""
    sizes = dict(vocab_size=V, hidden_size=48, num_hidden_layers=2)
    model = Transformer(Config.preset("tiny", **sizes), "fused").train()
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(steps):
        losses = model(*random_text(model.config, B=16, T=24, seed=step))
        (losses["ce"] + losses["mtp"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((losses["ce"].item(), losses["mtp"].item()))
        means = torch.tensor(found[-15:]).mean(0).tolist()
        if step >= 14 and min(means) < math.log(V) - 0.03:
            break  # it has been seen
    for name, mean in zip(("ce", "mtp"), means):
        what = f"{name} is {mean:.3f}, ln {V} = {math.log(V):.3f}"
        assert math.log(V) - 0.03 < mean < math.log(V) + 0.15, what


# ------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def cross_entropy_is_of_the_given_targets():
    """`ce` is the mean of -log softmax(logits)[target] with targets as given: no shift inside."""
    model = build(dtype=torch.float64)
    tokens, targets = random_text(model.config)
    targets[1, 5:20] = -100
    wanted = F.cross_entropy(model(tokens).mT, targets, reduction="none")
    close(model(tokens, targets, reduction="none", mtp=False)["ce"], wanted, 1e-10, "nll per token")
    losses, sums = model(tokens, targets), model(tokens, targets, reduction="sum")
    close(losses["ce"], wanted.sum() / (targets != -100).sum(), 1e-10, "mean")
    close(sums["ce"], wanted.sum(), 1e-8, "sum")
    close(sums["mtp"] / (targets[:, 1:] != -100).sum(), losses["mtp"], 1e-10, "MTP sum")
    close(sums["balance"] / 2, losses["balance"], 1e-10, "balance sum")
    unknown = model(tokens, torch.full_like(targets, -100))
    assert unknown["ce"] == 0 and unknown["mtp"] == 0, "no target, no loss (and no NaN)"


@torch.no_grad()
def head_is_not_the_embedding():
    """A new embedding for a token that is not in the text changes no logit."""
    model = build()
    tokens = torch.arange(20).unsqueeze(0)
    before = model(tokens)
    model.model.embed_tokens.weight[100] += 1.0
    close(model(tokens), before, 0.0, "logits after an unseen token's embedding changed")


# -------------------------------------------------------------------------------------- checkpoints


def transformers_loads_it(directory, model: Transformer):
    """AutoModelForCausalLM finds every tensor it wants and gives the same logits."""
    twin, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    known = mtp_prefixes(model.config)
    extra = [name for name in info["unexpected_keys"] if not name.startswith(known)]
    assert not info["missing_keys"] and not info["mismatched_keys"] and not extra, info
    tokens, _ = random_text(model.config, T=64)
    with torch.no_grad():
        close(twin.eval()(tokens).logits, model.eval()(tokens), TOLERANCE, "logits of the saved model")
    return twin


def transformers_loads_the_mtp_layer(directory, model: Transformer):
    """Its MTP loader wants the released names: layer num_hidden_layers, enorm, hnorm and so on."""
    twin = transformers_loads_it(directory, model)
    layer = model.config.num_hidden_layers
    twin._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*"]
    try:
        mtp = MtpModel.from_pretrained(twin).eval()
    except RuntimeError as error:
        raise AssertionError(f"transformers cannot load the MTP layer: {error}") from None
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        h = twin.model(tokens).last_hidden_state
        wanted = mtp_nll_of_transformers(mtp, h, tokens, targets)[0].mean()
        close(model(tokens, targets)["mtp"], wanted, TOLERANCE, "MTP loss of the saved model")


def saved_bits_are_the_weights(directory):
    """Save, load, compare every tensor bit by bit."""
    model = build(num_nextn_predict_layers=2)
    model.save_pretrained(directory)
    again = Transformer.from_pretrained(directory, impl="reference")
    assert again.config == model.config
    state, wanted = again.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        for a, b in zip(model(tokens, targets).values(), again.eval()(tokens, targets).values()):
            assert torch.equal(a, b)


def bf16_checkpoint_keeps_the_bias_wide(directory):
    """Weights in bf16, routing bias in float32: in memory, on disk, and it still moves by 0.001 near 5."""
    model = build()
    for _, moe in model.moe_layers():
        moe.gate.e_score_correction_bias.add_(5.0)
    wanted = dict(zip([name for name, _ in model.moe_layers()], biases(model)))
    model.save_pretrained(directory / "a")
    narrow = Transformer.from_pretrained(directory / "a", dtype=torch.bfloat16)
    narrow.save_pretrained(directory / "b")
    with safe_open(directory / "b" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
        for name in wanted:
            saved = file.get_tensor(f"{name}.gate.e_score_correction_bias")
            assert saved.dtype == torch.float32 and torch.equal(saved, wanted[name]), name


# ------------------------------------------------------------------------------------------- counts


def formula(c: Config) -> dict[str, int]:
    """Parameters by the counting rules of the papers; `active` leaves out the input embedding."""
    d, H, R, nope, rope = (c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim)
    q = d * H * (nope + rope)
    if c.q_lora_rank:
        q = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * H * (nope + rope)
    attention = q + d * (R + rope) + R + R * H * (nope + c.v_head_dim) + H * c.v_head_dim * d
    E, dense, shared = c.n_routed_experts, c.first_k_dense_replace, c.n_shared_experts
    router = E * d + (E if c.topk_method == "noaux_tc" else 0)
    moe, used = (3 * d * c.moe_intermediate_size * (n + shared) + router for n in (E, c.num_experts_per_tok))
    common = c.num_hidden_layers * (attention + 2 * d) + d + dense * 3 * d * c.intermediate_size
    head, sparse = c.vocab_size * d, c.num_hidden_layers - dense
    mtp = c.num_nextn_predict_layers * (attention + 2 * d + moe + 2 * d * d + 3 * d)
    return {"main": 2 * head + common + sparse * moe, "mtp": mtp,
            "active": head + common + sparse * used, "embedding": head}


def yarn_frequencies(P, theta, s, length, fast, slow) -> list[float]:
    """V3 section 4.3 pair by pair, in Python floats."""
    def dim(turns):
        return P * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dim(fast)), 0), min(math.ceil(dim(slow)), P - 1)
    out = []
    for i in range(P // 2):
        f = theta ** (-2 * i / P)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(f / s * ramp + f * (1 - ramp))
    return out
