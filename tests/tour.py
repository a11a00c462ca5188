"""One sentence through the model: every tensor with its name in V3's report, shape, first numbers, equation and line.

    python -m tests.tour "4-6+3*7=" --layer 3 --token 5 [--checkpoint out/rl]     or "Once upon a time" --no-chat
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.io.cli import Knobs, UserError, knob, parse_flags, run_main
from data.io.portrait import cache_numbers
from data.io.run import newest_run
from data.text.chat import encode_prompt
from data.text.tokenizer import check_belongs, load_tokenizer
from model import MTP, Attention, Cache, Config, MoE, Router, Transformer


@dataclass
class TourConfig(Knobs):
    text: str = knob("4-6+3*7=", "the sentence", positional=True)
    checkpoint: str | None = knob(None, "directory with config.json and weights [the newest below out/]")
    chat: bool = knob(True, "as a question in the chat template")
    layer: int | None = knob(None, "which layer, from 0 on [the first one with experts]", least=0)
    token: int | None = knob(None, "which token, from 0 on [the last]", least=0)


def row(symbol: str, tensor: torch.Tensor, equation: str, function, token: int) -> None:
    """The paper's symbol, the shape, the first numbers at the token, the equation, the function and its line."""
    numbers = " ".join(f"{x:7.3f}" for x in tensor[0, token].flatten()[:4].tolist())
    where = f"{Path(function.__code__.co_filename).name}:{function.__code__.co_firstlineno}"
    print(f"  {symbol:7} {str(tuple(tensor.shape)):16} {numbers} ..  {equation:9}  {function.__qualname__}  {where}")


def best(shares: torch.Tensor, word, count: int) -> str:
    """The largest of some shares (n,), each with the word of its index."""
    top = shares.topk(min(count, len(shares)))
    return "  ".join(f"{word(i)!r} {p:.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist()))


def show_attention(attention: Attention, seen: dict, angles_and_mask: tuple, token: int, words: list[str]) -> None:
    """Queries, what is cached, what every head makes of it, and where it looks."""
    (freqs_cis, mask), config, u = angles_and_mask, attention.config, seen["input_layernorm"]
    q = attention.queries(u, freqs_cis)  # (1, T, H, D), (1, T, H, P)
    c_kv, k_pe = attention.latents(u, freqs_cis).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
    kv = seen["self_attn.kv_b_proj"].unflatten(-1, (config.num_attention_heads, -1))  # (1, T, H, D+Dv)
    k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), -1)
    attend = lambda values: attention.ops.causal_attention(*q, k_nope, k_pe, values, attention.scale, mask)
    c_q = seen.get("self_attn.q_a_layernorm")  # none without low-rank queries
    for symbol, tensor, equation, function in (*([("c^Q", c_q, 6, "queries")] if c_q is not None else []),
            ("q^C", q[0], 7, "queries"), ("q^R", q[1], 8, "queries"), ("c^KV", c_kv, 1, "latents"),
            ("k^R", k_pe, 3, "latents"), ("k^C", k_nope, 2, "expanded"), ("v^C", v, 5, "expanded"),
            ("o", attend(v), 10, "expanded"), ("u", seen["self_attn"], 11, "forward")):
        row(symbol, tensor, f"eq {equation}", getattr(Attention, function), token)
    one_hot = torch.eye(len(words))[None, :, None].expand(-1, -1, v.shape[2], -1)  # as values: the weights come out
    print(f"  where token {token} looks, a block per token, the last 64 (the softmax of eq 10):")
    for head, share in enumerate(attend(one_hot)[0, token, :, : token + 1]):
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * x)] for x in share[-64:].tolist())
        print(f"    head {head} |{bars}|  {best(share, words.__getitem__, 3)}")


