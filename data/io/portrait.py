"""What a model costs, from its configuration and the shapes of its tensors; nothing is built here."""

from math import prod

from data.io.checkpoint import mtp_prefixes


def parameter_counts(shapes: dict[str, tuple[int, ...]], config: dict) -> dict[str, int]:
    """Parameters by the hub's convention: the routing bias counts, copies inside MTP modules do not.

    shapes: of every tensor of the model's state. Keys: `main` (without MTP), `mtp`, `total`,
    `embedding`, `active` (used per token, without the input embedding, which is a lookup, but with
    the head; MTP not included).
    """
    size = {name: prod(shape) for name, shape in shapes.items()}
    extra = mtp_prefixes(config["num_hidden_layers"], config["num_nextn_predict_layers"])
    mtp = sum(n for name, n in size.items() if name.startswith(extra))
    experts = sum(n for name, n in size.items()
                  if ".experts." in name and not name.startswith(extra))
    total, embedding = sum(size.values()), size["model.embed_tokens.weight"]
    E, K = config["n_routed_experts"], config["num_experts_per_tok"]
    active = total - mtp - embedding - experts * (E - K) // E
    return {"main": total - mtp, "mtp": mtp, "total": total, "embedding": embedding,
            "active": active}


def cache_numbers(config: dict) -> dict[str, int]:
    """Numbers cached per token: MLA, and what GQA (8 groups at most) and MHA of these heads need."""
    L, H = config["num_hidden_layers"], config["num_attention_heads"]
    D, groups = config["qk_nope_head_dim"], max(1, min(8, H // 2))
    return {"MLA": (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * L,
            f"GQA, {groups} groups": 2 * groups * D * L, "MHA": 2 * H * D * L}


def portrait(name: str, config: dict, shapes: dict[str, tuple[int, ...]], counts: dict[str, int],
             flops: float) -> str:
    """The printed self-portrait: tensors with shapes, parameters, FLOPs, cache, memory.

    counts: of `parameter_counts`. flops: per token, in a text of 4096 tokens or of the whole
    context where that is shorter.
    """
    L, T = config["num_hidden_layers"], min(4096, config["max_position_embeddings"])
    lines = [f"{name}: {L} layers, {config['n_routed_experts']} experts, "
             f"{config['num_experts_per_tok']} per token", "",
             f"{'tensor':58}{'shape':>22}{'parameters':>18}"]
    shown = {0, config["first_k_dense_replace"], L}  # one layer of each kind
    for tensor, shape in shapes.items():
        layer = tensor.split(".")[2] if ".layers." in tensor else None
        if layer is None or int(layer) in shown:
            lines.append(f"{tensor:58}{str(tuple(shape)):>22}{prod(shape):>18,}")
    lines += [
        "",
        f"parameters            {counts['main']:,}  (main model, routing bias counted)",
        f"  MTP modules         {counts['mtp']:,}  (more, without their copies of embedding and head)",
        f"  active per token    {counts['active']:,}  (head counted, input embedding not, MTP not)",
        f"FLOPs per token       {si(flops)}FLOP  (forward + backward, T = {T}, causal)",
    ]
    for kind, numbers in cache_numbers(config).items():
        lines.append(f"cache per token       {2 * numbers:,} bytes in bf16 with {kind}")
    lines.append(f"memory to train       {si(16 * counts['total'])}B  (float32 weight, gradient, "
                 "two AdamW moments; activations come on top)")
    return "\n".join(lines)


def si(value: float) -> str:
    """Three digits and the unit's prefix.

    >>> si(70_272), si(2.5e11) + "FLOP"
    ('70.3 K', '250 GFLOP')
    """
    for prefix in ("", "K", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Y"