def show_experts(moe: MoE, seen: dict, token: int) -> None:
    """Affinities, groups, bias, gates, and what the experts add."""
    routing, config = seen["mlp.gate"], moe.gate.config
    s, b = routing.affinity[0, token], getattr(moe.gate, "e_score_correction_bias", torch.zeros(config.n_routed_experts))
    row("s", routing.affinity, "eq 15", Router.forward, token)
    groups, count = (s + b).view(config.n_group, -1), 2 if config.topk_method == "noaux_tc" else 1
    worth = " ".join(f"{x:.3f}" for x in groups.topk(count).values.sum(-1).tolist())
    print(f"  groups of {groups.shape[1]} experts, by the best {count} of s + bias: {worth}  {Router.choose.__qualname__}")
    for gate, e in sorted(zip(routing.gates[0, token].tolist(), routing.topk_idx[0, token].tolist()), reverse=True):
        print(f"    expert {e:3} of group {e // groups.shape[1]}: s {s[e]:.3f}, bias {b[e]:+.3f}, gate {gate:.3f}  eqs 13-16")
    for name in [name for name in ("experts", "shared_experts") if f"mlp.{name}" in seen]:
        row(name.removesuffix("_experts"), seen[f"mlp.{name}"], "eq 12", MoE.forward, token)


@torch.no_grad()
def main(argv: list[str]) -> None:
    knobs = parse_flags(TourConfig, argv, __doc__)
    if name := knobs.checkpoint or (any(Path("out").rglob("model*.safetensors")) and newest_run()):
        model, tokenizer = Transformer.from_pretrained(name, "reference").eval(), load_tokenizer(name)
        check_belongs(tokenizer, model.config)
    else:
        torch.manual_seed(0)
        name = "RANDOM weights (nothing below out/ yet: python train.py)"
        model, tokenizer = Transformer(Config.preset("tiny"), "reference").eval(), load_tokenizer("plainseek:1024")
    config, ids = model.config, encode_prompt(tokenizer, knobs.text, knobs.chat)
    words, tokens = [tokenizer.decode([i]) for i in ids], torch.tensor([ids])  # (1, T)
    token = len(ids) - 1 if knobs.token is None else knobs.token
    layer = min(config.first_k_dense_replace, config.num_hidden_layers - 1) if knobs.layer is None else knobs.layer
    for key, got, limit in (("token", token, len(ids)), ("layer", layer, config.num_hidden_layers)):
        if got >= limit:
            raise UserError(f"{key}: got {got}, wanted 0 to {limit - 1}")
    block, seen, cache = model.model.layers[layer], {}, model.new_cache(1, len(ids))
    for path, module in block.named_modules():
        module.register_forward_hook(lambda _m, _i, out, path=path: seen.update({path: out}))
    h, _ = model.trunk(tokens, cache)  # (1, T, C)
    print(f"{name}, layer {layer} of {config.num_hidden_layers}, token {token} of {len(ids)}: {' '.join(map(repr, words))}\n")
    row("h", model.model.embed_tokens(tokens), "", Transformer.trunk, token)
    print(f"attention of layer {layer}")
    show_attention(block.self_attn, seen, model.freqs_and_mask(tokens), token, words)
    added, mha = cache.buffer[:, 0, token], cache_numbers(asdict(config))["MHA"]  # (L, R+P)
    print(f"  its latents, {added.numel()} numbers in all layers, {added.nbytes:,} bytes, go into the cache; "
          f"MHA of these heads: {mha} numbers, {mha / added.numel():.1f} times  {Cache.write.__qualname__}")
    print(f"feed-forward of layer {layer}")
    row("u'", seen["post_attention_layernorm"], "", type(block).forward, token)
    if block.is_moe:
        show_experts(block.mlp, seen, token)
    row("h'", seen[""][0], "eq 12", type(block).forward, token)
    row("h^0", h, "", Transformer.trunk, token)
    likely = lambda h: best(model.lm_head(h)[0, token].softmax(-1), lambda i: tokenizer.decode([i]), 5)
    print(f"  next token: {likely(h)}")
    following = [*ids[1:], int(model.lm_head(h)[0, -1].argmax())]  # behind the text its likeliest next token
    for module in model.model.layers[config.num_hidden_layers :][:1]:
        h1, _ = module(h, model.model.embed_tokens(torch.tensor([following])), *model.freqs_and_mask(tokens))
        row("h^1", h1, "eqs 21-22", MTP.forward, token)
        print(f"  MTP, behind {tokenizer.decode([following[token]])!r}: {likely(h1)}  eq 23")


if __name__ == "__main__":
    run_main(main)
